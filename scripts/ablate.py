"""Ablations: what each idea is worth, a table each, also where it does not pay.

Knows: which settings, or which pieces taken out (altered.py), are compared. Does not know: how cells are timed
(measure.py) or shown (tables.py). Read next: altered.py.

Tables that are about counts (acceptance, hits, tokens a round) wait for chains and draft anew on a miss, so that
nothing hangs on timing. The others are timed like every comparison. Where nothing else is said K is the last of
Effort.predict_ks and M is BUDGET; the pair is the small one, but for the slow draft, where it is also grown to the
first size.
"""

from measure import Bench, Cell, ratio
from modes import pairs

from sampling import COUPLINGS

BUDGET = 16
HEAT = {"temperature": 1.0}


def ablations(bench: Bench) -> dict:
    out = {"models": {}, "cells": [], "ratios": []}
    with bench.workers() as ask:
        target, draft = bench.grown("target", None), bench.grown("draft", None)
        out["models"][bench.label] = bench.ceiling(ask, target)
        apart = {"target": target, "draft": draft, "device": bench.one, "draft_device": bench.other}
        apart |= {"k": bench.effort.predict_ks[-1], "fan_out": BUDGET}
        for name, work in TABLES.items():
            cells, ratios = work(bench, ask, apart)
            out["cells"] += [{"table": name} | cell for cell in cells]
            out["ratios"] += [{"table": name} | r for r in ratios]
    return out


def counted(bench: Bench, ask, apart: dict, name: str, **how) -> dict:
    """One cell of a table that is about counts."""
    cell = Cell(name, "ssd", apart | {"cut": False, "fallback": "jit"} | how)
    same = {} if cell.how["temperature"] else {"coupling": "any"}  # at temperature 0 they are one
    return bench.count(ask, "ablations", cell, model=bench.label) | same


def couplings(bench: Bench, ask, apart: dict):
    """What joining the randomness gives, and Saguaro, which trades acceptance for hits."""
    cells = []
    for temperature in (0.7, 1.0):
        for coupling in COUPLINGS:
            cells.append(counted(bench, ask, apart, coupling, temperature=temperature, coupling=coupling))
        for c in bench.effort.saguaro_cs:
            how = {"temperature": temperature, "coupling": "independent", "saguaro_c": c}
            cells.append(counted(bench, ask, apart, f"independent, C={c}", **how))
    return cells, []


def lists(bench: Bench, ask, apart: dict):
    """By the scores of the round, by optimal fan-out lists, and the same fan-out for every j, at equal budget."""
    cells = []
    for temperature, coupling in ((0.0, COUPLINGS[0]), *((1.0, coupling) for coupling in COUPLINGS)):
        for M in bench.effort.budgets:
            how = {"temperature": temperature, "coupling": coupling, "fan_out": M}
            if coupling == "shared":
                cells.append(counted(bench, ask, apart, "by scores", **how))
            cells.append(counted(bench, ask, apart, "optimal lists", **how, without=["lists"]))
            cells.append(counted(bench, ask, apart, "uniform lists", **how, without=["uniform lists"]))
    return cells, []


def adaptive(bench: Bench, ask, apart: dict):
    """Lists that are revised as the text goes on, against those of the prior."""
    cells = []
    for temperature, coupling in ((0.0, "shared"), (1.0, "shared"), (1.0, "independent")):
        how = {"temperature": temperature, "coupling": coupling}
        cells.append(counted(bench, ask, apart, "adaptive lists", **how, without=["lists"]))
        cells.append(counted(bench, ask, apart, "fixed lists", **how, without=["fixed lists"]))
    return cells, []


def fallbacks(bench: Bench, ask, apart: dict):
    """On a miss: draft for the rows that missed, or for all; guess; or whichever the engine prefers."""
    e, records, ratios = bench.effort, [], []
    for batch in e.mode_batches:
        cells = [Cell(how, "ssd", apart | HEAT | {"fallback": how}) for how in ("jit", "fast", "auto")]
        whole = Cell("jit for the whole batch", "ssd", apart | HEAT | {"fallback": "jit", "without": ["whole batch"]})
        if batch > 1:
            cells.append(whole)
        bench.time(ask, f"ablations, fallback, batch {batch}", cells, e.repeats, e.new_tokens, batch)
        records += [cell.record(model=bench.label, batch=batch) for cell in cells]
        jit, fast, auto, *rest = cells
        against = [(fast, jit), (auto, jit), (auto, fast), *((jit, cell) for cell in rest)]
        ratios += [{"model": bench.label, "batch": batch, **HEAT, **ratio(a, b)} for a, b in against]
    return records, ratios


def cut(bench: Bench, ask, apart: dict):
    """Chains used as long as they are when the verdict is in, against chains waited for."""
    e, records, ratios = bench.effort, [], []
    for k in e.cut_ks:
        ways = {"cut": True, "waited for": False}
        cells = [Cell(f"{name}, K={k}", "ssd", apart | {"k": k, "cut": way}) for name, way in ways.items()]
        bench.time(ask, "ablations, cut", cells, e.repeats, e.new_tokens)
        records += [cell.record(model=bench.label) for cell in cells]
        ratios.append({"model": bench.label, **ratio(*cells)})
    return records, ratios


def slow_draft(bench: Bench, ask, apart: dict):
    """Pairs with a draft three times as slow: SD, and SSD that cuts its chains, or waits for them, at the K (and M)
    that is best for each, and at equal K with the M that was; and SSD whose K and M the engine chooses."""
    e, without, records, ratios = bench.effort, {"without": ["slow draft"]}, [], []
    for model, pair in pairs(bench, e.sizes[:1]):
        how = apart | pair | without
        turns = {key: value for key, value in how.items() if key != "fan_out"} | {"draft_device": how["device"]}
        both, cells, against = [{"k": k, "fan_out": M} for k in e.slow_ks for M in e.slow_fan_outs], [], []
        plans = {
            "SD": ("sd", turns, [{"k": k} for k in e.slow_ks]),
            "SSD": ("ssd", how, both),
            "SSD, waits": ("ssd", how | {"cut": False}, both),
        }
        for name, (mode, place, grid) in plans.items():
            what = f"ablations, slow draft, {model}"
            best, _ = bench.best(ask, what, [Cell(f"{name}, best", mode, place | at) for at in grid])
            budget = {key: best.how[key] for key in ("fan_out",) if mode == "ssd"}
            equal = [Cell(f"{name}, K={k}", mode, place | {"k": k} | budget) for k in e.slow_ks]
            against += list(zip([best, *equal], cells[: 1 + len(equal)]))  # to SD's, which come first
            cells += [best, *equal]
        chosen = Cell("SSD, auto", "ssd", how | {"k": "auto", "fan_out": "auto"})
        against.append((chosen, cells[0]))
        cells.append(chosen)
        bench.time(ask, what, cells, e.slow_repeats, e.new_tokens)
        records += [cell.record(model=model) for cell in cells]
        ratios += [{"model": model, **ratio(a, b)} for a, b in against]
    return records, ratios


TABLES = {
    "couplings": couplings, "lists": lists, "adaptive": adaptive, "fallback": fallbacks, "cut": cut,
    "slow draft": slow_draft,
}  # fmt: skip
