"""Linear layers by the number format of their weights: packed floats, int8, int4.

Knows: nn.Linear, PyTorch's operators for few bits, and which of them this CPU has instructions for.
Does not know: models, files, devices' queues. Read next: runtime.py.

    packed   float32 or bfloat16 in oneDNN's blocked layout (CPU)
    int8     W = codes * scale, a scale for each row of W
    int4     W = (codes - 8) * scale + zero, both for each group of 32 weights of a row

Codes are whole numbers, scales and zeros bfloat16. All but float32 and IntegerLinear round their
input and their result to bfloat16. What lies between the layers keeps the dtype that it came with:
with SmolLM2, sums of layers rounded to bfloat16 cost four times the error of weights in four bits.

Shape letters: N outputs, K inputs, G groups of a row, M rows of x.
"""

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint.gguf import GROUP, Groups
from parallel import ALONE, Group, is_summed
from runtime import one_thread

FORMATS = ("none", "int8", "int4")
AT_ONCE = 1 << 22  # weights that are quantised at a time: temporaries stay small
ROWS = (1, 4)  # of passes that formats are compared by: a step; a verification, or some branches
ROWS_AT_ONCE = 1 << 12  # a multiple of the rows of all blocks that int4 is packed in
# 16 bits of a number as two digits of -128..127: LARGEST is 127 * 256 + 127. Counted from MIDDLE,
# digits are 0..255, and cutting off rounds.
LARGEST, MIDDLE = 127 * 256 + 127.0, 128 * 256 + 128 + 0.5
CACHE_BYTES = 1 << 26  # more than the last cache of a small machine
MOST_INPUTS = 1 << 16  # a sum of so many products of bytes fits in 32 bits


class PackedLinear(nn.Module):
    """nn.Linear with its float32 or bfloat16 weight in oneDNN's blocked layout.

    It is 1.3 to 4 times as fast, most for 2 to 16 rows.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype | None = None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to(dtype or linear.weight.dtype)
        self.dtype, self.weight_bytes = weight.dtype, weight.nbytes
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
        else:  # compiled for a GPU the conversion is part of the product
            out = F.linear(rows, self.codes_NK.to(torch.bfloat16)) * self.scale_N
        if self.bias is not None:
            out = out + self.bias
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)


class IntegerLinear(nn.Module):
    """Int8Linear in whole numbers: x is rounded to 16 bits of the largest number in its row.

    x (..., K) -> x (codes * scale)^T + bias, in float32. CPUs multiply 8 bits by 8 bits, so that a
    row of x is two rows of digits. Sums of whole numbers have no order: a row's result is the same,
    bit for bit, whatever is beside it. Wide ones are faster than Int4Linear from four rows on.
    """

    def __init__(self, linear: nn.Linear, group: Group = ALONE):
        """group: as in Int8Linear."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes_NK, scale_N = to_int8(linear.weight.detach(), group)
        self.weight_bytes = codes_NK.nbytes + scale_N.nbytes
        self.codes = torch.ops.onednn.qlinear_prepack(codes_NK, None)
        self.largest, self.middle, self.scale_N = LARGEST, MIDDLE, scale_N.float() / LARGEST
        self.zero_N = torch.zeros(self.out_features, dtype=torch.int32)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x):
        rows = x.float().reshape(-1, self.in_features)
        largest_M1 = rows.abs().amax(1, True).clamp_(min=1e-30)
        # The operator's digits have no sign: 128 is zero. So the whole numbers begin in the middle.
        # One operator for both would round differently at the end of a row.
        whole = (rows / largest_M1).mul_(self.largest).add_(self.middle).to(torch.int32)
        digits = torch.cat((whole, whole >> 8)).to(torch.uint8)
        products = multiply(digits, self.codes, self.scale_N, self.zero_N)
        low, high = products.chunk(2)
        out = torch.add(low, high, alpha=256).mul_(largest_M1)
        if self.bias is not None:
            out = out + self.bias
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)


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


def multiply(digits: torch.Tensor, codes, scale_N, zero_N) -> torch.Tensor:
    """(digits - 128) (codes * scale)^T in float32, of bytes and of codes in oneDNN's layout."""
    return torch.ops.onednn.qlinear_pointwise(
        digits, 1.0, 128, codes, scale_N, zero_N, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def multiplies_bytes() -> bool:
    """Whether this CPU's products of bytes are right. Without VNNI, large ones are cut off."""
    codes_NK = torch.full((64, 96), 127, dtype=torch.int8)
    scale_N, zero_N = torch.ones(64), torch.zeros(64, dtype=torch.int32)
    try:
        codes = torch.ops.onednn.qlinear_prepack(codes_NK, None)
        return all(
            (multiply(x, codes, scale_N, zero_N) == 96 * 127 * (digit - 128)).all()
            for digit in (0, 255)
            for x in torch.full((256, 96), digit, dtype=torch.uint8).split([2, 8, 246])
        )
    except (RuntimeError, AttributeError):  # not for this CPU, or not in this PyTorch
        return False


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


def to_int4(weight_NK: torch.Tensor) -> Groups:
    """The nearest of 16 numbers, evenly spread between the least and the largest of each group."""
    N, K = weight_NK.shape
    codes_NK = torch.empty(N, K, dtype=torch.uint8, device=weight_NK.device)
    scale_NG, zero_NG = torch.empty(2, N, K // GROUP, dtype=torch.bfloat16, device=weight_NK.device)
    for part in parts(weight_NK):
        groups = weight_NK[part].float().unflatten(1, (-1, GROUP))
        least, most = groups.aminmax(dim=2)
        scale_NG[part] = ((most - least) / 15).clamp(min=1e-30)
        scale = scale_NG[part].float()
        zero_NG[part] = least + 8 * scale
        codes = (groups - zero_NG[part].float()[..., None]).div_(scale[..., None]).round_()
        codes_NK[part] = codes.add_(8).clamp_(0, 15).flatten(1)
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


def can_multiply_bytes(weight: torch.Tensor) -> bool:
    """Whether int8 weights of this shape can be multiplied in whole numbers, on their device."""
    return not weight.is_cuda and weight.shape[1] <= MOST_INPUTS and multiplies_bytes()


def fits_int4(outputs: int, inputs: int) -> bool:
    """Whether PyTorch's operators can take a weight of this shape: whole groups, whole blocks."""
    return inputs % GROUP == 0 and outputs % 16 == 0


def finisher(bits: str, pack: bool, group: Group = ALONE) -> Callable:
    """What becomes of each linear layer of a model: (linear, name, stored) -> a module.

    bits: "none", "bfloat16", "int8", "int4", or "stored", as a GGUF file has them. stored: what it
    has (checkpoint.gguf.Groups, "int8", or None). pack: whether weights may take a layout of the
    CPU's own. group: the ranks that share the model.

    In int4 the head stays int8: its errors would be the text's own. So does what does not fit.
    """

    def finish(linear: nn.Linear, name: str = "", stored: Groups | str | None = None) -> nn.Module:
        wanted, others = stored if bits == "stored" else bits, group if is_summed(name) else ALONE
        four = isinstance(stored, Groups) or (wanted == "int4" and name != "head")
        if bits in ("int4", "stored"):  # all ranks, or none: int8 has one scale for a row of all
            shape = stored.codes_NK.shape if isinstance(stored, Groups) else linear.weight.shape
            misfit = torch.tensor([float(not (four and fits_int4(*shape)))])
            if not others.largest(misfit):
                groups = stored if isinstance(stored, Groups) else to_int4(linear.weight.detach())
                return Int4Linear(groups, linear.bias)
        if isinstance(stored, Groups):
            linear.weight = nn.Parameter(stored.dense(), requires_grad=False)
        if wanted in ("int8", "int4") or isinstance(stored, Groups):
            whole = pack and can_multiply_bytes(linear.weight)
            return (IntegerLinear if whole else Int8Linear)(linear, others)
        dtype = torch.bfloat16 if bits == "bfloat16" else linear.weight.dtype
        return PackedLinear(linear, dtype) if pack and can_pack(linear.weight, dtype) else linear

    return finish


def finish_all(model: nn.Module, finish: Callable) -> None:
    """Replace the linear layers of a model one by one, freeing each plain weight at once."""
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, finish(child, f"{path}.{name}".lstrip(".")))


@functools.cache
def speeds() -> dict[str, float]:
    """Milliseconds that products of ROWS take on this CPU, together, by format.

    A format that this CPU or this PyTorch cannot compute is missing. Measured once, on one thread,
    in 0.5 s. The weights come from memory, as a model's do: what is read in between takes their
    place in the cache. From there, bits would count for little.
    """
    found = {}
    with one_thread():
        linear = nn.Linear(2048, 4096, bias=False).requires_grad_(False)
        in_between = torch.zeros(CACHE_BYTES // 4)
        makers = {
            "float32": lambda: PackedLinear(linear),
            "bfloat16": lambda: PackedLinear(linear, torch.bfloat16),
            "int8": lambda: finisher("int8", pack=True)(linear),
            "int4": lambda: Int4Linear(to_int4(linear.weight)),
        }
        for name, make in makers.items():
            try:
                layer = make()
                best = [min(_seconds(layer, rows, in_between) for _ in range(4)) for rows in ROWS]
                found[name] = 1e3 * sum(best)
            except (RuntimeError, AttributeError):  # not for this CPU, or not in this PyTorch
                continue
    return found


def _seconds(layer: nn.Module, rows: int, in_between: torch.Tensor) -> float:
    x = torch.ones(rows, layer.in_features)
    in_between.sum()
    begin = time.perf_counter()
    layer(x)
    return time.perf_counter() - begin
