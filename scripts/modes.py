"""AR, SD and SSD side by side: how fast, with which coupling, how well tuned, and how well foretold.

Knows: these three comparisons. Does not know: how cells are timed (measure.py) or shown (tables.py). Read next:
measure.py.

Where cores are counted, SD and AR have one, or both; SSD always has one for each model. So SSD is compared with SD on
one core (what does a second core give if only the draft may use it?) and with SD on both (what else could it be for?).
"""

from dataclasses import replace
from statistics import median

from measure import Bench, Cell, ratio

from sampling import COUPLINGS

SEVERAL = "both cores"
WITHIN = 0.95  # of the best setting: what tuning is to reach


def pairs(bench: Bench, sizes):
    """The small pair, and the small draft with the target grown to each size."""
    for shape in (None, *sizes):
        yield shape or bench.label, {"target": bench.grown("target", shape), "draft": bench.grown("draft", None)}


def places(bench: Bench) -> list[tuple[str, dict]]:
    """Where models that take turns may run: a suffix for the name, and the devices."""
    suffixes = ("", f" {SEVERAL}")
    return [(suffix, {"device": d, "draft_device": d}) for suffix, d in zip(suffixes, bench.devices)]


def modes(bench: Bench) -> dict:
    """AR, SD and SSD with every coupling, and transformers; the small pair also in batches."""
    e, out = bench.effort, {"models": {}, "cells": [], "ratios": [], "sweeps": []}
    for model, pair in pairs(bench, e.mode_sizes):
        with bench.workers() as ask:
            out["models"][model] = bench.ceiling(ask, pair["target"]) | {"texts": []}
            for temperature in (0.0, 1.0):
                for batch in e.mode_batches if model == bench.label else (1,):
                    labels = {"model": model, "temperature": temperature, "batch": batch}
                    what, cells = f"modes {model} T={temperature} batch {batch}", []
                    for hows in rivals(bench, pair, temperature, batch):
                        cell, sweep = bench.best(ask, what, hows, batch) if len(hows) > 1 else (hows[0], [])
                        out["sweeps"] += [labels | row for row in sweep]
                        cells.append(cell)
                    bench.time(ask, what, cells, e.repeats, e.new_tokens, batch)
                    out["cells"] += [cell.record(**labels) for cell in cells]
                    out["ratios"] += [labels | r for r in at_their_best(cells)]
                    if not temperature:
                        out["models"][model]["texts"].append(bench.same_text(ask, cells[0], cells[1:]))
    return out


def rivals(bench: Bench, pair: dict, temperature: float, batch: int):
    """Lists of cells; of each the fastest takes part. First AR, whose text the others must write at temperature 0."""
    e, heat = bench.effort, {"temperature": temperature}
    alone, ks = {"target": pair["target"]}, [{"k": k} for k in e.mode_ks]
    for suffix, place in places(bench):
        yield [Cell(f"AR{suffix}", "ar", alone | heat | {"device": place["device"]})]
    for coupling in COUPLINGS if temperature else COUPLINGS[:1]:  # at temperature 0 they are one
        join, name = heat | {"coupling": coupling}, f" {coupling}" if temperature else ""
        for suffix, place in places(bench):
            yield [Cell(f"SD{name}{suffix}", "sd", pair | place | join | k) for k in ks]
        apart = pair | {"device": bench.one, "draft_device": bench.other} | join
        yield [Cell(f"SSD{name}", "ssd", apart | k | {"fan_out": M}) for k in ks for M in e.mode_fan_outs]
    tuned = pair | heat | {"k": "auto"}
    yield [Cell("SD auto", "sd", tuned | {"device": bench.one, "draft_device": bench.one})]
    yield [Cell("SSD auto", "ssd", tuned | {"device": bench.one, "draft_device": bench.other, "fan_out": "auto"})]
    for suffix, place in places(bench) if bench.theirs else ():
        yield [Cell(f"transformers{suffix}", "transformers", alone | heat | {"device": place["device"]})]
        if batch == 1:  # more rows it refuses
            theirs = pair | heat | {"device": place["device"], "threshold": 0.0}
            yield [Cell(f"transformers assisted{suffix}", "transformers assisted", theirs | k) for k in ks]


def at_their_best(cells: list[Cell]) -> list[dict]:
    """Ratios between the modes, each with the coupling that was fastest for it; the names say which."""

    def best(peer: str, several: bool) -> Cell | None:
        of = [cell for cell in cells if cell.peer == peer and cell.name.endswith(SEVERAL) == several]
        of = [cell for cell in of if cell.how.get("k") != "auto"]
        return max(of, key=lambda cell: median(cell.rates()), default=None)

    ssd, against = best("ssd", False), []
    for several in (False, True):
        peers = ("sd", "ar", "transformers", "transformers assisted")
        sd, ar, theirs, assisted = (best(peer, several) for peer in peers)
        against += [(ssd, sd), (ssd, ar), (sd, ar), (ssd, assisted), (sd, assisted), (ar, theirs)]
    return [ratio(a, b) for a, b in against if a and b]


def tune(bench: Bench) -> dict:
    """K and M chosen by the engine as it runs, against the best of all combinations, found by trying every one."""
    e, out = bench.effort, {"models": {}, "cells": [], "ratios": [], "sweeps": []}
    for model, pair in pairs(bench, e.sizes):
        with bench.workers() as ask:
            out["models"][model] = bench.ceiling(ask, pair["target"])
            for temperature in (0.0, 1.0):
                for mode in ("sd", "ssd"):
                    labels, name = {"model": model, "temperature": temperature}, mode.upper()
                    how = pair | {"device": bench.one, "draft_device": bench.one, "temperature": temperature}
                    grid, auto = [{"k": k} for k in e.tune_ks], {"k": "auto"}
                    if mode == "ssd":
                        how["draft_device"], auto["fan_out"] = bench.other, "auto"
                        grid = [k | {"fan_out": M} for k in grid for M in e.tune_fan_outs]
                    what = f"tune {model} T={temperature}"
                    best, sweep = bench.best(ask, what, [Cell(f"{name} best", mode, how | at) for at in grid])
                    cells = [Cell(f"{name} auto", mode, how | auto), best]
                    bench.time(ask, what, cells, e.tune_pairs, e.tune_tokens)
                    out["sweeps"] += [labels | row for row in sweep]
                    out["cells"] += [cell.record(**labels) for cell in cells]
                    out["ratios"].append(labels | as_good(ratio(*cells)))
    return out


def as_good(found: dict) -> dict:
    """Within 5% of the best, or not to be told from it?"""
    return found | {"good": found["median"] >= WITHIN or found["high"] >= 1}


def prediction(bench: Bench) -> dict:
    """The speed model's forecast from the first rounds of a run against the rest of the run, prompt by prompt."""
    e, out = bench.effort, {"models": {}, "cells": [], "points": []}
    for model, pair in pairs(bench, e.sizes[:1]):
        with bench.workers() as ask:
            out["models"][model] = bench.ceiling(ask, pair["target"])
            for temperature in (0.0, 1.0):
                both = {"temperature": temperature, "k": "auto"}
                turns = pair | both | {"device": bench.one, "draft_device": bench.one}
                apart = pair | both | {"device": bench.one, "draft_device": bench.other, "fan_out": "auto"}
                cells = [Cell("SD", "sd", turns), Cell("SSD", "ssd", apart)]
                bench.time(ask, f"prediction {model} T={temperature}", cells, e.long_prompts, e.long_tokens)
                labels = {"model": model, "temperature": temperature}
                for cell in cells:
                    judged = [run for run in cell.runs if "prediction_error" in run["stats"]]
                    for stats in (run["stats"] for run in judged):
                        told = {"predicted": "predicted", "alone": "alone", "measured": "rest"}
                        point = {key: stats[f"{of}_tokens_per_s"] for key, of in told.items()}
                        out["points"].append(labels | {"name": cell.name} | point)
                    out["cells"].append(replace(cell, runs=judged or cell.runs).record(**labels, judged=len(judged)))
    for name in dict.fromkeys(point["name"] for point in out["points"]):
        points = [point for point in out["points"] if point["name"] == name]
        off = lambda of: median(abs(p[of] / p["measured"] - 1) for p in points)  # noqa: E731, B023
        errors = {"prediction_error": off("predicted"), "alone_error": off("alone")}
        out["cells"].append({"model": "all", "name": name, "judged": len(points)} | errors)
    return out
