"""How fast AR, SD, PEARL and SSD would be, by the speed model, for times and chances of your own.

Knows: what a round of each mode consists of. Does not know: the engine; published numbers
(paper.py). Read next: paper.py.

    python -m studies.simulate --verify-ms 18.3 --step-ms 2 --acceptance 0.88 --k 5 --fan-out 24

With --ranks a target of that verification time on one device is shared by several: each computes
its share, and all wait for the sums between the layers.

PEARL is SSD that prepares one outcome only, "all accepted". Its check of the first draft token
while the draft still works is not modelled.
"""

import argparse
from dataclasses import asdict, dataclass, replace

from figures import expected_tokens
from runtime import STEP_SHARE
from studies.speed import (
    allocate,
    geometric,
    long_run_hits,
    outcomes,
    power_law,
    sd_rate,
    ssd_rate,
    whole,
)  # fmt: skip

# Draft now; an empty proposal; random tokens, of which none holds.
FALLBACKS = ("jit", "fast", "random")
LISTS = ("best", "uniform", "geometric", "last")


# Bytes and microseconds of a sum over ranks on one machine: a guess. Measured ones come from
# `scripts/bench_ranks.py --device cuda` and are given with --all-reduce.
ASSUMED = ((1 << 14, 10.0), (1 << 20, 20.0), (1 << 24, 120.0))


@dataclass(frozen=True)
class Ranks:
    """Devices that share a target: their number, the sums of a pass (two a layer, and one for the
    embedding), the bytes that a token has in each, and what sums of some sizes take, in seconds.
    """

    count: int
    sums: int
    token_bytes: int
    curve: tuple[tuple[float, float], ...]

    def waiting(self, tokens: int) -> float:
        """Seconds of all sums of a pass: on a line between two known sizes, past the last one as
        long as its bytes make it.
        """
        size, points = tokens * self.token_bytes, sorted(self.curve)
        for (low, t_low), (high, t_high) in zip(points, points[1:]):
            if size <= high:
                return self.sums * (t_low + max(size - low, 0) / (high - low) * (t_high - t_low))
        last, t_last = points[-1]
        return self.sums * t_last * max(size / last, 1)


@dataclass(frozen=True)
class Pair:
    """Times of both models in seconds, and chances. A pass costs a fixed time and one a token."""

    verify: float
    step: float  # a draft step; extending takes as long if `extend` is None
    acceptance: float = 0.8
    c: float = 0.28  # a branch's token is missed with chance c F^-b
    b: float = 0.54
    extend: float | None = None
    verify_token: float = 0.0
    step_token: float = 0.0
    ranks: Ranks | None = None  # the target's; the draft has a device of its own

    def verifying(self, tokens: int) -> float:
        alone = self.verify + self.verify_token * tokens
        if self.ranks is None:
            return alone
        return alone / self.ranks.count + self.ranks.waiting(tokens)

    def stepping(self, tokens: int) -> float:
        return self.step + self.step_token * tokens

    def extending(self, tokens: int) -> float:
        return self.stepping(tokens) if self.extend is None else self.extend


@dataclass(frozen=True)
class Speed:
    """What the model foretells: tokens a second of each sequence, and what that follows from."""

    tokens_per_s: float
    round_ms: float
    tokens_per_round: float
    hit_rate: float | None = None
    chain_length: int | None = None


def shares(lists: str, pair: Pair, length: int, budget: int) -> list[int]:
    """F_0..F_L for a proposal of this length."""
    if length == 0 or lists == "last":
        return [0] * length + [budget]
    if lists == "uniform":
        return whole([budget / (length + 1)] * (length + 1), budget)
    if lists == "geometric":
        return whole(geometric(pair.acceptance, pair.b, length, budget), budget)
    curve = power_law(pair.c, pair.b, budget)
    return allocate(outcomes(pair.acceptance, length), [curve] * (length + 1), budget)


def hit_chance(pair: Pair, F: list[int]) -> float:
    """The chance of a row to hit, after a proposal of length len(F) - 1."""
    miss = power_law(pair.c, pair.b, max(F))
    return sum(P * (1 - miss[F_j]) for P, F_j in zip(outcomes(pair.acceptance, len(F) - 1), F))


def ar(pair: Pair, batch: int = 1) -> Speed:
    t = pair.verifying(batch)
    return Speed(1 / t, t * 1e3, 1)


def sd(pair: Pair, k: int, batch: int = 1) -> Speed:
    tokens, t_draft = expected_tokens(pair.acceptance, k), k * pair.stepping(batch)
    t_verify = pair.verifying(batch * (k + 1))
    return Speed(sd_rate(tokens, t_draft, t_verify), (t_draft + t_verify) * 1e3, tokens)


def ssd(
    pair: Pair, k: int, budget: int, batch: int = 1, lists="best", fallback="jit", cut=True
) -> Speed:
    """SSD with `budget` branches a row. cut: a chain step is begun if half of it fits."""
    extend, step = pair.extending(batch * (k + 1)), pair.stepping(batch * budget)
    length = k
    if cut:
        length = chain_length(pair.verifying(batch * (k + 1)) - extend, step, k)
    t_hit = t_miss = max(pair.verifying(batch * (length + 1)), extend + length * step)
    hit = after_miss = hit_chance(pair, F := shares(lists, pair, length, budget))
    tokens, tokens_miss = expected_tokens(pair.acceptance, length), 1.0
    if fallback == "jit":
        t_miss, tokens_miss = t_hit + k * pair.stepping(batch), expected_tokens(pair.acceptance, k)
        after_miss = hit_chance(pair, shares(lists, pair, k, budget))
    else:  # nothing of such a proposal holds: the outcome is j = 0
        prepared = budget if fallback == "fast" else F[0]
        after_miss = 1 - power_law(pair.c, pair.b, max(prepared, 1))[prepared]
    hits = long_run_hits(hit, after_miss)
    rate = ssd_rate(hits, tokens, tokens_miss, t_hit, t_miss, batch)
    emitted = hits * tokens + (1 - hits) * tokens_miss
    return Speed(rate, emitted / rate * 1e3, emitted, hits, length)


def chain_length(seconds: float, step: float, k: int) -> int:
    """Steps that a chain has with so much time until the verdict, as Lane.has_time decides."""
    # The small number: times that divide evenly must not lose a step to rounding.
    return min(max(int(seconds / step + 1 - STEP_SHARE + 1e-9), 1), k)


def sd_halves(pair: Pair, k: int, batch: int) -> Speed:
    """SD in halves: while one half of the batch is verified, the draft drafts for the other."""
    half, tokens = batch / 2, expected_tokens(pair.acceptance, k)
    t_verify = pair.verifying(half * (k + 1))
    t = max(t_verify, k * pair.stepping(half))
    return Speed(tokens / (2 * t), t * 1e3, tokens)


def ssd_halves(pair: Pair, k: int, budget: int, batch: int) -> Speed:
    """Halves and chains: the draft first drafts for the rows that missed of the half whose verdict
    is in, then prepares chains for it with the time that is left of the other's verification.
    """
    half = batch / 2
    hits = hit_chance(pair, shares("best", pair, k, budget))
    t_jit = (1 - hits**half) * k * pair.stepping((1 - hits) * half)
    t_verify = pair.verifying(half * (k + 1))
    prepare, step = pair.extending(half * (k + 1)), pair.stepping(half * budget)
    length = chain_length(t_verify - t_jit - prepare, step, k)
    t = max(t_verify, t_jit + prepare + length * step)
    tokens = hits * expected_tokens(pair.acceptance, length)
    tokens += (1 - hits) * expected_tokens(pair.acceptance, k)
    return Speed(tokens / (2 * t), t * 1e3, tokens, hits, length)


def simulate(
    pair: Pair, k: int, budget: int, batch: int = 1, fallback: str = "jit"
) -> dict[str, Speed]:
    """The modes side by side; halves where there are two rows or more."""
    halves = {
        "SD in halves": sd_halves(pair, k, batch),
        "SSD in halves": ssd_halves(pair, k, budget, batch),
    }
    return {
        "AR": ar(pair, batch),
        "SD": sd(pair, k, batch),
        "PEARL": ssd(pair, k, 1, batch, "last", fallback),
        "SSD": ssd(pair, k, budget, batch, "best", fallback),
    } | (halves if batch > 1 else {})


def table(rows: list[dict]) -> str:
    """Markdown, a column for each key; what is None stays empty."""
    shown = [
        ["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
        for row in rows
    ]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured(text: str) -> tuple[float, float]:
    """BYTES:US as two numbers."""
    size, _, us = text.partition(":")
    return float(size), float(us)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="simulate.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    p.add_argument("--verify-ms", type=float, required=True, help="a verification")
    p.add_argument("--step-ms", type=float, required=True, help="a draft step")
    p.add_argument("--acceptance", type=float, default=0.8, help="of a draft token (0.8)")
    p.add_argument("--miss", type=float, nargs=2, metavar=("C", "B"), default=(0.28, 0.54),
                   help="a token is missed with chance C F^-B (the paper's 70B pair)")  # fmt: skip
    p.add_argument("--k", type=int, default=4, help="most draft tokens a round (4)")
    p.add_argument(
        "--fan-out", type=int, default=16, help="outcomes prepared a round and sequence (16)"
    )
    p.add_argument("--batch", type=int, default=1, help="sequences (1)")
    p.add_argument("--fallback", choices=FALLBACKS, default="jit", help="after a miss (jit)")
    p.add_argument("--ranks", type=int, default=1, help="devices that share the target (1)")
    p.add_argument("--layers", type=int, default=80, help="of the target, with --ranks (80)")
    p.add_argument("--token-bytes", type=int, default=16384,
                   help="of a token between two layers, with --ranks (16384)")  # fmt: skip
    p.add_argument("--all-reduce", type=measured, nargs="+", metavar="BYTES:US", default=ASSUMED,
                   help="microseconds of a sum over the ranks, by its bytes (a guess)")  # fmt: skip
    return p


def main(argv: list[str] | None = None) -> None:
    p = parser()
    a = p.parse_args(argv)
    least = {"verify_ms": 1e-9, "step_ms": 1e-9, "acceptance": 0, "k": 1, "fan_out": 1, "batch": 1}
    least |= {"ranks": 1, "layers": 1, "token_bytes": 1}
    for name, low in least.items():
        high = 1 if name == "acceptance" else 1e6
        if not low <= (got := getattr(a, name)) <= high:
            p.error(f"--{name.replace('_', '-')} is {got}, wanted {low:g} to {high:g}")
    pair, ranks = Pair(a.verify_ms / 1e3, a.step_ms / 1e3, a.acceptance, *a.miss), None
    if a.ranks > 1:
        curve = tuple((size, us / 1e6) for size, us in a.all_reduce)
        ranks = Ranks(a.ranks, 2 * a.layers + 1, a.token_bytes, curve)
        known = "assumed, not measured" if a.all_reduce is ASSUMED else "as given"
        ms = [f"{1e3 * ranks.waiting(tokens):.3g} ms" for tokens in (1, a.k + 1)]
        print(f"{ranks.sums} sums over the ranks, {known}: {ms[0]} a token, {ms[1]} for {a.k + 1}")
    pair = replace(pair, ranks=ranks)
    speeds = simulate(pair, a.k, a.fan_out, a.batch, a.fallback)
    print(table([{"mode": mode} | asdict(speed) for mode, speed in speeds.items()]))


if __name__ == "__main__":
    main()
