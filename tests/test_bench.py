"""scripts/bench.py with tiny models: every comparison runs, and its file says what was measured."""

import itertools
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import bench  # noqa: E402
import check_same_text  # noqa: E402
import render  # noqa: E402
import runner  # noqa: E402
from runner import Way  # noqa: E402

CORES = runner.available_cores()
QUICK = bench.quick
FIRST, LAST = f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"
two_cores = pytest.mark.skipif(len(CORES) < 2, reason="two cores are needed")


class Here:
    """A worker without its process: loading torch again and again takes long."""

    def __init__(self, cores, build, *given):
        self.peer, self.build = None, lambda: build(*given)

    def ask(self, name, **how):
        self.peer = self.peer or self.build()
        return getattr(self.peer, name)(**how)

    def close(self):
        pass


def tiny(c: bench.Comparison) -> bench.Comparison:
    """As little as a comparison can be: two repeats, few tokens, sweeps of two."""
    ways = c.ways[:: len(bench.BUDGETS)] if c.name == "accept" else c.ways
    small = QUICK(replace(c, ways=ways))
    return replace(small, repeats=2, batch=min(c.batch, 2), tokens=8, sweep_tokens=4)


@pytest.fixture
def run(demo, monkeypatch, tmp_path, capsys):
    """run(comparison, *flags) gives its entry in the file of results, and the headline."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(runner, "Worker", Here)
    monkeypatch.setattr(bench, "quick", tiny)
    # Two threads on two busy cores would take ten times as long.
    places = {"one": (FIRST, FIRST), "both": (FIRST, FIRST), "apart": (FIRST, LAST)}
    monkeypatch.setattr(runner.Runner, "places", lambda self: places)

    def measure(name, *flags):
        out = tmp_path / "out.json"
        pair = ["--target", str(demo / "target"), "--draft", str(demo / "draft")]
        few = ["--quick", "--count", "2", "--only", name]
        code = bench.main([*pair, *few, "--out", str(out), *flags])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        results = json.loads(out.read_text())
        assert str(demo) not in out.read_text(), "results name no folders"
        entry, headline = results[name], json.loads(printed.out.splitlines()[-1])
        assert entry["environment"]["dtype"] == "chosen by the engine"
        assert entry["pair"] == ["target", "draft"]
        assert "memory allows" in printed.out.splitlines()[0]
        assert headline["texts_differ"] == 0
        for group in entry["groups"].values():
            for way in group["ways"].values():
                assert len(way["runs"]) == 2
                middle = median(run["tokens_per_s"] for run in way["runs"])
                assert way["tokens_per_s"]["median"] == pytest.approx(middle, rel=1e-3)
            for key, found in group["ratios"].items():
                of, to = (group["ways"][side]["runs"] for side in key.split(" over "))
                rates = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(of, to)]
                assert found["pairs"] == pytest.approx(rates, rel=1e-3)
        if name in render.VIEWS:
            assert render.view(results, name).count("\n") >= 2
        return entry, headline

    yield measure
    torch.set_num_threads(threads)


# ---- the table


@two_cores
@pytest.mark.parametrize(("anew", "processes"), [(1, 2), (2, 1)])
def test_processes_start_anew_after_so_many_repeats(run, monkeypatch, anew, processes):
    """Of two repeats; and each new process is warmed before it counts."""
    lengths, ask = [], Here.ask

    def noted(self, name, **how):
        if name == "run":
            lengths.append((self, how["new"]))
        return ask(self, name, **how)

    monkeypatch.setattr(runner, "ANEW", anew)
    monkeypatch.setattr(Here, "ask", noted)
    run("overlap")
    used = dict.fromkeys(worker for worker, _ in lengths)
    assert len(used) == processes
    for worker in used:
        assert next(new for key, new in lengths if key == worker) == runner.WARM


@two_cores
def test_modes(run):
    pytest.importorskip("transformers")
    entry, headline = run("modes")
    (group,) = entry["groups"].values()
    ways = {"AR", "SD", "SSD", "SSD auto", "transformers", "transformers assisted"}
    assert ways <= set(group["ways"])
    assert set(entry["skipped"]) == {"llama.cpp", "llama.cpp both cores", "llama.cpp draft"}
    ssd = group["ways"]["SSD"]
    assert ssd["settings"] in [{key: row[key] for key in ("k", "fan_out")} for row in ssd["sweep"]]
    assert ssd["per_core"] == pytest.approx(ssd["tokens_per_s"]["median"] / 2, rel=1e-3)
    assert group["same_text"]["compared"] >= 2 * 8, "transformers, too, writes the same"
    assert "modes T=0: SSD over SD" in headline


@two_cores
def test_accept(run):
    entry, _ = run("accept")
    assert list(entry["groups"]) == [f"T=1 {kind}" for kind in bench.KINDS]
    for group in entry["groups"].values():
        assert list(group["ways"]) == [f"{c} M=4" for c in bench.COUPLINGS]
        assert all(0 <= way["hit_rate"] <= 1 for way in group["ways"].values())


@two_cores
def test_overlap_is_judged_by_its_ceiling(run, tmp_path):
    (tmp_path / "out.json").write_text('{"modes": {"kept": 1}}')
    entry, headline = run("overlap", "--quantize", "int8", "--draft-quantize", "int4")
    assert (entry["environment"]["quantize"], entry["environment"]["draft_quantize"]) == (
        "int8",
        "int4",
    )
    assert json.loads((tmp_path / "out.json").read_text())["modes"] == {"kept": 1}
    group = entry["groups"]["T=0"]
    sd, ssd = group["ways"]["SD"], group["ways"]["SSD"]
    tokens = ssd["tokens_per_round"] / sd["tokens_per_round"]
    most = (sd["verify_ms"] + sd["draft_ms"]) / ssd["verify_ms"] * tokens
    assert group["ceiling"] == pytest.approx(most, rel=1e-3)
    share = group["ratios"]["SSD over SD"]["median"] / most
    assert headline["overlap T=0: share_of_ceiling"] == pytest.approx(share, rel=1e-3)


@two_cores
def test_auto_is_compared_with_the_best_of_a_sweep(run):
    entry, _ = run("auto")
    assert len(entry["groups"]["T=0"]["ways"]["best"]["sweep"]) == 2


@two_cores
def test_beside_another_checkout(run):
    """Here it is this one again."""
    entry, _ = run("beside", "--beside", str(ROOT))
    wanted = {f"{way.name} over {way.name} before" for way in bench.BESIDE}
    assert set(entry["groups"]["T=0"]["ratios"]) == wanted


def test_steadiness_is_the_tenth_percentile_over_the_median():
    runs = [{"tokens_per_s": float(rate)} for rate in range(100, 121)]
    speed = runner.interval([run["tokens_per_s"] for run in runs])
    group = {"ways": {"command": {"runs": runs, "tokens_per_s": speed}}}
    assert bench.steadiness(group) == {"steadiness": {"command": pytest.approx(102 / 110)}}


def test_the_table_is_whole():
    names = [c.name for c in bench.TABLE]
    halves = ["halves2", "halves4", "halves8", "halves16"]
    assert names == ["modes", "accept", "overlap", "auto", *halves, "steady", "ablate", "beside"]
    for c in bench.TABLE:
        ways = [way.name for way in c.ways]
        assert len(set(ways)) == len(ways)
        assert {name for pair in c.ratios for name in pair} <= set(ways)
        small = bench.quick(c)
        assert small.repeats * small.tokens < c.repeats * c.tokens and small.ways


def test_groups_that_were_not_measured_are_kept(tmp_path):
    """Each with the environment that it was measured in, however often others are measured."""
    out = str(tmp_path / "out.json")
    for commit, titles, groups in (("a", "012", False), ("b", "1", True), ("c", "2", True)):
        made = {f"T={title}": {"ways": commit} for title in titles}
        result = {"environment": {"commit": commit}, "groups": made}
        runner.keep(out, "modes", result, groups)
    runner.keep(out, "auto", {"groups": {}}, groups=True)
    found = json.loads(Path(out).read_text())
    assert found["modes"]["environment"] == {"commit": "c"} and "auto" in found
    assert found["modes"]["groups"] == {
        "T=0": {"ways": "a", "environment": {"commit": "a"}},
        "T=1": {"ways": "b", "environment": {"commit": "b"}},
        "T=2": {"ways": "c"},
    }
    runner.keep(out, "modes", {"groups": {"T=1": 4}})
    assert json.loads(Path(out).read_text())["modes"] == {"groups": {"T=1": 4}}


def test_some_of_the_temperatures():
    flags = ["--only", "accept,steady", "--temperature", "1", "0"]
    accept, steady = bench.chosen(bench.parser().parse_args(flags))
    assert accept.temperatures == (0.0, 1.0) and steady.temperatures == (0.0,)


def test_prompts_of_three_kinds(tmp_path):
    tasks = ("qa", "mt_bench", "rag")
    questions = [{"task": task, "turns": [f"Question {n}?"]} for n, task in enumerate(tasks)]
    article = {"task": "summarization", "turns": ["Summarize: " + "word " * 200]}
    lines = lambda rows: "\n".join(map(json.dumps, rows))  # noqa: E731
    (tmp_path / "spec_bench.jsonl").write_text(lines([*questions, article]))
    code = lines([{"prompt": f"def f{n}():\n"} for n in range(9)])
    (tmp_path / "humaneval_prompts.jsonl").write_text(code)
    found = bench.prompts(str(tmp_path), 3)
    assert found["code"] == ["def f0():\n", "def f3():\n", "def f6():\n"], "from all over the file"
    assert found["chat"] == ["Question 0?", "Question 1?"]
    assert found["text"] == [" ".join(["word"] * bench.WORDS)]
    built_in = {kind: len(texts) for kind, texts in bench.prompts(None, 2).items()}
    assert built_in == dict.fromkeys(bench.KINDS, 2)


@pytest.mark.parametrize("flags, words", [
    (("--only", "modes,fast"), ("'fast'", "modes, accept, overlap")),
    (("--only", "beside"), ("'beside'",)),
    (("--out", "/nowhere/x.json"), ("/nowhere/x.json", "create it")),
    (("--prompts", "/nowhere"), ("/nowhere", "spec_bench.jsonl")),
    (("--target", "/nowhere"), ("/nowhere",)),
    (("--only", "modes", "--temperature", ".7"), ("none of modes's", "some of 0")),
])  # fmt: skip
def test_mistakes_are_one_sentence(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(runner, "Worker", Here)
    assert bench.main(["--quick", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bench.py: ") and all(word in said for word in words), said


# ---- the runner


def test_the_interval_holds_the_median():
    found = runner.interval([3.0, 1.0, 2.0, 5.0, 4.0])
    assert found == {"median": 3.0, "low": 1.0, "high": 5.0, "n": 5}
    found = runner.interval([float(x) for x in range(1, 21)])
    assert (found["median"], found["low"], found["high"]) == (10.5, 6.0, 15.0), (
        "the sign test's table"
    )


def test_texts_that_must_be_the_same():
    ways = [Way("AR", "ar"), Way("SD", "sd"),
            Way("maximal", "ssd", settings={"coupling": "maximal"}),
            Way("warm", "sd", settings={"temperature": 1.0})]  # fmt: skip
    texts = {"AR": [1, 2, 3], "SD": [1, 2, 3], "maximal": [1, 9, 3], "warm": [7]}
    runs = {name: [{"ids": [ids]}] for name, ids in texts.items()}
    at_0 = runner.same_text(ways, runs, 0.0)
    assert (at_0["compared"], at_0["differ"]) == (2, 1)
    assert at_0["where"] == [{"way": "maximal", "repeat": 0, "token": 1}]
    at_1 = runner.same_text(ways, runs, 1.0)
    assert at_1["compared"] == 2 and at_1["where"][0]["way"] == "warm", "maximal may differ there"


def test_the_best_of_a_sweep_is_the_first_that_is_as_good_as_the_fastest(monkeypatch):
    speeds = {1: 90.0, 2: 99.0, 3: 100.0}
    one = object.__new__(runner.Runner)
    monkeypatch.setattr(runner.Runner, "batch", lambda *_: [])
    run = lambda self, way, how, *_: {"tokens_per_s": speeds[how["k"]]}  # noqa: E731
    monkeypatch.setattr(runner.Runner, "run", run)
    best, sweep = one.fastest(Way("SD", "sd", sweep=tuple({"k": k} for k in speeds)), {}, 2, 8)
    assert best == {"k": 2}
    assert {row["k"]: row["tokens_per_s"] for row in sweep} == pytest.approx(speeds)


def test_a_process_answers_and_reports_mistakes(demo):
    pair, numbers = (str(demo / "target"), None), {"dtype": "float32"}
    worker = runner.Worker(CORES[:1], runner.Ours, str(ROOT), *pair, numbers)
    try:
        (ids,) = worker.ask("encode", devices=(FIRST, FIRST), texts=["def f():"], chat=False)
        how = {"devices": (FIRST, FIRST), "prompts": [{"ids": ids}], "new": 5, "mode": "ar"}
        run = worker.ask("run", ignore_eos=True, **how)
        assert len(run["ids"][0]) == 5 and run["tokens_per_s"] > 0
        with pytest.raises(ValueError, match="colour"):
            worker.ask("run", colour=1, **how)
        with pytest.raises(RuntimeError, match="Ours"):
            worker.ask("nothing")
    finally:
        worker.close()
    with pytest.raises(RuntimeError, match="ended by itself"):
        worker.ask("encode")
    worker.close()  # as where Ctrl-C has ended both


@pytest.mark.skipif(os.name != "posix", reason="the programs are shell scripts")
def test_llama_cpp_is_called_and_read(tmp_path):
    told = "decoded 64 tokens in 2.0 seconds, speed: 31.25 t/s"
    programs = {
        "llama-bench": 'echo "$@" > called; echo \'[{"avg_ts": 12.5}]\'',
        "llama-speculative-simple": f'echo "$@" > called; echo "{told}" >&2',
        "broken": "exit 3",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncd {tmp_path}\n{body}\n")
        (tmp_path / name).chmod(0o755)
    peer, how = runner.LlamaCpp(str(tmp_path), "t.gguf", "d.gguf"), {"devices": None, "new": 64}
    assert peer.run(prompts=[], mode="llama.cpp", **how)["tokens_per_s"] == 12.5
    assert "-m t.gguf" in (tmp_path / "called").read_text()
    fast = peer.run(prompts=[{"text": "Why?"}], mode="llama.cpp draft", k=6, **how)
    assert fast["tokens_per_s"] == 31.25
    called = (tmp_path / "called").read_text()
    assert re.search(r"-md d.gguf -p Why\? -n 64 .*--spec-draft-n-max 6 --temp 0", called)
    assert "--spec-type draft-simple" in called, "else it is refused: nothing would speculate"
    with pytest.raises(RuntimeError, match="exit code 3"):
        peer.call("broken")


def test_the_command_is_run_as_a_user_runs_it(demo):
    flags = [f"--target={demo / 'target'}", f"--draft={demo / 'draft'}"]
    flags += [f"--device={FIRST}", f"--draft-device={LAST}"]
    run = runner.Command([*flags, "--prompt=def f():"]).run(None, None, 6, "command")
    assert run["tokens_per_s"] > 0 and run["rounds"] >= 1
    with pytest.raises(ValueError, match="exit code 2"):
        runner.Command(["--target=/nowhere"]).run(None, None, 6, "command")


# ---- check_same_text.py


def test_the_grid_of_texts_covers_what_it_says():
    """Every temperature and seed with every K in both modes; all of the rest, cut and not."""
    cells = list(check_same_text.cells(quick=False))
    ssd = [s for s in cells if s["mode"] == "ssd"]
    for mode in ("sd", "ssd"):
        of = [(s["temperature"], s["seed"], s["k"]) for s in cells if s["mode"] == mode]
        assert sorted(of) == sorted(
            (*heat, k) for heat in check_same_text.HEAT for k in range(1, 9)
        )
        assert {s["batch"] for s in cells if s["mode"] == mode} == {1, 8}
    cut_or_not = {(k, cut) for k in range(1, 9) for cut in (True, False)}
    assert {(s["k"], s["cut"]) for s in ssd} == cut_or_not
    assert all(cell["mode"] == "ar" for cell in first_of_each(cells))
    choices = {"fan_out": check_same_text.BUDGETS, "fallback": check_same_text.FALLBACKS}
    for key, values in choices.items():
        wanted = {(value, cut) for value in values for cut in (True, False)}
        assert {(s[key], s["cut"]) for s in ssd} == wanted


def first_of_each(cells: list[dict]) -> list[dict]:
    """The first cell of each temperature and seed, which prints what the others must print."""
    return list({(c["temperature"], c["seed"]): c for c in reversed(cells)}.values())


def test_the_grid_of_batches_covers_what_it_says():
    first = first_of_each(list(check_same_text.batches()))
    assert [(cell["mode"], cell["batch"]) for cell in first] == [("ar", 1)] * 2
    found = {
        (s["mode"], s["batch"], s.get("batch_halves"), s["temperature"])
        for s in check_same_text.batches()
    }
    for batch, temperature in itertools.product((1, 4, 16), (0.0, 1.0)):
        assert ("ar", batch, None, temperature) in found
        for mode, halves in itertools.product(("sd", "ssd"), ("off", "on")):
            assert batch == 1 or (mode, batch, halves, temperature) in found
