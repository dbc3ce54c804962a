"""A rank of the tests in test_parallel.py: rank 0 generates what a file asks for, others serve it.

    python tests/rank.py JOB.json     with the environment that torchrun would set
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine  # noqa: E402
import parallel  # noqa: E402


def weigh(model) -> int:
    """Bytes of all weights, each storage once; packed ones by what they stand for."""
    layers = [m for m in model.modules() if hasattr(m, "weight_bytes")]
    seen = {w.data_ptr(): w.nbytes for w in model.parameters()}
    return sum(seen.values()) + sum(layer.weight_bytes for layer in layers)


def main() -> None:
    path = Path(sys.argv[1])
    job, rank = json.loads(path.read_text()), os.environ["RANK"]
    engine.speeds = lambda: job.get("speeds", {"float32": 1.0})
    made, gathers = engine.Model.load, []
    whole = parallel.Group.whole

    def load(*args):
        model = made(*args)
        path.with_suffix(f".bytes{rank}").write_text(str(weigh(model.transformer)))
        return model

    def counted(*args):
        gathers.append(1)
        return whole(*args)

    engine.Model.load, parallel.Group.whole = load, counted
    loaded, results = engine.load(**job["load"]), []
    for prompts, settings in job["runs"]:
        del gathers[:]
        result = loaded.generate(prompts, **settings)
        results.append({"ids": result.token_ids, "gathers": len(gathers)})
    path.with_suffix(".out").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
