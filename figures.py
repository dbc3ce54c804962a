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
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

MODES = ("ar", "sd", "ssd")
OF_SSD = ("fan_out", "cut", "fallback")
OF_DRAFTS = (
    "draft",
    "draft_device",
    "draft_quantize",
    "k",
    "coupling",
    "saguaro_c",
    "batch_halves",
)
UNUSED = {"ar": (*OF_DRAFTS, *OF_SSD), "sd": OF_SSD, "ssd": ()}  # flags, and figures of that name
DRAFT_WORK = ("extend", "fork", "chain step", "decode")  # what counts as the draft being busy
SHOWN = (  # name, label, format: a line of --compare, a part of the line of figures
    ("k", "K", "{}"),
    ("fan_out", "M", "{}"),
    ("tokens_per_s", "tokens/s", "{:.1f}"),
    ("over_ar", "x AR", "{:.2f}"),
    ("over_sd", "x SD", "{:.2f}"),
    ("ceiling", "ceiling x SD", "{:.2f}"),
    ("tokens_per_round", "tokens a round", "{:.2f}"),
    ("acceptance_rate", "acceptance", "{:.0%}"),
    ("hit_rate", "hits", "{:.0%}"),
    ("verify_ms", "verify", "{:.1f} ms"),
    ("draft_ms", "draft", "{:.1f} ms"),
    ("exposed_ms", "exposed", "{:.1f} ms"),
    ("hidden", "hidden", "{:.0%}"),
    ("distinct_4grams", "distinct 4-grams", "{:.0%}"),
    ("bandwidth_fraction", "memory bandwidth", "{:.0%}"),
    ("peak_memory_gb", "memory", "{:.2f} GB"),
)


class Drafting(NamedTuple):
    """When the draft drafted while the target waited, and how many tokens in a row. What it drafted
    is not kept: under `maximal` every token has a q of its own.
    """

    begin: float
    end: float
    tokens: int


@dataclass
class Round:
    """One round: what was tried, what held, what was foreseen, and how long it took.

    kind, length and accepted have an entry for each place of the batch; live, hit and missed are
    the places whose rows played, hit and missed.
    chain_steps is how many chain steps were there at the look-up, prepare_s the seconds of extend
    and fork, step_s those of a chain step. drafted: what the draft did while the target waited.
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
    drafted: Drafting | None = None

    def rejected(self, b: int) -> int:
        """1 if a draft token of row b was rejected. Tokens after it are untested."""
        return int(self.accepted[b] < self.length[b])

    def looked_up(self, chains, hit: list[int], missed: list[int]) -> None:
        """Note what was found in the speculation cache."""
        self.hit, self.missed, self.chain_steps = hit, missed, len(chains.steps)
        if chains.work is not None:
            self.look_up = (self.end, time.perf_counter())
            moments = [chains.work.begin, *chains.moments]
            lasts = [after - before for before, after in pairwise(moments)]
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


def ssd_ceiling(t_draft: float, t_verify: float, tokens_ssd: float = 1, tokens_sd: float = 1):
    """The most that SSD can gain over SD: drafting takes no time, and rounds emit these tokens."""
    return (1 + t_draft / t_verify) * tokens_ssd / tokens_sd


def ratio(part: float, whole: float) -> float | None:
    """part / whole; None where there is no whole."""
    return part / whole if whole else None


def distinct_4grams(ids: list[int]) -> float | None:
    """The share of distinct 4-grams. Repetitive text flatters every speculative figure."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return ratio(len(set(grams)), len(grams))


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

    def report(self, spans: list[tuple[str, float, float]]) -> dict:
        """The figures of a run, by the names that --json prints.

        spans: what ran on the draft's lane, (name, begin, end). The first round belongs to the
        prefill, and so it is left out of speeds and medians.
        """
        new = [len(row.new_ids) for row in self.rows]
        rounds = self.rounds
        first_token = rounds[0].end if rounds else self.end
        decode_s = max(self.end - first_token, 1e-9)
        after_first = sum(new) - (len(rounds[0].live) if rounds else 0)
        played = [(r, b) for r in rounds for b in r.live]
        accepted = sum(r.accepted[b] for r, b in played)
        tested = accepted + sum(r.rejected(b) for r, b in played)
        asked = [r for r in rounds if r.look_up]
        hits = sum(len(r.hit) for r in asked)
        shares = [s for row in self.rows if (s := distinct_4grams(row.new_ids)) is not None]
        out = {
            "prompt_tokens": [row.prompt for row in self.rows],
            "new_tokens": new,
            "prefill_s": first_token - (self.begin or first_token),
            "decode_s": decode_s,
            "tokens_per_s": after_first / decode_s,
            "rounds": len(rounds[1:]),
            "tokens_per_round": ratio(after_first, sum(len(r.live) for r in rounds[1:])),
            "acceptance_rate": ratio(accepted, tested),
            "accepted_fraction": ratio(accepted, sum(r.length[b] for r, b in played)),
            "hit_rate": ratio(hits, hits + sum(len(r.missed) for r in asked)),
            "distinct_4grams": mean(shares) if shares else None,
        }
        return out | self.times(spans, out["acceptance_rate"])

    def busy(self, spans) -> list[float]:
        """Seconds that the draft worked in each round."""
        starts = [r.begin for r in self.rounds]
        total = [0.0] * len(starts)
        for name, begin, end in spans:
            if name in DRAFT_WORK and starts and begin >= starts[0]:
                total[bisect.bisect_right(starts, begin) - 1] += end - begin
        return total

    def times(self, spans, acceptance: float | None) -> dict:
        """Medians of a round in milliseconds, the share of drafting that is hidden, the ceiling."""
        rounds, busy = self.rounds[1:], self.busy(spans)[1:]
        ms = lambda seconds: median(seconds) * 1e3 if seconds else None  # noqa: E731
        exposed = [after.begin - r.end for r, after in pairwise(rounds)]
        out = {
            "round_ms": ms([after.begin - r.begin for r, after in pairwise(rounds)]),
            "verify_ms": ms([r.end - r.begin for r in rounds]),
            "draft_ms": ms(busy),
            "exposed_ms": ms(exposed),
            "hidden": None,
            "speedup_ceiling": None,
        }
        hits = [n for n, r in enumerate(rounds[:-1]) if r.look_up and not r.missed]
        if hits:
            out["exposed_ms"], work = ms([exposed[n] for n in hits]), ms([busy[n] for n in hits])
            out["hidden"] = 1 - out["exposed_ms"] / work if work else None
        step_ms = ms([end - begin for name, begin, end in spans if name == "chain step"])
        if hits and step_ms and (k := self.usual_plan().k):
            length = median(min(r.chain_steps, r.plan.k) for r in self.rounds if r.look_up)
            tokens = [expected_tokens(acceptance or 0.0, n) for n in (length, k)]
            out["speedup_ceiling"] = ssd_ceiling(k * step_ms, out["verify_ms"], *tokens)
        return out

    def usual_plan(self):
        """The K and M of most rounds, in the plan that most of these had; None before the first."""
        plans = [r.plan for r in self.rounds]
        if not plans:
            return None
        sizes = [(plan.k, plan.m) for plan in plans]
        usual = max(set(sizes), key=sizes.count)
        alike = [plan for plan, size in zip(plans, sizes) if size == usual]
        return max(set(alike), key=alike.count)


def run_stats(decoding, settings, models: dict, floor_s: float | None) -> dict:
    """The JSON object of a run: models and settings, texts and figures. What its mode does not use
    is None.

    floor_s: seconds that reading the target's weights once takes at the speed of a plain read.
    """
    rows, figures, lane = decoding.all_rows, decoding.figures, decoding.draft_lane
    plan = figures.usual_plan()
    unused = UNUSED[settings.mode]
    stats = models | {
        "mode": settings.mode,
        "device": decoding.target_lane.spec,
        "draft_device": lane.spec if decoding.draft is not None or decoding.lost else None,
        "k": plan.k if plan else settings.k,
        "fan_out": plan.m if plan else settings.fan_out,
        "cut": plan.cut if plan else settings.cut,
        "fallback": settings.fallback,
        "coupling": settings.coupling,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "auto": [n for n in ("k", "fan_out") if n not in unused and getattr(settings, n) == "auto"],
        "prompts": len(rows),
        "token_ids": [row.new_ids for row in rows],
        "text": [row.text for row in rows],
        "finish_reason": [row.finish for row in rows],
    }
    stats |= {name: None for name in unused if name in stats}
    stats |= figures.report(lane.spans)
    if settings.mode == "ar":  # between verifications nobody waits for a draft
        stats |= {"draft_ms": None, "exposed_ms": None}
    stats["bandwidth_fraction"] = ratio(floor_s * 1e3, stats["verify_ms"]) if floor_s else None
    return stats


def shown(stats: dict) -> dict[str, str]:
    """Label -> text of the figures that there are."""
    return {
        label: form.format(stats[name])
        for name, label, form in SHOWN
        if stats.get(name) is not None
    }


def figures_line(stats: dict) -> str:
    """One line of figures: speed first, then what explains it."""
    parts = shown(stats)
    speed = parts.pop("tokens/s")
    told = {"none": "", "stored": ", weights as in the file"}
    bits = told.get(stats["quantize"], f", {stats['quantize']} weights")
    devices = " + ".join(filter(None, (stats["device"], stats["draft_device"])))
    head = f"{stats['mode']}: {sum(stats['new_tokens'])} tokens, {speed} tokens/s"
    figures = [f"{label} {text}" for label, text in parts.items()]
    return " | ".join([head, *figures, f"{stats['dtype']}{bits} on {devices}"])


# ---- the three modes side by side


def compare(runs: dict[str, dict]) -> dict:
    """The three runs, with the ratios between them. `ceiling`: SSD over SD if all drafting were
    hidden, with the tokens a round that SSD reached.
    """
    ar, sd, ssd = (runs[mode] for mode in MODES)
    for run in runs.values():  # a text of one token has no rate
        run["over_ar"] = ratio(run["tokens_per_s"], ar["tokens_per_s"])
        run["over_sd"] = ratio(run["tokens_per_s"], sd["tokens_per_s"])
        run["ceiling"] = None
    measured = sd["draft_ms"], sd["verify_ms"], ssd["tokens_per_round"], sd["tokens_per_round"]
    if all(measured):
        ssd["ceiling"] = ssd_ceiling(*measured)
    same = all(run["token_ids"] == ar["token_ids"] for run in runs.values())
    best = max(MODES, key=lambda mode: runs[mode]["tokens_per_s"])
    return {**runs, "same_text": same, "best": best}


def table(compared: dict) -> str:
    """The figures with a column for each mode, and where each mode ran."""
    columns = [shown(compared[mode]) for mode in MODES]
    out = [f"{'':20}" + "".join(f"{mode.upper():>10}" for mode in MODES)]
    for _, label, _ in SHOWN:
        out.append(f"{label:20}" + "".join(f"{column.get(label, '-'):>10}" for column in columns))
    for mode in MODES:
        device, draft = compared[mode]["device"], compared[mode]["draft_device"]
        out.append(f"{mode.upper()} on {device}" + (f", draft on {draft}" if draft else ""))
    return "\n".join(out)


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
        verify, before, exposed = ssd["verify_ms"], sd["verify_ms"], ssd["exposed_ms"] or 0
        tokens, wanted = ssd["tokens_per_round"], sd["tokens_per_round"]
        losses = {
            f"a verification took {verify:.2f} ms, not {before:.2f}": verify / before,
            f"{exposed:.2f} ms a round were exposed between verifications": 1 + exposed / verify,
            f"a round was {tokens:.2f} tokens, not {wanted:.2f}": wanted / tokens,
        }
        term = max(losses, key=losses.get)
        out.append(f"SSD ran at {ssd['over_sd'] / ssd['ceiling']:.0%} of its ceiling over SD.")
        if losses[term] > 1.02:
            out.append(f"What ate most of the rest: {term}.")
    why = ": SSD pays where the draft has a device of its own that the target could not use"
    best = compared["best"]
    out.append(f"Best on this machine for this text: {best.upper()}{why * (best != 'ssd')}.")
    return out


# ---- the trace


def write_trace(path: str, decoding) -> None:
    """Write a Chrome/Perfetto trace: a line for each lane, and the loop's look-ups with hits and
    misses. Its times are microseconds.
    """
    lanes = dict.fromkeys((decoding.target_lane, decoding.draft_lane))
    names = ["loop", *(f"{lane.name} ({lane.spec})" for lane in lanes)]
    events = [
        {"ph": "M", "pid": 1, "tid": thread, "name": "thread_name", "args": {"name": name}}
        for thread, name in enumerate(names)
    ]
    for thread, lane in enumerate(lanes, 1):
        events += [_span(thread, *span, {}) for span in lane.spans]
    for number, r in enumerate(decoding.figures.rounds):
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
