"""How bench.py measures: cells that are timed in turn, ratios with intervals, checks that texts are the same.

Knows: repeats, pairing, medians, the pair and its grown forms, which process answers. Does not know: what is compared
and why (bench.py), how an engine is called (peers.py). Read next: bench.py.
"""

import importlib.util
import os
import platform
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import comb
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import peers  # noqa: E402
import torch  # noqa: E402
from inflate import inflate  # noqa: E402

from checkpoint.tokenizer import load_tokenizer  # noqa: E402
from checkpoint.weights import load_config, resolve, split_inflate  # noqa: E402
from generate import DEMO, read_prompts  # noqa: E402
from runtime import available_cores  # noqa: E402
from speed import distinct_4grams  # noqa: E402

LONGEST_PROMPT = 256  # tokens
SAME = 0.98  # of the fastest in a sweep: as good as it
NEAR_TIE = 1e-4  # two best logits of a float32 model this close may change places between shapes
PROMPTS = [
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    'class Stack:\n    """Last in, first out."""\n\n    def __init__(self):\n',
    'import os\nimport sys\n\n\ndef find_files(root, suffix):\n    """All files below root."""\n',
    'def read_config(path):\n    """Parse the file and return a dictionary."""\n    with open(path) as f:\n',
    "import unittest\n\n\nclass TestQueue(unittest.TestCase):\n    def test_empty(self):\n",
    "def binary_search(values, wanted):\n    low, high = 0, len(values)\n    while low < high:\n",
    "for line in lines:\n    name, _, value = line.partition('=')\n    if not value:\n",
    'def merge(left, right):\n    """Merge two sorted lists into one."""\n    result = []\n',
    "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser()\n    parser.add_argument(\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n\n    def __eq__(self, other):\n",
    'def word_count(text):\n    """How often each word occurs."""\n    counts = {}\n',
    "try:\n    value = int(text)\nexcept ValueError:\n    raise TypeError(\n",
    "from collections import namedtuple\n\nToken = namedtuple('Token', 'kind value line')\n\n\ndef tokenize(code):\n",
    "with open(filename, 'rb') as stream:\n    header = stream.read(4)\n    if header != MAGIC:\n",
    'def is_prime(n):\n    """True if n has no divisor but 1 and itself."""\n    if n < 2:\n        return False\n',
    "async def handle(reader, writer):\n    data = await reader.readline()\n    message = data.decode()\n",
]


# ---- numbers


def interval(values: list[float]) -> dict:
    """Median, and the narrowest pair of order statistics that holds the true one with at least 95% (if any does)."""
    x, n = sorted(values), len(values)
    skip, tail = 0, 0.5**n  # tail: P(Binomial(n, 1/2) <= skip)
    while 2 * (tail + comb(n, skip + 1) * 0.5**n) <= 0.05:
        skip += 1
        tail += comb(n, skip) * 0.5**n
    return {"median": median(x), "low": x[skip], "high": x[n - 1 - skip], "coverage": max(0.0, 1 - 2 * tail), "n": n}


def ratio(of: "Cell", to: "Cell") -> dict:
    """How much faster one cell was than another, repeat by repeat."""
    pairs = [a / b for a, b in zip(of.rates(), to.rates(), strict=True)]
    return {"of": of.name, "to": to.name, **interval(pairs), "pairs": pairs}


def environment() -> dict:
    """Where the numbers come from, without names of hosts or people."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    packages = {}
    for name in ("torch", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "cpu": cpu, "cores": len(available_cores()), "python": platform.python_version(), **packages,
        "dtype": peers.DTYPE, "commit": git.stdout.strip() or None, "load_average_before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }  # fmt: skip


@dataclass
class Cell:
    """One thing measured: a peer and how it is asked, and what came of every repeat."""

    name: str
    peer: str
    how: dict  # the peer's settings
    runs: list[dict] = field(default_factory=list)

    def rates(self) -> list[float]:
        return [run["decoded"] / run["decode_s"] for run in self.runs]

    def settings(self) -> dict:
        """Without the folders: a file of results names no paths."""
        return {key: value for key, value in self.how.items() if key not in ("target", "draft")}

    def title(self) -> str:
        return f"{self.name} " + " ".join(f"{key}={value}" for key, value in self.settings().items())

    def record(self, **labels) -> dict:
        """For the JSON file: labels, settings, speed with its spread, medians of the other figures."""
        settings = self.settings()
        out = {**labels, "name": self.name, "peer": self.peer, **settings}
        cores = [peers.cores_of(settings[d]) for d in ("device", "draft_device") if settings.get(d)]
        out["threads"] = list(map(len, cores))
        out["tokens_per_s"] = {**interval(self.rates()), "runs": self.rates()}
        out["tokens_per_s_per_core"] = median(self.rates()) / len(set().union(*cores))
        out["first_token_ms"] = median(run["first_s"] for run in self.runs) * 1e3
        pieces = sorted(gap for run in self.runs for gap in run["pieces_s"])
        for percent in (50, 90, 99) if pieces else ():
            out[f"piece_p{percent}_ms"] = pieces[min(len(pieces) * percent // 100, len(pieces) - 1)] * 1e3
        out["end_to_end_tokens_per_s"] = interval([sum(map(len, r["ids"])) / r["total_s"] for r in self.runs])
        shares = [s for run in self.runs for row in run["ids"] if (s := distinct_4grams(row)) is not None]
        out["distinct_4grams"] = sum(shares) / len(shares) if shares else None
        for key in dict.fromkeys(key for run in self.runs for key in run["stats"] if key != "counts"):
            values = [v for run in self.runs if (v := run["stats"].get(key)) is not None]
            out[key] = median(values) if values else None
        return out

    def pooled(self, **labels) -> dict:
        """The record of a cell whose timing is beside the point: rates over all of its runs, from counts."""
        counts = [run["stats"]["counts"] for run in self.runs]
        share = lambda a, b, of=counts: sum(c[a] for c in of) / max(1, sum(c[b] for c in of))  # noqa: E731
        record = self.record(**labels)
        timed = [key for key in record if "tokens_per_s" in key or key.endswith("_ms")]
        return {key: value for key, value in record.items() if key not in timed} | {
            "acceptance_rate": share("accepted", "tested"),
            "hit_rate": share("hits", "lookups"),
            "hit_rates": interval([share("hits", "lookups", [c]) for c in counts]),
            "tokens_per_round": share("emitted", "row_rounds"),
            "lookups": sum(c["lookups"] for c in counts),
        }


class Bench:
    """What every part needs: the pair, prompts as token ids, cores, processes, and a line on stderr for each cell.

    args.target, args.draft and args.prompts as on bench.py's command line, effort its Effort; grown checkpoints are
    written to `folder`. ValueError with one sentence for anything the user can set right.
    """

    def __init__(self, args, effort, folder: Path):
        self.effort, self.folder, self.began = effort, folder, time.perf_counter()
        if any(split_inflate(name) for name in (args.target, args.draft)):
            raise ValueError("an inflate: name was given, wanted the small pair: bench.py grows it by itself")
        self.sources = {"target": resolve(args.target), "draft": resolve(args.draft)}
        self.label = "demo" if self.sources["target"] == DEMO / "target" else self.sources["target"].name
        self.prompts = self.encode(read_prompts(args) if args.prompt_file else PROMPTS)
        cores = available_cores()
        self.one, self.other = f"cpu:{cores[0]}", f"cpu:{cores[min(1, len(cores) - 1)]}"
        self.both = f"cpu:{cores[0]},{cores[1]}" if len(cores) > 1 else None
        self.devices = [self.one, self.both] if self.both else [self.one]
        self.theirs = importlib.util.find_spec("transformers") is not None
        self.skipped: dict[str, str] = {} if self.theirs else {"transformers": "it is not installed"}

    def encode(self, texts: list[str]) -> list[list[int]]:
        config, tokenizer = load_config(self.sources["target"]), load_tokenizer(self.sources["target"])
        e = self.effort
        longest = max(e.new_tokens, e.plain_tokens, e.sweep_tokens, e.tune_tokens, e.long_tokens)
        room = min(LONGEST_PROMPT, config.max_positions - longest)
        if room < 8:
            raise ValueError(f"the target's context of {config.max_positions} tokens is too short: use another target")
        if tokenizer is None:  # a checkpoint for tests: any ids will do
            return [[byte % config.vocab_size for byte in text.encode()][:room] for text in texts]
        return [tokenizer.encode(text)[:room] for text in texts]

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.began:6.1f} s] {text}", file=sys.stderr, flush=True)

    def grown(self, role: str, shape: str | None) -> str:
        """The folder of the target or draft, grown to a shape and written once, so that all peers read one file."""
        if shape is None:
            return str(self.sources[role])
        out = self.folder / f"{role}-{shape}"
        if not out.exists():
            self.say(inflate(str(self.sources[role]), shape, out, getattr(torch, peers.DTYPE), "cpu", 0, 2 << 30))
        return str(out)

    def batch(self, number: int, size: int = 1) -> list[list[int]]:
        """Prompts in turn, cut to the same length: nobody pads."""
        rows = [self.prompts[(number * size + i) % len(self.prompts)] for i in range(size)]
        return [row[: min(map(len, rows))] for row in rows]

    @contextmanager
    def workers(self):
        """ask(do, **request): ours answers in one process, transformers in one for each set of cores."""
        with ExitStack() as stack:
            started = {}

            def ask(do: str, **request) -> dict:
                theirs = request.get("peer", "").startswith("transformers")
                side = request["device"] if theirs else "ours"
                if side not in started:
                    started[side] = peers.Worker(peers.cores_of(side) if theirs else available_cores())
                    stack.callback(started[side].close)
                return started[side].ask(do, **request)

            yield ask

    def run(self, ask, cell: Cell, prompts, new: int, seed: int = 0) -> dict:
        """Once; prompts come round again, so whoever samples draws with another seed then."""
        how = cell.how | ({"seed": seed} if cell.how.get("temperature") else {})
        return ask("run", peer=cell.peer, prompts=prompts, new=new, **how)

    def time(self, ask, what: str, cells: list[Cell], repeats: int, new: int, batch: int = 1) -> None:
        """Every repeat runs every cell once on the same prompts; a first, short run of each does not count."""
        for cell in cells:
            self.run(ask, cell, self.batch(0, batch), min(new, 8))
        for repeat in range(repeats):
            for cell in cells[:: -1 if repeat % 2 else 1]:
                cell.runs.append(self.run(ask, cell, self.batch(repeat, batch), new, repeat))
        for cell in cells:
            self.say(f"{what}: {cell.title()}: {median(cell.rates()):.1f} tokens/s")

    def count(self, ask, what: str, cell: Cell, **labels) -> dict:
        """Run a cell for its counts: acceptance, hits, tokens a round."""
        for number in range(self.effort.predict_batches):
            prompts = self.batch(number, self.effort.predict_batch)
            cell.runs.append(self.run(ask, cell, prompts, self.effort.new_tokens, number))
        record = cell.pooled(**labels)
        self.say(f"{what}: {cell.title()}: acceptance {record['acceptance_rate']:.3f}, hits {record['hit_rate']:.3f}")
        return record

    def best(self, ask, what: str, cells: list[Cell], batch: int = 1, prompts: int = 0) -> tuple[Cell, list[dict]]:
        """The fastest of several settings over a few short prompts, fresh for measuring; and the whole sweep.

        Of those that so few prompts cannot tell apart from the fastest it is the first: the smallest K and M.
        """
        repeats = -(-(prompts or self.effort.sweep_prompts) // batch)
        self.time(ask, f"{what}, sweep", cells, repeats, self.effort.sweep_tokens, batch)
        rate = [sum(r["decoded"] for r in cell.runs) / sum(r["decode_s"] for r in cell.runs) for cell in cells]
        best = cells[next(i for i, speed in enumerate(rate) if speed >= SAME * max(rate))]
        self.say(f"{what}: best is {best.title()}")
        sweep = [cell.settings() | {"tokens_per_s": speed} for cell, speed in zip(cells, rate)]
        return Cell(best.name, best.peer, best.how), [{"name": best.name, "peer": best.peer, **row} for row in sweep]

    def ceiling(self, ask, target: str) -> dict:
        """What the memory of the cores allows: bytes a second, and decode steps a second of the target."""
        step = ask("size", target=target)["step_bytes"]
        out = {"step_bytes": step, "read_bytes_per_s": {}, "steps_per_s": {}}
        for device in self.devices:
            speed = max(ask("bandwidth", device=device)["bytes_per_s"] for _ in range(3))
            out["read_bytes_per_s"][device], out["steps_per_s"][device] = speed, speed / step
            self.say(f"ceiling of {device}: {speed / 1e9:.1f} GB/s, {speed / step:.1f} target steps/s")
        return out

    def same_text(self, ask, reference: Cell, others: list[Cell]) -> dict:
        """Are the texts the reference's? Where not: from which token on, and how close the two best logits were."""
        found, rows = [], 0
        for cell in others:
            for repeat, (want, got) in enumerate(zip(reference.runs, cell.runs)):
                prompts = self.batch(repeat, len(want["ids"]))
                for prompt, ours, theirs in zip(prompts, want["ids"], got["ids"]):
                    rows += 1
                    if ours != theirs:
                        at = next(i for i, (x, y) in enumerate(zip(ours, theirs)) if x != y)
                        gap = ask("gap", target=reference.how["target"], ids=prompt + ours[:at])
                        found.append({"name": cell.name, "repeat": repeat, "token": at, **gap})
        differ = [x for x in found if x["gap"] >= NEAR_TIE]
        self.say(f"{rows} texts compared: {len(found) - len(differ)} near-ties, {len(differ)} others differ")
        return {"texts": rows, "near_ties": len(found) - len(differ), "differ": len(differ), "differences": found}
