"""What gpu_check.py checks and measures, a function for each part, each run in a process of its
own.

Knows: shapes, reference results, how a step is timed, which figure is held against which limit.
Does not know: time limits, files, tables (gpu_check.py). Read next: PARTS at the end, then the
functions it names.

    python scripts/gpu_parts.py decode '{"device": "cuda:0", "target": ..., "draft": ...}'

prints one JSON object a line, as soon as it is known: what is killed later keeps what it has said.
Times are medians with the lowest and highest quarter; on CUDA by events, or by the host's clock
where it says wall. Every child measures the copy bandwidth first and states its fractions of that.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpu_pair import exactness, pairs, transformers_static  # noqa: E402

import kernels  # noqa: E402
from engine import Model  # noqa: E402
from runtime import Lane, parse_device  # noqa: E402
from sampling import TOKEN, Params, hash_words  # noqa: E402
from steps import Feed, Runner  # noqa: E402

# Share of the largest output. 2 bytes: weights and outputs are each rounded by half a unit, and
# half as much to spare.
ALLOWED = {torch.float32: 1e-5, torch.float16: 1.5 * 2.0**-10, torch.bfloat16: 1.5 * 2.0**-7}


@dataclass
class Check:
    """One part's run: where, with what, how small, and who hears what comes of it."""

    device: torch.device
    spec: str
    target: str
    draft: str
    tiny: bool
    say: object  # called with a dict, one for each result
    copy: float = 0.0  # bytes a second, read plus written

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def repeats(self) -> int:
        return 3 if self.tiny else 30

    def result(
        self, name: str, value, unit: str = "", least=None, most=None, aim=None, **more
    ) -> None:
        """least, most: the limit; it is judged only at full size."""
        limit = least if least is not None else most
        record = {"name": name, "value": value, "unit": unit, **more}
        if limit is not None:
            holds = value >= limit if least is not None else value <= limit
            record |= {"limit": limit, "kind": "least" if least is not None else "most", "aim": aim}
            record["pass"] = None if self.tiny else bool(holds)
        self.say(record)

    def right(self, name: str, holds: bool, **more) -> None:
        self.say(
            {
                "name": name,
                "value": "right" if holds else "WRONG",
                "unit": "",
                "pass": bool(holds),
                **more,
            }
        )

    def spread(self, name: str, seconds: list[float], unit: str = "us") -> float:
        """Report a time and return its median in seconds."""
        scale = {"us": 1e6, "ms": 1e3}[unit]
        low, middle, high = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        self.result(name, middle * scale, unit, low=low * scale, high=high * scale, n=len(seconds))
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
        self.result(
            "copy bandwidth", self.copy / 1e9, "GB/s", low=rates[0], high=rates[-1], n=len(rates)
        )
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
    rows = ([1.0, 0.0], [0, 0], [1.0, 1.0], [7, 1 << 63], [0, 5])
    params = [Params.make(*rows, device) for device in ("cpu", check.device)]
    words = torch.compile(hash_words, fullgraph=True, dynamic=False) if check.on_gpu else hash_words
    at = torch.tensor([[1, 999], [5, 1 << 20]])
    same = torch.equal(
        words(params[1], at.to(check.device), TOKEN, 5000).cpu(),
        hash_words(params[0], at, TOKEN, 5000),
    )
    check.right("noise equal to the CPU's, bit for bit", same)


def attention(check: Check) -> None:
    """Tree attention of 32 branches over a long context, against SDPA with the mask written out."""
    case = (
        Case(1, 4, 2, 2, 64, 128, steps=2) if check.tiny else Case(1, 32, 8, 4, 128, 32768, steps=4)
    )
    dtype = torch.bfloat16 if check.on_gpu else torch.float32
    ours, theirs = [], []
    for seed in range(3):  # 400 MB in all: none is in the L2 when its turn comes
        (query, k, v, limit, first), options, seen = case.make(dtype, check.device, seed)
        k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
        limit.fill_(case.extent)
        options["chain"][2].fill_(case.steps - 1)
        arguments = (query, k, v, limit, first)
        ours.append(lambda a=arguments, o=options: attend(check, a, o))
        # As kind to SDPA as can be: heads that share keys are folded into rows, and slots padded to
        # a multiple of 8.
        slots = k.shape[2] // 8 * 8
        rows = (
            query.view(1, case.T, case.G, case.R, case.D)
            .permute(0, 2, 1, 3, 4)
            .reshape(1, case.G, -1, case.D)
        )
        mask = (
            seen[:, None, :, None, :slots]
            .expand(1, 1, -1, case.R, -1)
            .reshape(1, 1, case.T * case.R, slots)
        )
        mask = torch.zeros(mask.shape, dtype=dtype, device=check.device).masked_fill(
            ~mask, float("-inf")
        )
        fed = (rows.contiguous(), k[:, :, :slots].contiguous(), v[:, :, :slots].contiguous(), mask)
        theirs.append(lambda f=fed: F.scaled_dot_product_attention(*f[:3], attn_mask=f[3]))
    name = f"tree attention M={case.T} context={case.extent}"
    mine = check.spread(name, check.in_turn(ours))
    read = 2 * case.G * (case.extent + case.T * case.steps) * case.D * dtype.itemsize
    check.result(f"{name}: of copy bandwidth", read / mine / check.copy, least=0.60, aim=0.75)
    other = check.spread("SDPA with an explicit mask", check.in_turn(theirs))
    check.result("SDPA time / tree attention time", other / mine, least=3.0)


def kernel_part(check: Check) -> None:
    check.machine(matrix=True)
    attention(check)
    correct(check)


# ---- linear layers


def linear(check: Check) -> None:
    """cuBLAS, inductor's generated loop and its templates, by shape and rows."""
    check.machine()
    shapes = (
        ((64, 96),)
        if check.tiny
        else ((4096, 28672), (14336, 4096), (4096, 6144), (4096, 4096), (2048, 16384))
    )
    for columns, out in shapes:
        copies = 2 if check.tiny else max(2, 1 + (400 << 20) // (2 * columns * out))  # past the L2
        weights = [torch.randn(out, columns, device=check.device).bfloat16() for _ in range(copies)]
        for rows in (1, 8, 24):
            x = torch.randn(1, rows, columns, device=check.device).bfloat16()
            ways = {"cuBLAS": F.linear}
            if check.on_gpu and rows == 1:
                options = {"coordinate_descent_tuning": True}
                ways["tuned loop"] = torch.compile(
                    lambda x, w: F.linear(x, w), dynamic=False, options=options
                )
            # Its search takes long: one shape has to tell.
            elif check.on_gpu and out == shapes[0][1]:
                options = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"}
                ways["max-autotune"] = torch.compile(
                    lambda x, w: F.linear(x, w), dynamic=False, options=options
                )
            for way, multiply in ways.items():
                works = [lambda m=multiply, w=w: m(x, w) for w in weights]
                seconds = median(check.in_turn(works))
                share = weights[0].nbytes / seconds / check.copy
                check.result(f"linear {columns}x{out} rows={rows} {way}: of copy bandwidth", share)


# ---- steps


def runner_of(check: Check, name: str, k: int, branches: int) -> tuple[Model, Runner]:
    dtype = "bfloat16" if check.on_gpu else "float32"
    model = Model.load(name, check.device, dtype)
    role = "draft" if branches else "target"
    trunk = 64 if check.tiny else 1024  # as in gpu_pair.pairs
    runner = model.runner(role, 1, trunk, k, branches, model.config.vocab_size)
    model.policy.enter_thread()
    runner.set_rows(Params.make([0.0], [0], [1.0], [0], [0], check.device), "shared", 1.0)
    return model, runner


def replays(check: Check, runner: Runner, name: str) -> list[float] | None:
    """Seconds of a captured step alone, by events: what the host adds is the difference from wall
    time.
    """
    graphs = [graph for key, graph in runner.step_of.items() if key[0] == name]
    return check.timed(graphs[-1].graph.replay) if graphs else None


def steps(check: Check) -> None:
    """The target's decode step and verification, the draft's single-row and chain steps, at context
    512.
    """
    check.machine()
    at, M, K = (20, 4, 3) if check.tiny else (512, 24, 7)
    model, runner = runner_of(check, check.target, K, 0)
    last = {"token": 1, "at": at}

    def decode(runner=runner):
        feed = Feed([[last["token"]]], [last["at"]], [1])
        last["token"] = runner.verify(feed, [0], [None])[1][0]
        last["at"] += 1

    began = time.perf_counter()
    decode()
    check.result("target: first decode step (compiles)", time.perf_counter() - began, "s")
    decode()
    plain = check.spread("target: plain decode step, wall", check.wall(decode), "ms")
    share = model.step_bytes / plain / check.copy
    check.result("target: plain decoding: of copy bandwidth", share, least=0.88, aim=0.95)
    if alone := replays(check, runner, "_verify"):
        busy = check.spread("target: decode step, graph alone", alone, "ms")
        check.result(
            "target: decode graph alone: of copy bandwidth", model.step_bytes / busy / check.copy
        )
        check.result("target: what the host adds to a decode step", 1 - busy / plain)
    feed = Feed([[1] * (K + 1)], [at], [K + 1])
    began = time.perf_counter()
    runner.verify(feed, [1], [None])
    check.result(
        f"target: first verification of {K + 1} (compiles)", time.perf_counter() - began, "s"
    )
    seconds = check.wall(lambda run=runner: run.verify(feed, [1], [None]))
    verify = check.spread(f"target: verification of {K + 1} tokens, wall", seconds, "ms")
    check.result(
        f"verification of {K + 1} tokens / plain decode step", verify / plain, most=1.15, aim=1.08
    )
    if alone := replays(check, runner, "_verify"):
        check.spread(f"target: verification of {K + 1}, graph alone", alone, "ms")
    del model, runner, decode, seconds
    chain_steps(check, at, M, K)


def chain_steps(check: Check, at: int, M: int, K: int) -> None:
    model, runner = runner_of(check, check.draft, K, M)
    one = Feed([[1]], [at], [1])
    began = time.perf_counter()
    runner.decode(one, 0)
    check.result("draft: first single-row step (compiles)", time.perf_counter() - began, "s")
    single = check.spread(
        "draft: single-row step, wall", check.wall(lambda: runner.decode(one, 0)), "ms"
    )
    check.result(
        "draft: single-row step: of copy bandwidth",
        model.step_bytes / single / check.copy,
        least=0.60,
    )
    if alone := replays(check, runner, "_decode"):
        check.spread("draft: single-row step, graph alone", alone, "ms")
    tokens, depths = [list(range(1, M + 1))], [[m % 4 for m in range(M)]]

    def chain():
        runner.chain_step(Feed([[1] * (K + 1)], [at], [K + 1]), tokens, depths, 2, 0)

    began = time.perf_counter()
    chain()
    check.result(f"draft: first chain step of {M} (compiles)", time.perf_counter() - began, "s")
    many = check.spread(f"draft: chain step M={M}, wall", check.wall(chain), "ms")
    check.result(f"chain step M={M} / single-row step", many / single, most=1.25, aim=1.15)
    if alone := replays(check, runner, "_chain_step"):
        check.spread(f"draft: chain step M={M}, graph alone", alone, "ms")


def on_lane(work):
    """Run a part on one lane, as the engine runs its steps: inference mode, a stream of its own."""

    def part(check: Check) -> None:
        lane = Lane(check.spec, "check", high_priority=True)
        lane.start(work, check).result()

    return part


PARTS = {
    "kernels": on_lane(kernel_part),
    "decode": on_lane(steps),
    "ssd": pairs,
    "loop": exactness,
    "linear": on_lane(linear),
    "transformers": transformers_static,
    "correct": on_lane(correct),
}


def run(part: str, how: dict, say) -> None:
    """One part with everything it finds told to `say`."""
    device, _ = parse_device(how["device"])
    check = Check(device, how["device"], how["target"], how["draft"], how.get("tiny", False), say)
    PARTS[part](check)


if __name__ == "__main__":
    run(sys.argv[1], json.loads(sys.argv[2]), lambda record: print(json.dumps(record), flush=True))
