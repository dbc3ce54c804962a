"""How a run is shown: one line, a table of the three modes side by side, a trace of both lanes.

Knows: the JSON figures of a run and the spans of its lanes. Does not know: how anything was computed. Read next:
speed.py, where the figures come from.
"""

import json
from pathlib import Path

MODES = ("ar", "sd", "ssd")
ROWS = (  # key, label, format, factor
    ("k", "K", "{}", 1),
    ("fan_out", "M", "{}", 1),
    ("tokens_per_s", "tokens/s", "{:.1f}", 1),
    ("over_ar", "x AR", "{:.2f}", 1),
    ("over_sd", "x SD", "{:.2f}", 1),
    ("ceiling", "ceiling x SD", "{:.2f}", 1),
    ("predicted_tokens_per_s", "predicted tokens/s", "{:.1f}", 1),
    ("tokens_per_round", "tokens a round", "{:.2f}", 1),
    ("acceptance_rate", "acceptance %", "{:.1f}", 100),
    ("hit_rate", "hits %", "{:.1f}", 100),
    ("verify_ms", "verify ms", "{:.2f}", 1),
    ("draft_ms", "draft ms", "{:.2f}", 1),
    ("exposed_ms", "exposed ms", "{:.2f}", 1),
    ("hidden", "hidden %", "{:.1f}", 100),
    ("distinct_4grams", "distinct 4-grams %", "{:.1f}", 100),
)

SETTINGS_SHOWN = ("mode", "cut", "fallback", "coupling", "temperature", "seed")
IDLE = {"ar": ("k", "fan_out", "cut", "fallback", "coupling"), "sd": ("fan_out", "cut", "fallback"), "ssd": ()}


def run_stats(decoding, floor_s: float) -> dict:
    """What is told of a run: its settings (None where its mode has no use for one), its texts, its figures.

    floor_s: seconds that reading the target's weights once takes at the speed of a plain read.
    """
    settings, rows, figures, lane = decoding.settings, decoding.rows, decoding.figures, decoding.draft_lane
    k, fan_out = figures.usual_choice() or (decoding.k, decoding.fan_out.budget)
    stats = {name: getattr(settings, name) for name in SETTINGS_SHOWN} | {"k": k, "fan_out": fan_out}
    stats |= dict.fromkeys(IDLE[settings.mode])
    auto = lambda name: isinstance(getattr(settings, name), str) and stats[name] is not None  # noqa: E731
    stats["auto"] = [name for name in ("k", "fan_out") if auto(name)]
    stats |= {"device": decoding.target_lane.spec, "draft_device": lane.spec if decoding.draft else None}
    stats |= {"prompts": len(rows), "token_ids": [row.new_ids for row in rows], "text": [row.text for row in rows]}
    stats |= {"finish_reason": [row.finish for row in rows]}
    stats |= figures.report(lane.spans if lane and settings.mode != "ar" else [])
    stats["bandwidth_fraction"] = floor_s * 1e3 / stats["verify_ms"] if stats["verify_ms"] else None
    return stats


def figures_line(stats: dict) -> str:
    """One line of figures: speed first, then what explains it."""
    show = [f"{stats['mode']}: {sum(stats['new_tokens'])} tokens, {stats['tokens_per_s']:.1f} tokens/s"]
    for key, text, factor in (
        ("k", "K {}", 1),
        ("fan_out", "M {}", 1),
        ("tokens_per_round", "{:.2f} tokens a round", 1),
        ("acceptance_rate", "acceptance {:.0f}%", 100),
        ("hit_rate", "hits {:.0f}%", 100),
        ("verify_ms", "verify {:.1f} ms", 1),
        ("draft_ms", "draft {:.1f} ms", 1),
        ("hidden", "hidden {:.0f}%", 100),
        ("bandwidth_fraction", "{:.0f}% of memory bandwidth", 100),
        ("peak_memory_gb", "{:.2f} GB", 1),
    ):
        if stats[key] is not None:
            show.append(text.format(stats[key] * factor))
    where = stats["device"] + (f" + {stats['draft_device']}" if stats["draft_device"] else "")
    return " | ".join([*show, where])


# ---- the three modes side by side


def compare(runs: dict[str, dict]) -> dict:
    """Ratios between the modes' figures. `ceiling`: hiding all drafting, with the tokens a round that SSD reached."""
    ar, sd, ssd = (runs[mode] for mode in MODES)
    for run in runs.values():
        for name, base in (("over_ar", ar), ("over_sd", sd)):  # a text of one token has no rate
            run[name] = run["tokens_per_s"] / base["tokens_per_s"] if base["tokens_per_s"] else None
        run["ceiling"] = None
    if all((sd["draft_ms"], sd["verify_ms"], sd["tokens_per_round"], ssd["tokens_per_round"])):
        ssd["ceiling"] = (1 + sd["draft_ms"] / sd["verify_ms"]) * ssd["tokens_per_round"] / sd["tokens_per_round"]
    same = all(run["token_ids"] == ar["token_ids"] for run in runs.values())
    return {**runs, "same_text": same, "best": max(MODES, key=lambda mode: runs[mode]["tokens_per_s"])}


def table(compared: dict) -> str:
    lines = [f"{'':20}" + "".join(f"{mode.upper():>10}" for mode in MODES)]
    for key, label, form, factor in ROWS:
        values = [compared[mode].get(key) for mode in MODES]
        cells = ["-" if value is None else form.format(value * factor) for value in values]
        lines.append(f"{label:20}" + "".join(f"{cell:>10}" for cell in cells))
    devices = [(compared[m]["device"], compared[m]["draft_device"]) for m in MODES]
    for mode, (device, draft) in zip(MODES, devices):
        lines.append(f"{mode.upper()} on {device}" + (f", draft on {draft}" if draft else ""))
    return "\n".join(lines)


def explain(compared: dict) -> list[str]:
    """In words: do the texts agree, which mode is best here, and what kept SSD from its ceiling."""
    sd, ssd, out = compared["sd"], compared["ssd"], []
    if compared["same_text"]:
        out.append("The three texts are the same.")
    elif ssd["coupling"] == "shared":
        out.append("The three texts DIFFER: a floating-point near-tie or a bug; scripts/check_same_text.py tells.")
    else:
        out.append(f"The texts differ, as they may with the coupling {ssd['coupling']}: other draws, same odds.")
    if ssd["ceiling"]:
        slower = ssd["verify_ms"] / sd["verify_ms"]
        waits = 1 + (ssd["exposed_ms"] or 0) / ssd["verify_ms"]
        losses = {
            f"a verification took {ssd['verify_ms']:.2f} ms instead of {sd['verify_ms']:.2f} ms": slower,
            f"{ssd['exposed_ms'] or 0:.2f} ms a round were exposed between verifications": waits,
            f"rounds were {ssd['tokens_per_round']:.2f} tokens long instead of {sd['tokens_per_round']:.2f}":
                sd["tokens_per_round"] / ssd["tokens_per_round"],
        }  # fmt: skip
        term = max(losses, key=losses.get)
        out.append(f"SSD ran at {ssd['over_sd'] / ssd['ceiling']:.0%} of its ceiling over SD.")
        if losses[term] > 1.02:
            out.append(f"What ate most of the rest: {term}.")
    best = compared["best"]
    why = "" if best == "ssd" else ": SSD pays where the draft has a device of its own that the target could not use"
    out.append(f"Best on this machine for this text: {best.upper()}{why}.")
    return out


# ---- the trace


def write_trace(path: str, lanes, lookups) -> None:
    """A Chrome/Perfetto trace: a line per lane, and the loop's look-ups with hits and misses. Times in microseconds."""
    events = []
    for thread, lane in enumerate(lanes, 1):
        name = {"name": f"{lane.name} ({lane.spec})"}
        events.append({"ph": "M", "pid": 1, "tid": thread, "name": "thread_name", "args": name})
        events += [_span(thread, name, begin, end, {}) for name, begin, end in lane.spans]
    events.append({"ph": "M", "pid": 1, "tid": 0, "name": "thread_name", "args": {"name": "loop"}})
    for number, begin, end, rows, missed, steps in lookups:
        args = {"round": number, "rows": rows, "missed": missed, "chain_steps": steps}
        events.append(_span(0, "look-up: " + ("miss" if missed else "hit"), begin, end, args))
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _span(thread: int, name: str, begin: float, end: float, args: dict) -> dict:
    times = {"ts": begin * 1e6, "dur": (end - begin) * 1e6}
    return {"ph": "X", "pid": 1, "tid": thread, "name": name, "args": args} | times
