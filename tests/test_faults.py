"""A draft that fails, hangs or talks nonsense: the target finishes with the right text, says so
once, and nobody waits.

The faults are put into the draft's own passes, in the middle of a run; the next run must be well
again.
"""

import itertools
import math
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from tiny import DEVICES, Words, engine, play, settle, transformer

import runtime
import ssd
from cache import SpeculationCache
from engine import Engine, Model, check_pair
from figures import Figures
from rows import COUPLINGS
from runtime import Devices, DraftLost, Lane, available_cores
from ssd import Decoding, Plan
from steps import Drawn, Runner

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3], [5]]
SETTINGS = {
    "max_new_tokens": 40,
    "temperature": [0.0, 1.0, 0.7, 1.0],
    "seed": 5,
    "k": 3,
    "fan_out": 5,
}
# Where a draft can fail, and the kind of run that gets there.
PLACES = [
    ("prefill", {"mode": "sd"}),
    ("prefill", {"mode": "ssd"}),
    ("decode", {"mode": "sd"}),
    ("decode", {"mode": "ssd", "fallback": "jit"}),
    ("extend", {"mode": "ssd"}),
    ("fork", {"mode": "ssd"}),
    ("chain_step", {"mode": "ssd"}),
    ("chain_step", {"mode": "ssd", "cut": False}),
]
IDS = ["-".join([place, *map(str, settings.values())]) for place, settings in PLACES]


class Bench:
    """An engine, its warnings, the true text, and a way to break one of the draft's passes."""

    def __init__(self, monkeypatch, models, truth):
        self.warnings, self.monkeypatch, self.truth = [], monkeypatch, truth
        self.engine = Engine(*models, DEVICES, self.warnings.append)
        self.model = self.engine.draft.transformer

    def break_(self, place, fault, after=0):
        """From its call number `after` on, the draft's pass returns fault(what it should)."""
        work, calls = getattr(Runner, place), []

        def broken(runner, *args):
            if runner.model is not self.model:
                return work(runner, *args)
            calls.append(place)
            return work(runner, *args) if len(calls) <= after else fault(work(runner, *args))

        self.monkeypatch.setattr(Runner, place, broken)
        return calls

    def survives(self, **settings):
        """The text is right all the same, with one warning; the next run has no fault, and no
        warning."""
        start, go_on_alone, began, lost = Lane.start, Decoding.go_on_alone, time.perf_counter(), []

        def careful(lane, work, *args):
            asked = getattr(work, "__self__", None)
            well = asked is None or getattr(asked, "role", "draft") == "target"
            assert well or not lost, "a draft that failed was asked again"
            return start(lane, work, *args)

        def spy(decoding, *why):
            assert not lost, "a draft is lost once"
            lost.append(why)
            return go_on_alone(decoding, *why)

        self.monkeypatch.setattr(Lane, "start", careful)
        self.monkeypatch.setattr(Decoding, "go_on_alone", spy)
        result, decoding = play(self.engine, PROMPTS, **SETTINGS | settings)
        took = time.perf_counter() - began
        assert result.token_ids == self.truth and result.finish_reason == ["length"] * len(PROMPTS)
        assert len(self.warnings) == 1 and self.warnings[0].startswith("the draft failed (")
        assert lost and decoding.lost and decoding.draft is None
        assert result.stats["mode"] == settings["mode"]
        self.monkeypatch.undo()
        self.monkeypatch.setattr(runtime, "PATIENCE_S", 60.0)
        again, decoding = play(self.engine, PROMPTS, **SETTINGS | settings)
        assert again.token_ids == self.truth and len(self.warnings) == 1
        assert not decoding.lost and again.stats["acceptance_rate"] > 0.3
        return took


@pytest.fixture(scope="module")
def models():
    target = transformer(0)
    return Model.of(target), Model.of(transformer(1, base=target, noise=0.03))


@pytest.fixture(scope="module")
def truth(models):
    return Engine(*models, DEVICES).generate(PROMPTS, mode="ar", **SETTINGS).token_ids


@pytest.fixture
def bench(monkeypatch, models, truth):
    monkeypatch.setattr(runtime, "PATIENCE_S", 60.0)
    return Bench(monkeypatch, models, truth)


def impatient(monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE_S", 0.4)
    monkeypatch.setattr(runtime, "FIRST_PATIENCE_S", 0.4)
    monkeypatch.setattr(ssd, "PREFILL_PATIENCE_S", 0.4)
    for module in (runtime, ssd):
        monkeypatch.setattr(module, "PATIENCE_TIMES", 0)


def fail(value):
    raise RuntimeError("the device is lost")


@pytest.mark.parametrize(
    ("place", "settings", "after"),
    [
        *((*case, 0) for case in PLACES),
        *((*case, 4) for case in PLACES if case[0] != "prefill"),  # which comes once
    ],
)
def test_an_exception(bench, place, settings, after):
    calls = bench.break_(place, fail, after)
    bench.survives(**settings)
    # A late chain step is noticed when the next round has begun.
    assert after < len(calls) <= after + 2
    assert "the device is lost" in bench.warnings[0]


@pytest.mark.parametrize(("place", "settings"), PLACES, ids=IDS)
def test_a_draft_that_hangs(bench, monkeypatch, place, settings):
    woken = threading.Event()

    def hang(value):
        assert woken.wait(30), "nobody went on without the draft"
        return value

    impatient(monkeypatch)
    bench.break_(place, hang, after=0 if place == "prefill" else 2)
    try:
        assert bench.survives(**settings) < 10
        assert "within 0.4 s" in bench.warnings[0]
    finally:
        woken.set()


def test_a_draft_that_hangs_on_the_shared_lane_while_it_reads_a_row_that_joins(bench, monkeypatch):
    woken = threading.Event()
    bench.engine.devices = Devices(f"cpu:{available_cores()[0]}")
    impatient(monkeypatch)
    bench.break_("prefill", lambda value: woken.wait(30) and value, after=1)
    try:
        assert bench.survives(mode="sd", batch=1) < 10
    finally:
        woken.set()


@pytest.mark.parametrize("mode", ["sd", "ssd"])
def test_a_draft_that_hangs_on_the_target_s_own_lane(bench, monkeypatch, mode):
    """For SD on one device both share a lane: the target gets a new one instead of waiting behind
    the draft."""
    woken = threading.Event()
    bench.engine.devices = Devices(f"cpu:{available_cores()[0]}")
    impatient(monkeypatch)
    bench.break_(
        "decode" if mode == "sd" else "extend", lambda value: woken.wait(30) and value, after=2
    )
    try:
        assert bench.survives(mode=mode) < 10
    finally:
        woken.set()


def hangs(woken):
    woken.wait(30)


def test_a_draft_that_still_hangs_from_the_run_before(bench, monkeypatch):
    """It began to hang in a round that no longer needed it, so nobody noticed: the next run has a
    new thread."""
    woken = threading.Event()
    decoding = bench.engine.start(PROMPTS, mode="ssd", **SETTINGS)
    for _ in decoding.rounds():
        pass
    settle(decoding)
    lanes = decoding.target_lane, decoding.draft_lane
    threads = [lane._thread for lane in lanes]
    decoding.draft_lane.start(hangs, woken)
    monkeypatch.setattr(runtime, "HANGS_S", 0.2)
    try:
        again, later = play(bench.engine, PROMPTS, mode="ssd", **SETTINGS)
        assert (
            again.token_ids == bench.truth and again.stats["hit_rate"] > 0.3 and not bench.warnings
        )
        assert (later.target_lane, later.draft_lane) == lanes
        assert [lane._thread is old for lane, old in zip(lanes, threads)] == [True, False]
    finally:
        woken.set()


def test_a_failure_after_the_look_up_is_noticed(bench):
    """The second chain step fails, late and every time, when its first is long in use: the next
    round sees it."""
    numbers = iter(range(1000))
    bench.monkeypatch.setattr(Lane, "has_time", lambda lane, verdict: True)

    def second(value):
        return fail(value) if next(numbers) % 3 == 1 else value

    bench.break_("chain_step", second, after=6)
    bench.survives(mode="ssd")


def test_a_failure_is_known_before_anybody_is_woken():
    """Who waits for the fork of work that failed must not take it for a round that prepared
    nothing."""
    lane = Lane(DEVICES.given[1], "draft")
    for _ in range(100):
        lane.error, chains = None, SpeculationCache(lane)
        chains.filled_by(lane.start(fail, None))
        with pytest.raises(DraftLost, match="the device is lost"):
            lane.wait_for(chains.forked)
    lane.close()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("settings", [
    {"mode": "sd"}, {"mode": "ssd"}, {"mode": "ssd", "coupling": "maximal", "temperature": 0.0},
    {"mode": "sd", "coupling": "independent", "temperature": 0.0},
], ids=lambda settings: "-".join(map(str, settings.values())))  # fmt: skip
def test_logits_that_are_no_numbers(bench, number, settings):
    if "temperature" in settings:
        bench.truth = bench.engine.generate(
            PROMPTS, **SETTINGS | {"mode": "ar", "temperature": 0.0}
        ).token_ids
    forward, calls = bench.model.forward, []

    def broken(*args):
        logits = forward(*args)
        calls.append(1)
        return logits if logits is None or len(calls) < 8 else torch.full_like(logits, number)

    bench.monkeypatch.setattr(bench.model, "forward", broken)
    bench.survives(**settings)
    assert "not finite" in bench.warnings[0]


def test_not_a_number_in_one_place_of_one_row(bench):
    """One bad logit among good ones is enough to stop listening to the draft; under `maximal` as
    well."""
    forward = bench.model.forward

    def broken(*args):
        logits = forward(*args)
        if logits is not None:
            logits[2, :, 7] = float("nan")
        return logits

    bench.monkeypatch.setattr(bench.model, "forward", broken)
    bench.survives(mode="ssd")


@pytest.mark.parametrize(("token", "k"), [(50, 1), (-1, 3), (10**6, 3)])
@pytest.mark.parametrize(
    ("place", "settings"), [case for case in PLACES if case[0] not in ("prefill", "extend")]
)
def test_tokens_that_do_not_exist(bench, place, settings, token, k):

    def wrong(value):
        tokens, *others = value
        return [[token] * len(row) if isinstance(row, list) else token for row in tokens], *others

    bench.break_(place, wrong, after=2)
    bench.survives(**settings | {"k": k})


def test_a_run_of_the_target_that_fails_is_the_users_to_see(bench):
    """An error of the target is raised, and the engine is well afterwards, whatever it has left."""
    verify, calls = Runner.verify, []

    def broken(runner, *args):
        calls.append(1)
        if len(calls) == 5:
            runner.cache.k_LBGSD.fill_(math.nan), runner.cache.v_LBGSD.fill_(math.nan)
        return verify(runner, *args) if len(calls) < 5 else fail(None)

    bench.monkeypatch.setattr(Runner, "verify", broken)
    with pytest.raises(RuntimeError, match="the device is lost"):
        bench.engine.generate(PROMPTS, mode="ssd", **SETTINGS)
    bench.monkeypatch.setattr(Runner, "verify", verify)
    assert (
        bench.engine.generate(PROMPTS, mode="ssd", **SETTINGS).token_ids == bench.truth
        and not bench.warnings
    )


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("mode", ["ar", "sd", "ssd"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_target_whose_logits_are_no_numbers_is_the_users_to_see(
    bench, mode, coupling, everywhere
):
    """From its 4th pass with logits on, in all of them or in one place of one row: it is named,
    nothing is printed."""
    model, calls = bench.engine.target.transformer, []
    forward = model.forward

    def broken(*args):
        logits = forward(*args)
        calls.append(logits is not None)
        if logits is not None and sum(calls) >= 4:
            logits[() if everywhere else (1, 0, 7)] = float("nan")
        return logits

    bench.monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(ValueError, match="the target's logits are not finite numbers"):
        bench.engine.generate(PROMPTS, mode=mode, coupling=coupling, **SETTINGS)
    bench.monkeypatch.setattr(model, "forward", forward)
    assert bench.engine.generate(PROMPTS, mode="ssd", **SETTINGS).token_ids == bench.truth
    assert not bench.warnings


# ---- pairs that do not fit


def test_vocabularies_that_differ_are_refused():
    with pytest.raises(
        ValueError,
        match="target has 50 tokens and the draft draft 40: use a draft with the target's",
    ):
        engine(transformer(0), transformer(1, vocab=40))
    a = Model.of(transformer(0, vocab=4), "big", Words(b"a", b"b", b"c", b"d"))
    b = Model.of(transformer(0, vocab=4), "small", Words(b"a", b"b", b"x", b"y"))
    with pytest.raises(ValueError, match="token 2 is b'c' in big and b'x' in small"):
        check_pair(a, b)
    check_pair(a, a)


@pytest.mark.parametrize("sizes", [(50, 41), (41, 50)])
def test_embeddings_padded_to_different_sizes(sizes, monkeypatch):
    """As Qwen2.5's are, for one and the same tokenizer. A draft's padding is never drafted, the
    target's never fed, and the draft works on no more tokens than both have."""
    extend, widths = Runner.extend, set()

    def measured(runner, feed):
        scores_BTV = extend(runner, feed)
        widths.add(scores_BTV.shape[-1])
        return scores_BTV

    monkeypatch.setattr(Runner, "extend", measured)
    target, draft = transformer(0, vocab=sizes[0]), transformer(2, vocab=sizes[1])
    if sizes[0] < sizes[1]:
        draft.head.weight[41:] *= 3.0  # it would love to say what does not exist
    pair = engine(target, draft, warn=pytest.fail, words=40)
    expected = pair.generate(PROMPTS, mode="ar", **SETTINGS).token_ids
    assert sizes[0] == 41 or max(map(max, expected)) > 41
    for coupling, mode in itertools.product(COUPLINGS, ("sd", "ssd")):
        result = pair.generate(PROMPTS, mode=mode, coupling=coupling, **SETTINGS)
        assert result.token_ids[0] == expected[0]  # greedy
        assert coupling != "shared" or result.token_ids == expected
    assert widths == {41}


def test_a_budget_as_large_as_the_vocabulary_is_refused():
    target = transformer(0, vocab=12)
    with pytest.raises(ValueError, match="fan_out is 12, wanted less than the vocabulary"):
        engine(target, transformer(base=target)).generate([[1]], mode="ssd", fan_out=12)


def test_a_look_up_waits_for_the_step_that_was_begun_but_only_where_a_row_hit():
    lane, chains, gate = Lane(DEVICES.given[1], "draft"), SpeculationCache(None), threading.Event()
    chains.lane = lane

    def fill():
        chains.fork([[5]], [[1]], [0.5])
        chains.append([[6]], None)
        gate.wait(10)
        chains.append([[7]], None)

    chains.filled_by(lane.start(fill))
    assert chains.look_up([0], [1], [4]) == {} and not gate.is_set(), "a miss waits for the fork"
    threading.Timer(0.05, gate.set).start()
    assert chains.look_up([0], [1], [5]) == {0: ([6, 7], [None, None])}
    lane.close()


def test_the_usual_plan_has_the_usual_sizes_however_chains_end():
    figures = Figures([])
    plans = [Plan(4, 6)] * 3 + [Plan(4, 6, cut=False)] * 2 + [Plan(2, 12)] * 4
    figures.rounds = [SimpleNamespace(plan=plan) for plan in plans]
    assert figures.usual_plan() == Plan(4, 6)


def test_a_run_that_ends_before_its_prefill_took_no_time_for_it():
    """The clock begins when compiling is done; it would count from when the machine started."""
    figures = Figures([])
    figures.end = 5000.0
    assert figures.report([])["prefill_s"] == 0


def test_a_begun_step_counts_when_its_tokens_are_there():
    """Tokens on a device are there when the next step was begun; lists are there at once."""
    chains = SpeculationCache(None)
    chains.append(Drawn(None, lambda: [[7]]), None)
    assert chains.steps == chains.moments == []
    chains.append(Drawn(None, lambda: [[8]]), None)
    assert chains.steps == [([[7]], None)]
    chains.settle(), chains.settle()
    assert chains.steps == [([[7]], None), ([[8]], None)]
    chains.append([[9]], None)
    assert len(chains.steps) == len(chains.moments) == 3
