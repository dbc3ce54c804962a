"""--k auto, --fan-out auto: a planner that plays the K and M which the speed model expects to be fastest.

Knows: how long the rounds so far took and what they came to. Does not know: tensors, tokens, how a
round is played. Nothing else needs this file: without it K and M are given by hand. Read next:
figures.py.

It has one way of measuring, the run's own rounds. The first ones play a few sizes of K and M, and
later ones try another mode now and then, so that no choice is final: one noisy second at the start
decides nothing. Every round emits tokens whatever its plan is, so trying costs little. Choices hang
on the clock and on past outcomes only, never on a token still to be drawn, so they keep every
coupling exact.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import median

from figures import Round, expected_tokens
from ssd import Plan

KS, MS = (1, 2, 3, 4, 6, 8), (6, 12, 24)
STATIC_KS, STATIC_MS = (2, 4, 7), (8, 24)  # each of them is compiled and captured
REVISE_EVERY, TRY_EVERY = 4, 32  # rounds
RECENT = 9  # as many measurements of one thing count, by their median
# A miss with M branches has the probability c * M^-0.6: the exponent is that of the pairs measured
# here (.5 to .8), c is the run's own.
DECAY = 0.6
PRIOR = 8.0  # how many tests the numbers that a run begins with weigh


@dataclass
class Seen:
    """What the runs of one kind have shown. Times are in seconds, by size, the latest ones."""

    verify: dict[int, deque] = field(default_factory=lambda: _by_size())  # tokens fed, draft idle
    beside: dict[int, deque] = field(default_factory=lambda: _by_size())  # the same, draft busy
    prepare: dict[int, deque] = field(default_factory=lambda: _by_size())  # tokens fed
    step: dict[int, deque] = field(default_factory=lambda: _by_size())  # branches
    draft: dict[int, deque] = field(default_factory=lambda: _by_size())  # tokens drafted in a row
    # After a round whose proposal was accepted whole (True) or not: accepted, tested.
    tests: dict[bool, list[float]] = field(
        default_factory=lambda: {True: [0.85 * PRIOR, PRIOR], False: [0.65 * PRIOR, PRIOR]}
    )
    misses: list[float] = field(default_factory=lambda: [0.6 * PRIOR * 12**-DECAY, PRIOR * 12**-DECAY])

    def learn(self, done: Round, state: bool) -> None:
        fed = 1 + max(done.length[b] for b in done.live)
        verify = self.beside if done.plan.m else self.verify
        verify[fed].append(done.end - done.begin)
        if done.prepare_s:
            self.prepare[fed].append(done.prepare_s)
        if done.step_s:
            self.step[done.plan.m].append(done.step_s)
        if done.drafted is not None and done.drafted.end:
            self.draft[max(done.plan.k, 1)].append(done.drafted.end - done.drafted.begin)
        for b in done.live:
            self.tests[state][0] += done.accepted[b]
            self.tests[state][1] += done.accepted[b] + done.rejected(b)
        if done.look_up:
            self.misses[0] += len(done.missed)
            self.misses[1] += (len(done.hit) + len(done.missed)) * done.plan.m**-DECAY


def _by_size() -> defaultdict:
    return defaultdict(lambda: deque(maxlen=RECENT))


def at(times: dict[int, deque], size: float, otherwise: dict[int, deque] | None = None) -> float:
    """Seconds at a size: linear between the measured ones, past the ends along the nearest two."""
    points = sorted((n, median(of)) for n, of in times.items() if of)
    if not points:
        return at(otherwise, size) if otherwise else 0.0
    if len(points) == 1:
        return points[0][1]
    above = next((i for i, (n, _) in enumerate(points) if n >= size), len(points) - 1)
    (n0, t0), (n1, t1) = points[max(above - 1, 0)], points[max(above, 1)]
    return max(t0 + (t1 - t0) * (size - n0) / (n1 - n0), min(t0, t1) / 2)


def rate(plan: Plan, seen: Seen, a: float, batch: int) -> float:
    """Tokens a second and row that the speed model promises. a: the acceptance that is expected."""
    if plan.k == 0:
        return 1 / max(at(seen.verify, 1, seen.beside), 1e-9)
    t_draft = at(seen.draft, plan.k) or plan.k * at(seen.step, 1)
    if plan.m == 0:
        t_verify = at(seen.verify, plan.k + 1, seen.beside)
        return expected_tokens(a, plan.k) / max(t_draft + t_verify, 1e-9)
    length, t_step = float(plan.k), max(at(seen.step, plan.m), 1e-9)
    t_prepare = at(seen.prepare, plan.k + 1)
    for _ in range(2):  # the shorter the chains, the shorter the verification they must fit into
        t_verify = at(seen.beside, length + 1, seen.verify)
        if plan.cut:
            length = min(max((t_verify - t_prepare) / t_step - 0.5, 1.0), plan.k)
    hit = 1 - min(seen.misses[0] / seen.misses[1] * plan.m**-DECAY, 1.0)
    t_round = max(t_verify, t_prepare + t_step * (1 if plan.cut else plan.k))
    jit = plan.fallback == "jit" or plan.fallback == "auto" and batch == 1
    missed = expected_tokens(a, plan.k) if jit else 1.0
    emitted = hit * expected_tokens(a, length) + (1 - hit) * missed
    return emitted / (t_round + (1 - hit**batch) * t_draft * jit)


class Auto:
    """A planner for one run. ks and ms are what may be chosen; 0 among them leaves the draft out, or takes turns.

    seen is what earlier runs of this kind have shown; it goes on learning.
    """

    def __init__(self, ks, ms, plan: Plan, batch: int, seen: Seen):
        """plan: the fallback, and cut or not, of every plan; of those that take turns the fallback is jit."""
        self.plans = [self._plan(plan, k, m) for k in ks for m in ms if k or not m]
        self.seen, self.batch, self.rounds, self.state = seen, batch, 0, True
        known = any(seen.verify) or any(seen.beside)
        self.trying = [] if known else self._first_plans()
        self.tried = 0
        self.best = {state: self.choose(state) for state in (True, False)}

    def first(self) -> Plan:
        return self.trying.pop(0) if self.trying else self.best[True]

    def next(self, done: Round) -> Plan:
        """Learn from a round, and say how to play the next but one: by then another is under way."""
        self.seen.learn(done, self.state)
        if any(done.length):  # what the last proposal came to foretells the next one's fate
            self.state = not any(done.rejected(b) for b in done.live)
        self.rounds += 1
        if self.trying:
            return self.trying.pop(0)
        if self.rounds % REVISE_EVERY == 0:
            self.best = {state: self.choose(state) for state in (True, False)}
        if self.rounds % TRY_EVERY == 0:
            self.trying = self._another()
        return self.best[self.state]

    def choose(self, state: bool, plans: list[Plan] | None = None) -> Plan:
        """The plan of the highest rate, by the acceptance that follows such a round."""
        accepted, tested = self.seen.tests[state]
        return max(plans or self.plans, key=lambda p: rate(p, self.seen, accepted / tested, self.batch))

    def _plan(self, plan: Plan, k: int, m: int) -> Plan:
        return Plan(k, m, plan.fallback if m else "jit" if plan.fallback == "auto" else plan.fallback, plan.cut)

    def _first_plans(self) -> list[Plan]:
        """Three sizes of K and M together, twice, and what else may be chosen, once."""
        spoken = [p for p in self.plans if p.m] or [p for p in self.plans if p.k]
        ks, ms = (sorted({x for x in of}) for of in ([p.k for p in spoken], [p.m for p in spoken]))
        pick = lambda of, i: of[i * (len(of) - 1) // 2]  # noqa: E731
        three = [next(p for p in spoken if (p.k, p.m) == (pick(ks, i), pick(ms, i))) for i in (1, 0, 2)]
        turns = [p for p in self.plans if p.k and not p.m]
        rest = turns[len(turns) // 2 :][:1] if len(spoken) != len(turns) else []
        return [*three, *three, *rest, *rest, *[p for p in self.plans if not p.k]]

    def _another(self) -> list[Plan]:
        """Two rounds of the best plan of another mode, in turn: its times may have changed."""
        kind = lambda p: (p.k > 0, p.m > 0)  # noqa: E731
        mine = kind(self.best[self.state])
        others = sorted({kind(p) for p in self.plans} - {mine})
        if not others:
            return []
        self.tried += 1
        other = others[self.tried % len(others)]
        return 2 * [self.choose(self.state, [p for p in self.plans if kind(p) == other])]
