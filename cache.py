"""The two caches: keys and values of tokens already read, and proposals for outcomes not yet known.

Knows: slots, positions, lengths, branches. Does not know: models, sampling, devices' queues. Read next: model.py.

A row's slots are laid out like this, allocated once and zeroed (attention must never meet a NaN in an unused slot):

    [ trunk: the slot of a token is its position | chain scratch: branch m, step c at base + m + c*M | one dead slot ]

Rolling back is setting a length: what lies behind it is overwritten before any query's limit reaches it. Tokens that
must leave no trace (padding, rows that have ended) are written to the dead slot, which no query ever sees.

Shape letters: L layers, B batch, T tokens fed per row, G key/value heads, S slots, D head size, M branches.
"""

import threading
from contextlib import contextmanager
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
    """Outcome -> chain, for the round in flight: filled by the draft lane, read by the loop while it is being filled.

    fork() once, then append() after every chain step; whoever reads takes the steps that are there. A look-up is one
    dictionary access. The two events let the reader wait for the first moment at which an answer exists.
    """

    def __init__(self):
        self.branch_of: dict[tuple[int, int, int], int] = {}
        self.steps: list[tuple[list[list[int]], torch.Tensor | None]] = []  # (tokens [B][M], log q (B, M, V)) a step
        self.made = None  # the fork, to learn from
        self.forked, self.ready = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.work = None  # the draft lane's Pending that fills this cache

    @contextmanager
    def filling(self):
        """Whatever happens to the work inside, nobody waits for this cache for ever."""
        try:
            yield
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.forked.set()
            self.ready.set()

    def fork(self, made) -> None:
        """made: steps.Forked."""
        for row, (tokens, depths) in enumerate(zip(made.tokens, made.depths)):
            for branch, (depth, token) in enumerate(zip(depths, tokens)):
                self.branch_of[row, depth, token] = branch
        self.made = made
        self.forked.set()

    def append(self, tokens_BM: list[list[int]], logq_BMV: torch.Tensor | None) -> None:
        self.steps.append((tokens_BM, logq_BMV))
        self.ready.set()

    def look_up(self, row: int, accepted: int, token: int) -> int | None:
        """The branch prepared for "exactly `accepted` draft tokens, then `token`", or None: a miss."""
        return self.branch_of.get((row, accepted, token))

    def lesson(self, row: int, accepted: int, token: int) -> tuple[int | None, int, list[float] | None]:
        """The place of an outcome among those it was ranked with, None if it is not there; how many they were; and
        the chances that its drafted tokens had."""
        made = self.made
        if made.best is None:
            return self.look_up(row, accepted, token), len(made.tokens[row]), made.held[row]
        best = made.best[row][accepted]
        return (best.index(token) if token in best else None), len(best), None

    def chain(self, row: int, branch: int, length: int) -> tuple[list[int], list[torch.Tensor] | None]:
        """The first `length` prepared tokens of a branch and, unless the coupling is `shared`, their log q (V,)."""
        taken = self.steps[:length]
        tokens = [tokens_BM[row][branch] for tokens_BM, _ in taken]
        return tokens, [logq[row, branch] for _, logq in taken] if taken and taken[0][1] is not None else None
