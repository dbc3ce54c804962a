"""The accept rules by exact enumeration, and end to end with 200,000 texts each against the joint
law of the target.

Seeds are fixed, so every p-value is the same on every run. Shape letters as in sampling.py; C
cases, N tokens of text.
"""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from laws import INF, MANY, WAYS, chi_square, law_of, make, one_thread, pick  # noqa: F401

import sampling
from sampling import (
    ACCEPT,
    CHAIN,
    FIXED,
    NONE,
    RESIDUAL,
    TOKEN,
    Params,
    accept_exact,
    accept_shared,
    log_probs,
    noisy,
    saguaro,
    warp,
)

# ---- acceptance, enumerated


def test_accept_shared_equals_the_naive_loop():
    rng = torch.Generator().manual_seed(4)
    for K in range(5):
        B = 500
        draws, tokens = (torch.randint(0, 2, (B, K + i), generator=rng) for i in (1, 0))
        tokens[:50] = -1
        length = torch.randint(0, K + 1, (B,), generator=rng)
        accepted, following = accept_shared(draws, tokens, length)
        for b in range(B):
            j = 0
            while j < length[b] and tokens[b, j] == draws[b, j]:
                j += 1
            assert (accepted[b], following[b]) == (j, draws[b, j])


def bisect(low: torch.Tensor, high: torch.Tensor, holds) -> torch.Tensor:
    """The point up to which holds(x) is true, to the last digit."""
    for _ in range(70):
        middle = (low + high) / 2
        yes = holds(middle)
        low, high = torch.where(yes, middle, low), torch.where(yes, high, middle)
    return low


def pairs_of_laws(V: int) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Target logits (C, V), drafted log q (C, V) and temperatures of every kind of case, in 64
    bits."""
    rng = np.random.default_rng(5)
    flat, eye, draw = np.full(V, 1 / V), np.eye(V), lambda sharp: rng.dirichlet(np.full(V, sharp))
    p, q = zip(
        *[
            (draw(s), draw(t))
            for s, t in itertools.product((0.2, 1.0, 5.0), repeat=2)
            for _ in range(3)
        ]
    )
    p, q = list(p), list(q)
    p += [
        flat,
        p[0],
        [0.5, 0.5, 0, 0, 0],
        [0.2, 0, 0.3, 0.5, 0],
        [0.1, 0.9, 0, 0, 0],
        eye[2],
        p[1],
        eye[1],
        eye[3],
    ]
    q += [
        flat,
        p[0],
        [0, 0, 0.2, 0.3, 0.5],
        [0, 0.6, 0.3, 0, 0.1],
        [0.9, 0.1, 0, 0, 0],
        q[1],
        eye[2],
        eye[1],
        eye[0],
    ]
    logits, logq, temperature = (
        torch.tensor(np.array(p)).log(),
        torch.tensor(np.array(q)).log(),
        [1.0] * len(p),
    )
    ways = [(1.0, 2, 1.0), (0.7, 0, 0.6), (1.5, 3, 0.8), (0.0, 0, 1.0), (0.0, 2, 0.5)]
    raw_target, raw_draft = 3 * torch.tensor(rng.standard_normal((2, len(ways), 1, V)))
    params = make(len(ways), *map(list, zip(*ways)))
    logits = torch.cat((logits, warp(raw_target, params)[:, 0]))
    logq = torch.cat((logq, log_probs(warp(raw_draft, params), params)[:, 0]))
    return logits, logq, temperature + [way[0] for way in ways]


class Stage:
    """accept_exact with noise of our choosing. Its rows are (case, draft token at `place`), C * V
    of them.

    At the other places the two laws are equal, so that token 0 passes there whatever the uniform.
    """

    V, K = 5, 3

    def __init__(self, monkeypatch, kind: int, place: int):
        V, K, self.place = self.V, self.K, place
        logits_CV, self.logq_CV, temperature = pairs_of_laws(V)
        self.C = len(logits_CV)
        greedy_C = torch.tensor(temperature) == 0
        certain_CV = torch.eye(V)[logits_CV.argmax(-1)].double()
        self.p_CV = torch.where(greedy_C[:, None], certain_CV, logits_CV.softmax(-1))
        self.rows = self.C * V
        self.case, self.drafted = (
            torch.arange(self.C).repeat_interleave(V),
            torch.arange(V).repeat(self.C),
        )
        warped = torch.zeros(self.rows, K + 1, V, dtype=torch.float64)
        warped[..., 0] = 1e-3  # token 0 is the likeliest, for temperature 0
        params = make(self.rows, [temperature[c] for c in self.case.tolist()])
        logq = log_probs(warped[:, :K], params)
        warped[:, place], logq[:, place] = logits_CV[self.case], self.logq_CV[self.case]
        if kind == FIXED:  # to pass for sure takes p = 1; q means nothing
            warped[:, :place, 1:], logq = -INF, torch.full_like(logq, float("nan"))
        tokens = torch.zeros(self.rows, K, dtype=torch.int64)
        tokens[:, place] = self.drafted
        length = torch.full((self.rows,), place if kind == NONE else K)
        kinds = torch.full((self.rows,), CHAIN if kind == NONE else kind)
        self.inputs = (
            warped,
            logq,
            tokens,
            length,
            kinds,
            *params[:6],
            100 + torch.arange(self.rows),
        )
        monkeypatch.setattr(sampling, "uniform", self.uniform)
        monkeypatch.setattr(sampling, "gumbel", self.gumbel)

    def uniform(self, params, positions_BT, purpose, dtype):
        assert purpose == ACCEPT and torch.equal(
            positions_BT, self.start_B[:, None] + torch.arange(self.K)
        )
        u_BK = torch.full(positions_BT.shape, 2.0**-32, dtype=torch.float64)
        u_BK[:, self.place] = self.u_B
        return u_BK

    def gumbel(self, params, positions_BT, purpose, tokens, dtype):
        self.drawn_at = positions_BT[:, 0]
        return self.noise[purpose][:, None]

    def run(self, u_B, noise: dict, repeat: int = 1):
        """Accept with these uniforms at `place` and this noise {purpose: (rows, V)}, every row
        `repeat` times."""
        *inputs, self.start_B = (x.repeat_interleave(repeat, 0) for x in self.inputs)
        self.u_B, self.noise = u_B.repeat_interleave(repeat), noise
        out = accept_exact(*inputs[:5], Params(*inputs[5:], False, False), self.start_B)
        assert torch.equal(self.drawn_at, self.start_B + out[0])
        return out

    def accept_probability(self) -> torch.Tensor:
        """The probability (rows,) that the draft token passes, those before it having passed."""
        silent = dict.fromkeys(
            (TOKEN, RESIDUAL), torch.zeros(self.rows, self.V, dtype=torch.float64)
        )
        passes = lambda u_B: self.run(u_B, silent)[0] > self.place  # noqa: E731
        zero = torch.zeros(self.rows, dtype=torch.float64)
        return torch.where(passes(zero + 1 - 2.0**-53), 1.0, bisect(zero, zero + 1, passes))

    def next_law(self, u_B, purpose: int) -> torch.Tensor:
        """The law (rows, V) of the next token, read back from how much noise lets a token win
        against another one.

        The noise of the wrong purpose pulls hard towards token 0.
        """
        rows, V = self.rows * self.V, self.V  # row b and the token that is pushed
        pushed = torch.arange(V).repeat(self.rows)
        full = lambda x: torch.full((rows,), x, dtype=torch.float64)  # noqa: E731
        wrong = {TOKEN: RESIDUAL, RESIDUAL: TOKEN}[purpose]
        pull = 1e9 * torch.eye(V, dtype=torch.float64)[:1].expand(rows, V)

        def wins(push_B, others_BV):
            noise = others_BV.scatter(1, pushed[:, None], push_B[:, None])
            return self.run(u_B, {purpose: noise, wrong: pull}, V)[1] == pushed

        possible = wins(full(1e6), torch.zeros(rows, V).double()).view(-1, V)
        reference = possible.int().argmax(1).repeat_interleave(V)
        others = torch.full((rows, V), -1e6).double().scatter_(1, reference[:, None], 0.0)
        need = bisect(full(-60.0), full(60.0), lambda push: ~wins(push, others))
        odds = torch.where(reference == pushed, 0.0, -need).exp().view(-1, V) * possible
        return odds / odds.sum(1, keepdim=True)


@pytest.mark.parametrize("place", [0, 2])
def test_chains_are_exact_by_enumeration(monkeypatch, place):
    """Sum over the draft's token and the uniform, analytically: what is emitted at `place` has the
    target's law."""
    stage = Stage(monkeypatch, CHAIN, place)
    C, V, q_CV = stage.C, stage.V, stage.logq_CV.exp()
    emitted, passing = emission(stage)
    # What q never draws has no weight, and no residual either.
    emitted_CVV = torch.where(q_CV[..., None] > 0, q_CV[..., None] * emitted.view(C, V, V), 0.0)
    assert (emitted_CVV.sum(1) - stage.p_CV).abs().max() < 1e-12
    overlap = torch.minimum(stage.p_CV, q_CV).sum(1)  # accepted as often as theory allows
    assert ((q_CV * passing.view(C, V)).sum(1) - overlap).abs().max() < 1e-12


@pytest.mark.parametrize("place", [0, 2])
def test_fixed_tokens_are_exact_by_enumeration(monkeypatch, place):
    stage = Stage(monkeypatch, FIXED, place)
    emitted, passing = emission(stage)
    assert (emitted - stage.p_CV[stage.case]).abs().max() < 1e-12
    assert (passing.view(stage.C, stage.V) - stage.p_CV).abs().max() < 1e-12


@pytest.mark.parametrize("place", [0, 2])
def test_the_token_behind_a_proposal_is_exact_by_enumeration(monkeypatch, place):
    """A proposal ends at `place`, or was none; whatever lies in its buffers from there on counts
    for nothing."""
    stage = Stage(monkeypatch, NONE, place)
    law = stage.next_law(torch.zeros(stage.rows), TOKEN)
    assert (law - stage.p_CV[stage.case]).abs().max() < 1e-12


def emission(stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
    """The law (rows, V) of the token emitted at `place` for every draft token, and how often that
    one passes."""
    passing = stage.accept_probability()
    residual = stage.next_law((1 + passing) / 2, RESIDUAL)
    rejected = torch.where(passing[:, None] < 1, (1 - passing[:, None]) * residual, 0.0)
    return passing[:, None] * torch.eye(stage.V)[stage.drafted] + rejected, passing


@pytest.mark.parametrize("kind", [CHAIN, FIXED])
def test_an_impossible_token_never_passes(monkeypatch, kind):
    # Smaller than it ever gets.
    monkeypatch.setattr(sampling, "uniform", lambda *args, **more: torch.zeros(2, 1))
    monkeypatch.setattr(sampling, "gumbel", lambda *args: torch.zeros(2, 1, 3))
    warped = torch.tensor([[[0.0, -INF, 0.0]] * 2, [[0.0, 0.0, -INF]] * 2])
    logq, tokens, one_B = (
        torch.full((2, 1, 3), 1 / 3).log(),
        torch.tensor([[1], [1]]),
        torch.ones(2).long(),
    )
    accepted, following = accept_exact(warped, logq, tokens, one_B, kind * one_B, make(2), one_B)
    assert accepted.tolist() == [0, 1] and following[0] != 1  # in the second row it is possible


# ---- acceptance with the real noise, end to end

V, K, N = 4, 2, 3
TARGET_VV, DRIFT_VV = torch.randn(2, V, V, generator=torch.Generator().manual_seed(8))
DRAFT_VV = TARGET_VV + 1.2 * DRIFT_VV  # logits of the token that follows each token


def chain(c: float = 1.0, table_VV: torch.Tensor = DRAFT_VV):
    """K tokens drawn from the draft's q, or Saguaro's q', with the noise of their own positions."""

    def propose(params, last_B1, start_B):
        drafted, drawn_from, fed_B1 = [], [], last_B1
        for step in range(K):
            logq = log_probs(warp(table_VV[fed_B1], params), params)
            if c < 1:
                logq = saguaro(logq, params, torch.full_like(fed_B1, 2), c)
            fed_B1 = noisy(logq, params, start_B[:, None] + step, V).argmax(-1)
            drafted.append(fed_B1)
            drawn_from.append(logq)
        B = len(start_B)
        return (
            torch.cat(drafted, 1),
            torch.cat(drawn_from, 1),
            torch.full((B,), K),
            torch.full((B,), CHAIN),
        )

    return propose


def fixed(params, last_B1, start_B):
    tokens_BK = (last_B1 + torch.tensor([1, 3])) % V
    B = len(start_B)
    return (
        tokens_BK,
        torch.full((B, K, V), float("nan")),
        torch.full((B,), K),
        torch.full((B,), FIXED),
    )


def nothing(params, last_B1, start_B):
    tokens_BK, logq, length_B, kind_B = chain()(params, last_B1, start_B)
    return tokens_BK, logq, torch.zeros_like(length_B), torch.full_like(kind_B, NONE)


def mixed(params, last_B1, start_B):
    """Kinds change from row to row and round to round; chains are cut by something like a clock."""
    which_B = (params.row_B + start_B) % 5  # 0, 1, 2: a chain of so many; 3: fixed; 4: none
    tokens_BK, logq, length_B, kind_B = chain()(params, last_B1, start_B)
    tokens_BK = torch.where((which_B == 3)[:, None], fixed(params, last_B1, start_B)[0], tokens_BK)
    length_B = torch.where(which_B < 3, which_B, torch.where(which_B == 3, K, 0))
    return (
        tokens_BK,
        logq,
        length_B,
        torch.where(which_B < 3, CHAIN, torch.where(which_B == 3, FIXED, NONE)),
    )


def garbage(params, last_B1, start_B):
    """Chains whose first or second place is spoilt in one of five ways, or not at all."""
    tokens_BK, logq, length_B, kind_B = chain()(params, last_B1, start_B)
    way_B, place = params.row_B % 6, params.row_B // 6 % K
    row_B = torch.arange(len(start_B))
    at = lambda way: (row_B[way_B == way], place[way_B == way])  # noqa: E731
    logq[at(0)] = float("nan")
    tokens_BK[at(1)], tokens_BK[at(2)] = V + 3, -1
    logq[at(3)] = logq[at(3)] + 0.7
    logq[
        (*at(4), tokens_BK[at(4)])
    ] = -INF  # a distribution, but not one that this token can come from
    logq[at(4)] = logq[at(4)].log_softmax(-1)
    return tokens_BK, logq, length_B, kind_B


def write(params: Params, propose, coupling: str = "maximal") -> torch.Tensor:
    """Texts (B, N) behind a prompt of one token 0 at position 0, round by round, as the loop in
    ssd.py does it."""
    B = len(params.row_B)
    text_BN, row_B, size_B = (
        torch.zeros(B, 1 + N + K, dtype=torch.int64),
        torch.arange(B),
        torch.ones(B).long(),
    )
    while len(row_B):
        last_B1 = text_BN[row_B, size_B - 1][:, None]
        tokens_BK, logq_BKV, length_B, kind_B = propose(params, last_B1, size_B)
        warped = warp(TARGET_VV[torch.cat((last_B1, tokens_BK.clamp(0, V - 1)), 1)], params)
        if coupling == "shared":
            draws = noisy(warped, params, size_B[:, None] + torch.arange(K + 1), V).argmax(-1)
            accepted_B, next_B = accept_shared(draws, tokens_BK, length_B)
        else:
            accepted_B, next_B = accept_exact(
                warped, logq_BKV, tokens_BK, length_B, kind_B, params, size_B
            )
        for i in range(K):
            # What was rejected is overwritten, now or next round.
            text_BN[row_B, size_B + i] = tokens_BK[:, i]
        size_B = size_B + accepted_B + 1
        text_BN[row_B, size_B - 1] = next_B
        live = size_B <= N
        params, row_B, size_B = pick(params, live), row_B[live], size_B[live]
    return text_BN[:, 1 : N + 1]


def text_law(way=WAYS["plain"]) -> np.ndarray:
    """The law of the N tokens, by enumeration."""
    step = np.stack([law_of(row, way).numpy() for row in TARGET_VV])
    return np.einsum("a,ab,bc->abc", step[0], step, step)


def text_counts(text: torch.Tensor) -> torch.Tensor:
    return (text @ torch.tensor([V * V, V, 1])).bincount(minlength=V**N)


PROPOSALS = {
    "chain": chain(),
    "saguaro 0.1": chain(0.1),
    "saguaro 0.5": chain(0.5),
    "fixed": fixed,
    "none": nothing,
    "mixed": mixed,
    "garbage": garbage,
    "perfect": chain(1.0, TARGET_VV),
    "useless": chain(1.0, -4 * TARGET_VV),
}


@pytest.mark.parametrize("name", PROPOSALS)
def test_texts_have_the_joint_law_of_the_target(name):
    p = chi_square(text_counts(write(make(MANY), PROPOSALS[name])), text_law())
    assert p > 0.001, p


@pytest.mark.parametrize("name", ["chain", "saguaro 0.1", "mixed", "garbage"])
def test_rows_of_a_mixed_batch_keep_their_own_laws(name):
    ways = [
        WAYS[way]
        for way in ("plain", "cool", "top-k", "top-p", "both", "greedy", "greedy, filtered")
    ]
    params = make(MANY, *([way[i] for way in ways] * (MANY // len(ways) + 1) for i in range(3)))
    # Proposals go by row % 5 and row % 6: with 7 ways every combination occurs.
    params = pick(params, slice(MANY))
    text = write(params, PROPOSALS[name])
    for i, way in enumerate(ways):
        counts, law = text_counts(text[i :: len(ways)]), text_law(way)
        if way[0] == 0:
            assert counts[law.argmax()] == counts.sum()
        else:
            p = chi_square(counts, law)
            assert p > 0.001, (way, p)


def test_the_test_notices_a_residual_drawn_with_the_tokens_noise(monkeypatch):
    """The draft's token was drawn with that noise: to draw again with it is to draw what was just
    rejected."""
    monkeypatch.setattr(sampling, "RESIDUAL", TOKEN)
    assert chi_square(text_counts(write(make(MANY), chain())), text_law()) < 1e-9


def test_shared_texts_are_the_targets_own():
    ways = ([0.0, 0.7, 1.0, 1.3] * 5000, [0, 2, 0, 3] * 5000, [1, 1, 0.6, 0.9] * 5000)
    for params in (make(20_000), make(20_000, *ways)):
        plain = write(params, nothing, "shared")
        for name, propose in PROPOSALS.items():
            assert torch.equal(write(params, propose, "shared"), plain), name
        assert torch.equal(write(params, nothing), plain)  # the exact rule with nothing proposed


# ---- couplings: how often they accept


@pytest.mark.parametrize("spread", [0.2, 0.7, 2.0])
def test_couplings_accept_as_often_as_theory_says(spread):
    rng = torch.Generator().manual_seed(9)
    logits = torch.randn(8, generator=rng)
    logp, logq = (
        logits.log_softmax(-1),
        (logits + spread * torch.randn(8, generator=rng)).log_softmax(-1),
    )
    params, at_B1 = make(MANY), torch.full((MANY, 1), 5)
    draws_B1, tokens_B1 = (
        noisy(x.expand(MANY, 1, 8), params, at_B1, 8).argmax(-1) for x in (logp, logq)
    )
    one_B = torch.ones(MANY, dtype=torch.int64)
    shared = accept_shared(draws_B1.expand(-1, 2), tokens_B1, one_B)[0]
    warped, drawn_from = logp.expand(MANY, 2, 8), logq.expand(MANY, 1, 8)
    exact = accept_exact(warped, drawn_from, tokens_B1, one_B, one_B * CHAIN, params, at_B1[:, 0])[
        0
    ]
    p, q = logp.double().exp(), logq.double().exp()
    tv = (p - q).abs().sum().item() / 2
    gumbels_meet = (1 / torch.maximum(p / p[:, None], q / q[:, None]).sum(1)).sum().item()
    assert (1 - tv) / (1 + tv) <= gumbels_meet <= 1 - tv
    for accepted, wanted in ((shared, gumbels_meet), (exact, 1 - tv)):
        p_value = scipy.stats.binomtest(int(accepted.sum()), MANY, wanted).pvalue
        assert p_value > 0.001, (accepted.double().mean(), wanted)


def test_perfect_drafts_pass_whole_and_impossible_ones_not_at_all():
    B, params, last = 5000, make(5000), torch.zeros(5000, 1, dtype=torch.int64)
    start = torch.ones(B, dtype=torch.int64)
    tokens, logq, length, kind = chain(1.0, TARGET_VV)(params, last, start)
    warped = warp(TARGET_VV[torch.cat((last, tokens), 1)], params)
    assert (accept_exact(warped, logq, tokens, length, kind, params, start)[0] == K).all()
    draws = noisy(warped, params, start[:, None] + torch.arange(K + 1), V).argmax(-1)
    assert (accept_shared(draws, tokens, length)[0] == K).all()
    barred = warped.scatter(2, tokens[:, :1, None].expand(-1, K + 1, 1), -INF)
    accepted, following = accept_exact(barred, logq, tokens, length, kind, params, start)
    assert (accepted == 0).all() and (following != tokens[:, 0]).all()
