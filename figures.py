"""What happened in a run: a record for each round, one line, a table of modes, a trace.

Knows: times and counts, and how they combine. Does not know: tensors, models, why a round was
played as it was. The method ends here. Read next: parallel.py.

With equal K, SSD gains at most (1 + t_draft / t_verify) over SD: it hides the drafting, it does not
make a verification cheaper. All times are seconds of the host's clock. A round lasts from the start
of one verification to the start of the next.
"""

import bisect
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

MODES = ("ar", "sd", "ssd")
DRAFT_WORK = ("extend", "fork", "chain step", "decode")  # what counts as the draft being busy
ROWS = (  # key, label, format, factor
    ("k", "K", "{}", 1),
    ("fan_out", "M", "{}", 1),
    ("tokens_per_s", "tokens/s", "{:.1f}", 1),
    ("over_ar", "x AR", "{:.2f}", 1),
    ("over_sd", "x SD", "{:.2f}", 1),
    ("ceiling", "ceiling x SD", "{:.2f}", 1),
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
UNUSED = {
    "ar": ("k", "fan_out", "cut", "fallback", "coupling"),
    "sd": ("fan_out", "cut", "fallback"),
    "ssd": (),
}


@dataclass
class Round:
    """One round: what was tried, what held, what was foreseen, and how long it took.

    kind, length and accepted have an entry for each place of the batch; live, hit and missed are
    the places whose rows played, hit and missed.
    chain_steps is how many of them were ready at the look-up, prepare_s the seconds of extend and
    fork, step_s those of a chain step. drafted is the work that drafted while the target waited,
    None where there was none.
    """

    plan: object
    live: list[int]
    kind: list[int]
    length: list[int]
    accepted: list[int]
    begin: float
    end: float
    hit: list[int] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)
    look_up: tuple[float, float] | None = None  # begin and end; None where nothing was prepared
    chain_steps: int = 0
    prepare_s: float | None = None
    step_s: float | None = None
    drafted: object = None

    def rejected(self, b: int) -> int:
        """1 if a draft token of row b was rejected. Tokens after it are untested."""
        return int(self.accepted[b] < self.length[b])

    def looked_up(self, chains, hit: list[int], missed: list[int]) -> None:
        """Note what was found in the speculation cache."""
        self.hit, self.missed, self.chain_steps = hit, missed, len(chains.steps)
        if chains.work is not None:
            self.look_up = (self.end, time.perf_counter())
            moments = [chains.work.begin, *chains.moments]
            lasts = [after - before for before, after in zip(moments, moments[1:])]
            self.prepare_s = lasts[0] if lasts else None
            self.step_s = median(lasts[1:]) if lasts[1:] else None

    @property
    def emitted(self) -> int:
        return sum(self.accepted[b] + 1 for b in self.live)


def expected_tokens(acceptance: float, length: float) -> float:
    """Tokens that a round emits whose proposal has `length` tokens, each accepted with the same
    probability.
    """
    if acceptance >= 1:
        return length + 1
    return (1 - acceptance ** (length + 1)) / (1 - acceptance)


def distinct_4grams(ids: list[int]) -> float | None:
    """The share of distinct 4-grams. Repetitive text flatters every speculative figure."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return len(set(grams)) / len(grams) if grams else None


class Figures:
    """The rounds of one run, and what they come to."""

    def __init__(self, rows):
        self.rows = rows
        self.rounds: list[Round] = []
        self.begin = self.end = 0.0  # of the run: the prompts' prefill, the last round

    @property
    def last(self) -> Round | None:
        return self.rounds[-1] if self.rounds else None

    def verified(self, plan, proposal, live, accepted, verdict) -> Round:
        """The record of a round whose verification is done. It is kept, too."""
        lengths = [len(tokens) for tokens in proposal.tokens]
        done = Round(plan, live, proposal.kind, lengths, accepted, verdict.begin, verdict.end)
        self.rounds.append(done)
        return done

    def report(self, spans: list[tuple[str, float, float]], speculates: bool) -> dict:
        """The figures of a run, by the names that --json prints.

        spans: what ran on the draft's lane, (name, begin, end). The first round belongs to the
        prefill, and so it is left out of rates and medians.
        """
        new = [len(row.new_ids) for row in self.rows]
        first_token = self.rounds[0].end if self.rounds else self.end
        decode_s = max(self.end - first_token, 1e-9)
        first = len(self.rounds[0].live) if self.rounds else 0  # each of them emitted one token
        rounds, after_first = self.rounds[1:], sum(new) - first
        tried = [(r, b) for r in self.rounds for b in r.live if r.length[b]]
        accepted, drafted = sum(r.accepted[b] for r, b in tried), sum(r.length[b] for r, b in tried)
        tested = accepted + sum(r.rejected(b) for r, b in tried)
        hits, misses = (sum(len(of) for r in self.rounds if r.look_up for of in [getattr(r, name)])
                        for name in ("hit", "missed"))  # fmt: skip
        shares = [s for row in self.rows if (s := distinct_4grams(row.new_ids)) is not None]
        row_rounds = sum(len(r.live) for r in rounds)
        out = {
            "prompt_tokens": [row.prompt for row in self.rows],
            "new_tokens": new,
            "prefill_s": first_token - self.begin,
            "decode_s": decode_s,
            "tokens_per_s": after_first / decode_s,
            "rounds": len(rounds),
            "tokens_per_round": after_first / row_rounds if row_rounds else None,
            "acceptance_rate": accepted / tested if tested else None,
            "accepted_fraction": accepted / drafted if drafted else None,
            "hit_rate": hits / (hits + misses) if hits + misses else None,
            "distinct_4grams": mean(shares) if shares else None,
        }
        return out | self.times(spans, speculates)

    def busy(self, spans) -> list[float]:
        """Seconds that the draft worked in each round."""
        starts = [r.begin for r in self.rounds]
        total = [0.0] * len(starts)
        for name, begin, end in spans:
            if name in DRAFT_WORK and starts and begin >= starts[0]:
                total[bisect.bisect_right(starts, begin) - 1] += end - begin
        return total

    def times(self, spans, speculates: bool) -> dict:
        """Medians of a round in milliseconds, the share of drafting that is hidden, the ceiling."""
        rounds, busy = self.rounds, self.busy(spans)
        pairs = list(zip(rounds[1:], rounds[2:]))  # a round and the one after it
        middle = lambda values: median(values) * 1e3 if values else None  # noqa: E731
        out = {
            "round_ms": middle([after.begin - r.begin for r, after in pairs]),
            "verify_ms": middle([r.end - r.begin for r in rounds[1:]]),
            "draft_ms": middle(busy[1:]) if speculates else None,
            "exposed_ms": middle([after.begin - r.end for r, after in pairs])
            if speculates
            else None,
            "hidden": None,
            "speedup_ceiling": None,
        }
        hits = [n for n in range(1, len(rounds) - 1) if rounds[n].look_up and not rounds[n].missed]
        if hits:
            exposed = median(rounds[n + 1].begin - rounds[n].end for n in hits)
            work = median(busy[n] for n in hits)
            out |= {"exposed_ms": exposed * 1e3, "hidden": 1 - exposed / work if work else None}
        steps = [end - begin for name, begin, end in spans if name == "chain step"]
        plan = self.usual_plan()
        if hits and steps and plan.k:
            tested = sum(r.accepted[b] + r.rejected(b) for r in rounds for b in r.live)
            a = sum(r.accepted[b] for r in rounds for b in r.live) / max(tested, 1)
            length = median(min(r.chain_steps, r.plan.k) for r in rounds if r.look_up)
            gain = expected_tokens(a, length) / expected_tokens(a, plan.k)
            out["speedup_ceiling"] = (1 + plan.k * median(steps) * 1e3 / out["verify_ms"]) * gain
        return out

    def usual_plan(self):
        """The plan of most rounds; None before the first."""
        plans = [r.plan for r in self.rounds]
        return max(set(plans), key=plans.count) if plans else None


def run_stats(decoding, settings, floor_s: float | None) -> dict:
    """The JSON object of a run: its settings (None for those that its mode does not use), texts and
    figures.

    floor_s: seconds that reading the target's weights once takes at the speed of a plain read.
    """
    rows, figures, lane = decoding.all_rows, decoding.figures, decoding.draft_lane
    plan, speculates = figures.usual_plan(), settings.mode != "ar"
    stats = {name: getattr(settings, name) for name in SETTINGS_SHOWN}
    stats |= {"k": plan.k if plan else settings.k, "fan_out": plan.m if plan else settings.fan_out}
    stats |= dict.fromkeys(UNUSED[settings.mode])
    asked = {name: getattr(settings, name) for name in ("k", "fan_out") if stats[name] is not None}
    stats["auto"] = [name for name, value in asked.items() if isinstance(value, str)]
    drafts = decoding.draft is not None or decoding.lost
    stats |= {"device": decoding.target_lane.spec, "draft_device": lane.spec if drafts else None}
    stats |= {"prompts": len(rows), "token_ids": [row.new_ids for row in rows]}
    stats |= {"text": [row.text for row in rows], "finish_reason": [row.finish for row in rows]}
    stats |= figures.report(lane.spans if speculates else [], speculates)
    known = floor_s is not None and stats["verify_ms"]
    return stats | {"bandwidth_fraction": floor_s * 1e3 / stats["verify_ms"] if known else None}


def figures_line(stats: dict) -> str:
    """One line of figures: speed first, then what explains it."""
    show = [
        f"{stats['mode']}: {sum(stats['new_tokens'])} tokens, {stats['tokens_per_s']:.1f} tokens/s"
    ]
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
    told = {"none": "", "stored": ", weights as in the file"}
    bits = told.get(stats["quantize"], f", {stats['quantize']} weights")
    return " | ".join([*show, f"{stats['dtype']}{bits} on {where}"])


# ---- the three modes side by side


def compare(runs: dict[str, dict]) -> dict:
    """The three runs, with the ratios between them. `ceiling`: SSD over SD if all drafting were
    hidden, with the tokens a round that SSD reached.
    """
    ar, sd, ssd = (runs[mode] for mode in MODES)
    for run in runs.values():
        for name, base in (("over_ar", ar), ("over_sd", sd)):  # a text of one token has no rate
            run[name] = run["tokens_per_s"] / base["tokens_per_s"] if base["tokens_per_s"] else None
        run["ceiling"] = None
    if all((sd["draft_ms"], sd["verify_ms"], sd["tokens_per_round"], ssd["tokens_per_round"])):
        ssd["ceiling"] = (
            (1 + sd["draft_ms"] / sd["verify_ms"])
            * ssd["tokens_per_round"]
            / sd["tokens_per_round"]
        )
    same = all(run["token_ids"] == ar["token_ids"] for run in runs.values())
    return {
        **runs,
        "same_text": same,
        "best": max(MODES, key=lambda mode: runs[mode]["tokens_per_s"]),
    }


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
    """Sentences: do the texts agree, what kept SSD from its ceiling, which mode is best here."""
    sd, ssd, out = compared["sd"], compared["ssd"], []
    if compared["same_text"]:
        out.append("The three texts are the same.")
    elif ssd["coupling"] == "shared":
        out.append("The three texts DIFFER: a near-tie or a bug; scripts/check_same_text.py tells.")
    else:
        out.append(
            f"The texts differ, as they may under {ssd['coupling']}: other draws, same odds."
        )
    if ssd["ceiling"]:
        slower = ssd["verify_ms"] / sd["verify_ms"]
        waits = 1 + (ssd["exposed_ms"] or 0) / ssd["verify_ms"]
        losses = {
            f"a verification took {ssd['verify_ms']:.2f} ms, not {sd['verify_ms']:.2f}": slower,
            f"{ssd['exposed_ms'] or 0:.2f} ms a round were exposed between verifications": waits,
            f"a round was {ssd['tokens_per_round']:.2f} tokens, not {sd['tokens_per_round']:.2f}":
                sd["tokens_per_round"] / ssd["tokens_per_round"],
        }  # fmt: skip
        term = max(losses, key=losses.get)
        out.append(f"SSD ran at {ssd['over_sd'] / ssd['ceiling']:.0%} of its ceiling over SD.")
        if losses[term] > 1.02:
            out.append(f"What ate most of the rest: {term}.")
    best = compared["best"]
    why = (
        ""
        if best == "ssd"
        else ": SSD pays where the draft has a device of its own that the target could not use"
    )
    out.append(f"Best on this machine for this text: {best.upper()}{why}.")
    return out


# ---- the trace


def write_trace(path: str, lanes, rounds: list[Round]) -> None:
    """Write a Chrome/Perfetto trace: a line for each lane, and the loop's look-ups with hits and
    misses. Its times are microseconds.
    """
    events = []
    for thread, lane in enumerate(lanes, 1):
        name = {"name": f"{lane.name} ({lane.spec})"}
        events.append({"ph": "M", "pid": 1, "tid": thread, "name": "thread_name", "args": name})
        events += [_span(thread, name, begin, end, {}) for name, begin, end in lane.spans]
    events.append({"ph": "M", "pid": 1, "tid": 0, "name": "thread_name", "args": {"name": "loop"}})
    for number, r in enumerate(rounds):
        if r.look_up:
            args = {
                "round": number,
                "rows": len(r.live),
                "missed": r.missed,
                "chain_steps": r.chain_steps,
            }
            events.append(_span(0, "look-up: " + ("miss" if r.missed else "hit"), *r.look_up, args))
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _span(thread: int, name: str, begin: float, end: float, args: dict) -> dict:
    times = {"ts": begin * 1e6, "dur": (end - begin) * 1e6}
    return {"ph": "X", "pid": 1, "tid": thread, "name": name, "args": args} | times
