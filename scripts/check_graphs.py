"""What a run on a GPU would launch, seen without one: kernels a step, and what a round costs the
host. And a rehearsal of gpu_check.py: whether its parts run to their end at full size.

Knows: the null GPU's counters, two shapes, three modes. Does not know: values, which are garbage
there, or how long a kernel takes. Read next: runtime.py, whose graphs are looked at.

    NULLGPU/run PYTHON scripts/check_graphs.py                            the table, some minutes
    NULLGPU/run PYTHON scripts/check_graphs.py --gpu-check --only decode  parts of gpu_check.py

PYTHON has a CUDA build of torch. NULLGPU is the folder of the null GPU, which is not part of this
repository: a library that answers for the CUDA runtime and cuBLAS. Dynamo, Inductor, Triton,
streams, captures and replays are the real ones; kernels are counted and not launched, and what CUDA
forbids in a capture fails there too. A graph's replay lasts so long for each of its kernels that a
verification takes a few milliseconds.

The table has a column for each run. Its first rows are kernels of each captured graph; then the
calls that a capture forbids and the allocations of device or pinned memory in a round after the
warm-up (wanted: none of both; where the host falls behind, a pool of pinned memory may still grow
by a buffer or two, which is no fault); graphs, launches, copies and waits a round; and the host's
time from one verification's end to the next one's begin. All that follows --gpu-check is handed to
gpu_check.py: what it finds right or wrong there means nothing, only that it ends.

Exit code 0: all right; 1: forbidden calls, or allocations in more than a tenth of the rounds.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from statistics import median

LOG = Path(tempfile.mkdtemp()) / "captures"
# The library reads these when it logs, or replays a graph, for the first time: where to, and the
# microseconds of a kernel on streams of high and other priority.
os.environ |= {"NULL_US_HI": "12", "NULL_US_LO": "4"} | os.environ | {"NULLCUDA_LOG": str(LOG)}

import nullgpu  # noqa: E402  before torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import gpu_check  # noqa: E402
import gpu_parts  # noqa: E402
import torch  # noqa: E402

import runtime  # noqa: E402
from checkpoint.config import Config  # noqa: E402
from checkpoint.inflation import NAMES, Growth, parse_shape  # noqa: E402
from engine import Engine, Model  # noqa: E402
from model import Transformer  # noqa: E402
from runtime import Devices, Graph, Policy  # noqa: E402

MODELS = {"target": "llama-3.1-8b", "draft": "llama-3.2-1b"}
K, M, NEW = 7, 24, 64
ALLOCATIONS = 0.1  # of pinned memory, in a round
# (mode, temperature, coupling): AR and SD in the usual way, SSD in every way.
RUNS = (
    ("ar", 0.0, "shared"), ("sd", 0.0, "shared"), ("ssd", 0.0, "shared"),
    ("ar", 1.0, "shared"), ("sd", 1.0, "shared"), ("ssd", 1.0, "shared"),
    ("ssd", 1.0, "maximal"),
)  # fmt: skip


class CountedGraph(Graph):
    """A graph that knows how many (kernels, copies and memsets) it was captured with."""

    def _capture(self, args) -> None:
        super()._capture(args)
        ends = re.findall(r"end capture: kernels (\d+) copies (\d+) memsets (\d+)", LOG.read_text())
        kernels, copies, memsets = map(int, ends[-1])
        self.counts = kernels, copies + memsets


def read_as_hits(policy: Policy, numbers: torch.Tensor, read=Policy.read) -> list:
    """What was read, as if the scores were finite and every token 0: all look-ups hit."""
    return [[1] + [0] * (len(row) - 1) for row in read(policy, numbers)]


def random_model(role: str, layers: int | None) -> Model:
    """A model of the role's shape, with so many layers or all of its own."""
    raw = {NAMES[name]: size for name, size in parse_shape(MODELS[role]).items()}
    raw |= {"model_type": "llama", "max_position_embeddings": 8192}
    raw |= {"num_hidden_layers": layers or raw["num_hidden_layers"]}
    with torch.device("cuda:0"):
        transformer = Transformer(Config.from_dict(raw)).bfloat16().requires_grad_(False)
    return Model.of(transformer, MODELS[role])


def counts(pair: Engine) -> dict[tuple, tuple[int, int]]:
    """(role, step, width) -> counts, of all that was captured in the last run."""
    out = {}
    for model in (pair.target, pair.draft):
        for runner in model.runners.values():
            for (name, layout, _, *rest), graph in runner.step_of.items():
                width = dict(layout).get("tokens") or rest[0][1]  # or a tensor's
                out[runner.role, name.strip("_"), width] = graph.counts
    return out


def play(pair: Engine, mode: str, temperature: float, coupling: str) -> dict:
    """What a round takes, by the names of the second table's columns."""
    settings = dict(mode=mode, temperature=temperature, coupling=coupling, k=K, fan_out=M)
    pair.generate([[1, 2, 3]], max_new_tokens=NEW, ignore_eos=True, **settings)
    decoding = pair.start([[1, 2, 3]], max_new_tokens=NEW, ignore_eos=True, **settings)
    rounds = decoding.rounds()
    next(rounds), next(rounds)
    before = nullgpu.stats()
    played = sum(1 for _ in rounds)
    after = nullgpu.stats()
    pair.finish(decoding)
    each = {key: (after[key] - before[key]) / played for key in after}
    done = decoding.figures.rounds[1:]
    waits = [(b.begin - a.end) * 1e6 for a, b in zip(done, done[1:]) if not a.drafted]
    told = {"forbidden calls": after["bad"], "allocations": each["mallocs"] + each["hostallocs"]}
    names = {"graphs": "graph_launches", "launches": "launches", "copies": "copies"}
    told |= {name: each[key] for name, key in names.items()} | {"waits": each["syncs"]}
    told["us between verifications"] = median(waits) if waits else float("nan")
    lasts = [(b.begin - a.begin) * 1e6 for a, b in zip(done, done[1:])]
    return told | {"us of a round": median(lasts)}


def print_table(kernels: dict, rounds: dict) -> None:
    """kernels[layers, run] is counts(), with 1 layer and all; rounds[run] is what play() tells."""
    names = [f"{mode} {t:g} {coupling}" for mode, t, coupling in rounds]
    print(f"{'mode, temperature, coupling':32}" + "".join(f"{name:>15}" for name in names))
    for step in sorted({step for of in kernels.values() for step in of}):
        text, layers = "{}: {} of {}".format(*step), parse_shape(MODELS[step[0]])["layers"]
        text = f"{text:32}"
        for run in rounds:
            whole, one = (kernels[n, run].get(step) for n in (None, 1))
            each = f"{whole[0]} ({(whole[0] - one[0]) / (layers - 1):.3g})" if whole else ""
            text += f"{each:>15}"
        print(text)
    for name in next(iter(rounds.values())):
        print(f"{name:32}" + "".join(f"{told[name]:>15.4g}" for told in rounds.values()))


def rehearse(part: str, how: str) -> None:
    """One part of gpu_check.py, as gpu_parts.py plays it, with garbage for weights and without
    cuDNN, which finds no driver.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    Policy.read = read_as_hits
    Growth.__init__ = Growth.fill = lambda *given: None
    if part == "transformers":
        end_by_length()
    gpu_parts.run(part, json.loads(how), lambda found: print(json.dumps(found), flush=True))


def end_by_length() -> None:
    """Let transformers end texts by their length. It asks a tensor, which here never says so."""
    from transformers import GenerationMixin, MaxLengthCriteria

    ask, ended = MaxLengthCriteria.__call__, [False]

    def asked(limit, ids, *rest, **more):
        ended[0] = ids.shape[1] >= limit.max_length
        return ask(limit, ids, *rest, **more)

    def goes_on(*state, **more) -> bool:
        goes, ended[0] = not ended[0], False
        return goes

    MaxLengthCriteria.__call__, GenerationMixin._has_unfinished_sequences = asked, goes_on


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("part", nargs="*", help="used by gpu_check.py: a part and its settings")
    parser.add_argument("--gpu-check", nargs=argparse.REMAINDER, help="run gpu_check.py with these")
    args = parser.parse_args(arguments)
    if args.part:
        rehearse(*args.part)
        return 0
    if args.gpu_check is not None:
        gpu_check.PROGRAM = Path(__file__)
        return gpu_check.main(args.gpu_check)
    runtime.Graph, Policy.read = CountedGraph, read_as_hits
    kernels, rounds, devices = {}, {}, Devices("cuda:0")
    for layers in (1, None):
        models = [random_model(role, layers) for role in MODELS]
        for run in RUNS:
            pair = Engine(*models, devices, lambda text: None)
            rounds[run] = play(pair, *run)
            kernels[layers, run] = counts(pair)
    print(f"torch {torch.__version__}; {MODELS['target']} and {MODELS['draft']}, K={K}, M={M};")
    print("kernels of a step, in brackets what each layer adds; all else is of a round\n")
    print_table(kernels, rounds)
    wrong = [
        run for run, told in rounds.items()
        if told["forbidden calls"] or told["allocations"] > ALLOCATIONS
    ]  # fmt: skip
    print(f"\n{'wrong' if wrong else 'all right'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
