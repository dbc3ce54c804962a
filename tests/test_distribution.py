"""Under `maximal` and `independent` every path of SD and SSD draws from the target's distribution:
chi-squares over more than 200,000 samples of three tokens in a row (28,800 in the smaller cases),
end to end, against exact enumeration.

The target is small enough to enumerate: 4 tokens, one layer, and a sliding window of 2, so that
what comes next hangs on the last two alone. A long text is then many samples: cut into threes, each
is a draw from the joint distribution of three tokens after the two tokens before it. The draft is
wrong a third of the time, so rejections are frequent. Rows differ in temperature, top-k and top-p,
and each kind of row has its own truth.
"""

import gc
import itertools

import numpy as np
import pytest
from scipy.stats import chi2
from tiny import Restless, cut_head, engine, log_probs, play, resized, settle, transformer

import runtime
from figures import Drafting
from rows import Row
from runtime import Lane
from sampling import CHAIN, FIXED, NONE
from ssd import Decoding, Plan

V, WINDOWS, B = 4, 8, 25_200
FEW = 3_600  # rows of a case in which a mistake would be a large one
NEW = 3 * WINDOWS
SHAPE = {
    "model_type": "mistral",
    "sliding_window": 2,
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab": V,
    "positions": NEW + 8,
    "sharpness": 1.5,
}
# Temperature, top-k, top-p; every 36th row: 0.
KINDS = ((1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 3, 1.0), (1.5, 0, 0.75))
ALPHA = 1e-3


@pytest.fixture(autouse=True)
def quick_and_patient(monkeypatch):
    """Thousands of rows are millions of small lists, which the collector would walk through again
    and again."""
    monkeypatch.setattr(runtime, "PATIENCE_S", 60.0)
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def models():
    target = transformer(2, **SHAPE)
    return target, transformer(7, base=target, noise=0.2)


@pytest.fixture(scope="module")
def pair(models):
    return engine(*models, warn=pytest.fail)


def next_token(target, temperature, top_k, top_p) -> np.ndarray:
    """(V, V, V): the exact probability of the next token after each pair, warped by hand."""
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
    """Chi-square and degrees of freedom of counts (C, N) against the distributions p (C, N); what
    cannot happen did not happen, and cells with fewer than 5 expected are one cell."""
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
    """How likely counts so far from the truth are: of three tokens in a row, and of each after the
    two before."""
    joint_sum, single_sum, samples, rows = np.zeros(2), np.zeros(2), 0, len(decoding.rows)
    for kind, of_kind in itertools.groupby(sorted(range(rows), key=kind_of), kind_of):
        p = next_token(pair.target.transformer, *kind)
        joint = np.einsum("abx,bxy,xyz->abxyz", p, p, p).reshape(V * V, V**3)
        ids = np.array([decoding.rows[b].ids for b in of_kind])[:, -NEW - 2 :]
        places = np.stack([ids[:, i : i + NEW] for i in range(3)])
        threes = np.ravel_multi_index(places, (V,) * 3)  # a token and the two before it
        single_sum += excess(
            np.bincount(threes.ravel(), minlength=V**3).reshape(V * V, V), p.reshape(V * V, V)
        )
        pairs = threes[:, ::3] // V  # the two tokens before each window
        windows = np.ravel_multi_index([ids[:, i::3][:, :WINDOWS] for i in (2, 3, 4)], (V,) * 3)
        cells = np.bincount((pairs * V**3 + windows).ravel(), minlength=V**5)
        joint_sum += excess(cells.reshape(V * V, V**3), joint)
        samples += windows.size
    assert samples == rows * WINDOWS > (200_000 if rows == B else 25_000)
    return chi2.sf(*joint_sum), chi2.sf(*single_sum)


def kind_of(b: int) -> tuple:
    return (0.0, 0, 1.0) if b % 36 == 35 else KINDS[b % 4]


def sample(pair, monkeypatch, rows=B, planner=None, **settings):
    """Thousands of rows of each kind, and how many proposals of each kind were tried."""
    tried, rejections = ({NONE: 0, CHAIN: 0, FIXED: 0} for _ in range(2))
    emit = Decoding.emit

    def spy(self, live, proposal, accepted, bonus):
        for b in live:
            tried[proposal.kind[b]] += 1
            rejections[proposal.kind[b]] += accepted[b] < len(proposal.tokens[b])
        emit(self, live, proposal, accepted, bonus)

    monkeypatch.setattr(Decoding, "emit", spy)
    temperature, top_k, top_p = (list(values) for values in zip(*map(kind_of, range(rows))))
    settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": NEW}
    prompts = [[b % 4, b // 4 % 4] for b in range(rows)]
    result, decoding = play(pair, prompts, planner, k=2, seed=77, **settings)
    stats = result.stats
    print(
        {name: stats[name] for name in ("rounds", "acceptance_rate", "hit_rate")}, tried, rejections
    )
    assert rejections[CHAIN] > 0.4 * rows, "too few rejections to tell"
    return decoding, tried, stats


class InTurn:
    """A planner that plays these plans, one after the other, again and again."""

    def __init__(self, *plans: Plan):
        self.plans = itertools.cycle(plans)

    def first(self) -> Plan:
        return next(self.plans)

    def next(self, done) -> Plan:
        return next(self.plans)


def every_fallback(monkeypatch, m: int):
    """A planner whose misses are drafted for now, then guessed from the text; at some lengths of it
    nothing is."""
    guess = Row.guess
    monkeypatch.setattr(Row, "guess", lambda row, k: guess(row, k) if len(row.ids) % 3 else [])
    return InTurn(*(Plan(2, m, how) for how in ("jit", "fast", "fast")))


def cut_at(monkeypatch, *lengths):
    """Chains of these lengths, one after the other, whatever the clock says."""
    # Asked before the second of two steps.
    turns = itertools.cycle(length > 1 for length in lengths)
    propose = Decoding.propose
    monkeypatch.setattr(Lane, "has_time", lambda lane, verdict: next(turns))
    monkeypatch.setattr(
        Decoding, "propose", lambda self, *args: (settle(self), propose(self, *args))[1]
    )


def check(pair, decoding):
    values = p_values(pair, decoding)
    print("p", values)
    assert min(values) > ALPHA


def test_sd_maximal(pair, monkeypatch):
    decoding, tried, _ = sample(pair, monkeypatch, mode="sd", coupling="maximal")
    assert tried[CHAIN] > 100_000
    check(pair, decoding)


def test_ssd_maximal_whole_and_cut_chains_and_every_fallback(pair, monkeypatch):
    cut_at(monkeypatch, 2, 2, 1)
    settings = {"planner": every_fallback(monkeypatch, 2), "coupling": "maximal", "fan_out": 2}
    decoding, tried, stats = sample(pair, monkeypatch, mode="ssd", **settings)
    rounds = decoding.figures.rounds
    assert min(tried.values()) > 20_000 and 0.2 < stats["hit_rate"] < 0.8
    assert sum(done.drafted is not None for done in rounds) > 3
    assert all(isinstance(done.drafted, Drafting | None) for done in rounds), "no q is kept"
    assert {done.chain_steps for done in rounds if done.look_up} == {1, 2}
    check(pair, decoding)


def test_ssd_independent_saguaro_half_and_jit(pair, monkeypatch):
    settings = {
        "coupling": "independent",
        "saguaro_c": 0.5,
        "fan_out": 3,
        "cut": False,
        "fallback": "jit",
    }
    decoding, tried, stats = sample(pair, monkeypatch, FEW, mode="ssd", **settings)
    assert tried[FIXED] == 0 and 0.2 < stats["hit_rate"] < 0.8
    check(pair, decoding)


def test_ssd_independent_saguaro_tenth_cut_chains_and_every_fallback(pair, monkeypatch):
    cut_at(monkeypatch, 2, 1)
    settings = {"planner": every_fallback(monkeypatch, 3), "coupling": "independent", "fan_out": 3}
    decoding, tried, stats = sample(pair, monkeypatch, mode="ssd", saguaro_c=0.1, **settings)
    assert min(tried.values()) > 20_000 and 0.2 < stats["hit_rate"] < 0.8
    check(pair, decoding)


@pytest.mark.parametrize(("coupling", "c"), [("maximal", 1.0), ("independent", 0.4)])
def test_another_plan_every_round(pair, monkeypatch, coupling, c):
    """The draft is left out, takes turns and speaks ahead, as chance has it."""
    planner = Restless(3, 2, 2)
    settings = {"coupling": coupling, "saguaro_c": c, "fan_out": 2}
    decoding, tried, _ = sample(pair, monkeypatch, FEW, planner, mode="ssd", **settings)
    assert len(set(planner.kinds)) == 4 and min(tried.values()) > 1_000
    check(pair, decoding)


OTHER_VOCABULARIES = {
    "cut head": lambda base: cut_head(base, [0, 2, 3]),
    "fewer tokens": lambda base: resized(base, 3),
    "more tokens": lambda base: resized(base, 6),
}


@pytest.mark.parametrize(("coupling", "c"), [("maximal", 1.0), ("independent", 0.4)])
@pytest.mark.parametrize("name", OTHER_VOCABULARIES)
def test_a_draft_with_a_vocabulary_of_its_own(models, monkeypatch, name, coupling, c):
    """It says tokens that the target has, and not all of them; its q is over those, whatever its
    head has."""
    other = engine(models[0], OTHER_VOCABULARIES[name](models[1]), warn=pytest.fail, words=3)
    settings = {"coupling": coupling, "saguaro_c": c, "fan_out": 2, "fallback": "jit"}
    decoding, tried, _ = sample(other, monkeypatch, FEW, mode="ssd", **settings)
    assert tried[CHAIN] > 3 * FEW
    check(other, decoding)
