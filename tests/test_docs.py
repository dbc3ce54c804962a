"""The walkthrough is true: its snippets print what it shows, its quotes and names are in the code.

`PYTHONPATH=.:tests python tests/test_docs.py` writes what the snippets print now into the document.
"""

import contextlib
import importlib
import inspect
import io
import os
import re
from pathlib import Path

import torch
from laws import one_thread  # noqa: F401
from tiny import DEVICES

import runtime

ROOT = Path(__file__).resolve().parent.parent
WALKTHROUGH = ROOT / "docs" / "walkthrough.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SNIPPET = re.compile(r"^```python\n(.*?)^```\n```text\n(.*?)^```$", re.M | re.S)
ENGINE = sorted(path.stem for path in ROOT.glob("*.py"))
FOLDERS = (ROOT, *(ROOT / name for name in ("checkpoint", "examples", "scripts", "studies")))
SOURCES = "\n".join(path.read_text() for folder in FOLDERS for path in sorted(folder.glob("*.py")))


def printed(code: str, namespace: dict) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, str(WALKTHROUGH), "exec"), namespace)
    return out.getvalue()


def test_snippets_print_what_is_shown(monkeypatch):
    # The cores are shared: a slow draft is not a broken one. And one core each is quick there.
    monkeypatch.setattr(runtime, "PATIENCE_S", 60.0)
    monkeypatch.setattr(runtime, "Devices", lambda *given: DEVICES)
    monkeypatch.chdir(ROOT)
    text, namespace = WALKTHROUGH.read_text(), {}
    snippets = SNIPPET.findall(text)
    count = sum(kind == "python" for kind, _ in FENCE.findall(text))
    assert len(snippets) == count >= 4, "a snippet shows no output"
    for code, shown in snippets:
        assert printed(code, namespace) == shown, code


def resolve(name: str):
    """Whether the engine has `Class.member`, `module.name` or a plain name. A member may be set in
    a method.
    """
    first, *rest = name.split(".")
    if not rest:
        return re.search(rf"\b{re.escape(first)}\b", SOURCES) is not None
    if first in ENGINE:
        return hasattr(importlib.import_module(first), rest[0])
    owners = [getattr(importlib.import_module(module), first, None) for module in ENGINE]
    owners = [owner for owner in owners if inspect.isclass(owner)]
    set_here = re.compile(rf"self\.{rest[0]}\b")
    return any(hasattr(o, rest[0]) or set_here.search(inspect.getsource(o)) for o in owners)


def test_names_are_in_the_code():
    prose = FENCE.sub("", WALKTHROUGH.read_text())
    spans = set(re.findall(r"`([^`\n]+)`", prose))
    checked = 0
    for span in spans:
        name = re.sub(r"\(.*\)$", "", span)
        if re.fullmatch(r"[\w/]+(\.(py|md|svg|json)|/)", name):
            here = any((folder / name).exists() for folder in (ROOT, ROOT / "docs"))
            # A document may show figures that are not measured yet; render.py says so there.
            assert here or name.startswith("results/"), f"{span}: no such file"
        elif re.fullmatch(r"--[a-z-]+", name):
            flag = name.removeprefix("--no-").removeprefix("--")
            assert flag in SOURCES, f"{span}: no such flag"
        elif re.fullmatch(r"[A-Za-z_][\w.]{2,}", name) and not name.startswith("torch."):
            assert resolve(name), f"{span}: not in the code"
            checked += 1
    assert checked > 30


def test_quotes_are_in_the_code():
    """A ```py block begins with `# file, place`; its lines stand there, in order and without gaps
    but for `...`.
    """
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


if __name__ == "__main__":
    os.chdir(ROOT)
    torch.set_num_threads(1)
    runtime.Devices = lambda *given: DEVICES
    namespace = {}
    fresh = lambda match: f"```python\n{match[1]}```\n```text\n{printed(match[1], namespace)}```"  # noqa: E731
    WALKTHROUGH.write_text(SNIPPET.sub(fresh, WALKTHROUGH.read_text()))
