"""One forward pass and one draw, for the target and for the draft: all that runs on a device.

Knows: a model, its KV cache, and how its rows sample. Does not know: how rounds follow each
other, text, hits, how the other model computes. Read next: sampling.py.

Positions: a row of N tokens has its pending token at position N - 1. A pass that feeds
[r, d_1 .. d_L] from `start` = N - 1 on predicts positions N .. N + L, and the noise of a draw is
always that of the position it fills.

A draft may know fewer tokens than the target, or have a head for the most frequent ones alone. The
token ids that go in and out are the target's. Scores and log q are indexed by the model's own
tokens, V of them: ids_V[i] is the target's id of index i.

A target may be split over several processes, its ranks (parallel.py): each holds the logits of a
part of the vocabulary. A static model runs passes of fixed shapes that were compiled before the
first round, on CUDA as graphs; otherwise it is eager (runtime.Policy).

Shape letters: T positions fed, K draft tokens, M branches. B counts all places of the batch in a
list, and in a tensor those of the part that a pass runs on. The trunk is what the KV cache holds of
a row's text and proposal, one slot for each position; chains lie in the scratch after it.
"""

import functools
import struct
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch

from cache import KVCache
from model import Transformer
from runtime import Policy
from sampling import (
    TOKEN,
    Foresight,
    Params,
    accept_exact,
    accept_shared,
    bonus_noise,
    gumbel,
    highest,
    log_probs,
    noisy,
    outcomes,
    pick,
    saguaro,
    share_out,
    warp,
    within,
)

# Noise lies between -3 and 23. A token that the draft's top-k or top-p leaves out ranks below all
# that it keeps.
LEFT_OUT = -32.0
# Prompt tokens of a pass: few shapes, so that no length of a prompt compiles anything anew.
PREFILL_CHUNKS = (32, 256)


@dataclass
class Feed:
    """What one pass is fed, padded to T: in a round [r, d_1 .. d_L] of each row.

    start is the position of the first token, r; count is L + 1, and 0 for a row that is not fed.
    Lists have an entry for every place of the batch; tokens may also be the `Drawn` of the step
    before. A pass runs on the places in `part`; without one, see Runner.part_of.
    """

    tokens: list[list[int]]
    start: list[int]
    count: list[int]
    part: range | None = None


class Fork(NamedTuple):
    """Each row's branches, likeliest first, and the chance that the outcome is among them.

    None for places outside the feed's part.
    """

    tokens: list[list[int]]  # [B][M]
    depths: list[list[int]]  # [B][M], the j of each branch
    chance: list[float]  # [B]


class Runner:
    """A model, its KV cache and B places for rows, on one lane. Methods run on that lane's thread.

    Lists that they take and return have an entry for every place. A pass runs on a part of the
    batch, the places from the first that is fed to the last (part_of), on views of the cache. Lists
    that it returns hold None for other places, and tensors have the part's rows alone.

    role names the model in errors. k and branches are the most draft tokens and branches of a
    round (0 branches for a model that only verifies), vocab the size of the target's vocabulary.
    """

    def __init__(
        self,
        role: str,
        model: Transformer,
        batch: int,
        trunk: int,
        k: int,
        branches: int,
        policy: Policy,
        vocab: int,
    ):
        weight = model.norm.weight
        self.role, self.model, self.k, self.policy = role, model, k, policy
        self.device, self.batch, self.vocab = weight.device, batch, vocab
        self.cache = KVCache(
            model.config, batch, trunk, branches, k, device=weight.device, dtype=weight.dtype
        )
        model.set_positions(trunk + 2 * k)
        self.rope = model.rope  # captured graphs read these tables, whatever the model makes later
        self.group = model.group
        ids_V = model.token_ids_V
        if ids_V is None:  # tokens that the target does not have are never proposed
            ids_V = torch.arange(min(model.head.out_features, vocab), device=weight.device)
        self.own_V = self.ids_V = ids_V
        # This model's index of each of the target's tokens; len(ids_V) for one it cannot draw.
        self.index_of = torch.full((vocab,), len(ids_V), device=weight.device)
        self.index_of[ids_V] = torch.arange(len(ids_V), device=weight.device)
        self.noise_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.parts = [range(batch)]  # those that static steps exist for, the smallest first
        self.lengths: list[int] = []  # of a verification or extend, where steps are static
        self.how: tuple | None = None  # how the rows sample: coupling, saguaro_c, greedy, filtered
        self.run_number = 0  # counts the runs that used it

    def set_rows(self, params: Params, coupling: str, saguaro_c: float) -> None:
        """Set how the rows of this run sample, before the first pass. Static policies keep the
        tensors, so that graphs read the new values.

        by_draws: a draft token is accepted if it is the target's own draw, as under `shared`, and
        where all rows are greedy on several ranks. With several ranks each draws among its own
        tokens (apart), or rank 0 gathers the logits of all, where a draw needs them (gathers). With
        one rank apart and gathers are False.
        """
        several = self.group.ranks > 1
        self.by_draws = coupling == "shared" or (several and params.greedy)
        needs_all = not params.greedy and (coupling != "shared" or params.filtered)
        self.gathers, self.apart = several and needs_all, several and not needs_all
        if several:
            every = self.gathers and self.group.rank == 0
            self.ids_V = torch.arange(self.vocab, device=self.device) if every else self.own_V
        self.run_number += 1
        how = coupling, saguaro_c, *params.flags
        if self.policy.static and how == self.how:
            for old, new in zip(self.params.tensors, params.tensors):
                old.copy_(new)
            return
        self.params, self.how = params, how
        self.coupling, self.saguaro_c = coupling, saguaro_c
        self.words_V = self.ids_V.to(torch.int32)
        # What a part's steps need besides their numbers; the compiled and captured steps, what they
        # were made for, and the memory that they share.
        self.views, self.step_of, self.warm, self.pool = {}, {}, None, self.policy.new_pool()

    def seat(self, place: int, sampling: tuple, number: int) -> None:
        """Put the sequence of this number in this place: its temperature, top-k, top-p and
        seed. The tensors stay, since views and graphs read them; the flags greedy and filtered
        already cover all rows, those that wait included.
        """
        self.group.tell("seat", place, sampling, number)
        new = Params.make(*([value] for value in sampling), [number], self.device)
        for mine, its in zip(self.params.tensors, new.tensors):
            mine[place] = its[0]

    def warm_up(self, lengths: list[int], budgets: list[int], parts: list[range]) -> bool:
        """Compile and capture all static steps. Returns whether any was new.

        It runs on rows that write to the dead slot only (cache.py). lengths: the tokens that a
        verification or extend may be fed, the fewest first; budgets: the values of M; parts: the
        places that rounds are played with.
        """
        self.lengths, shapes = lengths, (lengths, budgets, parts)
        self.parts = sorted(parts, key=len)
        if not self.policy.static or self.warm == shapes:
            return False
        for part in parts:
            self._warm_up(part, lengths, budgets)
        self.warm = shapes
        return True

    def _warm_up(self, part: range, lengths, budgets) -> None:
        B = self.batch
        sizes = (1, 2, *lengths, *PREFILL_CHUNKS)
        feeds = {T: Feed([[0] * T] * B, [0] * B, [0] * B, part) for T in sizes}
        for T in PREFILL_CHUNKS:
            self._pass(self._prefill, feeds[T], tokens=feeds[T].tokens)
        if len(part) == 1 < B:
            return  # one place of many: a prompt is read there, no round is played
        if self.role == "target":
            for T in lengths:
                self.verify(feeds[T], [0] * B, [None] * B)
            return
        for T in (2, 1):
            self.decode(feeds[T], 0)
        for T in lengths:
            for m in budgets:
                fork = self.fork(self.extend(feeds[T]), feeds[T], m, Foresight())
                self.chain_step(feeds[T], fork.tokens, fork.depths, 0, 0)

    def part_of(self, feed: Feed) -> range:
        """The places that a pass runs on: from the first to the last that is fed, or the smallest
        part around them that is compiled.
        """
        if feed.part is not None:
            return feed.part
        fed = [b for b, count in enumerate(feed.count) if count]
        part = range(fed[0], fed[-1] + 1) if fed else range(self.batch)
        if not self.policy.static:
            return part
        rounds = [p for p in self.parts if len(p) > 1 or self.batch == 1]
        return next(p for p in rounds if p.start <= part.start and part.stop <= p.stop)

    def by_place(self, values: list, feed: Feed) -> list:
        """What a pass over `feed` gave, by place of the batch: None outside the feed's part."""
        part = self.part_of(feed)
        return [None] * part.start + values + [None] * (self.batch - part.stop)

    def fits(self, T: int) -> int:
        """The length to which a feed of T tokens is padded: T, or the next that is compiled."""
        return next(n for n in self.lengths if n >= T) if self.policy.static else T

    # ---- the prompt, by both models

    def prefill(self, ids: list[list[int]], start: list[int]) -> None:
        """Read ids[b] into row b's trunk from position start[b] on; no logits."""
        longest, most = max(map(len, ids)), PREFILL_CHUNKS[-1]
        asked = [range(b, b + 1) for b, row in enumerate(ids) if row]
        part = asked[0] if len(asked) == 1 and asked[0] in self.parts else None
        for done in range(0, longest, most):
            T = min(longest - done, most)
            if self.policy.static:
                T = next(chunk for chunk in PREFILL_CHUNKS if chunk >= T)
            fed = [row[done : done + T] for row in ids]
            tokens = [row + [0] * (T - len(row)) for row in fed]
            feed = Feed(tokens, [b + done for b in start], list(map(len, fed)), part)
            self._pass(self._prefill, feed, tokens=tokens)

    def _prefill(self, x, *, extent):
        self._forward(x, locate_trunk, extent, logits=False)
        return ()

    # ---- target

    def verify(self, feed: Feed, kind: list[int], logq: list) -> tuple[list[int], list[int]]:
        """The number of draft tokens accepted [B], and the bonus tokens [B]: one target pass.

        logq[b]: for a CHAIN each token's `LogQ`, except under `shared`; unused with by_draws.
        """
        K, tensors, part = len(feed.tokens[0]) - 1, (), self.part_of(feed)
        if not self.by_draws and K:
            shape = len(part), K, self.vocab
            logq_BKV = torch.full(shape, float("-inf"), dtype=self.noise_dtype, device=self.device)
            drawn = defaultdict(list)  # by the tokens that they are over: those of one model
            for at, b in enumerate(part):
                for i, q in enumerate((logq[b] or ())[: feed.count[b] - 1]):
                    drawn[q.ids_V].append((at, i, q.logq))
            for ids_V, draws in drawn.items():  # one copy for all of them: a GPU has many rows
                *at, logq_NV = zip(*draws)
                indices = (*torch.tensor(at)[..., None], ids_V.to(self.device))
                logq_BKV[indices] = torch.stack(logq_NV).to(logq_BKV)
            tensors = (logq_BKV,)
        (packed,) = self._pass(self._verify, feed, *tensors, tokens=feed.tokens, kind=kind)
        rows = self._read(self.policy.fetch(packed), feed)
        return [row and row[0] for row in rows], [row and row[1] for row in rows]

    def _verify(self, x, logq_BKV=None, *, extent):
        logits_BTV = self._logits(x, locate_trunk, extent)
        return (self.policy.fuse(decide)(logits_BTV, logq_BKV, x),)

    # ---- draft

    def extend(self, feed: Feed) -> torch.Tensor:
        """The scores (B, T, V) to fork by: one causal pass over [r, d_1 .. d_L] on the trunk. Index
        b is the b-th place of part_of(feed).

        It overwrites whatever keys and values the last round left there.
        """
        return self._pass(self._extend, feed, tokens=feed.tokens)[0]

    def fork(self, scores_BTV, feed: Feed, m: int, foresight: Foresight) -> Fork:
        """The m likeliest outcomes of the round, for each row.

        Under `shared` they are the likeliest of all. Otherwise each j has its share of m, since
        there the look-up must not depend on how a later position was drawn.
        """
        B = self.batch
        T = len(feed.tokens[0])
        # Proposals of the same length split the budget the same way.
        shares = {n: share_out(foresight.hold, max(n - 1, 0), m) for n in set(feed.count)}
        columns = dict(
            tokens=feed.tokens,
            count=feed.count,
            spread=[_bits_of(foresight.spread)] * B,
            hold=[_bits_of(foresight.hold)] * B,
            share=[shares[n] + [0] * (T - len(shares[n])) for n in feed.count],
        )
        packed = self._step(self._fork, columns, scores_BTV, feed=feed, m=m)[0]
        rows = self._read(self.policy.fetch(packed), feed)
        tokens, depths = [row and row[:m] for row in rows], [row and row[m:-1] for row in rows]
        return Fork(tokens, depths, [row and _float_of(row[-1]) for row in rows])

    def chain_step(self, feed: Feed, tokens, depths, step: int, top: int):
        """The next token of every branch, [B][M], and their LogQ, (M, V) by place; None under
        `shared`.

        tokens are what the branches are fed, and feed is the round's. Branch i sees the trunk up to
        the depths[b][i]-th draft token, its own r' and its own chain; the keys of these last two
        lie in the scratch, the slots after the trunk (KVCache.locate_chain).
        top: how many of the likeliest tokens Saguaro makes less likely.
        """
        B, known, part = self.batch, [s + 1 for s in feed.start], self.part_of(feed)
        extent, steps, positions = self.cache.trunk, self.k, self.k + 1
        if not self.policy.static:
            extent, steps = max(known[b] + max(depths[b]) for b in part), step + 1
            positions = 1 + max(max(depths[b]) for b in part)
        limits = {"extent": extent, "steps": steps, "positions": positions}
        columns = dict(
            depths=depths,
            known=known,
            count=feed.count,
            step=[step] * B,
            top=[top] * B,
        )
        fed_BM = self._on_device(tokens, part)
        packed, *logq = self._step(self._chain_step, columns, fed_BM, feed=feed, **limits)
        return self._drawn(packed, logq, feed, tokens)

    def decode(self, feed: Feed, top: int):
        """The next token of each row, [B][1], and their LogQ, (1, V) by place, or None: an ordinary
        step. feed.tokens may be what the step before has returned.
        """
        fed_BT = self._on_device(feed.tokens, self.part_of(feed))
        packed, *logq = self._pass(self._decode, feed, fed_BT, top=[top] * self.batch)
        return self._drawn(packed, logq, feed, feed.tokens)

    def _extend(self, x, *, extent):
        return (self.policy.fuse(score)(self._logits(x, locate_trunk, extent), x),)

    def _fork(self, x, scores_BTV, *, m):
        x.spread, x.hold = x.spread.view(torch.float64), x.hold.view(torch.float64)
        return (self.policy.fuse(likeliest)(scores_BTV, x, m),)

    def _chain_step(self, x, fed_BM, *, extent, steps, positions):
        x.tokens = fed_BM
        logits_BMV = self._logits(x, locate_chains, extent, steps)
        return self.policy.fuse(draw_chain)(logits_BMV, x, positions)

    def _decode(self, x, fed_BT, *, extent):
        x.tokens = fed_BT
        return self.policy.fuse(draw_next)(self._logits(x, locate_trunk, extent), x)

    # ---- helpers

    def _logits(self, x, locate, *limits):
        """The logits after x.tokens, over this model's own tokens, or all where rank 0 gathers."""
        logits = self._forward(x, locate, *limits)[..., : len(self.own_V)]
        return self.group.whole(logits, self.vocab) if self.gathers else logits

    def _forward(self, x, locate, *limits, logits: bool = True):
        """What the model returns for x.tokens. `locate` finds the slots of their keys and values.

        A token that the draft's embedding does not have becomes its last one.
        """
        where = self.policy.fuse(locate)(x, *limits)
        tokens_BT, most = x.tokens, self.model.config.vocab_size
        if most < self.vocab:
            tokens_BT = tokens_BT.clamp(max=most - 1)
        return self.model(tokens_BT, where, x.cache, logits)

    def _read(self, fetched: tuple, feed: Feed) -> list[list[int] | None]:
        """The columns that _join packed, in one list for each row, None outside the feed's part."""
        rows = self.policy.read(fetched)
        if not all(row[0] for row in rows):
            raise ValueError(
                f"the {self.role}'s logits are not finite numbers: use another checkpoint or dtype"
            )
        return self.by_place([row[1:] for row in rows], feed)

    def _on_device(self, tokens, part: range) -> torch.Tensor:
        """The tokens that a draft's step is fed: those that the step before draws, or lists."""
        if isinstance(tokens, Drawn):
            return tokens.on_device
        return self.policy.send(tokens[part.start : part.stop])

    def _drawn(self, packed, logq: list[torch.Tensor], feed: Feed, before) -> tuple:
        """The tokens [B][M] that a step draws, and their LogQ or None.

        A captured step has only been launched. The host is at most one step ahead, since a launched
        step cannot be cancelled.
        """
        own = None
        if logq:  # before the fetch, so that it is ready once the tokens are
            # A clone of a graph's output, which the next step would overwrite.
            logq_BTV = logq[0].clone() if self.policy.graphs else logq[0]
            own = LogQ(self.ids_V, dict(zip(self.part_of(feed), logq_BTV)))
        fetched = self.policy.fetch(packed)
        tokens = Drawn(packed[:, 1:], lambda: self._read(fetched, feed))
        if isinstance(before, Drawn):
            before.read()
        return tokens if self.policy.graphs else tokens.read(), own

    def _pass(self, work, feed: Feed, *tensors, **columns):
        """What `work` returns for a pass over trunk tokens.

        An eager pass reads the KV cache only as far as the longest row reaches.
        """
        extent = self.cache.trunk
        if not self.policy.static:
            extent = max(1, *(s + c for s, c in zip(feed.start, feed.count)))
        columns = dict(start=feed.start, count=feed.count, **columns)
        return self._step(work, columns, *tensors, feed=feed, extent=extent)

    def _step(self, work, columns: dict[str, list], *tensors, feed: Feed, **static):
        """What work(named numbers, *tensors, **static) returns, for the places of the feed.

        The named numbers share a namespace with what _besides(part) returns. On CUDA each
        combination of step, part, shapes and `static` is one graph. A single place's prompt is read
        without one, since every place would need its own.
        """
        part = self.part_of(feed)
        numbers, layout = _pack(
            {name: values[part.start : part.stop] for name, values in columns.items()}
        )
        with self.group.guard():
            self.group.tell("run", work.__name__, numbers, layout, part, static)
            return self.run(work.__name__, numbers, layout, part, static, *tensors)

    def run(self, name: str, numbers: list, layout: tuple, part: range, static: dict, *tensors):
        """_step of packed numbers: all ranks run it alike."""
        work = getattr(self, name)
        packed = self.policy.send(numbers)
        besides = self._besides(part)

        def fixed(packed, *tensors):
            return work(_views(packed, layout, besides), *tensors, **static)

        if not self.policy.static:
            return fixed(packed, *tensors)
        with self.policy.alone():
            if len(part) == 1 < self.batch:
                self.policy.enter_thread()
                return fixed(packed.to(self.device), *tensors)
            key = (name, layout, part, *(x.shape for x in tensors), *static.values())
            if key not in self.step_of:
                self.policy.enter_thread()
                self.step_of[key] = self.policy.step(fixed, self.pool)
            return self.step_of[key](packed, *tensors)

    def _besides(self, part: range) -> dict:
        """What the steps of these places need besides their numbers: views of the memory of all,
        and what the whole run has in common.
        """
        if part not in self.views:
            self.views[part] = dict(
                cache=self.cache.narrow(part),
                # A static runner serves many runs, and one that failed may have left NaN there.
                tight=not self.policy.static,
                params=self.params.narrow(part),
                ids_V=self.ids_V,
                words_V=self.words_V,
                index_of=self.index_of,
                coupling=self.coupling,
                saguaro_c=self.saguaro_c,
                apart=self.group if self.apart else None,
            )
        return self.views[part]


# ---- what runs before and after a model's layers: on a GPU each of these is a few kernels
# x is the namespace that _views makes of a step: its columns, int64 (B,) or (B, width), and what
# Runner._besides lists.


def locate_trunk(x, extent: int):
    """Where the tokens of x sit on the trunk."""
    return x.cache.locate(x.start, x.count, x.tokens.shape[1], extent, x.tight)


def locate_chains(x, extent: int, steps: int):
    """Where the tokens of a chain step sit."""
    return x.cache.locate_chain(x.known, x.depths, x.step, x.count > 0, extent, x.tight, steps)


def decide(logits_BTV, logq_BKV, x) -> torch.Tensor:
    """What a verification of x decides, for _read: accepted tokens and bonus tokens, (B,) each.

    logq_BKV is None where the target's own draws decide (by_draws), or if nothing was proposed.
    """
    warped_BTV, tokens_BK = warp(logits_BTV, x.params), x.tokens[:, 1:]
    length_B = x.count - 1  # -1 for a row that is not fed: it accepts nothing
    if logq_BKV is None:
        best_BT, draws_BT = highest(noisy(warped_BTV, x.params, predicted_by(x), x.words_V))
        if x.apart is not None:
            best_BT, draws_BT = x.apart.best(best_BT, x.ids_V[draws_BT])
        return _join(best_BT, *accept_shared(draws_BT, tokens_BK, length_B))
    decided = accept_exact(warped_BTV, logq_BKV, tokens_BK, length_B, x.kind, x.params, x.start + 1)
    return _join(warped_BTV.amax(-1), *decided)


def score(logits_BTV, x) -> torch.Tensor:
    """The scores (B, T, V) to fork by: log q plus the noise that will draw the bonus token, unless
    the coupling is `independent`.
    """
    scores_BTV, at_BT = warp(logits_BTV, x.params, LEFT_OUT), predicted_by(x)
    if x.coupling == "shared":
        return noisy(scores_BTV, x.params, at_BT, x.words_V)
    if x.coupling == "independent" or x.params.greedy:
        return scores_BTV
    rejected_BT = at_BT < (x.start + x.count)[:, None]
    return scores_BTV + bonus_noise(x.params, at_BT, rejected_BT, x.words_V, scores_BTV.dtype)


def likeliest(scores_BTV, x, m: int) -> torch.Tensor:
    """The m likeliest outcomes of each row, for _read: tokens, depths, and the chance of a hit."""
    V, dtype = scores_BTV.shape[-1], scores_BTV.dtype
    hold_B = None if x.coupling == "shared" else x.hold.to(dtype)
    drafted_BT = x.index_of[x.tokens.roll(-1, 1)]
    length_B = (x.count - 1).clamp(min=0)
    spread_B = x.spread.to(dtype)
    joint_BTV = outcomes(scores_BTV, drafted_BT, length_B, spread_B, hold_B)
    if hold_B is not None:
        joint_BTV = within(joint_BTV, x.share, m)
    top = joint_BTV.flatten(1).topk(m, -1)
    chance_B = top.values.exp().sum(-1)
    bits_B = chance_B.double().view(torch.int64)
    return _join(top.values[:, :1], x.ids_V[top.indices % V], top.indices // V, bits_B)


def draw_chain(logits_BMV, x, positions: int) -> tuple:
    """The next token of each branch, each for one of the `positions` positions from
    known + step + 1 on.

    Many branches share few positions: noise is hashed once for each of those.
    """
    return draw(logits_BMV, x, predicted(x.known + x.step, positions), x.depths)


def draw_next(logits_BTV, x) -> tuple:
    """The token after the last one of each row."""
    logits_B1V = pick(logits_BTV, (x.count - 1).clamp(min=0)[:, None])
    return draw(logits_B1V, x, (x.start + x.count)[:, None], None)


def draw(logits_BTV, x, at_BP, which_BT) -> tuple:
    """Tokens (B, T) drawn from q, or Saguaro's q', for _read; and, unless `shared`, the log q
    that they were drawn from, (B, T, V).

    at_BP are the positions that are drawn for. which_BT is the index in at_BP of each draw's
    position; with None draw i is for at_BP[:, i].
    """
    warped_BTV = scores_BTV = warp(logits_BTV, x.params)
    logq = ()
    if x.coupling != "shared":
        scores_BTV = log_probs(warped_BTV, x.params)
        if x.saguaro_c < 1:
            scores_BTV = saguaro(scores_BTV, x.params, x.top[:, None], x.saguaro_c)
        logq = (scores_BTV,)
    if not x.params.greedy:
        noise_BTV = gumbel(x.params, at_BP, TOKEN, x.words_V, scores_BTV.dtype)  # as in noisy
        if which_BT is not None:
            noise_BTV = pick(noise_BTV, which_BT)
        scores_BTV = scores_BTV + noise_BTV
    best_BT, drawn_BT = highest(scores_BTV)
    # A greedy row's best log q is 0 even if its logits are NaN: it is the logits that are checked.
    return _join(warped_BTV.amax(-1) if logq else best_BT, x.ids_V[drawn_BT]), *logq


def predicted_by(x) -> torch.Tensor:
    """The positions (B, T) that a pass over the trunk predicts."""
    return predicted(x.start, x.tokens.shape[1])


def predicted(start_B: torch.Tensor, T: int) -> torch.Tensor:
    """The positions (B, T) that are predicted when T tokens are fed from start_B on."""
    return start_B[:, None] + 1 + torch.arange(T, device=start_B.device)


class Drawn:
    """Tokens [B][M] that a step draws. A captured step's stay on the device for the next one (those
    of the feed's part); reading them on the host waits for them.
    """

    def __init__(self, on_device: torch.Tensor, read: Callable[[], list]):
        self.on_device, self.read = on_device, functools.cache(read)

    def __getitem__(self, place):
        return self.read()[place]


class LogQ(NamedTuple):
    """The log q that tokens were drawn from, over the tokens ids_V of the model that drew them."""

    ids_V: torch.Tensor
    logq: torch.Tensor | dict[int, torch.Tensor]  # (V,) of one draw; or by place, (draws, V)

    def of(self, place: int, draw: int) -> "LogQ":
        """One draw of many."""
        return LogQ(self.ids_V, self.logq[place][draw])


# All numbers of a step travel in one int64 tensor with a row for each row of the batch: one copy to
# the device, one back. A float64 is 64 bits as well.


def _pack(columns: dict[str, list]) -> tuple[list[list[int]], tuple]:
    """Rows of whole numbers, and their layout, from named columns: one number or one list a row.

    The layout is each column's name, and its width or None.
    """
    layout, parts = [], []
    for name, values in columns.items():
        wide = type(values[0]) is list
        layout.append((name, len(values[0]) if wide else None))
        parts.append(values if wide else [[x] for x in values])
    return [sum(row, []) for row in zip(*parts)], tuple(layout)


def _views(packed: torch.Tensor, layout: tuple, besides: dict) -> SimpleNamespace:
    """The columns of _pack again, as views: (B, width), or (B,) for one number a row."""
    out, at = SimpleNamespace(**besides), 0
    for name, width in layout:
        setattr(out, name, packed[:, at] if width is None else packed[:, at : at + width])
        at += width or 1
    return out


def _join(best: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
    """(B, n): whether each row's best scores are finite, then the columns. Read by Runner._read."""
    sound_B1 = best.isfinite().all(-1, keepdim=True).long()
    return torch.cat([sound_B1, *(x.reshape(len(x), -1) for x in columns)], 1)


def _bits_of(x: float) -> int:
    return struct.unpack("q", struct.pack("d", x))[0]


def _float_of(bits: int) -> float:
    return struct.unpack("d", struct.pack("q", bits))[0]
