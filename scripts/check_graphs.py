"""What a run on a GPU would launch, seen without one: kernels a step, and what a round costs the
host.

Knows: the null GPU's counters, two shapes, three modes. Does not know: values, which are garbage
there, or how long a kernel takes. Read next: runtime.py, whose graphs are looked at.

    NULLGPU/run PYTHON scripts/check_graphs.py       some minutes; PYTHON has a CUDA build of torch

NULLGPU is the folder of the null GPU (shared/tools/nullgpu, whose README says how to make such an
environment): a library that answers for the CUDA runtime and cuBLAS. Dynamo, Inductor, Triton,
streams, captures and replays are the real ones; kernels are counted and not launched, and what CUDA
forbids in a capture fails there too. A graph's replay lasts so long for each of its kernels that a
verification takes a few milliseconds.

First table: kernels of each captured graph, and copies and memsets in brackets; `a layer` is what
each layer adds. Second table, of rounds after the warm-up: forbidden calls in captures and
allocations of device memory (wanted: none), graphs, copies and waits a round, and the host's time
from one verification's end to the next one's begin.

Exit code 0: all right; 1: forbidden calls, or allocations in rounds.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

LOG = Path(tempfile.mkdtemp()) / "captures"
# The library reads these when it logs, or replays a graph, for the first time.
os.environ |= {"NULLCUDA_LOG": str(LOG), "NULL_US_HI": "12", "NULL_US_LO": "4"}

import nullgpu  # noqa: E402  before torch
import torch  # noqa: E402

import runtime  # noqa: E402
from checkpoint.config import Config  # noqa: E402
from checkpoint.inflation import NAMES, parse_shape  # noqa: E402
from engine import Engine, Model  # noqa: E402
from model import Transformer  # noqa: E402
from runtime import Devices, Graph, Policy  # noqa: E402

MODELS = {"target": "llama-3.1-8b", "draft": "llama-3.2-1b"}
K, M, NEW = 7, 24, 64
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
            for (name, layout, *_), graph in runner.step_of.items():
                width = dict(layout)["tokens"]
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
    return {
        "forbidden": after["bad"], "allocations": each["mallocs"] + each["hostallocs"],
        "graphs": each["graph_launches"], "launches": each["launches"], "copies": each["copies"],
        "waits": each["syncs"], "host us": median(waits) if waits else float("nan"),
        "round us": median((b.begin - a.begin) * 1e6 for a, b in zip(done, done[1:])),
    }  # fmt: skip


def print_kernels(found: dict, ways: list[tuple]) -> None:
    """The first table; found[layers, temperature, coupling] is counts(), with 1 layer and all."""
    print(f"{'step':30}" + "".join(f"{f'T={t:g}, {c}':>22}{'a layer':>9}" for t, c in ways))
    for step in sorted({step for of in found.values() for step in of}):
        role, name, width = step
        text = f"{role}: {name} of {width}"
        for way in ways:
            whole, one = (found[(layers, *way)].get(step) for layers in (None, 1))
            if whole is None:
                text = f"{text:30}" + " " * 31
                continue
            layers = parse_shape(MODELS[role])["layers"]
            text = f"{text:30}" + f"{f'{whole[0]} (+{whole[1]})':>22}"
            text += f"{(whole[0] - one[0]) / (layers - 1):>9.3g}"
        print(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.parse_args(arguments)
    runtime.Graph, Policy.read = CountedGraph, read_as_hits
    found, rounds, devices = {}, {}, Devices("cuda:0")
    for layers in (1, None):
        models = [random_model(role, layers) for role in MODELS]
        for run in RUNS:
            pair = Engine(*models, devices, lambda text: None)
            told = play(pair, *run)
            found.setdefault((layers, *run[1:]), {}).update(counts(pair))
            if layers is None:
                rounds[run] = told
    print(f"torch {torch.__version__}; {MODELS['target']} and {MODELS['draft']}, K={K}, M={M}\n")
    print_kernels(found, list(dict.fromkeys(run[1:] for run in RUNS)))
    columns = list(rounds[RUNS[0]])
    print("\n" + f"{'run, figures a round':30}" + "".join(f"{name:>12}" for name in columns))
    for (mode, temperature, coupling), told in rounds.items():
        label = f"{mode.upper()} T={temperature:g}, {coupling}"
        print(f"{label:30}" + "".join(f"{told[name]:>12.4g}" for name in columns))
    wrong = [run for run, told in rounds.items() if told["forbidden"] or told["allocations"]]
    print(f"\n{'wrong' if wrong else 'all right'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
