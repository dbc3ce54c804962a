"""scripts/check_truth.py, pass_at_1.py and check_graphs.py: they find what is wrong, and contain
what runs wild.
"""

import importlib
import json
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import transformer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import check_truth  # noqa: E402
import pass_at_1  # noqa: E402

TASK = {"prompt": "def double(x):\n", "entry_point": "double"}
TASK["test"] = "def check(f):\n    assert f(3) == 6\n"


def test_a_token_that_is_not_the_best_is_reported_with_its_gap():
    model_3 = transformer(3)
    model_3.set_positions(32)
    prompt, text = [1, 2, 3], []
    for _ in range(6):
        text.append(int(model_3(torch.tensor([prompt + text]))[0, -1].argmax()))

    def model(ids):
        return SimpleNamespace(logits=model_3(ids))

    assert check_truth.disagreements(model, prompt, text) == []
    wrong = [*text[:4], (text[4] + 1) % model_3.config.vocab_size, text[5]]
    found = check_truth.disagreements(model, prompt, wrong)
    assert found[0]["position"] == 4 and found[0]["gap"] > 0


@pytest.mark.parametrize("name", ["bits", "pass_at_1", "check_truth", "check_same_text", "bench"])
def test_where_results_go_is_checked_before_the_work(name, tmp_path, capsys):
    foreign = tmp_path / "notes.txt"
    foreign.write_text("not JSON")
    prompts = ["prompts.jsonl"] if name == "check_same_text" else []
    for out, why in ((foreign, "is kept"), (tmp_path, "a folder"), (foreign / "x", "missing")):
        assert importlib.import_module(name).main([*prompts, "--out", str(out)]) == 2
        assert why in capsys.readouterr().err
    assert foreign.read_text() == "not JSON"


@pytest.mark.parametrize("body", ["    return 2 * x\n", "    return x + x"])
def test_a_right_function_passes(body):
    assert pass_at_1.passes(TASK, body)


@pytest.mark.parametrize(
    "body",
    [
        "    return x",
        "    return 2 * x)",
        "    while True: pass",
        "    return len('a' * 10**11)",
        "    open('f', 'wb').write(b'0' * 10**7)\n    return 2 * x",
    ],
    ids=["wrong", "no Python", "endless", "too large", "fills the disk"],
)
def test_what_is_wrong_or_runs_wild_does_not_pass(body, monkeypatch):
    monkeypatch.setitem(pass_at_1.LIMITS, resource.RLIMIT_CPU, 1)
    assert not pass_at_1.passes(TASK, body)


def test_every_mode_writes_the_functions(demo, monkeypatch, tmp_path):
    monkeypatch.setattr(pass_at_1, "tasks", lambda count: [TASK] * count)
    flags = ["--target", demo / "target", "--draft", demo / "draft", "--out", tmp_path / "x.json"]
    flags += ["--count", 3, "--new-tokens", 4, "--batch", 2]
    assert pass_at_1.main(list(map(str, flags))) == 0
    found = json.loads((tmp_path / "x.json").read_text())["target"]
    assert found.pop("environment")["cores"] >= 1
    none = {"passed": 0, "texts_that_differ_from_ar": 0}
    assert found == {"tasks": 3} | dict.fromkeys(pass_at_1.MODES, none)


# ---- what a GPU would launch


@pytest.fixture
def graphs(monkeypatch):
    """check_graphs.py, with a null GPU that counts as `counted` says."""
    counted = dict.fromkeys(
        "launches copies syncs mallocs graph_launches bad hostallocs".split(), 0
    )
    stub = SimpleNamespace(stats=lambda: dict(counted))
    monkeypatch.setitem(sys.modules, "nullgpu", stub)
    for name in ("NULLCUDA_LOG", "NULL_US_HI", "NULL_US_LO"):
        monkeypatch.setenv(name, "")
    module = importlib.import_module("check_graphs")
    monkeypatch.setattr(module, "nullgpu", stub)
    monkeypatch.setattr(module, "NEW", 40)
    return module, counted


def test_graphs_are_counted_in_one_table(graphs, capsys):
    module, _ = graphs
    target = transformer()
    pair = tiny.engine(target, transformer(1, base=target, noise=0.02))
    rounds = {run: module.play(pair, *run) for run in (module.RUNS[0], module.RUNS[2])}
    step = ("target", "verify", 8)
    kernels = {(layers, run): {} for layers in (1, None) for run in rounds}
    kernels[1, module.RUNS[2]][step], kernels[None, module.RUNS[2]][step] = (51, 3), (361, 3)
    module.print_table(kernels, rounds)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-6:] == ["ar", "0", "shared", "ssd", "0", "shared"]
    assert lines[1].split() == ["target:", "verify", "of", "8", "361", "(10)"]
    rows = {line[:32].strip(): list(map(float, line[32:].split())) for line in lines[2:]}
    assert rows["forbidden calls"] == rows["allocations"] == [0, 0]
    assert all(us > 0 for us in rows["us of a round"] + rows["us between verifications"])


@pytest.mark.parametrize("what", ["bad", "mallocs", "hostallocs", None])
def test_forbidden_calls_and_allocations_in_rounds_are_wrong(graphs, what, monkeypatch):
    """A run's first rounds may allocate: what is compiled and captured needs memory."""
    module, counted = graphs
    target = transformer()
    models = {"target": target, "draft": transformer(1, base=target, noise=0.02)}
    monkeypatch.setattr(module, "random_model", lambda role, layers: module.Model.of(models[role]))
    monkeypatch.setattr(module, "Devices", lambda spec: tiny.DEVICES)
    monkeypatch.setattr(module, "RUNS", module.RUNS[:1])
    monkeypatch.setattr(module.runtime, "Graph", module.runtime.Graph)
    monkeypatch.setattr(module.Policy, "read", module.Policy.read)
    emit = tiny.Decoding.emit

    def emitted(decoding, *args):
        counted[what] = counted.get(what, 0) + 1
        return emit(decoding, *args)

    monkeypatch.setattr(tiny.Decoding, "emit", emitted)
    assert module.main([]) == (what is not None)


def test_parts_of_gpu_check_are_played_by_check_graphs_itself(graphs, monkeypatch):
    module, _ = graphs
    asked = []
    monkeypatch.setattr(module.gpu_check, "PROGRAM", None)
    monkeypatch.setattr(module.gpu_check, "main", lambda words: asked.append(words) or 0)
    assert module.main(["--gpu-check", "--only", "decode"]) == 0
    assert asked == [["--only", "decode"]]
    assert module.gpu_check.PROGRAM.name == "check_graphs.py"
