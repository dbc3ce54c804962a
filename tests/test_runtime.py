"""Lanes, devices, compilation: where work runs must not change what it computes."""

import contextlib
import copy
import functools
import gc
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest
import tiny
import torch

import auto
import linear
import runtime
from engine import Engine, Model
from model import Block
from rows import COUPLINGS
from runtime import (
    PATIENCE_S,
    Devices,
    DraftLost,
    Lane,
    Policy,
    Work,
    available_cores,
    parse_device,
    read_bandwidth,
)
from steps import Runner

TWO_CORES = len(available_cores()) >= 2


@pytest.fixture
def lane():
    made = Lane("cpu", "test")
    yield made
    made.close()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE_S", 0.05)
    monkeypatch.setattr(runtime, "FIRST_PATIENCE_S", 0.05)
    monkeypatch.setattr(runtime, "PATIENCE_TIMES", 0)


# ---- devices


def test_devices_are_parsed():
    first = available_cores()[0]
    assert parse_device("cpu") == (torch.device("cpu"), ())
    assert parse_device(f"cpu:{first}") == (torch.device("cpu"), (first,))
    assert parse_device(f"cpu:{first}-{first}")[1] == (first,)


WRONG = "tpu cpu:x cpu:0- cpu:-1 cpu:99999 cpu:0, cpu: cuda: cuda:x cuda:99 cpu:1-0"


@pytest.mark.parametrize("spec", WRONG.split())
def test_devices_that_do_not_exist_are_refused(spec):
    with pytest.raises(ValueError, match="device is"):
        parse_device(spec)


def test_default_devices_share_the_cores_sensibly():
    target, draft = Devices().lanes("ssd")
    cores = available_cores()
    if TWO_CORES:
        assert not set(target.cores) & set(draft.cores)
        assert set(target.cores) | set(draft.cores) == set(cores)
    turns = Devices().lanes("sd")
    assert turns[0] is turns[1] or turns[0].spec == "cpu"
    devices = Devices(f"cpu:{cores[0]}", None)
    apart = devices.lanes("ssd")
    assert apart[1].spec == f"cpu:{cores[0]}" and apart[0] is not apart[1]
    assert devices.lanes("sd")[0] is devices.lanes("sd")[1]


# ---- lanes


def test_a_lane_runs_its_work_in_order_on_its_own_thread(lane):
    seen = []
    work = [lane.start(seen.append, i) for i in range(20)]
    assert all(isinstance(future, Work) for future in work)
    assert work[-1].result() is None and seen == list(range(20))
    assert lane.start(threading.get_ident).result() != threading.get_ident()
    assert [name for name, _, _ in lane.spans][:2] == ["append", "append"]
    assert all(begin <= end for _, begin, end in lane.spans)
    assert all(a.end <= b.begin for a, b in zip(work, work[1:]))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be pinned here")
def test_a_lane_is_pinned_and_has_as_many_threads_as_cores():
    core = available_cores()[-1]
    lane = Lane(f"cpu:{core}", "test")
    assert lane.start(os.sched_getaffinity, 0).result() == {core}
    assert lane.start(torch.get_num_threads).result() == 1
    assert len(available_cores()) == len(os.sched_getaffinity(os.getpid())), (
        "the main thread is free"
    )
    assert lane.start(torch.is_inference_mode_enabled).result()
    lane.leave()
    assert lane.start(os.sched_getaffinity, 0).result() == {core}, "so is its next thread"


@pytest.mark.skipif(not TWO_CORES, reason="needs two cores")
def test_two_lanes_overlap():
    """Both lanes wait for each other: possible only if they run at the same time."""
    barrier = threading.Barrier(2, timeout=10)
    cores = available_cores()
    lanes = Lane(f"cpu:{cores[0]}", "a"), Lane(f"cpu:{cores[1]}", "b")
    for work in [lane.start(barrier.wait) for lane in lanes]:
        work.result(10)


def fail():
    raise KeyError("inside")


def test_errors_reach_who_waits(lane):
    """result() hands on what was raised; answer(), for a draft's work, says DraftLost."""
    with pytest.raises(KeyError, match="inside"):
        lane.start(fail).result()
    with pytest.raises(DraftLost, match="inside"):
        lane.check()
    lane.settle(1.0)
    lane.check()
    with pytest.raises(DraftLost, match="inside"):
        lane.answer(lane.start(fail))
    lane.settle(1.0)
    unnamed = lane.start(lambda: (_ for _ in ()).throw(RuntimeError()))
    with pytest.raises(DraftLost, match="RuntimeError"):
        lane.answer(unnamed)
    assert lane.start(lambda: 7).result(10) == 7, "the lane itself goes on"


def test_an_earlier_failure_is_found_by_the_next_answer_or_wait(lane):
    """A draft may fail in work that nobody asks for; what it answers later is not to be trusted."""
    ready = threading.Event()
    ready.set()
    lane.start(fail)
    later = lane.start(lambda: 7)
    with pytest.raises(DraftLost, match="inside"):
        lane.answer(later)
    with pytest.raises(DraftLost, match="inside"):
        lane.wait_for(ready)
    lane.leave()
    assert lane.answer(lane.start(lambda: 7)) == 7, "a lane that was left has a clean slate"


@pytest.mark.parametrize("ask", ["answer", "wait_for"])
def test_work_that_hangs_is_left_to_its_thread(lane, impatient, ask):
    gate, event = threading.Event(), threading.Event()
    stuck, thread = lane.start(gate.wait), lane.start(threading.get_ident)
    begin = time.perf_counter()
    with pytest.raises(DraftLost, match="it did not answer within 0.05 s"):
        lane.answer(stuck) if ask == "answer" else lane.wait_for(event)
    assert time.perf_counter() - begin < 5
    fresh = lane.start(threading.get_ident).result(10)
    names = [name for name, _, _ in lane.spans]
    gate.set()
    assert stuck.result(10) and thread.result(10) != fresh, "the old thread ends its work"
    assert [name for name, _, _ in lane.spans] == names, "which is not recorded any more"


def test_patience_grows_with_the_slowest_work_and_an_answer_may_have_more(lane, monkeypatch):
    assert lane.patience() == PATIENCE_S
    monkeypatch.setattr(runtime, "PATIENCE_S", 0.01)
    lane.start(time.sleep, 0.05).result()
    assert lane.patience() >= 20 * 0.05
    for _ in range(30):
        lane.start(time.sleep, 0.01)
    assert lane.patience() >= 40 * 0.05, "work that is queued before it takes time, too"
    monkeypatch.setattr(runtime, "PATIENCE_TIMES", 0)
    assert lane.answer(lane.start(lambda: time.sleep(0.2) or 7), limit_s=10) == 7


def test_work_that_was_never_done_has_the_time_of_a_first_one(lane, monkeypatch):
    """Of a draft's first long job nobody knows how long it takes: a short one says little."""

    def long(seconds=0.2):
        time.sleep(seconds)
        return 7

    monkeypatch.setattr(runtime, "PATIENCE_S", 0.01)
    monkeypatch.setattr(runtime, "PATIENCE_TIMES", 0)
    lane.start(time.sleep, 0.001).result()
    assert lane.answer(lane.start(long)) == 7
    with pytest.raises(DraftLost, match="did not answer within"):
        lane.answer(lane.start(long, 2))
    assert lane.answer(lane.start(long)) == 7, "a lane that was left knows nothing yet"
    lane.settle(10.0)
    assert lane.answer(lane.start(long)) == 7, "nor does the next run"


def test_what_was_left_behind_is_waited_for_at_the_end(lane, impatient):
    """A thread that is killed inside torch aborts the program. Its spans are nobody's."""
    gate = threading.Event()

    def stuck():
        gate.wait()
        with lane.span("step"):
            pass
        return threading.current_thread()

    work = lane.start(stuck)
    with pytest.raises(DraftLost):
        lane.answer(work)
    threading.Timer(0.2, gate.set).start()
    lane.close()
    assert not work.result().is_alive() and lane.spans == []


def test_settle_waits_for_what_is_in_hand_and_leaves_what_hangs(lane):
    gate, done = threading.Event(), []
    lane.start(lambda: (time.sleep(0.05), done.append(1)))
    lane.settle(10.0)
    assert done and lane.spans == [] and lane.slowest_s == 0.0
    thread = lane.start(threading.get_ident).result()
    stuck = lane.start(gate.wait)
    lane.settle(0.05)
    assert lane.start(threading.get_ident).result(10) != thread
    gate.set()
    assert stuck.result(10)


def test_a_run_begins_on_a_lane_that_answers(monkeypatch):
    """What the last run's draft left hanging keeps its thread; the next run gets another."""
    monkeypatch.setattr(runtime, "HANGS_S", 0.05)
    devices, gate = Devices("cpu", "cpu"), threading.Event()
    lane = devices.lanes("ssd")[1]
    lane.start(gate.wait)
    assert devices.lanes("ssd")[1] is lane and lane.start(lambda: 7).result(10) == 7
    gate.set()


def test_there_is_time_for_a_step_while_the_verdict_is_far(lane, monkeypatch):
    """Due at 13, and a step takes 2 seconds, of which STEP_SHARE must fit."""
    verdict, lane.last_s = Work(""), 2.0
    for now, has_time in ((10.0, True), (11.9, True), (12.1, False), (14.0, False)):
        monkeypatch.setattr(runtime.time, "perf_counter", lambda now=now: now)
        verdict.due = 13.0
        assert lane.has_time(verdict) is has_time, now
    monkeypatch.setattr(Lane, "on_gpu", True)  # there the step before is still running
    for now, has_time in ((9.9, True), (10.1, False)):
        monkeypatch.setattr(runtime.time, "perf_counter", lambda now=now: now)
        assert lane.has_time(verdict) is has_time, now
    verdict.due = float("inf")
    assert lane.has_time(verdict), "nothing is known: go on until it is in"
    verdict.set_result(None)
    assert not lane.has_time(verdict)


def test_work_is_due_when_such_work_usually_ends(lane):
    for _ in range(3):
        assert lane.start(time.sleep, 0.02).result() is None
    work = lane.start(time.sleep, 0.0)
    work.result()
    assert 0.015 < work.due - work.begin < 0.2
    assert lane.start(threading.get_ident).due == float("inf")


def test_ctrl_c_while_a_long_prompt_is_read_waits_for_one_chunk(monkeypatch):
    target, read, prefill = tiny.transformer(positions=2048), [], Runner.prefill
    pair = tiny.engine(target, tiny.transformer(1, base=target, noise=0.02))

    def interrupted(runner, ids, start):
        prefill(runner, ids, start)
        read.append((runner.role, start[0], len(ids[0])))
        if runner.role == "target":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.1)  # the main thread waits for this work

    monkeypatch.setattr(Runner, "prefill", interrupted)
    decoding = pair.start([[1] * 2000], mode="ssd")
    with pytest.raises(KeyboardInterrupt):
        next(decoding.rounds())
    pair.finish(decoding)
    tiny.settle(decoding)
    assert sorted(read) == [("draft", 0, 256), ("target", 0, 256)]


# ---- what the machine can do


def test_read_bandwidth_is_plausible(lane):
    assert 1e8 < read_bandwidth(lane) < 1e13


def test_a_bandwidth_that_cannot_be_measured_costs_no_text(monkeypatch):
    """A card that is full after the last token: the figure is missing, the text is there."""
    pair, calls = tiny.engine(tiny.transformer(), devices=Devices("cpu")), []

    def full(lane):
        calls.append(lane)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runtime, "read_bandwidth", full)
    for _ in range(2):
        result = pair.generate([[1, 2, 3]], max_new_tokens=5)
        assert len(result.token_ids[0]) == 5 and result.stats["bandwidth_fraction"] is None
    assert len(calls) == 1, "it is not tried again after every text"


# ---- compilation


@pytest.fixture
def eager_backend(monkeypatch):
    """Static steps without a compiler: Dynamo traces and counts as ever, nothing is built."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest keeps all
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def static_pair(said, bits="none", **shape) -> tuple[Engine, Engine]:
    """The same random pair with static and with eager steps."""
    target = tiny.transformer(dtype=torch.float32, **shape)
    draft = tiny.transformer(1, base=target, noise=0.02, dtype=torch.float32)
    for model in (target, draft):
        linear.finish_all(model, linear.finisher(bits, pack=False))
    eager = tiny.engine(copy.deepcopy(target), copy.deepcopy(draft))
    models = Model.of(target, "target", compile=True), Model.of(draft, "draft", compile=True)
    return Engine(*models, tiny.DEVICES, said.append), eager


def test_compiled_steps_equal_eager_ones_and_never_recompile(monkeypatch):
    """One compiled engine: eager's text in AR and SSD, no new graph after a warm-up."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr("steps.PREFILL_CHUNKS", (32,))  # a size less to compile, for each model
    said, before = [], 0
    compiled, eager = static_pair(said, num_hidden_layers=1)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [3]]
    fixed = {"mode": "ssd", "k": 2, "fan_out": 6}
    for mode, temperature in (({"mode": "ar"}, 0.0), (fixed, 1.0)):
        options = mode | {"temperature": temperature, "seed": 3, "max_new_tokens": 20}
        for number, rows in enumerate(([[9], [8], [7]], prompts, [p * 9 for p in prompts])):
            got = compiled.generate(rows, **options)
            graphs = counters["stats"]["unique_graphs"]
            assert number == 0 or graphs == before, f"{options}, run {number}: compiled again"
            before = graphs
            assert got.token_ids == eager.generate(rows, **options).token_ids
    assert said and all("compiled in" in text for text in said)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_static_steps_with_weights_of_few_bits(bits, eager_backend):
    """Without a break: the operators know what shapes they give."""
    compiled, eager = static_pair([], bits, num_hidden_layers=1)
    kinds = {type(layer) for layer in compiled.target.transformer.modules()}
    assert linear.Int8Linear in kinds, "a row of 48 is not whole groups"
    assert linear.few_bits_problem() or linear.GroupLinear in kinds
    options = {"mode": "ssd", "k": 2, "fan_out": 6, "max_new_tokens": 12, "ignore_eos": True}
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    want = eager.generate(prompts, **options).token_ids
    assert compiled.generate(prompts, **options).token_ids == want


@pytest.mark.parametrize("late", [True, False])
def test_an_eager_draft_on_a_gpu_has_time_to_compile_in_its_rounds(monkeypatch, late):
    """Its Triton kernels compile when a text gets long enough; another draft is lost by then."""
    monkeypatch.setattr(runtime, "PATIENCE_S", 0.3)
    monkeypatch.setattr(runtime, "FIRST_PATIENCE_S", 0.3)
    monkeypatch.setattr(runtime, "PATIENCE_TIMES", 20 if late else 0)
    said, target, calls, extend = [], tiny.transformer(), [], Runner.extend
    pair = tiny.engine(target, tiny.transformer(1, base=target, noise=0.02), warn=said.append)
    pair.draft.policy.compiles_late = late

    def compiles(runner, feed):
        calls.append(1)
        time.sleep(2.0 if len(calls) == 3 else 0.0)
        return extend(runner, feed)

    monkeypatch.setattr(Runner, "extend", compiles)
    options = {"mode": "ssd", "k": 2, "fan_out": 6, "max_new_tokens": 12, "ignore_eos": True}
    got = pair.generate([[1, 2, 3]], **options)
    assert got.token_ids == pair.generate([[1, 2, 3]], max_new_tokens=12).token_ids
    assert len(said) == (not late)


def test_lengths_that_a_static_draft_knows_are_fed_to_it_by_an_eager_target(
    eager_backend, monkeypatch
):
    """Where proposals are shorter than K, at the end of a text: nothing is compiled in a round."""
    target = tiny.transformer(dtype=torch.float32, num_hidden_layers=1)
    draft = tiny.transformer(1, base=target, noise=0.02, dtype=torch.float32, num_hidden_layers=1)
    models = Model.of(target, "target"), Model.of(draft, "draft", compile=True)
    fed, extend = set(), Runner.extend

    def noted(runner, feed):
        fed.add(len(feed.tokens[0]))
        assert fed <= set(runner.lengths)
        return extend(runner, feed)

    monkeypatch.setattr(Runner, "extend", noted)
    pair = Engine(*models, tiny.DEVICES, warn=lambda text: None)
    options = {"mode": "ssd", "k": 4, "fan_out": 6, "ignore_eos": True, "fallback": "jit"}
    for new in range(9, 14):
        pair.generate([[1, 2, 3]], max_new_tokens=new, **options)
    assert fed == {1, 5}


def test_a_run_left_in_the_middle_leaves_no_text_to_keep(eager_backend):
    """Static runners are used again, so it has overwritten the KV that the next turn would keep."""
    static, eager = static_pair([], num_hidden_layers=1)
    text, options = [(7 * i) % 50 for i in range(40)], {"mode": "ar", "max_new_tokens": 8}
    static.generate([text], keep=True, **options)
    left = static.start([[5, 9] * 20], **options).rounds()
    next(left), next(left)
    more = [*text, 3, 1, 4]
    kept = static.generate([more], keep=True, **options)
    assert kept.token_ids == eager.generate([more], **options).token_ids


def test_no_two_threads_meet_in_compiled_code(eager_backend, monkeypatch):
    """Dynamo ends the program there, once in so many runs: segmentation faults and worse."""
    static, _ = static_pair([], num_hidden_layers=1)
    models = static.target.transformer, static.draft.transformer
    blocks = [type(model.layers[0]).forward for model in models]
    codes = [block._torchdynamo_orig_callable.__code__ for block in blocks]
    assert len({id(code) for code in (*codes, Block.forward.__code__)}) == 3
    kept, own = [weakref.ref(code) for code in codes], []
    logits = Runner._logits
    noted = lambda runner, *args: own.append(runner.policy.turn.locked()) or logits(runner, *args)  # noqa: E731
    monkeypatch.setattr(Runner, "_logits", noted)
    static.generate([[1, 2, 3], [4, 5]], mode="ssd", k=2, fan_out=6, max_new_tokens=6)
    assert own and all(own)
    del static, models, blocks, codes
    gc.collect()
    assert all(code() is not None for code in kept), "it is looked at when its weights die"


def test_texts_of_every_length_run(eager_backend):
    """The fifth length used to pass the compiler's limit, which stops the program."""
    from torch._dynamo.utils import counters

    static, eager = static_pair([], positions=2048, num_hidden_layers=1)
    options = {"mode": "ssd", "k": 2, "fan_out": 6, "max_new_tokens": 6, "temperature": 1.0}
    before = counters["stats"]["unique_graphs"]
    for length in (100, 240, 480, 720, 1200):
        prompt = [(7 * i) % 50 for i in range(length)]
        got = static.generate([prompt], **options).token_ids
        assert got == eager.generate([prompt], **options).token_ids, length
    trunks = [r.cache.trunk for m in (static.target, static.draft) for r in m.runners.values()]
    assert set(trunks) == {2048}, "powers of two, and one set of buffers"
    assert counters["stats"]["unique_graphs"] - before > 16, "twice the compiler's own limit"


def test_a_shorter_text_runs_in_the_trunk_of_a_longer_one(eager_backend):
    static, _ = static_pair([], positions=1024)
    for length, trunk in ((600, 1024), (10, 1024), (300, 1024)):
        static.generate([[5] * length], mode="ar", max_new_tokens=2)
        assert [r.cache.trunk for r in static.target.runners.values()] == [trunk]


@pytest.mark.parametrize("settings", ({"mode": "sd"}, {"mode": "ssd", "fan_out": 6}))
def test_a_lost_draft_with_static_steps_goes_on_alone(eager_backend, monkeypatch, settings):
    """One token a pass was never warmed for SD, and a new thread knows no limit of compilations."""
    from torch._dynamo.utils import counters

    said, entered, graphs = [], set(), []
    static, eager = static_pair(said)
    real_enter, real = Policy.enter_thread, {w: getattr(Runner, w) for w in ("decode", "extend")}
    truth = eager.generate([[1, 2, 3], [4, 5]], max_new_tokens=40).token_ids
    calls = []

    def enter(policy):
        entered.add(threading.get_ident())
        real_enter(policy)

    def broken(name):
        def work(runner, *args):
            if runner.warm is not None:
                calls.append(name)
            if len(calls) > 3:
                graphs.append(counters["stats"]["unique_graphs"])
                raise RuntimeError("the device is lost")
            return real[name](runner, *args)

        return work

    monkeypatch.setattr(Policy, "enter_thread", enter)
    for name in real:
        monkeypatch.setattr(Runner, name, broken(name))
    got, run = tiny.play(static, [[1, 2, 3], [4, 5]], k=3, max_new_tokens=40, **settings)
    assert got.token_ids == truth and run.lost
    assert counters["stats"]["unique_graphs"] == graphs[0], "one token a pass was not warmed"
    assert (
        said[-1]
        == "the draft failed (the device is lost): the target goes on alone, the text stays right"
    )
    calls[:] = [None]
    for name, work in real.items():
        monkeypatch.setattr(Runner, name, work)
    entered.clear()
    again, run = tiny.play(static, [[1, 2, 3], [4, 5]], k=3, max_new_tokens=40, **settings)
    assert again.token_ids == truth and not run.lost and len(said) <= 3
    thread = run.draft_lane.start(threading.get_ident).result()
    assert thread in entered, "the draft compiles anew, on the thread that its lane has now"


def test_rope_tables_live_as_long_as_the_graphs_that_read_them():
    """A later runner may make longer tables; an earlier one's graphs hold addresses of its own."""
    model = Model.of(tiny.transformer())
    first = model.runner("target", 1, 64, 2, 0, 50)
    tables, values = first.rope, [table.clone() for table in first.rope]
    second = model.runner("target", 1, 512, 2, 0, 50)
    assert first.rope is tables and second.rope is not tables
    assert len(second.rope[0]) > len(tables[0]) and model.transformer.rope is second.rope
    assert all(map(torch.equal, tables, values))


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_what_is_fused_is_one_graph_each_and_gives_the_same_text(
    eager_backend, monkeypatch, coupling
):
    """On a GPU the draws, the acceptance and the outcomes are compiled: here Dynamo traces them."""

    def fuse(policy, work):
        if work not in policy.fused:
            policy.fused[work] = policy.compiled(work)
        traced.add(work.__name__)
        return policy.fused[work]

    static, eager = static_pair([], num_hidden_layers=1)
    options = {"coupling": coupling, "k": 2, "fan_out": 6, "max_new_tokens": 12, "mode": "ssd"}
    options["cut"] = False  # by the clock: outside `shared` the text hangs on what is proposed
    truth, traced = eager.generate([[1, 2, 3], [4]], temperature=[1.0, 0.0], **options), set()
    monkeypatch.setattr(Policy, "fuse", fuse)
    got = static.generate([[1, 2, 3], [4]], temperature=[1.0, 0.0], **options)
    assert got.token_ids == truth.token_ids
    wanted = "locate_trunk locate_chains decide score likeliest draw_chain draw_next"
    assert traced == set(wanted.split())


def restless(self, *_):
    """Another K and M in every round: all of them, in turn."""
    self.turn = getattr(self, "turn", 0) + 1
    return self.plans[self.turn % len(self.plans)]


def test_a_plan_may_change_between_any_two_rounds(eager_backend, monkeypatch):
    """Static steps fit every plan of the run, AR and turns among them."""
    static, eager = static_pair([])
    monkeypatch.setitem(auto.SIZES, True, ((1, 3), (4,)))
    monkeypatch.setattr(auto.Auto, "next", restless)
    options = {"temperature": 1.0, "max_new_tokens": 60, "seed": 2}
    got, run = tiny.play(static, [[1, 2], [3]], mode="ssd", **options)
    assert got.token_ids == eager.generate([[1, 2], [3]], mode="ar", **options).token_ids
    played = {(r.plan.k, r.plan.m) for r in run.figures.rounds}
    assert played >= {(0, 0), (1, 0), (3, 0), (1, 4), (3, 4)}


# ---- several runs with one engine


def test_a_run_whose_buffers_another_one_took_says_so(eager_backend):
    """Static runners are used again: the first run would go on with the other's KV."""
    static, eager = static_pair([], num_hidden_layers=1)
    options = {"mode": "ar", "max_new_tokens": 6}
    first = static.start([[1, 2, 3]], **options).rounds()
    next(first)
    second = static.generate([[4, 5]], keep=True, **options)
    assert second.token_ids == eager.generate([[4, 5]], **options).token_ids
    with pytest.raises(RuntimeError, match="another text was begun"):
        list(first)
    done = static.start([[1, 2, 3]], True, **options)
    list(done.rounds())
    static.generate([[7, 8, 9]], **options)
    static.finish(done)  # late: its KV is gone
    more = [[*done.rows[0].ids, 5]]
    kept = static.generate(more, keep=True, **options)
    assert kept.token_ids == eager.generate(more, **options).token_ids


@torch.inference_mode()
def test_a_static_run_does_not_see_what_a_failed_one_left(eager_backend):
    static, _ = static_pair([], num_hidden_layers=1)
    prompts, options = [[1, 2, 3], [4, 5]], {"mode": "ssd", "max_new_tokens": 12}
    truth = static.generate(prompts, **options).token_ids
    for model in (static.target, static.draft):
        (runner,) = model.runners.values()
        runner.cache.k_LBGSD.fill_(math.nan), runner.cache.v_LBGSD.fill_(math.nan)
    assert static.generate(prompts, **options).token_ids == truth


def test_a_static_runner_belongs_to_the_thread_that_made_it(eager_backend):
    """Graphs hold a stream's memory, and Dynamo's limits are a thread's own."""
    static, eager = static_pair([], num_hidden_layers=1)
    prompts, options = [[1, 2, 3], [4, 5]], {"mode": "sd", "max_new_tokens": 12, "k": 2}
    truth, drafts = eager.generate(prompts, mode="ar", max_new_tokens=12).token_ids, []
    for leave in (False, False, True):
        run = static.start(prompts, **options)
        if leave:
            drafts[0].draft_lane.leave()
            run = static.start(prompts, **options)
        list(run.rounds())
        assert [row.new_ids for row in run.all_rows] == truth
        drafts.append(run)
        static.finish(run)
    first, second, third = (run.draft for run in drafts)
    assert first is second and third is not second


@pytest.mark.parametrize("mode", ({"mode": "sd"}, {"mode": "ssd", "fan_out": 6}))
def test_a_draft_that_hangs_in_a_static_step_costs_the_next_run_little(
    eager_backend, monkeypatch, mode
):
    monkeypatch.setattr(runtime, "PATIENCE_S", 0.3)
    monkeypatch.setattr(runtime, "FIRST_PATIENCE_S", 0.3)
    monkeypatch.setattr(runtime, "HANGS_S", 0.3)
    said, held = [], threading.Event()
    static, eager = static_pair(said, num_hidden_layers=1)
    truth = eager.generate([[1, 2, 3]], mode="ar", max_new_tokens=12).token_ids
    static.generate([[1, 2, 3]], max_new_tokens=12, k=2, **mode)
    logits = Runner._logits

    def hang(runner, *args):
        if runner.role == "draft" and not held.is_set():
            held.wait(30)
        return logits(runner, *args)

    monkeypatch.setattr(Runner, "_logits", hang)
    try:
        began = time.perf_counter()
        for _ in range(2):
            got = static.generate([[1, 2, 3]], max_new_tokens=12, k=2, **mode)
            assert got.token_ids == truth
        assert time.perf_counter() - began < 20 and "still hangs" in said[-1], said
    finally:
        held.set()


def test_a_lane_that_goes_on_waits_for_what_its_old_stream_was_given(monkeypatch):
    """In SD on one GPU the target's prompt may still be in work there when a draft is lost."""

    class Stream:
        def __init__(self, *_):
            self.waited = []

        def wait_stream(self, other):
            self.waited.append(other)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Lane, "on_gpu", property(lambda lane: True))
    lane = Lane("cpu", "target")
    before = lane.stream
    lane.leave()
    assert lane.stream is not before and lane.stream.waited == [before] and not before.waited
    lane.close()


LARGE_PAGES = """
import generate
from ssd import load
import torch
weights = torch.ones(1 << 24)
rolled = open("/proc/self/smaps_rollup").read()
print(rolled.split("AnonHugePages:")[1].split()[0])
"""


def test_weights_in_floats_lie_on_large_pages():
    """PyTorch asks once, when a process makes its first tensor: a table that a module makes when it
    is imported may come before the setting."""
    allowed = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not allowed.exists() or "[never]" in allowed.read_text():
        pytest.skip("this system has no pages of 2 MB")
    root = Path(runtime.__file__).parent
    command = [sys.executable, "-c", LARGE_PAGES]
    plain = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}  # as users have it
    done = subprocess.run(command, cwd=root, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1 << 15  # of 65,536 KB
