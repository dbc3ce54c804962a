"""The numbers of the documents, made from committed results: rewrites what stands between markers, and the plots.

Knows: the markers. Does not know: how anything was measured (bench.py), how tables and plots look (tables.py, plot.py).
Read next: tables.py.

    python scripts/render.py                 README.md, results/README.md and docs/*.md, and the plots they name
    python scripts/render.py --check         change nothing, name what differs; exit code 1 if anything does

A marker is a comment in the document; the file of results is named from the root of the repository:

    <!-- table results/cpu_modes.json modes batch=1 temperature=0.0 : mode, tokens/s, a core -->      cells of a part,
    <!-- end -->                               chosen by their labels, some columns (without the colon: all of them)
    <!-- table results/cpu_tune.json tune/ratios temperature=1.0 -->                               its ratios instead
    <!-- end -->
    <!-- text results/cpu_modes.json : AR writes {modes batch=1 name=AR temperature=0.0 tokens_per_s .0f} tokens/s. -->
    <!-- end -->        in braces: a part, labels that fit one cell (or ratio, with of= and to=), a figure, its format
    <!-- plot results/cpu_modes.json waterfall docs/waterfall.svg : what it shows, in words -->
    <!-- end -->                      a picture, and the link to it; options of plot.py may follow the picture's name

A figure may go on with a dot: tokens_per_s is "median [low, high]", tokens_per_s.median the median alone; `ratio` is a
ratio's own. {environment cpu} is a fact about the machine. Where the file is not there yet, the document says so.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "scripts") not in sys.path:
    sys.path.insert(0, str(ROOT / "scripts"))

from tables import RATIOS, columns_of, shown, table  # noqa: E402

DIFFERS, MISTAKE = 1, 2
WIDTH = 120
MARKED = re.compile(r"(<!-- (table|text|plot) (.*?) -->\n)(.*?)(<!-- end -->)", re.S)
PLOT = re.compile(r"<!-- plot (\S+) (\S+) (\S+)(.*?) :")


def documents(root: Path = ROOT) -> list[Path]:
    return [path for path in (root / "README.md", root / "results" / "README.md") if path.exists()] + sorted(
        (root / "docs").glob("*.md")
    )


def rewrite(text: str, folder: Path = ROOT, root: Path = ROOT) -> str:
    """A document in `folder` with everything between its markers made anew."""
    text = MARKED.sub(lambda m: m[1] + _made(m[2], m[3], folder, root).strip() + "\n" + m[5], text)
    if re.search(r"<!-- (table|text|plot) ", MARKED.sub("", text)):
        raise ValueError("a marker has no <!-- end --> behind it: add one")
    return text


def _made(kind: str, marker: str, folder: Path, root: Path) -> str:
    head, _, tail = (part.strip() for part in marker.partition(" :"))
    file, *words = shlex.split(head)
    if not (root / file).exists():
        return f"*Not measured yet: `{file}` is not there.*"
    results = _read(root / file)
    try:
        if kind == "plot":
            return f"![{' '.join(tail.split())}]({os.path.relpath(root / words[1], folder)})"
        if kind == "text":
            fill = lambda m: figure(results, shlex.split(m[1]))  # noqa: E731
            return textwrap.fill(re.sub(r"\{(.*?)\}", fill, " ".join(tail.split()), flags=re.S), WIDTH)
        records, columns = select(results, words)
        wanted = [name.strip() for name in tail.split(",")] if tail else []
        if unknown := [name for name in wanted if name not in [column[0] for column in columns]]:
            raise ValueError(f"there is no column {unknown[0]!r}, wanted some of {', '.join(c[0] for c in columns)}")
        return "\n".join(table(records, [column for column in columns if not wanted or column[0] in wanted]))
    except ValueError as error:
        raise ValueError(f"the marker `{kind} {' '.join(head.split())}`: {error}") from error


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read as results ({error})") from error


def select(results: dict, words: list[str]) -> tuple[list[dict], tuple]:
    """PART[/ratios] LABEL=VALUE ... -> the records that fit, and the columns of their table."""
    name, *labels = words
    part, _, kind = name.partition("/")
    if part not in results["parts"]:
        raise ValueError(f"the file has no part {part!r}, only {', '.join(results['parts'])}")
    chosen = dict(label.split("=", 1) for label in labels)
    records = results["parts"][part].get(kind or "cells", ())
    records = [r for r in records if all(str(r.get(key)) == value for key, value in chosen.items())]
    if not records:
        raise ValueError(f"nothing in {name} fits {' '.join(labels)}: look at the tables of the file")
    return records, RATIOS if kind == "ratios" else columns_of(part, chosen.get("table", ""))


def figure(results: dict, words: list[str]) -> str:
    """PART LABEL=VALUE ... FIGURE [FORMAT] -> one number, as text."""
    labels = [word for word in words[1:] if "=" in word]
    rest = [word for word in words[1:] if "=" not in word] + [""]
    key, form = rest[0], f"{{:{rest[1]}}}"
    if words[0] == "environment":
        return form.format(results["environment"][key])
    kind = "/ratios" if any(label.startswith("of=") for label in labels) else ""
    records, _ = select(results, [words[0] + kind, *labels])
    if len(records) != 1:
        raise ValueError(f"{len(records)} records of {words[0]} fit {' '.join(labels)}, wanted one: say more")
    found, key = records[0], "" if key == "ratio" else key
    while "." in key:
        first, key = key.split(".", 1)
        found = found[first]
    if text := shown(found, key, form):
        return text
    raise ValueError(f"{words[0]} {' '.join(labels)} has no figure {key!r}")


def plots(text: str, root: Path = ROOT) -> list[tuple[str, Path, Path, list[str]]]:
    """(plot, results, file to write, options) for every plot that a document names and that can be drawn."""
    found = PLOT.findall(text)
    return [(name, root / source, root / out, shlex.split(options)) for source, name, out, options in found
            if (root / source).exists()]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="render.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--check", action="store_true", help="write nothing, name the documents that would change")
    args, differ = p.parse_args(argv), []
    for path in documents():
        try:
            text = path.read_text()
            new = rewrite(text, path.parent)
        except ValueError as error:
            print(f"render.py: {path.name}: {error}", file=sys.stderr)
            return MISTAKE
        if new != text:
            differ.append(path.relative_to(ROOT))
            if not args.check:
                path.write_text(new)
        for name, source, out, options in plots(text) if not args.check else ():
            draw = [sys.executable, str(ROOT / "scripts" / "plot.py"), name, str(source), str(out), *options]
            if subprocess.run(draw).returncode:
                return MISTAKE
    print(f"{'differs' if args.check else 'written'}: {', '.join(map(str, differ)) or 'nothing'}")
    return DIFFERS if args.check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
