"""The plots, one message each, as SVG: from a trace of a real run or from committed results; no numbers live in here.

Knows: the layout of a trace file (report.write_trace) and of a file of results (bench.py), colours, axes. Does not
know: how anything was measured. Read next: bench.py.

    python generate.py --ssd --trace trace.json
    python scripts/plot.py timeline trace.json docs/timeline.svg --from 12 --rounds 5
    python scripts/plot.py waterfall results/cpu_modes.json docs/waterfall.svg
    python scripts/plot.py speed-by-k results/cpu_tune.json docs/speed-by-k.svg
    python scripts/plot.py hits-by-budget results/cpu_ablations.json docs/hits-by-budget.svg

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
COUPLINGS = {"any": INK, "shared": "#7b3fa0", "maximal": "#1b8a8a", "independent": "#a0752c"}
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


# ---- plots of results


def read_part(path: str, part: str) -> dict:
    """One part of a file of results, as bench.py wrote it."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["parts"][part]
        if not found["cells"]:
            raise ValueError("it is empty")
        return found
    except OSError as error:
        raise ValueError(f"the results {path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        make = f"python scripts/bench.py --only {part} --out {path}"
        raise ValueError(f"{path} holds no results of the part {part}, wanted a file that `{make}` wrote") from error


def rate(cell: dict) -> float:
    return cell["tokens_per_s"]["median"]


def colour_of(name: str) -> str:
    return {"AR": AR, "SD": SD, "SSD": SSD}.get(name.split()[0], "#b9bec6")


def waterfall(args):
    """A bar for each way to decode, from the plainest on, at one place: the first model, greedy, one prompt."""
    cells = read_part(args.source, "modes")["cells"]
    first = {key: cells[0][key] for key in ("model", "temperature", "batch")}
    cells = [cell for cell in cells if all(cell[key] == value for key, value in first.items())]
    order = ("transformers", "AR", "SD", "SSD")
    several = lambda name: name.endswith("both cores")  # noqa: E731
    cells.sort(key=lambda c: (order.index(c["name"].split()[0]), "auto" in c["name"], several(c["name"])))
    base = rate(next((cell for cell in cells if cell["name"] == "AR"), cells[0]))
    figure, axes = _axes(8, 0.7 + 0.32 * len(cells))
    for place, cell in enumerate(reversed(cells)):
        middle, low, high = (cell["tokens_per_s"][key] for key in ("median", "low", "high"))
        axes.barh(place, middle, height=0.7, color=colour_of(cell["name"]), xerr=[[middle - low], [high - middle]],
                  error_kw={"ecolor": INK, "elinewidth": 0.8})  # fmt: skip
        axes.text(max(middle, high), place, f"  {middle:.0f} ({middle / base:.2f}x)", va="center")
    axes.set_yticks(range(len(cells)), [_named(cell) for cell in reversed(cells)])
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.15)
    axes.set_xlabel("tokens/s, median and interval of the repeats (times plain decoding on one core)")
    axes.set_title(f"{first['model']}, temperature {first['temperature']:g}, batch {first['batch']}")
    return figure


def _label(axes, ends: list[tuple]) -> None:
    """Names at the right ends of lines, (x, y, name, colour), moved up where they would lie on each other."""
    axes.figure.draw_without_rendering()  # the layout, for the height of a line of text
    line = 11 / (axes.get_window_extent().height / axes.figure.dpi * 72) * (axes.get_ylim()[1] - axes.get_ylim()[0])
    above = float("-inf")
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        above = max(y, above + line)
        axes.text(x, above, f"  {name}", color=colour, va="center")


def _named(cell: dict) -> str:
    settings = [f"{letter}={cell[key]}" for letter, key in (("K", "k"), ("M", "fan_out")) if type(cell.get(key)) is int]
    return f"{cell['name']} ({', '.join(settings)})" if settings else cell["name"]


def speed_by_k(args):
    """SD and SSD at every K (SSD with the M that is best for that K), and what the engine reached on its own."""
    part = read_part(args.source, "tune")
    models, heats = (list(dict.fromkeys(row[key] for row in part["sweeps"])) for key in ("model", "temperature"))
    figure, grid = _axes(2.9 * len(models) + 1, 2.5 * len(heats) + 0.3, len(heats), len(models))
    for axes, (heat, model) in zip(grid.flat, [(heat, model) for heat in heats for model in models]):
        here, ends = lambda row: row["model"] == model and row["temperature"] == heat, []
        for name, mode in (("SD", "sd"), ("SSD", "ssd")):
            speeds = {}
            for row in (row for row in part["sweeps"] if here(row) and row["peer"] == mode):
                speeds[row["k"]] = max(speeds.get(row["k"], 0), row["tokens_per_s"])
            ks = sorted(speeds)
            axes.plot(ks, [speeds[k] for k in ks], color=colour_of(name), marker="o", markersize=3)
            ends.append((ks[-1], speeds[ks[-1]], name, colour_of(name)))
            for ratio in (r for r in part["ratios"] if here(r) and r["of"] == f"{name} auto"):
                used = next(c["k_used"] for c in part["cells"] if here(c) and c["name"] == ratio["of"])
                best = max(speeds.values())
                middle, low, high = (best * ratio[key] for key in ("median", "low", "high"))
                axes.errorbar(used, middle, [[middle - low], [high - middle]], color=colour_of(name), marker="*",
                              linestyle="none", markersize=11, markeredgecolor=INK, elinewidth=0.8)  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.margins(x=0.15)
        _label(axes, ends)
        axes.set_xticks(sorted({row["k"] for row in part["sweeps"]}))
        axes.set_title(f"{model}, temperature {heat:g}")
    figure.supxlabel("K; the stars: what the engine chose and reached by itself", size=9)
    figure.supylabel("tokens/s", size=9)
    return figure


def hits_by_budget(args):
    """Hits against M, a colour for each coupling; by scores solid, optimal lists dashed, uniform ones dotted."""
    cells = [cell for cell in read_part(args.source, "ablations")["cells"] if cell.get("table") == "lists"]
    (figure, axes), ends = _axes(6.5, 4), []
    for heat, coupling in dict.fromkeys((cell["temperature"], cell["coupling"]) for cell in cells):
        named = False
        for lists, line in (("by scores", "-"), ("optimal lists", "--"), ("uniform lists", ":")):
            mine = [c for c in cells if (c["temperature"], c["coupling"], c["name"]) == (heat, coupling, lists)]
            if not mine:
                continue
            M, hits = [c["fan_out"] for c in mine], [100 * c["hit_rate"] for c in mine]
            axes.plot(M, hits, line, color=COUPLINGS[coupling], marker="o", markersize=3)
            if not named:  # the best way of a coupling comes first
                named = True
                name = "temperature 0" if coupling == "any" else f"{coupling}, {heat:g}"
                ends.append((M[-1], hits[-1], name, COUPLINGS[coupling]))
    axes.set_ylim(0, 100)
    axes.margins(x=0.2)
    _label(axes, ends)
    axes.set_xticks(sorted({cell["fan_out"] for cell in cells}))
    axes.set_xlabel("M, outcomes prepared a round")
    axes.set_ylabel("hits, % of the rounds")
    axes.set_title(f"K = {cells[0]['k']}: by scores (solid), by optimal (dashed) and uniform lists (dotted)")
    return figure


def hits_by_acceptance(args):
    """Saguaro's trade: as C falls the independent coupling hits more and accepts less; the other two for comparison."""
    cells = [cell for cell in read_part(args.source, "ablations")["cells"] if cell.get("table") == "couplings"]
    figure, axes = _axes(6.5, 4)
    for heat, marker, line in zip(dict.fromkeys(cell["temperature"] for cell in cells), "os^", ("-", "--", ":")):
        path = []
        for cell in (cell for cell in cells if cell["temperature"] == heat):
            at, coupling = (100 * cell["acceptance_rate"], 100 * cell["hit_rate"]), cell["coupling"]
            path += [(cell.get("saguaro_c", 1), at)] if coupling == "independent" else []
            axes.plot(*at, marker, color=COUPLINGS[coupling])
            name = f"C={cell.get('saguaro_c', 1):g}" if coupling == "independent" else f"{coupling}, T={heat:g}"
            axes.annotate(f"{name}", at, (5, 4), textcoords="offset points", color=COUPLINGS[coupling], size=8)
        path = [at for _, at in sorted(path, reverse=True)]
        axes.plot(*zip(*path), line, color=COUPLINGS["independent"])
        axes.annotate(f"independent, T={heat:g}", path[0], (5, -11), textcoords="offset points", size=8,
                      color=COUPLINGS["independent"])  # fmt: skip
    axes.margins(0.15)
    axes.set_xlabel("acceptance, %")
    axes.set_ylabel("hits, % of the rounds")
    axes.set_title(f"K = {cells[0]['k']}, M = {cells[0]['fan_out']}: what weighing down by C trades for what")
    return figure


def prediction(args):
    """A point for each prompt: what was foretold from its first rounds, and what the rest of it came to."""
    part = read_part(args.source, "prediction")
    figure, axes = _axes(5, 4.6)
    for name in ("SD", "SSD"):
        points = [(p["predicted"], p["measured"]) for p in part["points"] if p["name"] == name]
        errors = [abs(foretold / measured - 1) for foretold, measured in points]
        label = f"{name}: median error {median(errors):.1%} of {len(points)} prompts" if points else name
        axes.plot(*zip(*points or [((), ())]), "o", color=colour_of(name), markersize=4, alpha=0.8, label=label)
    most = axes.dataLim.max.max() * 1.15
    axes.fill_between([0, most], [0, 0.9 * most], [0, 1.1 * most], color="#e6e8ec", linewidth=0)
    axes.plot([0, most], [0, most], color=AR, linewidth=0.8)
    axes.set(xlim=(0, most), ylim=(0, most), xlabel="predicted tokens/s", ylabel="measured tokens/s, rest of the run")
    axes.legend(loc="upper left", frameon=False, handletextpad=0.2)
    axes.set_title("From the first 32 rounds; the band is 10% wide on each side")
    return figure


# ---- every plot by its name

OF_RESULTS = {
    "waterfall": waterfall, "speed-by-k": speed_by_k, "hits-by-budget": hits_by_budget,
    "hits-by-acceptance": hits_by_acceptance, "prediction": prediction,
}  # fmt: skip
PLOTS = {"timeline": timeline} | OF_RESULTS


def _axes(width: float, height: float, rows: int = 1, columns: int = 1):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(LOOK)
    from matplotlib import pyplot

    shape = {"squeeze": False} if rows * columns > 1 else {}
    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", **shape)


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
    for name, work in OF_RESULTS.items():
        r = plots.add_parser(name, help=work.__doc__.split(":")[0].split(";")[0])
        r.add_argument("source", metavar="RESULTS.json", help="what bench.py wrote")
        r.add_argument("out", metavar="OUT.svg", help="the file to write")
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
