"""--k auto, --fan-out auto: the K and the budget M that the speed model expects to be fastest on this machine.

Knows: how long the steps take at a few sizes, what was accepted and hit so far, the formulas of speed.py. Does not
know: tensors, tokens, how the loop plays a round. Read next: speed.py, and fanout.py for the profiles.

Times are measured once per engine and kind of run, on the run's own lanes and rows just before its prompts are read:
for SSD with both lanes busy, as they will be. Acceptance and hits come from the run. Which K and M are chosen depends
on the clock and on past outcomes only, never on a token still to be drawn, so every coupling stays exact.
"""

import threading
import time
from dataclasses import dataclass
from statistics import median

from fanout import ByScores, FanOut
from sampling import CHAIN, FIXED, NONE
from settings import AUTO
from speed import sd_rate, ssd_rate
from steps import Feed

TURNS = 0  # a budget: prepare nothing and take turns, as SD does, where the draft is too slow for more
PLAIN = 0  # a K: the target goes on alone, as AR does, where even that does not pay
KS, BUDGETS = (1, 2, 3, 4, 5, 6, 8), (4, 8, 16, 24, 32)
STATIC_KS, STATIC_BUDGETS = (2, 4, 7), (8, 24)  # every one is compiled and captured
# Rounds. A revision takes 0.4 ms, and Python's lock from both lanes meanwhile; who begins with a choice has time.
FIRST_REVISION, FIRST_WITH_CHOICE, REVISE_EVERY = 6, 24, 48
# How much faster than the best budget turns must look: measured again and again, a draft step is quicker than alone.
TURNS_IF = 1.15
PLAIN_AFTER, PLAIN_IF = 24, 1.05  # rounds of evidence, and how much faster it must look: there is no way back
# Places behind the present K are not tested any more: a few bad draws there must not keep K small for ever.
PLACE_WEIGHT = 32.0
MEASURE_S, MEASURE_LEAST = 0.12, 4  # a point takes so long, and so many repeats at least; the first is not counted


def choices(asked: int | str, auto: tuple[int, ...], common: int = 0) -> tuple[int, ...]:
    """What may be chosen: the one number that was asked for, or the list, as far as the `common` vocabulary allows."""
    if asked != AUTO and common and asked >= common:
        raise ValueError(f"fan_out is {asked}, wanted less than the vocabulary, {common} tokens")
    return (asked,) if asked != AUTO else tuple(x for x in auto if not common or x < common) or (1,)


def between(points: dict[int, float], x: float) -> float:
    """Linear between measured sizes; past the ends along the nearest two."""
    sizes = sorted(points)
    if len(sizes) == 1:
        return points[sizes[0]]
    above = next((i for i, size in enumerate(sizes) if size >= x), len(sizes) - 1)
    low, high = sizes[max(above - 1, 0)], sizes[max(above, 1)]
    return max(points[low] + (points[high] - points[low]) * (x - low) / (high - low), 1e-9)


@dataclass
class Times:
    """Seconds. verify by tokens fed (K + 1), prepare (extend and fork) likewise, step (a chain step) by branches M."""

    verify: dict[int, float]
    decode: float = 0.0  # one ordinary step of the draft
    prepare: dict[int, float] | None = None
    step: dict[int, float] | None = None
    plain: float | None = None  # one ordinary step of the target; None: not to be considered
    choice: tuple[int, int, int] | None = None  # K, K after a miss and M of the last run: the next one begins with them


# ---- measuring


def measure(decoding, ks: tuple[int, ...], budgets: tuple[int, ...]) -> Times | None:
    """Time the steps of `decoding` at a few sizes; None if its draft failed. What they write lies behind every row's
    last token, where the next round writes anyway."""
    rows, target, draft = decoding.rows, decoding.target, decoding.draft
    B, times = len(rows), Times({}, 0.0, {}, {})
    undrafted = [NONE] * B, [None] * B

    def feed(T: int) -> Feed:
        return Feed([[row.ids[-1]] + [0] * (T - 1) for row in rows], [len(row.ids) - 1 for row in rows], [T] * B)

    def on_draft_lane(*work):
        return decoding.draft_lane.start("calibrate", *work)

    if draft is not None:
        work = on_draft_lane(repeat, draft.decode, feed(1), None)
        times.decode = decoding.await_draft(work, decoding.patience())
    if draft is not None and decoding.settings.k == AUTO:
        alone = feed(1 + ks[0] if target.policy.static else 1)
        times.plain = decoding.target_lane.start("calibrate", repeat, target.verify, alone, *undrafted).result()
    for k, M in _points(ks, budgets):
        stop, work = threading.Event(), None
        if decoding.mode == "ssd":
            if decoding.draft_lane is decoding.target_lane:  # they take turns anyway
                stop.set()
            fan_out = ByScores(M) if decoding.fan_out.by_scores else [[M]] * B
            work = on_draft_lane(_prepare, draft, feed(k + 1), fan_out, stop)
        verify = decoding.target_lane.start("calibrate", repeat, target.verify, feed(k + 1), *undrafted)
        times.verify[k + 1] = verify.result()
        stop.set()
        if work is not None and (found := decoding.await_draft(work, decoding.patience())):
            times.prepare[k + 1], times.step[M] = found
    return times if decoding.mode == decoding.settings.mode else None


def _points(ks: tuple[int, ...], budgets: tuple[int, ...]) -> list[tuple[int, int]]:
    """At most three sizes of each, together."""
    ks, budgets = (sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}) for sizes in (ks, budgets))
    at = lambda sizes, i: sizes[min(i, len(sizes) - 1)]  # noqa: E731
    return [(at(ks, i), at(budgets, i)) for i in range(max(len(ks), len(budgets)))]


def repeat(work, *args) -> float:
    """The median seconds of work(*args), the first time left out."""
    lasts, begin = [], time.perf_counter()
    while len(lasts) < MEASURE_LEAST or time.perf_counter() - begin < MEASURE_S:
        lasts.append(_timed(work, *args)[0])
    return median(lasts[1:])


def _timed(work, *args) -> tuple[float, object]:
    begin = time.perf_counter()
    value = work(*args)
    return time.perf_counter() - begin, value


def _prepare(draft, feed: Feed, fan_out: ByScores | list, stop: threading.Event) -> tuple[float, float]:
    """Extend, fork and one chain step, again and again until `stop`. -> seconds of the first two, of the last."""
    lasts = []
    while len(lasts) < 2 or not stop.is_set():
        before, forked = _timed(lambda: draft.fork(draft.extend(feed), feed, fan_out))
        lasts.append((before, _timed(draft.chain_step, feed, forked.tokens, forked.depths, 0, None)[0]))
    prepares, steps = zip(*lasts[1:])
    return median(prepares), median(steps)


# ---- choosing


class Tuner:
    """Chooses K and M of one run by the speed model: before it begins, then every few rounds.

    models: target and draft, or the target alone; measured: the engine's Times by kind of run, kept for the next run.
    """

    def __init__(self, settings, batch: int, models: list, measured: dict[tuple, Times]):
        self.settings, self.batch, self.measured = settings, batch, measured
        static = any(model.policy.static for model in models)
        common = min(model.config.vocab_size for model in models)
        self.ks, self.budgets = (1,), (TURNS,)
        if settings.mode != "ar":
            self.ks = choices(settings.k, STATIC_KS if static else KS)
        if settings.mode == "ssd":
            self.budgets = choices(settings.fan_out, STATIC_BUDGETS if static else BUDGETS, common)
        self.k, self.budget = self.ks[0], self.budgets[0]
        self.k_miss = self.k  # the most tokens drafted after a miss, when the target waits for each
        self.times: Times | None = None
        self.rounds, self.due = 0, FIRST_REVISION

    def fan_out(self) -> FanOut:
        """For this run: by scores where the draft draws with the noise that the target will draw with."""
        return FanOut(max(self.ks), max(self.budgets), by_scores=self.settings.coupling == "shared")

    @property
    def idle(self) -> bool:
        """Nothing to choose."""
        return len(self.ks) == len(self.budgets) == 1

    def calibrate(self, decoding) -> None:
        """Measure, unless this kind of run was measured before. If the draft fails at it, nothing will be chosen."""
        s = self.settings
        kind = (s.mode, self.batch, s.coupling, any(s.per_row("temperature", None)), self.ks, self.budgets)
        if not self.idle and kind not in self.measured and (times := measure(decoding, self.ks, self.budgets)):
            self.measured[kind] = times
        self.times = self.measured.get(kind)
        if self.times and self.times.choice:
            self.k, self.k_miss, self.budget = self.times.choice
            self.due = FIRST_WITH_CHOICE
        elif self.times:
            self.choose(decoding.fan_out, decoding.figures)
        decoding.k, decoding.fan_out.budget = self.k, self.budget

    def revise(self, fan_out: FanOut, figures) -> None:
        """Once a round: choose anew where it is time to."""
        self.rounds += 1
        if self.times is None or self.rounds < self.due or self.k == PLAIN:
            return
        self.due = self.rounds + min(self.rounds, REVISE_EVERY)
        rate = self.choose(fan_out, figures)
        if self.times.plain and self.rounds >= PLAIN_AFTER and 1 / self.times.plain > PLAIN_IF * rate:
            self.k, self.k_miss, self.budget = PLAIN, PLAIN, TURNS  # for this run: the next text may suit the draft
        elif self.budget > TURNS or self.settings.mode == "sd":  # turns come from one text, or from the times anyway
            self.times.choice = self.k, self.k_miss, self.budget

    def choose(self, fan_out: FanOut, figures) -> float:
        """What the run has shown so far -> k, k_miss and budget; and the tokens a second and row that they promise."""
        if self.settings.mode == "sd":
            rates = self.sd_rates(fan_out)
        else:
            rates = self.ssd_rates(fan_out, figures.usual_exposed())
        (self.k, self.budget), (rate, self.k_miss) = max(rates.items(), key=lambda item: item[1])
        return rate

    def sd_rates(self, fan_out: FanOut) -> dict[tuple[int, int], tuple[float, int]]:
        """(K, M) -> tokens a second and row, K again. Drafts that are no model take no time; their kind is FIXED."""
        times = self.times
        kind = CHAIN if times.decode else FIXED
        tokens = expected(fan_out, kind, self.ks[-1])
        rate = lambda k: sd_rate(tokens[k], k * times.decode, between(times.verify, k + 1))  # noqa: E731
        return {(k, TURNS): (rate(k), k) for k in self.ks}

    def ssd_rates(self, fan_out: FanOut, exposed: float) -> dict[tuple[int, int], tuple[float, int]]:
        """(K, M) -> tokens a second and row, and how many tokens a miss is best followed by."""
        times, lengths = self.times, range(self.ks[-1] + 1)
        hits = [fan_out.hits(CHAIN if length else NONE, length) for length in lengths]
        tokens = expected(fan_out, CHAIN, self.ks[-1])
        verify, prepare = ([between(of, length + 1) for length in lengths] for of in (times.verify, times.prepare))
        out = {}
        if self.settings.fan_out == AUTO:
            out = {turns: (rate / TURNS_IF, k) for turns, (rate, k) in self.sd_rates(fan_out).items()}
        for M in self.budgets:
            step, hits_M = between(times.step, M), [row[M] for row in hits]
            for k in self.ks:
                out[k, M] = self.ssd_rate(k, hits_M, tokens, verify, prepare, step, exposed)
        return out

    def ssd_rate(self, k: int, hits, tokens, verify, prepare, step: float, exposed: float) -> tuple[float, int]:
        """algorithm.md, section 7, for chains of K tokens or as many as the clock allows. Lists are by length, 0..K."""
        length, t_round = float(k), 0.0
        for _ in range(2):  # the shorter the chain, the shorter its verification
            t_verify, t_prepare = _at(verify, length), _at(prepare, length)
            # The draft is handed its work after the target, and its chains are looked up soon after the verdict.
            steps = (t_verify - exposed - t_prepare) / step
            if self.settings.cut:  # whole steps: half of one is lost on average
                length = min(max(steps - 0.5, 1.0), k)
            needed = 1 if self.settings.cut else k
            t_round = max(t_verify, exposed + t_prepare + needed * step) + exposed
        ways = []  # after a miss: hits, tokens, seconds, and the tokens drafted while the target waits
        if self.settings.fallback != "fast":
            waits = ((short, t_round + step / 4 + short * self.times.decode) for short in self.ks if short <= k)
            ways += [(hits[short], tokens[short], t_miss, short) for short, t_miss in waits]
        if self.settings.fallback != "jit":
            ways.append((hits[0], 1.0, t_round, self.ks[0]))
        h_hit, tokens_hit, rates = _at(hits, length), _at(tokens, length), []
        for h_miss, tokens_miss, t_miss, short in ways:
            share = min(h_miss / max(1 - h_hit + h_miss, 1e-9), 1.0)
            rates.append((ssd_rate(share, tokens_hit, tokens_miss, t_round, t_miss, self.batch), short))
        return max(rates)


def expected(fan_out: FanOut, kind: int, k: int) -> list[float]:
    """Tokens a round emits with a proposal of 0..k tokens."""
    profiles = (fan_out.outcome_probabilities(kind, length, PLACE_WEIGHT) for length in range(k + 1))
    return [sum(P * (j + 1) for j, P in enumerate(profile)) for profile in profiles]


def _at(values: list[float], x: float) -> float:
    """values[x], linear between whole numbers."""
    low = min(int(x), len(values) - 2) if len(values) > 1 else 0
    return values[low] if len(values) == 1 else values[low] + (values[low + 1] - values[low]) * (x - low)
