"""Attention for speculation trees: what every query of the engine runs through.

Knows: tensors of queries, keys and values, and which slots each query may see. Does not know: models, lengths of
texts, branches as tokens. Read next: cache.py, which decides the slots and limits, and model.py, which calls this.

One function serves prefill, decode, verify, extend and chain steps, because they differ only in what a query sees:

    the trunk   slots first <= s < limit of the ordinary cache, one limit for each query
    its chain   for a branch of a speculation tree: the scratch slots of that branch alone, one for each chain step

It exists twice: `tree_attention_reference` in plain PyTorch says what is meant and serves the CPU; the Triton kernel
`_attend`, with `_merge` for long contexts, computes the same on a GPU.

Shape letters: B batch, T tokens fed per row, H query heads, G key/value heads (H is a multiple of G), R = H / G,
Q = T * R query rows that share a key/value head, S cache slots, D head size, M branches, C chain steps.
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
except ImportError:  # the twin serves everything, and the kernels below stay plain functions that nobody calls
    triton, constexpr = None, object


def tree_attention(
    query_BTHD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    limit_BT: torch.Tensor,
    first_BT: torch.Tensor | None = None,
    *,
    scale: float,
    extent: int,
    tight: bool = False,
    chain: tuple[int, int, torch.Tensor] | None = None,
    window: int = 0,
) -> torch.Tensor:
    """Attention of every query over its part of the trunk and, for branches, over its own chain: (B, T, H, D).

    limit_BT   trunk slots [first, limit) are visible; first_BT None means 0. 1 <= limit <= extent.
    extent     no query sees a trunk slot at or past this host-known bound, so nothing there is read.
    tight      the caller knows that extent is the largest limit and, for a chain, that every step_B is steps - 1.
    chain      (base, steps, step_B): query m of a (B, M) chain step owns scratch slots base + m + c * M for c in
               0..steps-1 and sees those with c <= step_B[b] (its own token included). None: the trunk only.
    window     with a sliding window, a chain token sees chain tokens less than `window` places back; the trunk's
               lower bound comes in first_BT.

    What the query does not see is never mixed in, not even if it holds NaN. float64 inputs are computed in float64,
    everything else in float32.
    """
    on_gpu = query_BTHD.device.type == "cuda" and query_BTHD.dtype != torch.float64
    if on_gpu and triton is not None:
        base, steps, step_B = chain or (0, 0, None)
        return _fused(
            query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, step_B, scale, extent, base, steps, window
        )  # fmt: skip
    if on_gpu:
        _warn_of_missing_triton()
    return tree_attention_reference(
        query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT,
        scale=scale, extent=extent, tight=tight, chain=chain, window=window,
    )  # fmt: skip


@functools.cache
def _warn_of_missing_triton() -> None:
    said = "Triton is not installed: attention on this GPU runs in plain PyTorch, several times slower"
    warnings.warn(said, stacklevel=3)


def tree_attention_reference(
    query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT=None, *, scale, extent, tight=False, chain=None, window=0
):
    """The twin of the kernel in plain PyTorch, and the engine's attention on the CPU. Same contract, same numbers."""
    B, T, H, D = query_BTHD.shape
    G = k_BGSD.shape[1]
    R = H // G
    # The query heads that share a key/value head become extra query rows: one pass over K and V serves them all.
    query_BGQD = query_BTHD.view(B, T, G, R, D).transpose(1, 2).reshape(B, G, T * R, D)
    trunk_k, trunk_v = k_BGSD.narrow(2, 0, extent), v_BGSD.narrow(2, 0, extent)
    if query_BTHD.dtype in (torch.float16, torch.bfloat16):
        query_BGQD, trunk_k, trunk_v = query_BGQD.float(), trunk_k.float(), trunk_v.float()

    scores_BGQS = (query_BGQD @ trunk_k.mT).mul_(scale)
    # Slots that every query sees need no mask. How many they are is free to read on the CPU: no device to wait for.
    open_slots = 0
    if first_BT is None and tight and B * T == 1:
        open_slots = extent
    elif first_BT is None and limit_BT.device.type == "cpu" and not torch.compiler.is_compiling():
        open_slots = int(limit_BT.min())
    if open_slots < extent:
        slot_S = torch.arange(open_slots, extent, device=limit_BT.device)
        dead_BTS = slot_S >= limit_BT[..., None]
        if first_BT is not None:
            dead_BTS |= slot_S < first_BT[..., None]
        scores_BGQS.view(B, G, T, R, extent)[..., open_slots:].masked_fill_(dead_BTS[:, None, :, None], float("-inf"))
        if B > 1 or not tight or first_BT is not None:
            # Zero times NaN is NaN: values that no query of the row may see are cleared, not just given weight 0.
            dead_BS = F.pad(dead_BTS.all(1), (open_slots, 0))
            trunk_v = trunk_v.masked_fill(dead_BS[:, None, :, None], 0.0)
    if chain is None:
        mixed_BGQD = torch.softmax(scores_BGQS, -1) @ trunk_v
    else:
        own_BGTRC, chain_v = _own_chain(query_BGQD.view(B, G, T, R, D), k_BGSD, v_BGSD, chain, scale, tight, window)
        weights = torch.softmax(torch.cat((scores_BGQS, own_BGTRC.flatten(2, 3)), -1), -1)
        mixed_BGQD = weights[..., :extent] @ trunk_v
        mixed_BGQD += (weights[..., extent:].view(own_BGTRC.shape) @ chain_v).flatten(2, 3)
    out = mixed_BGQD.view(B, G, T, R, D).transpose(1, 2).reshape(B, T, H, D)
    return out.to(query_BTHD.dtype)


def _own_chain(query_BGTRD, k_BGSD, v_BGSD, chain, scale, tight, window):
    """Scores (B, G, T, R, C) of every branch over its own chain, and the chain's values (B, G, T, C, D)."""
    B, G, T, _, D = query_BGTRD.shape
    base, steps, step_B = chain
    chain_k, chain_v = (  # a small matrix for each branch
        x.narrow(2, base, steps * T).view(B, G, steps, T, D).transpose(2, 3).to(query_BGTRD.dtype)
        for x in (k_BGSD, v_BGSD)
    )
    own_BGTRC = (query_BGTRD @ chain_k.mT).mul_(scale)
    if window or not tight:
        step_C = torch.arange(steps, device=step_B.device)
        dead_BC = step_C > step_B[:, None]
        if window:
            dead_BC |= step_C <= step_B[:, None] - window
        own_BGTRC.masked_fill_(dead_BC[:, None, None, None], float("-inf"))
        chain_v = chain_v.masked_fill(dead_BC[:, None, None, :, None], 0.0)
    return own_BGTRC, chain_v


# What one program of the kernel takes on, by bytes per number and head size (padded to a power of two): at most so many
# query rows, so many slots at a time, so many stages of loads in flight. THE PLACE TO TUNE. Reasoned, not measured: two
# small programs fit in an H100's 227 KiB of shared memory, and a tile of 64 to 128 rows fills its matrix units. float32
# runs on the ordinary cores (true float32, no TF32) and its tiles only keep registers in bounds.
_TILES = {
    (2, 32): (128, 128, 4), (2, 64): (128, 128, 3), (2, 128): (128, 64, 3), (2, 256): (64, 32, 3),
    (4, 32): (32, 64, 2), (4, 64): (32, 32, 2), (4, 128): (16, 32, 2), (4, 256): (16, 16, 2),
}  # fmt: skip
_SPLIT_SLOTS = 128  # a split of the trunk shorter than this costs more in merging than it saves
_MOST_SPLITS = 64  # _merge holds one row's partial results of all splits in registers


class _Plan(NamedTuple):
    """How a call is laid on the GPU: query rows and slots of a tile, splits of what a row sees, launch options."""

    rows: int
    slots: int
    splits: int
    warps: int
    stages: int


@functools.cache
def _plan(Q: int, heads: int, D: int, itemsize: int, extent: int, steps: int, device: torch.device) -> _Plan:
    """From static shapes only, so a captured graph stays right as the texts in its rows grow. heads is B * G."""
    processors, shared = 132, 227 * 1024  # the interpreter plays an H100
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        processors, shared = properties.multi_processor_count, properties.shared_memory_per_multiprocessor - 1024
    block_d = _padded(D)
    most_rows, slots, stages = _TILES[itemsize, block_d]
    rows = min(max(triton.next_power_of_2(Q), 16), most_rows)
    stage_bytes = 2 * slots * block_d * itemsize
    while stages > 1 and stages * stage_bytes + rows * block_d * itemsize + 4096 > shared:
        stages -= 1
    # As many programs as run at once and no more: a second wave of a few would double the time.
    room = processors * (2 if rows <= 32 else 1) // (heads * triton.cdiv(Q, rows))
    splits = max(1, min(room, triton.cdiv(extent, _SPLIT_SLOTS) + steps, _MOST_SPLITS))
    return _Plan(rows, slots, splits, 8 if rows * max(slots, block_d) >= 128 * 128 else 4, stages)


def _padded(D: int) -> int:
    return max(32, triton.next_power_of_2(D))


def _jit(*varying: str):
    """triton.jit where there is Triton. Arguments named here vary from call to call: the compiled code serves all."""
    return (lambda kernel: kernel) if triton is None else triton.jit(do_not_specialize=varying)


@_jit()
def _load_rows(pointer, offset_N, wanted_N, D: constexpr, BLOCK_D: constexpr):
    """(N, BLOCK_D) numbers from N rows of D; zero in rows that are not wanted, which are not read, and past D."""
    d = tl.arange(0, BLOCK_D)
    mask = wanted_N[:, None]
    if D != BLOCK_D:
        mask = mask & (d < D)[None, :]
    return tl.load(pointer + offset_N[:, None] + d[None, :], mask=mask, other=0.0)


@_jit()
def _attend_chain(
    best_Q, total_Q, mixed_QD, query_QD, k_SD, v_SD, cache_s, slot_Q, M, real_Q, begin, end, stride, scale,
    D: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """Every stride-th chain step. Each branch has its own keys: one dot product for a row, not a matrix product."""
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
    """Trunk slots begin..end-1, a tile of SLOTS at a time, each row masked to what it sees."""
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
        mixed_QD = tl.dot(p_QS.to(v_tile_SD.dtype), v_tile_SD, mixed_QD * keep_Q[:, None], input_precision="ieee")
    return best_Q, total_Q, mixed_QD


@_jit("T", "extent", "base", "steps", "window")
def _attend(
    query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, step_B, out_BTHD, part_BTHPD, weight_BTHP,
    query_b, query_t, query_h, cache_b, cache_g, cache_s,  # strides
    T, extent, base, steps, window, scale,
    G: constexpr, R: constexpr, D: constexpr, BLOCK_D: constexpr, ROWS: constexpr,
    SLOTS: constexpr, SPLIT_SLOTS: constexpr,
):  # fmt: skip
    """One program: ROWS query rows of one key/value head over one split of what they see, by online softmax.

    Query row t * R + r is query head r of token t. Limits and steps are read here, from the device: a captured graph
    stays right as its texts grow. Scores are in powers of two (scale holds log2 e).
    """
    # int64 where a whole cache is spanned; offsets within one head's slots fit int32, which the wrapper checks.
    pair = tl.program_id(2).to(tl.int64)
    b, g = pair // G, pair % G
    split, splits = tl.program_id(1), tl.num_programs(1)
    row_Q = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real_Q = row_Q < T * R
    t_Q, h_Q = row_Q // R, g * R + row_Q % R
    k_SD, v_SD = k_BGSD + b * cache_b + g * cache_g, v_BGSD + b * cache_b + g * cache_g
    query_QD = _load_rows(query_BTHD + b * query_b, t_Q * query_t + h_Q * query_h, real_Q, D, BLOCK_D)
    limit_Q = tl.minimum(tl.load(limit_BT + b * T + t_Q, mask=real_Q, other=0).to(tl.int32), extent)
    first_Q, low, high = limit_Q, 0, tl.max(limit_Q, 0)
    if first_BT is not None:
        first_Q = tl.load(first_BT + b * T + t_Q, mask=real_Q, other=extent).to(tl.int32)
        low = tl.maximum(tl.min(first_Q, 0), 0)

    # A finite start keeps inf - inf out of rows that see nothing here: their total stays 0.
    best_Q = tl.full([ROWS], -1.0e38, tl.float32)
    total_Q = tl.zeros([ROWS], tl.float32)
    mixed_QD = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if step_B is not None:
        # One step a program if there are as many, from the last program on: with short texts those have no trunk.
        newest = tl.load(step_B + b).to(tl.int32)
        begin = tl.maximum(newest + 1 - window, 0) + splits - 1 - split
        best_Q, total_Q, mixed_QD = _attend_chain(
            best_Q, total_Q, mixed_QD, query_QD, k_SD, v_SD, cache_s, base + t_Q, T, real_Q,
            begin, tl.minimum(newest + 1, steps), splits, scale, D, BLOCK_D,
        )  # fmt: skip
    # The trunk is shared out by its true length, not by `extent`: short texts in large caches keep every program busy.
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
        tl.store(part_BTHPD + part_Q[:, None] * D + d[None, :], mixed_QD, mask=stored_QD)
        # == 0 and not > 0: a NaN must reach the output
        weight_Q = tl.where(total_Q == 0, float("-inf"), best_Q + tl.log2(total_Q))
        tl.store(weight_BTHP + part_Q, weight_Q, mask=real_Q)


@_jit("splits")
def _merge(part_BTHPD, weight_BTHP, out_BTHD, splits, D: constexpr, BLOCK_D: constexpr, SPLITS: constexpr):
    """One program: one query head of one token, its splits' results weighted by their shares of the softmax."""
    row = tl.program_id(0).to(tl.int64)
    split_P = tl.arange(0, SPLITS)
    weight_P = tl.load(weight_BTHP + row * splits + split_P, mask=split_P < splits, other=float("-inf"))
    part_PD = _load_rows(part_BTHPD, (row * splits + split_P) * D, weight_P != float("-inf"), D, BLOCK_D)
    weight_P = tl.exp2(weight_P - tl.max(weight_P, 0))
    mixed_D = tl.sum(part_PD * weight_P[:, None], 0) / tl.sum(weight_P, 0)
    d = tl.arange(0, BLOCK_D)
    tl.store(out_BTHD + row * D + d, mixed_D, mask=d < D)


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
    """The kernel's wrapper, one opaque operator to torch.compile. Arguments as in tree_attention, `chain` unpacked."""
    (B, T, H, D), G = query_BTHD.shape, k_BGSD.shape[1]
    _check(query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, step_B, extent, base, steps)
    limit_BT = limit_BT.contiguous()
    first_BT = first_BT if first_BT is None else first_BT.contiguous()
    step_B = step_B if step_B is None else step_B.contiguous()
    out = torch.empty((B, T, H, D), dtype=query_BTHD.dtype, device=query_BTHD.device)
    Q, R, block_d = T * H // G, H // G, _padded(D)
    plan = _plan(Q, B * G, D, query_BTHD.itemsize, extent, steps, query_BTHD.device)
    part = weight = None
    if plan.splits > 1:
        part = torch.empty((B, T, H, plan.splits, D), dtype=torch.float32, device=out.device)
        weight = torch.empty((B, T, H, plan.splits), dtype=torch.float32, device=out.device)
    with torch.cuda.device_of(out):  # Triton launches on the current device, which need not be the tensors'
        _attend[(triton.cdiv(Q, plan.rows), plan.splits, B * G)](
            query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, step_B, out, part, weight,
            *query_BTHD.stride()[:3], *k_BGSD.stride()[:3],
            T, extent, base, steps, window or 1 << 30, scale * math.log2(math.e),
            G=G, R=R, D=D, BLOCK_D=block_d, ROWS=plan.rows, SLOTS=plan.slots, SPLIT_SLOTS=_SPLIT_SLOTS,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
        if plan.splits > 1:
            padded = triton.next_power_of_2(plan.splits)
            _merge[(B * T * H,)](part, weight, out, plan.splits, D=D, BLOCK_D=block_d, SPLITS=padded)
    return out


@_fused.register_fake
def _(query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, step_B, scale, extent, base, steps, window):
    return torch.empty(query_BTHD.shape, dtype=query_BTHD.dtype, device=query_BTHD.device)


def _check(query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT, step_B, extent, base, steps) -> None:
    """What the kernel takes for granted. A wrong stride or shape there is a wrong number or a dead device, no error."""
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
        assert x.shape == (B, G, S, D), f"{name} are {tuple(x.shape)}, wanted {(B, G, S, D)} (B, G, S, D)"
        assert x.stride() == k_BGSD.stride() and x.stride(3) == 1, (
            f"{name} have strides {x.stride()}: wanted the keys', last one 1"
        )
        assert S * x.stride(2) < 2**31, f"one head's {name} span {S * x.stride(2)} numbers, wanted under 2^31"
    assert H % G == 0 and D <= 256, f"{H} heads on {G} of size {D}: wanted a multiple, and a size of at most 256"
    assert query_BTHD.stride(3) == 1, f"queries have strides {query_BTHD.stride()}, wanted the last one 1"
    assert T * query_BTHD.stride(1) < 2**31, f"one row's queries span {T * query_BTHD.stride(1)} numbers: feed fewer"
    assert B * G < 65536, f"{B} rows of {G} heads, wanted under 65536 pairs: CUDA's bound on this side of a grid"
    assert 1 <= extent <= S, f"extent is {extent}, wanted 1 to the cache's {S} slots"
    for name, x, shape in (("limit", limit_BT, (B, T)), ("first", first_BT, (B, T)), ("step", step_B, (B,))):
        if x is not None:
            assert x.shape == shape and x.dtype in (torch.int32, torch.int64), (
                f"{name} is {tuple(x.shape)} {x.dtype}, wanted {shape} of integers"
            )
            assert x.device == device, f"{name} is on {x.device}, wanted {device}"
    assert step_B is None or base + steps * T <= S, f"chains end at slot {base + steps * T}, the cache at {S}"
