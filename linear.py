"""Linear layers by the number format of their weights: packed floats, int8, int4.

Knows: nn.Linear, few_bits.cpp and PyTorch's operators for few bits, what this CPU is fast with.
Does not know: models, files, devices' queues. Read next: runtime.py.

    packed   float32 or bfloat16 in oneDNN's blocked layout (CPU)
    int8     few_bits.cpp: W = (codes - 8) * scale + zero, both for each group of 32 of a row;
             PyTorch: W = codes * scale, a scale for each row of W
    int4     W = (codes - 8) * scale + zero, both for each group of 32 weights of a row
    6 bits   the head beside int4, and Q6_K: few_bits.cpp: W = (codes - 32) * scale, a scale for
             each 16 weights of a row; PyTorch: int8

Codes are whole numbers, scales and zeros bfloat16. few_bits.cpp rounds each group of 32 inputs to 8
bits, as llama.cpp does; PyTorch's operators round inputs and results to bfloat16. The latter serve
CPUs for which few_bits.cpp cannot be compiled, and GPUs, where int8 of few rows is a kernel of
kernels.py that rounds alike. What lies between the layers keeps the
dtype that it came with: with SmolLM2, sums of layers rounded to bfloat16 cost four times the error
of weights in four bits.

Shape letters: N outputs, K inputs, G groups of a row, M rows of x.
"""

import contextlib
import functools
import hashlib
import mmap
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint.gguf import GROUP, HALF, Groups
from kernels import FEW_ROWS
from parallel import ALONE, Group, is_summed
from runtime import one_thread

FORMATS = ("none", "int8", "int4")
AT_ONCE = 1 << 22  # weights that are quantised at a time: temporaries stay small
ROWS = (1, 4)  # of passes that formats are compared by: a step; a verification, or some branches
ROWS_AT_ONCE = 1 << 10  # a multiple of the rows of all blocks that codes are packed in
ROOM_BYTES = 1 << 26  # taken from the system at a time
ALIGNED = 64  # a vector, a line of the cache
BLOCK = 16  # outputs that few_bits.cpp packs together
CACHE_BYTES = 1 << 26  # more than the last cache of a small machine
SOURCE = Path(__file__).with_name("few_bits.cpp")
COMPILE_SECONDS = 120
LOADING = threading.Lock()
WIDE = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma"]


class PackedLinear(nn.Module):
    """nn.Linear with its float32 or bfloat16 weight in oneDNN's blocked layout.

    It is 1.3 to 4 times as fast, most for 2 to 16 rows.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype | None = None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to(dtype or linear.weight.dtype)
        self.dtype = weight.dtype
        self.weight_bytes = weight.nbytes
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach().to(weight.dtype)

    def forward(self, x):
        rows = x.to(self.dtype).reshape(-1, self.in_features)
        count = rows.shape[0]
        if count == 1 and self.dtype == torch.bfloat16:
            # One row alone is summed in another order. Rounded to bfloat16, that would show.
            rows = rows.expand(2, -1)
        out = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return out[:count].unflatten(0, x.shape[:-1]).to(x.dtype)


class Int8Linear(nn.Module):
    """x (..., K) -> x (codes * scale)^T + bias, in bfloat16. A whole number of 8 bits a weight.

    Rows of x do not know of each other: on a CPU a row's result is the same, bit for bit, however
    many there are.
    """

    def __init__(self, linear: nn.Linear, group: Group = ALONE):
        """group: whose ranks have the other columns of the weight."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes_NK, scale_N = to_int8(linear.weight.detach(), group)
        # PyTorch's operator reads whole vectors of 16 numbers and does not check that there are.
        self.fast = not codes_NK.is_cuda and self.in_features % 16 == 0
        self.register_buffer("codes_NK", codes_NK)
        self.register_buffer("scale_N", scale_N)
        bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        self.register_buffer("bias", bias)
        self.weight_bytes = codes_NK.nbytes + scale_N.nbytes

    def forward(self, x):
        rows = x.to(torch.bfloat16).reshape(-1, self.in_features)
        if self.fast:
            out = torch._weight_int8pack_mm(rows, self.codes_NK, self.scale_N)
        elif rows.is_cuda and len(rows) <= FEW_ROWS:
            out = torch.ops.ssd.int8_linear(rows, self.codes_NK, self.scale_N)
        else:
            out = F.linear(rows, self.codes_NK.to(torch.bfloat16)) * self.scale_N
        if self.bias is not None:
            out = out + self.bias
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)


class GroupLinear(nn.Module):
    """x (..., K) -> x W^T + bias by few_bits.cpp, in float32.

    Codes have 4, 6 or 8 bits, and scales and zeros add one more bit a weight. Each group of 32
    numbers of x is rounded to 8 bits of its largest. A row's result does not depend on the rows
    beside it.
    """

    def __init__(
        self,
        weight: Groups | torch.Tensor,
        bits: int,
        bias: torch.Tensor | None = None,
        room: "Room | None" = None,
    ):
        """weight: in codes of these bits, or numbers (N, K) that get codes. room: for the codes."""
        super().__init__()
        whole = weight if isinstance(weight, Groups) else (weight,)
        room = room or Room()
        self.out_features, self.in_features = whole[0].shape
        self.bits = bits
        packed = None
        blocks = -(-self.out_features // BLOCK)
        for at, some in enumerate(zip(*(x.split(ROWS_AT_ONCE) for x in whole))):  # little at once
            codes_NK, scale, zero = some if len(some) == 3 else to_groups(*some, bits)
            pairs = scale.unflatten(1, (-1, 2)) if bits == 6 else torch.stack((scale, zero), 2)
            pairs_NG2 = pairs.bfloat16().contiguous()
            part = torch.ops.few_bits.pack(codes_NK.contiguous(), pairs_NG2, bits)
            if packed is None:
                packed = room.take(blocks * part[0].numel()).view(blocks, *part.shape[1:])
            packed[at * ROWS_AT_ONCE // BLOCK :][: len(part)] = part
        self.packed = packed
        self.bias = None if bias is None else bias.detach().float()
        self.weight_bytes = self.packed.nbytes

    def forward(self, x):
        rows = x.float().reshape(-1, self.in_features).contiguous()
        out = torch.ops.few_bits.linear(rows, self.packed, self.bits, self.out_features)
        if self.bias is not None:
            out = out + self.bias
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)


class Room:
    """Memory for the codes of a model, in pages of 2 MB where the system has such.

    Codes are read once a step, in order. With pages of 4 KB, translating addresses took 9 to 13% of
    a step (LOG.md), and the layers of a small model are smaller than one page of 2 MB each.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.left = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int) -> torch.Tensor:
        """So many bytes, aligned for vectors."""
        size = -(-count // ALIGNED) * ALIGNED
        with self.lock:
            if len(self.left) < size:
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                pages = mmap.mmap(-1, max(size, ROOM_BYTES), flags=flags)
                with contextlib.suppress(AttributeError, OSError):  # systems without such pages
                    pages.madvise(mmap.MADV_HUGEPAGE)
                self.left = torch.frombuffer(pages, dtype=torch.uint8)
            mine, self.left = self.left[:count], self.left[size:]
        return mine


class Int4Linear(nn.Module):
    """x (..., K) -> x ((codes - 8) * scale + zero)^T + bias, in bfloat16. 5 bits a weight in all.

    As with Int8Linear, a row's result on a CPU does not depend on the rows beside it.
    """

    def __init__(self, groups: Groups, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = groups.codes_NK.shape
        self.register_buffer("packed", pack_int4(groups.codes_NK))
        pairs_NG2 = torch.stack((groups.scale_NG, groups.zero_NG), 2).bfloat16()
        self.register_buffer("scale_zero_GN2", pairs_NG2.transpose(0, 1).contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16())
        self.weight_bytes = self.packed.nbytes + self.scale_zero_GN2.nbytes

    def forward(self, x):
        rows = x.to(torch.bfloat16).reshape(-1, self.in_features)
        if rows.is_cuda:
            out = torch._weight_int4pack_mm(rows, self.packed, 32, self.scale_zero_GN2)
        else:
            out = torch._weight_int4pack_mm_for_cpu(rows, self.packed, 32, self.scale_zero_GN2)
        if self.bias is not None:
            out = out + self.bias
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)


def few_bits_problem() -> str | None:
    """Why few_bits.cpp cannot be used here, in a few words. None: torch.ops.few_bits is there.

    The first call compiles it for this CPU; what is compiled is kept in the user's cache.
    """
    with LOADING:  # threads make the layers of a model, and functools.cache lets them all in
        return load_few_bits()


@functools.cache
def load_few_bits() -> str | None:
    """few_bits_problem, for one thread at a time."""
    able = torch.cpu.get_capabilities()
    compiler, *options = shlex.split(os.environ.get("CXX") or "c++")
    if not (able.get("avx2") and able.get("fma3")):
        return "this CPU has no AVX2"
    path = shutil.which(compiler)
    if path is None:
        return "there is no C++ compiler (c++, or what CXX names)"
    wide = all(able.get(f"avx512_{part}") for part in ("f", "bw", "dq", "vl", "vnni"))
    options += WIDE if wide else ["-mavx2", "-mfma"]
    try:
        library = compile_few_bits([path, *options])
        try:
            torch.ops.load_library(library)
        except OSError:  # what was kept is damaged
            Path(library).unlink()
            torch.ops.load_library(compile_few_bits([path, *options]))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines() or [f"it ends with {error.returncode}"]
        said = next((line for line in lines if "error" in line), lines[0])
        return f"{compiler} cannot compile few_bits.cpp: {said}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        why = error.__cause__ or error
        return f"few_bits.cpp cannot be compiled or loaded: {str(why).splitlines()[0]}"

    @torch.library.register_fake("few_bits::linear")
    def _(x_MK, packed, bits, outputs):
        return x_MK.new_empty(len(x_MK), outputs)

    return None


def compile_few_bits(compiler: list[str]) -> str:
    """The path of a shared library. compiler: a command and its options. OSError, RuntimeError (a
    user without a home), subprocess.SubprocessError: there is none.
    """
    here = Path(torch.__file__).parent
    command = [*compiler, "-std=c++17", "-O3", "-fPIC", "-shared", str(SOURCE)]
    command += [f"-I{here / 'include'}", f"-L{here / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    told = f"{torch.__version__} {command} {SOURCE.read_text()}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssd"
    kept = cache / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # others may compile it, too
            made = Path(folder) / kept.name
            subprocess.run(
                [*command, "-o", str(made)],
                check=True,
                timeout=COMPILE_SECONDS,
                capture_output=True,
                text=True,
                errors="replace",
            )
            made.replace(kept)
    return str(kept)


# ---- weights to codes


def to_int8(weight_NK: torch.Tensor, group: Group = ALONE) -> tuple[torch.Tensor, torch.Tensor]:
    """codes_NK int8 and scale_N bfloat16: each row in steps of a 127th of its largest weight."""
    codes_NK = torch.empty(weight_NK.shape, dtype=torch.int8, device=weight_NK.device)
    scale_N = torch.empty(len(weight_NK), dtype=torch.bfloat16, device=weight_NK.device)
    most_N = torch.cat([weight_NK[part].float().abs().amax(1) for part in parts(weight_NK)])
    scale_N.copy_((group.largest(most_N) / 127).clamp(min=1e-30))
    for part in parts(weight_NK):
        rows = weight_NK[part].float()
        codes_NK[part] = (rows / scale_N[part, None].float()).round_().clamp_(-127, 127)
    return codes_NK, scale_N


def to_groups(weight_NK: torch.Tensor, bits: int) -> Groups:
    """The nearest of 16 or 256 numbers, evenly spread between each group's least and largest; of 63
    around zero with 6 bits.
    """
    N, K = weight_NK.shape
    size = HALF if bits == 6 else GROUP
    last = 2**bits - 1
    codes_NK = torch.empty(N, K, dtype=torch.uint8, device=weight_NK.device)
    scale_NG, zero_NG = torch.empty(2, N, K // size, dtype=torch.bfloat16, device=weight_NK.device)
    for part in parts(weight_NK):
        groups = weight_NK[part].float().unflatten(1, (-1, size))
        least, most = groups.aminmax(dim=2)
        if bits == 6:
            most = torch.maximum(most, -least)
            least = -most
        scale_NG[part] = ((most - least) / (62 if bits == 6 else last)).clamp(min=1e-30)
        scale = scale_NG[part].float()
        # With 6 bits nobody stores a zero, so codes are chosen by the exact one.
        zero = -24 * scale if bits == 6 else (least + 8 * scale).bfloat16().float()
        zero_NG[part] = zero
        codes = (groups - zero[..., None]).div_(scale[..., None]).round_()
        codes_NK[part] = codes.add_(8).clamp_(0, last).flatten(1)
    return Groups(codes_NK, scale_NG, zero_NG)


def parts(weight_NK: torch.Tensor) -> list[slice]:
    """Slices of rows with about AT_ONCE weights each."""
    step = max(1, AT_ONCE // weight_NK.shape[1])
    return [slice(start, start + step) for start in range(0, len(weight_NK), step)]


def pack_int4(codes_NK: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 in the layout that the operator of their device reads."""
    if codes_NK.is_cuda:
        pairs = codes_NK[:, ::2] << 4 | codes_NK[:, 1::2]
        tiles = 8 if codes_NK.shape[1] % 128 == 0 else 2
        return torch._convert_weight_to_int4pack(pairs, tiles)
    convert = torch._convert_weight_to_int4pack_for_cpu
    return torch.cat([convert(part.int(), 1) for part in codes_NK.split(ROWS_AT_ONCE)])


# ---- which layer becomes what


def can_pack(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN has a layout for the weight in this dtype, on this CPU."""
    if weight.is_cuda or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and "bfloat16" in speeds())


def fits_groups(weight: torch.Tensor) -> bool:
    """Whether few_bits.cpp can take a weight of this shape on its device: whole groups."""
    return not weight.is_cuda and weight.shape[1] % GROUP == 0 and few_bits_problem() is None


def fits_int4(outputs: int, inputs: int) -> bool:
    """Whether PyTorch's operators can take a weight of this shape: whole groups, whole blocks."""
    return inputs % GROUP == 0 and outputs % 16 == 0


def finisher(bits: str, pack: bool, group: Group = ALONE) -> Callable:
    """What becomes of each linear layer of a model: (linear, name, stored) -> a module.

    bits: "none", "bfloat16", "int8", "int4", or "stored", as a GGUF file has them. stored: what it
    has (checkpoint.gguf.Groups, "int8", or None). pack: whether weights may take a layout of the
    CPU's own. group: the ranks that share the model.

    Beside int4 the head gets 6 bits: its errors would be the text's own. What does not fit is int8.
    """

    room = Room()

    def finish(linear: nn.Linear, name: str = "", stored: Groups | str | None = None) -> nn.Module:
        wanted = stored if bits == "stored" else bits
        others = group if is_summed(name) else ALONE
        kept = isinstance(stored, Groups)
        if kept or wanted in ("int8", "int4"):
            number = stored.bits if kept else 8 if wanted == "int8" else 6 if name == "head" else 4
            weight = stored.codes_NK if kept else linear.weight.detach()
            ours = fits_groups(weight)
            fits = ours or (number == 4 and fits_int4(*weight.shape))
            # All ranks, or none: PyTorch's int8 has one scale for a row of all of them.
            if not others.largest(torch.tensor([float(not fits)])):
                if ours:
                    return GroupLinear(stored if kept else weight, number, linear.bias, room)
                return Int4Linear(stored if kept else to_groups(weight, 4), linear.bias)
            if kept:
                linear.weight = nn.Parameter(stored.dense(), requires_grad=False)
            return Int8Linear(linear, others)
        dtype = torch.bfloat16 if bits == "bfloat16" else linear.weight.dtype
        return PackedLinear(linear, dtype) if pack and can_pack(linear.weight, dtype) else linear

    return finish


def finish_all(model: nn.Module, finish: Callable) -> None:
    """Replace the linear layers of a model one by one, freeing each plain weight at once."""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:
        model.set_submodule(name, finish(model.get_submodule(name), name))


@functools.cache
def speeds() -> dict[str, float]:
    """Milliseconds that products of ROWS take on this CPU, together, by format.

    A format that this CPU or this PyTorch cannot compute is missing. Measured once, on one thread,
    in 0.5 s, after few_bits.cpp was compiled. The weights come from memory, as a model's do: what
    is read in between takes their place in the cache. From there, bits would count for little. The
    formats take turns, so that what else runs on the machine slows down all of them.
    """
    layers, took = {}, defaultdict(list)
    with one_thread():
        linear = nn.Linear(2048, 4096, bias=False).requires_grad_(False)
        in_between = torch.zeros(CACHE_BYTES // 4)
        makers = {
            "float32": lambda: PackedLinear(linear),
            "bfloat16": lambda: PackedLinear(linear, torch.bfloat16),
            "int8": lambda: finisher("int8", pack=True)(linear),
            "int4": lambda: finisher("int4", pack=True)(linear),
        }
        for name, make in makers.items():
            with contextlib.suppress(RuntimeError, AttributeError):  # not for this CPU or PyTorch
                layers[name] = make()
                _seconds(layers[name], 1, in_between)
        for _ in range(4):
            for name, layer in layers.items():
                for rows in ROWS:
                    took[name, rows].append(_seconds(layer, rows, in_between))
    return {name: 1e3 * sum(min(took[name, rows]) for rows in ROWS) for name in layers}


def _seconds(layer: nn.Module, rows: int, in_between: torch.Tensor) -> float:
    x = torch.ones(rows, layer.in_features)
    in_between.sum()
    begin = time.perf_counter()
    layer(x)
    return time.perf_counter() - begin
