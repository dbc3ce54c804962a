"""Lanes, devices, packed weights and compilation: where work runs must not change what it computes."""

import copy
import os
import random
import threading
import time

import pytest
import tiny
import torch

import runtime
import tuner
from pair import Model
from runtime import Devices, Lane, LaneFault, PackedLinear, Pending, available_cores, pack, parse_device, read_bandwidth
from ssd import Engine

TWO_CORES = len(available_cores()) >= 2


def test_devices_are_parsed():
    first = available_cores()[0]
    assert parse_device("cpu") == (torch.device("cpu"), ())
    assert parse_device(f"cpu:{first}") == (torch.device("cpu"), (first,))
    assert parse_device(f"cpu:{first}-{first}")[1] == (first,)


@pytest.mark.parametrize("spec", "tpu cpu:x cpu:0- cpu:-1 cpu:99999 cpu:0, cpu: cuda: cuda:x cuda:99 cpu:1-0".split())
def test_devices_that_do_not_exist_are_refused(spec):
    with pytest.raises(ValueError, match="device is"):
        parse_device(spec)


def test_a_lane_runs_its_work_in_order_on_its_own_thread():
    lane, seen = Lane("cpu", "test"), []
    work = [lane.start(f"job {i}", seen.append, i) for i in range(20)]
    assert work[-1].result() is None and seen == list(range(20))
    assert lane.start("who", threading.get_ident).result() != threading.get_ident()
    assert [name for name, _, _ in lane.spans][:2] == ["job 0", "job 1"]
    assert all(begin <= end for _, begin, end in lane.spans)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be pinned on this system")
def test_a_lane_is_pinned_and_has_as_many_threads_as_cores():
    core = available_cores()[-1]
    lane = Lane(f"cpu:{core}", "test")
    assert lane.start("where", os.sched_getaffinity, 0).result() == {core}
    assert lane.start("threads", torch.get_num_threads).result() == 1
    assert len(available_cores()) == len(os.sched_getaffinity(os.getpid())), "the main thread must stay free"
    assert lane.start("mode", torch.is_inference_mode_enabled).result()


@pytest.mark.skipif(not TWO_CORES, reason="needs two cores")
def test_two_lanes_overlap():
    """Both lanes wait for each other: possible only if they run at the same time."""
    barrier = threading.Barrier(2, timeout=10)
    lanes = Lane("cpu:0", "a"), Lane("cpu:1", "b")
    for pending in [lane.start("meet", barrier.wait) for lane in lanes]:
        pending.result(10)


def test_errors_and_time_limits_reach_who_waits():
    lane = Lane("cpu", "test")

    def fail():
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        lane.start("fail", fail).result()
    gate = threading.Event()
    stuck = lane.start("stuck", gate.wait)
    begin = time.perf_counter()
    with pytest.raises(LaneFault, match="stuck did not finish within 0.05 s"):
        stuck.result(0.05)
    assert time.perf_counter() - begin < 5
    gate.set()
    assert lane.start("after", lambda: 7).result(10) == 7


def test_work_may_be_as_good_as_done(monkeypatch):
    """Begun at 10, usually 3 seconds long: at 12 it will be over within 1.5 seconds, but not within 0.5."""
    work = Pending("verify", lambda: None, ())
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: 12.0)
    assert not work.done(99.0), "neither begun nor known"
    work.begin = 10.0
    assert not work.done(99.0), "begun, but nothing is known of its length"
    work.usual_s = 3.0
    assert work.done(1.5) and not work.done(0.5) and not work.done()
    work.run()
    assert work.done()


def test_packed_linear_layers_compute_the_same():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32, bias=False))
    x = torch.randn(2, 5, 64)
    plain = model(x)
    pack(model)
    assert isinstance(model[0], PackedLinear) and isinstance(model[1], PackedLinear)
    assert torch.allclose(model(x), plain, atol=1e-5)
    double = torch.nn.Sequential(torch.nn.Linear(8, 8)).double()
    pack(double)
    assert type(double[0]) is torch.nn.Linear, "only float32 has a packed layout"


def test_default_devices_share_the_cores_sensibly():
    target, draft = Devices().lanes("ssd")
    cores = available_cores()
    if TWO_CORES:
        assert not set(target.cores) & set(draft.cores) and set(target.cores) | set(draft.cores) == set(cores)
    assert Devices().lanes("sd")[0] is Devices().lanes("sd")[1] or Devices().lanes("sd")[0].spec == "cpu"
    devices = Devices("cpu:0", None)
    assert devices.lanes("ssd")[1].spec == "cpu:0" and devices.lanes("ssd")[0] is not devices.lanes("ssd")[1]
    assert devices.lanes("sd")[0] is devices.lanes("sd")[1]


def test_a_broken_lane_is_replaced():
    devices = Devices("cpu", "cpu")
    lane = devices.lanes("ssd")[1]
    lane.broken = True
    assert devices.lanes("ssd")[1] is not lane


def test_read_bandwidth_is_plausible():
    assert 1e8 < read_bandwidth(Lane("cpu", "test")) < 1e13


def restless(self, *_):
    """Another K and M in every round."""
    self.k, self.budget = random.choice(self.ks), random.choice(self.budgets)


def test_compiled_steps_equal_eager_ones_and_never_recompile(monkeypatch):
    """One compiled engine, every mode: the same text as eager, and no new graph after each mode's warm-up."""
    from torch._dynamo.utils import counters

    target = tiny.transformer(dtype=torch.float32)
    draft = tiny.transformer(1, base=target, noise=0.02)
    said, before, eager = [], 0, tiny.engine(copy.deepcopy(target), copy.deepcopy(draft))
    compiled = Engine(Model.of(target, compile=True), Model.of(draft, compile=True), tiny.DEVICES, said.append)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [3]]
    monkeypatch.setattr(tuner, "STATIC_KS", (1, 2))
    monkeypatch.setattr(tuner, "STATIC_BUDGETS", (3, 6))
    monkeypatch.setattr(tuner.Tuner, "revise", restless)
    fixed = {"k": 2, "fan_out": 6}
    for mode, temperature, choice in (("ar", 0.0, {}), ("ar", 1.0, {}), ("ssd", 0.0, fixed), ("ssd", 1.0, {})):
        options = {"mode": mode, "temperature": temperature, "seed": 3, **choice}
        for number, rows in enumerate(([[9], [8], [7]], prompts, [p * 9 for p in prompts])):
            got = compiled.generate(rows, max_new_tokens=20, **options)
            graphs = counters["stats"]["unique_graphs"]
            assert number == 0 or graphs == before, f"{mode} at {temperature}, run {number}: compiled again"
            before = graphs
            assert got.token_ids == eager.generate(rows, max_new_tokens=20, **options).token_ids
    assert said and all("compiled in" in text for text in said)

