"""The two caches: keys and values of tokens already read, and proposals for outcomes not yet known.

Knows: slots, positions, lengths, branches. Does not know: models, sampling, devices' queues. Read next: model.py.

A row's slots are laid out like this, allocated once and zeroed (attention must never meet a NaN in an unused slot):

    [ trunk: the slot of a token is its position | chain scratch: branch m, step c at base + m + c*M | one dead slot ]

Rolling back is setting a length: what lies behind it is overwritten before any query's limit reaches it. Tokens that
must leave no trace (padding, rows that have ended) are written to the dead slot, which no query ever sees.

Shape letters: L layers, B batch, T tokens fed per row, G key/value heads, S slots, D head size, M branches.
"""

from typing import NamedTuple

import torch


class Placement(NamedTuple):
    """Where the tokens of one forward pass sit, and what each of them may see. Tensors are int64 on the model's device.

    positions_BT for RoPE; slots_BT where keys and values are written; limit_BT the trunk slots seen, [0, limit);
    extent a host-known bound on every limit, tight if it is known to be reached; chain as in kernels.tree_attention,
    None for trunk tokens.
    """

    positions_BT: torch.Tensor
    slots_BT: torch.Tensor
    limit_BT: torch.Tensor
    extent: int
    tight: bool = False
    chain: tuple[int, int, torch.Tensor] | None = None


class KVCache:
    """Keys and values of one model for B rows: `trunk` ordinary slots, branches * steps of scratch, one dead slot."""

    def __init__(self, config, batch: int, trunk: int, branches: int = 0, steps: int = 0, *, device, dtype):
        self.trunk, self.branches, self.steps = trunk, branches, steps
        self.dead = trunk + branches * steps
        shape = (config.num_layers, batch, config.num_kv_heads, self.dead + 1, config.head_dim)
        self.k_LBGSD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBGSD = torch.zeros(shape, device=device, dtype=dtype)

    @staticmethod
    def bytes_needed(config, batch: int, trunk: int, branches: int, steps: int, itemsize: int) -> int:
        slots = trunk + branches * steps + 1
        return 2 * config.num_layers * batch * config.num_kv_heads * slots * config.head_dim * itemsize

    def write(self, layer: int, slots_BT: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor) -> None:
        row_B1 = torch.arange(slots_BT.shape[0], device=slots_BT.device)[:, None]
        self.k_LBGSD[layer].transpose(1, 2)[row_B1, slots_BT] = k_BTGD
        self.v_LBGSD[layer].transpose(1, 2)[row_B1, slots_BT] = v_BTGD

    def place(self, start_B: torch.Tensor, count_B: torch.Tensor, T: int, extent: int, tight=False) -> Placement:
        """T tokens per row on the trunk, from position start_B on; the first count_B of them are real.

        Padding goes to the dead slot; a row with count 0 has ended. Padded queries see slot 0, so they stay finite.
        """
        offset_T = torch.arange(T, device=start_B.device)
        positions_BT = start_B[:, None] + offset_T
        real_BT = offset_T < count_B[:, None]
        slots_BT = torch.where(real_BT, positions_BT, self.dead)
        limit_BT = torch.where(real_BT, positions_BT + 1, 1)
        return Placement(torch.where(real_BT, positions_BT, 0), slots_BT, limit_BT, extent, tight)

    def place_chain(self, start_B, depth_BM, step_B, live_B, extent, tight=False, steps=None) -> Placement:
        """Chain step `step_B` of M branches that fork off the trunk after position start_B - 1 + depth_BM.

        start_B (B,) is the position after the pending token; branch m's forked token sits at start_B + depth_BM.
        `steps`, a host-known bound on step_B + 1, limits how much scratch is read (default: all of it).
        """
        limit_BM = start_B[:, None] + depth_BM
        branch_M = torch.arange(depth_BM.shape[1], device=depth_BM.device)
        slots_BM = torch.where(live_B[:, None], self.trunk + branch_M + step_B[:, None] * self.branches, self.dead)
        chain = (self.trunk, self.steps if steps is None else steps, step_B)
        return Placement(limit_BM + step_B[:, None], slots_BM, limit_BM, extent, tight, chain)
