"""The numbers and plots of the documents, made from results/: rewrites what stands between markers.

Knows: the markers, what a table of each comparison shows. Does not know: how anything was measured
(bench.py), how a plot is drawn (plot.py). Read next: plot.py.

    python scripts/render.py             README.md, results/README.md, docs/*.md, and their plots
    python scripts/render.py --check     change nothing, name what differs; exit code 1 if any does

A marker is a comment that ends with <!-- end -->. Files are named from the root of the repository:

    <!-- table results/smollm2.json modes T=0 -->        one of VIEWS; `accept T=1` has all
                                                         groups that begin so
    <!-- text results/smollm2.json : SSD is {modes/T=0/SSD over SD .2f interval} times as fast. -->
    <!-- plot results/smollm2.json hits docs/hits.svg : what it shows, in words -->

In braces stands a path into the file, where `groups`, `ways` and `ratios` are left out; then a
format; then `interval` for "median [low, high]". Where a file is not there, the document says so.
"""

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "scripts") not in sys.path:
    sys.path.insert(0, str(ROOT / "scripts"))

import plot  # noqa: E402

DIFFERS, MISTAKE, WIDTH = 1, 2, 100
MARKED = re.compile(r"(<!-- (table|text|plot) (.*?) -->\n)(.*?)(<!-- end -->)", re.S)
INNER = ("groups", "ways", "ratios")


# ---- figures


def find(results: dict, path: str):
    """The value at a path, e.g. modes/T=0/SSD/tokens_per_s."""
    node = results
    for key in path.split("/"):
        places = (
            [node, *(node[name] for name in INNER if name in node)]
            if isinstance(node, dict)
            else []
        )
        found = [place[key] for place in places if key in place]
        if not found:
            raise ValueError(f"the results have nothing at {path}: there is no {key!r}")
        node = found[0]
    return node


def shown(value, form: str = "", interval: bool = False) -> str:
    """A figure as text; of a median with an interval the median, or both."""
    if isinstance(value, dict):
        middle, low, high = (format(value[key], form) for key in ("median", "low", "high"))
        return f"{middle} [{low}, {high}]" if interval else middle
    return "" if value is None else format(value, form)


def fill(results: dict, text: str) -> str:
    """The text with every {path format interval} replaced, on lines of WIDTH."""

    def figure(match) -> str:
        *words, last = match[1].split()
        interval = last == "interval"
        words += [] if interval else [last]
        form = words.pop() if re.fullmatch(r"\.\d[f%]", words[-1]) else ""
        return shown(find(results, " ".join(words)), form, interval)

    return textwrap.fill(re.sub(r"\{(.*?)\}", figure, " ".join(text.split())), WIDTH)


# ---- tables


def table(rows: list[dict]) -> str:
    """Markdown, a column for each key; a column that nothing fills is left out."""
    titles = [title for title in rows[0] if any(row[title] for row in rows)]
    lines = [titles, ["---"] * len(titles), *([row[title] for title in titles] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figures(way: dict) -> dict:
    """What every table shows of a way to decode, where it is known."""
    forms = {"acceptance": ("acceptance_rate", ".3f"), "hits": ("hit_rate", ".3f"),
             "tokens a round": ("tokens_per_round", ".2f"),
             "distinct 4-grams": ("distinct_4grams", ".2f")}  # fmt: skip
    return {title: shown(way.get(key), form) for title, (key, form) in forms.items()}


def plan(way: dict) -> dict:
    """The K and M of most rounds, and whether chains were made whole, whoever chose them."""
    k, m, cut = (way["settings"].get(key, way.get(key)) for key in ("k", "fan_out", "cut"))
    return {"K": shown(k, "g"), "M": shown(m, "g") + ", whole" * (cut is False and bool(m))}


def modes(groups: dict) -> Iterator[dict]:
    for group in groups.values():
        for name, way in group["ways"].items():
            speed = {
                "tokens/s": shown(way["tokens_per_s"], ".1f", True),
                "a core": shown(way["per_core"], ".1f"),
            }
            yield (
                {"temperature": f"{group['temperature']:g}", "mode": name}
                | plan(way)
                | speed
                | figures(way)
            )


def accept(groups: dict) -> Iterator[dict]:
    """A row for each kind of prompts, temperature and coupling. Only hits depend on M."""
    for group in groups.values():
        for coupling in dict.fromkeys(name.split()[0] for name in group["ways"]):
            ways = {name: way for name, way in group["ways"].items() if name.split()[0] == coupling}
            row = {"prompts": group["kind"], "temperature": f"{group['temperature']:g}",
                   "coupling": coupling if group["temperature"] else "any"}  # fmt: skip
            keys = ("acceptance_rate", "tokens_per_round", "distinct_4grams")
            row |= figures(
                {
                    key: mean(way[key] for way in ways.values())
                    for key in keys
                    if all(key in w for w in ways.values())
                }
            )
            del row["hits"]
            yield row | {
                f"hits, {name.split()[1]}": shown(way.get("hit_rate"), ".3f")
                for name, way in ways.items()
            }


def overlap(groups: dict) -> Iterator[dict]:
    for group in groups.values():
        sd, ssd = group["ways"]["SD"], group["ways"]["SSD"]
        yield plan(ssd) | {
            "SSD over SD": shown(group["ratios"]["SSD over SD"], ".2f", True),
            "at most": shown(group["ceiling"], ".2f"),
            "reached of it": shown(group["share_of_ceiling"], ".0%"),
            "hidden": shown(ssd.get("hidden"), ".0%"), "hits": shown(ssd.get("hit_rate"), ".3f"),
            "SD: verify ms": shown(sd["verify_ms"], ".1f"),
            "draft ms": shown(sd["draft_ms"], ".1f"),
            "SSD: verify ms": shown(ssd["verify_ms"], ".1f"),
            "exposed ms": shown(ssd["exposed_ms"], ".2f"),
        }  # fmt: skip


def auto(groups: dict) -> Iterator[dict]:
    for group in groups.values():
        own, best = group["ways"]["auto"], group["ways"]["best"]
        row = {"temperature": f"{group['temperature']:g}"}
        for name, way in (("auto", own), ("best", best)):
            row |= {f"{name}, {title}": text for title, text in plan(way).items()}
            row |= {f"{name}, tokens/s": shown(way["tokens_per_s"], ".1f")}
        yield row | {"auto over best": shown(group["ratios"]["auto over best"], ".2f", True)}


def ratios(groups: dict) -> Iterator[dict]:
    """Every ratio of a comparison, with the figures of both sides."""
    for group in groups.values():
        for name, found in group["ratios"].items():
            of, to = (group["ways"][side] for side in name.split(" over "))
            row = {
                "temperature": f"{group['temperature']:g}",
                "ratio": name,
                "speed": shown(found, ".2f", True),
            }
            for title in ("hits", "tokens a round"):
                row[title] = " / ".join(filter(None, (figures(way)[title] for way in (of, to))))
            yield row


def bits(groups: dict) -> Iterator[dict]:
    """A row for each format of a target, then of its draft. The whole pair is loaded each time."""
    for pair in groups.values():
        for role in ("target", "draft"):
            for name, way in pair[role].items():
                yield {
                    "model": way["name"], "role": role, "asked for": name,
                    "weights": way["dtype"] if way["quantize"] == "none" else way["quantize"],
                    "MB read a token": f"{way['step_bytes'] / 1e6:.0f}",
                    "peak MB of loading": f"{way['load_bytes'] / 1e6:.0f}",
                    "tokens/s": shown(way["tokens_per_s"], ".1f", True),
                    "perplexity of code": shown(way.get("perplexity code"), ".2f"),
                    "of text": shown(way.get("perplexity text"), ".2f"),
                    "acceptance": shown(way.get("accepted"), ".3f"),
                }  # fmt: skip


VIEWS: dict[str, Callable] = {
    "bits": bits, "modes": modes, "accept": accept, "overlap": overlap, "auto": auto,
    "ablate": ratios, "beside": ratios, **{f"halves{batch}": ratios for batch in (2, 4, 8, 16)},
}  # fmt: skip


def view(results: dict, name: str, group: str | None = None) -> str:
    if name not in VIEWS:
        raise ValueError(f"there is no table {name!r}, wanted one of {', '.join(VIEWS)}")
    groups = find(results, f"{name}/groups")
    asked = {key: groups[key] for key in groups if not group or f"{key} ".startswith(f"{group} ")}
    if not asked:
        raise ValueError(f"{name} has no group {group!r}, wanted one of {', '.join(groups)}")
    return table(list(VIEWS[name](asked)))


# ---- documents


def documents() -> list[Path]:
    return [
        ROOT / "README.md",
        ROOT / "results" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]


def rewrite(text: str, folder: Path = ROOT, root: Path = ROOT) -> str:
    """A document in `folder` with everything between its markers made anew."""

    def made(match) -> str:
        kind, marker = match[2], match[3]
        head, _, tail = (part.strip() for part in marker.partition(" : "))
        file, *words = head.split(maxsplit=2)
        if not (root / file).exists():
            return f"{match[1]}*Not measured yet: `{file}` is not there.*\n{match[5]}"
        try:
            if kind == "plot":
                path = os.path.relpath(root / words[1].split()[0], folder)
                return f"{match[1]}![{' '.join(tail.split())}]({path})\n{match[5]}"
            results = json.loads((root / file).read_text())
            new = view(results, *words) if kind == "table" else fill(results, tail)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the marker `{kind} {head}`: {error}") from error
        return f"{match[1]}{new}\n{match[5]}"

    text = MARKED.sub(made, text)
    if re.search(r"<!-- (table|text|plot) ", MARKED.sub("", text)):
        raise ValueError("a marker has no <!-- end --> after it: add one")
    return text


def plots(text: str, root: Path = ROOT) -> dict[Path, str]:
    """The file and the drawing of every plot that a document names and that can be drawn."""
    out = {}
    for _, kind, marker, *_ in MARKED.findall(text):
        source, *words = marker.partition(" : ")[0].split()
        if kind == "plot" and (root / source).exists():
            name, file, *options = words
            out[root / file] = plot.draw(name, root / source, *options)
    return out


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="render.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    p.add_argument("--check", action="store_true", help="write nothing, name what would change")
    check, differ = p.parse_args(argv).check, []
    for path in documents():
        try:
            text = path.read_text()
            new = {path: rewrite(text, path.parent)} | plots(text)
        except ValueError as error:
            print(f"render.py: {path.name}: {error}", file=sys.stderr)
            return MISTAKE
        for file, content in new.items():
            if not file.exists() or file.read_text() != content:
                differ.append(str(file.relative_to(ROOT)))
                if not check:
                    file.write_text(content)
    print(f"{'differs' if check else 'written'}: {', '.join(differ) or 'nothing'}")
    return DIFFERS if check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
