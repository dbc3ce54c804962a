"""Documents and plots from results: documents say what the files say, every plot is small."""

import json
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import plot  # noqa: E402
import render  # noqa: E402

LARGEST = 20_000  # bytes of a plot


def way(rate: float, **more) -> dict:
    speed = {"median": rate, "low": 0.9 * rate, "high": 1.1 * rate, "n": 9}
    return {"tokens_per_s": speed, "per_core": rate, "settings": {}, "acceptance_rate": 0.6,
            "tokens_per_round": 2.5, "distinct_4grams": 0.9, "hit_rate": 0.8} | more  # fmt: skip


def group(ways: dict, temperature=0.0, kind=None, **more) -> dict:
    ratio = {"median": 1.25, "low": 1.2, "high": 1.3, "n": 9}
    names = list(ways)
    ratios = {f"{names[-1]} over {names[0]}": ratio}
    return {"temperature": temperature, "kind": kind, "ways": ways, "ratios": ratios} | more


def synthetic() -> dict:
    """A file of results as bench.py writes it."""
    ways = {
        "AR": way(15),
        "SD": way(24, settings={"k": 4}),
        "SSD": way(30, settings={"k": 4, "fan_out": 16}),
    }
    ms = {"verify_ms": 100.0, "draft_ms": 30.0, "exposed_ms": 0.5, "hidden": 0.98}
    pair = {"SD": ways["SD"] | ms, "SSD": ways["SSD"] | ms}
    heats = [(T, kind) for kind in ("code", "chat") for T in (0.0, 1.0)]
    accept = {}
    for T, kind in heats:
        couplings = ("shared", "maximal", "independent")[: 3 if T else 1]
        accept[f"T={T:g} {kind}"] = group(
            {f"{c} M={M}": way(9, hit_rate=M / 40) for c in couplings for M in (4, 16)}, T, kind
        )
    own = group(
        {"best": way(30, settings={"k": 2, "fan_out": 8}), "auto": way(29, k=4, fan_out=16)}
    )
    groups = {"modes": {"T=0": group(ways)}, "accept": accept, "auto": {"T=0": own},
              "overlap": {"T=0": group(pair, ceiling=1.3, share_of_ceiling=0.96)}}  # fmt: skip
    return {
        name: {"environment": {"cpu": "a CPU", "cores": 2}, "groups": of}
        for name, of in groups.items()
    }


@pytest.fixture
def results(tmp_path) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "all.json").write_text(json.dumps(synthetic()))
    return tmp_path / "results" / "all.json"


# ---- markers


def test_markers(results):
    root = results.parent.parent
    document = """A
<!-- table results/all.json modes T=0 -->
old
<!-- end -->
<!-- text results/all.json : On {modes/environment/cpu} SSD is
{modes/T=0/SSD over AR .2f interval} times as fast, with
{modes/T=0/SSD/tokens_per_s .0f} tokens/s and {modes/T=0/SSD/hit_rate .0%} hits. -->
<!-- end -->
<!-- text results/none.json : {never read} -->
<!-- end -->
<!-- plot results/all.json speeds docs/s.svg : All
of it -->
<!-- end -->
B"""
    made = render.rewrite(document, root / "docs", root)
    assert made.startswith("A\n") and made.endswith("\nB") and "old" not in made
    assert "| 0 | SSD | 4 | 16 | 30.0 [27.0, 33.0] | 30.0 | 0.600 | 0.800 | 2.50 | 0.90 |\n" in made
    line = "\nOn a CPU SSD is 1.25 [1.20, 1.30] times as fast, with 30 tokens/s and 80% hits.\n"
    assert line in made
    assert "*Not measured yet: `results/none.json` is not there.*" in made
    assert "\n![All of it](s.svg)\n<!-- end -->" in made
    assert list(render.plots(document, root)) == [root / "docs" / "s.svg"]
    assert render.rewrite(made, root / "docs", root) == made, "a second time changes nothing"


def test_every_table(results):
    found = synthetic()
    assert "| code | 1 | maximal | 0.600 | 2.50 | 0.90 | 0.100 | 0.400 |" in render.view(
        found, "accept"
    )
    assert "| code | 0 | any | 0.600 | 2.50 | 0.90 | 0.100 | 0.400 |" in render.view(
        found, "accept"
    )
    some = render.view(found, "accept", "T=1")  # of all kinds
    assert "| code | 1 |" in some and "| code | 0 |" not in some
    assert "| 4 | 16 | 1.25 [1.20, 1.30] | 1.30 | 96% | 98% | 0.800 |" in render.view(
        found, "overlap"
    )
    assert "| 0 | 4 | 16 | 29.0 | 2 | 8 | 30.0 | 1.25 [1.20, 1.30] |" in render.view(found, "auto")
    found["ablate"] = found["modes"]
    assert "| 0 | SSD over AR | 1.25 [1.20, 1.30] | 0.800 / 0.800 | 2.50 / 2.50 |" in render.view(
        found, "ablate"
    )


@pytest.mark.parametrize("marker, words", [
    ("table results/all.json fast", "no table 'fast'"),
    ("table results/all.json modes T=3", "no group 'T=3'"),
    ("table results/all.json ablate", "nothing at ablate"),
    ("text results/all.json : {modes/T=0/XD}", "no 'XD'"),
])  # fmt: skip
def test_markers_that_are_wrong(results, marker, words):
    with pytest.raises(ValueError, match=words):
        render.rewrite(f"<!-- {marker} -->\n<!-- end -->", root=results.parent.parent)
    with pytest.raises(ValueError, match="no <!-- end -->"):
        render.rewrite("<!-- table results/all.json modes -->\n| 1 |\n", root=results.parent.parent)


@pytest.mark.parametrize("path", render.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_say_what_the_results_say(path):
    """If this fails: python scripts/render.py."""
    text = path.read_text()
    assert text == render.rewrite(text, path.parent)
    for file, drawn in render.plots(text).items():
        assert file.read_text() == drawn, file.name
        assert len(drawn) < LARGEST


# ---- plots


def drawn(name: str, source: Path, *options: str) -> str:
    """A plot, which needs neither fonts nor the network, and is the same a second time."""
    svg = plot.draw(name, source, *options)
    assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg") and len(svg) < LARGEST
    assert svg == plot.draw(name, source, *options) and "href" not in svg
    return svg


def test_plots_of_results(results):
    speeds = drawn("speeds", results)
    assert [speeds.count(f'fill="{colour}"') for colour in (plot.AR, plot.SD, plot.SSD)] == [
        1,
        1,
        1,
    ]
    assert "30.0 (2.00 x AR)" in speeds
    hits = drawn("hits", results)
    assert hits.count("<polyline") == 5 + 4, (
        "five lines of the grid, and one for each coupling and temperature"
    )
    assert "temperature 0" in hits and "maximal, temperature 1" in hits


def write_trace(path: Path) -> Path:
    """Four rounds: a hit, a miss that drafts, a hit, and what comes after them."""
    lanes = {1: "target (cpu:0)", 2: "draft (cpu:1)", 0: "loop"}
    events = [
        {"ph": "M", "name": "thread_name", "tid": tid, "args": {"name": name}}
        for tid, name in lanes.items()
    ]
    spans = [
        (1, "prefill", 0, 5),
        *((1, "verify", a, a + 8) for a in (10, 18.2, 30, 38.1)),
        (2, "decode", 26.3, 29.8),
    ]
    work = [("extend", 0.5, 2), ("fork", 2, 2.2), ("chain step", 2.2, 4), ("chain step", 4, 6)]
    spans += [(2, name, begin + a, begin + b) for begin in (10, 18.2, 30) for name, a, b in work]
    for tid, name, begin, end in spans:
        events.append(
            {
                "ph": "X",
                "tid": tid,
                "name": name,
                "ts": begin * 1e3,
                "dur": (end - begin) * 1e3,
                "args": {},
            }
        )
    for number, (at, missed) in enumerate(((18.01, []), (26.21, [0]), (38.01, []))):
        look = {"round": number, "missed": missed}
        events.append(
            {"ph": "X", "tid": 0, "name": "look-up", "ts": at * 1e3, "dur": 10, "args": look}
        )
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_timeline(tmp_path):
    svg = drawn("timeline", write_trace(tmp_path / "trace.json"), "0", "3")
    # One in the key.
    bars = {name: svg.count(f'fill="{colour}"/>') - 1 for name, colour in plot.SPANS.items()}
    # Three verifications and the beginning of a fourth.
    assert bars == {"verify": 4, "extend": 3, "fork": 3, "chain step": 6, "decode": 1}
    assert svg.count(f'stroke="{plot.HIT}"') == 2 and svg.count(f'stroke="{plot.MISS}"') == 1


def test_mistakes_are_one_sentence(tmp_path, results, capsys):
    trace, out = write_trace(tmp_path / "trace.json"), tmp_path / "out.svg"
    (tmp_path / "list.json").write_text("[1]")
    cases = [
        ((), "PLOT"),
        (("pie", trace, out), "'pie'"),
        (("timeline", tmp_path / "none.json", out), "cannot be read"),
        (("timeline", tmp_path / "list.json", out), "is not a trace"),
        (("timeline", trace, tmp_path / "out.png"), ".svg"),
        (("timeline", trace, out, 2, 2), "has 4"),
        (("timeline", trace, out, "x"), "'x'"),
        (("speeds", tmp_path / "none.json", out), "cannot be read"),
        (("hits", tmp_path / "list.json", out), "bench.py --only accept"),
    ]
    for args, words in cases:
        code = plot.main([str(arg) for arg in args])
        told = capsys.readouterr().err
        assert (
            code == 2 and words in told and told.startswith("error: ") and told.count("\n") == 1
        ), told
        assert not out.exists()
