"""--k auto, --fan-out auto: a planner that chooses the plan that promises most tokens a second.

Knows: how long the rounds so far took and what they came to. Does not know: tensors, tokens, how a
round is played. Nothing else needs this file: without it K and M are given by hand. Read next:
halves.py.

Auto measures nothing but the rounds of the run. The first rounds play two sizes of K and M. Later
rounds try another mode now and then, and old times are forgotten. So no choice is final, and a
noisy second decides nothing. Trying costs little, because a round emits tokens whatever its plan
is. Choices depend on the clock and on past outcomes, never on a token that is still to be drawn, so
every coupling stays exact.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import median

from figures import Round, expected_tokens
from runtime import STEP_SHARE
from sampling import CHAIN, FIXED, MISS_POWER
from ssd import Plan

# few_bits.cpp computes 4 branches at a time with AVX2 and 8 with VNNI: other M fill these up.
KS, MS = (1, 2, 3, 4, 6, 8), (4, 8, 16)
# By whether steps are static: then each size is compiled and captured.
SIZES = {False: (KS, MS), True: ((2, 4, 7), (8, 24))}
REVISE_EVERY = 4  # rounds
# Another mode is tried for TRY rounds, once in TRY_EVERY: less often, the less it promises.
TRY, TRY_EVERY = 4, 64
RECENT = 7  # how many times of one size are kept; their median counts
SURE = 3  # a size with so many times is known; others are interpolated between known ones
FRESH = 256  # rounds after which a time is forgotten
PRIOR = 8.0  # the numbers that a run begins with weigh as much as so many tests
MEMORY = 0.998  # the weight that a test keeps after each later one


class Times:
    """Seconds by size, the latest ones of each."""

    def __init__(self):
        self.of = defaultdict(lambda: deque(maxlen=RECENT))  # size -> (round, seconds)
        self.points: list[tuple[int, float]] = []

    def revise(self, now: int) -> None:
        """Make `points`: what is fresh and sure, or all where nothing is."""
        fresh = {n: [s for when, s in of if when > now - FRESH] for n, of in self.of.items()}
        sure = {n: of for n, of in fresh.items() if len(of) >= SURE}
        if not sure:
            sure = {n: [s for _, s in of] for n, of in self.of.items()}
        self.points = sorted((n, median(of)) for n, of in sure.items())

    def at(self, size: float) -> float:
        """Seconds at a size: linear between the measured ones, beyond them by their slope."""
        if len(self.points) < 2:
            return self.points[0][1] if self.points else 0.0
        ends = [self.points[0], self.points[-1]]
        if ends[0][0] < size < ends[1][0]:
            ends = next(pair for pair in zip(self.points, self.points[1:]) if size <= pair[1][0])
        (n0, t0), (n1, t1) = ends
        return max(t0 + (t1 - t0) * (size - n0) / (n1 - n0), min(t0, t1) / 2)


@dataclass
class Seen:
    """What the runs of one kind have shown."""

    rounds: int = 0
    tried: int = 0  # times that another mode was tried
    due: float = TRY_EVERY / 4  # the round from which it is to be tried next, in whichever run
    verify: Times = field(default_factory=Times)  # by tokens fed, the draft idle
    beside: Times = field(default_factory=Times)  # the same, the draft busy
    prepare: Times = field(default_factory=Times)  # by tokens fed
    step: Times = field(default_factory=Times)  # by branches
    draft: Times = field(default_factory=Times)  # seconds a token, by tokens drafted in a row
    # Accepted and tested, after a proposal that was accepted whole (True) or was not.
    tests: dict[bool, list[float]] = field(
        default_factory=lambda: {True: [0.85 * PRIOR, PRIOR], False: [0.65 * PRIOR, PRIOR]}
    )
    # Misses, and the look-ups weighted by M^-MISS_POWER. Their ratio is c: a look-up misses with
    # the probability c * M^-MISS_POWER.
    misses: list[float] = field(
        default_factory=lambda: [0.6 * PRIOR * 12**-MISS_POWER, PRIOR * 12**-MISS_POWER]
    )

    def learn(self, done: Round, state: bool, kinds: tuple[int, ...]) -> None:
        """Add one round. state: was the proposal before it accepted whole? kinds: of which
        proposals the acceptance counts.
        """
        self.rounds += 1
        m, fed = done.plan.m, 1 + max(done.length[b] for b in done.live)
        work = done.drafted
        for times, size, seconds in (
            (self.beside if m else self.verify, fed, done.end - done.begin),
            (self.prepare, fed, done.prepare_s),
            (self.step, m, done.step_s),
            (self.draft, work and work.tokens, work and (work.end - work.begin) / work.tokens),
        ):
            if seconds:
                times.of[size].append((self.rounds, seconds))
        counted = [b for b in done.live if done.kind[b] in kinds]
        accepted = sum(done.accepted[b] for b in counted)
        tested = accepted + sum(done.rejected(b) for b in counted)
        for share in self.tests.values():
            share[:] = (x * MEMORY**tested for x in share)
        self.tests[state][0] += accepted
        self.tests[state][1] += tested
        if done.look_up:
            looked_up = len(done.hit) + len(done.missed)
            self.misses[:] = (x * MEMORY**looked_up for x in self.misses)
            self.misses[0] += len(done.missed)
            self.misses[1] += looked_up * m**-MISS_POWER

    def revise(self) -> None:
        for times in (self.verify, self.beside, self.prepare, self.step, self.draft):
            times.revise(self.rounds)

    def acceptance(self, *states: bool) -> float:
        """The share of the tested tokens that were accepted in these states."""
        accepted, tested = zip(*(self.tests[state] for state in states))
        return sum(accepted) / sum(tested)


def rate(plan: Plan, seen: Seen, a: float, batch: int) -> float:
    """Tokens a second and row that the speed model promises. a: the acceptance that is expected."""
    alone, beside = seen.verify, seen.beside
    alone, beside = (alone if alone.points else beside), (beside if beside.points else alone)
    t_draft = plan.k * (seen.draft.at(plan.k) or seen.step.at(1))
    if plan.m == 0:
        return expected_tokens(a, plan.k) / max(t_draft + alone.at(plan.k + 1), 1e-9)
    length, t_prepare, t_step = plan.k, seen.prepare.at(plan.k + 1), seen.step.at(plan.m)
    if plan.cut and t_step:  # a chain is as long as the verification of such chains lets it grow
        for _ in range(2):
            steps = (beside.at(length + 1) - t_prepare) / t_step + 1 - STEP_SHARE
            length = min(max(int(steps), 1), plan.k)
    hit = 1 - min(seen.misses[0] / seen.misses[1] * plan.m**-MISS_POWER, 1.0)
    t_round = max(beside.at(length + 1), t_prepare + t_step * length, 1e-9)
    jit = plan.fallback == "jit" or plan.fallback == "auto" and batch == 1
    missed = expected_tokens(a, plan.k * jit)
    emitted = hit * expected_tokens(a, length) + (1 - hit) * missed
    return emitted / (t_round + (1 - hit**batch) * t_draft * jit)


class Auto:
    """A planner for one run. It chooses among ks and ms; k 0 leaves the draft out, m 0 takes turns.

    seen is what earlier runs of this kind have shown; it goes on learning.
    """

    def __init__(self, ks, ms, plan: Plan, batch: int, seen: Seen):
        """plan: the fallback of every plan, and cut or not. With fallback auto the planner also
        chooses whether to draft on a miss; where they take turns, it does. With cut it also chooses
        whether to wait for whole chains, which pays where a step of the draft takes long.
        """
        on_miss = ("auto", "fast") if plan.fallback == "auto" else (plan.fallback,)
        in_turns = ("jit",) if plan.fallback == "auto" else on_miss
        waits = plan.cut and not plan.halves  # the other half needs the draft
        self.plans = [
            Plan(k, m, fallback, cut)
            for k in ks for m in ms if k or not m
            for cut in ((True, False) if waits and m and k > 1 else (plan.cut,))
            for fallback in (on_miss if m else in_turns)
        ]  # fmt: skip
        self.modes = defaultdict(list)
        for p in self.plans:  # a mode that never drafts would not learn what drafting takes
            self.modes[p.k > 0, p.m > 0, p.fallback != "fast"].append(p)
        # Guesses from the text say nothing about the draft. If misses are only guessed, they count.
        drafts = any(p.fallback != "fast" for p in self.plans)
        self.kinds = (CHAIN,) if drafts else (CHAIN, FIXED)
        self.seen, self.batch, self.state = seen, batch, True
        self.revise()
        # A run that knows nothing first plays a small and a middle plan, SURE times each. What
        # large ones take follows; to play one would cost most where the draft is slow.
        most = [p for p in self.modes[max(self.modes)] if p.cut == plan.cut]
        k, m = sorted({p.k for p in most}), sorted({p.m for p in most})
        tried = (k[(len(k) - 1) // 2], m[len(m) // 2]), (k[len(k) // 4], m[0])
        most = {(p.k, p.m): p for p in most}
        self.trying = [] if seen.rounds else SURE * [most[size] for size in tried]
        self.now = self.trying.pop() if self.trying else self.best[True]

    def first(self) -> Plan:
        return self.now

    def next(self, done: Round) -> Plan:
        """Learn from a round and plan the next but one: by now another is under way."""
        self.seen.learn(done, self.state, self.kinds)
        if any(done.length):  # what the last proposal came to foretells the next one's fate
            self.state = not any(done.rejected(b) for b in done.live)
        if self.seen.rounds % REVISE_EVERY == 0:
            self.revise()
        if self.seen.rounds >= self.seen.due and not self.trying:
            self.try_another()
        self.now = self.trying.pop() if self.trying else self.best[self.state]
        return self.now

    def revise(self) -> None:
        """Choose the mode by all rounds' acceptance, then a plan of it for each state."""
        self.seen.revise()
        self.promise, plan = self.choose(self.plans, True, False)
        self.mine = next(plans for plans in self.modes.values() if plan in plans)
        self.best = {state: self.choose(self.mine, state)[1] for state in (True, False)}

    def choose(self, plans: list[Plan], *states: bool) -> tuple[float, Plan]:
        """The highest rate, and its plan, by the acceptance in these states."""
        a = self.seen.acceptance(*states)
        rates = [rate(plan, self.seen, a, self.batch) for plan in plans]
        return max(zip(rates, plans), key=lambda found: found[0])

    def try_another(self) -> None:
        """Some rounds of the best plan of another mode, each mode in its turn."""
        others = [plans for plans in self.modes.values() if plans is not self.mine]
        if others:
            self.seen.tried += 1
            promise, plan = self.choose(others[self.seen.tried % len(others)], True, False)
            self.trying = TRY * [plan]
            self.seen.due = self.seen.rounds + TRY_EVERY * self.promise / promise
