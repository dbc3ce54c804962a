"""Attention for speculation trees: what every query of the engine runs through. And a GPU's product
of few rows with weights of 8 bits.

Knows: tensors of queries, keys and values, and which slots each query may see. Does not know:
models, lengths of texts, branches as tokens. cache.py decides the slots and limits,
and model.py calls this. Read next: linear.py.

One function serves prefill, decode, verify, extend and chain steps, because they differ only in
what a query sees:

    the trunk   slots first <= s < limit of the ordinary cache, one limit for each query
    its chain   for a branch of a speculation tree: its own scratch slots, one for each chain step

It exists twice: `tree_attention_reference` in plain PyTorch says what is meant and serves the CPU;
the Triton kernel `_attend`, with `_merge` for long contexts, computes the same on a GPU.

Shape letters: B batch, T tokens fed per row, H query heads, G key/value heads (H is a multiple of
G), R = H / G, Q = T * R query rows that share a key/value head, S cache slots, D head size, M
branches, C chain steps. In the product: M rows of x, K inputs, N outputs.
"""

import functools
import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
# The twin serves everything, and the kernels below stay plain functions that nobody calls.
except ImportError:
    triton, constexpr = None, object


def script(code):
    """A function or module as TorchScript, or as it is where this torch cannot (Python 3.14).

    Two lanes are two threads of one process, and each operator called from Python takes the
    interpreter's lock twice. A script is one call, and runs without it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.script(code)
    except Exception:  # whatever a later version makes of it
        return code


def scripted(function):
    """The function, which runs as a script for tensors on a CPU. Its first argument is a tensor.

    torch.compile and GPUs, where TorchScript would compile kernels of its own, get the function as
    it is written.
    """
    made = script(function)
    if made is function:
        return function

    @functools.wraps(function)
    def call(x, *args):
        return (function if torch.compiler.is_compiling() or x.is_cuda else made)(x, *args)

    return call


def tree_attention(
    query_BTHD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    limit_BT: torch.Tensor,
    first_BT: torch.Tensor | None,
    scale: float,
    extent: int,
    tight: bool = False,
    chain: tuple[int, int, torch.Tensor] | None = None,
    window: int = 0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every query over its part of the trunk and, for branches, over its own chain:
    (B, T, H, D).

    limit_BT   trunk slots [first, limit) are visible; first_BT None means 0. 1 <= limit <= extent.
    extent     no query sees a trunk slot at or past this bound, which the host knows: nothing there
               is read.
    tight      the caller knows that all trunk slots below extent hold finite numbers, seen or not;
               and, for a chain, that every step_B is steps - 1.
    chain      (base, steps, step_B): query m of a (B, M) chain step owns the scratch slots
               base + m + c * M for c in 0..steps-1. It sees those with c <= step_B[b], its own
               token among them. None: the trunk only.
    window     with a sliding window, a chain token sees chain tokens less than `window` places
               back; the trunk's lower bound comes in first_BT.
    mask       trunk_mask() of the same limits, where layers share one. Only the twin reads it.

    What the query does not see is never mixed in, not even if it holds NaN, unless the caller
    promises otherwise (tight). float64 inputs are computed in float64, everything else in float32.
    """
    if not torch.jit.is_scripting():  # which is for the CPU
        on_gpu = query_BTHD.device.type == "cuda" and query_BTHD.dtype != torch.float64
        if on_gpu and triton is not None:
            base, steps, step_B = chain or (0, 0, None)
            return _fused(
                query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, step_B, scale, extent, base, steps,
                window,
            )  # fmt: skip
        if on_gpu:
            _warn_of_missing_triton()
    return tree_attention_reference(
        query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, scale, extent, tight, chain, window, mask
    )


@functools.cache
def _warn_of_missing_triton() -> None:
    said = (
        "Triton is not installed: attention on this GPU runs in plain PyTorch, several times slower"
    )
    warnings.warn(said, stacklevel=3)


def trunk_mask(
    limit_BT: torch.Tensor, first_BT: torch.Tensor | None, extent: int, R: int, dtype: torch.dtype
) -> torch.Tensor:
    """What each query sees of the trunk, as numbers to add to its scores: 0 or -inf, (B, 1, Q,
    extent). Q is T * R, rounded up to a multiple of 4 as in tree_attention_reference.
    """
    slot_S = torch.arange(extent, device=limit_BT.device)
    hidden_BTS = slot_S >= limit_BT[:, :, None]
    if first_BT is not None:
        hidden_BTS = hidden_BTS | (slot_S < first_BT[:, :, None])
    bias_BTS = torch.zeros(hidden_BTS.shape, dtype=dtype, device=limit_BT.device)
    bias_BTS = bias_BTS.masked_fill(hidden_BTS, -math.inf)
    bias_BQS = bias_BTS.repeat_interleave(R, 1)
    return F.pad(bias_BQS, (0, 0, 0, -bias_BQS.shape[1] % 4))[:, None]


def _own_chain(
    query_BGTRD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    chain: tuple[int, int, torch.Tensor],
    scale: float,
    tight: bool,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (B, G, T, R, C) of every branch over its own chain, and the chain's values (B, G, T,
    C, D).
    """
    B, G, T, _, D = query_BGTRD.shape
    base, steps, step_B = chain
    # A small matrix for each branch.
    chain_k = (
        k_BGSD.narrow(2, base, steps * T)
        .view(B, G, steps, T, D)
        .transpose(2, 3)
        .to(query_BGTRD.dtype)
    )
    chain_v = (
        v_BGSD.narrow(2, base, steps * T)
        .view(B, G, steps, T, D)
        .transpose(2, 3)
        .to(query_BGTRD.dtype)
    )
    own_BGTRC = torch.matmul(query_BGTRD, chain_k.mT).mul_(scale)
    if window > 0 or not tight:
        step_C = torch.arange(steps, device=step_B.device)
        dead_BC = step_C > step_B[:, None]
        if window > 0:
            dead_BC = dead_BC | (step_C <= step_B[:, None] - window)
        own_BGTRC.masked_fill_(dead_BC[:, None, None, None], -math.inf)
        chain_v = chain_v.masked_fill(dead_BC[:, None, None, :, None], 0.0)
    return own_BGTRC, chain_v


def tree_attention_reference(
    query_BTHD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    limit_BT: torch.Tensor,
    first_BT: torch.Tensor | None,
    scale: float,
    extent: int,
    tight: bool = False,
    chain: tuple[int, int, torch.Tensor] | None = None,
    window: int = 0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel's twin in plain PyTorch, which serves the CPU. Same contract, same numbers."""
    B, T, H, D = query_BTHD.shape
    G = k_BGSD.shape[1]
    R = H // G
    # Query heads that share a key/value head become rows: one pass over K and V serves them all.
    query_BGQD = query_BTHD.reshape(B, T, G, R, D).transpose(1, 2).reshape(B, G, T * R, D)
    trunk_k, trunk_v = k_BGSD.narrow(2, 0, extent), v_BGSD.narrow(2, 0, extent)
    if query_BTHD.dtype == torch.float16 or query_BTHD.dtype == torch.bfloat16:
        query_BGQD, trunk_k, trunk_v = query_BGQD.float(), trunk_k.float(), trunk_v.float()

    if mask is None:
        mask = trunk_mask(limit_BT, first_BT, extent, R, query_BGQD.dtype)
    if not tight:
        # Weight 0 is not enough where no query may look: 0 times NaN is NaN, as is NaN - inf.
        dead_B1S1 = mask[:, :, : T * R].isneginf().all(2)[..., None]
        trunk_k = trunk_k.masked_fill(dead_B1S1, 0.0)
        trunk_v = trunk_v.masked_fill(dead_B1S1, 0.0)
    if chain is None:
        # Whole blocks of 4 query rows: a CPU adds up fewer in another order, and a token alone
        # would get other last bits than in a verification. cache.py does the same for slots.
        rows_BGQD = F.pad(query_BGQD, (0, 0, 0, -(T * R) % 4))
        mixed_BGQD = F.scaled_dot_product_attention(
            rows_BGQD, trunk_k, trunk_v, mask, scale=scale
        ).narrow(2, 0, T * R)
    else:
        scores_BGQS = torch.matmul(query_BGQD, trunk_k.mT).mul_(scale).add_(mask[:, :, : T * R])
        own_BGTRC, chain_v = _own_chain(
            query_BGQD.view(B, G, T, R, D), k_BGSD, v_BGSD, chain, scale, tight, window
        )
        weights = torch.softmax(torch.cat((scores_BGQS, own_BGTRC.flatten(2, 3)), -1), -1)
        own_BGTRD = torch.matmul(weights[..., extent:].view(own_BGTRC.shape), chain_v)
        mixed_BGQD = torch.matmul(weights[..., :extent], trunk_v) + own_BGTRD.flatten(2, 3)
    return mixed_BGQD.view(B, G, T, R, D).transpose(1, 2).reshape(B, T, H, D).to(query_BTHD.dtype)


# What one program of the kernel takes on, by bytes per number and head size (padded to a power of
# two): at most so many query rows, so many slots at a time, so many stages of loads in flight. This
# is the place to tune. The figures are reasoned, not measured: two small programs fit in the shared
# memory of an H100's processor, and 64 to 128 rows fill its matrix units. float32 runs on the
# ordinary cores (true float32, no TF32), and its tiles only keep the registers in bounds.
_TILES = {
    (2, 32): (128, 64, 4), (2, 64): (128, 64, 4), (2, 128): (128, 64, 3), (2, 256): (64, 32, 3),
    (4, 32): (32, 64, 2), (4, 64): (32, 32, 2), (4, 128): (16, 32, 2), (4, 256): (16, 16, 2),
}  # fmt: skip
# No split of the trunk is shorter. With 128 a decode of 8 key/value heads at 512 tokens would keep
# 32 of an H100's 132 processors busy.
_SPLIT_SLOTS = 64
_MOST_SPLITS = 64  # _merge holds one row's partial results of all splits in registers
_REGISTERS = 1 << 16  # of one processor
# The same for _multiply: inputs of a tile, and its stages by rows of x.
_DEPTH, _STAGES = 256, {16: 5, 32: 4, 64: 3}
# Of x. With more, to cast all weights costs less than to read them for every 64 rows.
FEW_ROWS = 0 if triton is None else 192


class _Card(NamedTuple):
    """What a tiling depends on: a GPU's processors, and the shared memory of each in bytes."""

    processors: int
    shared: int


@functools.cache
def _card(device: torch.device) -> _Card:
    """The GPU's own figures; an H100's for the interpreter on a CPU."""
    if device.type != "cuda":
        return _Card(132, 228 * 1024)
    found = torch.cuda.get_device_properties(device)
    return _Card(found.multi_processor_count, found.shared_memory_per_multiprocessor)


class _Tiling(NamedTuple):
    """How a call is laid on the GPU.

    A tile has so many rows and slots, what a row sees is cut in so many splits, a launch has so
    many warps and stages, and so many programs share a processor.
    """

    rows: int
    slots: int
    splits: int
    warps: int
    stages: int
    programs: int


@functools.cache
def _tiling(
    Q: int, heads: int, D: int, itemsize: int, extent: int, steps: int, card: _Card
) -> _Tiling:
    """A tiling by static shapes only: a captured graph stays right as its texts grow.

    heads is B * G.
    """
    block_d = _padded(D)
    most_rows, slots, most_stages = _TILES[itemsize, block_d]
    rows = min(max(triton.next_power_of_2(Q), 16), most_rows)
    # Larger tiles need the registers of 8 warps, which leave no room for a second program.
    small = rows * max(block_d, 128) <= 64 * 128
    # float32 takes twice the registers a number: from 128 on, those of 4 warps spill to memory.
    warps = 8 if not small or (itemsize == 4 and block_d >= 128) else 4
    programs, stages = _fit(rows, slots, block_d, itemsize, most_stages, 2 if small else 1, card)
    # As many programs as run at once and no more: a second wave of a few would double the time.
    room = card.processors * programs // (heads * triton.cdiv(Q, rows))
    splits = max(1, min(room, triton.cdiv(extent, _SPLIT_SLOTS) + steps, _MOST_SPLITS))
    return _Tiling(rows, slots, splits, warps, stages, programs)


def _fit(rows, slots, block_d, itemsize, most_stages, most_programs, card) -> tuple[int, int]:
    """Programs that share a processor, and their stages, as its shared memory allows.

    A second program comes before a third stage.
    """
    # Matrix units read a tile of 64 rows or more from shared memory, so none of its buffers is free
    # for the next load. scripts/check_kernels.py holds these bounds against the compiler's figures.
    large = rows >= 64
    held = rows * (block_d if large else block_d + slots) * itemsize
    held += 2048  # the card's own 1 KiB for each program, and what reductions and barriers take
    stage = 2 * slots * block_d * itemsize
    for programs in range(most_programs, 0, -1):
        for stages in range(most_stages, 1 if programs > 1 else 0, -1):
            if programs * ((stages if large else stages - 1) * stage + held) <= card.shared:
                return programs, stages
    return 1, 1


def _padded(D: int) -> int:
    return max(32, triton.next_power_of_2(D))


def _jit(*varying: str):
    """triton.jit where there is Triton, or else the plain function.

    The arguments named here vary from call to call, and the compiled code serves all their values.
    """
    return (lambda kernel: kernel) if triton is None else triton.jit(do_not_specialize=varying)


@_jit()
def _load_rows(pointer, offset_N, wanted_N, D: constexpr, BLOCK_D: constexpr):
    """(N, BLOCK_D) numbers from N rows of D, with zeros past D and in the rows that are not wanted.

    Those rows are not read.
    """
    d = tl.arange(0, BLOCK_D)
    mask = wanted_N[:, None]
    if D != BLOCK_D:
        mask = mask & (d < D)[None, :]
    return tl.load(pointer + offset_N[:, None] + d[None, :], mask=mask, other=0.0)


@_jit()
def _attend_chain(
    best_Q, total_Q, mixed_QD, query_QD, k_SD, v_SD, cache_s, slot_Q, M, real_Q,
    begin, end, stride, scale, D: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """The softmax's state after every stride-th chain step in begin..end-1.

    Each branch has its own keys, so a row takes one dot product and not a matrix product.
    """
    for c in range(begin, end, stride):
        offset_Q = (slot_Q + c * M) * cache_s
        k_QD = _load_rows(k_SD, offset_Q, real_Q, D, BLOCK_D).to(tl.float32)
        v_QD = _load_rows(v_SD, offset_Q, real_Q, D, BLOCK_D).to(tl.float32)
        score_Q = tl.sum(query_QD.to(tl.float32) * k_QD, 1) * scale
        higher_Q = tl.maximum(best_Q, score_Q)
        p_Q, keep_Q = tl.exp2(score_Q - higher_Q), tl.exp2(best_Q - higher_Q)
        best_Q, total_Q = higher_Q, total_Q * keep_Q + p_Q
        mixed_QD = mixed_QD * keep_Q[:, None] + p_Q[:, None] * v_QD
    return best_Q, total_Q, mixed_QD


@_jit()
def _attend_trunk(
    best_Q, total_Q, mixed_QD, query_QD, k_SD, v_SD, cache_s, first_Q, limit_Q, begin, end, scale,
    D: constexpr, BLOCK_D: constexpr, SLOTS: constexpr, HAS_FIRST: constexpr,
):  # fmt: skip
    """The softmax's state after trunk slots begin..end-1, of which each row takes what it sees."""
    for start in range(begin, end, SLOTS):
        slot_S = start + tl.arange(0, SLOTS)
        seen_QS = slot_S[None, :] < limit_Q[:, None]
        used_S = slot_S < end
        if HAS_FIRST:  # windows far apart leave slots between them that no row sees
            seen_QS = seen_QS & (slot_S[None, :] >= first_Q[:, None])
            used_S = tl.max(seen_QS.to(tl.int32), 0) > 0
        k_tile_SD = _load_rows(k_SD, slot_S * cache_s, slot_S < end, D, BLOCK_D)
        score_QS = tl.dot(query_QD, tl.trans(k_tile_SD), input_precision="ieee") * scale
        score_QS = tl.where(seen_QS, score_QS, float("-inf"))
        higher_Q = tl.maximum(best_Q, tl.max(score_QS, 1))
        p_QS, keep_Q = tl.exp2(score_QS - higher_Q[:, None]), tl.exp2(best_Q - higher_Q)
        best_Q, total_Q = higher_Q, total_Q * keep_Q + tl.sum(p_QS, 1)
        v_tile_SD = _load_rows(v_SD, slot_S * cache_s, used_S, D, BLOCK_D)
        kept_QD, p_QS = mixed_QD * keep_Q[:, None], p_QS.to(v_tile_SD.dtype)
        mixed_QD = tl.dot(p_QS, v_tile_SD, kept_QD, input_precision="ieee")
    return best_Q, total_Q, mixed_QD


@_jit("T", "extent", "base", "steps", "window")
def _attend(
    query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, step_B, out_BTHD, part_BTHPD, weight_BTHP,
    query_b, query_t, query_h, cache_b, cache_g, cache_s,  # strides
    T, extent, base, steps, window, scale,
    G: constexpr, R: constexpr, D: constexpr, BLOCK_D: constexpr, ROWS: constexpr,
    SLOTS: constexpr, SPLIT_SLOTS: constexpr,
):  # fmt: skip
    """One program: ROWS query rows of one key/value head over one split of what they see.

    Query row t * R + r is query head r of token t. The softmax is computed online, its scores in
    powers of two (scale holds log2 e). Limits and steps are read here, from the device: a captured
    graph stays right as its texts grow.
    """
    # A whole cache is spanned in int64. Offsets within one head's slots fit int32: _check says so.
    pair = tl.program_id(2).to(tl.int64)
    b, g = pair // G, pair % G
    split, splits = tl.program_id(1), tl.num_programs(1)
    row_Q = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real_Q = row_Q < T * R
    t_Q, h_Q = row_Q // R, g * R + row_Q % R
    k_SD, v_SD = k_BGSD + b * cache_b + g * cache_g, v_BGSD + b * cache_b + g * cache_g
    offset_Q = t_Q * query_t + h_Q * query_h
    query_QD = _load_rows(query_BTHD + b * query_b, offset_Q, real_Q, D, BLOCK_D)
    limit_Q = tl.load(limit_BT + b * T + t_Q, mask=real_Q, other=0).to(tl.int32)
    limit_Q = tl.minimum(limit_Q, extent)
    first_Q, low, high = limit_Q, 0, tl.max(limit_Q, 0)
    if first_BT is not None:
        first_Q = tl.load(first_BT + b * T + t_Q, mask=real_Q, other=extent).to(tl.int32)
        low = tl.maximum(tl.min(first_Q, 0), 0)

    # A finite start keeps inf - inf out of rows that see nothing here: their total stays 0.
    best_Q = tl.full([ROWS], -1.0e38, tl.float32)
    total_Q = tl.zeros([ROWS], tl.float32)
    mixed_QD = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if step_B is not None:
        # The last programs come first, one step each if there are as many: with short texts they
        # have no trunk.
        newest = tl.load(step_B + b).to(tl.int32)
        begin = tl.maximum(newest + 1 - window, 0) + splits - 1 - split
        best_Q, total_Q, mixed_QD = _attend_chain(
            best_Q, total_Q, mixed_QD, query_QD, k_SD, v_SD, cache_s, base + t_Q, T, real_Q,
            begin, tl.minimum(newest + 1, steps), splits, scale, D, BLOCK_D,
        )  # fmt: skip
    # The trunk is shared out by its true length, not by `extent`: a short text in a large cache
    # keeps as many programs busy as it has work for.
    share = tl.maximum(tl.cdiv(tl.maximum(high - low, 0), splits), SPLIT_SLOTS)
    share = tl.cdiv(share, SLOTS) * SLOTS
    begin = low + split * share
    best_Q, total_Q, mixed_QD = _attend_trunk(
        best_Q, total_Q, mixed_QD, query_QD, k_SD, v_SD, cache_s, first_Q, limit_Q,
        begin, tl.minimum(begin + share, high), scale, D, BLOCK_D, SLOTS, first_BT is not None,
    )  # fmt: skip

    d = tl.arange(0, BLOCK_D)
    stored_QD = real_Q[:, None] & (d < D)[None, :]
    mixed_QD = mixed_QD / total_Q[:, None]
    out_Q = (b * T + t_Q) * (G * R) + h_Q
    if part_BTHPD is None:
        tl.store(out_BTHD + out_Q[:, None] * D + d[None, :], mixed_QD, mask=stored_QD)
    else:
        part_Q = out_Q * splits + split
        # A row that saw nothing here leaves its partial result unwritten, and its weight says so.
        # It is == 0 and not > 0 because a NaN must reach the output.
        empty_Q = total_Q == 0
        stored_QD = stored_QD & (empty_Q == 0)[:, None]
        tl.store(part_BTHPD + part_Q[:, None] * D + d[None, :], mixed_QD, mask=stored_QD)
        weight_Q = tl.where(empty_Q, float("-inf"), best_Q + tl.log2(total_Q))
        tl.store(weight_BTHP + part_Q, weight_Q, mask=real_Q)


@_jit("splits")
def _merge(
    part_BTHPD, weight_BTHP, out_BTHD, splits,
    D: constexpr, BLOCK_D: constexpr, SPLITS: constexpr,
):  # fmt: skip
    """One program: one query head of one token, its splits weighted by their softmax totals."""
    row = tl.program_id(0).to(tl.int64)
    split_P = tl.arange(0, SPLITS)
    real_P = split_P < splits
    weight_P = tl.load(weight_BTHP + row * splits + split_P, mask=real_P, other=float("-inf"))
    # Where the weight is -inf, memory holds whatever was there before (under CUDA graphs another
    # layer's numbers): it is not read, because even 0 times NaN is NaN.
    offset_P, written_P = (row * splits + split_P) * D, weight_P != float("-inf")
    part_PD = _load_rows(part_BTHPD, offset_P, written_P, D, BLOCK_D)
    weight_P = tl.exp2(weight_P - tl.max(weight_P, 0))
    mixed_D = tl.sum(part_PD * weight_P[:, None], 0) / tl.sum(weight_P, 0)
    d = tl.arange(0, BLOCK_D)
    tl.store(out_BTHD + row * D + d, mixed_D, mask=d < D)


class _Launch(NamedTuple):
    """One launch of a kernel. `_fused` makes it; scripts/check_kernels.py only compiles it.

    programs   so many are to share a processor
    """

    kernel: object
    grid: tuple[int, ...]
    arguments: tuple
    options: dict
    programs: int


def _launches(
    query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, step_B, out_BTHD,
    scale, extent, base, steps, window, card: _Card,
) -> list[_Launch]:  # fmt: skip
    """The launches that write a call's result to out_BTHD, planned for this card, in order."""
    (B, T, H, D), G = query_BTHD.shape, k_BGSD.shape[1]
    Q, block_d, itemsize = T * H // G, _padded(D), query_BTHD.itemsize
    tiling = _tiling(Q, B * G, D, itemsize, extent, steps, card)
    part = weight = None
    if tiling.splits > 1:
        shape = (B, T, H, tiling.splits)
        part = torch.empty((*shape, D), dtype=torch.float32, device=out_BTHD.device)
        weight = torch.empty(shape, dtype=torch.float32, device=out_BTHD.device)
    options = {
        "G": G, "R": H // G, "D": D, "BLOCK_D": block_d, "ROWS": tiling.rows, "SLOTS": tiling.slots,
        "SPLIT_SLOTS": _SPLIT_SLOTS, "num_warps": tiling.warps, "num_stages": tiling.stages,
    }  # fmt: skip
    if torch.version.hip is None:
        # All that the tiling has room for: left alone, the compiler spills to fit one program more.
        options["maxnreg"] = min(_REGISTERS // (tiling.programs * tiling.warps * 32), 255)
    arguments = (
        query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, step_B, out_BTHD, part, weight,
        *query_BTHD.stride()[:3], *k_BGSD.stride()[:3],
        T, extent, base, steps, window or 1 << 30, scale * math.log2(math.e),
    )  # fmt: skip
    grid = (triton.cdiv(Q, tiling.rows), tiling.splits, B * G)
    launches = [_Launch(_attend, grid, arguments, options, tiling.programs)]
    if tiling.splits > 1:
        options = {"D": D, "BLOCK_D": block_d, "SPLITS": triton.next_power_of_2(tiling.splits)}
        arguments = (part, weight, out_BTHD, tiling.splits)
        launches.append(_Launch(_merge, (B * T * H,), arguments, options, 1))
    return launches


@torch.library.custom_op("ssd::tree_attention", mutates_args=())
def _fused(
    query_BTHD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    limit_BT: torch.Tensor,
    first_BT: torch.Tensor | None,
    step_B: torch.Tensor | None,
    scale: float,
    extent: int,
    base: int,
    steps: int,
    window: int,
) -> torch.Tensor:
    """The kernel's result. To torch.compile it is one opaque operator.

    Arguments are those of tree_attention, with `chain` unpacked.
    """
    _check(query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, step_B, extent, base, steps)
    limit_BT, first_BT, step_B = (
        x if x is None else x.contiguous() for x in (limit_BT, first_BT, step_B)
    )
    out = torch.empty(query_BTHD.shape, dtype=query_BTHD.dtype, device=query_BTHD.device)
    launches = _launches(
        query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, step_B, out,
        scale, extent, base, steps, window, _card(out.device),
    )  # fmt: skip
    with torch.cuda.device_of(out):  # Triton launches on the current device, not on the tensors'
        for launch in launches:
            launch.kernel[launch.grid](*launch.arguments, **launch.options)
    return out


@_fused.register_fake
def _(query_BTHD, *_):
    return torch.empty(query_BTHD.shape, dtype=query_BTHD.dtype, device=query_BTHD.device)


def _check(query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, step_B, extent, base, steps) -> None:
    """Nothing, or an AssertionError about what the kernel takes for granted.

    A wrong stride or shape there is a wrong number or a dead device, and not an error.
    """
    B, T, H, D = query_BTHD.shape
    _, G, S, _ = k_BGSD.shape
    dtype, device = query_BTHD.dtype, query_BTHD.device
    assert dtype in (torch.float16, torch.bfloat16, torch.float32), (
        f"queries are {dtype}, wanted a float of 2 or 4 bytes"
    )
    for name, x in (("keys", k_BGSD), ("values", v_BGSD)):
        assert x.dtype == dtype and x.device == device, (
            f"{name} are {x.dtype} on {x.device}, queries {dtype} on {device}"
        )
        assert x.shape == (B, G, S, D), (
            f"{name} are {tuple(x.shape)}, wanted {(B, G, S, D)} (B, G, S, D)"
        )
        assert x.stride() == k_BGSD.stride() and x.stride(3) == 1, (
            f"{name} have strides {x.stride()}: wanted the keys', last one 1"
        )
        span = S * x.stride(2)
        assert span < 2**31, f"one head's {name} span {span} numbers, wanted under 2^31"
    assert H % G == 0, f"{H} heads on {G}: wanted a multiple"
    assert D <= 256, f"heads of size {D}: wanted at most 256"
    stride, span = query_BTHD.stride(), T * query_BTHD.stride(1)
    assert stride[3] == 1, f"queries have strides {stride}, wanted the last one 1"
    assert span < 2**31, f"one row's queries span {span} numbers: feed fewer"
    assert B * G < 65536, (
        f"{B} rows of {G} heads, wanted under 65536 pairs: CUDA's bound on this side of a grid"
    )
    assert 1 <= extent <= S, f"extent is {extent}, wanted 1 to the cache's {S} slots"
    for name, x, shape in (
        ("limit", limit_BT, (B, T)),
        ("first", first_BT, (B, T)),
        ("step", step_B, (B,)),
    ):
        if x is not None:
            assert x.shape == shape and x.dtype in (torch.int32, torch.int64), (
                f"{name} is {tuple(x.shape)} {x.dtype}, wanted {shape} of integers"
            )
            assert x.device == device, f"{name} is on {x.device}, wanted {device}"
    end = base + steps * T
    assert step_B is None or end <= S, f"chains end at slot {end}, the cache at {S}"


# ---- a product with weights of 8 bits


@_jit("M")
def _multiply(
    x_MK, codes_NK, scale_N, out_MN, M,
    N: constexpr, K: constexpr, OUTPUTS: constexpr, ROWS: constexpr, DEPTH: constexpr,
):  # fmt: skip
    """One program: OUTPUTS outputs of ROWS rows.

    The codes become x's dtype, which has them all, on their way to the matrix units. A row's sums
    are in one order, however many rows there are.
    """
    n, m = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.program_id(1) * ROWS
    m, deep = m + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    real_N, real_M = (n < N)[:, None], (m < M)[None, :]
    codes_ND = codes_NK + n.to(tl.int64)[:, None] * K + deep[None, :]
    x_DM = x_MK + m.to(tl.int64)[None, :] * K + deep[:, None]
    total_NM = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for at in range(0, K, DEPTH):
        if K % DEPTH == 0:
            codes = tl.load(codes_ND + at, mask=real_N, other=0)
            x = tl.load(x_DM + at, mask=real_M, other=0.0)
        else:
            left = deep < K - at
            codes = tl.load(codes_ND + at, mask=real_N & left[None, :], other=0)
            x = tl.load(x_DM + at, mask=real_M & left[:, None], other=0.0)
        total_NM = tl.dot(codes.to(x.dtype), x, total_NM)
    scale = tl.load(scale_N + n, mask=n < N, other=0.0).to(tl.float32)
    out_NM = out_MN + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_NM, total_NM * scale[:, None], mask=real_N & real_M)


def _product(x_MK, codes_NK, scale_N, out_MN, card: _Card) -> _Launch:
    """The launch that writes a product to out_MN, planned for this card."""
    (M, K), N = x_MK.shape, len(codes_NK)
    rows = min(max(triton.next_power_of_2(M), 16), 64)
    # Smaller programs where else some processors would have twice the work of others.
    outputs = 32 if N >= 64 * card.processors else 16
    options = {"N": N, "K": K, "OUTPUTS": outputs, "ROWS": rows, "DEPTH": _DEPTH}
    options |= {"num_warps": 4, "num_stages": _STAGES[rows]}
    grid = triton.cdiv(N, outputs), triton.cdiv(M, rows)
    return _Launch(_multiply, grid, (x_MK, codes_NK, scale_N, out_MN, M), options, 1)


@torch.library.custom_op("ssd::int8_linear", mutates_args=())
def _int8_linear(x_MK: torch.Tensor, codes_NK: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    """x (codes * scale)^T, (M, N) in x's dtype of 2 bytes. codes_NK int8.

    PyTorch has no operator for GPUs that reads the codes as they lie and is fast: in compiled code
    a cast would write all weights in 2 bytes in every pass, and the product would read those.
    """
    assert x_MK.shape[1] == codes_NK.shape[1], (
        f"x has {x_MK.shape[1]} columns, wanted the weights' {codes_NK.shape[1]}"
    )
    assert x_MK.itemsize == 2 and codes_NK.dtype == torch.int8, (
        f"x is {x_MK.dtype} and codes {codes_NK.dtype}, wanted a float of 2 bytes and int8"
    )
    x_MK, codes_NK, scale_N = x_MK.contiguous(), codes_NK.contiguous(), scale_N.contiguous()
    out = x_MK.new_empty(len(x_MK), len(codes_NK))
    launch = _product(x_MK, codes_NK, scale_N, out, _card(out.device))
    with torch.cuda.device_of(out):
        launch.kernel[launch.grid](*launch.arguments, **launch.options)
    return out


@_int8_linear.register_fake
def _(x_MK, codes_NK, scale_N):
    return x_MK.new_empty(len(x_MK), len(codes_NK))
