"""The two caches: keys and values of tokens already read, and proposals for outcomes not yet known.

Knows: slots, positions, lengths, branches. Does not know: models, sampling, devices' queues.
Read next: model.py.

A row's slots are laid out like this, allocated once and zeroed, since attention must never meet a
NaN in an unused slot (what a pass writes is finite, or the run fails):

    trunk           the slot of a token is its position
    chain scratch   branch m, step c at trunk + m + c * M
    one dead slot

Rolling back is setting a length: what lies after it is overwritten before any query's limit reaches
it. Tokens that must leave no trace (padding, rows that have ended) are written to the dead slot,
which no query ever sees.

Shape letters: L layers, B batch, T tokens fed per row, G key/value heads, S slots, D head size, M
branches.
"""

import copy
import threading
import time

import torch

from kernels import trunk_mask
from model import Location

# A query's result must not depend on the queries beside it, not even in its last bit: where
# activations are then rounded to 8 bits, such a difference can grow to a hundredth. A CPU sums
# slots in blocks, so passes over the trunk get whole ones, where slots that a query does not see
# add zeros. (Chain steps need not: they only propose.) PyTorch's attention takes 512 slots at a
# time. Of those, MKL sums at most 192 in one go, at most 384 in two halves, and more in parts of
# 192: so a half is always one of 192 (AMD Zen 4; LOG.md).
SLOT_BLOCK, SPLIT, IN_ONE_GO = 16, 512, 192


def in_whole_blocks(slots: int) -> int:
    """So many slots, rounded up so that those a query does not see change no order of sums."""
    slots += -slots % SLOT_BLOCK
    rest = slots % SPLIT
    return slots - rest + 2 * IN_ONE_GO if IN_ONE_GO < rest < 2 * IN_ONE_GO else slots


class KVCache:
    """Keys and values of one model for B rows.

    A row has at least `trunk` ordinary slots, in whole blocks, so that every mode reads the last
    ones in the same blocks; then branches * steps of scratch, and one dead slot.
    """

    def __init__(
        self, config, batch: int, trunk: int, branches: int = 0, steps: int = 0, *, device, dtype
    ):
        self.trunk = in_whole_blocks(trunk)
        self.steps = steps
        self.dead = self.trunk + branches * steps
        self.heads_per_kv = config.num_heads // config.num_kv_heads
        shape = (config.num_layers, batch, config.num_kv_heads, self.dead + 1, config.head_dim)
        self.k_LBGSD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBGSD = torch.zeros(shape, device=device, dtype=dtype)
        self.layers = list(zip(self.k_LBGSD.unbind(), self.v_LBGSD.unbind()))  # views

    def copy_trunk(self, other: "KVCache", length: int) -> None:
        """Take over the first `length` positions of another cache of the same model."""
        if self is not other:
            self.k_LBGSD[:, :, :, :length] = other.k_LBGSD[:, :, :, :length]
            self.v_LBGSD[:, :, :, :length] = other.v_LBGSD[:, :, :, :length]

    def narrow(self, part: range) -> "KVCache":
        """The rows of these places alone, as a cache that is a view of this one."""
        view = copy.copy(self)
        view.k_LBGSD = self.k_LBGSD[:, part.start : part.stop]
        view.v_LBGSD = self.v_LBGSD[:, part.start : part.stop]
        view.layers = list(zip(view.k_LBGSD.unbind(), view.v_LBGSD.unbind()))
        return view

    def locate(self, start_B, count_B, T: int, extent: int, tight: bool = False) -> Location:
        """Where T tokens a row sit on the trunk, from position start_B on.

        The first count_B of them are real. Padding goes to the dead slot; a row with count 0 takes
        no part. Padded queries see slot 0, so that they stay finite.
        """
        offset_T = torch.arange(T, device=start_B.device)
        positions_BT = start_B[:, None] + offset_T
        real_BT = offset_T < count_B[:, None]
        slots_BT = torch.where(real_BT, positions_BT, self.dead)
        limit_BT = torch.where(real_BT, positions_BT + 1, 1)
        positions_BT = torch.where(real_BT, positions_BT, 0)
        mask = None
        if not limit_BT.is_cuda:  # a GPU's kernel reads the limits
            if tight:
                extent = in_whole_blocks(extent)
            mask = self._mask(limit_BT, extent)
        return Location(positions_BT, slots_BT, limit_BT, extent, tight, None, mask)

    def locate_chain(
        self, known_B, depth_BM, step_B, live_B, extent: int, tight: bool = False, steps=None
    ) -> Location:
        """Where step `step_B` of M chains sits. Chain m begins at position known_B + depth_BM.

        known_B (B,) counts a row's tokens, the pending one included. `steps`, a bound on
        step_B + 1 that the host knows, limits how much scratch is read (default: all of it).
        """
        limit_BM, M = known_B[:, None] + depth_BM, depth_BM.shape[1]
        slots_BM = self.trunk + torch.arange(M, device=depth_BM.device) + step_B[:, None] * M
        slots_BM = torch.where(live_B[:, None], slots_BM, self.dead)
        chain = (self.trunk, self.steps if steps is None else steps, step_B)
        mask = None if limit_BM.is_cuda else self._mask(limit_BM, extent)
        positions_BM = limit_BM + step_B[:, None]
        return Location(positions_BM, slots_BM, limit_BM, extent, tight, chain, mask)

    def _mask(self, limit_BT, extent: int):
        """Location.mask."""
        dtype = torch.promote_types(self.k_LBGSD.dtype, torch.float32)
        return trunk_mask(limit_BT, None, extent, self.heads_per_kv, dtype)


class SpeculationCache:
    """Outcome -> chain, for the round in flight: filled by the draft's lane, read by the loop while
    it is filled.

    The key is (place, accepted, bonus). It leads to a branch, whose chain grows by a token a step.
    fork() comes once, then append() after every chain step. work is the lane's future that fills
    this cache, None where nothing is prepared.
    """

    def __init__(self, lane):
        self.lane, self.work = lane, None
        self.branch_of: dict[tuple[int, int, int], int] = {}
        self.chance: list[float] = []  # [B]
        self.steps: list[tuple[list[list[int]], object]] = []  # (tokens [B][M], their LogQ or None)
        self.begun: tuple | None = None  # a step whose tokens are still to come
        self.moments: list[float] = []  # when the fork and each step were done
        self.forked = threading.Event()

    def filled_by(self, work) -> None:
        """Work that fills this cache was started. However it ends, nobody waits for ever."""
        self.work = work
        # Called when its lane knows whether it failed.
        work.add_done_callback(lambda _: self.forked.set())

    def fork(
        self, tokens_BM: list[list[int]], depths_BM: list[list[int]], chance_B: list[float]
    ) -> None:
        """Record the outcomes that are prepared for, by place, likeliest first: the bonus tokens,
        and after how many accepted ones. chance_B: that one of a row's branches is the outcome.
        """
        for place, (depths, tokens) in enumerate(zip(depths_BM, tokens_BM)):
            if tokens is not None:  # the row took part in this round
                for branch, outcome in enumerate(zip(depths, tokens)):
                    self.branch_of[(place, *outcome)] = branch
        self.chance = chance_B
        self.moments.append(time.perf_counter())
        self.forked.set()

    def append(self, tokens_BM, logq) -> None:
        """Record a step that was begun. Lists of tokens are on the host, so that it counts at once.
        What is still on a GPU (steps.Drawn) counts at the next append() or settle().
        """
        self.settle()
        self.begun = tokens_BM, logq
        if isinstance(tokens_BM, list):
            self.settle()

    def settle(self) -> None:
        """Wait for the step that was begun last."""
        if self.begun is not None:
            tokens_BM, logq = self.begun
            self.steps.append((list(tokens_BM), logq))
            self.moments.append(time.perf_counter())
            self.begun = None

    def look_up(
        self, places: list[int], accepted: list[int], bonus: list[int]
    ) -> dict[int, tuple[list[int], list]]:
        """Place -> the chain prepared for what happened, where the row hit. A chain is tokens and
        their LogQ.

        accepted and bonus are by place, as `verify` returns them. If any row hit, this waits until
        the chains are done. Raises DraftLost.
        """
        if self.work is None or not places:
            return {}
        self.lane.wait_for(self.forked)
        outcomes = {b: (b, accepted[b], bonus[b]) for b in places}
        hits = {b: self.branch_of[key] for b, key in outcomes.items() if key in self.branch_of}
        if hits:
            self.lane.answer(self.work)
        return {
            b: (
                [tokens[b][branch] for tokens, _ in self.steps],
                [logq and logq.of(b, branch) for _, logq in self.steps],
            )
            for b, branch in hits.items()
        }
