"""One forward pass and one draw, for the target and for the draft: all that runs on a device.

Knows: a model, its KV cache, and how its rows sample. Does not know: rounds, texts, hits, what the
other model does. Read next: sampling.py.

Positions: a row of N tokens has its pending token at position N - 1. A pass that feeds
[r, d_1 .. d_L] from `start` = N - 1 on predicts positions N .. N + L, and the noise of a draw is
always that of the position it fills.

A draft may know fewer tokens than the target, or have a head that was cut to the likeliest ones. It
works in its own vocabulary throughout. Only token ids go in and out, and those are the target's.

Shape letters: B rows, T positions fed, K draft tokens, M branches, V the model's own vocabulary.
"""

import struct
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch

from cache import KVCache
from model import Transformer
from runtime import Policy
from sampling import (
    RESIDUAL,
    TOKEN,
    Foresight,
    Params,
    accept_exact,
    accept_shared,
    gumbel,
    log_probs,
    noisy,
    outcomes,
    saguaro,
    share_out,
    warp,
    within,
)

# Noise lies between -3 and 23. A token that the draft's top-k or top-p leaves out is forked after
# all that it keeps.
LEFT_OUT = -32.0
# Prompt tokens of a pass: few shapes, so that the length of a prompt never compiles anything anew.
PREFILL_CHUNKS = (32, 256)


@dataclass
class Feed:
    """What a model is fed in a round: [r, d_1 .. d_L] of each row, padded to T.

    start is the position of r; count is L + 1, and 0 for a row that takes no part. Lists have an
    entry for every place of the batch. A pass runs on the places in `part`, by default from the
    first to the last that is fed.
    """

    tokens: list[list[int]]
    start: list[int]
    count: list[int]
    part: range | None = None


class Fork(NamedTuple):
    """Each row's branches, likeliest first, and the chance that the outcome is among them.

    None for rows that took no part.
    """

    tokens: list[list[int]]  # [B][M]
    depths: list[list[int]]  # [B][M], the j of each branch
    chance: list[float]  # [B]


class Runner:
    """A model, its KV cache and B places for rows, on one lane. Methods run on that lane's thread,
    and take and return lists with an entry for every place. A pass runs on the places that are fed
    and those between them, as views of the cache, and leaves None for the others.

    role names the model in errors. k is the most draft tokens of a round, branches the most
    branches (0 for a model that only verifies), vocab the size of the target's vocabulary.
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
        weight = model.embed.weight
        self.role, self.model, self.k, self.policy = role, model, k, policy
        self.device, self.batch, self.vocab = weight.device, batch, vocab
        self.branches = branches
        self.cache = KVCache(
            model.config, batch, trunk, branches, k, device=weight.device, dtype=weight.dtype
        )
        model.set_positions(trunk + 2 * k)
        self.rope = model.rope  # captured graphs read these tables, whatever the model makes later
        self.group, ids_V = model.group, model.token_ids_V
        if ids_V is None:  # tokens that the target does not have are never proposed
            ids_V = torch.arange(min(model.head.out_features, vocab), device=weight.device)
        self.own_V = self.ids_V = ids_V
        self.words_V = ids_V.to(torch.int32)
        # This model's index of each of the target's tokens; len(ids_V) for one it cannot draw.
        self.index_of = torch.full((vocab,), len(ids_V), device=weight.device)
        self.index_of[ids_V] = torch.arange(len(ids_V), device=weight.device)
        self.noise_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.parts = [range(batch)]  # that static steps exist for, the smallest first
        self.views: dict[range, tuple] = {}  # the cache and params of a part
        self.params: Params | None = None
        self.coupling, self.saguaro_c = "shared", 1.0
        self.by_draws, self.gathers, self.apart = True, False, False  # as set_rows decides
        self.lengths: list[int] = []  # of verifications and extends, where steps are static
        self.step_of: dict = {}
        self.warm: tuple | None = None  # what the compiled and captured steps were made for
        self.pool = policy.new_pool()
        self.noisy, self.gumbel = policy.fuse(noisy), policy.fuse(gumbel)

    def set_rows(self, params: Params, coupling: str, saguaro_c: float) -> None:
        """Take over how the rows of this run sample. Static policies keep the tensors, so that
        graphs read the new values.

        by_draws: a draft token is accepted if it is the target's own draw. Several ranks draw
        apart, each among its own tokens, unless that needs all logits: then rank 0 gathers them.
        """
        several = self.group.ranks > 1
        self.by_draws = coupling == "shared" or (several and params.greedy)
        needs_all = not params.greedy and (coupling != "shared" or params.filtered)
        self.gathers, self.apart = several and needs_all, several and not needs_all
        if several:
            every = self.gathers and self.group.rank == 0
            self.ids_V = torch.arange(self.vocab, device=self.device) if every else self.own_V
            self.words_V = self.ids_V.to(torch.int32)
        same = self.params is not None and self.policy.static and self.coupling == coupling
        if same and self.params[6:] == params[6:] and self.saguaro_c == saguaro_c:
            for old, new in zip(self.params[:6], params[:6]):
                old.copy_(new)
            return
        self.params, self.coupling, self.saguaro_c = params, coupling, saguaro_c
        self.views, self.step_of, self.warm, self.pool = {}, {}, None, self.policy.new_pool()

    def seat(self, place: int, sampling: tuple, number: int) -> None:
        """Let another row, of this number, sample in this place: its temperature, top-k, top-p and
        seed. The tensors stay, since views and graphs read them.
        """
        self.group.tell("seat", place, sampling, number)
        new = Params.make(*([value] for value in sampling), [number], self.device)
        for mine, its in zip(self.params[:6], new[:6]):
            mine[place] = its[0]

    def warm_up(self, lengths: list[int], budgets: list[int], parts: list[range]) -> bool:
        """Whether anything was compiled or captured: every static step is, before the run is timed.

        It runs on rows that leave no trace. lengths: how many tokens a verification or extend may
        be fed; budgets: how many branches there may be; parts: the places that rounds are played
        with. Of a part of one place only the prefill is needed: a prompt is read there.
        """
        self.lengths, shapes = sorted(lengths), (*lengths, -1, *budgets, *parts)
        self.parts = sorted(parts, key=len)
        if not self.policy.static or self.warm == shapes:
            return False
        for part in parts:
            self._warm_up(part, lengths, budgets, len(part) > 1 or self.batch == 1)
        self.warm = shapes
        return True

    def _warm_up(self, part: range, lengths, budgets, rounds: bool) -> None:
        B, feeds = self.batch, {}
        for T in (1, 2, *lengths, *PREFILL_CHUNKS):
            feeds[T] = Feed([[0] * T] * B, [0] * B, [0] * B, part)
        for T in PREFILL_CHUNKS:
            self._pass(self._prefill, feeds[T])
        if not rounds:
            return
        for T in lengths if self.role == "target" else ():
            self.verify(feeds[T], [0] * B, [None] * B)
        for T in (2, 1) if self.role == "draft" else ():
            self.decode(feeds[T], 0)
        for T in lengths if self.branches else ():
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

    def placed(self, values: list, feed: Feed) -> list:
        """What a pass over `feed` gave, one value for each place of the batch: None for those that
        took no part.
        """
        part = self.part_of(feed)
        return [None] * part.start + values + [None] * (self.batch - part.stop)

    def fits(self, T: int) -> int:
        """The length to which a feed of T tokens is padded: T, or the next that is compiled."""
        return next(n for n in self.lengths if n >= T) if self.policy.static else T

    # ---- the prompt, by both models

    def prefill(self, ids: list[list[int]], start: list[int]) -> None:
        """Read ids[b] into row b's trunk from position start[b] on; no logits."""
        done, longest = 0, max(map(len, ids))
        asked = [range(b, b + 1) for b, row in enumerate(ids) if row]
        part = asked[0] if len(asked) == 1 and asked[0] in self.parts else None
        while done < longest:
            left = longest - done
            T = next((c for c in PREFILL_CHUNKS if c >= left), PREFILL_CHUNKS[-1])
            T = T if self.policy.static else min(T, left)
            fed = [row[done : done + T] for row in ids]
            tokens = [row + [0] * (T - len(row)) for row in fed]
            at = [b + done for b in start]
            self._pass(self._prefill, Feed(tokens, at, list(map(len, fed)), part))
            done += T

    def _prefill(self, x, *, extent, tight):
        place = x.cache.place(x.start, x.count, x.tokens.shape[1], extent, tight)
        self.model(self._known(x.tokens), place, x.cache, False)
        return ()

    # ---- target

    def verify(self, feed: Feed, kind: list[int], logq: list) -> tuple[list[int], list[int]]:
        """How many draft tokens of each row hold [B], and the bonus tokens [B]: one target pass.

        logq[b]: for a CHAIN each token's `LogQ`, unless the coupling is `shared`.
        """
        K, tensors, part = len(feed.tokens[0]) - 1, (), self.part_of(feed)
        if not self.by_draws and K:
            logq_BKV = torch.full((len(part), K, self.vocab), float("-inf"), dtype=self.noise_dtype)
            logq_BKV = logq_BKV.to(self.device)
            for at, b in enumerate(part):
                for i, q in enumerate((logq[b] or ())[: feed.count[b] - 1]):
                    logq_BKV[at, i, q.ids_V.to(self.device)] = q.logq_V.to(
                        self.device, self.noise_dtype
                    )
            tensors = (logq_BKV,)
        (packed,) = self._pass(self._verify, feed, *tensors, kind=kind)
        read = self._read(packed, feed, accepted=int, bonus=int)
        return read.accepted, read.bonus

    def _verify(self, x, logq_BKV=None, *, extent, tight):
        warped_BTV = self._warped(x, extent, tight)
        length_B, first_B = (x.count - 1).clamp(min=0), x.start + 1
        if self.by_draws:
            at_BT = self._predicted(x.start, x.tokens.shape[1])
            best_BT, draws_BT = self.noisy(warped_BTV, x.params, at_BT, self.words_V).max(-1)
            if self.apart:
                best_BT, draws_BT = self.group.best(best_BT, self.ids_V[draws_BT])
            return (_join(best_BT, *accept_shared(draws_BT, x.tokens[:, 1:], length_B)),)
        if logq_BKV is None:  # nothing was drafted: an ordinary draw
            draws_B1 = self.noisy(
                warped_BTV[:, :1], x.params, first_B[:, None], self.words_V
            ).argmax(-1)
            return (_join(warped_BTV.amax(-1), torch.zeros_like(draws_B1), draws_B1),)
        decided = accept_exact(
            warped_BTV, logq_BKV, x.tokens[:, 1:], length_B, x.kind, x.params, first_B
        )
        return (_join(warped_BTV.amax(-1), *decided),)

    # ---- draft

    def extend(self, feed: Feed) -> torch.Tensor:
        """The scores (B, T, V) to fork by: one causal pass over [r, d_1 .. d_L] on the trunk.

        It writes the keys and values there anew, whatever the last round has left.
        """
        return self._pass(self._extend, feed)[0]

    def fork(self, scores_BTV, feed: Feed, m: int, foresight: Foresight) -> Fork:
        """The m likeliest outcomes of the round, for each row.

        Under `shared` they are the likeliest of all. Otherwise each j has its share of m, since
        there the look-up must not depend on how a later position was drawn.
        """
        B, T = self.batch, len(feed.tokens[0])
        # Proposals of the same length share their outcomes alike.
        shares = {n: share_out(foresight.hold, max(n - 1, 0), m) for n in set(feed.count)}
        columns = dict(
            tokens=feed.tokens,
            count=feed.count,
            spread=[foresight.spread] * B,
            hold=[foresight.hold] * B,
            share=[shares[n] + [0] * (T - len(shares[n])) for n in feed.count],
        )
        packed = self._step(self._fork, columns, scores_BTV, feed=feed, m=m)[0]
        read = self._read(packed, feed, tokens=m, depths=m, chance=float)
        return Fork(read.tokens, read.depths, read.chance)

    def chain_step(self, feed: Feed, tokens, depths, step: int, top: int):
        """The next token of every branch, [B][M], and their LogQ of (B, M, V) or None.

        tokens are what the branches are fed, and feed is the round's. Branch i sees the trunk up to
        the depths[b][i]-th draft token and its own chain, whose keys lie in the cache's scratch.
        top: for Saguaro, how many of the likeliest tokens are weighed down.
        """
        B, length, part = self.batch, [s + 1 for s in feed.start], self.part_of(feed)
        m = len(tokens[part.start])
        if self.policy.static:
            limits = {
                "extent": self.cache.trunk,
                "tight": False,
                "steps": self.cache.steps,
                "places": self.k + 1,
            }
        else:
            deepest = max(max(depths[b]) for b in part)
            extent = max(length[b] + max(depths[b]) for b in part)
            limits = {"extent": extent, "tight": True, "steps": step + 1, "places": 1 + deepest}
        columns = dict(
            tokens=tokens,
            depths=depths,
            length=length,
            count=feed.count,
            step=[step] * B,
            top=[top] * B,
        )
        packed, *logq = self._step(self._chain_step, columns, feed=feed, **limits)
        # Before _read waits: the other lane uses it without waiting for this one.
        own = self._own(logq, feed)
        return self._read(packed, feed, tokens=m).tokens, own

    def decode(self, feed: Feed, top: int):
        """The next token of each row [B] and their LogQ of (B, 1, V), or None: an ordinary step."""
        packed, *logq = self._pass(self._decode, feed, top=[top] * self.batch)
        own = self._own(logq, feed)
        return self._read(packed, feed, token=int).token, own

    def _extend(self, x, *, extent, tight):
        T = x.tokens.shape[1]
        scores_BTV = self._warped(x, extent, tight, LEFT_OUT)
        at_BT = self._predicted(x.start, T)
        if self.coupling == "shared":
            scores_BTV = self.noisy(scores_BTV, x.params, at_BT, self.words_V)
        elif self.coupling == "maximal" and not x.params.greedy:
            # A rejected place draws with the residual's noise, the token after a whole proposal
            # with the usual one.
            token, residual = (
                self.gumbel(x.params, at_BT, use, self.words_V, scores_BTV.dtype)
                for use in (TOKEN, RESIDUAL)
            )
            last_BT1 = torch.arange(T, device=self.device)[:, None] >= (x.count - 1)[:, None, None]
            scores_BTV = scores_BTV + torch.where(last_BT1, token, residual)
        return (scores_BTV,)

    def _fork(self, x, scores_BTV, *, m):
        V = scores_BTV.shape[-1]
        hold_B = None if self.coupling == "shared" else x.hold.to(scores_BTV.dtype)
        drafted_BT = self.index_of[x.tokens.roll(-1, 1)]
        length_B, spread_B = (x.count - 1).clamp(min=0), x.spread.to(scores_BTV.dtype)
        joint_BTV = outcomes(scores_BTV, drafted_BT, length_B, spread_B, hold_B)
        if hold_B is not None:
            joint_BTV = within(joint_BTV, x.share, m)
        top = joint_BTV.flatten(1).topk(m, -1)
        chance_B = top.values.exp().sum(-1)
        return (_join(top.values[:, :1], self.ids_V[top.indices % V], top.indices // V, chance_B),)

    def _chain_step(self, x, *, extent, tight, steps, places):
        place = x.cache.place_chain(x.length, x.depths, x.step, x.count > 0, extent, tight, steps)
        warped_BMV = warp(self._logits(x, place), x.params)
        noise_BMV = None
        if not x.params.greedy:  # many branches share few positions: hash each position once
            at_BT = self._predicted(x.length + x.step, places)
            noise_BTV = self.gumbel(x.params, at_BT, TOKEN, self.words_V, warped_BMV.dtype)
            noise_BMV = noise_BTV.gather(
                1, x.depths[..., None].expand(-1, -1, warped_BMV.shape[-1])
            )
        return self._draft_draw(warped_BMV, noise_BMV, x.top, x.params)

    def _decode(self, x, *, extent, tight):
        warped_BTV = self._warped(x, extent, tight)
        last_B11 = (x.count - 1).clamp(min=0)[:, None, None].expand(-1, 1, warped_BTV.shape[-1])
        warped_B1V, at_B1 = warped_BTV.gather(1, last_B11), (x.start + x.count)[:, None]
        noise = None
        if not x.params.greedy:
            noise = self.gumbel(x.params, at_B1, TOKEN, self.words_V, warped_B1V.dtype)
        return self._draft_draw(warped_B1V, noise, x.top, x.params)

    def _draft_draw(self, warped, noise, top_B, params):
        """Tokens drawn from q, or Saguaro's q', with this noise; unless `shared`, their log q."""
        # A greedy row's log q is finite whatever the logits are: look at the scores.
        loudest, logq = warped.amax(-1), None
        if self.coupling != "shared":
            warped = logq = log_probs(warped, params)
            if self.saguaro_c < 1:
                warped = logq = saguaro(
                    logq, params, top_B[:, None].expand(logq.shape[:2]), self.saguaro_c
                )
        drawn = self.ids_V[(warped if noise is None else warped + noise).argmax(-1)]
        return (_join(loudest, drawn),) if logq is None else (_join(loudest, drawn), logq)

    # ---- helpers

    def _warped(self, x, extent, tight, penalty=float("-inf")):
        place = x.cache.place(x.start, x.count, x.tokens.shape[1], extent, tight)
        return warp(self._logits(x, place), x.params, penalty)

    def _logits(self, x, place):
        logits = self.model(self._known(x.tokens), place, x.cache)[..., : len(self.own_V)]
        return self.group.whole(logits, self.vocab) if self.gathers else logits

    def _known(self, tokens_BT):
        """The tokens, but one that the draft's embedding does not have becomes its last one."""
        most = self.model.config.vocab_size
        return tokens_BT if most >= self.vocab else tokens_BT.clamp(max=most - 1)

    def _predicted(self, start_B, T: int):
        """The positions (B, T) that are predicted when T tokens are fed from start_B on."""
        return start_B[:, None] + 1 + torch.arange(T, device=start_B.device)

    def _read(self, packed: torch.Tensor, feed: Feed, **kinds) -> SimpleNamespace:
        """The numbers of _join by name, None for rows that took no part. kinds: int or float for
        one number a row, a width for so many whole ones.
        """
        rows, out, at = self.policy.read(packed), SimpleNamespace(), 1
        if not all(row[0] for row in rows):
            raise ValueError(
                f"the {self.role}'s logits are not finite numbers: use another checkpoint or dtype"
            )
        for name, kind in kinds.items():
            wide = kind not in (int, float)
            values = [row[at : at + kind] if wide else row[at] for row in rows]
            values = values if kind is not float else list(map(_as_float, values))
            setattr(out, name, self.placed(values, feed))
            at += kind if wide else 1
        return out

    def _own(self, logq: list[torch.Tensor], feed: Feed) -> "LogQ | None":
        """log q in a form that outlives the next step, which would overwrite a graph's output."""
        if not logq:
            return None
        logq_BTV = logq[0].clone() if self.policy.graphs else logq[0]
        return LogQ(self.ids_V, dict(zip(self.part_of(feed), logq_BTV)))

    def _pass(self, work, feed: Feed, *tensors, **columns):
        """What `work` returns for a pass over trunk tokens.

        An eager pass reads the KV cache only as far as the longest row reaches.
        """
        if self.policy.static:
            limits = {"extent": self.cache.trunk, "tight": False}
        else:
            limits = {
                "extent": max(1, *(s + c for s, c in zip(feed.start, feed.count))),
                "tight": True,
            }
        columns = dict(tokens=feed.tokens, start=feed.start, count=feed.count) | columns
        return self._step(work, columns, *tensors, feed=feed, **limits)

    def _step(self, work, columns: dict[str, list], *tensors, feed: Feed, **static):
        """What work(named numbers, *tensors, **static) returns, for the places of the feed.

        The named numbers have views of the cache and of the params beside them. On CUDA each
        combination of part, shapes and `static` is one graph; only a single place's prompt is read
        without one, since there are many places.
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
        packed, beside = self.policy.send(numbers), self._views_of(part)
        if not self.policy.static:
            return work(_views(packed, layout, *beside), *tensors, **static)
        if len(part) == 1 < self.batch:
            self.policy.enter_thread()
            return work(_views(packed.to(self.device), layout, *beside), *tensors, **static)
        key = (work.__name__, layout, part, *(x.shape for x in tensors), *static.values())
        if key not in self.step_of:
            self.policy.enter_thread()

            def fixed(packed, *tensors):
                return work(_views(packed, layout, *beside), *tensors, **static)

            self.step_of[key] = self.policy.step(fixed, self.pool)
        return self.step_of[key](packed, *tensors)

    def _views_of(self, part: range) -> tuple[KVCache, Params]:
        """The cache and the params of these places alone, in the memory of all."""
        if part not in self.views:
            self.views[part] = self.cache.narrow(part), self.params.narrow(part)
        return self.views[part]


class LogQ(NamedTuple):
    """The log q that tokens were drawn from, over the tokens ids_V of the model that drew them."""

    ids_V: torch.Tensor
    logq_V: torch.Tensor | dict[int, torch.Tensor]  # (V,); or by row, of many draws each

    def of(self, row: int, draw: int) -> "LogQ":
        """One draw of many."""
        return LogQ(self.ids_V, self.logq_V[row][draw])


# All numbers of a step travel in one int64 tensor with a row for each row of the batch: one copy to
# the device, one back. A float64 is 64 bits as well.


def _pack(columns: dict[str, list]) -> tuple[list[list[int]], tuple]:
    """Rows of whole numbers, and their layout, from named columns of a number or a list a row."""
    layout, parts = [], []
    for name, values in columns.items():
        kind = len(values[0]) if type(values[0]) is list else type(values[0])
        if kind is float:
            values = [struct.unpack("q", struct.pack("d", x))[0] for x in values]
        parts.append(values if type(values[0]) is list else [[x] for x in values])
        layout.append((name, kind))
    return [sum(row, []) for row in zip(*parts)], tuple(layout)


def _views(packed: torch.Tensor, layout: tuple, cache: KVCache, params: Params) -> SimpleNamespace:
    """The columns of _pack again, as views: (B, width), or (B,) for one number a row."""
    out, at = SimpleNamespace(cache=cache, params=params), 0
    for name, kind in layout:
        width = 1 if kind in (int, float) else kind
        column = packed[:, at : at + width] if kind not in (int, float) else packed[:, at]
        setattr(out, name, column.contiguous().view(torch.float64) if kind is float else column)
        at += width
    return out


def _join(best: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
    """(B, n): whether each row's best scores are finite, then the columns. Read by Runner._read."""
    sound_B1 = best.isfinite().all(-1, keepdim=True).long()
    whole = (
        x.double().contiguous().view(torch.int64) if x.is_floating_point() else x for x in columns
    )
    return torch.cat([sound_B1, *(x.reshape(len(x), -1) for x in whole)], 1)


def _as_float(bits: int) -> float:
    return struct.unpack("d", struct.pack("q", bits))[0]
