"""The plots, one message each, as SVG: from a trace of a real run or from committed results; no numbers live in here.

Knows: the layout of a trace file (report.write_trace), colours, axes. Does not know: how anything was measured.

    python generate.py --ssd --trace trace.json
    python scripts/plot.py timeline trace.json docs/timeline.svg --from 12 --rounds 5

A plot is a function from the parsed arguments to a figure, listed in PLOTS; `save` gives the same bytes for the same
input. matplotlib comes with the optional extra: pip install -e ".[plots]".
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

MISTAKE = 2  # exit code, as in generate.py
# One colour per mode in every plot (blue and orange stay apart for colour-blind readers).
AR, SD, SSD = "#6b6b6b", "#1f77b4", "#e8710a"
INK, HIT, MISS = "#222222", "#1a7f37", "#c0182b"
# What runs on the lanes: verification in a neutral tone, preparing in shades of SSD's colour, drafting while the target
# waits in SD's: that is what SD does all the time.
SPANS = {
    "verify": "#c9ced6", "prefill": "#e6e8ec", "extend": "#f9c592", "fork": "#9c4a00", "chain step": SSD, "draft": SD,
}  # fmt: skip
LOOK = {
    "svg.hashsalt": "ssd", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "figure.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip


def save(figure, path: str) -> None:
    """No date, fixed ids, letters as outlines: the same input gives the same file, on any machine and with no fonts."""
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


# ---- the timeline of a run


def read_trace(path: str) -> tuple[dict[int, str], list[dict]]:
    """A trace file -> the lanes' names by thread number, and its spans in order of time, begin and end in ms."""
    try:
        events = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
        lanes = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
        spans = [e | {"begin": e["ts"] / 1e3, "end": (e["ts"] + e["dur"]) / 1e3} for e in events if e["ph"] == "X"]
        known = all(isinstance(s["name"], str) and s["tid"] in lanes for s in spans)
    except OSError as error:
        raise ValueError(f"the trace {path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise ValueError(f"{path} is no trace, wanted a file that `python generate.py --ssd --trace FILE` wrote")
    return lanes, sorted(spans, key=lambda s: s["begin"])


def timeline(args):
    """The lanes of a run over a few rounds: what ran when, and which look-ups hit."""
    lanes, spans = read_trace(args.source)
    verifies = [s for s in spans if s["name"] == "verify"]
    first, count = getattr(args, "from"), args.rounds
    if first < 0 or count < 1 or first + count > len(verifies):
        raise ValueError(
            f"rounds {first} to {first + count - 1} were wanted, but {args.source} has {len(verifies)} rounds: "
            "choose others with --from and --rounds"
        )
    # The verification after the last round is drawn in part: it shows that it starts at once, or what it waits for.
    shown, following = verifies[first : first + count], verifies[first + count : first + count + 1]
    zero, stop = shown[0]["begin"], shown[-1]["end"]
    if following:
        stop = following[0]["begin"] + 0.3 * median(s["end"] - s["begin"] for s in shown)
    used = {s["tid"] for s in spans if s["name"] in SPANS}
    names = {tid: lanes[tid] for tid in sorted(used)}
    height = {tid: len(names) - 1 - place for place, tid in enumerate(names)}  # the target on top
    inside = [s for s in spans if s["name"] in SPANS and s["end"] > zero and s["begin"] < stop]
    lookups = {s["args"]["round"]: s for s in spans if s["name"].startswith("look-up")}
    looked = {n: lookups[n] for n in range(first, first + count) if n in lookups}

    figure, axes = _axes(9.5, 1.5 + 0.75 * len(names))
    for span in inside:
        begin, end = max(span["begin"], zero), min(span["end"], stop)
        axes.barh(height[span["tid"]], end - begin, left=begin - zero, height=0.62, color=SPANS[span["name"]],
                  edgecolor="white", linewidth=0.6)  # fmt: skip
    for lookup in looked.values():
        hit, at = not lookup["args"]["missed"], lookup["begin"] - zero
        top = len(names) - 0.56
        axes.plot([at, at], [-0.4, top], color=HIT if hit else MISS, linewidth=1.1)
        axes.text(at, top + 0.03, "hit" if hit else "miss", color=HIT if hit else MISS, ha="center", va="bottom")
    axes.set_xlim(0, stop - zero)
    axes.set_ylim(-0.45, len(names) - 0.3)
    axes.set_yticks([height[tid] for tid in names], [name.replace(" (", "\n(") for name in names.values()])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"milliseconds since round {first} began")
    axes.set_title(_timeline_title(first, shown, following, looked), pad=14)
    figure.draw_without_rendering()  # the layout, for the widths of the bars
    _name_spans(axes, inside, height, zero, stop, verifies)
    return figure


def _name_spans(axes, inside, height, zero, stop, verifies) -> None:
    """Direct labels, in the bars that have room; a key for the kinds that never have."""
    points_per_ms = axes.get_window_extent().width / axes.figure.dpi * 72 / (stop - zero)
    number = {id(s): n for n, s in enumerate(verifies)}
    step, named = 0, set()
    for span in inside:
        kind, begin, end = span["name"], max(span["begin"], zero), min(span["end"], stop)
        step = step + 1 if kind == "chain step" else 0 if kind == "extend" else step
        n = number.get(id(span))
        labels = {"verify": f"verify {n}|{n}", "chain step": f"chain step {step}|step {step}|{step}"}
        for label in labels.get(kind, kind).split("|"):
            if 4.9 * len(label) + 3 < (end - begin) * points_per_ms:
                axes.text((begin + end) / 2 - zero, height[span["tid"]], label, ha="center", va="center", fontsize=8,
                          color="white" if kind in ("fork", "draft") else INK)  # fmt: skip
                named.add("" if label.isdigit() else kind)
                break
    unnamed = [kind for kind in SPANS if kind not in named and any(s["name"] == kind for s in inside)]
    if unnamed:
        from matplotlib.patches import Patch

        key = [Patch(color=SPANS[kind], label=kind) for kind in unnamed]
        axes.legend(handles=key, loc="upper right", bbox_to_anchor=(1, -0.1), ncols=len(key), frameon=False,
                    handlelength=1, handleheight=1, borderaxespad=0)  # fmt: skip


def _timeline_title(first, shown, following, looked) -> str:
    last = first + len(shown) - 1
    title = f"Rounds {first} to {last}: " if last > first else f"Round {first}: "
    title += f"a verification lasts {median(s['end'] - s['begin'] for s in shown):.1f} ms (median)"
    gaps = {"hit": [], "miss": [], "round": []}
    for n, (before, after) in enumerate(zip(shown, [*shown[1:], *following]), first):
        kind = "round" if n not in looked else "miss" if looked[n]["args"]["missed"] else "hit"
        gaps[kind].append(after["begin"] - before["end"])
    waits = [f"{median(times):.2f} ms after a {kind}" for kind, times in gaps.items() if times]
    return title + ("; the next begins " + ", ".join(waits) if waits else "")


# ---- every plot by its name

PLOTS = {"timeline": timeline}


def _axes(width: float, height: float):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(LOOK)
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one sentence, like every other mistake
        raise ValueError(f"{message} (python scripts/plot.py --help lists the plots)")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="plot.py", description="Draw one plot as SVG.", allow_abbrev=False)
    plots = p.add_subparsers(dest="plot", required=True, metavar="PLOT")
    t = plots.add_parser("timeline", help="the lanes of a run, from a file written by generate.py --trace")
    t.add_argument("source", metavar="TRACE.json", help="what generate.py --trace wrote")
    t.add_argument("out", metavar="OUT.svg", help="the file to write")
    t.add_argument("--from", type=int, default=8, metavar="ROUND", help="the first round drawn, from 0 (8)")
    t.add_argument("--rounds", type=int, default=5, metavar="N", help="how many rounds are drawn (5)")
    return p


def main() -> int:
    try:
        args = parser().parse_args()
        if not args.out.endswith(".svg"):
            raise ValueError(f"the output is {args.out}, wanted a name that ends in .svg: plots are written as SVG")
        save(PLOTS[args.plot](args), args.out)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print('error: matplotlib is not installed, which plots need: pip install -e ".[plots]"', file=sys.stderr)
        return MISTAKE
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
