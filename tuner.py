"""--k auto, --fan-out auto: the K and the budget M that the speed model expects to be fastest on this machine.

Knows: how long the steps take at a few sizes, what was accepted and hit so far, the formulas of speed.py. Does not
know: tensors, tokens, how the loop plays a round. Read next: speed.py, and fanout.py for the profiles.

Times are measured once per engine and kind of run, on the run's own lanes and rows just before its prompts are read:
in turns for SD, with both lanes busy for SSD, as they will be. Acceptance and hits come from the run, and at first from
earlier runs of the same kind. Which K and M are chosen depends on the clock and on past outcomes only, never on a token
still to be drawn, so every coupling stays exact.
"""

import threading
import time
from dataclasses import dataclass, field
from statistics import median

from fanout import ByScores, FanOut
from sampling import CHAIN, FIXED, NONE
from settings import AUTO
from speed import CALIBRATION_ROUNDS, sd_rate, ssd_rate
from steps import Feed

TURNS = 0  # a budget: prepare nothing and take turns, as SD does, where the draft is too slow for more
PLAIN = 0  # a K: the target goes on alone, as AR does, where even that does not pay
KS, BUDGETS = (1, 2, 3, 4, 5, 6, 8), (4, 8, 16, 24, 32)
STATIC_KS, STATIC_BUDGETS = (2, 4, 7), (8, 24)  # every one is compiled and captured
# Rounds. A revision takes 0.4 ms, and Python's lock from both lanes meanwhile; who knows earlier runs has time.
FIRST_REVISION, FIRST_IF_LEARNT, REVISE_EVERY = 6, 12, 48
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
    """Seconds. verify by tokens fed (K + 1), prepare (extend and fork) likewise, step (a chain step) by branches M;
    draft by the tokens that are drafted while the target waits, 0 of a draft that is no model."""

    verify: dict[int, float]
    draft: dict[int, float]
    prepare: dict[int, float]
    step: dict[int, float]
    plain: float | None = None  # one ordinary step of the target; None: not to be considered
    learnt: FanOut | None = None  # what the runs of this kind counted
    rates: list[float] = field(default_factory=list)  # and the tokens a second that they came to


# ---- measuring


def measure(decoding, ks: tuple[int, ...], budgets: tuple[int, ...]) -> Times | None:
    """Time the steps of `decoding` at a few sizes; None if its draft failed. What they write lies behind every row's
    last token, where the next round writes anyway."""
    rows, target, draft = decoding.rows, decoding.target, decoding.draft
    B, times = len(rows), Times({}, {}, {}, {})

    def feed(T: int) -> Feed:
        return Feed([[row.ids[-1]] + [0] * (T - 1) for row in rows], [len(row.ids) - 1 for row in rows], [T] * B)

    def verify(T: int):
        return lambda: target.verify(feed(T), [NONE] * B, [None] * B)

    def on_target_lane(*work):
        return decoding.target_lane.start("calibrate", *work).result()

    def on_draft_lane(*work):
        return decoding.draft_lane.start("calibrate", *work)

    def draft_now(k: int) -> None:
        if draft is not None and decoding.mode != "ar":
            decoding.await_draft(on_draft_lane(_decode, draft, feed(2), feed(1), k), decoding.patience())

    if draft is not None and decoding.settings.k == AUTO:
        (times.plain,) = on_target_lane(repeat, verify(1 + ks[0] if target.policy.static else 1))
    for k, M in _points(ks, budgets):
        if decoding.mode != "ssd":  # in turns, as in the run: each finds the caches of the cores as the other left them
            times.verify[k + 1], drafting = repeat(lambda: on_target_lane(verify(k + 1)), lambda: draft_now(k))
            times.draft[k] = drafting if draft is not None else 0.0
            continue
        (times.draft[k],) = repeat(lambda: draft_now(k))
        stop = threading.Event()
        if decoding.draft_lane is decoding.target_lane:  # they take turns anyway
            stop.set()
        fan_out = ByScores(M) if decoding.fan_out.by_scores else [[M]] * B
        work = on_draft_lane(_prepare, draft, feed(k + 1), fan_out, stop)
        (times.verify[k + 1],) = on_target_lane(repeat, verify(k + 1))
        stop.set()
        if found := decoding.await_draft(work, decoding.patience()):
            times.prepare[k + 1], times.step[M] = found
    return times if decoding.mode == decoding.settings.mode else None


def _points(ks: tuple[int, ...], budgets: tuple[int, ...]) -> list[tuple[int, int]]:
    """At most three sizes of each, together."""
    ks, budgets = (sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}) for sizes in (ks, budgets))
    at = lambda sizes, i: sizes[min(i, len(sizes) - 1)]  # noqa: E731
    return [(at(ks, i), at(budgets, i)) for i in range(max(len(ks), len(budgets)))]


def repeat(*works) -> list[float]:
    """The median seconds of each work, one after the other again and again, the first time left out."""
    lasts, begin = [], time.perf_counter()
    while len(lasts) < MEASURE_LEAST or time.perf_counter() - begin < MEASURE_S * len(works):
        lasts.append([_timed(work)[0] for work in works])
    return [median(times) for times in zip(*lasts[1:])]


def _timed(work, *args) -> tuple[float, object]:
    begin = time.perf_counter()
    value = work(*args)
    return time.perf_counter() - begin, value


def _decode(draft, two: Feed, one: Feed, k: int) -> None:
    """Draft k tokens as ssd.Decoding.decode_now does: the last two of the text are fed first, then one each time."""
    for step in range(k):
        draft.decode(one if step else two, None)


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
        if self.times and self.times.learnt:
            decoding.fan_out.begin_with(self.times.learnt)
            self.due = FIRST_IF_LEARNT
        if self.times:
            decoding.figures.earlier = list(self.times.rates)
            self.choose(decoding.fan_out, decoding.figures)
        decoding.k, decoding.fan_out.budget = self.k, self.budget

    def revise(self, fan_out: FanOut, figures) -> None:
        """Once a round: choose anew where it is time to."""
        self.rounds += 1
        if self.times is None or self.k == PLAIN:
            return
        if self.rounds == CALIBRATION_ROUNDS:
            turns = self.settings.mode == "ssd" and self.budget == TURNS
            figures.promised = self.rates(fan_out, figures)[self.k, self.budget][0] * (TURNS_IF if turns else 1)
        if self.rounds < self.due:
            return
        self.due = self.rounds + min(self.rounds, REVISE_EVERY)
        rate = self.choose(fan_out, figures)
        if self.times.plain and self.rounds >= PLAIN_AFTER and 1 / self.times.plain > PLAIN_IF * rate:
            self.k, self.k_miss, self.budget = PLAIN, PLAIN, TURNS  # for this run: the next text may suit the draft

    def remember(self, fan_out: FanOut, rate: float | None) -> None:
        """The run is over: the next one of its kind begins with what was learnt."""
        if self.times:
            self.times.learnt = self.times.learnt or self.fan_out()
            self.times.learnt.add(fan_out)
            self.times.rates += [rate] if rate else []

    def choose(self, fan_out: FanOut, figures) -> float:
        """What the run has shown so far -> k, k_miss and budget; and the tokens a second and row that they promise."""
        rates = self.rates(fan_out, figures)
        (self.k, self.budget), (rate, self.k_miss) = max(rates.items(), key=lambda item: item[1])
        return rate

    def rates(self, fan_out: FanOut, figures) -> dict[tuple[int, int], tuple[float, int]]:
        if self.settings.mode == "sd":
            return self.sd_rates(fan_out)
        return self.ssd_rates(fan_out, figures.usual_exposed())

    def sd_rates(self, fan_out: FanOut) -> dict[tuple[int, int], tuple[float, int]]:
        """(K, M) -> tokens a second and row, K again. Drafts that are no model take no time; their kind is FIXED."""
        times = self.times
        kind = CHAIN if any(times.draft.values()) else FIXED
        tokens = expected(fan_out, kind, self.ks[-1])
        rate = lambda k: sd_rate(tokens[k], between(times.draft, k), between(times.verify, k + 1))  # noqa: E731
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
            waits = ((short, t_round + step / 4 + between(self.times.draft, short)) for short in self.ks if short <= k)
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
