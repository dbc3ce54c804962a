"""Documents and plots from results: a small file of results gives every plot; the documents say what the files say."""

import importlib
import json
import re
import sys
import xml.etree.ElementTree
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import render  # noqa: E402
import tables  # noqa: E402


def spread(middle: float) -> dict:
    return {"median": middle, "low": 0.9 * middle, "high": 1.1 * middle, "coverage": 0.95, "n": 7}


def synthetic() -> dict:
    """A file of results as bench.py writes it, of two models, a few cells each."""
    at = {"model": "demo", "temperature": 0.0, "batch": 1}
    rates = {"transformers": 100, "AR": 150, "AR both cores": 190, "SD": 210, "SSD": 240, "SSD auto": 235}
    modes = [at | {"name": name, "tokens_per_s": spread(rate), "piece_p50_ms": 4.0} for name, rate in rates.items()]
    modes[4] |= {"k": 3, "fan_out": 16}
    tune = {"cells": [], "ratios": [], "sweeps": []}
    for place in ({"model": m, "temperature": T} for m in ("demo", "60m") for T in (0.0, 1.0)):
        for name, mode in (("SD", "sd"), ("SSD", "ssd")):
            tune["sweeps"] += [place | {"peer": mode, "k": k, "fan_out": M, "tokens_per_s": 100.0 - k + M}
                               for k in (1, 2, 4) for M in (4, 8)]  # fmt: skip
            tune["cells"].append(place | {"name": f"{name} auto", "k_used": 2, "tokens_per_s": spread(101)})
            tune["ratios"].append(place | {"of": f"{name} auto", "to": f"{name} best"} | spread(0.98))
    counted = {"k": 4, "fan_out": 16, "acceptance_rate": 0.6, "hit_rate": 0.5, "lookups": 100}
    ablations = []
    for heat, coupling in ((0.0, "any"), (1.0, "shared"), (1.0, "independent")):
        for name in ("optimal lists", "uniform lists"):
            ablations += [counted | {"table": "lists", "temperature": heat, "coupling": coupling, "name": name,
                                     "fan_out": M, "hit_rate": M / 40} for M in (4, 8, 16)]  # fmt: skip
    for heat in (0.7, 1.0):
        for c in (1, 0.5, 0.1):
            name = {"coupling": "independent", "saguaro_c": c} if c < 1 else {"coupling": "independent"}
            ablations.append(counted | {"table": "couplings", "temperature": heat, "hit_rate": 0.9 - c / 2} | name)
        ablations.append(counted | {"table": "couplings", "temperature": heat, "coupling": "shared"})
    points = [at | {"name": name, "predicted": 100.0 + i, "measured": 104} for i in (0, 4) for name in ("SD", "SSD")]
    parts = {"modes": {"cells": modes}, "tune": tune, "ablations": {"cells": ablations},
             "prediction": {"cells": modes[3:5], "points": points}}  # fmt: skip
    return {"environment": {"cpu": "a CPU", "cores": 2}, "skipped": {}, "parts": parts}


@pytest.fixture
def results(tmp_path) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "all.json").write_text(json.dumps(synthetic()))
    return tmp_path / "results" / "all.json"


@pytest.fixture
def draw(monkeypatch, capsys):
    module = importlib.import_module("plot")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, args)])
        return module.main(), capsys.readouterr().err

    return module, run


def test_every_plot_of_results(tmp_path, results, draw):
    pytest.importorskip("matplotlib", reason='matplotlib is not installed: pip install -e ".[plots]"')
    module, run = draw
    drawn = {}
    for name in module.OF_RESULTS:
        assert run(name, results, tmp_path / "a.svg") == (0, ""), name
        drawn[name] = (tmp_path / "a.svg").read_text()
        assert not re.search("<text|font-family|dc:date|href=.http", drawn[name]), "needs fonts or the network"
        assert xml.etree.ElementTree.fromstring(drawn[name]).tag.endswith("svg")
    assert run("prediction", results, tmp_path / "b.svg") == (0, "")
    assert (tmp_path / "b.svg").read_text() == drawn["prediction"], "the same input gives the same file"
    bars = {name: drawn["waterfall"].count(f'fill: {getattr(module, name)}"') for name in ("AR", "SD", "SSD")}
    assert bars == {"AR": 2, "SD": 1, "SSD": 2}
    assert drawn["speed-by-k"].count(f"stroke: {module.SD}; stroke-width: 1.5") == 4, "a line in each of four panels"
    lines = re.findall(rf"stroke-dasharray[^\"]*stroke: {module.COUPLINGS['shared']}", drawn["hits-by-budget"])
    assert len(lines) == 2, "optimal lists are dashed, uniform ones dotted"


def test_mistakes_of_a_plot_are_one_sentence(tmp_path, results, draw):
    (tmp_path / "other.json").write_text(json.dumps({"parts": {"plain": {"cells": [1]}}}))
    cases = [
        (("waterfall", tmp_path / "none.json"), "cannot be read"),
        (("waterfall", tmp_path / "other.json"), "bench.py --only modes"),
        (("speed-by-k", ROOT / "README.md"), "bench.py --only tune"),
    ]
    for args, words in cases:
        code, told = draw[1](*args, tmp_path / "out.svg")
        assert code == 2 and words in told and told.startswith("error: ") and told.count("\n") == 1, told


def test_markers(results):
    root = results.parent.parent
    document = """A
<!-- table results/all.json modes name="AR both cores" : mode, tokens/s -->
old
<!-- end -->
<!-- table results/all.json tune/ratios temperature=1.0 model=demo of="SD auto" : of, ratio -->
<!-- end -->
<!-- text results/all.json : On {environment cpu} SSD has
{modes name=SSD tokens_per_s.median .0f} ({tune model=60m temperature=0.0 of="SD auto" to="SD best" ratio .2f}). -->
<!-- end -->
<!-- text results/none.json : {never read} -->
<!-- end -->
<!-- plot results/all.json waterfall docs/w.svg --from 3 : All
of it -->
<!-- end -->
B"""
    made = render.rewrite(document, root / "docs", root)
    assert made.startswith("A\n") and made.endswith("\nB") and "old" not in made
    assert "| mode | tokens/s |\n| --- | --- |\n| AR both cores | 190.0 [171.0, 209.0] |\n<!-- end -->" in made
    assert "| SD auto | 0.98 [0.88, 1.08] |" in made
    assert "\nOn a CPU SSD has 240 (0.98 [0.88, 1.08]).\n<!-- end -->" in made
    assert "*Not measured yet: `results/none.json` is not there.*" in made
    assert tables.shown({"good": True}, "good", "{}") == "yes"
    assert "\n![All of it](w.svg)\n<!-- end -->" in made
    assert render.plots(document, root) == [("waterfall", results, root / "docs" / "w.svg", ["--from", "3"])]
    assert render.rewrite(made, root / "docs", root) == made, "a second time changes nothing"


@pytest.mark.parametrize(
    "marker, words",
    [
        ("table results/all.json fast", "no part 'fast'"),
        ("table results/all.json modes name=XD", "fits name=XD"),
        ("table results/all.json modes : mode, colour", "no column 'colour'"),
        ("text results/all.json : {modes batch=1 tokens_per_s}", "wanted one"),
        ("text results/all.json : {modes name=SSD colour}", "no figure 'colour'"),
    ],
)
def test_markers_that_are_wrong(results, marker, words):
    with pytest.raises(ValueError, match=words):
        render.rewrite(f"<!-- {marker} -->\n<!-- end -->", root=results.parent.parent)
    with pytest.raises(ValueError, match="no <!-- end -->"):
        render.rewrite("<!-- table results/all.json modes -->\n| 1 |\n", root=results.parent.parent)


@pytest.mark.parametrize("path", render.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_say_what_the_results_say(path):
    """If this fails: python scripts/render.py."""
    assert path.read_text() == render.rewrite(path.read_text(), path.parent)


@pytest.mark.parametrize("path", render.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_plots_are_what_the_results_give(path, tmp_path, draw):
    """Byte by byte, where matplotlib is the one that CI has: another draws the same plot with other bytes."""
    wanted = render.plots(path.read_text())
    if not wanted:
        return
    pytest.importorskip("matplotlib", reason='matplotlib is not installed: pip install -e ".[plots]"')
    pinned = re.search(r"^matplotlib==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    for name, source, out, options in wanted:
        assert draw[1](name, source, tmp_path / "new.svg", *options) == (0, "")
        assert version("matplotlib") != pinned or (tmp_path / "new.svg").read_text() == out.read_text(), out.name


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("cpu_*.json")), ids=lambda path: path.name)
def test_committed_results_have_tables(path):
    results = json.loads(path.read_text())
    assert tables.render(results) and tables.headline(results)
