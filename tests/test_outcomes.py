"""What the draft foresees of a round, against enumeration; what a run learns of it; and the fork
that follows from it.

Shape letters as in sampling.py. An outcome (j, t): j drafted tokens hold, the token after them is
t.
"""

import itertools
import math
from statistics import geometric_mean

import pytest
import torch
from laws import make, one_thread  # noqa: F401
from tiny import cut_head, log_probs, transformer

from rows import COUPLINGS
from runtime import Policy
from sampling import (
    MISS_POWER,
    RESIDUAL,
    TOKEN,
    Foresight,
    gumbel,
    outcomes,
    share_out,
    warp,
)
from steps import LEFT_OUT, Feed, Runner
from studies.speed import geometric

# ---- the probabilities


def softmax(scores: list[float]) -> list[float]:
    weights = [math.exp(x - max(scores)) for x in scores]
    return [w / sum(weights) for w in weights]


def enumerated(
    scores_TV, drafted: list[int], length: int, spread: float, hold: float | None
) -> dict:
    """(j, t) -> probability, over all that may be drawn at all places. A drafted token V is not
    known.

    hold None: a drafted token holds if it is drawn, an unknown one half of the time. Else it holds
    with this probability, and what is drawn after a rejection is another one.
    """
    V, chance = len(scores_TV[0]), {}
    laws = [softmax([s / spread for s in scores]) for scores in scores_TV[: length + 1]]
    for held in itertools.product((True, False), repeat=length):
        for drawn in itertools.product(range(V), repeat=length + 1):
            p, j = 1.0, next((i for i, h in enumerate(held) if not h), length)
            for i, (law, t) in enumerate(zip(laws, drawn)):
                known = i < length and drafted[i] < V
                if i == length:
                    p *= law[t]
                elif hold is not None:  # what is drawn counts after a rejection only
                    others = sum(q for v, q in enumerate(law) if v != drafted[i])
                    p *= hold / V if held[i] else (1 - hold) * law[t] / others * (t != drafted[i])
                elif known:
                    p *= law[t] * (held[i] == (t == drafted[i]))
                else:
                    p *= 0.5 * law[t]
            chance[j, drawn[j]] = chance.get((j, drawn[j]), 0.0) + p
    return {outcome: p for outcome, p in chance.items() if p > 0}


@pytest.mark.parametrize("hold", [None, 0.3, 0.9])
@pytest.mark.parametrize("spread", [0.3, 1.0, 2.5])
def test_outcomes_equal_enumeration(spread, hold):
    """Rows of every length side by side, likely and unlikely drafted tokens, and ones that the
    draft does not know."""
    V, K = 3, 2
    rng = torch.Generator().manual_seed(3)
    rows = [(d, L) for L in range(K + 1) for d in itertools.product(range(V + 1), repeat=K)]
    scores_BTV = 2 * torch.randn(len(rows), K + 1, V, generator=rng, dtype=torch.float64)
    drafted_BT = torch.tensor([[*d, 0] for d, _ in rows])
    full = lambda x: torch.full((len(rows),), x, dtype=torch.float64)  # noqa: E731
    length_B, hold_B = torch.tensor([L for _, L in rows]), None if hold is None else full(hold)
    got_BTV = outcomes(scores_BTV, drafted_BT, length_B, full(spread), hold_B)
    for b, (d, L) in enumerate(rows):
        wanted = enumerated(scores_BTV[b].tolist(), d, L, spread, hold)
        assert sum(wanted.values()) == pytest.approx(1), "something happens, and only one thing"
        for j, t in itertools.product(range(K + 1), range(V)):
            assert got_BTV[b, j, t].exp().item() == pytest.approx(
                wanted.get((j, t), 0.0), abs=1e-12
            )


# ---- what a run learns


@pytest.mark.parametrize("begin", [0.1, 1.5])
@pytest.mark.parametrize("true", [0.25, 0.6, 0.9])
def test_foresight_finds_how_far_the_scores_are_from_the_targets(true, begin):
    """A target whose scores are the draft's plus Gumbel noise of a known scale, as outcomes() has
    it."""
    B, V, K, M, rng = 40, 12, 2, 4, torch.Generator().manual_seed(1)
    foresight, found, chances, hits = Foresight(spread=begin), [], 0.0, 0
    for number in range(250):
        scores_BTV = 2 * torch.randn(B, K + 1, V, generator=rng)
        noise_BTV = -(-torch.rand(B, K + 1, V, generator=rng).log()).log()
        drawn_BT, drafted_BT = (scores_BTV + true * noise_BTV).argmax(-1), scores_BTV.argmax(-1)
        accepted_B = (drawn_BT == drafted_BT)[:, :K].int().cumprod(1).sum(1)
        spread_B = torch.full((B,), foresight.spread)
        joint = outcomes(scores_BTV, drafted_BT, torch.full((B,), K), spread_B, None)
        top = joint.flatten(1).topk(M)
        outcome_B1 = (accepted_B * V + drawn_BT.gather(1, accepted_B[:, None])[:, 0])[:, None]
        hit_B, chance_B = (top.indices == outcome_B1).any(1), top.values.exp().sum(1)
        for b in range(B):
            foresight.learn(
                chance_B[b].item(), hit_B[b].item(), int(accepted_B[b]), int(accepted_B[b] < K)
            )
        found.append(foresight.spread)
        if number >= 50:
            chances, hits = chances + chance_B.mean().item(), hits + hit_B.float().mean().item()
    assert geometric_mean(found[50:]) == pytest.approx(true, rel=0.1)
    assert chances / 200 == pytest.approx(hits / 200, abs=0.01), "as many hits as were expected"


@pytest.mark.parametrize("rate", [0.2, 0.75, 0.95])
def test_foresight_finds_how_often_a_drafted_token_holds(rate):
    rng, foresight, found, K = torch.Generator().manual_seed(2), Foresight(), [], 3
    for holds in (torch.rand(4000, K, generator=rng) < rate).int().cumprod(1).sum(1).tolist():
        foresight.learn(0.5, 0.5, holds, int(holds < K))
        found.append(foresight.hold)
    assert sum(found[500:]) / 3500 == pytest.approx(rate, abs=0.02)
    assert foresight.spread == Foresight().spread, "hits came as expected: nothing to learn"


def test_foresight_never_becomes_certain():
    low, high = Foresight(), Foresight()
    for _ in range(5000):
        low.learn(1.0, 0.0, 0, 1)
        high.learn(0.0, 1.0, 4, 0)
    assert 1 < low.spread < 2 and 0 < low.hold < 0.1
    assert 0 < high.spread < 0.1 and 0.9 < high.hold < 1


# ---- the fork

SOME_IDS = [t for t in range(50) if t % 5 != 3]
WAYS = [(1.0, 0, 1.0), (0.7, 5, 1.0), (0.8, 5, 0.6), (1.0, 1, 1.0), (0.0, 0, 1.0), (0.0, 1, 0.1)]


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cut", [False, True])
def test_the_likeliest_outcomes_are_forked(coupling, way, cut):
    """Against sums in plain Python: by scores with the noise that will draw, and with what the
    filters leave out last.

    Proposals of every length side by side, a row that has ended among them, drafted tokens that are
    unlikely or that a cut head does not have, and more tokens fed than proposed.
    """
    k, M, start, foresight = 3, 9, 11, Foresight(spread=0.4, hold=0.7)
    whole = transformer(1)
    draft, ids = (cut_head(whole, SOME_IDS), SOME_IDS) if cut else (whole, list(range(50)))
    lengths, n, rng = [k, 1, 0, 2, -1], 5, torch.Generator().manual_seed(4)
    texts = torch.randint(0, 50, (n, start + 1 + k), generator=rng).tolist()
    texts[0][start + 2], texts[3][start + 1] = 13, 48  # the cut head has neither
    runner = Runner("draft", draft, n, 64, k, M, Policy(torch.device("cpu"), False), 50)
    runner.set_rows(make(n, *way, seed=9, row=list(range(n))), coupling, 1.0)
    with torch.inference_mode():
        runner.prefill([text[:start] for text in texts], [0] * n)
        feed = Feed(
            [text[start:] for text in texts], [start] * (n - 1) + [0], [L + 1 for L in lengths]
        )
        fork = runner.fork(runner.extend(feed), feed, M, foresight)
    for b, L in enumerate(lengths[:-1]):
        params, drafted = make(1, *way, seed=9, row=[b]), texts[b][start + 1 : start + 1 + L]
        scores = []
        for j in range(L + 1):
            logits_V = log_probs(whole, texts[b][: start + 1 + j])[-1][ids]
            scores_V = warp(logits_V[None, None], params, LEFT_OUT)[0, 0]
            if way[0] and coupling != "independent":
                purpose = RESIDUAL if coupling == "maximal" and j < L else TOKEN
                at = torch.tensor([[start + 1 + j]])
                scores_V = scores_V + gumbel(params, at, purpose, 50, torch.float64)[0, 0][ids]
            scores.append(scores_V.tolist())
        chance, before = {}, 1.0
        for j in range(L + 1):
            strength = {t: s / foresight.spread for t, s in zip(ids, scores[j])}
            law = dict(zip(ids, softmax(list(strength.values()))))
            d, holds, rest = drafted[j] if j < L else None, 0.5, 0.5 if j < L else 1.0
            if coupling != "shared":
                holds, rest = foresight.hold, 1 - foresight.hold if j < L else 1.0
                others = [t for t in ids if t != d]
                law = dict(zip(others, softmax([strength[t] for t in others])))
            elif d in law:
                holds, rest = law[d], 1.0
            chance |= {(j, t): before * rest * p for t, p in law.items() if t != d}
            before *= holds
        assert sum(chance.values()) == pytest.approx(1)
        forked = list(zip(fork.depths[b], fork.tokens[b]))
        if coupling != "shared":  # the best of each j, as many as its share
            kept = {}
            for j, F in enumerate(share_out(foresight.hold, L, M)):
                mine = [outcome for outcome in chance if outcome[0] == j]
                for outcome in sorted(mine, key=chance.get, reverse=True)[:F]:
                    kept[outcome] = chance[outcome]
            chance = kept
        best = sorted(chance.values(), reverse=True)[:M]
        assert len(set(forked)) == M
        assert [chance[outcome] for outcome in forked] == pytest.approx(best, rel=1e-6, abs=0)
        assert fork.chance[b] == pytest.approx(sum(best))


# ---- shares of the budget, where a hit must say nothing about the chain's noise


@pytest.mark.parametrize("coupling", ["maximal", "independent"])
def test_other_places_do_not_decide_whether_an_outcome_is_prepared(coupling):
    """A chain for (j, t) is drawn with the noise of the positions after j, and so are the scores of
    the places after j. If these decided whether (j, t) is prepared, a hit would tell something
    about the chain, and its tokens would not be drawn from q any more.
    """
    T, V, M = 4, 30, 8
    whole = transformer(1, vocab=V)
    runner = Runner("draft", whole, 1, 64, T - 1, M, Policy(torch.device("cpu"), False), V)
    runner.set_rows(make(1, 1.0, 0, 1.0, seed=9, row=[0]), coupling, 1.0)
    feed, foresight = Feed([[1, 2, 3, 4]], [0], [T]), Foresight(hold=0.6)
    for seed in range(20):
        scores_BTV = torch.randn(1, T, V, generator=torch.Generator().manual_seed(seed)).double()
        with torch.inference_mode():
            before = runner.fork(scores_BTV, feed, M, foresight)
            for j in range(T):
                rng = torch.Generator().manual_seed(99)
                other = 9 * torch.randn(1, T, V, generator=rng).double()
                other[0, j] = scores_BTV[0, j]
                after = runner.fork(other, feed, M, foresight)
                mine, theirs = (
                    {t for d, t in zip(fork.depths[0], fork.tokens[0]) if d == j}
                    for fork in (before, after)
                )
                assert mine == theirs and len(mine) == share_out(0.6, T - 1, M)[j]


def test_the_shares_are_the_papers_series():
    """Every budget is spent, earlier places get more, the last one is raised; against studies/."""
    for hold in (0.1, 0.5, 0.9):
        for length in range(5):
            for m in (1, 4, 24):
                shares = share_out(hold, length, m)
                wanted = geometric(hold, MISS_POWER, length, m)
                assert sum(shares) == m and len(shares) == length + 1
                assert all(abs(F - share) < 1 for F, share in zip(shares, wanted))
