"""The two caches: keys and values of tokens already read, and proposals for outcomes not yet known.

Knows: slots, positions, lengths, branches. Does not know: models, sampling, devices' queues. Read next: model.py.

A row's slots are laid out like this, allocated once and zeroed (attention must never meet a NaN in an unused slot):

    [ trunk: the slot of a token is its position | chain scratch: branch m, step c at base + m + c*M | one dead slot ]

Rolling back is setting a length: what lies behind it is overwritten before any query's limit reaches it. Tokens that
must leave no trace (padding, rows that have ended) are written to the dead slot, which no query ever sees.

Shape letters: L layers, B batch, T tokens fed per row, G key/value heads, S slots, D head size, M branches.
"""

import threading
import time
from typing import NamedTuple

import torch

from unlocked import limits_as_bias

QUICK_TOKENS = 256  # of all rows: beyond, a pass is long and its bias large


class Placement(NamedTuple):
    """Where the tokens of one forward pass sit, and what each of them may see. Tensors are int64 on the model's device.

    positions_BT for RoPE; slots_BT where keys and values are written; limit_BT the trunk slots seen, [0, limit);
    extent a host-known bound on every limit, tight if it is known to be reached; chain as in kernels.tree_attention,
    None for trunk tokens. quick: few tokens on a CPU, for unlocked.all_layers; bias and dead as there.
    """

    positions_BT: torch.Tensor
    slots_BT: torch.Tensor
    limit_BT: torch.Tensor
    extent: int
    tight: bool = False
    chain: tuple[int, int, torch.Tensor] | None = None
    quick: bool = False
    bias: torch.Tensor | None = None
    dead: torch.Tensor | None = None


def write(k_BGSD, v_BGSD, slots_BT: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor) -> None:
    """Put the keys and values of T tokens a row into their slots, in place."""
    row_B1 = torch.arange(slots_BT.shape[0], device=slots_BT.device)[:, None]
    # Written to the cache itself: through a transposed view, compiled code would copy all of the cache there and back.
    k_BGSD[row_B1, :, slots_BT] = k_BTGD
    v_BGSD[row_B1, :, slots_BT] = v_BTGD


class KVCache:
    """Keys and values of one model for B rows: `trunk` ordinary slots, branches * steps of scratch, one dead slot."""

    def __init__(self, config, batch: int, trunk: int, branches: int = 0, steps: int = 0, *, device, dtype):
        self.trunk, self.branches, self.steps = trunk, branches, steps
        self.dead = trunk + branches * steps
        shape = (config.num_layers, batch, config.num_kv_heads, self.dead + 1, config.head_dim)
        self.k_LBGSD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBGSD = torch.zeros(shape, device=device, dtype=dtype)
        self.k_L, self.v_L = list(self.k_LBGSD.unbind()), list(self.v_LBGSD.unbind())  # views, a layer each

    def copy_trunk(self, other: "KVCache", length: int) -> None:
        """Take over the first `length` positions of another cache of the same model."""
        if self is not other:
            self.k_LBGSD[:, :, :, :length] = other.k_LBGSD[:, :, :, :length]
            self.v_LBGSD[:, :, :, :length] = other.v_LBGSD[:, :, :, :length]

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, G, S, D) of one layer, to read and to write."""
        return self.k_L[layer], self.v_L[layer]

    def place(self, start_B: torch.Tensor, count_B: torch.Tensor, T: int, extent: int, tight=False) -> Placement:
        """T tokens per row on the trunk, from position start_B on; the first count_B of them are real.

        Padding goes to the dead slot; a row with count 0 has ended. Padded queries see slot 0, so they stay finite.
        """
        offset_T = torch.arange(T, device=start_B.device)
        positions_BT = start_B[:, None] + offset_T
        real_BT = offset_T < count_B[:, None]
        slots_BT = torch.where(real_BT, positions_BT, self.dead)
        limit_BT = torch.where(real_BT, positions_BT + 1, 1)
        positions_BT = torch.where(real_BT, positions_BT, 0)
        return Placement(positions_BT, slots_BT, limit_BT, extent, tight, None, *self._quick(limit_BT, extent, tight))

    def place_chain(self, start_B, depth_BM, step_B, live_B, extent, tight=False, steps=None) -> Placement:
        """Chain step `step_B` of M branches that fork off the trunk after position start_B - 1 + depth_BM.

        start_B (B,) is the position after the pending token; branch m's forked token sits at start_B + depth_BM.
        `steps`, a host-known bound on step_B + 1, limits how much scratch is read (default: all of it).
        """
        limit_BM = start_B[:, None] + depth_BM
        branch_M = torch.arange(depth_BM.shape[1], device=depth_BM.device)
        slots_BM = torch.where(live_B[:, None], self.trunk + branch_M + step_B[:, None] * len(branch_M), self.dead)
        chain = (self.trunk, self.steps if steps is None else steps, step_B)
        rest = self._quick(limit_BM, extent, tight)
        return Placement(limit_BM + step_B[:, None], slots_BM, limit_BM, extent, tight, chain, *rest)

    def _quick(self, limit_BT, extent: int, tight: bool) -> tuple:
        """Placement.quick, .bias and .dead: for float32 or more on a CPU, one row or few tokens, made once a pass."""
        B, T = limit_BT.shape
        wide = self.k_LBGSD.dtype in (torch.float32, torch.float64)
        if not (tight and wide and limit_BT.device.type == "cpu" and (B == 1 or B * T <= QUICK_TOKENS)):
            return False, None, None
        if B * T == 1:  # one token sees all that is there
            return True, None, None
        bias, dead = limits_as_bias(limit_BT, extent, self.k_LBGSD.dtype)
        return True, bias, None if B == 1 else dead


class SpeculationCache:
    """Outcome -> chain, for the round in flight: filled by the draft's lane, read by the loop while it is filled.

    The key is (row, accepted tokens, next token), the value a branch, whose chain grows by a token a
    step. fork() comes once, then append() after every chain step; a reader takes the steps that are
    there. work is the lane's future that fills this cache, None where nothing is prepared.
    """

    def __init__(self, lane, cut: bool):
        """cut: a look-up waits for the first token of a chain only; else for all of the work."""
        self.lane, self.cut, self.work = lane, cut, None
        self.branch_of: dict[tuple[int, int, int], int] = {}
        self.chance: list[float] = []  # [B], that one of a row's branches is the outcome
        self.steps: list[tuple[list[list[int]], object]] = []  # (tokens [B][M], their LogQ or None)
        self.moments: list[float] = []  # when the fork and each step were done
        self.forked, self.ready = threading.Event(), threading.Event()

    def filled_by(self, work) -> None:
        """Work that fills this cache was started. However it ends, nobody waits for ever."""
        self.work = work
        for event in (self.forked, self.ready):  # set when its lane knows whether it failed
            work.add_done_callback(lambda _, event=event: event.set())

    def fork(self, tokens_BM: list[list[int]], depths_BM: list[list[int]], chance_B: list[float]) -> None:
        for row, branches in enumerate(zip(depths_BM, tokens_BM)):
            for branch, (depth, token) in enumerate(zip(*branches)):
                self.branch_of[row, depth, token] = branch
        self.chance = chance_B
        self.moments.append(time.perf_counter())
        self.forked.set()

    def append(self, tokens_BM: list[list[int]], logq) -> None:
        self.steps.append((tokens_BM, logq))
        self.moments.append(time.perf_counter())
        self.ready.set()

    def look_up(self, rows: list[int], accepted: list[int], bonus: list[int]) -> dict[int, tuple[list[int], list]]:
        """Row -> the chain prepared for what happened, for the rows that hit. A chain is tokens and their LogQ.

        accepted and bonus are by row, as `verify` returns them. Raises DraftLost.
        """
        if self.work is None or not rows:
            return {}
        if not self.cut:
            self.lane.answer(self.work)
        self.lane.wait_for(self.forked)
        outcomes = {b: (b, accepted[b], bonus[b]) for b in rows}
        hits = {b: self.branch_of[key] for b, key in outcomes.items() if key in self.branch_of}
        if hits:
            self.lane.wait_for(self.ready)
        steps = list(self.steps)  # what comes later is of no use to this round
        return {
            b: ([tokens[b][branch] for tokens, _ in steps], [logq and logq.of(b, branch) for _, logq in steps])
            for b, branch in hits.items()
        }
