"""The loop of ssd.py played against a clock: rounds, look-ups and fallbacks with times and chances instead of models.

Knows: who waits for whom in AR, SD, SSD and PEARL; chances of acceptance and of hits. Does not know: where times and
chances come from (published.py, simulate.py). Read next: play(), beside Decoding.rounds in ssd.py.

A row's outcome is two draws: j accepted tokens, and whether the next token is among the F_j prepared for j. Everything
else is arithmetic on a clock, in seconds. PEARL is played as SSD that prepares only "all accepted" (its check of the
first draft token while the draft still works is not modelled). Noise that is known to the draft, as with the couplings
`shared` and `maximal`, enters through the chances alone.
"""

import random
import sys
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, floor, log2
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from fanout import allocate, convex  # noqa: E402
from speed import expected_tokens  # noqa: E402
from ssd import BEGIN_IF  # noqa: E402

MODES, LISTS = ("ar", "sd", "ssd"), ("best", "uniform", "geometric", "last")
FALLBACKS = ("jit", "fast", "random", "auto")
SOON = 1e-9  # steps: times that divide evenly must not lose a step to rounding


@dataclass(frozen=True)
class Times:
    """Seconds on each side. A pass costs a fixed part and a part for every token that it reads."""

    verify: float
    step: float  # one draft step; also what extending takes if `extend` is None
    verify_token: float = 0.0
    step_token: float = 0.0
    extend: float | None = None
    fork: float = 0.0
    handover: float = 0.0  # from a verdict to the next verification, beyond any drafting
    now_step: float | None = None  # a step of drafting on demand (SD, jit), if it differs from `step`

    def verifying(self, tokens: int) -> float:
        return self.verify + self.verify_token * tokens

    def stepping(self, tokens: int) -> float:
        return self.step + self.step_token * tokens

    def extending(self, tokens: int) -> float:
        return self.stepping(tokens) if self.extend is None else self.extend

    def drafting(self, k: int, rows: int) -> float:
        """K steps for some rows while the target waits."""
        return k * ((self.step if self.now_step is None else self.now_step) + self.step_token * rows)


@dataclass(frozen=True)
class Profile:
    """Chances. acceptance: of each draft token; miss: m(0) = 1, m(1), ... for a rejected place and the bonus token."""

    acceptance: float
    rejected: tuple[float, ...] = (1.0, 0.0)
    bonus: tuple[float, ...] = (1.0, 0.0)
    exponent: float = 0.5  # b of the power law, for geometric lists only

    def outcomes(self, length: int) -> list[float]:
        """P_0..P_L."""
        a = self.acceptance
        return [a**j * (1 - a) for j in range(length)] + [a**length]

    def miss(self, j: int, length: int, F: int) -> float:
        curve = self.rejected if j < length else self.bonus
        return curve[min(F, len(curve) - 1)]


@dataclass(frozen=True)
class Plan:
    """How the rounds are played. fan_out is M, per row; devices share the M branches of the draft."""

    mode: str = "ssd"
    k: int = 4
    fan_out: int = 16
    lists: str = "best"
    cut: bool = True
    fallback: str = "jit"
    whole_batch: bool = False  # one miss, and the chains of all rows are drafted anew
    batch: int = 1
    devices: int = 1

    def __post_init__(self):
        for name, allowed in (("mode", MODES), ("lists", LISTS), ("fallback", FALLBACKS)):
            if (got := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {got!r}, wanted one of {', '.join(allowed)}")
        for name in ("k", "fan_out", "batch", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 1 or more")


def miss_curve(points: dict[int, float], budget: int) -> tuple[float, ...]:
    """m(0)..m(budget + 1) through measured points {F: m}: power laws between them and beyond, made convex."""
    known = sorted(points)

    def at(F: int) -> float:
        if len(known) == 1:
            return points[known[0]]
        low = max((i for i, x in enumerate(known[:-1]) if x <= F), default=0)
        x0, x1 = known[low], known[low + 1]
        slope = log2(points[x1] / points[x0]) / log2(x1 / x0)
        return min(1.0, points[x0] * (F / x0) ** slope)

    return tuple(convex([1.0, *(at(F) for F in range(1, budget + 2))]))


def power_law(c: float, b: float, budget: int) -> tuple[float, ...]:
    """m(F) = c F^-b, as the paper measures it."""
    return (1.0, *(min(1.0, c * F**-b) for F in range(1, budget + 2)))


def fan_out_list(plan: Plan, profile: Profile, length: int) -> list[int]:
    """F_0..F_L for a proposal of this length; they add up to M."""
    M, n = plan.fan_out, length + 1
    if n == 1 or plan.lists == "last":
        return [0] * length + [M]
    if plan.lists == "uniform":
        return [M // n + (j < M % n) for j in range(n)]
    if plan.lists == "geometric":  # capped: the last term is raised
        a, power = profile.acceptance, 1 / (1 + profile.exponent)
        weights = [a ** (j * power) for j in range(n)]
        weights[-1] *= (1 - a) ** -power
        shares = [M * weight / sum(weights) for weight in weights]
        out = [floor(share) for share in shares]
        for j in sorted(range(n), key=lambda j: out[j] - shares[j])[: M - sum(out)]:
            out[j] += 1
        return out
    curves = [[profile.miss(j, length, F) for F in range(M + 2)] for j in range(n)]
    return allocate(profile.outcomes(length), curves, M)


def hit_chance(plan: Plan, profile: Profile, length: int) -> float:
    """Of one row, after a proposal of this length."""
    lists = fan_out_list(plan, profile, length)
    chances = profile.outcomes(length)
    return sum(P * (1 - profile.miss(j, length, F)) for j, (P, F) in enumerate(zip(chances, lists)))


class Play:
    """One run: the clock, each row's proposal, and what has happened so far."""

    def __init__(self, plan: Plan, times: Times, profile: Profile, seed: int):
        self.plan, self.times, self.profile = plan, times, profile
        self.rng = random.Random(seed)
        self.now = self.draft_free = 0.0
        self.length = [0] * plan.batch  # of each row's proposal; the first round has none
        self.useless = [False] * plan.batch  # proposals of random tokens: nothing of them holds
        self.tokens = self.lookups = self.hits = self.steps = 0
        self.exposed: list[float] = []  # rounds on which every row hit
        self.tables: dict[int, tuple[list[float], list[float]]] = {}

    def table(self, length: int) -> tuple[list[float], list[float]]:
        """For a proposal's length: the cumulated chances of its outcomes, and each outcome's chance to be missed."""
        if length not in self.tables:
            lists = fan_out_list(self.plan, self.profile, length)
            missed = [self.profile.miss(j, length, F) for j, F in enumerate(lists)]
            self.tables[length] = (list(accumulate(self.profile.outcomes(length)))[:-1], missed)
        return self.tables[length]

    def round(self) -> None:
        plan, times, longest = self.plan, self.times, max(self.length)
        begin, rows = self.now, range(plan.batch)
        verdict = begin + times.verifying(plan.batch * (longest + 1))
        accepted = []
        for b in rows:
            chances, _ = self.table(self.length[b])
            accepted.append(0 if self.useless[b] else bisect_right(chances, self.rng.random()))
        self.tokens += sum(accepted) + plan.batch
        self.now = verdict + times.handover
        if plan.mode == "sd":
            self.now += times.drafting(plan.k, plan.batch)
            self.length = [plan.k] * plan.batch
        elif plan.mode == "ssd":
            self.look_up(begin, verdict, accepted)

    def look_up(self, begin: float, verdict: float, accepted: list[int]) -> None:
        plan, times, rows = self.plan, self.times, range(self.plan.batch)
        hit = [self.rng.random() >= self.table(self.length[b])[1][accepted[b]] for b in rows]
        ready = max(begin, self.draft_free) + times.extending(plan.batch * (plan.k + 1)) + times.fork
        step = times.stepping(plan.batch * ceil(plan.fan_out / plan.devices))
        done, begun = plan.k, plan.k
        if plan.cut:  # what is ready at the verdict, at least one token; a step that has begun runs to its end
            fit = (verdict - ready) / step + SOON
            done, begun = (min(max(floor(steps), 1), plan.k) for steps in (fit, fit + 1 - BEGIN_IF))
        self.draft_free = ready + begun * step
        wait = ready + done * step if any(hit) or not plan.cut else ready
        self.now = max(verdict, wait) + times.handover
        self.lookups, self.hits, self.steps = self.lookups + len(hit), self.hits + sum(hit), self.steps + done
        if all(hit):
            self.exposed.append(self.now - verdict)
        self.length = [done if found else 0 for found in hit]
        self.useless = [False] * plan.batch
        if not all(hit):
            self.fall_back([b for b in rows if not hit[b]])

    def fall_back(self, missed: list[int]) -> None:
        plan, k, how = self.plan, self.plan.k, self.plan.fallback
        again = list(range(plan.batch)) if plan.whole_batch else missed
        drafted = max(self.now, self.draft_free)
        drafted += self.times.drafting(k, ceil(len(again) / plan.devices)) + self.times.handover
        if how == "auto":  # as Figures.prefers_jit: more tokens a second of waiting than the run makes anyway?
            gain = len(missed) * (expected_tokens(self.profile.acceptance, k) - 1)
            how = "jit" if gain * self.now > self.tokens * (drafted - self.now) else "fast"
        if how == "jit":
            self.now = drafted
        for b in again if how == "jit" else missed if how == "random" else ():
            self.length[b], self.useless[b] = k, how == "random"


def play(plan: Plan, times: Times, profile: Profile, row_rounds: int = 10_000, seed: int = 0) -> dict:
    """Play row_rounds / batch rounds. tokens_per_s is that of the whole batch, exposed_ms the mean on hits."""
    run = Play(plan, times, profile, seed)
    rounds = max(1, row_rounds // plan.batch) if plan.mode != "ar" else 1  # AR has no chance in it
    for _ in range(rounds):
        run.round()
    return {
        "tokens_per_s": run.tokens / run.now,
        "tokens_per_round": run.tokens / rounds / plan.batch,
        "round_ms": run.now / rounds * 1e3,
        "hit_rate": run.hits / run.lookups if run.lookups else None,
        "chain_length": run.steps / rounds if run.lookups else None,
        "exposed_ms": sum(run.exposed) / len(run.exposed) * 1e3 if run.exposed else None,
    }
