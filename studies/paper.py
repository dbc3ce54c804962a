"""The paper's tables by the speed model: three numbers are fitted for a pair, the rest is foretold.

Knows: what was published, and what has to be assumed to play it. Does not know: the engine.

    python -m studies.paper > studies/README.md

Source: "Speculative Speculative Decoding", arXiv 2603.03251. Four H100 hold the target and one more
SSD's draft. SD has K = 6, SSD K = 7 and F = 3 for each of its eight outcomes. SSD waits for its
chains there, and a miss makes the whole batch draft anew.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from figures import expected_tokens
from studies.simulate import (
    Pair,
    ar,
    hit_chance,
    sd,
    sd_halves,
    shares,
    ssd,
    ssd_halves,
    table,
)

LLAMA, QWEN = "Llama-3.1-70B / 3.2-1B", "Qwen3-32B / 0.6B"
PAIRS = {  # tokens/s of AR, SD, SSD at temperature 0; parameters of target and draft
    LLAMA: (54.7, 161.8, 255.8, 70.6e9, 1.24e9),
    QWEN: (88.8, 136.8, 203.8, 32.8e9, 0.6e9),
}
SD_K, SSD_K, F = 6, 7, 3
M = F * (SSD_K + 1)
# By temperature: SD; SSD with uniform fan-out, its hits; with geometric fan-out, its hits. 70B/1B.
TEMPERATURES = {
    0.0: (161, 246, 0.847, 248, 0.861),
    0.3: (150, 222, 0.834, 226, 0.851),
    0.7: (138, 195, 0.783, 200, 0.812),
    1.0: (113, 137, 0.583, 143, 0.633),
}
# By batch: SD, SSD with jit, SSD with random tokens after a miss. Tokens/s a sequence, F = 1.
BATCHES = {
    1: (162, 256, 249),
    2: (158, 214, 244),
    4: (155, 186, 237),
    8: (145, 160, 207),
    16: (130, 135, 170),
}
REPLICATION = Pair(verify=11.5e-3, step=2.5e-3, extend=2.8e-3)  # of the Qwen pair; AR 97 tokens/s
REPLICATED = {4: (141, 211), 7: (None, 159)}  # by K: SD, SSD
MISS_EXPONENT = (0.54, 0.41)  # b at temperature 0 and at 1, published
GPUS, FLOPS = 4, 0.5 * 989e12  # half of an H100's dense bf16 peak
ASSUMED = (
    "A pass costs a fixed time, and 2 FLOPs for each parameter and token at half of an H100's "
    "bf16 peak.",
    "Every draft token is accepted with the same chance, rounds and rows are independent, and "
    "misses follow c F^-b.",
    "Acceptance, draft step and c are fitted to SD, SSD and the uniform hits at temperature 0. "
    "Above it, acceptance comes from SD's cell and c from the cell of the uniform hits.",
    "The Qwen pair has the Llama pair's hits: its own are not published. "
    "The replication's acceptance comes from its own SD, for which K = 4 is assumed.",
)


def crossing(function: Callable[[float], float], low: float = 0.01, high: float = 0.999) -> float:
    """Where the function first passes 0 from below, found on a grid and then by halving."""
    grid = [low + n * (high - low) / 400 for n in range(401)]
    signs = [function(x) > 0 for x in grid]
    if True not in signs[1:] or signs[0]:
        raise ValueError("the published cells cannot be met by any choice of the free numbers")
    low, high = grid[signs.index(True) - 1], grid[signs.index(True)]
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return low


def exponent(temperature: float) -> float:
    return MISS_EXPONENT[0] + temperature * (MISS_EXPONENT[1] - MISS_EXPONENT[0])


def published_ssd(
    pair: Pair, k: int = SSD_K, budget: int = M, batch: int = 1, lists="uniform", fallback="jit"
):
    """SSD as the paper runs it: chains are waited for."""
    return ssd(pair, k, budget, batch, lists, fallback, cut=False)


def with_acceptance(name: str, acceptance: float) -> Pair:
    """The pair whose draft step is such that SD runs as published; it may come out below 0."""
    plain, sd_rate, _, target, draft = PAIRS[name]
    verify_token, step_token = 2 * target / (GPUS * FLOPS), 2 * draft / FLOPS
    c = (1 - TEMPERATURES[0.0][2]) * F ** MISS_EXPONENT[0]
    pair = Pair(
        1 / plain - verify_token, 0.0, acceptance, c, exponent(0), None, verify_token, step_token
    )
    drafting = expected_tokens(acceptance, SD_K) / sd_rate - pair.verifying(SD_K + 1)
    return replace(pair, step=drafting / SD_K - step_token)


def fit(name: str) -> Pair:
    """The acceptance with which SSD, too, runs as published."""

    def excess(acceptance: float) -> float:
        pair = with_acceptance(name, acceptance)
        return published_ssd(pair).tokens_per_s - PAIRS[name][2] if pair.step > 0 else -1.0

    return with_acceptance(name, crossing(excess))


def accepting(pair: Pair, rate: float, k: int) -> Pair:
    """The same pair with the acceptance at which its SD has this rate."""
    return replace(
        pair, acceptance=crossing(lambda a: sd(replace(pair, acceptance=a), k).tokens_per_s - rate)
    )


def cell(group: str, what: str, published: float, model: float, fitted: bool = False) -> dict:
    return {"of": group, "cell": what, "published": float(published), "model": model,
            "error": f"{model / published - 1:+.1%}",
            "": "fitted" if fitted else "foretold"}  # fmt: skip


def pair_cells() -> Iterator[dict]:
    for name, (plain, taking_turns, at_once, *_) in PAIRS.items():
        pair = fit(name)
        yield cell(name, "AR", plain, ar(pair).tokens_per_s, True)
        yield cell(name, f"SD, K = {SD_K}", taking_turns, sd(pair, SD_K).tokens_per_s, True)
        yield cell(name, f"SSD, K = {SSD_K}", at_once, published_ssd(pair).tokens_per_s, True)


def temperature_cells() -> Iterator[dict]:
    for T, (taking_turns, uniform, uniform_hits, geometric, geometric_hits) in TEMPERATURES.items():
        b = exponent(T)
        pair = replace(accepting(fit(LLAMA), taking_turns, SD_K), b=b, c=(1 - uniform_hits) * F**b)
        for lists, rate, hits in (
            ("uniform", uniform, uniform_hits),
            ("geometric", geometric, geometric_hits),
        ):
            chance = hit_chance(pair, shares(lists, pair, SSD_K, M))
            group = f"temperature {T:g}"
            yield cell(group, f"hits, {lists} fan-out", hits, chance, lists == "uniform")
            yield cell(
                group, f"SSD, {lists} fan-out", rate, published_ssd(pair, lists=lists).tokens_per_s
            )


def batch_cells() -> Iterator[dict]:
    pair, budget = fit(LLAMA), SSD_K + 1
    for batch, (taking_turns, jit, random) in BATCHES.items():
        group = f"batch {batch}"
        yield cell(group, "SD", taking_turns, sd(pair, SD_K, batch).tokens_per_s, batch == 1)
        for fallback, rate in (("jit", jit), ("random", random)):
            speed = published_ssd(pair, budget=budget, batch=batch, fallback=fallback)
            yield cell(group, f"SSD, {fallback} after a miss", rate, speed.tokens_per_s)


def halves_rows() -> list[dict]:
    """The pair of the batch table beyond it, beside halves: nobody published those. K of SD and of
    halves is the best of 1 to 8; the draft's device is as in the paper.
    """
    pair, budget, rows = fit(LLAMA), SSD_K + 1, []
    for batch in (1, 2, 4, 8, 16, 32, 64):
        best = {"SD": max(sd(pair, k, batch).tokens_per_s for k in range(1, 9))}
        for name in ("jit", "random"):
            speed = published_ssd(pair, budget=budget, batch=batch, fallback=name)
            best[f"SSD, {name}"] = speed.tokens_per_s
        if batch > 1:
            turns = (sd_halves(pair, k, batch) for k in range(1, 9))
            chains = (ssd_halves(pair, k, k + 1, batch) for k in range(1, 9))
            best["SD in halves"] = max(speed.tokens_per_s for speed in turns)
            best["SSD in halves"] = max(speed.tokens_per_s for speed in chains)
        names = ("SD", "SSD, jit", "SSD, random", "SD in halves", "SSD in halves")
        rows.append({"batch": batch} | {name: best.get(name) for name in names})
    return rows


def replication_cells() -> Iterator[dict]:
    known = fit(QWEN)
    pair = accepting(replace(REPLICATION, b=known.b, c=known.c), REPLICATED[4][0], 4)
    yield cell("replication", "AR", 97, ar(pair).tokens_per_s)
    yield cell("replication", "SD, K = 4", REPLICATED[4][0], sd(pair, 4).tokens_per_s, True)
    for k, (_, rate) in REPLICATED.items():
        yield cell(
            "replication", f"SSD, K = {k}", rate, published_ssd(pair, k, F * (k + 1)).tokens_per_s
        )


def report() -> str:
    """The whole study as Markdown."""
    groups = {
        "Both pairs, tokens/s": pair_cells(),
        "Temperatures, 70B/1B": temperature_cells(),
        "Batches, 70B/1B, tokens/s a sequence": batch_cells(),
        "A replication of the Qwen pair": replication_cells(),
    }
    groups = {title: list(cells) for title, cells in groups.items()}
    errors = [
        abs(c["model"] / c["published"] - 1)
        for cells in groups.values()
        for c in cells
        if c[""] == "foretold"
    ]
    lines = [
        "# The paper's tables, by the speed model",
        "",
        "Made by `python -m studies.paper > studies/README.md`.",
        "",
    ]
    lines += [f"{len(errors)} cells are foretold, with a mean error of "
              f"{sum(errors) / len(errors):.1%} and a worst of {max(errors):.1%}. "
              "Nothing here was measured by us.", ""]  # fmt: skip
    for title, cells in groups.items():
        lines += [f"## {title}", "", table(cells), ""]
    title = "## Batches to 64 with halves, 70B/1B, tokens/s a sequence, all foretold"
    lines += [title, "", table(halves_rows()), ""]
    return "\n".join([*lines, "## Assumed", "", *(f"* {text}" for text in ASSUMED)])


if __name__ == "__main__":
    print(report())
