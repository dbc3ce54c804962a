"""One forward pass and one draw: everything that runs on a device, for the target and for the draft.

Knows: a model with its KV cache and its rows' sampling parameters. Does not know: rounds, texts, hits and misses, what
the other model does. Read next: ssd.py, which calls these in the paper's order.

Token positions: a row of length N has its pending token r at position N - 1. A pass that feeds [r, d_1 .. d_L] from
`start` = N - 1 on predicts positions N .. N + L, and the noise of a draw is always that of the position it fills.

Shape letters: B rows, T positions fed, K draft tokens, M branches, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cache import KVCache
from fanout import ByScores
from model import Transformer
from runtime import Policy
from sampling import (
    RESIDUAL,
    TOKEN,
    Params,
    accept_exact,
    accept_shared,
    gumbel,
    log_probs,
    noisy,
    outcomes,
    saguaro,
    warp,
)

# Noise lies between -3 and 23: a token that the draft's top-k or top-p leaves out is forked behind all that it keeps.
LEFT_OUT = -32.0
PREFILL_CHUNKS = (32, 256)  # prompt tokens per pass: few shapes, so that a prompt's length never recompiles


@dataclass
class Feed:
    """What a model is fed in a round: [r, d_1 .. d_L] per row, padded to T; count is L + 1, 0 for ended rows."""

    tokens: list[list[int]]
    start: list[int]
    count: list[int]


class Forked(NamedTuple):
    """What a fork chose, for every row: branches by token and by j, and what is learnt from when the outcome is known.

    By scores the branches are in order, likeliest first, and held is the chance of each drafted token to hold. With
    lists, best holds the M best tokens of every j in order.
    """

    tokens: list[list[int]]  # [B][M]
    depths: list[list[int]]  # [B][M]
    best: list[list[list[int]]] | None = None  # [B][T][M]
    held: list[list[float]] | None = None  # [B][T]


class Runner:
    """A model, its KV cache and B rows, on one lane. Methods run on that lane's thread; lists in, lists out.

    k is the most draft tokens a round; branches 0 for a model that only verifies; coupling as in sampling.COUPLINGS;
    vocab the target's vocabulary, where a draft's embedding is padded to another size.
    """

    def __init__(
        self, model: Transformer, batch: int, trunk: int, k: int, branches: int, policy: Policy, vocab: int = 0
    ):
        weight = model.embed.weight
        self.vocab = vocab or model.config.vocab_size
        self.model, self.k, self.branches, self.policy = model, k, branches, policy
        self.device, self.batch = weight.device, batch
        self.cache = KVCache(model.config, batch, trunk, branches, k, device=weight.device, dtype=weight.dtype)
        model.set_positions(trunk + 2 * k)
        self.noise_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.params: Params | None = None
        self.coupling, self.saguaro_c = "shared", 1.0
        self.steps: dict = {}
        self.warm: tuple | None = None  # what the compiled and captured steps were made for
        self.pool = policy.new_pool()
        self.noisy, self.gumbel = policy.fuse(noisy), policy.fuse(gumbel)

    def set_rows(self, params: Params, coupling: str, saguaro_c: float) -> None:
        """How the rows of this run sample. Static policies keep the tensors, so that graphs read the new values."""
        same = self.params is not None and self.policy.static and self.coupling == coupling
        if same and self.params[6:] == params[6:] and self.saguaro_c == saguaro_c:
            for old, new in zip(self.params[:6], params[:6]):
                old.copy_(new)
            return
        self.params, self.coupling, self.saguaro_c = params, coupling, saguaro_c
        self.steps, self.warm, self.pool = {}, None, self.policy.new_pool()

    def warm_up(self, role: str, lengths: list[int], budgets: tuple[int, ...] = ()) -> bool:
        """Static policies: compile and capture every step of a role before it counts, on rows that leave no trace.

        lengths: how many tokens a verification or extend may be fed; budgets: how many branches there may be.
        """
        shapes = (role, *lengths, *budgets)
        if not self.policy.static or self.warm == shapes:
            return False
        self.policy.enter_thread()
        B, feeds = self.batch, {}
        for t in (1, 2, *lengths, *PREFILL_CHUNKS):
            feeds[t] = Feed([[0] * t] * B, [0] * B, [0] * B)
        for t in PREFILL_CHUNKS:
            self._call("prefill", self._prefill, feeds[t])
        for T in lengths if role == "target" else ():
            self.verify(feeds[T], [0] * B, [None] * B)
        for T in (2, 1) if role == "draft" else ():
            self.decode(feeds[T], None)
        for T in lengths if role == "draft" and self.branches else ():
            for M in budgets:
                fan_out = ByScores(M) if self.coupling == "shared" else [[M]] * B
                forked = self.fork(self.extend(feeds[T]), feeds[T], fan_out)
                self.chain_step(feeds[T], forked.tokens, forked.depths, 0, None)
        self.warm = shapes
        return True

    # ---- target

    def prefill(self, ids: list[list[int]], start: list[int]) -> None:
        """Read ids[b] into row b's trunk from position start[b] on; no logits."""
        done = 0
        longest = max(map(len, ids))
        while done < longest:
            left = longest - done
            T = next((c for c in PREFILL_CHUNKS if c >= left), PREFILL_CHUNKS[-1])
            T = T if self.policy.static else min(T, left)
            fed = [row[done : done + T] for row in ids]
            tokens = [row + [0] * (T - len(row)) for row in fed]
            begins = [b + done for b in start]
            self._call("prefill", self._prefill, Feed(tokens, begins, list(map(len, fed))))
            done += T

    def verify(self, feed: Feed, kind: list[int], logq: list) -> tuple[list[int], list[int]]:
        """One target pass over every row's proposal. -> how many draft tokens hold [B], the next token [B].

        logq[b]: for a CHAIN the log q (V,) that each of its tokens was drawn from, unless the coupling is `shared`.
        """
        K, V, extra = len(feed.tokens[0]) - 1, self.vocab, ()
        if self.coupling != "shared" and K:
            logq_BKV = torch.zeros(self.batch, K, V, dtype=self.noise_dtype, device=self.device)
            for b, rows in enumerate(logq):
                for i, logq_V in enumerate((rows or ())[: feed.count[b] - 1]):
                    logq_BKV[b, i].copy_(logq_V, non_blocking=True)
            extra = (logq_BKV,)
        accepted, following = self.policy.read(self._call("verify", self._verify, feed, kind, *extra))
        return accepted, following

    def _prefill(self, packed, extent, tight):
        tokens_BT, start_B, count_B = _unpack(packed, 2)
        place = self.cache.place(start_B, count_B, tokens_BT.shape[1], extent, tight)
        self._logits(tokens_BT, place, False)
        return start_B

    def _verify(self, packed, logq_BKV=None, *, extent, tight):
        tokens_BT, start_B, count_B, kind_B = _unpack(packed, 3)
        warped_BTV = self._warped(tokens_BT, start_B, count_B, extent, tight)
        length_B = (count_B - 1).clamp(min=0)
        if self.coupling == "shared":
            draws_BT = self.noisy(warped_BTV, self.params, self._predicted(start_B, tokens_BT.shape[1])).argmax(-1)
            return torch.stack(accept_shared(draws_BT, tokens_BT[:, 1:], length_B))
        if logq_BKV is None:  # nothing was drafted: an ordinary draw
            draws_BT = self.noisy(warped_BTV[:, :1], self.params, start_B[:, None] + 1).argmax(-1)
            return torch.stack((torch.zeros_like(draws_BT[:, 0]), draws_BT[:, 0]))
        drafted_BK, first_B = tokens_BT[:, 1:], start_B + 1
        return torch.stack(accept_exact(warped_BTV, logq_BKV, drafted_BK, length_B, kind_B, self.params, first_B))

    # ---- draft

    def extend(self, feed: Feed) -> torch.Tensor:
        """One causal pass over [r, d_1 .. d_L]: repairs the trunk and returns the scores (B, T, V) to fork by."""
        return self._call("extend", self._extend, feed)[0]

    def fork(self, scores_BTV, feed: Feed, fan_out: ByScores | list[list[int]]) -> Forked:
        """The M outcomes to prepare for: by scores the likeliest of all (coupling `shared` only), or with lists, one
        F_0..F_L for each row, the best F_j tokens of every j."""
        if isinstance(fan_out, ByScores):
            M, plan = fan_out.budget, [[round(1000 * fan_out.stray)]] * self.batch  # all numbers are whole
            name, work = f"fork {M}", self._fork_by_scores
        else:
            M, name, work = sum(fan_out[0]), "fork by lists", self._fork_by_lists
            depths = [[j for j, F in enumerate(row) for _ in range(F)] for row in fan_out]
            plan = [depth + [rank for F in row for rank in range(F)] for depth, row in zip(depths, fan_out)]
        packed = self.policy.send([t + row + [c] for t, row, c in zip(feed.tokens, plan, feed.count)])
        rows = self._read(self._step(name, work, packed, scores_BTV, budget=M))
        tokens = [row[:M] for row in rows]
        if isinstance(fan_out, ByScores):
            held = [[x / 1000 for x in row[2 * M :]] for row in rows]
            return Forked(tokens, [row[M : 2 * M] for row in rows], held=held)
        return Forked(tokens, depths, [[row[i : i + M] for i in range(M, len(row), M)] for row in rows])

    def chain_step(self, feed: Feed, tokens, depths, step: int, top: int | None):
        """Feed every branch its next token and draw one more. -> tokens [B][M], log q (B, M, V) or None.

        feed is the round's; branch m hangs off its trunk behind the depths[b][m]-th draft token. top: for Saguaro, how
        many of the likeliest tokens are weighed down.
        """
        length = [s + 1 for s in feed.start]
        rest = zip(length, feed.count)
        packed = self.policy.send([t + d + [n, c, step, top or 0] for t, d, (n, c) in zip(tokens, depths, rest)])
        if self.policy.static:
            limits = {"extent": self.cache.trunk, "tight": False, "steps": self.cache.steps, "places": self.k + 1}
        else:
            extent = max(n + max(d) for n, d in zip(length, depths))
            limits = {"extent": extent, "tight": True, "steps": step + 1, "places": 1 + max(map(max, depths))}
        drawn, *logq = self._step("chain", self._chain, packed, **limits)
        kept = self._kept(logq)  # before the wait: the other lane reads it without waiting for this one
        return self._read(drawn), kept

    def decode(self, feed: Feed, top: int | None) -> tuple[list[int], torch.Tensor | None]:
        """One ordinary step: feed the last tokens, draw the next. -> token [B], log q (B, V) or None."""
        drawn, *logq = self._call("decode", self._decode, feed, [top or 0] * self.batch)
        kept = self._kept([logq_B1V[:, 0] for logq_B1V in logq])
        return [row[0] for row in self._read(drawn)], kept

    def _extend(self, packed, extent, tight):
        tokens_BT, start_B, count_B = _unpack(packed, 2)
        T = tokens_BT.shape[1]
        scores_BTV = self._warped(tokens_BT, start_B, count_B, extent, tight, LEFT_OUT)
        at_BT = self._predicted(start_B, T)
        if self.coupling == "shared":
            scores_BTV = self.noisy(scores_BTV, self.params, at_BT, TOKEN)
        elif self.coupling == "maximal" and not self.params.greedy:
            # A rejected place draws with the residual's noise, the token after a whole proposal with the ordinary one.
            V, dtype = scores_BTV.shape[-1], scores_BTV.dtype
            token, residual = (self.gumbel(self.params, at_BT, use, V, dtype) for use in (TOKEN, RESIDUAL))
            last_BT1 = torch.arange(T, device=self.device)[:, None] >= (count_B - 1)[:, None, None]
            scores_BTV = scores_BTV + torch.where(last_BT1, token, residual)
        return (scores_BTV,)

    def _fork_by_scores(self, packed, scores_BTV, budget):
        tokens_BT, stray_B, count_B = _unpack(packed, 2)
        length_B, V = (count_B - 1).clamp(min=0), scores_BTV.shape[-1]
        joint_BTV, held_BT = outcomes(scores_BTV, tokens_BT.roll(-1, 1), length_B, stray_B / 1000)
        top = joint_BTV.flatten(1).topk(budget, -1)
        return _pack(top.values[:, :1], top.indices % V, top.indices // V, (1000 * held_BT).nan_to_num().long())

    def _fork_by_lists(self, packed, scores_BTV, budget):
        both, count_B = _unpack(packed, 1)
        T, M = scores_BTV.shape[1], budget
        tokens_BT, depth_BM, rank_BM = both.split((T, M, M), 1)
        # Had d_{j+1} been right, the outcome would not be j: it is never forked at j < L.
        drafted_BT1 = tokens_BT.roll(-1, 1)[..., None]
        tried_BT1 = torch.arange(T, device=self.device)[:, None] < (count_B - 1)[:, None, None]
        kept_BT1 = scores_BTV.gather(-1, drafted_BT1).masked_fill(tried_BT1, float("-inf"))
        top = scores_BTV.scatter(-1, drafted_BT1, kept_BT1).topk(M, -1)
        branch_BMM = top.indices.gather(1, depth_BM[..., None].expand(-1, -1, M))
        tokens_BM = branch_BMM.gather(-1, rank_BM[..., None])[..., 0]
        return _pack(top.values[..., 0], tokens_BM, top.indices)

    def _chain(self, packed, extent, tight, steps, places):
        both, length_B, count_B, step_B, top_B = _unpack(packed, 4)
        tokens_BM, depth_BM = both.chunk(2, 1)
        place = self.cache.place_chain(length_B, depth_BM, step_B, count_B > 0, extent, tight, steps)
        warped_BMV = warp(self._logits(tokens_BM, place), self.params)
        noise_BMV = None
        if not self.params.greedy:  # many branches share few positions: hash each position once
            V, at_BT = warped_BMV.shape[-1], self._predicted(length_B + step_B, places)
            noise_BTV = self.gumbel(self.params, at_BT, TOKEN, V, warped_BMV.dtype)
            noise_BMV = noise_BTV.gather(1, depth_BM[..., None].expand(-1, -1, V))
        return self._draft_draw(warped_BMV, noise_BMV, top_B)

    def _decode(self, packed, extent, tight):
        tokens_BT, start_B, count_B, top_B = _unpack(packed, 3)
        warped_BTV = self._warped(tokens_BT, start_B, count_B, extent, tight)
        last_B11 = (count_B - 1).clamp(min=0)[:, None, None].expand(-1, 1, warped_BTV.shape[-1])
        warped_B1V, at_B1 = warped_BTV.gather(1, last_B11), (start_B + count_B)[:, None]
        noise = None
        if not self.params.greedy:
            noise = self.gumbel(self.params, at_B1, TOKEN, warped_B1V.shape[-1], warped_B1V.dtype)
        return self._draft_draw(warped_B1V, noise, top_B)

    def _draft_draw(self, warped, noise, top_B):
        """Draw from q, or Saguaro's q', with the shared noise: _pack of tokens, unless `shared` the log q too."""
        logq, loudest = None, None
        if self.coupling != "shared":
            loudest = warped.amax(-1)  # a greedy row's log q is finite whatever the logits are
            warped = logq = log_probs(warped, self.params)
            if self.saguaro_c < 1:
                warped = logq = saguaro(logq, self.params, top_B[:, None].expand(logq.shape[:2]), self.saguaro_c)
        best = (warped if noise is None else warped + noise).max(-1)
        drawn = _pack(best.values if logq is None else loudest, best.indices)
        return (drawn,) if logq is None else (drawn, logq)

    # ---- helpers

    def _warped(self, tokens_BT, start_B, count_B, extent, tight, penalty=float("-inf")):
        place = self.cache.place(start_B, count_B, tokens_BT.shape[1], extent, tight)
        return warp(self._logits(tokens_BT, place), self.params, penalty)

    def _logits(self, tokens_BT, place, logits: bool = True):
        """The model's logits over the target's vocabulary: tokens that a draft does not know have probability 0."""
        own = self.model.config.vocab_size
        if self.vocab == own:
            return self.model(tokens_BT, place, self.cache, logits)
        out = self.model(tokens_BT.clamp(max=own - 1), place, self.cache, logits)
        return F.pad(out, (0, self.vocab - own), value=float("-inf")) if logits else None

    def _predicted(self, start_B, T: int):
        """The positions (B, T) that are predicted when T tokens are fed from start_B on."""
        return start_B[:, None] + 1 + torch.arange(T, device=start_B.device)

    def _read(self, packed: torch.Tensor) -> list[list[int]]:
        """The numbers of _pack, a list for each row."""
        rows = self.policy.read(packed)
        if not all(row.pop() for row in rows):
            raise ValueError("the draft's logits are not finite numbers")
        return rows

    def _kept(self, logq: list[torch.Tensor]) -> torch.Tensor | None:
        """An optional output that outlives the next step: a graph would overwrite it."""
        return None if not logq else logq[0].clone() if self.policy.graphs else logq[0]

    def _call(self, name: str, work, feed: Feed, *rest):
        """Run a pass over trunk tokens; lists among `rest` have one value a row. All whole numbers go as one tensor.

        Eager: read the KV cache only as far as the longest row reaches.
        """
        if self.policy.static:
            limits = {"extent": self.cache.trunk, "tight": False}
        else:
            limits = {"extent": max(1, *(s + c for s, c in zip(feed.start, feed.count))), "tight": True}
        columns = [feed.start, feed.count, *(x for x in rest if isinstance(x, list))]
        packed = self.policy.send([row + list(numbers) for row, numbers in zip(feed.tokens, zip(*columns))])
        return self._step(name, work, packed, *(x for x in rest if not isinstance(x, list)), **limits)

    def _step(self, name: str, work, *args, **limits):
        if not self.policy.graphs:
            return work(*args, **limits)
        key = (name, *(arg.shape for arg in args))
        if key not in self.steps:
            self.steps[key] = self.policy.step(lambda *tensors: work(*tensors, **limits), self.pool)
        return self.steps[key](*args)


def _unpack(packed: torch.Tensor, n: int) -> tuple[torch.Tensor, ...]:
    """(B, T + n) -> (B, T) and n columns (B,)."""
    return packed[:, :-n], *packed[:, -n:].unbind(1)


def _pack(best: torch.Tensor, *numbers: torch.Tensor) -> torch.Tensor:
    """(B, n): each row's numbers and, last, whether its best scores are finite: one copy brings all to the host."""
    sound_B1 = best.isfinite().all(-1, keepdim=True).long()
    return torch.cat([*(x.flatten(1) for x in numbers), sound_B1], 1)
