"""--k auto and --fan-out auto: the choice is the best of what the model says, and no choice changes the text."""

import itertools
import math
import random
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny import engine, play, transformer

import ssd
import tuner
from fanout import FanOut
from sampling import CHAIN, NONE
from settings import Settings
from speed import CALIBRATION_ROUNDS, Figures, expected_tokens, sd_rate
from tuner import BUDGETS, KS, PLAIN, TURNS, TURNS_IF, Times, Tuner, between, choices

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3], [5], [8, 9, 7, 9, 3, 2, 3, 8], [46]]
HEAT = [0.0, 1.0, 0.7, 1.3, 0.0, 1.0]
ROWS = {"temperature": HEAT, "seed": list(range(6)), "max_new_tokens": [40, 33, 47, 25, 40, 9]}


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(ssd, "PATIENCE_S", 60.0)


@pytest.fixture(scope="module")
def pair():
    target = transformer(0)
    return engine(target, transformer(1, base=target, noise=0.03), warn=pytest.fail)


STILL = SimpleNamespace(usual_exposed=lambda: 0.0)


class Untold:
    """Models as Tuner sees them."""

    class policy:
        static = False

    class config:
        vocab_size = 4096


def tuned(acceptance: float, times: Times, rounds=400, best=0.6, seed=0, **settings) -> Tuner:
    """A tuner after `rounds` rounds in which tokens hold with `acceptance` and the draft's best guess with `best`."""
    one = Tuner(Settings(**settings), 1, [Untold, Untold], {})
    one.times, fan_out, rng = times, FanOut(max(one.ks), max(one.budgets)), random.Random(seed)
    one.choose(fan_out, STILL)
    for _ in range(rounds):
        accepted = next((i for i in range(one.k) if rng.random() >= acceptance), one.k)
        rank = next((i for i in range(one.budget) if rng.random() < best), None)
        fan_out.observe(CHAIN, one.k, accepted, rank, one.budget if one.settings.mode == "ssd" else 0)
        one.revise(fan_out, STILL)
    return one


def steps(step: float) -> dict[int, float]:
    """A draft whose every ordinary step takes so long."""
    return {1: step, 8: 8 * step}


def test_between():
    points = {2: 1.0, 5: 4.0, 9: 6.0}
    assert [between(points, x) for x in (2, 3, 5, 7, 9)] == [1, 2, 4, 5, 6]
    assert between(points, 1) == 1e-9 and between(points, 11) == 7 and between({4: 3.0}, 100) == 3


def test_choices():
    assert choices(3, KS) == (3,) and choices("auto", KS) == KS
    assert choices("auto", BUDGETS, 20) == (4, 8, 16) and choices("auto", BUDGETS, 3) == (1,)
    with pytest.raises(ValueError, match="fan_out is 20, wanted less than the vocabulary, 20 tokens"):
        choices(20, BUDGETS, 20)


@pytest.mark.parametrize("acceptance", [0.2, 0.5, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("step", [0.02, 0.1, 0.4])
def test_sd_chooses_what_the_closed_form_says(acceptance, step):
    times = Times({2: 1.0, 5: 1.15, 9: 1.4}, steps(step), {}, {})
    rates = {k: sd_rate(expected_tokens(acceptance, k), k * step, between(times.verify, k + 1)) for k in KS}
    chosen = tuned(acceptance, times, rounds=2000, mode="sd")
    assert rates[chosen.k] > 0.98 * max(rates.values()), f"chose {chosen.k}: {rates}"


def test_ssd_weighs_chains_against_budget():
    free = Times({2: 1.0, 9: 1.1}, steps(0.01), {2: 0.05, 9: 0.05}, {4: 0.01, 32: 0.01})
    assert tuned(0.95, free, mode="ssd").k == max(KS), "steps cost nothing: chains as long as they go"
    assert tuned(0.95, free, mode="ssd").budget >= 16
    assert tuned(0.02, Times({2: 1.0, 9: 4.0}, steps(0.1), {2: 0.1, 9: 0.1}, {4: 0.1, 32: 0.2}), mode="ssd").k == 1
    slow = Times({2: 1.0, 9: 1.1}, steps(0.1), {2: 0.1, 9: 0.1}, {4: 0.12, 32: 2.0})
    assert tuned(0.9, slow, best=0.95, mode="ssd").budget == min(BUDGETS), "many branches do not pay"
    waited = [tuned(0.9, slow, mode="ssd", fan_out=16, cut=cut).k for cut in (True, False)]
    assert waited[0] >= waited[1], "chains that are waited for should be shorter"


def test_the_chosen_is_the_best_of_all_and_a_fixed_one_stays():
    times = Times({2: 1.0, 9: 1.3}, steps(0.1), {2: 0.1, 9: 0.15}, {4: 0.15, 32: 0.3})
    for settings in ({}, {"k": 3}, {"fan_out": 12}, {"fallback": "jit"}, {"fallback": "fast"}, {"cut": False}):
        one = tuned(0.8, times, mode="ssd", **settings)
        fan_out = FanOut(max(one.ks), max(one.budgets))
        rates = one.ssd_rates(fan_out, 0.0)
        turns = [] if "fan_out" in settings else [TURNS]
        assert set(rates) == set(itertools.product(one.ks, [*turns, *one.budgets]))
        assert all(rate > 0 for rate, _ in rates.values())
        one.due = 0
        one.revise(fan_out, STILL)
        assert rates[one.k, one.budget] == max(rates.values()) and rates[one.k, one.budget][1] == one.k_miss <= one.k
        assert one.k == settings.get("k", one.k) and one.budget == settings.get("fan_out", one.budget)
    assert Tuner(Settings(mode="ssd", k=3, fan_out=5), 1, [Untold], {}).idle


SLOW = Times({2: 1.0, 9: 1.1}, steps(0.5), {2: 1.5, 9: 1.6}, {4: 1.0, 32: 1.2})


def test_a_slow_draft_takes_turns_and_one_that_does_not_pay_is_left():
    one = tuned(0.9, SLOW, best=0.9, mode="ssd")
    rates = one.ssd_rates(FanOut(8, 32), 0.0)
    assert one.budget == TURNS and one.k > PLAIN, "extend, fork and a step outlast a verification: SD is faster"
    turns = tuned(0.9, SLOW, 0, mode="sd").sd_rates(FanOut(8, 32))
    assert all(rates[k, TURNS][0] * TURNS_IF == pytest.approx(turns[k, TURNS][0]) for k in KS)
    plain = replace(SLOW, plain=0.9)
    assert tuned(0.9, plain, mode="ssd").k > PLAIN and tuned(0.9, plain, mode="sd").k > PLAIN
    assert tuned(0.1, plain, mode="ssd").k == tuned(0.1, plain, mode="sd").k == PLAIN
    assert tuned(0.1, plain, rounds=23, mode="sd").k > PLAIN, "so few rounds say too little"


def test_rates_follow_from_hits_and_times():
    """With every outcome in the cache, a round lasts a verification and gives what its chain gives."""
    one = Tuner(Settings(mode="ssd", k=4, fan_out=16), 1, [Untold], {})
    one.times = Times({}, steps(0.1), {}, {})
    lists = [1.0] * 5, [1.0, 1.5, 2.0, 2.5, 3.0], [2.0] * 5, [0.2] * 5  # hits, tokens, verify, prepare
    assert one.ssd_rate(4, *lists, step=0.1, exposed=0.5)[0] == pytest.approx(3.0 / 2.5)
    assert one.ssd_rate(4, *lists, step=0.6, exposed=0.0)[0] == pytest.approx(2.25 / 2.0), "3 fit, or 2"
    assert one.ssd_rate(4, *lists, step=0.6, exposed=0.3)[0] == pytest.approx(2.0 / 2.3), "which takes time from both"
    assert one.ssd_rate(4, *lists, step=3.0, exposed=0.0)[0] == pytest.approx(1.5 / 3.2), "not one fits: waited for"


def test_after_a_miss_less_is_drafted_where_drafting_is_dear():
    verify, prepare, step = {2: 1.0, 9: 1.1}, {2: 0.1, 9: 0.1}, {4: 0.05, 32: 0.05}
    cheap, dear = (Times(verify, steps(decode), prepare, step) for decode in (0.001, 0.9))
    for times, least, most in ((cheap, 6, 8), (dear, 1, 1)):
        one = tuned(0.9, times, best=0.5, mode="ssd", fallback="jit", fan_out=8)
        assert one.k >= 6 and least <= one.k_miss <= most


def restless(monkeypatch, seed: int) -> set:
    """Another K and M every round, up and down at random, and turns taken now and then. -> what was chosen."""
    rng, chosen = random.Random(seed), set()

    def revise(self, *_):
        self.k, self.k_miss, self.budget = (rng.choice(of) for of in (self.ks, self.ks, (TURNS, *self.budgets)))
        chosen.add((self.k, self.budget))

    monkeypatch.setattr(Tuner, "revise", revise)
    return chosen


@pytest.mark.parametrize("mode", ["sd", "ssd"])
@pytest.mark.parametrize("cut", [True, False])
def test_no_choice_changes_the_text(pair, monkeypatch, mode, cut):
    truth = pair.generate(PROMPTS, mode="ar", **ROWS)
    chosen = restless(monkeypatch, 5)
    for _ in range(4):
        result = pair.generate(PROMPTS, mode=mode, cut=cut, **ROWS)
        assert result.token_ids == truth.token_ids and result.finish_reason == truth.finish_reason
        assert result.stats["auto"] == ["k", "fan_out"][: 2 if mode == "ssd" else 1]
    assert len(chosen) >= len(KS)


@pytest.mark.parametrize("fallback", ["jit", "fast"])
def test_the_draft_has_read_everything_whenever_turns_begin_or_end(monkeypatch, fallback):
    """A draft that is its own target is never rejected, unless its KV cache has a hole."""
    target = transformer(0)
    pair = engine(target, target, warn=pytest.fail)
    chosen = restless(monkeypatch, 6)
    for _ in range(3):
        _, decoding = play(pair, PROMPTS, mode="ssd", fallback=fallback, cut=False, **ROWS)
        accepted, rejected, _ = decoding.figures.kinds[CHAIN]
        assert accepted > 50 and rejected == 0
    assert {M > 0 for _, M in chosen} == {True, False}


@pytest.mark.parametrize("mode", ["sd", "ssd"])
@pytest.mark.parametrize("after", [1, 4, 9])
def test_the_target_goes_on_alone_and_the_next_turn_of_the_chat_knows(pair, monkeypatch, mode, after):
    def leave(self, *_):
        self.rounds += 1
        if self.rounds == after:
            self.k, self.k_miss, self.budget = PLAIN, PLAIN, TURNS

    monkeypatch.setattr(Tuner, "revise", leave)
    monkeypatch.setattr(tuner, "KS", (1, 2))  # else a perfect draft may be through before round 9
    settings = {"temperature": 1.0, "max_new_tokens": 40}
    prompt, target = PROMPTS[0], transformer(0)
    perfect = engine(target, target, warn=pytest.fail)
    for _ in range(2):
        result, decoding = play(perfect, [prompt], keep=True, mode=mode, k="auto", **settings)
        assert result.token_ids == pair.generate([prompt], mode="ar", **settings).token_ids
        figures, reading = decoding.figures, after - 1
        assert [k > PLAIN for k, _ in figures.choices] == [True] * reading + [False] * (len(figures.choices) - reading)
        assert set(figures.emitted[reading + 1 : -1]) <= {1} and decoding.mode == mode
        assert result.stats["acceptance_rate"] in (1.0, None), "what the draft did not read is read before it drafts"
        prompt = prompt + result.token_ids[0] + [7]


def test_calibration_leaves_no_trace_and_is_done_once(pair, monkeypatch):
    pair.times.clear()
    calls, measure = [], tuner.measure
    monkeypatch.setattr(tuner, "measure", lambda *args: (calls.append(1), measure(*args))[1])
    truth = pair.generate(PROMPTS, mode="ar", **ROWS)
    for _ in range(2):
        for mode in ("sd", "ssd"):
            result, decoding = play(pair, PROMPTS, mode=mode, **ROWS)
            assert result.token_ids == truth.token_ids
            times = decoding.tuner.times
            assert set(times.verify) == {2, 5, 9} and min(times.verify.values()) > 0 and min(times.draft.values()) > 0
            assert set(times.step) == ({4, 16, 32} if mode == "ssd" else set())
            assert times.plain > 0
    assert len(calls) == 2
    play(pair, PROMPTS, mode="ssd", k=2, fan_out=6)
    assert len(calls) == 2, "nothing to choose, nothing to measure"


def test_a_run_begins_with_what_earlier_ones_learnt(monkeypatch):
    """A draft that is the target: after one run the next chooses the longest chains at once."""
    monkeypatch.setattr(tuner, "PLAIN_IF", 1e9)
    target = transformer(0)
    pair = engine(target, target, warn=pytest.fail)
    settings = {"mode": "sd", "max_new_tokens": 300, "temperature": 1.0}
    _, first = play(pair, [PROMPTS[0]], **settings)
    times = first.tuner.times
    times.verify, times.draft, times.plain = {2: 1.0, 9: 1.0}, steps(0.25), None
    unlearnt = Tuner(Settings(mode="sd"), 1, [Untold, Untold], {})
    unlearnt.times = times
    unlearnt.choose(unlearnt.fan_out(), STILL)
    assert unlearnt.k < max(KS), "who knows nothing yet expects rejections"
    tests = sum(map(sum, times.learnt.tested.values()))
    assert tests == sum(map(sum, first.fan_out.tested.values())) > 100 and len(times.rates) == 1
    assert first.figures.earlier == [] and first.figures.promised > 0
    _, second = play(pair, [PROMPTS[1]], **settings)
    assert second.figures.choices[0][0] == max(KS) and second.figures.earlier == times.rates[:1]
    assert sum(map(sum, times.learnt.tested.values())) > tests + 100 and len(times.rates) == 2
    _, third = play(pair, [PROMPTS[1]], k=4, **settings)
    assert third.tuner.times is None and third.figures.earlier == [] and len(times.rates) == 2, "nothing to choose"


def test_the_promise_is_the_rate_of_the_choice_in_force():
    times = Times({2: 1.0, 9: 1.3}, steps(0.1), {2: 0.1, 9: 0.15}, {4: 0.15, 32: 0.3})
    for draft, turns in ((times, False), (SLOW, True)):
        one = tuned(0.8, draft, best=0.8, rounds=CALIBRATION_ROUNDS - 1, mode="ssd")
        fan_out, told = FanOut(8, 32), SimpleNamespace(usual_exposed=lambda: 0.0, promised=None)
        one.due = 99
        one.revise(fan_out, told)
        assert (one.budget == TURNS) is turns
        rate = one.ssd_rates(fan_out, 0.0)[one.k, one.budget][0]
        assert told.promised == pytest.approx(rate * (TURNS_IF if turns else 1))


def test_the_forecast():
    """Between what the first rounds came to and what was promised, then towards earlier runs as they agree."""
    figures = Figures([None], Settings(mode="sd"))
    figures.emitted = [1] + [1, 3] * 16
    assert figures.foretold(100.0, 32) == 100.0
    figures.promised = 144.0
    assert figures.foretold(100.0, 32) == pytest.approx(120.0)
    figures.earlier = [80.0]
    assert figures.foretold(100.0, 32) == pytest.approx(120.0), "one run tells nothing about how they differ"
    figures.earlier = [80.0, 80.0, 80.0]
    assert figures.foretold(100.0, 32) == pytest.approx(80.0)
    figures.earlier = [20.0, 80.0, 320.0]
    between, within = math.log(4) ** 2 * 4 / 2, 3 * statistics.variance([1, 3] * 15 + [1]) / (61 / 31) ** 2 / 31
    weight = between / (between + within)
    assert 0.9 < weight < 1 and figures.foretold(100.0, 32) == pytest.approx(120.0**weight * 80.0 ** (1 - weight))
    figures.emitted = [1] + [2] * 32
    assert figures.foretold(100.0, 32) == pytest.approx(120.0), "rounds that are all alike tell everything"


def test_a_chat_keeps_what_it_read_before_calibration(pair):
    pair.times.clear()
    settings = {"mode": "ssd", "max_new_tokens": 20}
    first = pair.generate([PROMPTS[4]], keep=True, **settings)
    longer = PROMPTS[4] + first.token_ids[0] + [7, 7, 7]
    pair.times.clear()
    again = pair.generate([longer], keep=True, **settings)
    assert again.token_ids == pair.generate([longer], mode="ar", max_new_tokens=20).token_ids


def test_n_grams_choose_k_too():
    pair = engine(transformer(0), "ngram")
    result, decoding = play(pair, [[5, 6, 7] * 8], mode="sd", max_new_tokens=60)
    assert not any(decoding.tuner.times.draft.values()) and result.stats["auto"] == ["k"]
    assert result.token_ids == pair.generate([[5, 6, 7] * 8], max_new_tokens=60).token_ids


@pytest.mark.parametrize("where", ["decode", "extend", "chain_step"])
def test_a_draft_that_fails_while_it_is_measured(monkeypatch, where):
    said, target = [], transformer(0)
    pair = engine(target, transformer(2), warn=said.append)
    truth = pair.generate(PROMPTS, mode="ar", **ROWS)

    def fail(*_):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(ssd.Runner, where, fail)
    result, decoding = play(pair, PROMPTS, mode="ssd", **ROWS)
    assert result.token_ids == truth.token_ids and decoding.mode == "ar" and not pair.times
    assert said == ["the draft failed (the device is lost): the target goes on alone, the text stays right"]


def test_hits_of_every_budget_are_those_of_its_lists():
    fan_out, rng = FanOut(5, 24), random.Random(1)
    for _ in range(300):
        fan_out.budget = rng.choice((4, 9, 24))
        rank = min(int(rng.expovariate(0.3)), 30)
        accepted = rng.randrange(6)
        fan_out.observe(CHAIN, 5, accepted, rank if rank < fan_out.budget else None, fan_out.budget)
    for kind, length in ((CHAIN, 5), (CHAIN, 2), (NONE, 0)):
        hits, (P, miss) = fan_out.hits(kind, length), fan_out.curves(kind, length)
        for M in (1, 4, 9, 24):
            fan_out.budget = M
            lists = fan_out.lists(kind, length)
            assert sum(lists) == M
            assert hits[M] == pytest.approx(sum(p * (1 - curve[F]) for p, curve, F in zip(P, miss, lists)))


def test_ranks_beyond_a_small_budget_are_not_taken_for_misses_of_a_large_one():
    """Ranks seen through a small window now and then: the curve is the one that the full view gives."""
    rng, window = random.Random(2), FanOut(3, 32)
    ranks = [min(int(rng.expovariate(0.2)), 40) for _ in range(20000)]
    for rank in ranks:
        among = rng.choice((4, 8, 32))
        window.observe(CHAIN, 3, 1, rank if rank < among else None, among)
    true = [sum(rank >= F for rank in ranks) / len(ranks) for F in range(33)]
    assert max(abs(a - b) for a, b in zip(window.miss_curve("rejected"), true)) < 0.02
