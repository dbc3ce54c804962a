"""The Triton kernels compiled for GPUs that are not here: what their compilers can show.

Knows: cards, calls of well-known models, and what a compiled kernel takes of a processor. Does not
know: how a call is planned or launched (kernels.py), or how fast it is. Read next: kernels.py.

    python scripts/check_kernels.py                                  all: two minutes of CPU time
    python scripts/check_kernels.py --card h100 --dtype bfloat16     a part of it

The figures are those of Triton's own ptxas, so it needs Triton but neither a GPU nor CUDA. In the
table, `spilled` is bytes of a thread, `fit` how many programs a processor runs at once, and
`planned` how many of them kernels.py counts on.

Exit code 0: all right. 1: a kernel spills registers to memory, takes more shared memory than the
card gives a program, or fewer programs fit than are planned. 2: a mistake of the caller.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

import kernels  # noqa: E402

# Name -> compute capability, processors, shared memory of each in KiB.
CARDS = {"a100": (80, 108, 164), "h100": (90, 132, 228), "b200": (100, 148, 228)}
RESERVED = 1024  # bytes of shared memory that a card keeps for itself, for each program
TENSOR_COLUMNS = 512  # of one processor's tensor memory, which the b200 has
# Name -> query heads, key/value heads, head size.
MODELS = {"1B": (32, 8, 64), "8B": (32, 8, 128), "70B": (64, 8, 128), "size 256": (16, 2, 256)}
# Name -> tokens fed a row, chain steps, sliding window.
CALLS = {"decode": (1, 0, 0), "verify": (8, 0, 0), "chain": (24, 8, 0), "window": (8, 0, 4096)}
# Data type -> model -> calls. Those of bfloat16 reach each size of tile. float16 compiles alike,
# and float32 has only one or two tiles for a head size.
STEPS = ("decode", "verify", "chain")
WANTED = {
    "bfloat16": {"1B": STEPS, "8B": (*STEPS, "window"), "70B": ("verify",), "size 256": STEPS},
    "float16": {"1B": STEPS, "8B": STEPS, "size 256": STEPS},
    "float32": dict.fromkeys(("1B", "8B", "size 256"), ("verify", "chain")),
}
# Products with int8 weights. Model and layer -> outputs and inputs; rows of x are in the call.
PRODUCTS = {
    ("8B", "gate_up"): (28672, 4096),
    ("8B", "down"): (4096, 14336),
    ("135M", "gate_up"): (3072, 576),
}
WANTED["int8"] = {"8B": ("gate_up 1", "gate_up 64", "down 1", "down 24"), "135M": ("gate_up 8",)}
EXTENT = 8192
HEADER = (
    "card", "dtype", "call", "kernel", "rows", "slots", "splits", "warps", "stages",
    "registers", "spilled", "shared KiB", "fit", "planned",
)  # fmt: skip
WIDTHS = (4, 8, 15, 7, 4, 5, 6, 5, 6, 9, 7, 10, 3, 7)


class Case(NamedTuple):
    """One call to compile: keys of CARDS, WANTED, MODELS and CALLS."""

    card: str
    dtype: str
    model: str
    call: str


class Figures(NamedTuple):
    """What one kernel takes: registers a thread, bytes of local memory and of shared memory.

    columns   of tensor memory
    """

    registers: int
    spilled: int
    shared: int
    columns: int
    warps: int

    def programs(self, shared: int) -> int:
        """How many such programs a processor with so many bytes of shared memory runs at once."""
        threads = 32 * self.warps
        rounded = -(-self.registers // 8) * 8
        room = [kernels._REGISTERS // (rounded * threads), shared // (self.shared + RESERVED)]
        return min(room + ([TENSOR_COLUMNS // self.columns] if self.columns else []))


class NamedDriver:
    """All that Triton asks of a driver while it compiles: which target that is for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device=None) -> int:
        return 0


def launches(case: Case) -> list[kernels._Launch]:
    """The launches of this call as the engine makes them, with tensors that have no memory."""
    _, processors, kib = CARDS[case.card]
    card = kernels._Card(processors, kib * 1024)
    if case.dtype == "int8":
        layer, rows = case.call.split()
        shape = PRODUCTS[case.model, layer]
        x, out = (
            torch.empty(int(rows), n, dtype=torch.bfloat16, device="meta") for n in shape[::-1]
        )
        codes = torch.empty(shape, dtype=torch.int8, device="meta")
        return [kernels._product(x, codes, out[0], out, card)]
    H, G, D = MODELS[case.model]
    T, steps, window = CALLS[case.call]
    base = EXTENT + 8
    dtype = getattr(torch, case.dtype)
    query = torch.empty(1, T, H, D, dtype=dtype, device="meta")
    cache = torch.empty(1, G, base + T * steps + 1, D, dtype=dtype, device="meta")
    limit = torch.empty(1, T, dtype=torch.long, device="meta")
    step = torch.empty(1, dtype=torch.long, device="meta") if steps else None
    return kernels._launches(
        query, cache, cache, limit, limit if window else None, step, query,
        D**-0.5, EXTENT, base, steps, window, card,
    )  # fmt: skip


def compiled(launch: kernels._Launch) -> Figures:
    """The figures of this launch's kernel, compiled for the driver's target."""
    done = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
    tool = Path(kernels.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    about = done.metadata
    columns = getattr(about, "tmem_size", 0) or 0
    return Figures(registers, stack + local, about.shared, columns, about.num_warps)


class Task(NamedTuple):
    """One kernel to compile: launch `number` of a call."""

    case: Case
    number: int


def distinct(cases: list[Case]) -> list[Task]:
    """One task for each kernel among these calls' launches, named after the first that has it."""
    tasks = {}
    for case in cases:
        for number, launch in enumerate(launches(case)):
            name, options = launch.kernel.__name__, launch.options
            left_out = tuple(x is None for x in launch.arguments)
            about = (case.dtype, *options.items(), left_out)
            if name == "_merge":  # the first call has the most splits, and types differ in a store
                about = options["D"]
            tasks.setdefault((case.card, name, about), Task(case, number))
    return list(tasks.values())


def check(task: Task) -> tuple[str, list[str]]:
    """A line of the table for one kernel, and what is wrong with it."""
    from triton.runtime.driver import driver

    case = task.case
    driver.set_active(NamedDriver(CARDS[case.card][0]))
    launch = launches(case)[task.number]
    found, options = compiled(launch), launch.options
    programs = found.programs(CARDS[case.card][2] * 1024)
    name, call = launch.kernel.__name__, f"{case.model} {case.call}"
    tile = (str(options.get(key, "")) for key in ("ROWS", "SLOTS"))
    splits = ""
    if name != "_multiply":
        splits = str(launch.grid[1]) if name == "_attend" else str(launch.arguments[3])
    stages, shared = options.get("num_stages", ""), f"{found.shared / 1024:.1f}"
    columns = (
        case.card, case.dtype, call, name, *tile, splits, found.warps, stages,
        found.registers, found.spilled, shared, programs, launch.programs,
    )  # fmt: skip
    where = f"{case.card}, {case.dtype}, {call}, {name}"
    return line(columns), [f"{where}: {said}" for said in faults(found, launch.programs, case.card)]


def faults(found: Figures, planned: int, card: str) -> list[str]:
    """What is wrong with a kernel of which so many programs are planned to share a processor."""
    shared, said = CARDS[card][2] * 1024, []
    if found.spilled:
        said.append(f"spills {found.spilled} bytes of registers, wanted 0")
    if found.shared > shared - RESERVED:
        most = (shared - RESERVED) // 1024
        said.append(f"takes {found.shared / 1024:.1f} KiB of shared memory, wanted at most {most}")
    elif found.programs(shared) < planned:
        said.append(f"{planned} programs a processor are planned, and {found.programs(shared)} fit")
    return said


def line(columns) -> str:
    """One line of the table."""
    words = (f"{column:>{width}}" for column, width in zip(columns[4:], WIDTHS[4:]))
    return " ".join((*(f"{c:<{width}}" for c, width in zip(columns, WIDTHS[:4])), *words))


def results(tasks: list[Task]) -> Iterator[tuple[str, list[str]]]:
    """check() of each task, in order, on all cores."""
    workers = min(len(os.sched_getaffinity(0)), len(tasks))
    if workers < 2:
        yield from map(check, tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        yield from pool.map(check, tasks)


def parse(arguments: list[str] | None) -> list[Case]:
    """The cases that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--card", choices=CARDS, nargs="+", default=list(CARDS))
    parser.add_argument("--dtype", choices=WANTED, nargs="+", default=list(WANTED))
    models = sorted({model for calls in WANTED.values() for model in calls})
    parser.add_argument("--model", choices=models, nargs="+", default=models)
    asked = parser.parse_args(arguments)
    return [
        Case(card, dtype, model, call)
        for card in asked.card
        for dtype in asked.dtype
        for model, calls in WANTED[dtype].items()
        if model in asked.model
        for call in calls
    ]


def main(arguments: list[str] | None = None) -> int:
    if kernels.triton is None:
        print("Triton is not installed: pip install triton (on Linux)", file=sys.stderr)
        return 2
    began, tasks, wrong = time.monotonic(), distinct(parse(arguments)), []
    print(line(HEADER))
    for row, said in results(tasks):
        print(row, flush=True)
        wrong += said
    seconds, verdict = time.monotonic() - began, "wrong" if wrong else "all right"
    print(f"{len(tasks)} kernels in {seconds:.0f} s: {verdict}")
    print("".join(said + "\n" for said in wrong), end="")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
