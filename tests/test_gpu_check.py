"""scripts/gpu_check.py at toy size on the CPU: every part runs before it meets its first GPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

import engine
import runtime
import steps
from engine import Engine, Model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # noqa: E402
import gpu_parts  # noqa: E402


@pytest.fixture
def here(monkeypatch):
    """Parts run in this process: no Python to start, no torch to load. What they set in modules is
    put back.
    """
    for module, name in ((engine, "SHORTEST_TRUNK"), (steps, "PREFILL_CHUNKS")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(runtime, "read_bandwidth", lambda lane: 1e10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run_part(part, how, limit_s, sanitizer):
        assert sanitizer is None and how["tiny"] and limit_s <= 120, "toy size, within two minutes"
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
    assert printed.splitlines()[1].split(":")[0].strip() == "copy bandwidth"
    for part in ("decode", "ssd", "linear"):
        assert names[part][0] == "copy bandwidth"
    everything = sum(names.values(), [])
    for wanted in (
        "target: plain decoding: of copy bandwidth", "draft: single-row step: of copy bandwidth",
        "verification of 4 tokens / plain decode step", "chain step M=4 / single-row step",
        "SDPA time / tree attention time", "noise equal to the CPU's, bit for bit",
        "draft the checkpoint as it is, T=1: SSD / SD", "draft no stream priority, T=0: SSD / AR",
        "draft CPU, the checkpoint as it is, T=1: SSD, between two verifications, of a round",
    ):  # fmt: skip
        assert wanted in everything, wanted
    records = [r for found in results["parts"].values() for r in found["records"]]
    limits = {r["limit"] for r in records if "limit" in r}
    assert limits == {0.60, 3.0, 0.88, 1.15, 1.25, 0.02}, "the limits of the issue"
    assert all(r["pass"] is None for r in records if "limit" in r), (
        "toy sizes are not judged by speed"
    )
    loop = [r for r in results["parts"]["loop"]["records"] if "pass" in r]
    assert len(loop) == 6 and all(r["pass"] is True for r in loop), loop
    for found in results["parts"].values():
        assert {"device", "torch", "commit", "date", "python"} <= set(found["environment"])
    assert str(demo) not in out.read_text(), "results name no folders"
    gpu_check.main(["--show", str(out)])
    assert capsys.readouterr().out.strip() == printed.rsplit("written to", 1)[0].strip(), (
        "the table is the file's"
    )


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
        (["--only", "nothing"], "--only has 'nothing', wanted some of kernels"),
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


def test_limits_are_the_issue_s():
    assert sum(gpu_check.PARTS.values()) < 8 * 60 and max(gpu_check.PARTS.values()) <= 120
    assert set(gpu_parts.PARTS) == {*gpu_check.PARTS, *gpu_check.EXTRA}


def test_a_part_that_fails_or_hangs_is_told(tmp_path, monkeypatch, capsys):
    """In real processes: what was found before is kept; one that hangs cannot stop the others."""
    found = '{"name": "before", "value": 1.0}'
    for body, limit, end in (
        (
            f"print('{found}', flush=True); print('noise'); raise SystemExit(7)",
            60,
            "failed with exit code 7",
        ),
        (
            f"print('{found}', flush=True); import time; time.sleep(600)",
            1.0,
            "killed at its limit of 1 s",
        ),
    ):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        (tmp_path / "scripts" / "gpu_parts.py").write_text(body)
        monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
        out = gpu_check.run_part("kernels", {"device": "cpu"}, limit)
        assert out["end"].startswith(end) and out["seconds"] < 50
        assert out["records"] == [{"name": "before", "value": 1.0}]
    assert "noise" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_s_checks_run_in_the_interpreter(demo):
    how = {
        "device": "cpu",
        "target": str(demo / "target"),
        "draft": str(demo / "draft"),
        "tiny": True,
    }
    out = gpu_check.run_part("correct", how, 100)
    if any("0-dimensional" in line for line in out.get("last_lines", ())):
        pytest.skip("this Triton's interpreter cannot loop with this numpy")
    assert out["end"] == "done" and [r["pass"] for r in out["records"]] == [True] * 3, out


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
        want, got = (e.generate(prompts, mode=mode, **options).stats for e in (eager, captured))
        assert got["token_ids"] == want["token_ids"] and got["hit_rate"] == want["hit_rate"]
    for part in (models[0].runners, models[1].runners):
        assert all(
            isinstance(graph, FakeGraph)
            for runner in part.values()
            for graph in runner.step_of.values()
        )
