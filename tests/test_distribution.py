"""Under `maximal` and `independent` every path of SD and SSD draws from the target's distribution: chi-squares over
more than 200,000 samples of three tokens in a row, end to end, against exact enumeration.

The target is small enough to enumerate: 4 tokens, one layer, and a sliding window of 2, so that what comes next hangs
on the last two alone. A long text is then many samples: cut into threes, each is a draw from the joint distribution
of three tokens behind the two tokens before it. The draft is wrong a third of the time, so rejections are frequent.
Rows differ in temperature, top-k and top-p, and each kind of row has its own truth.
"""

import gc
import itertools

import numpy as np
import pytest
from scipy.stats import chi2
from tiny import engine, log_probs, play, settle, transformer

import ssd
from rows import Row
from runtime import Pending
from sampling import CHAIN, FIXED, NONE
from speed import Figures
from ssd import Decoding

V, WINDOWS, B = 4, 8, 25_200
NEW = 3 * WINDOWS
SHAPE = {
    "model_type": "mistral", "sliding_window": 2, "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8,
    "num_attention_heads": 1, "num_key_value_heads": 1, "vocab": V, "positions": NEW + 8, "sharpness": 1.5,
}  # fmt: skip
KINDS = ((1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 3, 1.0), (1.5, 0, 0.75))  # temperature, top-k, top-p; every 36th row: 0
ALPHA = 1e-3


@pytest.fixture(autouse=True)
def quick_and_patient(monkeypatch):
    """Thousands of rows are millions of small lists, which the collector would walk through again and again."""
    monkeypatch.setattr(ssd, "PATIENCE_S", 60.0)
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def pair():
    target = transformer(2, **SHAPE)
    return engine(target, transformer(7, base=target, noise=0.2), warn=pytest.fail)


def next_token(target, temperature, top_k, top_p) -> np.ndarray:
    """(V, V, V): the exact probability of the next token behind each pair, warped by hand."""
    table = np.zeros((V, V, V))
    for a, b in itertools.product(range(V), repeat=2):
        logits = log_probs(target, [a, b])[-1].numpy()
        if temperature == 0:
            table[a, b, logits.argmax()] = 1
            continue
        p = np.exp(logits / np.float32(temperature))
        order = (-p).argsort()
        p[order[top_k or V :]] = 0
        before = p[order].cumsum() - p[order]
        p[order[before >= top_p * p.sum()]] = 0
        table[a, b] = p / p.sum()
    return table


def excess(counts: np.ndarray, p: np.ndarray) -> tuple[float, int]:
    """Chi-square and degrees of freedom of counts (C, N) against the distributions p (C, N); what cannot happen did not
    happen, and cells with fewer than 5 expected are one cell."""
    assert counts[p < 1e-12].sum() == 0, "a token came that the target never draws"
    total, freedom = 0.0, 0
    for seen, probability in zip(counts, p):
        expected = probability * seen.sum()
        rare = expected < 5
        expected = np.append(expected[~rare], expected[rare].sum())
        seen = np.append(seen[~rare], seen[rare].sum())[expected > 0]
        expected = expected[expected > 0]
        total += ((seen - expected) ** 2 / expected).sum()
        freedom += len(expected) - 1
    return total, freedom


def p_values(pair, decoding) -> tuple[float, float]:
    """How likely counts so far from the truth are: of three tokens in a row, and of each behind the two before."""
    joint_sum, single_sum, samples = np.zeros(2), np.zeros(2), 0
    for kind, of_kind in itertools.groupby(sorted(range(B), key=kind_of), kind_of):
        p = next_token(pair.target.transformer, *kind)
        joint = np.einsum("abx,bxy,xyz->abxyz", p, p, p).reshape(V * V, V**3)
        ids = np.array([decoding.rows[b].ids for b in of_kind])[:, -NEW - 2 :]
        places = np.stack([ids[:, i : i + NEW] for i in range(3)])
        threes = np.ravel_multi_index(places, (V,) * 3)  # a token and the two before it
        single_sum += excess(np.bincount(threes.ravel(), minlength=V**3).reshape(V * V, V), p.reshape(V * V, V))
        pairs = threes[:, ::3] // V  # the two tokens before each window
        windows = np.ravel_multi_index([ids[:, i::3][:, :WINDOWS] for i in (2, 3, 4)], (V,) * 3)
        cells = np.bincount((pairs * V**3 + windows).ravel(), minlength=V**5)
        joint_sum += excess(cells.reshape(V * V, V**3), joint)
        samples += windows.size
    assert samples > 200_000
    return chi2.sf(*joint_sum), chi2.sf(*single_sum)


def kind_of(b: int) -> tuple:
    return (0.0, 0, 1.0) if b % 36 == 35 else KINDS[b % 4]


def sample(pair, monkeypatch, **settings):
    """Thousands of rows of each kind, and how many proposals of each kind were tried."""
    tried, emit = {NONE: 0, CHAIN: 0, FIXED: 0}, Decoding.emit

    def spy(self, proposal, accepted, following, verdict):
        for b in self.live():
            tried[proposal.kind[b]] += 1
        emit(self, proposal, accepted, following, verdict)

    monkeypatch.setattr(Decoding, "emit", spy)
    temperature, top_k, top_p = (list(values) for values in zip(*map(kind_of, range(B))))
    prompts = [[b % 4, b // 4 % 4] for b in range(B)]
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    result, decoding = play(pair, prompts, max_new_tokens=NEW, k=2, seed=77, **filters, **settings)
    stats = result.stats
    print({name: stats[name] for name in ("rounds", "acceptance_rate", "hit_rate")}, tried, decoding.figures.kinds)
    assert decoding.figures.kinds[CHAIN][1] > 10_000, "too few rejections to tell"
    return decoding, tried, stats


def fall_back_in_turns(monkeypatch):
    """What fallback "auto" does: draft now, then guess from the text, and at some lengths of it propose nothing."""
    guess, turns = Row.guess, itertools.cycle((True, False, False))
    monkeypatch.setattr(Row, "guess", lambda row, k: guess(row, k) if len(row.ids) % 3 else [])
    monkeypatch.setattr(Figures, "prefers_jit", lambda figures, guessed, k: next(turns))


def cut_at(monkeypatch, *lengths):
    """Chains of these lengths, one after the other, whatever the clock says."""
    turns = itertools.cycle(length == 1 for length in lengths)  # asked once a round, before the second of two steps
    take = Decoding.take
    monkeypatch.setattr(Pending, "done", lambda work, within: next(turns))
    monkeypatch.setattr(Decoding, "take", lambda self, *args: (settle(self), take(self, *args))[1])


def check(pair, decoding):
    values = p_values(pair, decoding)
    print("p", values)
    assert min(values) > ALPHA


def test_sd_maximal(pair, monkeypatch):
    decoding, tried, _ = sample(pair, monkeypatch, mode="sd", coupling="maximal")
    assert tried[CHAIN] > 100_000
    check(pair, decoding)


def test_ssd_maximal_whole_and_cut_chains_and_every_fallback(pair, monkeypatch):
    fall_back_in_turns(monkeypatch)
    cut_at(monkeypatch, 2, 2, 1)
    decoding, tried, stats = sample(pair, monkeypatch, mode="ssd", coupling="maximal", fan_out=2)
    assert min(tried.values()) > 20_000 and len(decoding.figures.jit_s) > 3 and 0.2 < stats["hit_rate"] < 0.8
    assert {lookup.steps for lookup in decoding.figures.lookups} == {1, 2}
    check(pair, decoding)


def test_ssd_independent_saguaro_half_and_jit(pair, monkeypatch):
    settings = {"coupling": "independent", "saguaro_c": 0.5, "fan_out": 3, "cut": False, "fallback": "jit"}
    decoding, tried, stats = sample(pair, monkeypatch, mode="ssd", **settings)
    assert tried[FIXED] == 0 and 0.2 < stats["hit_rate"] < 0.8
    check(pair, decoding)


def test_ssd_independent_saguaro_tenth_cut_chains_and_every_fallback(pair, monkeypatch):
    fall_back_in_turns(monkeypatch)
    cut_at(monkeypatch, 2, 1)
    decoding, tried, stats = sample(pair, monkeypatch, mode="ssd", coupling="independent", saguaro_c=0.1, fan_out=3)
    assert min(tried.values()) > 20_000 and 0.2 < stats["hit_rate"] < 0.8
    check(pair, decoding)
