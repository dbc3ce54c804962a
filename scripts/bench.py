"""Speed, overlap and predictability, measured on this machine against what one would use instead.

Knows: what is compared with what. Does not know: how cells are timed (measure.py), how an engine is called (peers.py),
how tables look (tables.py). Read next: PARTS and the functions it names, then measure.py.

    python scripts/bench.py --quick                                          under 3 minutes on 2 cores
    python scripts/bench.py --only plain,overlap --prompts P.jsonl --out results/cpu.json
    python scripts/bench.py --show results/cpu.json                          the tables again, from the file alone

Everything is float32, and greedy where no temperature is said. One repeat runs every cell of a comparison once on the
same prompts, in an order that turns round each time; a ratio is the median of the repeats' own ratios. Its interval
comes from order statistics: 95% or a little more from 6 repeats on, with fewer simply the lowest and the highest.
"""

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from ablate import ablations  # noqa: E402
from measure import Bench, Cell, environment, ratio  # noqa: E402
from modes import modes, prediction, tune  # noqa: E402
from peers import NGRAM  # noqa: E402
from tables import headline, render  # noqa: E402

from generate import DEMO  # noqa: E402

INTERRUPTED, MISTAKE = 130, 2
DRAFT_STEP_SHARE = 0.25  # of a verification, for the pair on which SSD is to show what it can
# Shapes that the draft is grown to in search of that share; the target beside it is the first of Effort.sizes. They
# grow in depth: a wide draft spends its time reading weights, and two cores that share a memory cannot read twice as
# fast as one.
DRAFT_SHAPES = ("layers=4", "layers=6", "layers=8", "layers=10", "layers=12")


@dataclass(frozen=True)
class Effort:
    """How much is measured. `sizes` are shapes of inflation.py that the target is grown to."""

    sizes: tuple[str, ...] = ("60m", "200m")
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 7
    plain_tokens: int = 64
    pairs: int = 24
    new_tokens: int = 128
    sweep_prompts: int = 6
    sweep_tokens: int = 64
    ks: tuple[int, ...] = (1, 2, 3, 4, 5)  # overlap
    overlap_prompts: int = 16  # of its sweeps: a K that is too long for its chains costs more than all noise
    fan_outs: tuple[int, ...] = (4, 6, 8, 16, 24)
    assisted_ks: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    assisted_prompts: int = 8  # of its sweeps
    assisted_repeats: int = 16  # each another prompt: how much there is to repeat differs from text to text
    assisted_fan_outs: tuple[int, ...] = (8, 24)
    thresholds: tuple[float, ...] = (0.0, 0.4)  # 0.4 is transformers' default
    lookup_ks: tuple[int, ...] = (2, 4, 8)
    quarter: bool = True  # overlap also on a pair whose draft step is a quarter of a verification
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    budgets: tuple[int, ...] = (4, 8, 16, 24, 32)
    predict_ks: tuple[int, ...] = (1, 2, 4)
    predict_batch: int = 8
    predict_batches: int = 4
    mode_sizes: tuple[str, ...] = ("60m",)
    mode_batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    mode_ks: tuple[int, ...] = (1, 2, 3, 4, 6)
    mode_fan_outs: tuple[int, ...] = (8, 16)
    tune_ks: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8)
    tune_fan_outs: tuple[int, ...] = (2, 4, 8, 16, 24)
    tune_pairs: int = 24
    tune_tokens: int = 128
    long_prompts: int = 16  # prediction: runs that are long enough for a rest behind the first rounds
    long_tokens: int = 320
    saguaro_cs: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)
    cut_ks: tuple[int, ...] = (2, 4, 8)
    slow_ks: tuple[int, ...] = (1, 2, 4, 8)
    slow_fan_outs: tuple[int, ...] = (4, 16)
    slow_repeats: int = 12


FULL = Effort()
QUICK = Effort(
    sizes=(), batches=(1, 8), repeats=5, plain_tokens=24, pairs=6, new_tokens=24, sweep_prompts=1, sweep_tokens=16,
    ks=(1, 2, 4), fan_outs=(4, 8), overlap_prompts=1, assisted_ks=(2, 4), assisted_fan_outs=(8,), thresholds=(0.0,),
    assisted_prompts=1, assisted_repeats=5, lookup_ks=(4,), quarter=False, temperatures=(0.0, 1.0), budgets=(8, 24),
    predict_batch=4, predict_batches=1, mode_sizes=(), mode_batches=(1,), mode_ks=(2,), mode_fan_outs=(8,),
    tune_ks=(1, 2), tune_fan_outs=(8,), predict_ks=(1, 2), tune_pairs=6, tune_tokens=32, long_prompts=2,
    long_tokens=144, saguaro_cs=(0.25,), cut_ks=(4,), slow_ks=(2,), slow_fan_outs=(4,), slow_repeats=5,
)  # fmt: skip

BRIEF = Effort(
    repeats=5, pairs=20, new_tokens=64, sweep_prompts=4, sweep_tokens=64, ks=(1, 2, 3, 4), fan_outs=(4, 6, 8),
    assisted_ks=(2, 4, 8), assisted_fan_outs=(4, 8), lookup_ks=(4,), predict_batches=2, mode_batches=(1, 4, 16),
    mode_ks=(1, 2, 4), mode_fan_outs=(4, 16), tune_ks=(1, 2, 3, 4, 6), tune_fan_outs=(4, 8, 16), tune_pairs=12,
    tune_tokens=96, long_prompts=12, long_tokens=256,
)  # fmt: skip
EFFORTS = {"quick": QUICK, "brief": BRIEF, "full": FULL}


# ---- the parts


def plain(bench: Bench) -> dict:
    """Plain decoding: ours against transformers' generate."""
    e, out = bench.effort, {"models": {}, "cells": [], "ratios": []}
    for shape in (None, *e.sizes):
        model, target = shape or bench.label, bench.grown("target", shape)
        with bench.workers() as ask:
            out["models"][model] = ceiling = bench.ceiling(ask, target)
            texts = []
            for batch in e.batches:
                cells = []
                for device in bench.devices:
                    for peer in ("ar", "transformers")[: 2 if bench.theirs else 1]:
                        cells.append(Cell(f"{peer} {device}", peer, {"target": target, "device": device}))
                bench.time(ask, f"plain {model} batch {batch}", cells, e.repeats, e.plain_tokens, batch)
                for cell in cells:
                    record = cell.record(model=model, batch=batch)
                    most = ceiling["steps_per_s"][cell.how["device"]] * batch
                    out["cells"].append(record | {"of_bandwidth": record["tokens_per_s"]["median"] / most})
                for mine, theirs in zip(cells[::2], cells[1::2]) if bench.theirs else ():
                    labels = {"model": model, "batch": batch, "device": mine.how["device"]}
                    out["ratios"].append(labels | ratio(mine, theirs))
                texts.append(bench.same_text(ask, cells[0], cells[1:]))
            ceiling["texts"] = texts
    return out


def overlap(bench: Bench) -> dict:
    """AR, SD and SSD where target and draft have a core each, and SD and AR with both cores for each model."""
    if bench.both is None:
        raise ValueError("the part overlap needs two cores, this process may use one: leave it out with --only")
    e, out = bench.effort, {"models": {}, "cells": [], "ratios": [], "sweeps": []}
    pairs = [(bench.label, bench.grown("target", None), bench.grown("draft", None))]
    if e.quarter:
        pairs.append(quarter_pair(bench, out))
    for model, target, draft in pairs:
        with bench.workers() as ask:
            pair, what, ceiling = {"target": target, "draft": draft}, f"overlap {model}", bench.ceiling(ask, target)
            on_one, on_both = (pair | {"device": d, "draft_device": d} for d in (bench.one, bench.both))
            apart = pair | {"device": bench.one, "draft_device": bench.other}
            plans = {
                "SD": ("sd", on_one, [{"k": k} for k in e.ks]),
                "SD both cores": ("sd", on_both, [{"k": k} for k in e.ks]),
                "SSD": ("ssd", apart, [{"k": k, "fan_out": M} for k in e.ks for M in e.fan_outs]),
            }
            fastest = []
            for name, (mode, how, grid) in plans.items():
                places = [Cell(name, mode, how | place) for place in grid]
                cell, sweep = bench.best(ask, what, places, prompts=e.overlap_prompts)
                fastest.append(cell)
                out["sweeps"] += [{"model": model, **row} for row in sweep]
            sd, sd_both, ssd = fastest
            sd_same = Cell("SD at SSD's K", "sd", on_one | {"k": ssd.how["k"]})
            ar = Cell("AR", "ar", {"target": target, "device": bench.one})
            ar_both = Cell("AR both cores", "ar", {"target": target, "device": bench.both})
            cells = [ar, sd, sd_same, ssd, ar_both, sd_both]
            bench.time(ask, what, cells, e.pairs, e.new_tokens)
            against = ((ssd, sd), (ssd, sd_same), (ssd, ar), (sd, ar), (sd_both, ar_both), (ssd, sd_both))
            ratios = [{"model": model, **ratio(a, b)} for a, b in against]
            out["ratios"] += ratios
            records = {cell.name: cell.record(model=model) for cell in cells}
            out["cells"] += records.values()
            ceiling["texts"] = [bench.same_text(ask, ar, cells[1:])]
            out["models"][model] = ceiling | judge(records["SSD"], records["SD at SSD's K"], ratios)
    return out


def quarter_pair(bench: Bench, out: dict) -> tuple[str, str, str]:
    """The target grown to the first size, and the draft grown until its step is about a quarter of a verification."""
    target, k = bench.grown("target", bench.effort.sizes[0]), 2
    tried = []
    for shape in DRAFT_SHAPES:
        how = {"target": target, "draft": bench.grown("draft", shape), "device": bench.one, "draft_device": bench.one}
        with bench.workers() as ask:
            cell = Cell("SD", "sd", how | {"k": k})
            bench.time(ask, f"draft {shape}", [cell], 2, bench.effort.sweep_tokens)
        record = cell.record()
        tried.append({"draft": shape, "step_over_verify": record["draft_ms"] / k / record["verify_ms"]})
    chosen = min(tried, key=lambda row: abs(row["step_over_verify"] - DRAFT_STEP_SHARE))
    out["draft_shapes"] = {"tried": tried, "chosen": chosen}
    return f"{bench.effort.sizes[0]} / grown draft", target, bench.grown("draft", chosen["draft"])


def judge(ssd: dict, sd: dict, ratios: list[dict]) -> dict:
    """The ceiling of SSD over SD at the same K (speed.py), with the rounds as long as they came out.

    A verification lasts as long as it does beside a busy draft; beside an idle one the ceiling would be higher.
    """
    tokens = ssd["tokens_per_round"] / sd["tokens_per_round"]
    most, alone = ((1 + sd["draft_ms"] / run["verify_ms"]) * tokens for run in (ssd, sd))
    got = next(r["median"] for r in ratios if (r["of"], r["to"]) == (ssd["name"], sd["name"]))
    return {
        "ssd_over_sd_ceiling": most,
        "share_of_ceiling": got / most,
        "ceiling_if_lanes_were_free": alone,
        "hit_round_over_verify": ssd.get("hit_round_over_verify"),
        "hidden": ssd["hidden"],
        "draft_step_over_verify": sd["draft_ms"] / sd["k"] / sd["verify_ms"],
    }


def predict(bench: Bench) -> dict:
    """Acceptance, hits and tokens a round. Chains are waited for and misses drafted anew: nothing hangs on timing."""
    e, target, draft = bench.effort, bench.grown("target", None), bench.grown("draft", None)
    out = {"models": {}, "cells": []}
    device = bench.both or bench.one
    how = {"target": target, "draft": draft, "device": device, "draft_device": device, "cut": False, "fallback": "jit"}
    with bench.workers() as ask:
        out["models"][bench.label] = bench.ceiling(ask, target)
        for temperature in e.temperatures:
            for coupling in ("shared", "maximal", "independent") if temperature else ("shared",):
                for k, M in itertools.product(e.predict_ks, e.budgets):
                    this = how | {"k": k, "fan_out": M, "temperature": temperature, "coupling": coupling}
                    cell = Cell(f"predict T={temperature} {coupling} K={k} M={M}", "ssd", this)
                    same = {} if temperature else {"coupling": "any"}  # at temperature 0 they are one
                    out["cells"].append(bench.count(ask, "predict", cell, model=bench.label) | same)
    return out


def assisted(bench: Bench) -> dict:
    """SD and SSD against transformers' assisted generation, with equal cores in total and a K of its own for each."""
    e, out = bench.effort, {"models": {}, "cells": [], "ratios": [], "sweeps": []}
    for shape in (None, *e.sizes[-1:]):
        model, target, draft = shape or bench.label, bench.grown("target", shape), bench.grown("draft", None)
        with bench.workers() as ask:
            ceiling, pair = bench.ceiling(ask, target), {"target": target, "draft": draft}
            taking_turns = [pair | {"device": d, "draft_device": d} for d in bench.devices]
            alone = [{"target": target, "device": d} for d in bench.devices]
            apart = pair | {"device": bench.one, "draft_device": bench.other}
            plans = {
                "sd": [how | {"k": k} for how in taking_turns for k in (*e.assisted_ks, "auto")],
                "ssd": [apart | {"k": k, "fan_out": M} for k in e.assisted_ks for M in e.assisted_fan_outs]
                + [apart | {"k": "auto", "fan_out": "auto"}],
                NGRAM: [how | {"k": k} for how in alone for k in e.lookup_ks],
                "ar": alone,
            }
            if bench.theirs:
                plans["transformers"] = alone
                plans["transformers assisted"] = [how | {"draft": draft, "k": k, "threshold": t} for how in alone
                                                  for k in e.assisted_ks for t in e.thresholds]  # fmt: skip
                plans["transformers lookup"] = [how | {"k": k} for how in alone for k in e.lookup_ks]
            what, cells = f"assisted {model}", []
            for peer, hows in plans.items():
                cell, sweep = bench.best(ask, what, [Cell(peer, peer, how) for how in hows], prompts=e.assisted_prompts)
                out["sweeps"] += [{"model": model, **row} for row in sweep]
                cells.append(cell)
            bench.time(ask, what, cells, e.assisted_repeats, e.new_tokens)
            by = {cell.peer: cell for cell in cells}
            against = [to for to in ("transformers assisted", "transformers lookup", "transformers", "ar") if to in by]
            for mine in ("ssd", "sd", NGRAM):
                out["ratios"] += [{"model": model, **ratio(by[mine], by[to])} for to in against if mine in by]
            out["cells"] += [cell.record(model=model) for cell in cells]
            out["models"][model] = ceiling | {"texts": [bench.same_text(ask, by.pop("ar"), list(by.values()))]}
    return out


PARTS = {
    "plain": plain, "overlap": overlap, "predict": predict, "assisted": assisted, "modes": modes, "tune": tune,
    "prediction": prediction, "ablations": ablations,
}  # fmt: skip


# ---- the program


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = p.add_argument
    add("--only", metavar="PART[,PART]", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} (default: all)")
    add("--effort", choices=EFFORTS, default="full", help="how many sizes, settings, prompts and repeats: a part takes "
        "about 20 seconds, 4 to 20 minutes, or longer on 2 cores")  # fmt: skip
    add("--quick", dest="effort", action="store_const", const="quick", help="--effort quick: under 3 minutes in all")
    add("--target", metavar="DIR", default=str(DEMO / "target"), help="a small checkpoint (default: the demo pair's)")
    add("--draft", metavar="DIR", default=str(DEMO / "draft"), help="its draft")
    add("--prompts", metavar="FILE", dest="prompt_file", help='.jsonl with a "prompt" a line (default: built in)')
    add("--out", metavar="FILE", help="write all results as JSON, after every part")
    add("--show", metavar="FILE", help="print the tables of such a file and measure nothing")
    return p


def run_parts(args, effort: Effort) -> dict:
    """Run the chosen parts; what is done is on disk even if a later part fails."""
    chosen = args.only.split(",")
    if wrong := [name for name in chosen if name not in PARTS]:
        raise ValueError(f"--only names {wrong[0]!r}, wanted some of {', '.join(PARTS)}, with commas between them")
    if args.out and not Path(args.out).resolve().parent.is_dir():
        raise ValueError(f"{args.out} cannot be written, its folder does not exist: create it first")
    results = {"environment": environment(), "effort": asdict(effort), "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, effort, Path(folder))
        results |= {"prompt_tokens": list(map(len, bench.prompts)), "skipped": bench.skipped}
        for name in PARTS:
            if name in chosen:
                results["parts"][name] = PARTS[name](bench)
                if args.out:
                    Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    return results


def read_results(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as results ({error}): give a file written with --out") from error


def main(argv: list[str] | None = None, effort: Effort | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        effort = effort or EFFORTS[args.effort]
        results = read_results(args.show) if args.show else run_parts(args, effort)
    except ValueError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    except RuntimeError as error:  # a measurement that failed; earlier parts are in the file
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    print(render(results))
    print(json.dumps(headline(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
