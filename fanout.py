"""Fan-out: where the draft's budget of M branches goes, learnt from the run itself.

Knows: how often each outcome happened and how well the draft ranked the next token. Does not know: tensors, models.
Read next: steps.py (fork), ssd.py.

P_j is the probability that exactly j draft tokens are accepted; m(F) the chance that the next token is not among the
draft's F best scores. Branch number F + 1 for outcome j is worth P_j * (m(F) - m(F + 1)): each next branch goes where
that is largest, which is optimal as long as m is convex. Only past outcomes are used, so every mode stays exact.

Under the coupling `shared` the scores of the round itself tell more (sampling.outcomes), and there are no lists. The
fork is told M and one number, how far the draft's scores stray from the target's. It is learnt: with the right one as
many drafted tokens hold as were expected to. How far down their order the real outcomes lie is learnt to choose M by.
"""

import heapq
import math
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

from sampling import CHAIN, FIXED, NONE

PRIOR_ACCEPTANCE, PRIOR_WEIGHT = 0.8, 8.0
# (c, b) of the prior m(F) = c * F^-b. A rejected position's token is harder to guess than the bonus token.
# Of all outcomes in one order, F is how many of them are prepared for each j, on average.
PRIOR_MISS = {"rejected": (0.45, 1.0), "bonus": (0.25, 1.2), "outcome": (0.35, 0.8)}
FINE = 8  # steps a branch in the curve of "outcome": M / (L + 1) is no whole number
REVISE_EVERY, CARRIED = 16, 24.0
# The demo pair settles at 0.6 (temperature 0) and 0.8 (1), where the outcomes are likeliest, too. A drafted token that
# holds against all odds makes it smaller by STRAY_STEP, one that fails larger.
STRAY, STRAY_LEAST, STRAY_MOST, STRAY_STEP = 0.7, 0.02, 4.0, 0.05


class ByScores(NamedTuple):
    """What a fork by scores is told."""

    budget: int
    stray: float = STRAY


def slots(probability: list[float], miss: list[list[float]], budget: int) -> Iterator[tuple[int, float]]:
    """Where each next branch is worth most: (outcome j, probability gained), `budget` times.

    probability  P_j for j = 0..L
    miss         for each j the curve m_j(0) = 1, m_j(1), ..., at least budget + 1 long, decreasing and convex
    """
    fan_out = [0] * len(probability)
    gain = lambda j: probability[j] * (miss[j][fan_out[j]] - miss[j][fan_out[j] + 1])  # noqa: E731
    heap = [(-gain(j), j) for j in range(len(probability))]
    heapq.heapify(heap)
    for _ in range(budget):
        less, j = heapq.heappop(heap)
        yield j, -less
        fan_out[j] += 1
        if fan_out[j] < budget:
            heapq.heappush(heap, (-gain(j), j))


def allocate(probability: list[float], miss: list[list[float]], budget: int) -> list[int]:
    """F_j for every outcome j, summing to exactly `budget`, that maximises sum_j P_j * (1 - miss[j][F_j])."""
    fan_out = [0] * len(probability)
    for j, _ in slots(probability, miss, budget):
        fan_out[j] += 1
    return fan_out


def convex(curve: list[float]) -> list[float]:
    """The greatest convex decreasing curve below a measured one: noise must not make the greedy choice wrong."""
    hull = []
    for point in enumerate(curve):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (point[0] - x0) < (point[1] - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(point)
    out = []
    for (x0, y0), (x1, y1) in zip(hull, hull[1:]):
        out += [y0 + (y1 - y0) * (x - x0) / (x1 - x0) for x in range(x0, x1)]
    return out + [hull[-1][1]]


class FanOut:
    """The fan-out of one run. observe() after every row's round, plan() before every fork.

    k and budget are the most there will be; `budget` may be set lower at any time. by_scores: outcomes are forked in
    the order of their own probabilities, else by lists.
    """

    def __init__(self, k: int, budget: int, adaptive: bool = True, by_scores: bool = False):
        self.k, self.budget, self.most, self.adaptive, self.by_scores = k, budget, budget, adaptive, by_scores
        kinds = (NONE, CHAIN, FIXED)  # each has its own profile: a guess from the text holds up unlike a drafted chain
        self.tested, self.accepted = ({kind: [0] * k for kind in kinds} for _ in range(2))
        self.fine, self.stray = FINE if by_scores else 1, STRAY
        uses = ("outcome",) if by_scores else ("rejected", "bonus")
        self.ranks = {use: [0] * (budget * self.fine) for use in uses}
        self.beyond = {use: [0] * (budget * self.fine + 1) for use in uses}  # not among the best M: by that M
        self.carried = 0.0  # the share of what earlier runs counted that is in these counts
        self._lists, self._curves, self._age = {}, {}, 0

    def _counts(self) -> list[list]:
        return [count for kept in (self.tested, self.accepted, self.ranks, self.beyond) for count in kept.values()]

    def begin_with(self, earlier: "FanOut") -> None:
        """What earlier runs of the same kind counted, at the weight of CARRIED tests: texts differ."""
        self.carried = min(1.0, CARRIED / max(1.0, sum(map(sum, earlier.tested.values()))))
        for mine, theirs in zip(self._counts(), earlier._counts()):
            mine[:] = [self.carried * n for n in theirs]
        self.stray = earlier.stray

    def add(self, run: "FanOut") -> None:
        """Keep what a run counted, which may have begun with these counts."""
        for mine, theirs in zip(self._counts(), run._counts()):
            mine[:] = [n + more - run.carried * n for n, more in zip(mine, theirs)]
        self.stray = run.stray

    def observe(self, kind: int, length: int, accepted: int, rank: int | None, among=None, held=None) -> None:
        """One row's outcome. rank: the place of the next token among the draft's `among` best scores for it (by scores:
        of the outcome among the `among` likeliest), None if it is not there. among: by default the budget; 0 where
        the draft ranked nothing. held: by scores, the chance of each drafted token to hold."""
        for place in range(min(accepted + 1, length)):  # what lies behind a rejection was not tested
            self.tested[kind][place] += 1
            self.accepted[kind][place] += place < accepted
        among = self.budget if among is None else among
        if among:
            use = "outcome" if self.by_scores else "rejected" if accepted < length else "bonus"
            if rank is None:
                self.beyond[use][self._place(among, length)] += 1
            else:
                self.ranks[use][max(self._place(rank + 1, length), 1) - 1] += 1
        if held and kind == CHAIN:  # a guess from the text is not the draft's
            surprise = accepted - sum(held[: min(accepted + 1, length)])
            self.stray = min(max(self.stray * math.exp(-STRAY_STEP * surprise), STRAY_LEAST), STRAY_MOST)
        self._age += 1
        if self._age >= REVISE_EVERY and self.adaptive:
            self._lists, self._curves, self._age = {}, {}, 0

    def outcome_probabilities(self, kind: int, length: int, weight: float = PRIOR_WEIGHT) -> list[float]:
        """P_0..P_L: each place's measured acceptance, drawn towards the kind's rate as if by `weight` tests."""
        tested, accepted = self.tested[kind], self.accepted[kind]
        overall = (sum(accepted) + PRIOR_WEIGHT * PRIOR_ACCEPTANCE) / (sum(tested) + PRIOR_WEIGHT)
        still, out = 1.0, []
        for place in range(length):
            a = (accepted[place] + weight * overall) / (tested[place] + weight)
            out.append(still * (1 - a))
            still *= a
        return out + [still]

    def miss_curve(self, use: str) -> list[float]:
        """m(0)..m(most). Of a token that was not among the best M only so much is known (Kaplan and Meier, 1958)."""
        (c, b), places = PRIOR_MISS[use], self.most * self.fine
        prior = [PRIOR_WEIGHT * min(c * (F / self.fine) ** -b if F else 1.0, 1.0) for F in range(places + 1)]
        known, curve = sum(self.ranks[use]) + sum(self.beyond[use]), [1.0]
        for F in range(places):
            still = known - self.ranks[use][F]
            curve.append(curve[F] * (still + prior[F + 1]) / (known + prior[F]))
            known = still - self.beyond[use][F + 1]
        return convex(curve)

    def _place(self, branches: int, length: int) -> int:
        """Where on its miss curve a number of branches is."""
        return branches * FINE // (length + 1) if self.by_scores else branches

    def plan(self, kinds: list[int], lengths: list[int]) -> ByScores | list[list[int]]:
        """What the fork of a round is told."""
        return ByScores(self.budget, self.stray) if self.by_scores else [self.lists(*of) for of in zip(kinds, lengths)]

    def curves(self, kind: int, length: int) -> tuple[list[float], list[list[float]]]:
        """P_0..P_L and the miss curve of each outcome."""
        if not self._curves:
            self._curves = {use: self.miss_curve(use) for use in self.ranks}
        return self.outcome_probabilities(kind, length), [self._curves["rejected"]] * length + [self._curves["bonus"]]

    def lists(self, kind: int, length: int) -> list[int]:
        """F_0..F_L for a round whose proposal has this kind and length."""
        key = (kind, length, self.budget)
        if key not in self._lists:
            self._lists[key] = allocate(*self.curves(kind, length), self.budget)
        return self._lists[key]

    def hits(self, kind: int, length: int) -> list[float]:
        """The probability of a hit with every budget from 0 to the most, with the best lists or by scores."""
        if self.by_scores:
            self._curves = self._curves or {"outcome": self.miss_curve("outcome")}
            return [1 - self._curves["outcome"][self._place(M, length)] for M in range(self.most + 1)]
        gains = [0.0, *(gain for _, gain in slots(*self.curves(kind, length), self.most))]
        return list(accumulate(gains))
