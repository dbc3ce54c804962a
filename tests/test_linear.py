"""linear.py: each number format against a float64 product of the very weights that it stores."""

import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import engine as engine_module
import linear
from cache import SLOT_BLOCK, KVCache, in_whole_blocks
from checkpoint.gguf import Groups
from engine import Model
from kernels import FEW_ROWS, script
from linear import (
    GroupLinear,
    Int4Linear,
    Int8Linear,
    PackedLinear,
    few_bits_problem,
    finish_all,
    finisher,
    fits_int4,
    to_groups,
    to_int8,
)
from runtime import one_thread

ROWS = (1, 2, 3, 4, 5, 8, 33, 64)
SHAPES = ((64, 96), (48, 32), (16, 1536), (4160, 64), (33, 64), (7, 36), (5, 1), (100, 48))


ABLE = torch.cpu.get_capabilities().get("avx2") and shutil.which("c++")
OURS = pytest.mark.skipif(not ABLE, reason="few_bits.cpp needs AVX2 and a C++ compiler")


@pytest.fixture(autouse=True)
def on_one_thread():
    few_bits_problem()
    with one_thread():
        yield


def layer(N: int, K: int, bias: bool = False, dtype=torch.float32) -> nn.Linear:
    made = nn.Linear(K, N, bias=bias).requires_grad_(False)
    with torch.no_grad():
        made.weight.copy_(torch.randn(N, K, generator=torch.Generator().manual_seed(N + K)))
    return made.to(dtype)


def int8_numbers(weight):
    codes_NK, scale_N = to_int8(weight)
    return codes_NK.double() * scale_N.double()[:, None]


def numbers_of(groups):
    return Groups(*(x.double() for x in groups)).dense()


def int4_numbers(weight):
    return numbers_of(to_groups(weight, 4))


def error(out, x, weight, bias=None) -> float:
    """The largest error, of the sum of the magnitudes that were added."""
    wanted, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    return float(((out.double() - wanted - (0 if bias is None else bias)).abs() / size).max())


# ---- products


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_is_right_to_the_rounding_of_bfloat16(shape, dtype):
    """Ragged shapes and 1 to 64 rows, as a module, as a script, and as a GPU computes int8."""
    plain = layer(*shape)
    makers = {"int8": (lambda: Int8Linear(plain), int8_numbers(plain.weight))}
    if fits_int4(*shape):
        stored = to_groups(plain.weight, 4)
        makers["int4"] = (lambda: Int4Linear(stored), int4_numbers(plain.weight))
    if "bfloat16" in linear.speeds():
        half = plain.weight.bfloat16().double()
        makers["bfloat16"] = (lambda: PackedLinear(plain, torch.bfloat16), half)
    for name, (make, numbers) in makers.items():
        found = [make(), script(make())]
        if name == "int8":
            found.append(make())
            found[-1].fast = False
        for rows in ROWS:
            x = torch.randn(1, rows, shape[1]).to(dtype)
            for module in found:
                out = module(x)
                assert out.shape == (1, rows, shape[0]) and out.dtype == dtype
                most = 2**-8 if getattr(module, "fast", True) else 2**-7  # rounded twice
                assert error(out, x.bfloat16(), numbers) < most, (name, rows)


def test_packed_float32_computes_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32, bias=False))
    x = torch.randn(2, 5, 64)
    plain = model(x)
    finish_all(model, finisher("none", pack=True))
    assert isinstance(model[0], PackedLinear) and isinstance(model[1], PackedLinear)
    assert torch.allclose(model(x), plain, atol=1e-5)
    double = nn.Sequential(nn.Linear(8, 8)).double()
    finish_all(double, finisher("none", pack=True))
    assert type(double[0]) is nn.Linear, "float64 has no packed layout"


def test_a_bias_is_added():
    plain, x = layer(64, 32, bias=True), torch.randn(3, 32)
    for module in (Int8Linear(plain), Int4Linear(to_groups(plain.weight, 4), plain.bias)):
        without = Int8Linear(layer(64, 32)) if isinstance(module, Int8Linear) else None
        without = without or Int4Linear(to_groups(plain.weight, 4))
        assert torch.allclose(module(x), without(x) + plain.bias, atol=0.05)


@OURS
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] % 32 == 0] + [(5, 8960)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_in_groups_is_right_to_8_bits(bits, shape, dtype):
    """Of the largest number in each group of x, as a module and as a script; groups and rows have
    sizes of their own.
    """
    plain = layer(*shape, bias=True)
    groups = to_groups(plain.weight, bits)
    numbers, made = numbers_of(groups), GroupLinear(groups, bits, plain.bias)
    for rows in (*ROWS, 130):
        x = torch.randn(2, rows, shape[1])
        x *= 10.0 ** (torch.arange(rows) % 13 - 6)[:, None]
        x *= 3.0 ** (torch.arange(shape[1]) // 32 % 5)
        x = x.to(dtype)
        for module in (made, script(GroupLinear(groups, bits, plain.bias))):
            out = module(x)
            assert out.shape == (2, rows, shape[0]) and out.dtype == dtype
            wanted = x.double() @ numbers.T
            off = (out.double() - plain.bias - wanted).abs()
            step = x.double().unflatten(2, (-1, 32)).abs().amax(3) / 127
            by_group = numbers.unflatten(1, (-1, 32))
            most = 0.502 * step @ by_group.abs().sum(2).T
            # float32 adds codes from zero on, and what is to be subtracted again.
            added = 127 * 32 * step @ (by_group.abs().amax(2) * 17).T + plain.bias.abs()
            rounded = max(torch.finfo(dtype).eps, 2**-23) * out.double().abs() + 2**-22 * added
            assert (off <= most + rounded).all(), rows
            if dtype == torch.float32:  # errors are random: they grow with the root of K
                size = (step.square() @ by_group.square().sum(2).T).sqrt()
                assert ((off - rounded).clamp(min=0) / size).square().mean() < 0.45**2


@OURS
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_numbers_that_are_none_stay_in_their_row(bits):
    """A NaN must reach the logits, where it is noticed; a row of zeros divides by nothing."""
    module = GroupLinear(to_groups(layer(48, 64).weight, bits), bits)
    x = torch.randn(12, 64)
    alone = module(x)
    x[1, 3], x[2], x[4], x[9, 40] = math.nan, 0, 1e-38, -math.inf
    out = module(x)
    assert out[1].isnan().all() and (out[2] == 0).all() and not out[9].isfinite().any()
    assert (out[4].abs() < 1e-29).all()
    rest = [0, 3, 5, 6, 7, 8, 10, 11]
    assert torch.equal(out[rest], alone[rest])


@OURS
def test_the_largest_codes_do_not_overflow():
    """With AVX2 sums of two products have 16 bits: 255 * 127 * 2 would be cut off."""
    for bits, largest in ((4, 15), (6, 63), (8, 255)):
        codes_NK = torch.full((16, 96), largest, dtype=torch.uint8)
        scale, least = torch.ones(16, 6 if bits == 6 else 3), 32 if bits == 6 else 8
        groups = Groups(codes_NK, scale, (8 - least) * scale)
        for sign in (1.0, -1.0):
            out = GroupLinear(groups, bits)(torch.full((3, 96), sign))
            wanted = torch.full((), sign * (largest - least) * 96)
            assert torch.allclose(out, wanted, rtol=1e-5), bits


def test_codes_of_a_model_lie_side_by_side(monkeypatch):
    """So that those of small layers share pages of 2 MB, on a system that has them or not."""
    for huge in (True, False):
        if not huge:
            monkeypatch.delattr(linear.mmap, "MADV_HUGEPAGE", raising=False)
        room = linear.Room()
        with ThreadPoolExecutor(4) as pool:
            taken = list(pool.map(room.take, [100, 1000, 64, 1, linear.ROOM_BYTES + 5, 7] * 4))
        for number, some in enumerate(taken):
            some.fill_(number)
        assert all((some == number).all() for number, some in enumerate(taken))
        assert all(some.data_ptr() % linear.ALIGNED == 0 for some in taken)
        at = sorted(some.data_ptr() for some in taken if len(some) <= 1000)
        assert sum(b - a <= 1024 for a, b in zip(at, at[1:])) >= len(at) - 6


ON_AVX2 = """
import sys, torch
torch.cpu.get_capabilities = lambda: {"avx2": True, "fma3": True}
sys.path[:0] = sys.argv[1:3]
import test_linear
assert test_linear.few_bits_problem() is None
torch.save(test_linear.many_products(), sys.argv[3])
test_linear.test_the_largest_codes_do_not_overflow()
"""


def many_products() -> list[torch.Tensor]:
    found, seeded = [], torch.Generator().manual_seed(0)
    for bits in (4, 6, 8):
        for N, K in ((64, 96), (33, 64), (576, 1536)):
            module = GroupLinear(to_groups(layer(N, K).weight, bits), bits)
            found += [module(torch.randn(rows, K, generator=seeded)) for rows in ROWS]
    return found


@OURS
def test_every_cpu_computes_the_same(tmp_path):
    """Bit for bit: with AVX2 alone, as most laptops, and with what this one has."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", ON_AVX2, str(here), str(here.parent), str(tmp_path / "out")]
    subprocess.run(command, check=True, timeout=300)
    theirs = torch.load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(many_products(), theirs, strict=True))


NO_COMPILER = """
import sys
sys.path.insert(0, sys.argv[1])
import linear
print(linear.few_bits_problem())
print(type(linear.finisher("int4", True)(linear.nn.Linear(32, 16).requires_grad_(False))).__name__)
"""


@pytest.mark.parametrize(
    "compiler, told", [("missing", "there is no C++ compiler"), ("false", "it ends with 1")]
)
def test_without_a_compiler_pytorch_multiplies(compiler, told, tmp_path):
    """And a sentence says why."""
    changed = os.environ | {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", NO_COMPILER, str(Path(__file__).parent.parent)]
    out = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=300, env=changed
    ).stdout
    able = torch.cpu.get_capabilities().get("avx2")
    assert (told if able else "AVX2") in out and "Int4Linear" in out
    assert not list(tmp_path.rglob("*.so"))


TOGETHER = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, sys.argv[1])
import linear
runs, real = [], linear.compile_few_bits
linear.compile_few_bits = lambda *of: (runs.append(of), time.sleep(0.2), real(*of))[2]
with ThreadPoolExecutor(8) as pool:
    said = list(pool.map(lambda _: linear.few_bits_problem(), range(8)))
assert said == [None] * 8 and len(runs) == 1, (said, len(runs))
"""


@OURS
def test_threads_that_load_a_model_compile_once():
    command = [sys.executable, "-c", TOGETHER, str(Path(__file__).parent.parent)]
    subprocess.run(command, check=True, timeout=300)


@OURS
def test_a_damaged_library_is_compiled_anew(monkeypatch, tmp_path):
    """The file is there and empty, as after a power failure."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(linear, "load_few_bits", linear.load_few_bits.__wrapped__)
    runs, loaded = [], []

    def write(command, **how):
        runs.append(command)
        Path(command[-1]).write_bytes(b"" if len(runs) == 1 else b"whole")

    def load(path):
        if not Path(path).read_bytes():
            raise OSError(f"Could not load this library: {path}")
        loaded.append(path)

    monkeypatch.setattr(linear.subprocess, "run", write)
    monkeypatch.setattr(torch.ops, "load_library", load)
    monkeypatch.setattr(torch.library, "register_fake", lambda name: lambda function: function)
    assert linear.few_bits_problem() is None
    assert len(runs) == 2 and len(loaded) == 1


@OURS
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_what_compilers_are_told_of_the_operator(bits):
    """torch.compile asks for shapes and dtypes without computing anything."""
    packed = GroupLinear(to_groups(layer(33, 64).weight, bits), bits).packed
    tests = ("test_schema", "test_faketensor")
    for rows in (1, 5):
        said = torch.library.opcheck(
            torch.ops.few_bits.linear, (torch.randn(rows, 64), packed, bits, 33), test_utils=tests
        )
        assert set(said.values()) == {"SUCCESS"}


@OURS
def test_what_was_compiled_is_kept(monkeypatch, tmp_path):
    """With a compiler elsewhere, other flags or another source it is compiled anew."""
    runs, real = [], linear.subprocess.run
    monkeypatch.setattr(linear.subprocess, "run", lambda *a, **k: (runs.append(a), real(*a, **k)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = [shutil.which("c++"), "-mavx2", "-mfma"]
    paths = [linear.compile_few_bits([*compiler, "-O0"]) for _ in range(2)]
    assert paths[0] == paths[1] and len(runs) == 1 and Path(paths[0]).is_file()
    assert [path.name for path in (tmp_path / "ssd").iterdir()] == [Path(paths[0]).name]
    linear.compile_few_bits([*compiler, "-g0"])
    assert len(runs) == 2


@pytest.mark.parametrize(
    "make",
    [
        Int8Linear,
        pytest.param(lambda plain: GroupLinear(to_groups(plain.weight, 4), 4), marks=OURS),
        pytest.param(lambda plain: GroupLinear(to_groups(plain.weight, 6), 6), marks=OURS),
        pytest.param(lambda plain: GroupLinear(to_groups(plain.weight, 8), 8), marks=OURS),
        lambda plain: Int4Linear(to_groups(plain.weight, 4)),
    ],
)
def test_a_row_does_not_know_of_the_rows_beside_it(make):
    """Bit for bit: a plain step and a verification round alike."""
    for shape in ((960, 576), (576, 1536), (256, 8960)):
        module, x = make(layer(*shape)), torch.randn(64, shape[1])
        alone = torch.cat([module(row[None]) for row in x])
        for rows in ROWS:
            assert torch.equal(module(x[:rows]), alone[:rows]), (shape, rows)


# ---- codes


def test_quantising_keeps_the_weight_and_rounds_to_the_nearest():
    for scale in (1.0, 1e-3, 1e3):
        weight = layer(64, 96).weight * scale
        before = weight.clone()
        eight, four = int8_numbers(weight), int4_numbers(weight)
        fine, head = numbers_of(to_groups(weight, 8)), to_groups(weight, 6)
        assert torch.equal(weight, before), "a tied embedding is the same tensor"
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((eight - weight).abs() <= 0.51 * step + 0.004 * weight.abs()).all()
        groups = weight.unflatten(1, (-1, 32))
        step = (groups.amax(2) - groups.amin(2))[..., None] / 15
        off = (four.unflatten(1, (-1, 32)) - groups).abs()
        most = groups.abs().amax(2, keepdim=True)
        assert (off <= 0.51 * step + 2**-8 * most).all()
        off = (fine.unflatten(1, (-1, 32)) - groups).abs()
        assert (off <= 0.51 * step * 15 / 255 + 2**-7 * most).all()
        assert off.square().mean() < 1.2 * (step * 15 / 255).square().mean() / 12
        halves, step = weight.unflatten(1, (-1, 16)), head.scale_NG[..., None].double()
        meant = (head.codes_NK.double().unflatten(1, (-1, 16)) - 32) * step
        inner = halves.abs() <= 31 * step  # a scale may be rounded down, below the largest
        assert ((meant - halves).abs() <= 0.5001 * step)[inner].all() and inner.float().mean() > 0.9
        assert (halves.abs().amax(2, keepdim=True) <= 31 * 1.004 * step).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_weights_that_are_all_the_same(value):
    weight = torch.full((16, 64), value)
    assert torch.allclose(int8_numbers(weight), weight.double(), atol=0.02 * abs(value))
    assert torch.allclose(int4_numbers(weight), weight.double(), atol=0.01 * abs(value))


def test_which_layer_becomes_what(monkeypatch):
    """few_bits.cpp multiplies whole groups, of 6 bits in the head; PyTorch also wants whole blocks
    of rows for 4 bits, and has the rest in 8, and the head.
    """
    finish = finisher("int4", pack=True)
    made = lambda *shape, name="": finish(layer(*shape), name)  # noqa: E731
    if few_bits_problem() is None:
        for pack in (True, False):
            made = lambda *shape, name="": finisher("int4", pack)(layer(*shape), name)  # noqa: E731
            assert made(64, 32, name="layers.0.mlp.down").bits == made(40, 32).bits == 4
            assert made(64, 32, name="head").bits == 6
            assert finisher("int8", pack)(layer(64, 32)).bits == 8
            assert isinstance(made(64, 48), Int8Linear)
        for bits in (4, 6):
            stored = to_groups(layer(40, 32).weight, bits)
            assert finisher("stored", pack=True)(layer(40, 32), "", stored).bits == bits
        assert finisher("stored", pack=True)(layer(40, 32), "", "int8").bits == 8
    monkeypatch.setattr(linear, "few_bits_problem", lambda: "not here")
    assert isinstance(made(64, 32, name="layers.0.mlp.down"), Int4Linear)
    for module in (made(64, 32, name="head"), made(64, 48), made(40, 32)):
        assert isinstance(module, Int8Linear)
    for bits in (4, 6):
        stored = to_groups(layer(40, 32).weight, bits)
        out = finisher("stored", pack=True)(layer(40, 32), "", stored)(torch.eye(32))
        assert torch.allclose(out.T, stored.dense().float(), atol=0.05)


# ---- models


@pytest.mark.parametrize("bits", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_mode_prints_the_same_text(bits, temperature):
    """Under `shared`, with weights of few bits in the target, in the draft, and in both."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "dtype": torch.float32}
    base = tiny.transformer(**shape)
    drafts = [tiny.transformer(base=base, noise=0.05, **shape) for _ in range(2)]
    target, few = Model.of(base, bits=bits), Model.of(drafts[0], bits=bits)
    prompts = [[1, 2, 3], [4, 5], [7], [9, 8, 7, 6]]
    for draft in (few, Model.of(drafts[1])):
        pair = engine_module.Engine(target, draft, tiny.DEVICES)
        texts = [
            pair.generate(prompts, mode=mode, max_new_tokens=40, temperature=temperature, **more)
            for mode, more in (("ar", {}), ("sd", {"k": 3}), ("ssd", {"k": 3, "fan_out": 6}))
        ]
        assert texts[0].token_ids == texts[1].token_ids == texts[2].token_ids
        assert texts[2].stats["quantize"] == ("none" if bits == "bfloat16" else bits)
        assert math.isfinite(texts[1].stats["acceptance_rate"])


def test_formats_are_compared_out_of_cache_and_only_where_one_is_chosen(demo, monkeypatch):
    """Weights that fit in a cache made every start choose anew; and measuring them takes time."""
    sizes, real = [], linear.PackedLinear

    def packed(layer, *dtype):
        sizes.append(layer.weight.nbytes)
        return real(layer, *dtype)

    seconds, read = linear._seconds, []
    monkeypatch.setattr(linear, "PackedLinear", packed)
    monkeypatch.setattr(
        linear, "_seconds", lambda *of: (read.append(of[2].nbytes), seconds(*of))[1]
    )
    linear.speeds.__wrapped__()
    assert min(sizes) >= 32 << 20 and min(read) >= linear.CACHE_BYTES
    sums = SimpleNamespace(sum=lambda: read.append("in between"))
    seconds(layer(16, 32), 1, sums)
    assert read[-1] == "in between"
    measures = lambda *rows: pytest.fail("nothing is to be chosen")  # noqa: E731
    monkeypatch.setattr(engine_module, "speeds", measures)
    choose = engine_module.choose_format
    for dtype, quantize in (("float32", None), ("float64", "none"), (None, "int8")):
        choose(Path(), torch.device("cpu"), dtype, quantize, False)
    engine_module.load(str(demo / "target"), "ngram", "cpu", dtype="float32")


@pytest.mark.parametrize("begin", range(0, 30, 3))
def test_a_disturbance_slows_down_all_formats(monkeypatch, begin):
    """One by one, the format that was measured meanwhile would have lost."""
    calls = []

    def seconds(layer, rows, in_between):
        calls.append(layer)
        busy = begin <= len(calls) < begin + 12
        return (4.0 if isinstance(layer, linear.PackedLinear) else 1.0) * (1 + 9 * busy)

    monkeypatch.setattr(linear, "_seconds", seconds)
    monkeypatch.setattr(linear, "finisher", lambda *_, **__: lambda layer: layer)
    found = linear.speeds.__wrapped__()
    assert set(found.values()) == {2e3, 8e3}


def test_a_draft_gets_few_bits_where_they_are_fastest(monkeypatch):
    """Unless the user has chosen. Those of a target's file stay as they are."""
    ms = {"float32": 10, "int8": 5, "int4": 3}
    monkeypatch.setattr(engine_module, "speeds", lambda: ms)
    cpu, whole = torch.device("cpu"), torch.float32
    choose = lambda *given: engine_module.choose_format(Path(), cpu, *given)  # noqa: E731
    file = lambda drafts: engine_module.choose_format(  # noqa: E731
        Path(__file__), cpu, None, None, False, drafts
    )
    assert file(False) == (whole, "stored") and file(True) == (whole, "int4")
    assert choose(None, None, False, True) == (whole, "int4")
    assert choose(None, None, False, False) == (whole, "none"), "a target is not rounded unasked"
    assert choose("float32", None, False, True) == (whole, "none")
    assert choose(None, "none", False, True) == (whole, "none")
    ms["bfloat16"] = 2
    assert choose(None, None, False, True) == (whole, "bfloat16")


def test_a_decode_step_reads_what_is_stored():
    shape = {"hidden_size": 64, "intermediate_size": 128, "dtype": torch.float32}
    sizes = {b: Model.of(tiny.transformer(**shape), bits=b).step_bytes
             for b in ("none", "int8", "int4")}  # fmt: skip
    assert 3.4 < sizes["none"] / sizes["int8"] < 4 and 4.5 < sizes["none"] / sizes["int4"] < 6.4


@pytest.mark.parametrize("trunk", [1, 16, 131, 134])
def test_every_slot_is_read_in_a_whole_block(trunk):
    """The last ones, too, however long the trunk of a mode is: else only the end of a text, where
    the blocks are cut off, would be computed differently in another mode.
    """
    config = tiny.transformer().config
    cache = KVCache(config, 1, trunk, device="cpu", dtype=torch.float32)
    one_B = torch.ones(1, dtype=torch.long)
    for position in range(trunk):
        where = cache.locate(one_B * position, one_B, 1, position + 1, tight=True)
        assert where.extent % SLOT_BLOCK == 0 and position < where.extent <= cache.trunk


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="the order of sums was looked at on CPUs with AVX-512 only",
)
@pytest.mark.parametrize("bits", ["none", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 2)], ids=["R=1", "R=3", "R=4"])
def test_a_verification_computes_what_plain_steps_do_bit_for_bit(bits, heads):
    """Rounding to bfloat16 between the layers turns a last bit into a hundredth of a logit."""
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 64}
    shape |= {"hidden_size": 128, "intermediate_size": 256, "vocab": 64}
    model = tiny.transformer(4, dtype=torch.float32, **shape)
    model.set_positions(256)
    finish_all(model, finisher(bits, pack=True))
    model.script()
    assert isinstance(model.layers, torch.jit.ScriptModule), "the layers run from Python"
    ids_1T = torch.randint(64, (1, 130), generator=torch.Generator().manual_seed(1))

    def logits(sizes: list[int]) -> torch.Tensor:
        # As long as a mode needs with this K: the last tokens are read in the same blocks, too.
        trunk = 130 + sizes[0]
        cache = KVCache(model.config, 1, trunk, device="cpu", dtype=torch.float32)
        cache.k_LBGSD[:], cache.v_LBGSD[:] = 300.0, 300.0  # what nobody may see
        out, start = [], 0
        for size in sizes:
            start_B, count_B = torch.tensor([start]), torch.tensor([size])
            where = cache.locate(start_B, count_B, size, start + size, tight=True)
            out.append(model(ids_1T[:, start : start + size], where, cache)[0])
            start += size
        return torch.cat(out)

    plain = logits([1] * 130)
    for sizes in ([5] * 26, [2, 3, 9, 17, 1, 6] * 3 + [16], [33, 33, 33, 31]):
        assert torch.equal(logits(sizes), plain)


@pytest.mark.skipif(
    not ("AMD" in torch.cpu.get_capabilities().get("cpu_name", "")
         and torch.backends.cpu.get_cpu_capability() == "AVX512"),
    reason="how a CPU splits long sums was looked at on AMD's with AVX-512 only",
)  # fmt: skip
def test_slots_that_a_query_does_not_see_change_no_order_of_sums():
    """Bit for bit, for 4 to 300 query rows. From 193 to 384 slots a sum is split in two halves."""
    seeded = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 1500, 64, generator=seeded)
    attend = torch.nn.functional.scaled_dot_product_attention
    some = torch.rand(4, 224, generator=seeded) * (torch.arange(224) < 200)
    if torch.equal(some[:, :208] @ value[0, 0, :208], some @ value[0, 0, :224]):
        pytest.skip("this CPU does not add up 208 slots in two halves")
    for limit in (1, 100, 190, 193, 200, 300, 380, 385, 500, 513, 700, 710, 900):
        found = []
        for more in (0, 40, 200, 390):
            slots = in_whole_blocks(limit + more)
            for rows in (4, 12, 300):
                mask = torch.where(torch.arange(slots) < limit, 0.0, -math.inf).expand(rows, slots)
                seen = key[:, :, :slots], value[:, :, :slots], mask[None, None].contiguous()
                found.append(attend(query[:, :, :rows], *seen)[:, :, :4])
        assert all(torch.equal(one, found[0]) for one in found), limit


@pytest.mark.skipif(FEW_ROWS == 0, reason="no Triton: a GPU casts all weights")
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_few_rows_on_a_gpu_cast_no_weights(rows):
    """Which operators a GPU would get, without one: no numbers are computed."""
    called = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, given=(), named=None):
            called.append(operator)
            return operator(*given, **(named or {}))

    module = Int8Linear(layer(32, 64))
    with FakeTensorMode():
        module.fast = False
        module.codes_NK = torch.empty(32, 64, dtype=torch.int8, device="cuda")
        module.scale_N = torch.empty(32, dtype=torch.bfloat16, device="cuda")
        module.bias = None
        x = torch.empty(1, rows, 64, dtype=torch.bfloat16, device="cuda")
        with Noted():
            assert module(x).shape == (1, rows, 32)
    few = rows <= FEW_ROWS
    assert (torch.ops.ssd.int8_linear.default in called) == few
    assert (torch.ops.aten._to_copy.default in called) == (not few)
