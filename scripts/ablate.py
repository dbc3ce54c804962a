"""Ablations: what each idea is worth, a table each, also where it does not pay.

Knows: which settings, or which pieces taken out (altered.py), are compared. Does not know: how cells are timed
(measure.py) or shown (tables.py). Read next: altered.py.

Tables that are about counts (acceptance, hits, tokens a round) wait for chains and draft anew on a miss, so that
nothing hangs on timing. The others are timed like every comparison. Where nothing else is said K is Effort.predict_k
and M is BUDGET; the pair is the small one.
"""

from measure import Bench, Cell, ratio

from sampling import COUPLINGS

BUDGET = 16
HEAT = {"temperature": 1.0}
CUT_KS = (2, 4, 8)


def ablations(bench: Bench) -> dict:
    out = {"models": {}, "cells": [], "ratios": []}
    with bench.workers() as ask:
        target, draft = bench.grown("target", None), bench.grown("draft", None)
        out["models"][bench.label] = bench.ceiling(ask, target)
        apart = {"target": target, "draft": draft, "device": bench.one, "draft_device": bench.other}
        apart |= {"k": bench.effort.predict_k, "fan_out": BUDGET}
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
    """Optimal fan-out lists against the same fan-out for every outcome, at equal budget."""
    cells = []
    for temperature, coupling in ((0.0, COUPLINGS[0]), *((1.0, coupling) for coupling in COUPLINGS)):
        for M in bench.effort.budgets:
            how = {"temperature": temperature, "coupling": coupling, "fan_out": M}
            cells.append(counted(bench, ask, apart, "optimal lists", **how))
            cells.append(counted(bench, ask, apart, "uniform lists", **how, without=["uniform lists"]))
    return cells, []


def adaptive(bench: Bench, ask, apart: dict):
    """Lists that are revised as the text goes on, against those of the prior."""
    cells = []
    for temperature, coupling in ((0.0, "shared"), (1.0, "shared"), (1.0, "independent")):
        how = {"temperature": temperature, "coupling": coupling}
        cells.append(counted(bench, ask, apart, "adaptive lists", **how))
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
    for k in CUT_KS:
        ways = {"cut": True, "waited for": False}
        cells = [Cell(f"{name}, K={k}", "ssd", apart | {"k": k, "cut": way}) for name, way in ways.items()]
        bench.time(ask, "ablations, cut", cells, e.repeats, e.new_tokens)
        records += [cell.record(model=bench.label) for cell in cells]
        ratios.append({"model": bench.label, **ratio(*cells)})
    return records, ratios


def slow_draft(bench: Bench, ask, apart: dict):
    """The same pair with a draft three times as slow: SD, and SSD that cuts its chains, or waits for them."""
    e, without = bench.effort, {"without": ["slow draft"]}
    turns = {key: value for key, value in apart.items() if key != "fan_out"} | {"draft_device": apart["device"]}
    plans = {"SD": ("sd", turns), "SSD": ("ssd", apart), "SSD, waits": ("ssd", apart | {"cut": False})}
    at_best, by_k = [], {}
    for name, (mode, how) in plans.items():
        grid = [Cell(f"{name}, best K", mode, how | without | {"k": k}) for k in e.slow_ks]
        at_best.append(bench.best(ask, "ablations, slow draft", grid)[0])
        by_k[name] = [Cell(f"{name}, K={k}", mode, how | without | {"k": k}) for k in e.slow_ks]
    cells = [*at_best, *sum(by_k.values(), [])]
    bench.time(ask, "ablations, slow draft", cells, e.repeats, e.new_tokens)
    sd, *others = at_best
    against = [(cell, sd) for cell in others]
    against += [(cell, same) for name in plans if name != "SD" for cell, same in zip(by_k[name], by_k["SD"])]
    return [c.record(model=bench.label) for c in cells], [{"model": bench.label, **ratio(a, b)} for a, b in against]


TABLES = {
    "couplings": couplings, "lists": lists, "adaptive": adaptive, "fallback": fallbacks, "cut": cut,
    "slow draft": slow_draft,
}  # fmt: skip
