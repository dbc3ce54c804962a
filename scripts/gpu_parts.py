"""What gpu_check.py checks and measures, a function for each part, each run in a process of its
own.

Knows: how a time is taken, goals, attention and linear layers by themselves. Does not know: time
limits, files, tables (gpu_check.py). Read next: gpu_steps.py.

    python scripts/gpu_parts.py decode '{"spec": "cuda:0", "target": ..., "draft": ..., ...}'

prints one JSON object a line, as soon as it is known: what is killed later keeps what it has said.
Times are medians with the lowest and highest quarter; on CUDA by events, or by the host's clock
where it says wall. Every child measures the copy bandwidth first and states its fractions of that.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpu_pair import exactness, pairs, transformers_static, tuner  # noqa: E402
from gpu_steps import decode, profile_part, wide  # noqa: E402
from torch import nn  # noqa: E402

import kernels  # noqa: E402
from engine import Model  # noqa: E402
from linear import Int4Linear, Int8Linear, to_groups  # noqa: E402
from runtime import Lane, parse_device  # noqa: E402
from sampling import TOKEN, Params, hash_words  # noqa: E402

# Share of the largest output. 2 bytes: weights and outputs are each rounded by half a unit, and
# half as much to spare.
ALLOWED = {torch.float32: 1e-5, torch.float16: 1.5 * 2.0**-10, torch.bfloat16: 1.5 * 2.0**-7}
# What the first table holds measured figures against, by key: what it is, "least" or "most", the
# limit, the aim. Shares are of the copy bandwidth that the same process measured.
GOALS = {
    "decode": ("8B decode step, of copy bandwidth", "least", 0.88, 0.95),
    "verify": ("8B verification of 8 / decode step", "most", 1.10, 1.05),
    "single": ("1B single-row step, of copy bandwidth", "least", 0.60, 0.78),
    "chain": ("1B chain step of 24, of copy bandwidth", "least", 0.70, None),
    "branches": ("1B chain step of 24 / single-row step", "most", 1.25, 1.15),
    "attention": ("tree attention, 32 at 8k, of copy bandwidth", "least", 0.60, 0.75),
    "sdpa": ("SDPA with a mask / tree attention, 32 at 8k", "least", 3.0, None),
    "ssd": ("SSD / SD, 8B, one card, two streams", "least", 1.15, None),
    "hits": ("hits at temperature 1", "least", 0.9, None),
    "between": ("between two verifications, of a round", "most", 0.02, None),
}


@dataclass
class Check:
    """One part's run: where, with what, how small, and who hears what comes of it."""

    device: torch.device
    spec: str
    target: str
    draft: str
    tiny: bool
    folder: str  # for what is too large for a record
    say: object  # called with a dict, one for each result
    copy: float = 0.0  # bytes a second, read plus written

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def repeats(self) -> int:
        return 3 if self.tiny else 30

    def load(self, name: str, device: torch.device | None = None, quantize=None) -> Model:
        """A model in bfloat16 on a GPU, in float32 on a CPU."""
        device = device or self.device
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        return Model.load(name, device, dtype, quantize=quantize)

    def result(self, name: str, value, unit: str = "", goal: str = "", **more) -> None:
        """goal: the key of what it is held against; it is judged only at full size."""
        record = {"name": name, "value": value, "unit": unit, **more}
        if goal:
            _, kind, limit, _ = GOALS[goal]
            holds = value >= limit if kind == "least" else value <= limit
            record |= {"goal": goal, "pass": None if self.tiny else bool(holds)}
        self.say(record)

    def right(self, name: str, holds: bool, **more) -> None:
        value = "right" if holds else "WRONG"
        self.say({"name": name, "value": value, "unit": "", "pass": bool(holds), **more})

    def spread(self, name: str, seconds: list[float], unit: str = "us") -> float:
        """Report a time and return its median in seconds."""
        scale = {"us": 1e6, "ms": 1e3}[unit]
        low, middle, high = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        self.result(name, middle * scale, unit, low=low * scale, high=high * scale)
        return median(seconds)

    def timed(self, work, repeats: int = 0) -> list[float]:
        """Seconds of each call, on the device's own clock."""
        for _ in range(1 if self.tiny else 3):
            work()
        if not self.on_gpu:
            return self.wall(work, repeats)
        marks = [
            [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            for _ in range(repeats or self.repeats)
        ]
        for begin, end in marks:
            begin.record()
            work()
            end.record()
        torch.cuda.current_stream().synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in marks]

    def wall(self, work, repeats: int = 0) -> list[float]:
        """Seconds of each call on the host's clock; the call itself waits for its result."""
        out = []
        for _ in range(repeats or self.repeats):
            begin = time.perf_counter()
            work()
            out.append(time.perf_counter() - begin)
        return out

    def in_turn(self, works: list) -> list[float]:
        """Seconds a call when different calls follow each other; on CUDA in one graph, so that no
        launch counts.
        """
        for work in works:
            work()
        if not self.on_gpu:
            return [t / len(works) for t in self.timed(lambda: [work() for work in works])]
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            kept = [work() for work in works]
        seconds = [t / len(works) for t in self.timed(graph.replay)]
        del kept
        return seconds

    def machine(self, matrix: bool = False) -> None:
        """Copy bandwidth, the measure of all that follows, and the rate of a large bfloat16 matrix
        product.
        """
        source = torch.ones(
            1 << (16 if self.tiny else 29), dtype=torch.bfloat16, device=self.device
        )
        target = torch.empty_like(source)
        seconds = self.timed(lambda: target.copy_(source))
        self.copy = 2 * source.nbytes / median(seconds)
        rates = sorted(2 * source.nbytes / t / 1e9 for t in seconds)
        self.result("copy bandwidth", self.copy / 1e9, "GB/s", low=rates[0], high=rates[-1])
        if matrix:
            n = 128 if self.tiny else 8192
            a, b = torch.randn(2, n, n, device=self.device).bfloat16()
            rate = 2 * n**3 / median(self.timed(lambda: a @ b)) / 1e12
            self.result("bfloat16 matrix rate", rate, "TFLOP/s")


# ---- attention


@dataclass(frozen=True)
class Case:
    """One call of tree_attention: B rows of T tokens, G key/value heads of size D under R query
    heads each.
    """

    B: int
    T: int
    G: int
    R: int
    D: int
    extent: int
    steps: int = 0
    window: int = 0

    def make(self, dtype, device, seed: int = 0):
        """(query, k, v, limit, first), options, visible (B, T, S): NaN in every slot that no query
        of its row sees.
        """
        rng = torch.Generator(device).manual_seed(seed)
        slots = self.extent + 5 + self.T * self.steps + 1
        made = {"generator": rng, "device": device}
        random = lambda *shape: torch.randn(shape, **made).to(dtype)  # noqa: E731
        query = random(self.B, self.T, self.G * self.R + self.G, self.D)[:, :, : self.G * self.R]
        k, v = random(2, self.B, self.G, slots, self.D)
        limit = torch.randint(1, self.extent + 1, (self.B, self.T), generator=rng, device=device)
        limit[0, -1] = self.extent
        step = torch.randint(0, max(1, self.steps), (self.B,), generator=rng, device=device)
        positions = limit - 1 + (step[:, None] if self.steps else 0)
        first = (positions + 1 - self.window).clamp(min=0) if self.window else None
        slot = torch.arange(slots, device=device)
        seen = slot < limit[..., None]
        if first is not None:
            seen &= slot >= first[..., None]
        branch = torch.arange(self.T, device=device)
        for c in range(self.steps):
            alive = (c <= step) & (c > step - self.window if self.window else True)
            seen[:, branch, self.extent + 5 + branch + c * self.T] = alive[:, None]
        dead = ~seen.any(1)[:, None, :, None]
        k, v = (x.masked_fill(dead, float("nan")) for x in (k, v))
        chain = (self.extent + 5, self.steps, step) if self.steps else None
        options = {
            "scale": self.D**-0.5,
            "extent": self.extent,
            "chain": chain,
            "window": self.window,
        }
        return (query, k, v, limit, first), options, seen

    def truth(self, query, k, v, seen) -> torch.Tensor:
        """Plain masked attention in float64, one key/value head at a time."""
        out = torch.empty(query.shape, dtype=torch.float64, device=query.device)
        for b in range(self.B):
            for g in range(self.G):
                heads = slice(g * self.R, (g + 1) * self.R)
                keys, values = (x[b, g].double().nan_to_num(0.0) for x in (k, v))
                scores = query[b, :, heads].double() @ keys.T * self.D**-0.5  # (T, R, S)
                weights = scores.masked_fill(~seen[b][:, None], float("-inf")).softmax(-1)
                out[b, :, heads] = weights @ values
        return out


CASES = (
    Case(1, 1, 8, 4, 128, 1),
    Case(1, 1, 8, 4, 128, 32768),
    Case(1, 8, 8, 4, 128, 519),
    Case(2, 9, 1, 8, 64, 600),
    Case(1, 256, 8, 4, 128, 8192),
    Case(3, 9, 2, 3, 80, 700, window=100),
    Case(1, 24, 8, 4, 64, 1000, steps=7),
    Case(1, 32, 8, 4, 128, 32768, steps=4),
    Case(4, 24, 8, 4, 64, 2048, steps=8),
    Case(2, 33, 2, 5, 96, 5000, steps=3, window=40),
    Case(2, 64, 1, 8, 256, 4096, steps=2),
    Case(1, 3, 2, 2, 32, 70, 2),
)
TINY_CASES = (
    Case(1, 1, 2, 2, 32, 9),
    Case(2, 3, 1, 3, 32, 70, window=7),
    Case(2, 5, 2, 2, 64, 150, steps=3),
)


def attend(check: Check, arguments, options):
    """The Triton kernel on a GPU and in Triton's interpreter, which TRITON_INTERPRET=1 chooses;
    else its twin.
    """
    interpreted = kernels.triton is not None and kernels.triton.knobs.runtime.interpret
    if check.on_gpu or interpreted:
        base, steps, step = options["chain"] or (0, 0, None)
        return kernels._fused(
            *arguments, step, options["scale"], options["extent"], base, steps, options["window"]
        )
    return kernels.tree_attention(*arguments, **options)


def correct(check: Check) -> None:
    """The kernel against float64, in every dtype; the noise against the CPU's."""
    if check.on_gpu:
        assert kernels.triton is not None, (
            "there is a GPU but no Triton: nothing but the twin could be checked"
        )
    # The interpreter is wrong in bfloat16.
    dtypes = (torch.bfloat16, torch.float32, torch.float16)[not check.on_gpu :]
    for dtype in dtypes:
        worst, where = 0.0, None
        for number, case in enumerate(TINY_CASES if check.tiny else CASES):
            arguments, options, seen = case.make(dtype, check.device, number)
            want = case.truth(*arguments[:3], seen)
            got = attend(check, arguments, options).double()
            share = float((got - want).abs().max() / want.abs().max()) / ALLOWED[dtype]
            if not share <= worst:  # NaN counts as the worst
                worst, where = share, case
        name = f"attention in {str(dtype)[6:]} against float64"
        check.right(name, worst <= 1, of_allowed=round(worst, 4), worst_case=str(where))
    V, words = 128256, hash_words  # 8 positions of a row, as a verification draws them
    if check.on_gpu:
        words = torch.compile(hash_words, fullgraph=True, dynamic=False)
    rows, at = ([1.0, 0.0], [0, 0], [1.0, 1.0], [7, 1 << 63], [0, 5]), torch.arange(16).view(2, 8)
    at = at + torch.tensor([[999], [1 << 20]])
    here, there = (
        of(Params.make(*rows, device), at.to(device), TOKEN, V).cpu()
        for of, device in ((hash_words, "cpu"), (words, check.device))
    )
    check.right("noise equal to the CPU's, bit for bit", torch.equal(here, there))
    products(check)


def products(check: Check) -> None:
    """The product with int8 weights against float64, and few rows against the same among many."""
    columns, out, dtype = *((64, 96) if check.tiny else (4096, 6144)), torch.bfloat16
    layer = of_few_bits("int8", torch.randn(out, columns, device=check.device).to(dtype))
    x = torch.randn(64, columns, device=check.device).to(dtype)
    want = x.double() @ (layer.codes_NK.double() * layer.scale_N.double()[:, None]).T
    got = layer(x)
    share = float((got.double() - want).abs().max() / want.abs().max()) / ALLOWED[dtype]
    check.right("int8 product against float64", share <= 1, of_allowed=round(share, 4))
    same = all(torch.equal(layer(x[:rows]), got[:rows]) for rows in (1, 5, 24))
    check.right("int8 product of few rows equal to that of many, bit for bit", same)


def attention(check: Check) -> None:
    """Decoding, verification and branches over contexts of three lengths."""
    heads, many = ((2, 2, 64), (4, 2)) if check.tiny else ((8, 4, 128), (32, 4))
    for context in (64, 128) if check.tiny else (1024, 8192, 32768):
        for T, steps in ((1, 0), (8, 0), many):
            judged = T == many[0] and context in (128, 8192)
            against_sdpa(check, Case(1, T, *heads, context, steps), judged)


def against_sdpa(check: Check, case: Case, judged: bool) -> None:
    """Tree attention, and SDPA with the mask written out."""
    dtype = torch.bfloat16 if check.on_gpu else torch.float32
    read = 2 * case.G * (case.extent + case.T * case.steps) * case.D * dtype.itemsize
    ours, theirs = [], []
    # 130 MB at least, and 3 calls: none is in the L2 when its turn comes.
    for seed in range(3 if check.tiny else max(3, math.ceil(400e6 / read / 3))):
        (query, k, v, limit, first), options, seen = case.make(dtype, check.device, seed)
        k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
        limit.fill_(case.extent)
        if case.steps:
            options["chain"][2].fill_(case.steps - 1)
        arguments = (query, k, v, limit, first)
        ours.append(lambda a=arguments, o=options: attend(check, a, o))
        # As kind to SDPA as can be: heads that share keys are folded into rows, and slots padded to
        # a multiple of 8.
        slots = k.shape[2] // 8 * 8
        rows = query.view(1, case.T, case.G, case.R, case.D).permute(0, 2, 1, 3, 4)
        rows = rows.reshape(1, case.G, -1, case.D).contiguous()
        mask = seen[:, None, :, None, :slots].expand(1, 1, -1, case.R, -1).reshape(1, 1, -1, slots)
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))
        fed = (rows, k[:, :, :slots].contiguous(), v[:, :, :slots].contiguous(), mask)
        theirs.append(lambda f=fed: F.scaled_dot_product_attention(*f[:3], attn_mask=f[3]))
    name = f"tree attention M={case.T} context={case.extent}"
    mine = check.spread(name, check.in_turn(ours))
    goals = ("attention", "sdpa") if judged else ("", "")
    check.result(f"{name}: of copy bandwidth", read / mine / check.copy, goal=goals[0])
    other = check.spread(f"{name}: SDPA with an explicit mask", check.in_turn(theirs))
    check.result(f"{name}: SDPA time / tree attention time", other / mine, goal=goals[1])


def kernel_part(check: Check) -> None:
    check.machine(matrix=True)
    attention(check)
    correct(check)


# ---- linear layers

# Rows -> the ways beside cuBLAS, with the compiler's options.
TUNED = {
    1: {"tuned loop": {"coordinate_descent_tuning": True}},
    8: {
        "max-autotune": {
            "max_autotune_gemm": True,
            "max_autotune_gemm_backends": "ATEN,TRITON",
        }
    },
}


def of_few_bits(way: str, weight: torch.Tensor) -> nn.Module:
    """The linear layer of int8 or int4 for a weight (outputs, inputs)."""
    if way == "int4":
        return Int4Linear(to_groups(weight, 4))
    layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return Int8Linear(layer)


def linear(check: Check) -> None:
    """cuBLAS, inductor's generated loop and its templates, and layers of few bits, by shape and
    rows. The last shape is the 8B model's head.
    """
    check.machine()
    shapes = (4096, 28672), (14336, 4096), (4096, 6144), (4096, 4096), (2048, 16384), (4096, 128256)
    for columns, out in ((64, 96),) if check.tiny else shapes:
        copies = 2 if check.tiny else max(2, 1 + (400 << 20) // (2 * columns * out))  # past the L2
        weights = [torch.randn(out, columns, device=check.device).bfloat16() for _ in range(copies)]
        few = {way: [of_few_bits(way, w) for w in weights] for way in ("int8", "int4")}
        torch.compiler.reset()  # after 8 shapes of one function it would no longer compile
        for rows in (1, 8, 24):
            x = torch.randn(1, rows, columns, device=check.device).bfloat16()
            more = TUNED.get(rows, {}) if check.on_gpu else {}
            for way, options in {"cuBLAS": None, **more}.items():
                multiply = lambda x, w: F.linear(x, w)  # noqa: E731
                if options:
                    multiply = torch.compile(multiply, dynamic=False, options=options)
                works = [lambda m=multiply, w=w: m(x, w) for w in weights]
                seconds = median(check.in_turn(works))
                share = weights[0].nbytes / seconds / check.copy
                check.result(f"linear {columns}x{out} rows={rows} {way}: of copy bandwidth", share)
            for way, layers in few.items():
                seconds = median(check.in_turn([lambda m=m: m(x) for m in layers]))
                share = layers[0].weight_bytes / seconds / check.copy
                check.result(f"linear {columns}x{out} rows={rows} {way}: of copy bandwidth", share)


# ---- the parts


def ranks(check: Check) -> None:
    """How long a sum over the ranks of a target takes, one rank a card: what studies/simulate.py
    asks for. On a CPU two processes are the ranks.
    """
    count = torch.cuda.device_count() if check.on_gpu else 2
    if count < 2:
        return check.result("sum over ranks", "not measured, this machine has one card")
    path, program = Path(check.folder) / "sums.json", Path(__file__).parent / "bench_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command += [str(program), "--part", "sums", "--device", check.device.type]
    subprocess.run([*command, "--target", check.target, "--json", str(path)], check=True)
    for size, us in json.loads(path.read_text()).items():
        check.result(f"sum over {count} ranks, {size} bytes", us, "us")
    path.unlink()


def on_lane(work):
    """Run a part on one lane, as the engine runs its steps: inference mode, a stream of its own."""

    def part(check: Check) -> None:
        lane = Lane(check.spec, "check", high_priority=True)
        lane.start(work, check).result()

    return part


PARTS = {
    "decode": on_lane(decode),
    "ssd": pairs,
    "profile": profile_part,
    "tuner": tuner,
    "kernels": on_lane(kernel_part),
    "loop": exactness,
    "wide": on_lane(wide),
    "linear": on_lane(linear),
    "transformers": transformers_static,
    "correct": on_lane(correct),
    "ranks": ranks,
}


def run(part: str, how: dict, say) -> None:
    """One part with everything it finds told to `say`. how: the fields of Check by name."""
    device, _ = parse_device(how["spec"])
    PARTS[part](Check(device, say=say, **how))


if __name__ == "__main__":
    run(sys.argv[1], json.loads(sys.argv[2]), lambda record: print(json.dumps(record), flush=True))
