"""scripts/gpu_check.py at toy size on the CPU: every part runs before it meets its first GPU."""

import gc
import importlib.util
import json
import sys
import weakref
from pathlib import Path

import pytest
import tiny
import torch

import engine
import runtime
import steps
from checkpoint import inflation
from engine import Engine, Model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # noqa: E402
import gpu_pair  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_steps  # noqa: E402


@pytest.fixture
def here(monkeypatch):
    """Parts run in this process: no Python to start, no torch to load. What they set in modules is
    put back.
    """
    kept = (engine, "SHORTEST_TRUNK"), (steps, "PREFILL_CHUNKS"), (runtime, "PATIENCE_S")
    for module, name in kept:
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(runtime, "read_bandwidth", lambda lane: 1e10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run_part(part, how, limit_s, log, sanitizer):
        assert sanitizer is None and how["tiny"] and limit_s <= 240, "toy size, within four minutes"
        records = []
        gpu_parts.run(part, how, lambda record: records.append(gpu_check.parse(json.dumps(record))))
        return {"records": records, "seconds": 1.0, "end": "done"}

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    yield
    torch.set_num_threads(threads)


def check(demo, out, *more) -> int:
    """demo: a folder with a pair, or None for the random one."""
    spec = f"cpu:{runtime.available_cores()[-1]}"
    folders = ["--target", str(demo / "target"), "--draft", str(demo / "draft")] if demo else []
    return gpu_check.main(["--device", spec, *folders, "--out", str(out), *more])


def test_every_part_runs_and_is_told(here, demo, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert check(demo, out) == 0
    printed, results = capsys.readouterr().out, json.loads(out.read_text())
    assert list(results["parts"]) == list(gpu_check.PARTS), "all parts, in their order"
    names = {
        part: [r["name"] for r in found["records"]] for part, found in results["parts"].items()
    }
    assert names["kernels"][:2] == ["copy bandwidth", "bfloat16 matrix rate"], (
        "the machine comes first"
    )
    for part in ("decode", "ssd", "wide", "linear"):
        assert names[part][0] == "copy bandwidth"
    everything = sum(names.values(), [])
    for wanted in (
        "target, none, batch 1, T=0: decode step: of copy bandwidth", "verification / decode step",
        "draft, none, batch 1, T=1: chain step M=4: of copy bandwidth",
        "target, none, batch 16, T=0: verification of 4, wall", "target, int8, batch 1, T=0: "
        "decode step, wall", "target, int4, batch 1: verification / decode step",
        "tree attention M=4 context=128: SDPA time / tree attention time",
        "noise equal to the CPU's, bit for bit", "profile: draft: chain step M=4",
        "int8 product against float64", "linear 64x96 rows=8 int8: of copy bandwidth",
        "verification of 4: beside the other model / alone", "SSD, auto / fixed",
        "draft the checkpoint as it is, T=1: SSD / SD",
        "draft the checkpoint as it is, no stream priority, T=0: SSD / AR",
        "draft CPU, T=1: SSD, between two verifications, of a round",
    ):  # fmt: skip
        assert wanted in everything, wanted
    records = [r for found in results["parts"].values() for r in found["records"]]
    assert {r.get("goal") for r in records} == {None, *gpu_parts.GOALS}, "all goals are measured"
    assert all(r["pass"] is None for r in records if "goal" in r), "toy sizes have no speed"
    first = printed.split("\n\n")[0].splitlines()
    assert first[0].split() == ["goal", "wanted", "aim", "measured", "fraction"]
    assert len(first) == 1 + sum("goal" in r for r in records)
    steps_seen = [r for r in records if r.get("kernels")]
    assert len(steps_seen) == 4 and all(r["gaps_us"] >= 0 for r in steps_seen)
    assert (tmp_path / gpu_steps.TRACE).exists()
    loop = [r for r in results["parts"]["loop"]["records"] if "pass" in r]
    assert len(loop) == 6 and all(r["pass"] is True for r in loop), loop
    for found in results["parts"].values():
        assert {"device", "torch", "commit", "date", "python"} <= set(found["environment"])
    assert str(demo) not in out.read_text(), "results name no folders"
    capsys.readouterr()
    gpu_check.main(["--show", str(out)])
    assert capsys.readouterr().out.strip() == printed.rsplit("written to", 1)[0].strip(), (
        "the table is the file's"
    )


def test_sums_over_ranks_are_timed_where_they_are_asked_for(demo, tmp_path):
    out = tmp_path / "out.json"
    assert check(demo, out, "--only", "ranks") == 0
    records = json.loads(out.read_text())["parts"]["ranks"]["records"]
    assert records[0]["name"] == "sum over 2 ranks, 1024 bytes" and len(records) > 5
    assert all(r["value"] > 0 and r["unit"] == "us" for r in records)


def test_one_part_keeps_the_others_and_wrong_is_wrong(here, demo, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    assert check(demo, out, "--only", "linear") == 0
    monkeypatch.setitem(gpu_parts.ALLOWED, torch.float32, 1e-12)
    assert check(demo, out, "--only", "correct") == gpu_check.WRONG
    assert list(json.loads(out.read_text())["parts"]) == ["linear", "correct"]
    assert "FAIL attention in float32 against float64: WRONG" in capsys.readouterr().out


def test_without_a_checkpoint_the_pair_is_random_and_its_draft_often_right(here, tmp_path):
    out = tmp_path / "out.json"
    assert check(None, out, "--only", "loop") == 0
    told = json.loads(out.read_text())["parts"]["loop"]["records"]
    shares = [r["acceptance"] for r in told if r["name"].startswith("ssd == AR")]
    assert len(shares) == 2 and all(0.4 < share < 1 for share in shares), shares


@pytest.mark.parametrize(
    "words, said",
    [
        (["--only", "nothing"], "--only has 'nothing', wanted some of decode"),
        (["--only", "loop", "--call", "2"], "--only and --call were given, wanted one"),
        (["--device", "cuda:99"], "torch finds"),
        (["--target", "/nowhere"], "there is no folder"),
        (["--limit", "-1"], "--limit is -1"),
        (["--draft", "/nowhere"], "there is no folder"),
        (["--sanitize"], "compute-sanitizer is missing"),
        (["--show", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_mistakes_are_one_sentence(words, said, demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert check(demo, tmp_path / "out.json", *words) == gpu_check.MISTAKE
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1, err


def test_two_calls_of_under_nine_minutes_have_all_parts_in_the_order_of_worth():
    assert all(sum(limits.values()) < 9 * 60 for limits in gpu_check.CALLS.values())
    ranked = [part for part in gpu_check.PARTS if part in ("decode", "ssd", "kernels", "loop")]
    assert ranked == ["decode", "ssd", "kernels", "loop"]
    assert {"decode", "ssd"} <= set(gpu_check.CALLS[1]), "they share compiled code"
    assert set(gpu_parts.PARTS) == {*gpu_check.PARTS, *gpu_check.EXTRA}


@pytest.mark.parametrize("tiny", [True, False])
def test_all_plans_are_timed_greedily_first_and_the_cpu_last(tiny):
    check = gpu_parts.Check(torch.device("cpu"), "cpu:0", "target", "draft", tiny, "", print)
    plans = gpu_pair.plans(check)
    order = [(temperature, name.split(",")[0]) for temperature, name, *_ in plans]
    assert [name for _, name in order[-2:]] == ["CPU", "CPU"]
    assert all(name != "CPU" for _, name in order[:-2])
    assert [temperature for temperature, _ in order[:-2]] == sorted(t for t, _ in order[:-2])
    if not tiny:
        shapes = [inflation.parse_shape(draft.split(":")[1]) for *_, draft, _, _ in plans]
        assert all(shape["vocab"] == 128256 for shape in shapes), "the target's, or it is refused"


def test_a_goal_is_a_fraction_of_what_was_wanted_or_was_not_measured():
    values = ("decode", 0.44, False), ("verify", 2.2, False), ("verify", 0.55, True)
    records = [
        {"name": "it", "value": value, "goal": goal, "pass": passes}
        for goal, value, passes in values
    ]
    lines = gpu_check.goals({"parts": {"decode": {"records": records}}})
    assert [line.split()[-4:-2] for line in lines[1:4]] == [
        ["0.5", "FAIL"], ["0.5", "FAIL"], ["2", "PASS"],
    ]  # fmt: skip
    assert sum("not measured" in line for line in lines) == len(gpu_parts.GOALS) - 2


def test_what_a_trace_says_of_kernels_and_gaps():
    """Two kernels that overlap, a gap of 5 us, a copy; what the host did is left out."""
    events = [("a", "kernel", 0, 10), ("b", "kernel", 5, 10), ("a", "kernel", 20, 4),
              ("copy", "gpu_memcpy", 24, 1), ("launch", "cuda_runtime", 0, 90)]  # fmt: skip
    events = [dict(zip(("name", "cat", "ts", "dur"), event)) for event in events]
    events.append({"name": "a thread's name", "ph": "M"})
    told = gpu_steps.busy_of(gpu_steps.kernels_of({"traceEvents": events}, True), 2)
    assert told["busy_us"] == 10 and told["gaps_us"] == 2.5
    assert told["kernels"] == [["a", 1, 7, 0.7], ["b", 0.5, 5, 0.5], ["copy", 0.5, 0.5, 0.05]]


def test_texts_that_part_are_told_with_the_token_and_the_gap(demo):
    """At the token after which the texts differ the best two scores are `gap` apart."""
    target, said = Model.load(demo / "target", torch.device("cpu"), "float32"), []
    pair, prompt = Engine(target, None, tiny.DEVICES), [5, 6, 7]
    want = pair.generate([prompt], mode="ar", max_new_tokens=6, ignore_eos=True).token_ids[0]
    wrong = [*want[:4], want[4] + 1, want[5]]
    told = {mode: [({"token_ids": [ids]}, None)] for mode, ids in (("ar", want), ("sd", wrong))}
    check = gpu_parts.Check(torch.device("cpu"), "cpu:0", "", "", True, "", said.append)
    gpu_pair.tell_texts(check, pair, "it", [prompt], told | {"ssd": told["ar"]}, 0.0)
    assert said[0]["value"] == "0 of 1" and len(said) == 2
    scores = tiny.log_probs(target.transformer, prompt + want[:4])[-1].topk(2).values
    assert "SD parts from AR at token 4" in said[1]["name"]
    assert said[1]["value"] == pytest.approx(float(scores[0] - scores[1]), abs=1e-4)


@pytest.mark.parametrize("part, models", [("decode", 2), ("wide", 4)])
def test_a_model_that_is_dropped_is_freed(here, demo, tmp_path, monkeypatch, part, models):
    """8B and 1B models of one process follow each other in memory that has no room for all."""
    load, alive = Model.load.__func__, []

    def loaded(cls, *args, **more):
        assert not [ref for ref in alive if ref() is not None], "the model before is still there"
        model = load(cls, *args, **more)
        model.transformer._compiled_call_impl = model.transformer._call_impl  # as compile() does
        alive.append(weakref.ref(model.transformer))
        return model

    monkeypatch.setattr(Model, "load", classmethod(loaded))
    gc.disable()  # by chance it could hide what is not collected on purpose
    try:
        assert check(demo, tmp_path / "out.json", "--only", part) == 0
    finally:
        gc.enable()
    assert len(alive) == models


def test_a_compiled_transformer_is_freed_without_the_garbage_collector():
    """What is compiled around its layers holds weights, not the transformer that it belongs to."""
    model = tiny.transformer()
    runtime.Policy(torch.device("cuda", 0), True).compile(model)
    gone = weakref.ref(model)
    gc.disable()
    del model
    gc.enable()
    assert gone() is None


def test_a_part_that_fails_or_hangs_is_told(tmp_path, monkeypatch, capsys):
    """In real processes: what was found before is kept; one that hangs cannot stop the others."""
    found, log = '{"name": "before", "value": 1.0}', tmp_path / "out.log"
    noise = "import os; print('noise', os.environ['TORCH_LOGS'])"
    for body, limit, end in (
        (f"{noise}; raise SystemExit(7)", 60, "failed with exit code 7"),
        ("import time; time.sleep(600)", 1.0, "killed at its limit of 1 s"),
    ):
        (tmp_path / "part.py").write_text(f"print('{found}', flush=True); {body}")
        monkeypatch.setattr(gpu_check, "PROGRAM", tmp_path / "part.py")
        out = gpu_check.run_part("kernels", {"spec": "cpu"}, limit, log)
        assert out["end"].startswith(end) and out["seconds"] < 50
        assert out["records"] == [{"name": "before", "value": 1.0}]
    assert "noise" in capsys.readouterr().err
    assert log.read_text().splitlines() == [found, "noise recompiles", found]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_s_checks_run_in_the_interpreter(tmp_path):
    how = {"spec": "cpu", "target": "", "draft": "", "tiny": True, "folder": ""}
    out = gpu_check.run_part("correct", how, 100, tmp_path / "out.log")
    if any("0-dimensional" in line for line in out.get("last_lines", ())):
        pytest.skip("this Triton's interpreter cannot loop with this numpy")
    assert out["end"] == "done" and [r["pass"] for r in out["records"]] == [True] * 5, out


class FakeGraph:
    """What a CUDA graph promises, on the CPU: fixed inputs, and outputs that die with the next
    replay in their pool.
    """

    def __init__(self, work, device, pool):
        self.work, self.pool, self.inputs = work, pool, None
        self.pool.append(self)

    def __call__(self, *args):
        args = [arg.clone() for arg in args]  # they may be what another graph of the pool left
        for graph in self.pool:
            for out in getattr(graph, "outputs", ()):
                out.fill_(float("nan") if out.is_floating_point() else -77)
        self.inputs = self.inputs or args
        for static, arg in zip(self.inputs, args, strict=True):
            assert static.shape == arg.shape, "static shapes only"
            static.copy_(arg)
        outputs = self.work(*self.inputs)
        self.outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        return outputs


@pytest.mark.parametrize("coupling", ["shared", "maximal"])
def test_nothing_is_read_from_a_graph_after_its_pool_replays(coupling, monkeypatch):
    monkeypatch.setattr(runtime, "Graph", FakeGraph)
    monkeypatch.setattr(runtime.Policy, "compile", lambda self, model: None)
    monkeypatch.setattr(runtime.Policy, "fuse", lambda self, work: work)
    monkeypatch.setattr(runtime.Policy, "new_pool", lambda self: [])
    monkeypatch.setattr(runtime.Policy, "send", lambda self, numbers: torch.tensor(numbers))
    monkeypatch.setattr(runtime.Policy, "fetch", lambda self, numbers: (numbers.clone(), None))
    target = tiny.transformer()
    draft = tiny.transformer(1, base=target, noise=0.02)
    eager, models = tiny.engine(target, draft), [Model.of(x, compile=True) for x in (target, draft)]
    for model in models:
        model.policy.graphs = True
    captured = Engine(*models, tiny.DEVICES, lambda text: None)
    prompts, options = (
        [[1, 2, 3], [4, 5, 6, 7, 8]],
        {"temperature": 1.0, "seed": 3, "k": 3, "fan_out": 6, "cut": False},
    )
    options |= {"fallback": "jit", "coupling": coupling, "max_new_tokens": 16}
    for mode in ("ar", "sd", "ssd"):
        (want, slow), (got, fast) = (
            tiny.play(e, prompts, mode=mode, **options) for e in (eager, captured)
        )
        tiny.settle(slow), tiny.settle(fast)  # the last extend may still run
        assert got.token_ids == want.token_ids
        assert got.stats["hit_rate"] == want.stats["hit_rate"]
        for b, row in enumerate(fast.rows if mode != "ar" else ()):  # what the draft has read
            one, other = (
                run.draft.cache.k_LBGSD[:, b, :, : row.draft_read] for run in (slow, fast)
            )
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    for part in (models[0].runners, models[1].runners):
        assert all(
            isinstance(graph, FakeGraph)
            for runner in part.values()
            for graph in runner.step_of.values()
        )
