"""The walkthrough is true: its snippets print what it shows, its quotes and names are in the code, its plot is drawn.

`PYTHONPATH=.:tests python tests/test_docs.py` writes what the snippets print now into the document.
"""

import contextlib
import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from laws import one_thread  # noqa: F401
from tiny import DEVICES

import ssd

ROOT = Path(__file__).resolve().parent.parent
WALKTHROUGH = ROOT / "docs" / "walkthrough.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SNIPPET = re.compile(r"^```python\n(.*?)^```\n```text\n(.*?)^```$", re.M | re.S)
ENGINE = sorted(path.stem for path in ROOT.glob("*.py"))
SOURCES = "\n".join(path.read_text() for folder in (ROOT, ROOT / "scripts") for path in sorted(folder.glob("*.py")))


def printed(code: str, namespace: dict) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, str(WALKTHROUGH), "exec"), namespace)
    return out.getvalue()


def test_snippets_print_what_is_shown(monkeypatch):
    monkeypatch.setattr(ssd, "PATIENCE_S", 60.0)  # the cores are shared: a slow draft is not a broken one
    monkeypatch.setattr(ssd, "Devices", lambda *given: DEVICES)  # one core each: quick on a busy machine
    monkeypatch.chdir(ROOT)
    text, namespace = WALKTHROUGH.read_text(), {}
    snippets = SNIPPET.findall(text)
    assert len(snippets) == sum(kind == "python" for kind, _ in FENCE.findall(text)) >= 6, "a snippet shows no output"
    for code, shown in snippets:
        assert printed(code, namespace) == shown, code


def resolve(name: str):
    """`Class.member`, `module.name` or a plain name -> whether the engine has it; members may be set in methods."""
    first, *rest = name.split(".")
    if not rest:
        return re.search(rf"\b{re.escape(first)}\b", SOURCES) is not None
    if first in ENGINE:
        return hasattr(importlib.import_module(first), rest[0])
    owners = [getattr(importlib.import_module(module), first, None) for module in ENGINE]
    owners = [owner for owner in owners if inspect.isclass(owner)]
    return any(hasattr(o, rest[0]) or re.search(rf"self\.{rest[0]}\b", inspect.getsource(o)) for o in owners)


def test_names_are_in_the_code():
    prose = FENCE.sub("", WALKTHROUGH.read_text())
    spans = set(re.findall(r"`([^`\n]+)`", prose))
    checked = 0
    for span in spans:
        name = re.sub(r"\(.*\)$", "", span)
        if re.fullmatch(r"[\w/]+(\.(py|md|svg|json)|/)", name):
            assert any((folder / name).exists() for folder in (ROOT, ROOT / "docs")), f"{span}: no such file"
        elif re.fullmatch(r"--[a-z-]+", name):
            assert name.removeprefix("--no-").removeprefix("--") in SOURCES, f"{span}: no such flag"
        elif re.fullmatch(r"[A-Za-z_][\w.]{2,}", name) and not name.startswith("torch."):
            assert resolve(name), f"{span}: not in the code"
            checked += 1
    assert checked > 30


def test_quotes_are_in_the_code():
    """A ```py block begins with `# file, place`; its lines stand there, in order and without gaps but for `...`."""
    quotes = [body for kind, body in FENCE.findall(WALKTHROUGH.read_text()) if kind == "py"]
    assert len(quotes) >= 5
    for quote in quotes:
        head, body = quote.split("\n", 1)
        file, place = re.fullmatch(r"# ([\w/]+\.py), ([\w.]+)", head).groups()
        owner = importlib.import_module(Path(file).stem)
        for part in place.split("."):
            owner = getattr(owner, part)
        source = inspect.getsource(owner)
        for piece in body.split("...\n"):
            assert piece in source, f"{head}: the code says something else now"
            source = source[source.index(piece) + len(piece) :]


# ---- the timeline


def write_example(path: Path) -> Path:
    """Three rounds: a hit, a miss that drafts, a hit."""
    from report import write_trace

    class Lane:
        def __init__(self, name, spec, spans):
            self.name, self.spec, self.spans = name, spec, [(n, a / 1e3, b / 1e3) for n, a, b in spans]

    target = Lane("target", "cpu:0", [("prefill", 0, 5), *(("verify", a, a + 8) for a in (10, 18.2, 30, 38.1))])
    work = [("extend", 0.5, 2), ("fork", 2, 2.2), ("chain step", 2.2, 4), ("chain step", 4, 6)]
    spans = [(name, begin + a, begin + b) for begin in (10, 18.2, 30) for name, a, b in work]
    draft = Lane("draft", "cpu:1", [*spans, ("draft", 26.3, 29.8)])
    lookups = [(0, 0.01801, 0.01802, 1, [], 2), (1, 0.02621, 0.02622, 1, [0], 2), (2, 0.03801, 0.03802, 1, [], 2)]
    write_trace(path, [target, draft], lookups)
    return path


@pytest.fixture
def plot(monkeypatch, capsys):
    """scripts/plot.py, and what its terminal program returns and writes to stderr."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    module = importlib.import_module("plot")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, args)])
        return module.main(), capsys.readouterr().err

    return module, run


def test_timeline(tmp_path, plot):
    pytest.importorskip("matplotlib", reason='matplotlib is not installed: pip install -e ".[plots]"')
    module, run = plot
    args = ["timeline", str(write_example(tmp_path / "trace.json")), "--from=0", "--rounds=3"]
    assert run(*args, tmp_path / "a.svg") == (0, "")
    command = [sys.executable, str(ROOT / "scripts" / "plot.py"), *args, str(tmp_path / "b.svg")]
    subprocess.run(command, check=True, timeout=120)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    assert not re.search("<text|font-family|dc:date|href=.http", drawn), "needs fonts or the network, or has a date"
    assert xml.etree.ElementTree.fromstring(drawn).tag.endswith("svg")
    bars = {name: drawn.count(f"fill: {colour}") for name, colour in module.SPANS.items()}
    # Three verifications and the beginning of a fourth; what lies before the first round is not drawn.
    assert (bars["verify"], bars["prefill"], bars["chain step"], bars["draft"]) == (4, 0, 6, 1)
    assert bars["extend"] == bars["fork"] == 3 + 1  # and one in the key: their bars have no room for a name
    assert drawn.count(f"stroke: {module.HIT}") == 2 and drawn.count(f"stroke: {module.MISS}") == 1


def test_mistakes_are_one_sentence(tmp_path, plot):
    trace, out = write_example(tmp_path / "trace.json"), tmp_path / "out.svg"
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "half.json").write_text(json.dumps({"traceEvents": [{"ph": "X", "name": "verify"}]}))
    cases = [
        ((), "PLOT"),
        (("pie", trace, out), "pie"),
        (("timeline", tmp_path / "none.json", out), "cannot be read"),
        (("timeline", tmp_path / "list.json", out), "is no trace"),
        (("timeline", tmp_path / "half.json", out), "is no trace"),
        (("timeline", trace, tmp_path / "out.png"), ".svg"),
        (("timeline", trace, out, "--from", 3, "--rounds", 2), "has 4 rounds"),
        (("timeline", trace, out, "--rounds", "x"), "'x'"),
    ]
    for args, words in cases:
        code, told = plot[1](*args)
        assert code == 2 and words in told and told.startswith("error: ") and told.count("\n") == 1, told
        assert not out.exists()


def test_without_matplotlib(tmp_path, plot, monkeypatch):
    trace = write_example(tmp_path / "trace.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it now fails
    code, told = plot[1]("timeline", trace, tmp_path / "out.svg", "--from", 0, "--rounds", 1)
    assert code == 2 and 'pip install -e ".[plots]"' in told and told.count("\n") == 1


if __name__ == "__main__":
    os.chdir(ROOT)
    torch.set_num_threads(1)
    namespace = {}
    fresh = lambda match: f"```python\n{match[1]}```\n```text\n{printed(match[1], namespace)}```"  # noqa: E731
    WALKTHROUGH.write_text(SNIPPET.sub(fresh, WALKTHROUGH.read_text()))
