"""Where and when work runs: lanes, thread pinning, packed weights, compilation and CUDA graphs. All of it, only here.

Knows: devices, threads, streams, torch.compile. Does not know: what the work computes. Read next: steps.py, the work.

A lane is one device's ordered queue of work, served by one thread: start() returns at once, result() waits. Because
PyTorch releases the interpreter's lock inside its operators, two lanes of one process really do overlap: two sets of
cores, a GPU and some cores, two GPUs, or two streams of one GPU.
"""

import atexit
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

# A lane that wants the interpreter's lock asks for it after this many seconds (Python's default is 5 ms, longer than a
# round). Measured on 2 cores, a verification beside a busy draft: 5.2 ms by default, 4.5 ms at 20 us, 3.4 ms alone.
SWITCH_S = 2e-5
HANGS_S = 5.0  # a draft still busy with a run that ended so long ago hangs: it gets a new lane


class LaneFault(RuntimeError):
    """A lane's work raised, gave garbage or exceeded its time limit. The message is one sentence for the user."""


# ---- devices


def parse_device(spec: str) -> tuple[torch.device, tuple[int, ...]]:
    """ "cpu", "cpu:0", "cpu:0-1,3", "cuda", "cuda:1" -> the torch device and, for a CPU, the cores (empty: all)."""
    kind, colon, rest = spec.partition(":")
    wanted = "wanted cpu, cpu:CORES (such as cpu:0 or cpu:0-1) or cuda:N"
    if kind == "cuda":
        if colon and not rest.isdecimal():
            raise ValueError(f"device is {spec!r}, {wanted}")
        index, found = int(rest or 0), torch.cuda.device_count()
        if index >= found:
            raise ValueError(f"device is {spec!r}, but torch finds {found} CUDA devices: use one of those, or cpu")
        return torch.device("cuda", index), ()
    if kind != "cpu":
        raise ValueError(f"device is {spec!r}, {wanted}")
    cores = set()
    for part in rest.split(",") if colon else ():
        low, dash, high = part.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or len(part) > 9 or int(high or low) < int(low):
            raise ValueError(f"device is {spec!r}, {wanted}")
        cores.update(range(int(low), min(int(high or low), int(low) + 4096) + 1))
    missing = cores - set(available_cores())
    if missing:
        raise ValueError(
            f"device is {spec!r}, but this process may run on cores {_ranges(available_cores())} only: use those"
        )
    return torch.device("cpu"), tuple(sorted(cores))


def available_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(os.getpid()))  # the main thread's: a lane's own thread is pinned to a part
    return list(range(os.cpu_count() or 1))


def _ranges(cores: list[int]) -> str:
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


# ---- lanes


class Pending:
    """Work that a lane has accepted."""

    def __init__(self, name: str, work: Callable, args: tuple):
        self.name, self.work, self.args = name, work, args
        self.value, self.error = None, None
        self.begin = self.end = 0.0  # seconds, time.perf_counter()
        self.usual_s = float("inf")  # what such work takes, as far as the caller knows
        self._finished = threading.Event()

    def done(self, within: float = 0.0) -> bool:
        """Is it finished, or will it be so many seconds from now, if it takes what it usually does?"""
        soon = self.begin and time.perf_counter() + within > self.begin + self.usual_s
        return bool(soon) or self._finished.is_set()

    def wait(self, limit_s: float) -> bool:
        return self._finished.wait(limit_s)

    def result(self, limit_s: float | None = None):
        """Wait for the value. Raises what the work raised, or LaneFault after limit_s seconds."""
        if not self._finished.wait(limit_s):
            raise LaneFault(f"{self.name} did not finish within {limit_s:.3g} s")
        if self.error is not None:
            raise self.error
        return self.value

    def run(self) -> None:
        self.begin = time.perf_counter()
        try:
            self.value = self.work(*self.args)
        except BaseException as error:  # handed to whoever asks for the result
            self.error = error
        self.end = time.perf_counter()
        self.work = self.args = None  # do not keep tensors alive
        self._finished.set()


class Lane:
    """One device's queue of work and the thread that serves it. `spans` records (name, begin, end) of what ran."""

    def __init__(self, spec: str, name: str, high_priority: bool = False):
        self.spec, self.name = spec, name
        self.device, self.cores = parse_device(spec)
        self.threads = len(self.cores) or len(available_cores())
        self.stream = torch.cuda.Stream(self.device, priority=-1 if high_priority else 0) if self.on_gpu else None
        self.broken = False  # its work failed or hangs: a new lane is needed
        self.error: BaseException | None = None  # what its work raised last
        self.last: Pending | None = None
        self.spans: list[tuple[str, float, float]] = []
        self.last_s = 0.0  # what the last of them lasted
        self._queue: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"lane-{name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def start(self, name: str, work: Callable, *args) -> Pending:
        """Queue work(*args) behind what is already there and return at once."""
        self.last = pending = Pending(name, work, args)
        self._queue.put(pending)
        return pending

    @contextmanager
    def span(self, name: str):
        """Record a part of the work, for the trace and the figures. Called on this lane's thread."""
        begin = time.perf_counter()
        yield
        self.spans.append((name, begin, time.perf_counter()))
        self.last_s = time.perf_counter() - begin

    def close(self) -> None:
        """Let the work in hand finish, for a moment; a thread that dies with the interpreter inside torch aborts it."""
        self._queue.put(None)
        self._thread.join(1.0)

    def _serve(self) -> None:
        sys.setswitchinterval(SWITCH_S)
        # The order matters: OpenMP helpers inherit the affinity of the thread that first needs them.
        if self.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)
        if not self.on_gpu:
            torch.set_num_threads(self.threads)
        with torch.inference_mode(), torch.cuda.stream(self.stream) if self.on_gpu else nullcontext():
            while (pending := self._queue.get()) is not None:
                pending.run()
                self.error = pending.error or self.error
                self.spans.append((pending.name, pending.begin, pending.end))


class Devices:
    """Where target and draft run: given by the user, or what measures best for a mode on this machine."""

    def __init__(self, device: str | None = None, draft_device: str | None = None):
        self.given = (device, draft_device or device)
        self.target, self.draft = (parse_device(spec)[0] for spec in self.choose("ssd"))
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._bandwidth: dict[str, float] = {}

    def choose(self, mode: str) -> tuple[str, str]:
        """The target's and the draft's device, as given or by default."""
        device, draft = self.given
        if device is None and torch.cuda.is_available():
            device = "cuda:0"
            draft = draft or ("cuda:1" if torch.cuda.device_count() > 1 else "cuda:0")
        if device is not None:
            return device, draft or device
        cores = available_cores()
        if mode != "ssd" or len(cores) < 2:
            return "cpu", draft or "cpu"  # they take turns: all cores for both
        return "cpu:" + _ranges(cores[:-1]), draft or f"cpu:{cores[-1]}"

    def lanes(self, mode: str) -> tuple[Lane, Lane]:
        """The two lanes; where target and draft take turns on one device it is one lane for both."""
        target_spec, draft_spec = self.choose(mode)
        target = self._lane(target_spec, "target")
        return target, target if mode != "ssd" and draft_spec == target_spec else self._lane(draft_spec, "draft")

    def bandwidth(self, lane: Lane) -> float:
        """Bytes per second a plain read reaches on the lane, measured once."""
        if lane.spec not in self._bandwidth:
            self._bandwidth[lane.spec] = read_bandwidth(lane)
        return self._bandwidth[lane.spec]

    def _lane(self, spec: str, role: str) -> Lane:
        lane = self._lanes.get((spec, role))
        # A draft may hang in a round that no longer needed it. The target's lane is waited for by its queue, always.
        if lane is not None and role == "draft" and lane.last is not None and not lane.broken:
            lane.broken = not lane.last.wait(HANGS_S)
        if lane is None or lane.broken or lane.error:
            lane = self._lanes[spec, role] = Lane(spec, role, high_priority=role == "target")
        lane.spans.clear()
        return lane


@contextmanager
def one_thread():
    """Work outside the lanes must not start OpenMP helpers: libgomp lets threads that outnumber the cores sleep at
    every parallel region, so a second team in the process slows a lane on several cores (111 sleeps a step, not 3)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- packed linear layers (CPU)


class PackedLinear(nn.Module):
    """nn.Linear with its float32 weight in oneDNN's blocked layout: 1.3x to 4x the speed, most for 2 to 16 rows."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x):
        return self._multiply(x, self.weight, self.bias, "none", [], "")


def pack(model: nn.Module) -> None:
    """Replace the linear layers of a float32 model on the CPU, one after the other, freeing each plain weight."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(module, name, PackedLinear(child))


def read_bandwidth(lane: Lane) -> float:
    """Bytes per second that a plain read of memory reaches on a lane: the floor of every decode step."""

    def probe():
        source = torch.ones(1 << (30 if lane.on_gpu else 26), device=lane.device)
        best = float("inf")
        for _ in range(4):
            _wait(lane)
            begin = time.perf_counter()
            source.sum()
            _wait(lane)
            best = min(best, time.perf_counter() - begin)
        return source.nbytes / best

    return lane.start("read probe", probe).result()


def _wait(lane: Lane) -> None:
    if lane.on_gpu:
        lane.stream.synchronize()


def peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---- compilation and CUDA graphs


class Graph:
    """A function of tensors with fixed shapes, captured once as a CUDA graph and replayed from then on.

    Inputs are copied into the captured buffers (from pinned host memory too); outputs are the captured buffers
    themselves and share a pool with the lane's other graphs, so they hold only until the next replay of any of them:
    whoever keeps one longer clones it.
    """

    def __init__(self, work: Callable, device: torch.device, pool):
        self.work, self.device, self.pool, self.graph = work, device, pool, None

    def __call__(self, *args):
        if self.graph is None:
            self._capture(args)
        for static, arg in zip(self.inputs, args):
            static.copy_(arg, non_blocking=True)
        self.graph.replay()
        return self.outputs

    def _capture(self, args) -> None:
        self.inputs = [arg.to(self.device, copy=True) for arg in args]
        stream = torch.cuda.current_stream(self.device)
        for _ in range(2):  # compilation and library set-up must not happen inside the capture
            self.work(*self.inputs)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with _CAPTURE, torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            self.outputs = self.work(*self.inputs)
        # The work belongs to a runner that holds this graph: a circle would keep its caches until Python collects it.
        self.graph, self.work = graph, None


COMPILED_SHAPES = 64  # most shapes of one function that may be compiled in a process
# Up to so many rows a matrix product becomes a generated loop, tuned by coordinate descent where it runs, as gpt-fast
# does: inductor has one for a single row only. More rows go to cuBLAS. 0: always cuBLAS. gpu_check.py measures both.
TUNED_ROWS = 1
_CAPTURE = threading.Lock()  # one capture at a time in a process


def _inductor(graph, inputs):
    """torch.compile's inductor, which tunes what it generates for few rows: about ten kernels and half a minute."""
    from torch._inductor.compile_fx import compile_fx

    x_BTE = next(x for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 3)  # all else has 1, 2 or 4 axes
    few = x_BTE.shape[:-1].numel() <= TUNED_ROWS
    return compile_fx(graph, inputs, config_patches={"coordinate_descent_tuning": few})


class Policy:
    """How a model's steps run: eager, or static: compiled, and on CUDA captured. Static shapes never change.

    One block is compiled and serves every layer, so that warm-up takes seconds, not minutes. On CUDA the noise is too,
    the longest chain of small operations over the vocabulary; everything around is captured as it is.
    """

    def __init__(self, device: torch.device, compile: bool):
        self.device, self.static = device, compile
        self.graphs = compile and device.type == "cuda"

    def enter_thread(self) -> None:
        """Before anything compiles on a thread (the setting is the thread's own): every shape of every model is one
        more "recompilation" of the one block's code."""
        torch._dynamo.config.recompile_limit = COMPILED_SHAPES

    def fuse(self, work: Callable) -> Callable:
        return torch.compile(work, fullgraph=True, dynamic=False) if self.graphs else work

    def compile(self, model) -> None:
        """A transformer's block, which serves all layers, and on CUDA its head, which can be as large as several."""
        on_gpu = {"backend": _inductor} if self.graphs else {}
        for block in model.layers:
            block.compile(fullgraph=True, dynamic=False, **on_gpu)
        if self.graphs:  # a function of ours: torch.compile skips modules of torch.nn that stand alone
            head = lambda x_BTE: F.linear(x_BTE, model.head.weight)  # noqa: E731
            model.head.forward = torch.compile(head, fullgraph=True, dynamic=False, **on_gpu)

    def new_pool(self):
        """Memory for the graphs of one lane: they never replay at once. None where nothing is captured."""
        return torch.cuda.graph_pool_handle() if self.graphs else None

    def step(self, work: Callable, pool) -> Callable:
        """`work` takes and returns tensors of fixed shapes: on CUDA it becomes one graph replay."""
        return Graph(work, self.device, pool) if self.graphs else work

    def send(self, numbers: list) -> torch.Tensor:
        """Whole numbers for a step. Where a graph copies them into its own buffer they stay in pinned memory."""
        if self.graphs:
            return torch.tensor(numbers, dtype=torch.int64, pin_memory=True)
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    def read(self, numbers: torch.Tensor) -> list:
        """What a step returned, as lists. Waits for this lane alone, without the interpreter's lock."""
        if self.device.type == "cuda":
            numbers = numbers.to("cpu", non_blocking=True)  # into pinned memory
            torch.cuda.current_stream(self.device).synchronize()
        return numbers.tolist()
