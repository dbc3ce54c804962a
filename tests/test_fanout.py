"""fanout.py against brute force and naive hulls, and the fork that spends what it allots."""

import itertools
import math
import random

import pytest
import torch
from families import random_text, tiny_model, whole
from laws import make, one_thread  # noqa: F401

import sampling
from fanout import (
    CARRIED,
    PRIOR_ACCEPTANCE,
    PRIOR_MISS,
    PRIOR_WEIGHT,
    REVISE_EVERY,
    STRAY,
    ByScores,
    FanOut,
    allocate,
    convex,
)
from runtime import Policy
from sampling import CHAIN, FIXED, NONE, RESIDUAL, TOKEN, gumbel, warp
from steps import LEFT_OUT, Feed, Runner

# ---- the budget


def caught(probability, miss, fan_out) -> float:
    """The chance that the outcome is among those prepared."""
    return sum(P * (1 - m[F]) for P, m, F in zip(probability, miss, fan_out))


def random_convex(rng, budget: int) -> list[float]:
    falls = sorted((rng.random() ** 3 for _ in range(budget)), reverse=True)
    return [1 - sum(falls[:F]) / (1.1 * sum(falls)) for F in range(budget + 1)]


def test_allocate_equals_the_best_of_all_lists():
    rng = random.Random(0)
    for outcomes, budget in itertools.product(range(1, 5), range(1, 7)):
        for _ in range(25):
            P = [rng.random() for _ in range(outcomes)]
            miss = [random_convex(rng, budget) for _ in range(outcomes)]
            every = (F for F in itertools.product(range(budget + 1), repeat=outcomes) if sum(F) == budget)
            got = allocate(P, miss, budget)
            assert sum(got) == budget and min(got) >= 0
            assert abs(caught(P, miss, got) - max(caught(P, miss, F) for F in every)) < 1e-12
    assert sum(allocate([0.0, 0.0], [[1.0] * 4] * 2, 3)) == 3  # shapes are fixed: worthless branches are spent too


@pytest.mark.parametrize(("a", "b"), [(0.8, 0.5), (0.6, 0.41), (0.9, 1.0)])
def test_allocate_approaches_the_papers_geometric_series(a, b):
    L, budget = 4, 6000
    P = [a**j * (1 - a) for j in range(L)] + [a**L]
    fan_out = allocate(P, [[1.0] + [0.5 * F**-b for F in range(1, budget + 1)]] * (L + 1), budget)
    for j in range(L):
        assert fan_out[j] / fan_out[0] == pytest.approx(a ** (j / (1 + b)), rel=0.02)
    assert fan_out[L] / fan_out[0] == pytest.approx(a ** (L / (1 + b)) * (1 - a) ** (-1 / (1 + b)), rel=0.02)


def test_convex_is_the_lower_hull():
    rng = random.Random(1)
    for length in (1, 2, 3, 5, 12):
        for _ in range(40):
            curve = sorted((rng.choice((rng.random(), 0.5)) for _ in range(length)), reverse=True)
            n = range(length)
            chord = lambda i, j, x: curve[i] if i == j else curve[i] + (curve[j] - curve[i]) * (x - i) / (j - i)  # noqa: E731
            naive = [min(chord(i, j, x) for i in n for j in n if i <= x <= j) for x in n]
            got = convex(curve)
            assert got == pytest.approx(naive, abs=1e-12)
            assert convex(got) == pytest.approx(got, abs=1e-12)


# ---- what a run learns


def prior_miss(use: str, budget: int) -> list[float]:
    c, b = PRIOR_MISS[use]
    return [1.0] + [c * F**-b for F in range(1, budget + 1)]


def test_before_any_outcome_the_prior_decides():
    a, k, M = PRIOR_ACCEPTANCE, 4, 10
    fan_out = FanOut(k, M)
    for kind, L in itertools.product((CHAIN, FIXED), range(1, k + 1)):
        P = [a**j * (1 - a) for j in range(L)] + [a**L]
        assert fan_out.outcome_probabilities(kind, L) == pytest.approx(P)
        wanted = allocate(P, [prior_miss("rejected", M)] * L + [prior_miss("bonus", M)], M)
        assert fan_out.lists(kind, L) == wanted and sum(wanted) == M
    assert fan_out.lists(NONE, 0) == [M]


def test_only_tested_places_count_and_each_kind_for_itself():
    k, M, rng = 5, 6, random.Random(2)
    fan_out, tested, accepted = FanOut(k, M), {}, {}
    for _ in range(300):
        kind = rng.choice((NONE, CHAIN, FIXED))
        length = 0 if kind == NONE else rng.randint(1, k)
        taken = rng.randint(0, length)
        fan_out.observe(kind, length, taken, None)
        for place in range(length):
            if place < taken:
                accepted[kind, place] = accepted.get((kind, place), 0) + 1
            if place <= taken:
                tested[kind, place] = tested.get((kind, place), 0) + 1
    for kind, place in itertools.product((NONE, CHAIN, FIXED), range(k)):
        assert fan_out.tested[kind][place] == tested.get((kind, place), 0)
        assert fan_out.accepted[kind][place] == accepted.get((kind, place), 0)


def test_kinds_learn_apart():
    fan_out = FanOut(3, 12)
    for _ in range(500):
        fan_out.observe(CHAIN, 3, 3, 0)
    assert fan_out.outcome_probabilities(FIXED, 3) == FanOut(3, 12).outcome_probabilities(FIXED, 3)
    for _ in range(500):
        fan_out.observe(FIXED, 3, 0, 2)
    chain, fixed = (fan_out.outcome_probabilities(kind, 3) for kind in (CHAIN, FIXED))
    assert chain[3] > 0.95 and fixed[0] > 0.95
    assert fan_out.lists(FIXED, 3)[0] > fan_out.lists(CHAIN, 3)[0]
    assert fan_out.lists(FIXED, 3)[3] < fan_out.lists(CHAIN, 3)[3]


def test_a_rank_of_none_lies_beyond_the_budget():
    M, n = 5, 200
    for rank, use in itertools.product((None, 0, 3, 4), ("rejected", "bonus")):
        fan_out, other = FanOut(2, M), {"rejected": "bonus", "bonus": "rejected"}[use]
        for _ in range(n):
            fan_out.observe(CHAIN, 2, 2 if use == "bonus" else 1, rank)
        beyond = [1.0] + [float(rank is None or rank >= F) for F in range(1, M + 1)]
        weighed = [(n * x + PRIOR_WEIGHT * y) / (n + PRIOR_WEIGHT) for x, y in zip(beyond, prior_miss(use, M))]
        assert fan_out.miss_curve(use) == pytest.approx(convex([1.0, *weighed[1:]]))
        assert fan_out.miss_curve(other) == pytest.approx(convex(prior_miss(other, M)))


def test_a_long_run_finds_the_true_profile():
    """P with a different acceptance at each place, and m, from 20,000 outcomes; then the list is the best one."""
    k, M, n, rng = 3, 8, 20_000, random.Random(3)
    rates, ranks = [0.9, 0.5, 0.7], {"rejected": [0.5, 0.2, 0.1, 0.05], "bonus": [0.8, 0.1]}
    fan_out = FanOut(k, M)
    for _ in range(n):
        taken = next((j for j in range(k) if rng.random() >= rates[j]), k)
        shares = ranks["rejected" if taken < k else "bonus"]
        rank = rng.choices([*range(len(shares)), None], [*shares, 1 - sum(shares)])[0]
        fan_out.observe(CHAIN, k, taken, rank)
    P = [0.1, 0.9 * 0.5, 0.45 * 0.3, 0.45 * 0.7]
    assert fan_out.outcome_probabilities(CHAIN, k) == pytest.approx(P, abs=0.02)
    miss = {use: convex([1 - sum(shares[:F]) for F in range(M + 1)]) for use, shares in ranks.items()}
    for use, curve in miss.items():
        assert fan_out.miss_curve(use) == pytest.approx(curve, abs=0.02)
    curves = [miss["rejected"]] * k + [miss["bonus"]]
    best = max(caught(P, curves, F) for F in itertools.product(range(M + 1), repeat=k + 1) if sum(F) == M)
    assert caught(P, curves, fan_out.lists(CHAIN, k)) > best - 0.01


def test_lists_follow_from_past_outcomes_only():
    k, M, rng = 3, 9, random.Random(4)
    fan_out, still = FanOut(k, M), FanOut(k, M, adaptive=False)
    at_first, history, given, changes = still.lists(CHAIN, k), [], [], 0
    for n in range(6 * REVISE_EVERY):
        given.append((n, list(fan_out.lists(CHAIN, k))))
        changes += n > 0 and given[-1][1] != given[-2][1]
        outcome = (CHAIN, k, rng.choice((0, 0, 0, 1)), rng.choice((0, 5, None)))
        history.append(outcome)
        fan_out.observe(*outcome)
        still.observe(*outcome)
    assert 0 < changes <= 5  # revised every REVISE_EVERY outcomes, no more
    assert still.lists(CHAIN, k) == at_first
    for n, lists in given:  # another run with the same past gives the same list, whatever comes after
        again = FanOut(k, M)
        for outcome in history[: n - n % REVISE_EVERY]:
            again.observe(*outcome)
        assert again.lists(CHAIN, k) == lists
    for kind, L in [(NONE, 0), *itertools.product((CHAIN, FIXED), range(k + 1))]:
        F = fan_out.lists(kind, L)
        assert len(F) == L + 1 and sum(F) == M and min(F) >= 0


def test_by_scores_a_run_finds_how_far_down_its_outcomes_lie():
    """Outcomes drawn from known probabilities, in rounds of every length and budget: hits() gives their sums back."""
    k, M, rng, share = 3, 24, random.Random(6), 0.8
    fan_out = FanOut(k, M, by_scores=True)
    assert fan_out.plan([CHAIN, NONE], [3, 0]) == (M, STRAY), "no lists"
    before = fan_out.hits(CHAIN, k)
    for _ in range(20_000):
        L, budget = rng.randint(0, k), rng.choice((4, 8, M))
        rank = 0
        while rng.random() < share ** (1 / (L + 1)):  # the more outcomes there can be, the further down
            rank += 1
        fan_out.observe(CHAIN if L else NONE, L, rng.randint(0, L), rank if rank < budget else None, budget)
    for L in range(k + 1):
        hits = fan_out.hits(CHAIN if L else NONE, L)
        assert len(hits) == M + 1 and hits[0] == 0 and all(a <= b for a, b in zip(hits, hits[1:]))
        for budget in (4, 8, 12, M):
            assert hits[budget] == pytest.approx(1 - share ** (budget / (L + 1)), abs=0.04), (L, budget)
    assert max(abs(a - b) for a, b in zip(before, fan_out.hits(CHAIN, k))) > 0.05, "the prior was no answer already"


# ---- the fork


@pytest.mark.parametrize("true", [0.15, 0.6, 1.8])
def test_by_scores_a_run_finds_how_far_its_scores_stray(true):
    """A target whose scores are the draft's plus Gumbel noise of a known scale, as outcomes() has it. Proposals that no
    draft drew teach nothing, nor does what lies behind a rejection."""
    k, V, rng = 3, 40, torch.Generator().manual_seed(1)
    fan_out, found = FanOut(k, 8, by_scores=True), []
    for n in range(3000):
        scores = 2 * torch.randn(1, k + 1, V, generator=rng)
        error = -(-torch.rand(k, V, generator=rng).log()).log()
        d = scores[0].argmax(-1)
        same = (scores[0, :k] + true * error).argmax(-1) == d[:k]
        stray = torch.tensor([fan_out.plan([CHAIN], [k]).stray])
        held = sampling.outcomes(scores, d[None], torch.tensor([k]), stray)[1][0].tolist()
        if n % 5 == 0:
            before = fan_out.stray
            fan_out.observe(FIXED, k, 0, None, 8, held)
            assert fan_out.stray == before
        fan_out.observe(CHAIN, k, int(same.int().cumprod(0).sum()), 0, 8, held)
        found.append(fan_out.stray)
    assert sum(found[1000:]) / 2000 == pytest.approx(true, rel=0.12)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 5), (0.0, 0)])
def test_by_scores_the_likeliest_outcomes_are_forked(temperature, top_k):
    """Against sums in plain Python, row by row: proposals of every length side by side, a row that has ended among
    them, drafted tokens that are unlikely, and more tokens fed than proposed."""
    k, M, stray, draft = 3, 9, 0.4, tiny_model()
    lengths, start, n = [k, 1, 0, 2, -1], 11, 5
    texts = [random_text(start + 1 + k, seed=b) for b in range(n)]
    runner = Runner(draft, n, 64, k, M, Policy(torch.device("cpu"), False))
    runner.set_rows(make(n, temperature, top_k, 1.0, seed=9, row=list(range(n))), "shared", 1.0)
    runner.prefill([text[:start] for text in texts], [0] * n)
    feed = Feed([text[start:] for text in texts], [start] * (n - 1) + [0], [L + 1 for L in lengths])
    tokens, depths, best, held = runner.fork(runner.extend(feed), feed, ByScores(M, stray))
    assert best is None
    for b, L in enumerate(lengths[:-1]):
        chance, all_held = {}, 1.0
        params = make(1, temperature, top_k, 1.0, seed=9, row=[b])
        for j in range(L + 1):
            logits = whole(draft, texts[b][: start + 1 + j])[-1]
            scores = warp(logits[None, None], params, LEFT_OUT)[0, 0]
            if temperature:
                at = torch.tensor([[start + 1 + j]])
                scores = scores + gumbel(params, at, TOKEN, len(logits), torch.float64)[0, 0]
            draws = [math.exp((s - scores.max().item()) / stray) for s in scores.tolist()]
            for t, weight in enumerate(draws):
                if j == L or t != texts[b][start + 1 + j]:
                    chance[j, t] = all_held * weight / sum(draws)
            if j < L:
                holds = draws[texts[b][start + 1 + j]] / sum(draws)
                assert holds - 0.001 <= held[b][j] <= holds
                all_held *= holds
        assert sum(chance.values()) == pytest.approx(1, abs=1e-12), "something happens, and only one thing"
        assert list(zip(depths[b], tokens[b])) == sorted(chance, key=chance.get, reverse=True)[:M]


@pytest.mark.parametrize("coupling", ["shared", "maximal", "independent"])
@pytest.mark.parametrize("way", [(1.0, 0, 1.0), (1.0, 1, 1.0), (0.8, 5, 0.6), (0.0, 0, 1.0), (0.0, 1, 0.1)])
def test_forks_are_the_best_scores_without_the_drafted_token(coupling, way):
    """Also where the draft's filter keeps nothing but the drafted token: the others follow in their order."""
    k, M, start, draft = 3, 7, 11, tiny_model()
    text = random_text(start + 1 + k, seed=5)
    runner = Runner(draft, 1, 64, k, M, Policy(torch.device("cpu"), False))
    params = make(1, *way, seed=9, row=[4])
    runner.set_rows(params, coupling, 1.0)
    runner.prefill([text[:start]], [0])
    for L in (k, 1):
        feed = Feed([text[start:]], [start], [L + 1])
        scores = runner.extend(feed)
        for j in range(L + 1):
            forked, depths, best, _ = runner.fork(scores, feed, [[M * (i == j) for i in range(L + 1)]])
            assert forked[0] == best[0][j] and len(set(forked[0])) == M and depths[0] == [j] * M
            logits = whole(draft, text[: start + 1 + j])[-1]
            scaled, kept = logits / (way[0] or 1), warp(logits[None, None], params)[0, 0] > -torch.inf
            if way[0] > 0 and coupling != "independent":
                purpose = RESIDUAL if coupling == "maximal" and j < L else TOKEN
                at = torch.tensor([[start + 1 + j]])
                scaled = scaled + gumbel(params, at, purpose, len(logits), torch.float64)[0, 0]
            order = sorted(range(len(logits)), key=lambda t: (not kept[t], -scaled[t]))
            if j < L:
                order.remove(text[start + 1 + j])
            assert forked[0] == order[:M]


@pytest.mark.parametrize("by_scores", [False, True])
def test_what_runs_learnt_adds_up(by_scores):
    """Runs that each begin with the ones before: what is kept is what one run of them all would have counted."""
    kept, whole, rng = FanOut(3, 8, by_scores=by_scores), FanOut(3, 8, by_scores=by_scores), random.Random(4)
    for _ in range(3):
        run = FanOut(3, 8, by_scores=by_scores)
        run.begin_with(kept)
        assert sum(map(sum, run.tested.values())) <= CARRIED + 1e-9
        for _ in range(rng.randrange(5, 60)):
            rank = rng.choice((None, *range(8)))
            outcome = (rng.choice((CHAIN, FIXED)), 3, rng.randrange(4), rank, 8)
            run.observe(*outcome)
            whole.observe(*outcome)
        assert run.stray == kept.stray
        run.stray += 0.1
        kept.add(run)
        assert kept.stray == run.stray
        for mine, theirs in zip(kept._counts(), whole._counts()):
            assert mine == pytest.approx(theirs)
    again = FanOut(3, 8, by_scores=by_scores)
    again.begin_with(kept)
    assert sum(map(sum, again.tested.values())) == pytest.approx(CARRIED)
    assert again.hits(CHAIN, 3) != FanOut(3, 8, by_scores=by_scores).hits(CHAIN, 3)
