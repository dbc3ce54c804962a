"""The speed model: tokens a second from times and chances, and where a budget goes best.

Knows: what the walkthrough's sections 6 and 10 build on. Does not know: the engine, and what
anybody measured. Read next: simulate.py.

All times are seconds. P_j is the chance that exactly j draft tokens of a proposal of length L are
accepted. m(F) is the chance that the next token is not among the F that are prepared for j.
"""

import heapq
from collections.abc import Sequence


def sd_rate(tokens: float, t_draft: float, t_verify: float) -> float:
    """Tokens a second and row of SD, whose rounds emit `tokens`: draft and target take turns."""
    return tokens / (t_draft + t_verify)


def ssd_rate(hit_rate, tokens_hit, tokens_miss, t_hit, t_miss, batch: int = 1) -> float:
    """Tokens a second and row of SSD. A round of a batch is short only if every row hits."""
    all_hit = hit_rate**batch
    emitted = hit_rate * tokens_hit + (1 - hit_rate) * tokens_miss
    return emitted / (all_hit * t_hit + (1 - all_hit) * t_miss)


def long_run_hits(after_hit: float, after_miss: float) -> float:
    """The share of rounds that hit, where the chance of it depends on whether the last one did."""
    return after_miss / (1 - after_hit + after_miss)


def outcomes(acceptance: float, length: int) -> list[float]:
    """P_0..P_L for a constant acceptance."""
    return [acceptance**j * (1 - acceptance) for j in range(length)] + [acceptance**length]


def power_law(c: float, b: float, budget: int) -> list[float]:
    """m(0)..m(budget) with m(F) = c F^-b, which is how the paper describes what it measured."""
    return [1.0] + [min(1.0, c * F**-b) for F in range(1, budget + 1)]


def allocate(
    probability: Sequence[float], miss: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """F_0..F_L, `budget` in all, with the most hits: each next branch goes where it adds most.

    miss has for each j the curve m(0)..m(budget). That the greedy choice is the best one needs
    decreasing, convex curves.
    """

    def gain(j: int) -> float:
        return probability[j] * (miss[j][F[j]] - miss[j][F[j] + 1])

    F = [0] * len(probability)
    heap = [(-gain(j), j) for j in range(len(probability))]
    heapq.heapify(heap)
    for left in range(budget, 0, -1):
        j = heapq.heappop(heap)[1]
        F[j] += 1
        if left > 1:
            heapq.heappush(heap, (-gain(j), j))
    return F


def geometric(acceptance: float, exponent: float, length: int, budget: int) -> list[float]:
    """F_0..F_L as real numbers, the paper's fan-out: a geometric series whose last term is raised.

    P_j is the probability that exactly j draft tokens are accepted: a^j (1 - a), and a^L for j = L,
    where nothing has to be rejected. F guesses all miss with the chance c F^-b, whatever c is (b is
    the exponent). The F_j sum to M and maximise the sum of P_j (1 - c F_j^-b): at the optimum one
    more branch is worth the same for every j, P_j b c F_j^-(1+b) = constant. So F_j is proportional
    to P_j^(1/(1+b)), here divided by the common (1 - a)^(1/(1+b)).
    """
    power = 1 / (1 + exponent)
    weights = [acceptance ** (j * power) for j in range(length + 1)]
    weights[-1] *= (1 - acceptance) ** -power
    return [budget * weight / sum(weights) for weight in weights]


def whole(shares: Sequence[float], budget: int) -> list[int]:
    """Real shares as whole numbers with the same sum: the largest remainders are rounded up."""
    out = [int(share) for share in shares]
    by_remainder = sorted(range(len(out)), key=lambda j: out[j] - shares[j])
    for j in by_remainder[: budget - sum(out)]:
        out[j] += 1
    return out
