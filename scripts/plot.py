"""The plots, one message each, as small SVG files, from a trace of a run or from results.

Knows: the layout of a trace (generate.py --trace) and of a file of results (bench.py), colours,
axes. Does not know: how anything was measured. Read next: bench.py.

    python generate.py --ssd --trace results/trace.json
    python scripts/plot.py timeline results/trace.json docs/timeline.svg 12 5      from round 12, 5
    python scripts/plot.py speeds results/smollm2.json docs/speeds.svg             of each mode
    python scripts/plot.py hits results/smollm2.json docs/hits.svg                 against M

Letters stay letters: a browser draws them in its own font. The same input gives the same file.
"""

import json
import sys
from html import escape
from pathlib import Path
from statistics import mean, median

MISTAKE = 2  # exit code, as in generate.py
# One colour per mode in every plot; blue and orange stay apart for colour-blind readers.
AR, SD, SSD, OTHER = "#6b6b6b", "#1f77b4", "#e8710a", "#b9bec6"
INK, PALE, HIT, MISS = "#222222", "#d8dbe0", "#1a7f37", "#c0182b"
COUPLINGS = {"any": INK, "shared": "#7b3fa0", "maximal": "#1b8a8a", "independent": "#a0752c"}
# Preparing has shades of SSD's colour, drafting while the target waits has SD's.
SPANS = {
    "verify": "#c9ced6",
    "extend": "#f9c592",
    "fork": "#9c4a00",
    "chain step": SSD,
    "decode": SD,
}
LETTER = 6  # pixels, about, of one letter


class Drawing:
    """An SVG that grows element by element. Lengths are pixels, y goes down."""

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height, self.parts = width, height, []
        self.text(8, 18, title, weight="bold")

    def rect(self, x: float, y: float, w: float, h: float, fill: str) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}"/>'
        )

    def line(
        self, points: list[tuple[float, float]], stroke: str, width: float = 1, dash: str = ""
    ) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{stroke}" '
            f'stroke-width="{width}"{dashed}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        fill: str = INK,
        anchor: str = "start",
        weight: str = "",
    ) -> None:
        bold = f' font-weight="{weight}"' if weight else ""
        place = f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}"{place}{bold}>{escape(words)}</text>'
        )

    def svg(self) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}"'
        head += (
            f' width="{self.width}" height="{self.height}" font-family="sans-serif" font-size="12">'
        )
        ground = f'<rect width="{self.width}" height="{self.height}" fill="white"/>'
        return "\n".join([head, ground, *self.parts, "</svg>", ""])


def ticks(most: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to `most`, about `count` of them."""
    size = 10.0 ** (len(str(int(most))) - 1)
    step = next(
        step for step in (size / 10, size / 5, size / 2, size, 2 * size) if most / step <= count + 1
    )
    return [n * step for n in range(int(most / step) + 1)]


# ---- plots of results


def colour_of(name: str) -> str:
    return {"AR": AR, "SD": SD, "SSD": SSD}.get(name.split()[0], OTHER)


def speeds(source: Path) -> str:
    """A bar for each way to decode at temperature 0, with its interval."""
    found = read(source, "modes")
    ways = next(iter(found["groups"].values()))["ways"]
    base, left, right, step = ways["AR"]["tokens_per_s"]["median"], 180, 110, 22
    d = Drawing(720, 62 + step * len(ways), "Tokens/s, greedy, one prompt at a time")
    most = max(way["tokens_per_s"]["high"] for way in ways.values())
    x = lambda rate: left + rate / most * (720 - left - right)  # noqa: E731
    for tick in ticks(most):
        d.line([(x(tick), 28), (x(tick), 32 + step * len(ways))], PALE)
        d.text(x(tick), 48 + step * len(ways), f"{tick:g}", anchor="middle")
    for place, (name, way) in enumerate(ways.items()):
        y, speed = 32 + step * place, way["tokens_per_s"]
        d.text(left - 6, y + 13, name, anchor="end")
        d.rect(left, y + 2, x(speed["median"]) - left, step - 6, colour_of(name))
        d.line([(x(speed["low"]), y + 9), (x(speed["high"]), y + 9)], INK, 1.5)
        d.text(
            x(speed["high"]) + 6,
            y + 13,
            f"{speed['median']:.1f} ({speed['median'] / base:.2f} x AR)",
        )
    return d.svg()


def hits(source: Path) -> str:
    """Hits against M over all prompts, a line for each coupling at the extreme temperatures."""
    points = {}
    for group in read(source, "accept")["groups"].values():
        for name, way in group["ways"].items():
            coupling, budget = name.split(" M=")
            key = (group["temperature"], coupling if group["temperature"] else "any")
            points.setdefault(key, {}).setdefault(int(budget), []).append(way["hit_rate"])
    heats = [heat for heat, _ in points]
    points = {key: of for key, of in points.items() if key[0] in (min(heats), max(heats))}
    budgets = sorted({M for of in points.values() for M in of})
    left, top, width, height = 50, 34, 450, 270
    d = Drawing(720, 350, "Rounds for which a chain was ready, against M")
    x = lambda M: left + M / budgets[-1] * width  # noqa: E731
    y = lambda share: top + (1 - share) * height  # noqa: E731
    for tick in (0, 0.25, 0.5, 0.75, 1):
        d.line([(left, y(tick)), (left + width, y(tick))], PALE)
        d.text(left - 6, y(tick) + 4, f"{tick:.0%}", anchor="end")
    for M in budgets:
        d.text(x(M), y(0) + 18, str(M), anchor="middle")
    d.text(left + width / 2, y(0) + 36, "M, outcomes prepared a round", anchor="middle")
    above = y(0) + 30
    ends = {key: mean(of[max(of)]) for key, of in points.items()}
    for heat, coupling in sorted(points, key=ends.get):
        of, colour = points[heat, coupling], COUPLINGS[coupling]
        d.line([(x(M), y(mean(of[M]))) for M in sorted(of)], colour, 2, "" if heat else "5 3")
        above = min(above - 14, y(ends[heat, coupling]) + 4)  # names do not lie on each other
        name = "temperature 0" if coupling == "any" else f"{coupling}, temperature {heat:g}"
        d.text(x(max(of)) + 8, above, name, colour)
    return d.svg()


def read(source: Path, name: str) -> dict:
    """A comparison of a file that bench.py wrote."""
    try:
        return json.loads(Path(source).read_text())[name]
    except OSError as error:
        raise ValueError(f"{source} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, KeyError, TypeError) as error:
        make = f"python scripts/bench.py --only {name} --out {source}"
        raise ValueError(
            f"{source} has no comparison {name}, wanted a file that `{make}` wrote"
        ) from error


# ---- the timeline of a run


def read_trace(source: Path) -> tuple[dict[int, str], list[dict]]:
    """The lanes' names by thread number, and the spans in order of time, in milliseconds."""
    try:
        events = json.loads(Path(source).read_text())["traceEvents"]
        lanes = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
        spans = [
            e | {"begin": e["ts"] / 1e3, "end": (e["ts"] + e["dur"]) / 1e3}
            for e in events
            if e["ph"] == "X"
        ]
    except OSError as error:
        raise ValueError(
            f"the trace {source} cannot be read ({error.strerror}): check the path"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        made = "wanted a file that `python generate.py --ssd --trace FILE` wrote"
        raise ValueError(f"{source} is not a trace, {made}") from error
    return lanes, sorted(spans, key=lambda span: span["begin"])


def timeline(source: Path, first: str = "8", count: str = "5") -> str:
    """What ran on both lanes over a few rounds, and which look-ups hit."""
    lanes, spans = read_trace(source)
    start, stop = int(first), int(first) + int(count)
    verifies = [span for span in spans if span["name"] == "verify"]
    if not 0 <= start < stop < len(verifies):
        raise ValueError(
            f"rounds {start} to {stop - 1} were wanted, {source} has {len(verifies)}: choose others"
        )
    shown, after = verifies[start:stop], verifies[stop]
    zero, end = (
        shown[0]["begin"],
        after["begin"] + 0.3 * median(v["end"] - v["begin"] for v in shown),
    )
    used = sorted({s["tid"] for s in spans if s["name"] in SPANS})
    row = {tid: 52 + 44 * place for place, tid in enumerate(used)}
    left, width, foot = 96, 800, 52 + 44 * len(used)
    gaps = [b["begin"] - a["end"] for a, b in zip(shown, [*shown[1:], after])]
    title = f"Rounds {start} to {stop - 1}: the next verification begins {median(gaps):.2f} ms"
    d = Drawing(left + width + 20, foot + 66, f"{title} after a verdict (median)")
    x = lambda ms: left + (ms - zero) / (end - zero) * width  # noqa: E731
    for tid in used:
        name, _, device = lanes[tid].partition(" (")
        d.text(left - 8, row[tid] + 14, name, anchor="end")
        d.text(left - 8, row[tid] + 27, device.rstrip(")"), OTHER, anchor="end")
    for span in spans:
        if span["name"] in SPANS and span["end"] > zero and span["begin"] < end:
            a, b = x(max(span["begin"], zero)), x(min(span["end"], end))
            d.rect(a, row[span["tid"]], max(b - a - 0.8, 0.4), 32, SPANS[span["name"]])
            if LETTER * len(span["name"]) + 6 < b - a:
                d.text((a + b) / 2, row[span["tid"]] + 20, span["name"], anchor="middle")
    for span in spans:
        if span["name"].startswith("look-up") and start <= span["args"]["round"] < stop:
            colour, at = MISS if span["args"]["missed"] else HIT, x(span["begin"])
            d.line([(at, 44), (at, foot - 6)], colour, 1.5)
            d.text(at, 40, "miss" if span["args"]["missed"] else "hit", colour, "middle")
    for tick in ticks(end - zero, 8):
        d.text(x(zero + tick), foot + 12, f"{tick:g}", anchor="middle")
    d.text(left + width / 2, foot + 30, "milliseconds", anchor="middle")
    for place, (name, colour) in enumerate(SPANS.items()):  # the key
        d.rect(left + 110 * place, foot + 44, 12, 12, colour)
        d.text(left + 110 * place + 17, foot + 54, name)
    return d.svg()


PLOTS = {"timeline": timeline, "speeds": speeds, "hits": hits}


def draw(name: str, source: Path, *options: str) -> str:
    """The SVG of a plot. ValueError says in one sentence what was wrong."""
    if name not in PLOTS:
        raise ValueError(f"there is no plot {name!r}, wanted one of {', '.join(PLOTS)}")
    return PLOTS[name](source, *options)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    try:
        if len(words) < 3 or not words[2].endswith(".svg"):
            raise ValueError(
                "wanted PLOT SOURCE OUT.svg, and for timeline the first round and how many"
            )
        Path(words[2]).write_text(draw(words[0], Path(words[1]), *words[3:]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
