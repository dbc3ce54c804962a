"""A rank of the tests in test_parallel.py: rank 0 generates what a file asks for, others serve it.

It is forked from a process that has imported everything: to import torch in each rank would take
longer than all that the tests ask of it.
"""

import atexit
import json
import os
import resource
import sys
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine  # noqa: E402
import parallel  # noqa: E402
from scripts.bits import anonymous_peak  # noqa: E402


def weigh(model) -> int:
    """Bytes of all weights, each storage once; packed ones by what they stand for."""
    layers = [m for m in model.modules() if hasattr(m, "weight_bytes")]
    seen = {w.data_ptr(): w.nbytes for w in model.parameters()}
    return sum(seen.values()) + sum(layer.weight_bytes for layer in layers)


def forked(environment: dict[str, str], path: Path, said: Path) -> None:
    """run() in the environment that torchrun would set. What it prints goes to `said`."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # too late for OMP_NUM_THREADS
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    code = 1
    try:
        run(path)
        code = 0
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # which a forked process would not do
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(path: Path) -> None:
    job, rank = json.loads(path.read_text()), os.environ["RANK"]
    job |= job.get("of_rank", {}).get(rank, {})
    engine.speeds = lambda *rows: job.get("speeds", {"float32": 1.0})
    made, gathers = engine.Model.load, []
    whole = parallel.Group.whole

    def load(*args):
        with anonymous_peak() as grown:
            model = made(*args)
        role = "target" if args[4] is None else "draft"
        weights = weigh(model.transformer)
        layers = [m.layer for m in model.transformer.modules() if hasattr(m, "layer")]
        scales = [float(x.scale_N.double().sum()) for x in layers if hasattr(x, "scale_N")]
        path.with_suffix(f".{role}{rank}").write_text(json.dumps([weights, *grown, scales]))
        if rank == "1" and "spare" in job:  # so many bytes are left from here on
            used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (used + job["spare"],) * 2)
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
