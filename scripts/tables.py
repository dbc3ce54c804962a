"""The tables of bench.py, made from a file of results alone.

Knows: columns, formats, what is claimed in one line. Does not know: how anything was measured. Read next: render.py,
which puts some of these tables into the documents.
"""

TOKENS = ("tokens/s", "tokens_per_s", "{:.1f}")
PLACE = (("K", "k", "{}"), ("M", "fan_out", "{}"), ("target on", "device", "{}"), ("draft on", "draft_device", "{}"))
TEXT = (
    ("acceptance", "acceptance_rate", "{:.3f}"), ("hits", "hit_rate", "{:.3f}"),
    ("tokens a round", "tokens_per_round", "{:.2f}"), ("distinct 4-grams", "distinct_4grams", "{:.2f}"),
)  # fmt: skip
HEAT = ("temperature", "temperature", "{}")
FIRST = ("first token ms", "first_token_ms", "{:.1f}")
PIECES = tuple((f"p{p} ms", f"piece_p{p}_ms", "{:.1f}") for p in (50, 90, 99))
COUNTED = (HEAT, ("coupling", "coupling", "{}"), ("lists and draws", "name", "{}"), *PLACE[:2], *TEXT,
           ("row rounds", "lookups", "{}"))  # fmt: skip
TIMES = tuple((f"{name} ms", f"{name}_ms", "{:.2f}") for name in ("verify", "round", "draft", "exposed"))
CELLS = {
    "plain": (("model", "model", "{}"), ("batch", "batch", "{}"), ("peer", "name", "{}"), TOKENS,
              ("of the read bandwidth", "of_bandwidth", "{:.0%}")),
    "overlap": (("pair", "model", "{}"), ("mode", "name", "{}"), *PLACE, TOKENS, *TEXT, *TIMES,
                ("hidden", "hidden", "{:.2f}"), ("hit round / verify", "hit_round_over_verify", "{:.2f}")),
    "predict": (("temperature", "temperature", "{}"), ("coupling", "coupling", "{}"), ("K", "k", "{}"),
                ("M", "fan_out", "{}"), *TEXT, ("stray", "stray", "{:.2f}"), ("row rounds", "lookups", "{}")),
    "assisted": (("pair", "model", "{}"), ("peer", "name", "{}"), *PLACE, ("threshold", "threshold", "{}"), TOKENS,
                 *TEXT),
    "modes": (("pair", "model", "{}"), HEAT, ("batch", "batch", "{}"), ("mode", "name", "{}"), *PLACE[:2], TOKENS,
              ("a core", "tokens_per_s_per_core", "{:.1f}"), FIRST, *PIECES, *TEXT),
    "tune": (("pair", "model", "{}"), HEAT, ("mode", "name", "{}"), *PLACE[:2], ("K used", "k_used", "{:.0f}"),
             ("M used", "fan_out_used", "{:.0f}"), TOKENS, *TEXT),
    "prediction": (("pair", "model", "{}"), HEAT, ("mode", "name", "{}"), ("prompts", "judged", "{}"),
                   ("median error", "prediction_error", "{:.1%}"),
                   ("without earlier runs", "alone_error", "{:.1%}"), TOKENS, *TEXT),
    "ablations couplings": COUNTED,
    "ablations lists": COUNTED,
    "ablations adaptive": COUNTED,
    "ablations fallback": (HEAT, ("batch", "batch", "{}"), ("on a miss", "name", "{}"), *PLACE[:2], TOKENS, *TEXT),
    "ablations cut": (("chains", "name", "{}"), *PLACE[:2], TOKENS, *TEXT, ("chain length", "chain_length", "{:.2f}"),
                      *TIMES),
    "ablations slow draft": (("pair", "model", "{}"), ("mode", "name", "{}"), *PLACE[:2], TOKENS, *TEXT, *TIMES,
                             ("longest wait ms", "longest_wait_ms", "{:.1f}"),
                             ("allowed ms", "allowed_wait_ms", "{:.1f}"), ("waits too long", "too_long", "{:.0f}")),
}  # fmt: skip
RATIOS = (("pair", "model", "{}"), HEAT, ("batch", "batch", "{}"), ("of", "of", "{}"), ("to", "to", "{}"),
          ("ratio", "", "{:.2f}"), ("repeats", "n", "{}"), ("coverage", "coverage", "{:.0%}"),
          ("within 5% or the interval", "good", "{}"))  # fmt: skip
JUDGED = (("SSD / SD at most", "ssd_over_sd_ceiling", "{:.2f}"), ("share of it reached", "share_of_ceiling", "{:.0%}"),
          ("at most if the lanes did not slow each other", "ceiling_if_lanes_were_free", "{:.2f}"),
          ("hidden on hits", "hidden", "{:.0%}"), ("round on a hit / verification", "hit_round_over_verify", "{:.2f}"),
          ("draft step / verification", "draft_step_over_verify", "{:.2f}"))  # fmt: skip


def shown(record: dict, key: str, form: str) -> str:
    """A figure, or a median with its interval; nothing where there is none."""
    value = record.get(key) if key else record
    if isinstance(value, dict):
        middle, low, high = (form.format(value[key]) for key in ("median", "low", "high"))
        return f"{middle} [{low}, {high}]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else form.format(value)


def table(records: list[dict], columns) -> list[str]:
    """A Markdown table; a column that nothing fills is left out."""
    rows = [[shown(record, key, form) for _, key, form in columns] for record in records]
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    lines = [[columns[i][0] for i in used], ["---"] * len(used), *([row[i] for i in used] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def columns_of(part: str, name: str = ""):
    return CELLS[f"{part} {name}".strip()]


def render(results: dict) -> str:
    env = results["environment"]
    lines = [", ".join(f"{key} {value}" for key, value in env.items())]
    lines += [f"{name} is left out: {why}" for name, why in results["skipped"].items()]
    for part, found in results["parts"].items():
        lines += ["", f"## {part}", ""]
        for model, facts in found["models"].items():
            for device, speed in facts["read_bytes_per_s"].items():
                steps = f"{facts['steps_per_s'][device]:.1f} steps/s of {facts['step_bytes'] / 1e6:.0f} MB"
                lines.append(f"Ceiling of {model} on {device}: {speed / 1e9:.1f} GB/s read, at most {steps}.")
            judged = [f"{label} {shown(facts, key, form)}" for label, key, form in JUDGED if facts.get(key) is not None]
            lines += [f"{model}: {', '.join(judged)}."] if judged else []
            for text in facts.get("texts", ()):
                lines.append(f"{text['texts']} texts compared: {text['near_ties']} near-ties, {text['differ']} differ.")
        for name in dict.fromkeys(cell.get("table", "") for cell in found["cells"]):
            lines += ["", f"### {name}", ""] if name else [""]
            for records, columns in ((found["cells"], columns_of(part, name)), (found.get("ratios", ()), RATIOS)):
                chosen = [record for record in records if record.get("table", "") == name]
                lines += table(chosen, columns) if chosen else []
    return "\n".join(lines)


def headline(results: dict) -> dict:
    """The ratios that are claimed, by name; texts_differ counts texts that should be the same and are not."""
    out, differ = {}, 0
    for part, found in results["parts"].items():
        for r in found.get("ratios", ()):
            where = [part, r.get("table"), r["model"], f"T={r['temperature']}" if "temperature" in r else None]
            where += [f"batch {r['batch']}"] if "batch" in r else []
            out[f"{' '.join(filter(None, where))}: {r['of']} / {r['to']}"] = round(r["median"], 3)
        for model, facts in found["models"].items():
            out |= {f"{part} {model}: {label}": round(facts[key], 3) for label, key, _ in JUDGED if facts.get(key)}
            differ += sum(text["differ"] for text in facts.get("texts", ()))
    for cell in results["parts"].get("predict", {}).get("cells", ()):
        place = f"T={cell['temperature']} {cell['coupling']} K={cell['k']} M={cell['fan_out']}"
        out[f"hits {place}"] = round(cell["hit_rate"], 3)
    return out | {"texts_differ": differ}
