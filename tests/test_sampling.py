"""Noise, warping, drawing and Saguaro against plain integers, naive loops and chi-square tests.

Seeds are fixed, so every p-value is the same on every run. Shape letters as in sampling.py.
"""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from laws import (
    INF,
    MANY,
    WAYS,
    chi_square,
    law_of,
    make,
    naive_warp,
    one_thread,  # noqa: F401, a fixture of every test here
    pick,
)

import sampling
from sampling import (
    ACCEPT,
    RESIDUAL,
    TOKEN,
    gumbel,
    hash_words,
    highest,
    log_probs,
    noisy,
    row_keys,
    saguaro,
    uniform,
    warp,
)

# ---- noise


def word_by_hand(seed: int, row: int, position: int, purpose: int, token: int | None = None) -> int:
    """The hash in unsigned whole numbers of any size, modulo 2^32."""
    cut = 0xFFFFFFFF

    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D & cut
        x = (x ^ x >> 15) * 0x846CA68B & cut
        return x ^ x >> 16

    first, *rest = (seed & cut, seed >> 32 & cut, row & cut)
    key1, key2 = mix(first + 0x2545F491 & cut), mix(first ^ 0x5851F42D)
    for word in rest:
        key1, key2 = mix(word + 5 * key1 & cut), mix(3 * (word ^ key2) + 0x14057B7F & cut)
    key1, key2 = (
        mix(5 * mix((position & cut) + 5 * key & cut) + purpose & cut) for key in (key1, key2)
    )
    if token is None:
        return mix(key1 ^ mix(key2)) & 0x7FFFFFFF
    return mix(mix(token + key1 & cut) ^ key2) & 0x7FFFFFFF


def test_words_equal_plain_integers():
    seeds = [
        0,
        1,
        -1,
        7,
        2**31,
        2**32 - 1,
        2**32,
        -(2**63),
        2**63 - 1,
        2**63,
        2**64 - 1,
        0x9E3779B97F4A7C15,
    ]
    rows = [0, 1, 2, 3, 4, 5, 6, 1000, 2**20, 2**31 - 1, 0, 3]
    positions = [0, 1, 2, 4095, 131_072, 2**31 + 5]
    params, at_BT = make(len(seeds), seed=seeds, row=rows), torch.tensor([positions] * len(seeds))
    for purpose in (TOKEN, ACCEPT, RESIDUAL):
        plain, by_token = (
            hash_words(params, at_BT, purpose),
            hash_words(params, at_BT, purpose, 300),
        )
        assert plain.dtype == by_token.dtype == torch.int32
        for (b, t), token in itertools.product(
            np.ndindex(len(seeds), len(positions)), (0, 1, 2, 255, 299)
        ):
            place = (seeds[b], rows[b], positions[t], purpose)
            assert plain[b, t] == word_by_hand(*place)
            assert by_token[b, t, token] == word_by_hand(*place, token)
    # The same 64 bits.
    assert torch.equal(*(hash_words(make(seed=s), at_BT[:1], TOKEN, 9) for s in (-1, 2**64 - 1)))


def keyed(seed_B, row_B=None):
    """Parameters of many rows at once, for the hash alone."""
    both = torch.broadcast_tensors(seed_B, torch.zeros_like(seed_B) if row_B is None else row_B)
    return make()._replace(seed_B=both[0], row_B=both[1], key_B2=row_keys(*both))


def words_along(axis: str, count: int = 1 << 20) -> np.ndarray:
    """Words whose neighbours differ by one step on one axis."""
    one, step, at = make(), torch.arange(count), torch.tensor([[9]])
    words = {
        "token": lambda: hash_words(one, at, TOKEN, count),
        "position": lambda: hash_words(one, step[None], ACCEPT),
        "position of a token": lambda: hash_words(one, step[None], TOKEN, 2)[..., 1],
        "row": lambda: hash_words(keyed(torch.tensor([11]), step), at, TOKEN, 1),
        "seed": lambda: hash_words(keyed(step), at, TOKEN, 1),
        "high half of the seed": lambda: hash_words(keyed(step << 32), at, ACCEPT),
        "purpose": lambda: torch.stack(
            [hash_words(one, at, use, count // 64) for use in range(1, 65)], -1
        ),
    }
    return words[axis]().flatten().numpy().astype(np.int64)


def pair_p_values(a: np.ndarray, b: np.ndarray):
    """p-values of two lists of words being unrelated: joint bins of high and low bits, and
    correlation."""
    for i, j in itertools.product((26, 0), repeat=2):
        joint = (a >> i & 31) << 5 | (b >> j & 31)
        yield chi_square(np.bincount(joint, minlength=1024), np.ones(1024))
    yield 2 * scipy.stats.norm.sf(abs(np.corrcoef(a, b)[0, 1]) * len(a) ** 0.5)


@pytest.mark.parametrize(
    "axis",
    ["token", "position", "position of a token", "row", "seed", "high half of the seed", "purpose"],
)
def test_words_are_uniform_and_neighbours_unrelated(axis):
    words = words_along(axis)
    p = [scipy.stats.kstest(words / 2**31, "uniform").pvalue]
    for shift in (0, 10, 21):
        p.append(chi_square(np.bincount(words >> shift & 1023, minlength=1024), np.ones(1024)))
    ones = np.array([(words >> bit & 1).sum() for bit in range(31)])
    p.append(
        scipy.stats.chi2.sf((((ones - len(words) / 2) / (len(words) / 4) ** 0.5) ** 2).sum(), 31)
    )
    for lag in (1, 2, 64, 4096):
        pairs = words.reshape(-1, 2, lag)
        p += pair_p_values(pairs[:, 0].ravel(), pairs[:, 1].ravel())
    assert min(p) * len(p) > 0.001, p


def test_no_two_places_share_noise():
    """Whatever single input differs, or is swapped, the two noise vectors are unrelated, not even
    in another order."""
    count = 1 << 17
    vector = lambda seed, row, position, purpose: (  # noqa: E731
        hash_words(make(seed=seed, row=[row]), torch.tensor([[position]]), purpose, count)
        .flatten()
        .numpy()
    )
    base, p = (5, 3, 7, TOKEN), []
    others = [
        (6, 3, 7, TOKEN),
        (5 + 2**32, 3, 7, TOKEN),
        (5 + 2**63, 3, 7, TOKEN),
        (5, 4, 7, TOKEN),
        (5, 3, 8, TOKEN),
    ]
    others += [
        (5, 3, 7, RESIDUAL),
        (5, 3, 7, ACCEPT),
        (5, 7, 3, TOKEN),
        (3, 5, 7, TOKEN),
        (7, 3, 5, TOKEN),
    ]
    others += [(5, 3, 6, RESIDUAL), (5 << 32, 3, 7, TOKEN), (-5, 3, 7, TOKEN)]
    mine = vector(*base)
    for other in others:
        theirs = vector(*other)
        common = len(np.intersect1d(mine, theirs))  # by chance 2^17 * 2^17 / 2^31 = 8
        assert common < 28, (other, common)
        p += pair_p_values(mine, theirs)
    assert min(p) * len(p) > 0.001, p


def test_each_input_bit_flips_each_output_bit_half_of_the_time():
    rng, n = torch.Generator().manual_seed(0), 4096

    def draw(bits):
        low, high = -(2**63) if bits == 64 else 0, 2 ** min(bits, 63) - 1
        return torch.randint(low, high, (n,), generator=rng)

    inputs = {"seed": draw(64), "row": draw(20), "position": draw(20)}

    def words(seed, row, position, purpose=TOKEN):
        params = keyed(seed, row)
        both = (
            hash_words(params, position[:, None], purpose),
            hash_words(params, position[:, None], purpose, 2)[..., 1],
        )
        return torch.stack([word.flatten() for word in both])

    base = words(**inputs)
    flipped = {
        (name, bit): words(**inputs | {name: inputs[name] ^ (1 << bit if bit < 63 else -(2**63))})
        for name, bits in (("seed", 64), ("row", 20), ("position", 20))
        for bit in range(bits)
    }
    flipped |= {("purpose", other): words(**inputs, purpose=other) for other in (ACCEPT, RESIDUAL)}
    token_V = torch.arange(n)
    by_token = hash_words(make(), torch.tensor([[3, 4]]), TOKEN, n)[0]
    pairs = {name: (base, other) for name, other in flipped.items()}
    pairs |= {("token", bit): (by_token, by_token[:, token_V ^ (1 << bit)]) for bit in range(12)}
    for name, (a, b) in pairs.items():
        rates = ((a ^ b)[..., None] >> torch.arange(31) & 1).double().mean(1)
        # 6 standard deviations; one flip of two is counted with tokens.
        assert (rates - 0.5).abs().max() < 0.05, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_noise_stays_inside_0_and_1(monkeypatch, dtype):
    extremes = torch.tensor(
        [[[0, 1, 2**24 + 1, 2**30, 2**31 - 130, 2**31 - 2, 2**31 - 1]]], dtype=torch.int32
    )
    monkeypatch.setattr(sampling, "hash_words", lambda *_: extremes)
    u = uniform(make(), None, TOKEN, 7, dtype)
    assert u.dtype == dtype and (u > 0).all() and (u < 1).all() and (u.diff() >= 0).all()
    G = gumbel(make(), None, TOKEN, 7, dtype)
    assert G.dtype == dtype and G.isfinite().all() and (G.diff() <= 0).all()
    assert G.max() - G.min() < 26  # what steps.LEFT_OUT relies on


def test_noise_is_the_same_in_every_dtype():
    params, at_BT = make(3), torch.arange(7000).expand(3, -1)
    u32, u64 = (
        uniform(params, at_BT, TOKEN, 20, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert (u32 - u64).abs().max() <= 2**-24
    logits_BTV = torch.randn(3, 1, 20, generator=torch.Generator().manual_seed(0)).expand(
        3, 7000, 20
    )
    draws = [
        noisy(logits_BTV.to(dtype), params, at_BT, 20).argmax(-1)
        for dtype in (torch.float32, torch.float64)
    ]
    assert (draws[0] != draws[1]).sum() <= 1  # of 21,000: only a tie to seven digits can differ


def test_noise_does_not_depend_on_the_batch():
    temperature, seed, row = [0.7, 0.0, 1.0, 1.5], [3, 3, -8, 2**63 + 1], [0, 1, 0, 5]
    whole, at_BT = (
        make(4, temperature, seed=seed, row=row),
        torch.tensor([[5, 6, 7], [0, 1, 2], [9, 8, 7], [5, 6, 7]]),
    )
    noise, u = gumbel(whole, at_BT, RESIDUAL, 50), uniform(whole, at_BT, ACCEPT)
    for b in range(4):
        alone = make(1, temperature[b], seed=seed[b], row=[row[b]])
        for t in range(3):
            assert torch.equal(
                gumbel(alone, at_BT[b : b + 1, t : t + 1], RESIDUAL, 50)[0, 0], noise[b, t]
            )
            assert torch.equal(uniform(alone, at_BT[b : b + 1, t : t + 1], ACCEPT)[0, 0], u[b, t])
    assert torch.equal(
        gumbel(pick(whole, [3, 2, 1, 0]), at_BT.flip(0), RESIDUAL, 80)[..., :50].flip(0), noise
    )
    assert (noise[1] == 0).all() and (noise[[0, 2, 3]] != 0).all()  # temperature 0 is no noise


def test_noise_is_the_same_compiled():
    # Inductor gave the same words too, but takes over a minute to compile them on two busy cores.
    params, at_BT = make(2, seed=[5, 2**63 + 7]), torch.arange(6).view(2, 3)
    work = lambda p, at: (gumbel(p, at, TOKEN, 77), uniform(p, at, ACCEPT))  # noqa: E731
    compiled = torch.compile(work, fullgraph=True, dynamic=False, backend="aot_eager")(
        params, at_BT
    )
    assert all(map(torch.equal, compiled, work(params, at_BT)))


# ---- distributions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ties", [False, True])
def test_warp_equals_the_naive_loop(dtype, ties):
    V, T = 9, 3
    cases = list(
        itertools.product((0.0, 0.5, 1.0, 1.7), (0, 1, 3, V, V + 5), (1e-6, 0.31, 0.77, 0.999, 1.0))
    )
    rng = torch.Generator().manual_seed(1)
    logits_BTV = 2 * torch.randn(len(cases), T, V, generator=rng, dtype=torch.float64)
    logits_BTV = (logits_BTV.round() if ties else logits_BTV).to(dtype)
    got = warp(logits_BTV, make(len(cases), *map(list, zip(*cases))))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    behind = warp(logits_BTV, make(len(cases), *map(list, zip(*cases))), penalty=-32.0)
    for b, case in enumerate(cases):
        for t in range(T):
            wanted = torch.tensor(naive_warp(logits_BTV[b, t].tolist(), *case), dtype=got.dtype)
            torch.testing.assert_close(got[b, t], wanted, rtol=1e-6, atol=1e-6)
            if case[0] == 0:
                assert torch.equal(got[b, t], logits_BTV[b, t].to(got.dtype))
            scaled = logits_BTV[b, t].to(got.dtype) / (case[0] or 1)
            torch.testing.assert_close(
                behind[b, t], torch.where(wanted == -INF, scaled - 32, scaled)
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_stops_at_exactly_p(dtype):
    # 1/2, 1/4, 1/8, 1/8 to the bit.
    logits_BTV = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=dtype).log().expand(4, 1, 4)
    kept = (warp(logits_BTV, make(4, top_p=[0.4, 0.5, 0.51, 0.75])) > -INF)[:, 0]
    assert kept.sum(-1).tolist() == [1, 1, 2, 2]


def test_temperature_0_is_certain_of_the_first_largest_logit():
    logits_BTV = torch.zeros(3, 1, 4096)
    # Equal once normalised in 32 bits.
    logits_BTV[0, 0, 7], logits_BTV[0, 0, 3000] = (1e-3, 1.000001e-3)
    logits_BTV[1, 0, [5, 9]] = 2.0
    logits_BTV[2, 0, 8] = 1.0
    mixed, greedy = make(4, [0.0, 0.0, 0.0, 1.0]), make(3, 0.0)
    assert greedy.greedy and not mixed.greedy
    for params in (pick(mixed, slice(3)), greedy):
        at_B1 = torch.ones(3, 1, dtype=torch.int64)
        logp = log_probs(warp(logits_BTV, params), params)
        assert logp.exp().sum(-1).tolist() == [[1.0]] * 3
        assert logp.argmax(-1).flatten().tolist() == [3000, 5, 8]
        assert noisy(warp(logits_BTV, params), params, at_B1, 4096).argmax(
            -1
        ).flatten().tolist() == [3000, 5, 8]


LOGITS_V = torch.tensor([0.3, -1.0, 1.2, 0.31, -2.0, 0.9])


def test_draws_follow_the_law_alone_and_in_a_mixed_batch():
    B, V = len(WAYS), len(LOGITS_V)
    params, at_BT = make(B, *map(list, zip(*WAYS.values()))), torch.arange(MANY).expand(B, -1)
    warped_BTV = warp(LOGITS_V.expand(B, 1, V), params).expand(B, MANY, V)
    draws_BT = noisy(warped_BTV, params, at_BT, V).argmax(-1)
    for b, (name, way) in enumerate(WAYS.items()):
        p = chi_square(draws_BT[b].bincount(minlength=V), law_of(LOGITS_V, way))
        assert p > 0.001 or (way[0] == 0 and (draws_BT[b] == LOGITS_V.argmax()).all()), (name, p)
        alone, at = make(1, *way, row=[b]), at_BT[:1, :1000]
        again = noisy(warp(LOGITS_V.expand(1, 1000, V), alone), alone, at, V).argmax(-1)
        assert torch.equal(again[0], draws_BT[b, :1000]), name


@pytest.mark.parametrize("c", [0.1, 0.5, 1.0])
def test_saguaro_weighs_exactly_the_top_set(c):
    rng = torch.Generator().manual_seed(3)
    V, B, T = 7, 40, 8
    logq_BTV = (2 * torch.randn(B, T, V, generator=rng, dtype=torch.float64)).log_softmax(-1)
    logq_BTV[0] = torch.full(
        (V,), 1 / V, dtype=torch.float64
    ).log()  # all tie: the lower ids come first
    logq_BTV[1, :, 4:] = -INF
    logq_BTV = logq_BTV.log_softmax(-1)
    top_BT = torch.arange(T).expand(B, T)
    out = saguaro(logq_BTV, make(B, [1.0] * (B - 1) + [0.0]), top_BT, c)
    torch.testing.assert_close(
        out.exp().sum(-1), torch.ones(B, T, dtype=torch.float64), rtol=0, atol=1e-12
    )
    for b, t in np.ndindex(B - 1, T):
        q = logq_BTV[b, t].exp().tolist()
        top = sorted(range(V), key=lambda v: (-q[v], v))[:t]
        weighed = [q[v] * (c if v in top else 1.0) for v in range(V)]
        wanted = torch.tensor(weighed, dtype=torch.float64) / sum(weighed)
        torch.testing.assert_close(out[b, t].exp(), wanted, rtol=1e-12, atol=0)
    assert torch.equal(out[-1], logq_BTV[-1])  # temperature 0


@pytest.mark.parametrize("V", (1, 256, 300, 1000))
def test_the_highest_score_is_the_same_compiled_as_eager(V):
    """Compiled it is looked for in blocks. Of equal scores the first one wins, in any block."""
    scores = torch.randint(-2, 3, (3, 4, V)).float()
    scores[0, 0], scores[1] = float("-inf"), scores[1].abs() * 1e30
    compiled = torch.compile(highest, backend="eager", fullgraph=True, dynamic=False)
    for got, wanted in zip(compiled(scores), highest(scores)):
        assert torch.equal(got, wanted)
    scores[2, 1, V // 2] = float("nan")
    assert not compiled(scores)[0][2, 1].isfinite()
