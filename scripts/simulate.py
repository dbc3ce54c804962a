"""How fast the loop would be: played against a clock, with times and chances measured, published or assumed.

Knows: what is asked of the clock, and the tables. Does not know: how a round is played (clock.py), what was published
and what is fitted to it (published.py). Read next: clock.py, then simulate() below.

    python scripts/simulate.py --run results/cpu_overlap_quick.json     our own measured runs, from the parts of a round
    python scripts/simulate.py --verify-ms 18.3 --step-ms 2 --acceptance 0.8 --k 5 --fan-out 24 --batch 4
    python scripts/simulate.py --verify-ms 18.3 --step-ms 2 --profiles results/cpu_predict.json
    python scripts/simulate.py --paper --ask --out results/simulated_paper.json

--run takes verification, drafting, waiting, acceptance and hits from each cell of the parts `overlap` and `modes` and
asks whether the loop, played with them, gives the tokens per second that were measured beside them. --paper fits three
free numbers a pair and prints every error. --ask answers what needs more GPUs than there are here.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import published  # noqa: E402
from clock import FALLBACKS, Plan, Profile, Times, play  # noqa: E402

MISTAKE = 2  # exit code, as in generate.py
MEASURED = ("overlap", "modes")  # the parts of scripts/bench.py that time the modes
SHOWN = ("model", "name", "peer", "device", "temperature", "batch", "k", "fan_out")
DIGITS = 4  # of every number written
NEEDED = {  # of a measured cell, by mode
    "ar": ("verify_ms", "round_ms"),
    "sd": ("k", "verify_ms", "draft_ms", "exposed_ms", "acceptance_rate"),
    "ssd": ("k", "fan_out", "verify_ms", "exposed_ms", "extend_ms", "chain_step_ms", "acceptance_rate", "hit_rate"),
}


# ---- our own runs


def measured_times(cell: dict, cells: list[dict]) -> Times:
    """The parts of this cell's rounds; drafting after a miss takes as long as in SD with the same K, if known."""
    ms = {key: cell[key] / 1e3 for key in NEEDED[cell["peer"]] if key.endswith("_ms")}
    verify = ms["verify_ms"]
    if cell["peer"] == "ar":
        return Times(verify, 0.0, handover=max(0.0, ms["round_ms"] - verify))
    if cell["peer"] == "sd":
        return Times(verify, ms["draft_ms"] / cell["k"], handover=max(0.0, ms["exposed_ms"] - ms["draft_ms"]))
    same = ("model", "device", "k", "batch", "temperature", "coupling")
    alike = [c for c in cells if c.get("peer") == "sd" and all(c.get(key) == cell.get(key) for key in same)]
    now = [c["draft_ms"] / 1e3 / c["k"] for c in alike if usable(c, "draft_ms")]
    steps = 1 if cell.get("cut", True) else cell["k"]
    late = max(0.0, ms["extend_ms"] + steps * ms["chain_step_ms"] - verify)  # the clock plays this part of the waiting
    return Times(
        verify, ms["chain_step_ms"], extend=ms["extend_ms"], handover=max(0.0, ms["exposed_ms"] - late),
        now_step=now[0] if now else None,
    )  # fmt: skip


def usable(cell: dict, key: str) -> bool:
    """A number, and above 0 where nothing could be played with 0."""
    value = cell.get(key)
    least = 0 if key in ("exposed_ms", "draft_ms", "acceptance_rate", "hit_rate") else 1e-9
    return isinstance(value, (int, float)) and value >= least


def measured_plan(cell: dict) -> Plan:
    settings = {"batch": cell.get("batch", 1)}
    if cell["peer"] != "ar":
        settings["k"] = cell["k"]
    if cell["peer"] == "ssd":
        settings |= {"fan_out": cell["fan_out"], "cut": cell.get("cut", True), "fallback": cell.get("fallback", "auto")}
    return Plan(cell["peer"], lists="uniform", **settings)


def reproduce(path: str) -> dict:
    """Every cell of AR, SD and SSD in a results file: measured and predicted tokens a second."""
    out = {"source": Path(path).name, "cells": [], "left_out": []}
    cells = [as_played(cell) for cell in cells_of(path, *MEASURED)]
    speeds = [cell.get("tokens_per_s") for cell in cells]
    if not speeds or not all(isinstance(s, dict) and {"low", "median", "high"} <= set(s) for s in speeds):
        raise ValueError(f"{path} has cells without an interval: give a file that scripts/bench.py wrote")
    for cell in cells:
        if cell.get("peer") not in NEEDED:
            continue
        lacking = [key for key in NEEDED[cell["peer"]] if not usable(cell, key)]
        if lacking:
            out["left_out"].append(f"{cell.get('model')} {cell.get('name')} has no {', '.join(lacking)}")
            continue
        missed = (1 - (cell.get("hit_rate") or 0.0),)  # as measured, whatever the outcome was
        profile = Profile(cell.get("acceptance_rate") or 0.0, missed, missed)
        played = play(measured_plan(cell), measured_times(cell, cells), profile)
        speed = cell["tokens_per_s"]
        out["cells"].append({key: cell.get(key) for key in SHOWN} | {
            "measured": {key: speed[key] for key in ("median", "low", "high")},
            "predicted": played["tokens_per_s"], "error": played["tokens_per_s"] / speed["median"] - 1,
            "inside": speed["low"] <= played["tokens_per_s"] <= speed["high"],
        })  # fmt: skip
    return out


def as_played(cell: dict) -> dict:
    """Where K or M was chosen by the run itself, what it chose."""
    used = {key: round(cell[f"{key}_used"]) for key in ("k", "fan_out") if usable(cell, f"{key}_used")}
    return cell | used


def cells_of(path: str, *parts: str) -> list[dict]:
    wanted = f"wanted a file that scripts/bench.py wrote with the part {' or '.join(parts)}"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["parts"]
        cells = [cell for part in parts if part in found for cell in found[part]["cells"]]
        if not any(part in found for part in parts):
            raise KeyError(parts[0])
        whole = all(isinstance(cell, dict) for cell in cells)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {wanted}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} has no measured cells: {wanted}") from error
    if not whole:
        raise ValueError(f"{path} has no list of measured cells: {wanted}")
    return cells


# ---- given times and chances


def given(args) -> dict:
    """AR, SD, PEARL and SSD under each coupling, for times and an acceptance from the command line."""
    times = Times(args.verify_ms / 1e3, args.step_ms / 1e3)
    k, M, batch, out = args.k, args.fan_out, args.batch, []
    c = published.fit(published.LLAMA)["c"]
    known = {"any (temperature 0)": published.published_profile(args.acceptance, 0.0, c, M)}
    for coupling in published.REJECTED:
        known[coupling] = published.small_pair_profile(coupling, args.acceptance, M)
    plans = {
        "AR": Plan("ar", batch=batch),
        "SD": Plan("sd", k, batch=batch),
        "PEARL": Plan("ssd", k, 1, lists="last", batch=batch, fallback=args.fallback),
        "SSD": Plan("ssd", k, M, batch=batch, fallback=args.fallback),
    }
    for coupling, profile in known.items():
        for mode, plan in plans.items():
            played = play(plan, times, profile)
            out.append({"coupling": coupling, "mode": mode, "acceptance": profile.acceptance} | played)
    out += with_measured_profiles(args, times) if args.profiles else []
    return {"verify_ms": args.verify_ms, "step_ms": args.step_ms, "k": k, "fan_out": M, "batch": batch, "cells": out}


def with_measured_profiles(args, times: Times) -> list[dict]:
    """SD and SSD with the acceptance and the hits of every cell of the part `predict`, at its own K and M."""
    out = []
    for cell in cells_of(args.profiles, "predict"):
        if not all(usable(cell, key) for key in ("k", "fan_out", "acceptance_rate", "hit_rate")):
            raise ValueError(f"a cell of {args.profiles} lacks its hits or settings: measure the part predict again")
        missed = (1 - cell["hit_rate"],)
        profile = Profile(cell["acceptance_rate"], missed, missed)
        name = f"{cell.get('coupling')}, measured at T={cell.get('temperature')} K={cell['k']} M={cell['fan_out']}"
        for mode in ("sd", "ssd"):
            plan = Plan(mode, cell["k"], cell["fan_out"], "uniform", batch=args.batch, fallback=args.fallback)
            played = play(plan, times, profile)
            out.append({"coupling": name, "mode": mode.upper(), "acceptance": profile.acceptance} | played)
    return out


# ---- tables

SPEED = (("tokens/s", "tokens_per_s", "{:.1f}"),)
FOUND = (("hits", "hit_rate", "{:.2f}"), ("tokens a round", "tokens_per_round", "{:.2f}"))
ASKED = (("K", "k", "{}"), ("M", "fan_out", "{}"), *SPEED, ("per sequence", "per_sequence", "{:.1f}"),
         ("per GPU", "per_gpu", "{:.1f}"), ("x AR", "over_ar", "{:.2f}"), *FOUND)  # fmt: skip
KIND = (("temperature", "temperature", "{}"), ("coupling", "coupling", "{}"))
TABLES = {  # part, its list: title, columns
    ("run", "cells"): ("Measured here, and predicted from the parts of a round", (
        ("pair", "model", "{}"), ("mode", "name", "{}"), ("on", "device", "{}"), ("temperature", "temperature", "{}"),
        ("batch", "batch", "{}"), ("K", "k", "{}"),
        ("M", "fan_out", "{}"), ("measured tokens/s", "measured", "{:.1f}"), ("predicted", "predicted", "{:.1f}"),
        ("error", "error", "{:+.1%}"), ("inside", "inside", "{}"))),
    ("given", "cells"): ("As given", (("coupling", "coupling", "{}"), ("mode", "mode", "{}"), *SPEED,
        ("acceptance", "acceptance", "{:.3f}"), ("round ms", "round_ms", "{:.2f}"), *FOUND)),
    ("paper", "fitted"): ("Fitted to the cells at temperature 0", (
        ("pair", "pair", "{}"), ("acceptance", "acceptance", "{:.3f}"), ("draft step ms", "draft_step_ms", "{:.2f}"),
        ("c of c F^-b", "c", "{:.3f}"), ("b, published", "b", "{}"), ("pass of 1 token ms", "verify_1_ms", "{:.2f}"),
        ("of 8 ms", "verify_8_ms", "{:.2f}"))),
    ("paper", "cells"): ("Every cell", (("group", "group", "{}"), ("cell", "cell", "{}"),
        ("published", "published", "{:.4g}"), ("played", "predicted", "{:.4g}"), ("error", "error", "{:+.1%}"),
        ("", "role", "{}"))),
    ("paper", "summary"): ("Errors of what was not fitted", (("group", "group", "{}"), ("cells", "cells", "{}"),
        ("mean error", "mean_error", "{:.1%}"), ("worst", "worst_error", "{:.1%}"))),
    ("what_if", "profiles"): ("What is assumed of 70B/1B (list: K = 7, M = 24)", (*KIND,
        ("acceptance", "acceptance", "{:.3f}"), ("F_0..F_K", "list", "{}"))),
    ("what_if", "ladder"): ("70B on 4 GPUs, draft on one more, batch 1", (*KIND, ("way", "way", "{}"), *ASKED)),
    ("what_if", "devices"): ("Several draft GPUs share the branches", (*KIND, ("batch", "batch", "{}"),
        ("draft GPUs", "draft_gpus", "{}"), *ASKED)),
    ("what_if", "batch"): ("Larger batches", (("temperature", "temperature", "{}"), ("batch", "batch", "{}"),
        ("mode", "mode", "{}"), ("coupling", "coupling", "{}"), *ASKED)),
}  # fmt: skip


def shown(value, form: str) -> str:
    if isinstance(value, dict):
        return "{} [{}, {}]".format(*(form.format(value[key]) for key in ("median", "low", "high")))
    return "" if value is None else ("no", "yes")[value] if isinstance(value, bool) else form.format(value)


def table(records: list[dict], columns) -> list[str]:
    rows = [[shown(record.get(key), form) for _, key, form in columns] for record in records]
    lines = [[name for name, _, _ in columns], ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def render(results: dict) -> str:
    """Markdown, from the results alone."""
    lines = []
    for (part, name), (title, columns) in TABLES.items():
        if part in results:
            lines += [f"## {title}", "", *table(results[part][name], columns), ""]
        if (part, name) == ("run", "cells") and part in results:
            lines += [f"Left out: {why}." for why in results[part]["left_out"]] + [""]
    if "assumed" in results:
        lines += ["## Assumed", "", *(f"* {text}" for text in results["assumed"]), ""]
    return "\n".join(lines)


def rounded(value):
    """The same results with DIGITS significant digits: what lies beyond is noise of the draws."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


# ---- the program


class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one sentence, like every other mistake
        raise ValueError(f"{message} (python scripts/simulate.py --help lists the flags)")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="simulate.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = p.add_argument
    add("--run", metavar="FILE", help="predict the measured cells of a file of scripts/bench.py (overlap, modes)")
    add("--paper", action="store_true", help="fit the paper's cells at temperature 0, predict the others")
    add("--ask", action="store_true", help="70B on 4 GPUs with cutting, optimal lists, shared noise, batches to 64")
    add("--verify-ms", type=float, metavar="MS", help="a verification; with --step-ms: play these times")
    add("--step-ms", type=float, metavar="MS", help="a draft step")
    add("--acceptance", type=float, metavar="A", default=0.8, help="of a draft token, coupling maximal (0.8)")
    add("--profiles", metavar="FILE", help="also play the measured acceptance and hits of such a file (predict)")
    add("--k", type=int, metavar="K", default=4, help="most draft tokens a round (4)")
    add("--fan-out", type=int, metavar="M", default=16, help="outcomes prepared a round and sequence (16)")
    add("--batch", type=int, metavar="B", default=1, help="sequences (1)")
    add("--fallback", choices=FALLBACKS, default="auto", help="after a miss (auto)")
    add("--out", metavar="FILE", help="write the results as JSON")
    return p


def check(args) -> None:
    if (args.verify_ms is None) != (args.step_ms is None):
        raise ValueError("only one of --verify-ms and --step-ms was given, wanted both: a round needs both times")
    if args.profiles and args.verify_ms is None:
        raise ValueError("--profiles was given without times, wanted --verify-ms and --step-ms to play them with")
    if not (args.run or args.paper or args.ask or args.verify_ms is not None):
        raise ValueError("nothing was asked: give --run FILE, --paper, --ask, or --verify-ms and --step-ms")
    for name in ("verify_ms", "step_ms"):
        if (ms := getattr(args, name)) is not None and not 0 < ms < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} is {ms}, wanted milliseconds above 0")
    if not 0 <= args.acceptance < 1:
        raise ValueError(f"--acceptance is {args.acceptance}, wanted 0 or more and less than 1")
    for name, most in (("k", 64), ("fan_out", 4096), ("batch", 4096)):
        if not 1 <= (got := getattr(args, name)) <= most:
            raise ValueError(f"--{name.replace('_', '-')} is {got}, wanted 1 to {most}")
    if args.out and not Path(args.out).resolve().parent.is_dir():
        raise ValueError(f"{args.out} cannot be written, its folder does not exist: create it first")


def simulate(args) -> dict:
    out = {}
    if args.run:
        out["run"] = reproduce(args.run)
    if args.verify_ms is not None:
        out["given"] = given(args)
    if args.paper:
        out["paper"] = published.error_table()
    if args.ask:
        out["what_if"] = published.what_if()
    return rounded(out) | ({"assumed": list(published.ASSUMED)} if args.paper or args.ask else {})


def main(argv: list[str] | None = None) -> int:
    try:
        args = parser().parse_args(argv)
        check(args)
        results = simulate(args)
        if args.out:
            Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    print(render(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
