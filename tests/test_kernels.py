"""Attention for speculation trees: the PyTorch twin and the Triton kernel against plain loops. And
the product with weights of 8 bits against float64.

The loops are in float64. Everything that no query of a row may see holds NaN in these tests: in the
trunk after the limits, before the windows, past the extent, and in the scratch of other steps.

Without a GPU the Triton kernel runs in Triton's interpreter. That is chosen when Triton is first
imported, hence in a process of its own:

    TRITON_INTERPRET=1 PYTHONPATH=. python tests/test_kernels.py

The interpreter is wrong in bfloat16.
"""

import functools
import importlib.util
import inspect
import math
import os
import random
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
import sampling

ROOT = Path(__file__).parent.parent
BROKEN_INTERPRETER = (
    "not tested: this Triton's interpreter cannot loop with this numpy (seen: 3.6 with 2.4)"
)


# Weights and outputs are rounded to 2 bytes once each. In float32 a dot product over D and one over
# S add up.
ALLOWED = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2.0**-9,
    torch.bfloat16: 2.0**-6,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small take several times longer on two busy cores than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """One call.

    kind   "rows" (limits of their own), "verify" (consecutive, some padded) or "chain" (branches)
    """

    kind: str
    B: int
    T: int
    G: int
    R: int
    D: int
    extent: int
    steps: int = 0
    window: int = 0
    spare: int = 5  # cache slots between the extent and the scratch
    tight: bool = False
    plan: tuple = ()  # what to replace in the kernel's plan, to reach every path with small shapes
    seed: int = 0


def build(case: Case, dtype: torch.dtype):
    """The call's arguments, with NaN in every slot that its row does not see; with large numbers
    instead where `tight` promises numbers.
    """
    rng = torch.Generator().manual_seed(case.seed)
    B, T, G, D = case.B, case.T, case.G, case.D
    H, base = G * case.R, case.extent + case.spare
    slots = base + T * case.steps + 1
    # As the engine has them: queries are a part of one projection, a cache is a layer of a tensor.
    query = torch.randn(B, T, H + G, D, generator=rng, dtype=torch.float64).to(dtype)[:, :, :H]
    k, v = torch.randn(2, 2, B, G, slots, D, generator=rng, dtype=torch.float64).to(dtype)[:, 1]
    limit = torch.randint(1, case.extent + 1, (B, T), generator=rng)
    positions = limit - 1
    if case.kind == "verify":
        start = torch.randint(0, case.extent - T + 1, (B, 1), generator=rng)
        real = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=rng)
        positions = torch.where(real, start + torch.arange(T), 0)
        limit = positions + 1
    if case.tight:
        limit[-1, -1] = case.extent
        positions[-1, -1] = case.extent - 1
    chain = None
    if case.kind == "chain":
        step = torch.randint(0, case.steps, (B,), generator=rng)
        if case.tight:
            step = torch.full((B,), case.steps - 1)
        chain = (base, case.steps, step)
        positions = limit + step[:, None]
    first = (positions + 1 - case.window).clamp(min=0) if case.window else None
    seen = torch.zeros(B, slots, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            seen[b, visible(case, b, t, limit, first, chain)] = True
    other = torch.full((slots,), math.nan, dtype=dtype)
    other[: case.extent * case.tight] = 300.0
    k, v = (torch.where(seen[:, None, :, None], x, other[:, None]) for x in (k, v))
    options = {"scale": D**-0.5, "extent": case.extent, "tight": case.tight}
    return (query, k, v, limit, first), options | {"chain": chain, "window": case.window}


def visible(case, b, t, limit, first, chain) -> list[int]:
    """The slots that token t of row b sees, straight from the contract."""
    lower = 0 if first is None else int(first[b, t])
    slots = list(range(lower, int(limit[b, t])))
    if chain is not None:
        base, steps, step = chain
        newest = int(step[b])
        oldest = max(0, newest - case.window + 1) if case.window else 0
        slots += [base + t + c * case.T for c in range(oldest, min(newest + 1, steps))]
    return slots


def naive(case: Case, query, k, v, limit, first, options) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=torch.float64)
    for b in range(case.B):
        for t in range(case.T):
            slots = visible(case, b, t, limit, first, options["chain"])
            for h in range(case.G * case.R):
                keys, values = (x[b, h // case.R, slots].double() for x in (k, v))
                weights = torch.softmax(keys @ query[b, t, h].double() * options["scale"], 0)
                out[b, t, h] = weights @ values
    return out


def error(case: Case, dtype, attention, device="cpu") -> float:
    """The largest difference from the loops, as a share of what this dtype allows.

    NaN counts as infinite.
    """
    arguments, options = build(case, dtype)
    want = naive(case, *arguments, options)
    chain = options["chain"]
    if chain is not None:
        options["chain"] = (*chain[:2], chain[2].to(device))
    got = attention(*(x if x is None else x.to(device) for x in arguments), **options).cpu()
    assert got.shape == want.shape and got.dtype == dtype, f"{got.shape} {got.dtype}"
    worst = float((got.double() - want).abs().max())
    return math.inf if math.isnan(worst) else worst / ALLOWED[dtype]


CASES = [
    Case("rows", 1, 1, 1, 1, 64, 1),
    Case("rows", 1, 1, 2, 3, 64, 40, tight=True),
    Case("rows", 3, 1, 2, 2, 32, 300),
    Case("rows", 2, 5, 2, 1, 80, 130, spare=0),
    Case("verify", 1, 9, 2, 3, 64, 60, tight=True),
    Case("verify", 2, 5, 1, 8, 64, 600),
    Case("verify", 2, 4, 2, 2, 96, 200, window=7),
    Case("verify", 1, 70, 1, 2, 32, 150),  # a prefill: more rows than one tile
    Case("chain", 1, 1, 1, 1, 64, 1, steps=1),
    Case("chain", 1, 8, 2, 3, 64, 200, steps=5, tight=True),
    Case("chain", 1, 64, 1, 4, 64, 320, steps=3),
    Case("chain", 2, 6, 1, 2, 128, 333, steps=8),
    Case("chain", 2, 7, 1, 3, 80, 90, steps=4, window=3),
    Case("chain", 2, 12, 1, 2, 32, 500, steps=8, window=40),
    Case("chain", 1, 33, 1, 5, 128, 150, steps=2, tight=True),
    Case("chain", 2, 3, 1, 2, 256, 70, steps=2),
    Case("chain", 2, 5, 3, 1, 20, 50, steps=3, tight=True, window=2),
    # The same paths with other plans: one program for everything, many small splits, and tiles much
    # smaller than texts.
    Case("chain", 2, 5, 2, 2, 64, 300, steps=4, plan=(("splits", 1), ("slots", 32))),
    Case("chain", 1, 9, 1, 4, 32, 300, steps=4, plan=(("rows", 16), ("slots", 16))),
    Case("rows", 2, 20, 1, 3, 64, 400, plan=(("rows", 16), ("splits", 1), ("slots", 16))),
    Case("verify", 2, 20, 1, 3, 32, 200, window=20, plan=(("rows", 16), ("slots", 16))),
    Case("rows", 1, 4, 1, 2, 64, 600, plan=(("splits", 37), ("slots", 16))),
    Case("rows", 2, 4, 1, 2, 64, 600, plan=(("splits", 3),)),
]


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    kind = rng.choice(("rows", "verify", "chain", "chain"))
    T = rng.choice((1, 2, 3, 5, 8, 13, 21))
    extent = T - 1 + rng.choice((1, 2, 17, 64, 129, 250, rng.randint(1, 300)))
    return Case(
        kind, rng.randint(1, 3), T, rng.randint(1, 3), rng.randint(1, 8),
        rng.choice((32, 64, 80, 128)), extent,
        steps=rng.randint(1, 8) if kind == "chain" else 0, window=rng.choice((0, 0, 1, 2, 9, 100)),
        spare=rng.choice((0, 1, 30)), tight=rng.random() < 0.4, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES + [random_case(seed) for seed in range(60)], ids=str)
def test_twin_is_the_loops(case):
    assert error(case, torch.float64, kernels.tree_attention_reference) <= 1
    assert error(case, torch.float64, kernels.tree_attention) <= 1, "on the CPU the twin answers"


SCRIPTED = kernels.script(kernels.tree_attention)


def with_a_mask(query, k, v, limit, first, *, extent, **options):
    """As layers share it."""
    R = query.shape[2] // k.shape[1]
    mask = kernels.trunk_mask(limit, first, extent, R, query.dtype)
    return SCRIPTED(query, k, v, limit, first, extent=extent, mask=mask, **options)


@pytest.mark.parametrize("case", CASES + [random_case(seed) for seed in range(60, 80)], ids=str)
def test_scripted_twin_is_the_loops(case):
    assert isinstance(SCRIPTED, torch.jit.ScriptFunction)
    assert error(case, torch.float64, SCRIPTED) <= 1
    assert error(case, torch.float32, with_a_mask) <= 1


def words(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (
            sampling._hash,
            (words([[3, -7], [2**31 - 1, -(2**31)]]), torch.tensor([[5], [9]]), 1, None),
        ),
        (sampling._hash, (words([[3, -7]]), torch.tensor([[5, 6, 2**33]]), 3, words(range(100)))),
        (sampling._to_unit, (words([0, 1, 2**31 - 1]), torch.float32)),
        (sampling._double_log, (torch.linspace(0.01, 0.99, 50),)),
        (
            sampling.accept_shared,
            (torch.tensor([[1, 2, 3]]), torch.tensor([[1, 9]]), torch.tensor([2])),
        ),
    ],
)
def test_a_scripted_function_is_the_plain_one(function, arguments):
    plain = inspect.unwrap(function)
    assert plain is not function, "it was not scripted here"
    copies = [[x.clone() if torch.is_tensor(x) else x for x in arguments] for _ in range(2)]
    scripted, expected = function(*copies[0]), plain(*copies[1])
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (scripted, expected))):
        assert torch.equal(a, b) and a.dtype == b.dtype
    for a, b in zip(*copies):  # what is written in place as well
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_without_torchscript_the_plain_function_runs(monkeypatch):
    def gone(_):
        raise RuntimeError("torch.jit.script is not supported in Python 3.14+")

    monkeypatch.setattr(torch.jit, "script", gone)
    plain = inspect.unwrap(sampling.accept_shared)
    assert kernels.scripted(plain) is plain


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_twin_in_other_dtypes(dtype):
    """All are computed in float32: two bytes a number lose only the rounding of the result."""
    for seed in range(100, 110):
        case = random_case(seed)
        assert error(case, dtype, kernels.tree_attention) <= 1, case
        (query, k, v, *limits), options = build(case, dtype)
        wide = kernels.tree_attention(query.float(), k.float(), v.float(), *limits, **options)
        assert torch.equal(
            kernels.tree_attention(query, k, v, *limits, **options), wide.to(dtype)
        ), case


def test_rows_are_independent():
    """Bit for bit: a row's numbers do not depend on what another row, or another branch's chain,
    holds.
    """
    case = Case("chain", 2, 5, 2, 2, 32, 60, steps=3)
    (query, k, v, limit, first), options = build(case, torch.float32)
    base, _, step = options["chain"]
    step[:] = 2
    k, v = k.nan_to_num(1.0), v.nan_to_num(1.0)
    before = kernels.tree_attention(query, k, v, limit, first, **options)
    k[1] = v[1] = math.nan
    k[0, :, base + 4 : base + 5] = v[0, :, base + 4 : base + 5] = math.nan
    after = kernels.tree_attention(query, k, v, limit, first, **options)
    assert torch.equal(before[0, :4], after[0, :4])
    assert after[0, 4].isnan().all() and after[1].isnan().all(), (
        "a NaN that is seen must not be hidden"
    )


@pytest.mark.parametrize("case", [CASES[4], CASES[9], CASES[12]], ids=str)
def test_twin_compiles_whole(case):
    (query, k, v, limit, first), options = build(case, torch.float64)
    compiled = torch.compile(kernels.tree_attention, fullgraph=True, backend="eager", dynamic=False)
    want = kernels.tree_attention(query, k, v, limit, first, **options)
    assert torch.allclose(compiled(query, k, v, limit, first, **options), want, atol=1e-12)


def answer(monkeypatch, device, dtype, has_triton) -> str:
    """Which of the two forms serves such queries; neither is run."""
    monkeypatch.setattr(kernels, "_fused", lambda *arguments: "kernel")
    monkeypatch.setattr(kernels, "tree_attention_reference", lambda *arguments, **options: "twin")
    monkeypatch.setattr(kernels, "triton", object() if has_triton else None)
    query = SimpleNamespace(device=torch.device(device), dtype=dtype)
    return kernels.tree_attention(query, None, None, None, None, scale=1.0, extent=1)


def test_gpu_takes_the_kernel(monkeypatch):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert answer(monkeypatch, "cuda:1", dtype, True) == "kernel"
        assert answer(monkeypatch, "cpu", dtype, True) == "twin"
    assert answer(monkeypatch, "cuda", torch.float64, True) == "twin"


def test_gpu_without_triton_says_so_once(monkeypatch):
    kernels._warn_of_missing_triton.cache_clear()
    with pytest.warns(UserWarning, match="Triton is not installed") as said:
        for _ in range(3):
            assert answer(monkeypatch, "cuda", torch.float16, False) == "twin"
    assert len(said) == 1
    kernels._warn_of_missing_triton.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(monkeypatch, "cpu", torch.float32, False) == "twin"
        assert answer(monkeypatch, "cuda", torch.float64, False) == "twin"


def test_import_needs_no_triton_and_no_cuda():
    """With Triton hidden the module defines everything it defines with it, and starts no CUDA."""
    program = (
        "import sys; sys.modules['triton'] = None; import kernels, torch; "
        "assert kernels.triton is None and callable(kernels._attend); "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_kernel_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install triton): the kernel was not tested")
    run = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    print(run.stdout[-20000:], run.stderr[-5000:])
    if BROKEN_INTERPRETER in run.stdout:
        pytest.skip(BROKEN_INTERPRETER)
    assert run.returncode == 0 and "all right" in run.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: only interpreted")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_kernel_on_the_gpu(dtype):
    assert kernels.triton is not None, "a GPU but no Triton"
    for number, case in enumerate(CASES + [random_case(seed) for seed in range(200, 240)]):
        assert kernel_error(replace(case, seed=number), dtype, "cuda") <= 1, case


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: only interpreted")
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_products_on_the_gpu(dtype):
    check_products(dtype, "cuda")
    x, codes, scale = product(40, 96, 512, dtype, "cuda")
    many = kernels._int8_linear(x, codes, scale)
    for rows in (1, 5, 17):
        assert torch.equal(kernels._int8_linear(x[:rows], codes, scale), many[:rows])


A100, H100 = kernels._Card(108, 164 << 10), kernels._Card(132, 228 << 10)
SMALL = kernels._Card(128, 100 << 10)  # a card for games
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="no Triton: nothing was planned")


def plan(H, G, D, T, extent, *, steps=0, itemsize=2, card=H100, B=1):
    return kernels._tiling(T * H // G, B * G, D, itemsize, extent, steps, card)


@needs_triton
def test_short_texts_are_cut_finer():
    """A decode of 8 key/value heads keeps 64 processors busy at 512 tokens."""
    assert plan(32, 8, 128, 1, 512).splits == 8
    assert plan(32, 8, 64, 1, 512).splits == 8


@needs_triton
@pytest.mark.parametrize("model", [(64, 8, 128), (28, 4, 128)], ids=["70B", "7B"])
def test_two_programs_share_a_processor_up_to_64_rows(model):
    made = plan(*model, 8, 32768)
    assert (made.rows, made.warps, made.programs, made.stages) == (64, 4, 2, 3)
    assert made.splits == min(264 // model[1], 64)
    made = plan(*model, 8, 32768, card=A100)
    assert (made.programs, made.stages) == (2, 2), "three stages of two programs do not fit"
    made = plan(*model, 8, 32768, card=SMALL)
    assert (made.programs, made.stages) == (1, 2), "a single stage would load nothing ahead"


@needs_triton
def test_float32_has_registers_enough():
    for D, warps in ((64, 4), (80, 8), (128, 8), (256, 8)):
        assert plan(32, 8, D, 8, 4096, itemsize=4).warps == warps, D
    assert plan(32, 8, 256, 1, 4096).warps == 4, "16 rows of 2 bytes need no more"


@needs_triton
def test_no_second_wave():
    """The programs of a call all run at once, wherever what it sees is split at all."""
    for seed in range(300):
        rng = random.Random(seed)
        G, T, card = rng.choice((1, 2, 4, 8)), rng.randint(1, 64), rng.choice((A100, H100, SMALL))
        size, D = rng.choice((2, 4)), rng.choice((32, 64, 80, 128, 256))
        extent, B, R = rng.randint(1, 40000), rng.choice((1, 1, 4, 16)), rng.randint(1, 8)
        made = plan(G * R, G, D, T, extent, itemsize=size, card=card, B=B)
        programs = made.splits * B * G * math.ceil(T * R / made.rows)
        assert made.splits == 1 or programs <= card.processors * made.programs, seed


@needs_triton
def test_kernels_compile_for_a_gpu(tmp_path):
    """Part of scripts/check_kernels.py: float32 from 128 numbers a head on spilled in 4 warps."""
    asked = ["--card", "h100", "--dtype", "float32", "--model", "8B"]
    run = subprocess.run(
        [sys.executable, "scripts/check_kernels.py", *asked],
        cwd=ROOT, env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 kernels" in run.stdout and "all right" in run.stdout


def test_check_kernels_finds_faults():
    sys.path.insert(0, str(ROOT / "scripts"))
    import check_kernels

    right = check_kernels.Figures(registers=228, spilled=0, shared=114688, columns=0, warps=4)
    for found, planned, card, said in (
        (right, 2, "h100", ""),
        (right._replace(columns=256), 2, "b200", ""),
        (right._replace(spilled=8), 2, "h100", "spills 8 bytes"),
        (right._replace(shared=228 << 10), 1, "h100", "takes 228.0 KiB of shared memory"),
        (right, 2, "a100", "2 programs a processor are planned, and 1 fit"),
        (right._replace(warps=8), 2, "h100", "and 1 fit"),
        (right._replace(columns=512), 2, "b200", "and 1 fit"),
    ):
        faults = check_kernels.faults(found, planned, card)
        assert len(faults) == bool(said) and said in "".join(faults)


def fused(query, k, v, limit, first, *, scale, extent, tight, chain, window):
    base, steps, step = chain or (0, 0, None)
    return kernels._fused(query, k, v, limit, first, step, scale, extent, base, steps, window)


def kernel_error(case: Case, dtype, device="cpu") -> float:
    plan = kernels._tiling
    kernels._tiling = lambda *shape: plan(*shape)._replace(**dict(case.plan))
    try:
        return error(case, dtype, fused, device)
    finally:
        kernels._tiling = plan


def check_programs_without_work_write_nothing() -> None:
    """Partial results of splits without work stay what they were, and are never mixed in.

    Under CUDA graphs that memory is reused: it may hold another layer's numbers, or NaN.
    """
    made, empty = [], torch.empty

    def filled(stale, *shape, **about):
        made.append(empty(*shape, **about).fill_(stale))
        return made[-1]

    for case in (
        Case("rows", 1, 2, 1, 1, 32, 400),
        Case("chain", 1, 2, 1, 1, 32, 300, steps=2, window=90),
    ):
        (query, k, v, limit, first), options = build(case, torch.float32)
        k, v = k.nan_to_num(0.5), v.nan_to_num(0.5)
        limit[0, 1] = 70  # of more than 300 slots: most splits see nothing
        first = first if first is None else first.minimum(limit - 1)
        answers = []
        for stale in (0.0, math.nan, 1e30):
            made.clear()
            torch.empty = functools.partial(filled, stale)
            try:
                answers.append(fused(query, k, v, limit, first, **options))
            finally:
                torch.empty = empty
        assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2]), case
        written = [(x != 1e30).any(-1) for x in made if x.dim() == 5][0]
        assert written.any(-1).all() and not written.all(), "programs without work wrote"


def check_registration() -> None:
    """torch.compile takes the operator whole, and its fake, schema and real forms agree."""
    for case in (CASES[1], CASES[12]):
        (query, k, v, limit, first), options = build(case, torch.float32)
        want = fused(query, k, v, limit, first, **options)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=False)
        assert torch.equal(compiled(query, k, v, limit, first, **options), want)
        base, steps, step = options["chain"] or (0, 0, None)
        shape = (options["scale"], options["extent"], base, steps, options["window"])
        utils = ("test_schema", "test_faketensor")
        # The schema test compares inputs, and NaN differs from NaN.
        given = (query, k.nan_to_num(0.0), v.nan_to_num(0.0), limit, first, step, *shape)
        torch.library.opcheck(kernels._fused, given, test_utils=utils)


def check_refusals() -> None:
    """Wrong strides, dtypes and shapes stop before the launch, with a message of what was given."""
    arguments, options = build(Case("chain", 2, 3, 2, 2, 32, 40, steps=2), torch.float32)
    query, k, v, limit, _ = arguments
    chain = options["chain"]
    for wrong, changed, said in (
        ((query.double(), k, v, limit, None), {}, "float64"),
        ((query, k.half(), v, limit, None), {}, "keys are torch.float16"),
        ((query, k, v[:, :, :-1], limit, None), {}, "values are (2, 2, 51, 32)"),
        ((query, k, v.mT.contiguous().mT, limit, None), {}, "values have strides"),
        ((query, k.mT.contiguous().mT, v.mT.contiguous().mT, limit, None), {}, "keys have strides"),
        ((query.mT.contiguous().mT, k, v, limit, None), {}, "queries have strides"),
        ((query[:, :, :3], k, v, limit, None), {}, "3 heads on 2"),
        ((query, k, v, limit[:, :2], None), {}, "limit is (2, 2)"),
        ((query, k, v, limit.float(), None), {}, "limit is (2, 3) torch.float32"),
        ((query, k, v, limit, None), {"extent": 53}, "extent is 53"),
        ((query, k, v, limit, None), {"chain": (47, 2, chain[2])}, "chains end at slot 53"),
    ):
        try:
            fused(*wrong, **(options | changed))
        except AssertionError as refusal:
            assert said in str(refusal), f"{refusal} does not say {said!r}"
        else:
            raise AssertionError(f"not refused: {said}")


def check_nan_is_not_hidden() -> None:
    """A NaN that a query sees reaches its output, through splits and merging too.

    Other branches stay clean.
    """
    case = Case("chain", 1, 4, 1, 2, 32, 600, steps=3)
    (query, k, v, limit, first), options = build(case, torch.float32)
    base, _, step = options["chain"]
    step[:], limit[:] = 2, 600
    k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    clean = fused(query, k, v, limit, first, **options)
    for tensor in (k, v):
        broken = tensor.clone()
        broken[0, 0, base + 1 + 2 * 4] = math.nan
        pair = (broken, v) if tensor is k else (k, broken)
        out = fused(query, *pair, limit, first, **options)
        assert out[0, 1].isnan().all() and torch.equal(out[0, [0, 2, 3]], clean[0, [0, 2, 3]])
        broken = tensor.clone()
        broken[0, 0, 300] = math.nan
        pair = (broken, v) if tensor is k else (k, broken)
        assert fused(query, *pair, limit, first, **options).isnan().all()


def check_odd_inputs() -> None:
    """Limits may be int32 and not contiguous. Past the extent they are cut, as are steps."""
    case = Case("chain", 2, 3, 1, 2, 32, 200, steps=2)
    (query, k, v, limit, first), options = build(case, torch.float32)
    want = fused(query, k, v, limit, first, **options)
    spread = limit.int().repeat_interleave(2, 1)[:, ::2]
    assert not spread.is_contiguous()
    assert torch.equal(want, fused(query, k, v, spread, first, **options))
    k, v, limit[0, 0], options["chain"][2][:] = k.nan_to_num(0.0), v.nan_to_num(0.0), 205, 2
    twin = kernels.tree_attention_reference(query, k, v, limit, first, **options)
    assert torch.allclose(fused(query, k, v, limit, first, **options), twin, atol=1e-5)


def product(M: int, N: int, K: int, dtype=torch.float16, device="cpu") -> tuple:
    """x, codes and scales, the last in bfloat16 as the engine has them."""
    rng = torch.Generator().manual_seed(M * N + K)
    x = torch.randn(M, K, generator=rng).to(dtype)
    codes = torch.randint(-127, 128, (N, K), generator=rng, dtype=torch.int8)
    scale = torch.rand(N, generator=rng).bfloat16() / 100
    return x.to(device), codes.to(device), scale.to(device)


def check_products(dtype=torch.float16, device="cpu") -> None:
    """Rows and outputs that fill no tile, inputs that do and do not, more rows than a program."""
    for M, N, K in (1, 40, 64), (5, 33, 300), (17, 48, 512), (40, 20, 257), (70, 9, 80):
        x, codes, scale = product(M, N, K, dtype, device)
        want = x.double() @ (codes.double() * scale.double()[:, None]).T
        got = kernels._int8_linear(x, codes, scale)
        assert got.shape == (M, N) and got.dtype == dtype
        error = ((got.double() - want).abs() / (want.abs() + 0.1)).max().item()
        assert error < 1.1 * torch.finfo(dtype).eps / 2 + 1e-4, f"{(M, N, K)}: {error}"
        x[-1] = math.nan
        assert kernels._int8_linear(x, codes, scale)[-1].isnan().all(), "a NaN is not hidden"
        other = kernels._int8_linear(x, codes, scale)[:-1]
        assert torch.equal(other, got[:-1]), "rows do not know of each other"


def check_product_registration() -> None:
    x, codes, scale = product(5, 33, 300)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels._int8_linear, (x, codes, scale), test_utils=utils)
    for wrong, said in (
        ((x.float(), codes, scale), "x is torch.float32"),
        ((x, codes.int(), scale), "codes torch.int32"),
        ((x[:, 1:], codes, scale), "x has 299 columns, wanted the weights' 300"),
    ):
        with pytest.raises(AssertionError, match=said):
            kernels._int8_linear(*wrong)


def main() -> None:
    torch.set_num_threads(1)
    # numpy's warnings are about 0/0 and log2(0) that nobody reads.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    try:
        kernel_error(CASES[0], torch.float32)
    except Exception as failure:
        if "0-dimensional" not in str(failure):
            raise
        print(BROKEN_INTERPRETER)
        return
    failed = []
    for check in (
        check_refusals,
        check_nan_is_not_hidden,
        check_programs_without_work_write_nothing,
        check_odd_inputs,
        check_registration,
        check_products,
        check_product_registration,
    ):
        began = time.process_time()
        check()
        print(f"{time.process_time() - began:5.2f} s  {check.__name__}", flush=True)
    for number, case in enumerate(CASES + [random_case(seed) for seed in range(200, 208)]):
        both = (torch.float32, torch.float16)
        for dtype in both if number < len(CASES) else both[number % 2 :][:1]:
            began = time.process_time()
            share = kernel_error(replace(case, seed=number), dtype)
            took = time.process_time() - began
            print(f"{took:5.2f} s  {share:8.3f} of the allowed error  {dtype}  {case}", flush=True)
            if share > 1:
                failed.append((case, dtype))
    assert not failed, f"{len(failed)} of the cases differ from the loops"
    print("all right")


if __name__ == "__main__":
    main()
