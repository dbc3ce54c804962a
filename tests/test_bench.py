"""scripts/bench.py at toy size: every part runs, its file has what it should, ratios are what they are said to be."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import tiny
import torch

import runtime
import tuner
from checkpoint.weights import save_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import ablate  # noqa: E402
import altered  # noqa: E402
import bench  # noqa: E402
import check_same_text  # noqa: E402
import measure  # noqa: E402
import modes  # noqa: E402
import peers  # noqa: E402

TOY = bench.Effort(
    sizes=("hidden=48,layers=3",), batches=(1, 2), repeats=3, plain_tokens=12, pairs=3, new_tokens=12, sweep_prompts=1,
    overlap_prompts=1, sweep_tokens=8, ks=(1, 2), fan_outs=(4,), assisted_ks=(2,), assisted_fan_outs=(4,),
    assisted_prompts=1, assisted_repeats=2, thresholds=(0.0,), lookup_ks=(2,), temperatures=(0.0, 1.0),
    budgets=(4, 8), predict_ks=(1, 2), predict_batch=2, predict_batches=2, mode_sizes=(), mode_batches=(1, 2),
    mode_ks=(2,), mode_fan_outs=(2, 4), tune_ks=(1, 2), tune_fan_outs=(2, 4), tune_pairs=3, tune_tokens=12,
    long_prompts=2, long_tokens=210, saguaro_cs=(0.5,), slow_ks=(1, 2), slow_fan_outs=(4,),
)  # fmt: skip


class Here(peers.Server):
    """A worker without its process: the tests need not start Python and load torch again and again."""

    def __init__(self, cores):
        super().__init__()

    def ask(self, do, **request):
        return peers.checked(json.loads(json.dumps(self.answer({"do": do, **request}))))

    def close(self):
        pass


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny checkpoint and a draft of it, on disk."""
    folder = tmp_path_factory.mktemp("pair")
    target = tiny.transformer(seed=1, dtype=torch.float32)
    raw = tiny.SHAPE | {"vocab_size": 50, "max_position_embeddings": 256, "tie_word_embeddings": False}
    for name, model in (("target", target), ("draft", tiny.transformer(base=target, noise=0.02, dtype=torch.float32))):
        save_model(model, raw, folder / name)
    return ["--target", str(folder / "target"), "--draft", str(folder / "draft")]


@pytest.fixture
def run(pair, monkeypatch, tmp_path, capsys):
    """run(part) -> the written results, what was printed, the headline."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(peers, "Worker", Here)
    for module in (peers, runtime):  # the probe takes longer than a toy model's whole run
        monkeypatch.setattr(module, "read_bandwidth", lambda lane: 1e10)
    monkeypatch.setattr(bench, "DRAFT_SHAPES", ("layers=3", "hidden=48"))

    def run_part(part, effort=TOY):
        out = tmp_path / "out.json"
        assert bench.main([*pair, "--only", part, "--out", str(out)], effort) == 0
        printed = capsys.readouterr().out
        *tables, last = printed.splitlines()
        results = json.loads(out.read_text())
        assert bench.render(results) == "\n".join(tables), "the tables come from the file alone"
        assert results["environment"]["dtype"] == "float32" and results["effort"]["repeats"] == effort.repeats
        assert str(tmp_path) not in json.dumps(results), "results name no paths"
        for facts in results["parts"][part]["models"].values():
            assert all(speed > 0 for speed in facts["read_bytes_per_s"].values())
        return results["parts"][part], results, json.loads(last)

    yield run_part
    torch.set_num_threads(threads)


def check_ratios(part, same=("model", "temperature", "batch", "table")):
    """Each is the median of its repeats' own ratios, tokens/s over tokens/s, both from the cells of the file."""
    speeds = {(c["name"], *(c.get(key) for key in same)): c.get("tokens_per_s", {}).get("runs") for c in part["cells"]}
    assert part["ratios"]
    for r in part["ratios"]:
        of, to = (speeds[(r[side], *(r.get(key) for key in same))] for side in ("of", "to"))
        assert r["pairs"] == [a / b for a, b in zip(of, to, strict=True)]
        assert r["median"] == median(r["pairs"]) and r["low"] <= r["median"] <= r["high"]


def test_plain(run):
    pytest.importorskip("transformers")
    part, results, headline = run("plain")
    assert list(part["models"]) == ["target", "hidden=48,layers=3"]
    assert len(part["cells"]) == 2 * 2 * 2 * len(measure_devices()), "models, batches, peers, core lists"
    assert all(len(cell["tokens_per_s"]["runs"]) == TOY.repeats for cell in part["cells"])
    assert {cell["peer"] for cell in part["cells"]} == {"ar", "transformers"}
    check_ratios(part)
    for facts in part["models"].values():
        for cell in part["cells"]:
            if cell["model"] in part["models"] and part["models"][cell["model"]] is facts:
                most = facts["read_bytes_per_s"][cell["device"]] / facts["step_bytes"] * cell["batch"]
                assert cell["of_bandwidth"] == pytest.approx(cell["tokens_per_s"]["median"] / most)
    assert headline["texts_differ"] == 0, "the same checkpoint, greedy: transformers writes the same"


def measure_devices():
    return (0, 1) if len(measure.available_cores()) > 1 else (0,)


@pytest.mark.skipif(len(measure.available_cores()) < 2, reason="two cores are needed")
def test_overlap(run):
    part, _, headline = run("overlap")
    grown = "hidden=48,layers=3 / grown draft"
    assert list(part["models"]) == ["target", grown]
    names = ["AR", "SD", "SD at SSD's K", "SSD", "AR both cores", "SD both cores"]
    assert [cell["name"] for cell in part["cells"]] == names * 2
    assert {row["draft"] for row in part["draft_shapes"]["tried"]} == set(bench.DRAFT_SHAPES)
    check_ratios(part)
    cells = {cell["name"]: cell for cell in part["cells"] if cell["model"] == "target"}
    ssd, sd = cells["SSD"], cells["SD at SSD's K"]
    assert ssd["k"] == sd["k"] and ssd["draft_device"] != ssd["device"] == sd["draft_device"]
    for key in ("hit_rate", "acceptance_rate", "tokens_per_round", "verify_ms", "exposed_ms", "distinct_4grams"):
        assert ssd[key] is not None, key
    facts = part["models"]["target"]
    tokens = ssd["tokens_per_round"] / sd["tokens_per_round"]
    ceiling = (1 + sd["draft_ms"] / ssd["verify_ms"]) * tokens
    assert facts["ssd_over_sd_ceiling"] == pytest.approx(ceiling)
    assert facts["ceiling_if_lanes_were_free"] == pytest.approx((1 + sd["draft_ms"] / sd["verify_ms"]) * tokens)
    over = next(r["median"] for r in part["ratios"] if r["of"] == "SSD" and r["to"] == "SD at SSD's K")
    assert facts["share_of_ceiling"] == pytest.approx(over / ceiling)
    assert "overlap target: SSD / SD" in headline and headline["texts_differ"] == 0
    sweep = [row for row in part["sweeps"] if row["model"] == "target" and row["peer"] == "ssd"]
    enough = measure.SAME * max(row["tokens_per_s"] for row in sweep)
    first = next(row for row in sweep if row["tokens_per_s"] >= enough)
    assert (first["k"], first["fan_out"]) == (ssd["k"], ssd["fan_out"]), "measured at the first as good as the best"


def test_predict(run):
    part, _, headline = run("predict")
    places = [(cell["temperature"], cell["coupling"], cell["k"], cell["fan_out"]) for cell in part["cells"]]
    heats = [(0.0, "any"), *((1.0, coupling) for coupling in ("shared", "maximal", "independent"))]
    wanted = [(*heat, k, M) for heat in heats for k in TOY.predict_ks for M in TOY.budgets]
    assert places == wanted
    for cell in part["cells"]:
        assert 0 <= cell["acceptance_rate"] <= 1 and 0 <= cell["hit_rate"] <= 1 and cell["tokens_per_round"] >= 1
        assert cell["hit_rates"]["n"] == TOY.predict_batches and cell["lookups"] > 0
        assert "tokens_per_s" not in cell, "timing is beside the point"
    assert headline["hits T=1.0 shared K=2 M=8"] == round(part["cells"][7]["hit_rate"], 3)


def test_predict_does_not_hang_on_timing(run):
    figures = ("acceptance_rate", "hit_rate", "tokens_per_round", "distinct_4grams")
    effort = replace(TOY, temperatures=(1.0,), budgets=(4,), predict_batches=1)
    once, again = ([[cell[key] for key in figures] for cell in run("predict", effort)[0]["cells"]] for _ in range(2))
    assert once == again


def test_assisted(run):
    pytest.importorskip("transformers")
    part, results, headline = run("assisted")
    assert {cell["peer"] for cell in part["cells"]} == set(peers.PEERS) and not results["skipped"]
    check_ratios(part)
    assert {len(cell["tokens_per_s"]["runs"]) for cell in part["cells"]} == {TOY.assisted_repeats}
    for mine in ("ssd", "sd"):
        assert f"assisted target: {mine} / transformers assisted" in headline
        assert "auto" in {row["k"] for row in part["sweeps"] if row["peer"] == mine}, "what a user gets takes part"
    assert headline["texts_differ"] == 0


def names_of_rivals(several: list[str], temperature: float, batch: int) -> set[str]:
    joined = [" shared", " maximal", " independent"] if temperature else [""]
    names = {f"{mode}{s}" for mode in ("AR", "transformers", *(f"SD{c}" for c in joined)) for s in several}
    names |= {f"SSD{c}" for c in joined} | {"SD auto", "SSD auto"}
    return names | ({f"transformers assisted{s}" for s in several} if batch == 1 else set())


def test_who_takes_part_in_modes():
    bench = SimpleNamespace(effort=TOY, one="cpu:0", other="cpu:1", devices=["cpu:0", "cpu:0,1"], theirs=True)
    for temperature, batch in ((0.0, 1), (1.0, 1), (1.0, 2)):
        plans = list(modes.rivals(bench, {"target": "t", "draft": "d"}, temperature, batch))
        wanted = names_of_rivals(["", " both cores"], temperature, batch)
        assert {cell.name for cells in plans for cell in cells} == wanted
        assert plans[0][0].name == "AR" and all(len({cell.name for cell in cells}) == 1 for cells in plans)


def test_modes(run, monkeypatch):
    """On one core: two threads on two busy ones would take ten times as long."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(measure, "available_cores", lambda: [runtime.available_cores()[0]])
    part, _, headline = run("modes", replace(TOY, repeats=2))
    check_ratios(part)
    cells = {(c["temperature"], c["batch"], c["name"]): c for c in part["cells"]}
    for place in ((T, batch) for T in (0.0, 1.0) for batch in TOY.mode_batches):
        assert {name for *at, name in cells if tuple(at) == place} == names_of_rivals([""], *place)
    for cell in part["cells"]:
        cores = {core for d in ("device", "draft_device") if d in cell for core in peers.cores_of(cell[d])}
        assert cell["tokens_per_s_per_core"] == pytest.approx(cell["tokens_per_s"]["median"] / len(cores))
        assert 0 < cell["piece_p50_ms"] <= cell["piece_p90_ms"] <= cell["piece_p99_ms"] and cell["first_token_ms"] > 0
        assert 0 <= cell["distinct_4grams"] <= 1
    assert 1 <= cells[1.0, 1, "SSD auto"]["k_used"] <= 8 and cells[1.0, 1, "SSD auto"]["k"] == "auto"
    best = max((c for key, c in cells.items() if key[:2] == (1.0, 2) and key[2].startswith("SSD ") and "auto" not in
                key[2]), key=lambda c: c["tokens_per_s"]["median"])  # fmt: skip
    assert {r["of"] for r in part["ratios"] if (r["temperature"], r["batch"]) == (1.0, 2)} >= {best["name"]}
    assert headline["texts_differ"] == 0


def test_tune(run):
    part, _, _ = run("tune", replace(TOY, sizes=()))
    check_ratios(part)
    assert [(r["temperature"], r["of"]) for r in part["ratios"]] == [
        (T, f"{mode} auto") for T in (0.0, 1.0) for mode in ("SD", "SSD")
    ]
    places = {(row["peer"], row["temperature"], row["k"], row.get("fan_out")) for row in part["sweeps"]}
    assert places == {("sd", T, k, None) for T in (0.0, 1.0) for k in (1, 2)} | {
        ("ssd", T, k, M) for T in (0.0, 1.0) for k in (1, 2) for M in (2, 4)
    }
    assert modes.as_good({"median": 0.96, "high": 0.97})["good"] and modes.as_good({"median": 0.9, "high": 1.0})["good"]
    assert not modes.as_good({"median": 0.9, "high": 0.99})["good"]


def test_prediction(run, monkeypatch):
    monkeypatch.setattr(tuner, "KS", (1, 2))  # else the toy pair's rounds are long and few
    part, _, _ = run("prediction", replace(TOY, sizes=()))
    cells, pooled = part["cells"][:-2], part["cells"][-2:]
    assert all(1 <= cell["judged"] <= TOY.long_prompts for cell in cells), "where enough rounds were left"
    assert [(cell["model"], cell["name"]) for cell in pooled] == [("all", "SD"), ("all", "SSD")]
    for cell in part["cells"]:
        points = [p for p in part["points"] if all(p[key] == cell.get(key, p[key]) for key in ("name", "temperature"))]
        for error, of in (("prediction_error", "predicted"), ("alone_error", "alone")):
            assert cell[error] == pytest.approx(median(abs(p[of] / p["measured"] - 1) for p in points))
        assert cell["judged"] == len(points)


def test_ablations(run):
    part, _, _ = run("ablations", replace(TOY, sizes=(), budgets=(4,), predict_batches=1, repeats=1))
    check_ratios(part)
    tables = {name: [c for c in part["cells"] if c["table"] == name] for name in ablate.TABLES}
    assert [len(tables[name]) for name in ("couplings", "lists", "adaptive")] == [2 * (3 + 1), 4 * 2 + 2, 6]
    assert {c["name"] for c in tables["fallback"]} == {"jit", "fast", "auto", "jit for the whole batch"}
    assert len(tables["cut"]) == 2 * len(TOY.cut_ks)
    slow = {c["name"]: c for c in tables["slow draft"]}
    assert len(slow) == 3 * (1 + len(TOY.slow_ks)) + 1 and "SSD, auto" in slow
    waits = slow["SSD, K=2"]
    assert waits["longest_wait_ms"] > 0 and waits["allowed_wait_ms"] > 0 and waits["too_long"] >= 0


def test_altered_pieces(pair):
    """What is put in place of a piece does what it is called, and only for one generation."""
    uniform = altered.Uniform(3, 16)
    assert uniform.lists(0, 3) == [4, 4, 4, 4] and uniform.lists(0, 4) == [4, 3, 3, 3, 3]
    assert uniform.lists(0, 0) == [16]
    fixed = altered.Fixed(3, 16)
    before = list(fixed.lists(1, 3))
    for _ in range(64):
        fixed.observe(1, 3, 0, None, among=16)
    assert altered.Fixed(3, 16).lists(1, 3) == before == fixed.lists(1, 3)
    engine = peers.Server().engine(pair[1], pair[3], *[f"cpu:{measure.available_cores()[0]}"] * 2)
    settings = {"mode": "ssd", "k": 2, "fan_out": 4, "max_new_tokens": 12, "cut": False, "fallback": "jit"}
    texts = {}
    for name in (None, *altered.ALTERED):
        run = peers.run_ours(engine, [[1, 2, 3], [4, 5, 6]], without=[name] if name else [], **settings)
        texts[name] = run["ids"]
    assert len({json.dumps(ids) for ids in texts.values()}) == 1, "the text never depends on it"
    decoding = engine.start([[1, 2, 3]], ignore_eos=True, **settings)
    with altered.altered(decoding, ["slow draft"]):
        assert "decode" in decoding.draft.__dict__
    assert not {"extend", "fork", "chain_step", "decode"} & set(decoding.draft.__dict__)


def test_the_slow_draft_is_slow(monkeypatch):
    times, slept = iter((0.0, 2.0)), []
    monkeypatch.setattr(altered.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(altered.time, "sleep", slept.append)
    assert altered.slowed(lambda x: x + 1)(1) == 2 and slept == [4.0], "three times its own two seconds"


def test_the_best_of_a_sweep_is_the_first_that_is_as_good_as_the_fastest(monkeypatch):
    speeds = {1: 90.0, 2: 99.0, 3: 100.0}

    def time(self, ask, what, cells, repeats, new, batch):
        assert repeats == 2, "prompts of a sweep, in batches"
        for cell in cells:
            cell.runs.append({"decoded": speeds[cell.how["k"]], "decode_s": 1.0})

    monkeypatch.setattr(measure.Bench, "time", time)
    one = object.__new__(measure.Bench)
    one.effort, one.say = TOY, lambda text: None
    best, sweep = one.best(None, "a sweep", [measure.Cell("SD", "sd", {"k": k}) for k in speeds], batch=2, prompts=3)
    assert best.how == {"k": 2} and not best.runs and {row["k"]: row["tokens_per_s"] for row in sweep} == speeds


def test_the_longest_wait_is_judged_by_its_own_round():
    """Two hits and, between them, a round of turns: the first waited 3 where 6 is allowed, the second 5 where 4 is."""
    spans = [("extend", 0, 2), ("fork", 2, 3), ("chain step", 3, 6), ("chain step", 6, 99)]
    spans += [("extend", 13, 14), ("fork", 14, 15), ("chain step", 15, 17)]
    lookups = [SimpleNamespace(round=0), SimpleNamespace(round=2)]
    figures = SimpleNamespace(verifies=[(0, 10), (13, 20), (22, 24), (29, 30)], lookups=lookups)
    decoding = SimpleNamespace(figures=figures, draft_lane=SimpleNamespace(spans=spans))
    found = peers.longest_wait(decoding, [0, 2])
    assert found == {"longest_wait_ms": 5e3, "allowed_wait_ms": 4e3, "too_long": 1}


def test_arrivals(monkeypatch):
    """Row 1 gets nothing in the second round: its next piece comes after two."""
    times = iter((0.0, 1.0, 1.5, 3.0))
    monkeypatch.setattr(peers.time, "perf_counter", lambda: next(times))
    arrivals = peers.Arrivals([3, 3])
    for lengths in ([4, 4], [6, 4], [7, 9]):
        arrivals.note(lengths)
    assert arrivals.told() == {"first_s": 1.0, "pieces_s": [0.5, 1.5, 2.0]}


def test_interval_holds_the_median():
    assert measure.interval([3.0, 1.0, 2.0, 5.0, 4.0]) == {
        "median": 3.0, "low": 1.0, "high": 5.0, "coverage": pytest.approx(1 - 2 / 32), "n": 5,
    }  # fmt: skip
    found = measure.interval([float(x) for x in range(1, 21)])
    assert (found["median"], found["low"], found["high"]) == (10.5, 6.0, 15.0), "the sign test's table for n = 20"
    assert found["coverage"] == pytest.approx(0.9586, abs=1e-4)


def test_the_gap_of_a_near_tie(pair):
    """The gap that excuses a difference is that of the target's own best two logits."""
    server, ids = peers.Server(), [1, 2, 3, 4]
    gap = server.gap(pair[1], ids)["gap"]
    from cache import KVCache

    model = server.model(pair[1]).transformer
    cache = KVCache(model.config, 1, 4, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        for i, token in enumerate(ids):
            place = cache.place(torch.tensor([i]), torch.tensor([1]), 1, i + 1)
            best = model(torch.tensor([[token]]), place, cache)[0, -1].topk(2).values
    assert gap == pytest.approx((best[0] - best[1]).item(), abs=1e-4)


def test_a_process_answers_and_reports_mistakes(pair):
    core = measure.available_cores()[:1]
    worker = peers.Worker(core)
    try:
        assert worker.ask("size", target=pair[1])["step_bytes"] > 0
        with pytest.raises(ValueError, match="there is no folder"):
            worker.ask("size", target="/nowhere")
        how = {"target": pair[1], "device": f"cpu:{core[0]}"}
        run = worker.ask("run", peer="ar", prompts=[[1, 2, 3]], new=5, **how)
        assert len(run["ids"][0]) == 5 and run["decoded"] == 4 and 0 < run["decode_s"] <= run["total_s"]
    finally:
        worker.close()
    with pytest.raises(RuntimeError, match="ended by itself"):
        worker.process.stdin = open("/dev/null", "w")  # noqa: SIM115
        worker.ask("size", target=pair[1])


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--only", "plain,fast"), ("'fast'", "plain, overlap, predict, assisted")),
        (("--out", "/nowhere/x.json"), ("/nowhere/x.json", "create it")),
        (("--prompts", "/nowhere.jsonl"), ("/nowhere.jsonl",)),
        (("--target", "inflate:60m:somewhere"), ("inflate:",)),
        (("--target", "/nowhere"), ("/nowhere",)),
        (("--show", "/nowhere.json"), ("/nowhere.json",)),
        (("--quik",), ("--quik",)),
    ],
)
def test_mistakes_are_one_sentence(pair, flags, words, capsys):
    try:
        code = bench.main([*pair, *flags])
    except SystemExit as stop:  # argparse's own way
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said
    assert all(word in said for word in words), said


def test_quick_is_a_part_of_the_whole():
    """--quick measures less of everything, and still often enough for medians with a spread."""
    assert bench.QUICK.repeats >= 5 and bench.FULL.pairs >= 20
    for name in (
        "ks", "fan_outs", "budgets", "temperatures", "assisted_ks", "thresholds", "lookup_ks", "mode_batches",
        "mode_ks", "mode_fan_outs", "tune_ks", "tune_fan_outs", "saguaro_cs", "cut_ks", "slow_ks", "slow_fan_outs",
    ):  # fmt: skip
        assert set(getattr(bench.QUICK, name)) <= set(getattr(bench.FULL, name)), name


def test_the_grid_of_texts_covers_what_it_says():
    """Every temperature and seed with every K in both modes; every budget, fallback and batch, cut and not."""
    cells = list(check_same_text.cells(quick=False))
    ssd = [(batch, s) for batch, s in cells if s["mode"] == "ssd"]
    for mode in ("sd", "ssd"):
        of = [(s["temperature"], s["seed"], s["k"]) for _, s in cells if s["mode"] == mode]
        assert sorted(of) == sorted((*heat, k) for heat in check_same_text.HEAT for k in range(1, 9))
        assert {batch for batch, s in cells if s["mode"] == mode} == {1, 8}
    assert {(s["k"], s["cut"]) for _, s in ssd} == {(k, cut) for k in range(1, 9) for cut in (True, False)}
    for key, values in (("fan_out", check_same_text.BUDGETS), ("fallback", check_same_text.FALLBACKS)):
        assert {(s[key], s["cut"]) for _, s in ssd} == {(value, cut) for value in values for cut in (True, False)}
