"""Figures of a run and the speed model that explains them.

Knows: times, counts, and how they combine to tokens per second. Does not know: tensors, models, what is timed.
Read next: generate.py, which prints this.

With equal K, SSD gains at most (1 + t_draft / t_verify) over SD: it hides the drafting, it does not make a
verification cheaper. All times are host seconds; a round lasts from the start of one verification to the next.
"""

import bisect
import math
import time
from statistics import mean, median, variance
from typing import NamedTuple

from sampling import CHAIN, FIXED

DRAFT_WORK = ("extend", "fork", "chain step", "draft")  # what counts as the draft being busy
CALIBRATION_ROUNDS = 32
# An easy or a hard stretch of a text lasts for several rounds: tokens a round vary more over a run than draws would.
STRETCH = 3.0


def expected_tokens(acceptance: float, length: int) -> float:
    """E: tokens emitted by a round whose proposal has `length` tokens, each accepted with the same probability."""
    return length + 1 if acceptance >= 1 else (1 - acceptance ** (length + 1)) / (1 - acceptance)


def sd_rate(tokens: float, t_draft: float, t_verify: float) -> float:
    return tokens / (t_draft + t_verify)


def ssd_rate(hit_rate, tokens_hit, tokens_miss, t_hit, t_miss, batch: int = 1) -> float:
    """Tokens a second and row; a batch waits for its slowest row, so all of its rows must hit for a short round."""
    all_hit = hit_rate**batch
    emitted = hit_rate * tokens_hit + (1 - hit_rate) * tokens_miss
    return emitted / (all_hit * t_hit + (1 - all_hit) * t_miss)


def distinct_4grams(ids: list[int]) -> float | None:
    """Share of distinct 4-grams: repetitive text flatters every speculative figure."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return len(set(grams)) / len(grams) if grams else None


class LookUp(NamedTuple):
    """What a round's look-up found, on the clock of the lanes. It feeds the next round."""

    round: int
    begin: float
    end: float
    rows: int
    missed: list[int]
    steps: int  # of the chains, when they were looked up


class Figures:
    """What happened in a run, round by round; report() sums it up as the terminal contract's JSON keys."""

    def __init__(self, rows, settings):
        self.rows, self.settings = rows, settings
        self.begin = self.prefilled = self.end = 0.0
        self.verifies: list[tuple[float, float]] = []
        self.emitted: list[int] = []  # a round's tokens, all rows
        self.live: list[int] = []
        self.kinds = {CHAIN: [0, 0, 0], FIXED: [0, 0, 0]}  # accepted, rejected, drafted
        self.lookups: list[LookUp] = []
        self.jit_s: list[float] = []
        self.choices: list[tuple[int, int]] = []  # each round's K and M
        self.promised: float | None = None  # by the tuner, after the first rounds, tokens a second and row
        self.earlier: list[float] = []  # tokens a second of earlier runs of the same kind

    def verified(self, kinds, lengths, accepted, live, verdict, choice) -> None:
        """One verification is in: what was tried and how much of it held, for the rows in `live`."""
        self.verifies.append((verdict.begin, verdict.end))
        self.emitted.append(sum(accepted[b] + 1 for b in live))
        self.live.append(len(live))
        self.choices.append(choice)
        for b in live:
            if lengths[b]:
                count = self.kinds[kinds[b]]
                count[0] += accepted[b]
                count[1] += accepted[b] < lengths[b]
                count[2] += lengths[b]

    def looked_up(self, begin: float, rows: int, missed: list[int], steps: int) -> None:
        self.lookups.append(LookUp(len(self.verifies) - 1, begin, time.perf_counter(), rows, missed, steps))

    # ---- used while the run goes on

    def acceptance(self, kind: int, prior: float = 0.5, weight: float = 4.0) -> float:
        accepted, rejected, _ = self.kinds[kind]
        return (accepted + prior * weight) / (accepted + rejected + weight)

    def prefers_jit(self, guessed: list[int], k: int) -> bool:
        """Is drafting now for the missed rows worth the wait, given how long each row's n-gram guess is?

        Waiting pays if the extra tokens per second of waiting beat the run's own rate.
        """
        if len(self.jit_s) < 2:
            return True
        chain, fixed = self.acceptance(CHAIN, 0.8), self.acceptance(FIXED)
        gain = sum(expected_tokens(chain, k) - expected_tokens(fixed, length) for length in guessed)
        since = self.verifies[-min(33, len(self.verifies))][0]
        recent = self.emitted[-32:]
        return gain / median(self.jit_s[-9:]) > sum(recent) / max(self.verifies[-1][1] - since, 1e-9)

    def usual_verify(self) -> float:
        """Seconds that a verification takes in recent rounds; infinite where too little is known."""
        recent = [end - begin for begin, end in self.verifies[-9:]]
        return median(recent) if len(recent) > 2 else float("inf")

    def usual_exposed(self) -> float:
        """Seconds between two verifications where the recent look-ups found every row."""
        gaps = [self.verifies[n + 1][0] - self.verifies[n][1] for n in self.hit_rounds(24)]
        return median(gaps) if gaps else 0.0

    def emitted_with(self, k: int) -> int:
        """Tokens of the rounds for which this K was chosen."""
        return sum(tokens for tokens, (chosen, _) in zip(self.emitted, self.choices) if chosen == k)

    def rate(self) -> float | None:
        """Tokens a second, all rows, without the first and the last round; None for a run too short to tell."""
        rounds = len(self.verifies) - 2
        return sum(self.emitted[1:-1]) / (self.verifies[-1][0] - self.verifies[1][0]) if rounds >= 16 else None

    def usual_choice(self) -> tuple[int, int] | None:
        """The K and M of most rounds."""
        return max(set(self.choices), key=self.choices.count) if self.choices else None

    # ---- the report

    def report(self, spans) -> dict:
        """The figures of the terminal contract. spans: what ran on the draft's lane, (name, begin, end)."""
        new = [len(row.new_ids) for row in self.rows]
        prefilled = self.prefilled or self.end  # interrupted before the first token
        decode_s = max(self.end - prefilled, 1e-9)
        rounds = max(len(self.verifies) - 1, 0)  # the first round belongs to the prefill
        row_rounds = sum(self.live[1:])
        rate = max(sum(new) - len(new), 0) / decode_s
        mode = self.settings.mode
        accepted, rejected, drafted = (sum(kind[i] for kind in self.kinds.values()) for i in range(3))
        looked, missed = sum(x.rows for x in self.lookups), sum(len(x.missed) for x in self.lookups)
        shares = [s for row in self.rows if (s := distinct_4grams(row.new_ids)) is not None]
        out = {
            "prompt_tokens": [row.prompt for row in self.rows],
            "new_tokens": new,
            "prefill_s": prefilled - self.begin,
            "decode_s": decode_s,
            "tokens_per_s": rate,
            "rounds": rounds,
            "tokens_per_round": (sum(new) - len(new)) / row_rounds if row_rounds else None,
            "acceptance_rate": accepted / (accepted + rejected) if accepted + rejected else None,
            "accepted_fraction": accepted / drafted if drafted else None,
            "hit_rate": 1 - missed / looked if looked else None,
            "distinct_4grams": sum(shares) / len(shares) if shares else None,
        }
        return out | self.times(mode, spans) | self.predict(mode, spans)

    def busy(self, spans) -> list[float]:
        """Seconds that the draft worked in each round."""
        starts = [begin for begin, _ in self.verifies]
        total = [0.0] * len(starts)
        for name, begin, end in spans:
            if name in DRAFT_WORK and starts and begin >= starts[0]:
                total[bisect.bisect_right(starts, begin) - 1] += end - begin
        return total

    def hit_rounds(self, recent: int = 0) -> list[int]:
        """Rounds whose look-up found every row and fed another round; of the last `recent` look-ups, or (0) of all."""
        return [x.round for x in self.lookups[-recent:] if not x.missed and x.round + 1 < len(self.verifies)]

    def times(self, mode: str, spans) -> dict:
        verifies, busy = self.verifies, self.busy(spans)
        middle = lambda values: median(values) * 1e3 if values else None  # noqa: E731
        lasts = [after[0] - before[0] for before, after in zip(verifies[1:], verifies[2:])]
        gaps = [after[0] - before[1] for before, after in zip(verifies, verifies[1:])]
        out = {
            "round_ms": middle(lasts),
            "verify_ms": middle([end - begin for begin, end in verifies[1:]]),
            "draft_ms": middle(busy[1:]) if mode != "ar" else None,
            "exposed_ms": middle(gaps[1:]) if mode != "ar" else None,
            "hidden": None,
        }
        hits = [n for n in self.hit_rounds() if n]
        if mode == "ssd" and hits:
            exposed, work = median(gaps[n] for n in hits), median(busy[n] for n in hits)
            out |= {"exposed_ms": exposed * 1e3, "hidden": 1 - exposed / work if work else None}
        return out

    def predict(self, mode: str, spans) -> dict:
        """Speed foretold by the model from the first rounds alone, and how far SSD could at most pass SD."""
        out = {"predicted_tokens_per_s": None, "speedup_ceiling": None}
        last = min(CALIBRATION_ROUNDS, len(self.verifies) - 1)
        if last < 8:
            return out
        verifies, rows = self.verifies[: last + 1], len(self.rows)
        t_verify = median(end - begin for begin, end in verifies)
        lasts = [after[0] - before[0] for before, after in zip(verifies, verifies[1:])][1:]
        tokens = sum(self.emitted[1:last]) / max(sum(self.live[1:last]), 1)
        if mode == "ar":
            return out | {"predicted_tokens_per_s": rows / median(lasts)}
        if mode == "sd":
            t_draft = median(after[0] - before[1] for before, after in zip(verifies[1:], verifies[2:]))  # as waited for
            return out | {"predicted_tokens_per_s": self.foretold(rows * sd_rate(tokens, t_draft, t_verify), last)}
        hit = [n for n in self.hit_rounds() if 0 < n < last]
        missed = [n for n in range(1, last) if n not in set(hit)]
        rate = lambda of: sum(self.emitted[n + 1] for n in of) / max(sum(self.live[n + 1] for n in of), 1)  # noqa: E731
        lasts = [verifies[n + 1][0] - verifies[n][0] for n in range(last)]
        t_hit = median(lasts[n] for n in hit) if hit else median(lasts)
        t_miss = median(lasts[n] for n in missed) if missed else t_hit
        share = len(hit) / max(len(hit) + len(missed), 1)
        rates = rate(hit) if hit else tokens, rate(missed) if missed else tokens
        out["predicted_tokens_per_s"] = self.foretold(rows * ssd_rate(share, *rates, t_hit, t_miss), last)
        steps = [end - begin for name, begin, end in spans if name == "chain step"]
        k, a = self.usual_choice()[0], self.acceptance(CHAIN, 0.8)
        if k and steps and self.lookups:  # none where the draft failed at once or did not pay
            length = median(lookup.steps for lookup in self.lookups)
            gain = expected_tokens(a, length) / expected_tokens(a, k)
            out["speedup_ceiling"] = (1 + k * median(steps) / t_verify) * gain
        return out

    def foretold(self, rate: float, last: int) -> float:
        """The forecast, from what the first `last` rounds came to. They were played with several K, and the rest will
        be with the one that the tuner chose then: halfway to what it promised. And they are few: towards what earlier
        runs came to, the more the less these differ from each other, and the more the tokens of a round vary."""
        if self.promised:
            rate = math.sqrt(rate * self.promised * len(self.rows))
        if (n := len(self.earlier)) < 2:
            return rate
        logs, tokens = [math.log(x) for x in self.earlier], self.emitted[1:last]
        between = variance(logs) * (n + 1) / (n - 1)  # few runs tell little of how they differ
        within = STRETCH * variance(tokens) / mean(tokens) ** 2 / len(tokens)
        weight = between / (between + within) if between + within else 1.0
        return math.exp(weight * math.log(rate) + (1 - weight) * mean(logs))
