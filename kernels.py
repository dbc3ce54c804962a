"""Attention for speculation trees: what every query of the engine runs through.

Knows: tensors of queries, keys and values, and which slots each query may see. Does not know: models, lengths of
texts, branches as tokens. Read next: cache.py, which decides the slots and limits, and model.py, which calls this.

One function serves prefill, decode, verify, extend and chain steps, because they differ only in what a query sees:

    the trunk   slots first <= s < limit of the ordinary cache, one limit for each query
    its chain   for a branch of a speculation tree: the scratch slots of that branch alone, one for each chain step

Shape letters: B batch, T tokens fed per row, H query heads, G key/value heads (H is a multiple of G), S cache slots,
D head size, M branches, C chain steps.
"""

import torch


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
    return tree_attention_reference(
        query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT,
        scale=scale, extent=extent, tight=tight, chain=chain, window=window,
    )  # fmt: skip


def tree_attention_reference(
    query_BTHD, k_BGSD, v_BGSD, limit_BT, first_BT=None, *, scale, extent, tight=False, chain=None, window=0
):
    """The twin of the kernel in plain PyTorch, and the engine's attention on the CPU. Same contract, same numbers."""
    B, T, H, D = query_BTHD.shape
    G = k_BGSD.shape[1]
    work = torch.float64 if query_BTHD.dtype == torch.float64 else torch.float32
    # The query heads that share a key/value head become extra query rows: one pass over K and V serves them all.
    query_BGQD = query_BTHD.view(B, T, G, H // G, D).permute(0, 2, 3, 1, 4).reshape(B, G, (H // G) * T, D).to(work)
    trunk_k, trunk_v = k_BGSD[:, :, :extent].to(work), v_BGSD[:, :, :extent].to(work)

    scores_BGQS = (query_BGQD @ trunk_k.transpose(-1, -2)).mul_(scale)
    if B * T > 1 or not tight or first_BT is not None:
        slot_S = torch.arange(extent, device=limit_BT.device)
        dead_BTS = slot_S >= limit_BT[..., None]
        if B > 1 or not tight:
            # Zero times NaN is NaN: values that no query of the row may see are cleared, not just given weight 0.
            trunk_v = trunk_v.masked_fill(dead_BTS.all(1)[:, None, :, None], 0.0)
        if first_BT is not None:
            dead_BTS = dead_BTS | (slot_S < first_BT[..., None])
        scores_BGQS.view(B, G, H // G, T, extent).masked_fill_(dead_BTS[:, None, None], float("-inf"))
    if chain is None:
        mixed_BGQD = torch.softmax(scores_BGQS, -1) @ trunk_v
    else:
        base, steps, step_B = chain
        chain_k, chain_v = (
            x[:, :, base : base + steps * T].view(B, G, 1, steps, T, D).to(work) for x in (k_BGSD, v_BGSD)
        )
        step_C = torch.arange(steps, device=limit_BT.device)
        dead_BC = step_C > step_B[:, None]
        if window:
            dead_BC = dead_BC | (step_C <= step_B[:, None] - window)
        if not tight:
            chain_v = chain_v.masked_fill(dead_BC[:, None, None, :, None, None], 0.0)
        query = query_BGQD.view(B, G, H // G, 1, T, D)
        own_BGQTC = (query * chain_k).sum(-1).transpose(-1, -2).mul_(scale)
        own_BGQTC = own_BGQTC.masked_fill(dead_BC[:, None, None, None], float("-inf"))
        weights = torch.softmax(torch.cat((scores_BGQS, own_BGQTC.flatten(2, 3)), -1), -1)
        mixed_BGQD = weights[..., :extent] @ trunk_v
        own_weights = weights[..., extent:].view(B, G, H // G, T, steps).transpose(-1, -2)
        mixed_BGQD += (own_weights[..., None] * chain_v).sum(3).flatten(2, 3)
    out = mixed_BGQD.view(B, G, H // G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
    return out.to(query_BTHD.dtype)
