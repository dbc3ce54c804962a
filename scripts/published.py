"""The paper's numbers and a replication's: fitted in a few cells, predicted in the others, and asked what they imply.

Knows: published rates and hits, the free numbers and the assumptions that join them to clock.py. Does not know: how a
round is played (clock.py), how tables look (simulate.py). Read next: fit(), error_table(), what_if().

Source of the rates: "Speculative Speculative Decoding", arXiv 2603.03251; greedy, batch 1, four H100 for the target and
one more for SSD's draft. SD has K = 6 there, SSD K = 7 and F = 3 for each of its eight outcomes, and waits for its
chains; after a miss the whole batch drafts anew.
"""

import itertools
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from clock import Plan, Profile, Times, fan_out_list, hit_chance, miss_curve, play, power_law  # noqa: E402

from speed import expected_tokens, sd_rate, ssd_rate  # noqa: E402

LLAMA, QWEN = "Llama-3.1-70B / 3.2-1B", "Qwen3-32B / 0.6B"
PAIRS = {  # tokens/s of AR, SD, SSD at temperature 0; parameters of target and draft
    LLAMA: {"ar": 54.7, "sd": 161.8, "ssd": 255.8, "target": 70.6e9, "draft": 1.24e9},
    QWEN: {"ar": 88.8, "sd": 136.8, "ssd": 203.8, "target": 32.8e9, "draft": 0.6e9},
}
SD_K, SSD_K, F = 6, 7, 3
M = F * (SSD_K + 1)
# Temperature: SD; SSD with uniform fan-out, its hits; with geometric fan-out, its hits. 70B/1B, batch 1.
TEMPERATURES = {
    0.0: (161, 246, 0.847, 248, 0.861),
    0.3: (150, 222, 0.834, 226, 0.851),
    0.7: (138, 195, 0.783, 200, 0.812),
    1.0: (113, 137, 0.583, 143, 0.633),
}
# Batch: SD, SSD with jit, SSD with random tokens on a miss; tokens/s per sequence. 70B/1B, F = 1.
BATCHES = {1: (162, 256, 249), 2: (158, 214, 244), 4: (155, 186, 237), 8: (145, 160, 207), 16: (130, 135, 170)}
MISS_EXPONENT = {0.0: 0.54, 1.0: 0.41}  # b of the miss curve, as published
REPLICATION = {"verify_ms": 11.5, "step_ms": 2.5, "extend_ms": 2.8, "ar": 97, "sd": 141, "ssd": {4: 211, 7: 159}}
GPUS, PEAK_FLOPS, REACHED = 4, 989e12, 0.5  # dense bf16 on an H100; the share of it that a pass is assumed to reach
# Ours at temperature 1, 67M/3.7M on code, a better and a worse draft: acceptance, and chances that a rejected place's
# token is among the best F. The bonus token's were measured on the better draft only.
ACCEPTANCE = {"independent": (0.884, 0.762), "maximal": (0.884, 0.762), "shared": (0.852, 0.709)}
REJECTED = {
    "independent": ({1: 0.21, 2: 0.31, 4: 0.38, 8: 0.45}, {1: 0.14, 2: 0.22, 4: 0.28, 8: 0.35}),
    "maximal": ({1: 0.39, 2: 0.58, 4: 0.78, 8: 0.92}, {1: 0.31, 2: 0.48, 4: 0.68, 8: 0.85}),
    "shared": ({1: 0.74, 2: 0.91, 4: 0.99, 8: 0.999}, {1: 0.54, 2: 0.75, 4: 0.90, 8: 0.98}),
}
BONUS = {"independent": {2: 0.35, 4: 0.42}, "maximal": {2: 0.96, 4: 0.995}, "shared": {2: 0.96, 4: 0.995}}
ASSUMED = (
    f"A pass over a model costs a fixed time and 2 FLOPs a parameter and token at {REACHED:.0%} of an H100's bf16 peak;"
    f" the target has {GPUS} GPUs, the draft one. Reading KV caches costs nothing.",
    "AR spends all its time in passes of one token; handing over costs nothing (the fitted draft step contains it).",
    "Every draft token is accepted with the same chance; outcomes of rounds and rows are independent.",
    "Misses follow c F^-b, the same for rejected places and bonus tokens, b as published (straight line between"
    " temperatures 0 and 1); the Qwen pair has the Llama pair's hits, its own are not published.",
    "On a miss the paper's SSD drafts K tokens anew for the whole batch (jit), or goes on with random tokens, none of"
    " which holds and behind which F branches are prepared for j = 0.",
    "The acceptance above temperature 0 comes from the SD cell of that temperature: SD is given there, not predicted.",
    "The replication verifies with its stated times at any K; the K of its SD is not stated.",
    "What is asked: above temperature 0, acceptance and ranks of `maximal` and `shared` are those of our small pairs at"
    " the 70B pair's acceptance; a row without a chain has an empty proposal (no n-gram is ever found); K is searched"
    " in 3 to 10, M in 8 to 64. The draws alone move a speed by 1%.",
)
KS, BUDGETS = (3, 5, 7, 10), (8, 16, 32, 64)  # what is searched for the best
TOO_LARGE_K = 12  # more steps than fit behind a verification
SEED, ROW_ROUNDS, SEARCH_ROUNDS, ASKED_ROUNDS = 0, 20_000, 1_500, 10_000


# ---- the fit


def bisect(function, low: float, high: float) -> float:
    """Where an increasing function passes 0."""
    if not function(low) < 0 < function(high):
        raise ValueError("the published cells cannot be met by any choice of the free numbers")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return low


def exponent(temperature: float) -> float:
    return MISS_EXPONENT[0.0] + temperature * (MISS_EXPONENT[1.0] - MISS_EXPONENT[0.0])


def times_for(pair: dict, acceptance: float) -> Times:
    """The draft step with which SD runs as published, given the acceptance; the rest is known or assumed."""
    verify_token = 2 * pair["target"] / (GPUS * PEAK_FLOPS * REACHED)
    step_token = 2 * pair["draft"] / (PEAK_FLOPS * REACHED)
    known = Times(1 / pair["ar"] - verify_token, 0.0, verify_token, step_token)
    drafting = expected_tokens(acceptance, SD_K) / pair["sd"] - known.verifying(SD_K + 1)
    return replace(known, step=drafting / SD_K - step_token)


def waited_rate(times: Times, acceptance: float, hits: float, k: int, budget: int) -> float:
    """SSD at batch 1 as the paper runs it, in closed form."""
    t_hit = max(times.verifying(k + 1), times.extending(k + 1) + k * times.stepping(budget)) + times.handover
    tokens = expected_tokens(acceptance, k)
    return ssd_rate(hits, tokens, tokens, t_hit, t_hit + times.drafting(k, 1) + times.handover)


def fit(name: str) -> dict:
    """Three free numbers from three cells at temperature 0: SD, SSD, and the hits of the uniform fan-out."""
    pair, hits, b = PAIRS[name], TEMPERATURES[0.0][2], exponent(0.0)
    slow = bisect(lambda a: times_for(pair, a).step, 0.01, 0.999)  # below this SD's rate leaves no time to draft
    miss = lambda a: waited_rate(times_for(pair, a), a, hits, SSD_K, M) - pair["ssd"]  # noqa: E731
    # Rising until the draft no longer fits behind a verification; the first crossing is the one wanted.
    top = next((slow + n * (0.999 - slow) / 200 for n in range(1, 200) if miss(slow + n * (0.999 - slow) / 200) > 0), 0)
    acceptance = bisect(miss, slow, top)
    return {"acceptance": acceptance, "times": times_for(pair, acceptance), "c": (1 - hits) * F**b}


def acceptance_from(rate: float, round_s: float, k: int) -> float:
    """The acceptance at which rounds of this length give this rate."""
    return bisect(lambda a: sd_rate(expected_tokens(a, k), 0.0, round_s) - rate, 0.0, 0.9999)


def published_profile(acceptance: float, temperature: float, c: float, budget: int) -> Profile:
    curve = power_law(c, exponent(temperature), budget)
    return Profile(acceptance, curve, curve, exponent(temperature))


# ---- the error table


def cell(group: str, what: str, published: float, predicted: float, role: str = "predicted") -> dict:
    error = predicted / published - 1
    return {"group": group, "cell": what, "published": published, "predicted": predicted, "error": error, "role": role}


def of_the_paper(k: int, **how) -> Plan:
    return Plan(**({"k": k, "fan_out": M, "lists": "uniform", "cut": False, "whole_batch": True} | how))


def rate(plan: Plan, times: Times, profile: Profile) -> float:
    """Tokens a second and sequence."""
    return play(plan, times, profile, ROW_ROUNDS, SEED)["tokens_per_s"] / plan.batch


def pair_cells(fits: dict) -> list[dict]:
    out = []
    for name, found in fits.items():
        profile = published_profile(found["acceptance"], 0.0, found["c"], M)
        plans = {"ar": Plan("ar"), "sd": Plan("sd", SD_K), "ssd": of_the_paper(SSD_K)}
        for mode, plan in plans.items():
            got = rate(plan, found["times"], profile)
            out.append(cell(name, f"{mode.upper()} tokens/s", PAIRS[name][mode], got, "fitted"))
    return out


def temperature_cells(found: dict) -> list[dict]:
    """Twice: with hits predicted from temperature 0, and with c from the uniform hits at the temperature itself."""
    out, times = [], found["times"]
    round_s = times.verifying(SD_K + 1) + times.drafting(SD_K, 1)
    for T, (sd, uniform, uniform_hits, geometric, geometric_hits) in TEMPERATURES.items():
        acceptance = acceptance_from(sd, round_s, SD_K)
        ways = {"temperature, hits from T=0": found["c"]}
        if T:
            ways["temperature, uniform hits given"] = (1 - uniform_hits) * F ** exponent(T)
        for group, c in ways.items():
            profile = published_profile(acceptance, T, c, M)
            for lists, speed, hits in (("uniform", uniform, uniform_hits), ("geometric", geometric, geometric_hits)):
                plan = of_the_paper(SSD_K, lists=lists)
                known = lists == "uniform" and ("given" in group or not T)
                role = "fitted" if known else "predicted"
                chance = hit_chance(plan, profile, SSD_K)
                out.append(cell(group, f"T={T} {lists} hits", hits, chance, role))
                out.append(cell(group, f"T={T} {lists} tokens/s", speed, rate(plan, times, profile)))
    return out


def batch_cells(found: dict) -> list[dict]:
    budget, out = SSD_K + 1, []
    profile = published_profile(found["acceptance"], 0.0, found["c"], budget)
    for batch, (sd, jit, fast) in BATCHES.items():
        ssd = of_the_paper(SSD_K, fan_out=budget, batch=batch)
        for what, speed, plan in (
            ("SD", sd, Plan("sd", SD_K, batch=batch)),
            ("SSD jit", jit, ssd),
            ("SSD random tokens", fast, replace(ssd, fallback="random")),
        ):
            role = "fitted" if (batch, what) == (1, "SD") else "predicted"
            out.append(cell("batch", f"batch {batch} {what}", speed, rate(plan, found["times"], profile), role))
    return out


def replication_cells(found: dict) -> list[dict]:
    """found: the Qwen pair's fit. Three guesses of the acceptance: that fit, or its own SD with K = 4 or 6."""
    given = REPLICATION
    times = Times(given["verify_ms"] / 1e3, given["step_ms"] / 1e3, extend=given["extend_ms"] / 1e3)
    guesses = {"the paper's pair": (found["acceptance"], SSD_K)}
    for k in (min(given["ssd"]), SD_K):
        guesses[f"its SD, if K={k}"] = (acceptance_from(given["sd"], times.verify + times.drafting(k, 1), k), k)
    out = [cell("replication", "AR tokens/s", given["ar"], rate(Plan("ar"), times, Profile(0.0)))]
    for guess, (acceptance, k) in guesses.items():
        group, profile = f"replication, acceptance of {guess}", published_profile(acceptance, 0.0, found["c"], M)
        known = "its SD" in guess
        sd = rate(Plan("sd", k if known else SD_K), times, profile)
        out.append(cell(group, "SD tokens/s", given["sd"], sd, "fitted" if known else "predicted"))
        for k, speed in given["ssd"].items():
            plan = of_the_paper(k, fan_out=F * (k + 1))
            out.append(cell(group, f"SSD K={k} tokens/s", speed, rate(plan, times, profile)))
    return out


def error_table() -> dict:
    fits = {name: fit(name) for name in PAIRS}
    cells = pair_cells(fits) + temperature_cells(fits[LLAMA]) + batch_cells(fits[LLAMA]) + replication_cells(fits[QWEN])
    summary = []
    for group in dict.fromkeys(c["group"] for c in cells):
        errors = [abs(c["error"]) for c in cells if c["group"] == group and c["role"] == "predicted"]
        if errors:
            mean = sum(errors) / len(errors)
            summary.append({"group": group, "cells": len(errors), "mean_error": mean, "worst_error": max(errors)})
    fitted = []
    for name, found in fits.items():
        t = found["times"]
        ms = {"draft_step_ms": t.stepping(1) * 1e3, "verify_1_ms": t.verifying(1) * 1e3}
        ms |= {"verify_8_ms": t.verifying(8) * 1e3}
        fitted.append({"pair": name, "acceptance": found["acceptance"], **ms, "c": found["c"], "b": exponent(0.0)})
    return {"fitted": fitted, "cells": cells, "summary": summary}


# ---- what this machine cannot answer


def small_pair_profile(coupling: str, acceptance: float, budget: int) -> Profile:
    """A coupling at temperature 1, for a pair that accepts this much with `maximal`: between our two small pairs.

    Beyond their acceptances the ranks are those of the nearer pair, the acceptance goes on along the line through both.
    """
    (high, low), (better, worse) = ACCEPTANCE["maximal"], REJECTED[coupling]
    share = (acceptance - low) / (high - low)
    accepted = ACCEPTANCE[coupling][1] + share * (ACCEPTANCE[coupling][0] - ACCEPTANCE[coupling][1])
    share = min(1.0, max(0.0, share))
    rejected = {n: 1 - worse[n] - share * (better[n] - worse[n]) for n in better}
    bonus = {n: 1 - found for n, found in BONUS[coupling].items()}
    return Profile(min(1.0, max(0.0, accepted)), miss_curve(rejected, budget), miss_curve(bonus, budget))


def profiles(found: dict) -> dict[tuple[float, str], Profile]:
    """By temperature and coupling; at temperature 0 the couplings are one."""
    times, most = found["times"], max(BUDGETS)
    sd, _, hits, _, _ = TEMPERATURES[1.0]
    warm = acceptance_from(sd, times.verifying(SD_K + 1) + times.drafting(SD_K, 1), SD_K)
    return {
        (0.0, "any"): published_profile(found["acceptance"], 0.0, found["c"], most),
        (1.0, "independent"): published_profile(warm, 1.0, (1 - hits) * F ** exponent(1.0), most),
        (1.0, "maximal"): small_pair_profile("maximal", warm, most),
        (1.0, "shared"): small_pair_profile("shared", warm, most),
    }


@cache
def best(times: Times, profile: Profile, mode: str, **how) -> tuple[Plan, dict]:
    """The fastest K and M of a grid, played again at length."""
    budgets = BUDGETS if mode == "ssd" and "fan_out" not in how else (how.pop("fan_out", 1),)
    plans = [Plan(mode, k, budget, **how) for k, budget in itertools.product(KS, budgets)]
    plan = max(plans, key=lambda p: play(p, times, profile, SEARCH_ROUNDS, SEED)["tokens_per_s"])
    return plan, play(plan, times, profile, ASKED_ROUNDS, SEED)


def answer(what: dict, plan: Plan, played: dict, ar: float) -> dict:
    gpus = GPUS + (plan.devices if plan.mode == "ssd" else 0)
    out = what | {"k": plan.k if plan.mode != "ar" else None, "fan_out": plan.fan_out if plan.mode == "ssd" else None}
    out |= {"tokens_per_s": played["tokens_per_s"], "per_sequence": played["tokens_per_s"] / plan.batch}
    out |= {"per_gpu": played["tokens_per_s"] / gpus, "over_ar": played["tokens_per_s"] / ar}
    return out | {"hit_rate": played["hit_rate"], "tokens_per_round": played["tokens_per_round"]}


def ladder(times: Times, known: dict) -> list[dict]:
    """Batch 1, one change after another, from AR to all of it."""
    out, plain = [], Plan("ar")
    ar = play(plain, times, Profile(0.0))
    paper = of_the_paper(SSD_K)
    for T in (0.0, 1.0):
        first, *others = [coupling for t, coupling in known if t == T]
        base = known[T, first]
        say = lambda way, coupling, plan, played: out.append(  # noqa: E731
            answer({"temperature": T, "coupling": coupling, "way": way}, plan, played, ar["tokens_per_s"])
        )
        say("AR", "", plain, ar)
        say("SD, best K", first, *best(times, base, "sd", batch=1))
        say("PEARL, best K", first, *best(times, base, "ssd", lists="last", fan_out=1))
        for way, plan in (
            ("SSD, K too large, waited for", of_the_paper(TOO_LARGE_K)),
            ("SSD, K too large, cut", of_the_paper(TOO_LARGE_K, cut=True)),
            ("SSD as published", paper),
            ("+ chains cut", replace(paper, cut=True)),
            ("+ optimal lists", replace(paper, cut=True, lists="best")),
        ):
            say(way, first, plan, play(plan, times, base, ASKED_ROUNDS, SEED))
        for coupling in (first, *others):
            found = best(times, known[T, coupling], "ssd", fallback="auto", devices=1, batch=1)
            say("+ best K and M", coupling, *found)
        for coupling in others:
            if coupling == "shared":
                say("SD, best K", coupling, *best(times, known[T, coupling], "sd", batch=1))
    return out


def more_devices(times: Times, known: dict) -> list[dict]:
    """The M branches shared by several draft GPUs."""
    out = []
    for T, coupling in ((0.0, "any"), (1.0, "shared")):
        for batch, devices in itertools.product((1, 16), (1, 2, 4)):
            ar = play(Plan("ar", batch=batch), times, Profile(0.0))["tokens_per_s"]
            plan, played = best(times, known[T, coupling], "ssd", fallback="auto", devices=devices, batch=batch)
            what = {"temperature": T, "coupling": coupling, "batch": batch, "draft_gpus": devices}
            out.append(answer(what, plan, played, ar))
    return out


def larger_batches(times: Times, known: dict) -> list[dict]:
    """AR, SD at its best coupling, and SSD at each, with misses met by whichever fallback the run prefers."""
    out = []
    for T, batch in itertools.product((0.0, 1.0), (1, 4, 16, 64)):
        couplings = [coupling for t, coupling in known if t == T and coupling != "independent"]
        plain = Plan("ar", batch=batch)
        ar = play(plain, times, Profile(0.0))
        what = {"temperature": T, "batch": batch}
        out.append(answer(what | {"coupling": "", "mode": "AR"}, plain, ar, ar["tokens_per_s"]))
        sd = best(times, known[T, couplings[0]], "sd", batch=batch)
        out.append(answer(what | {"coupling": couplings[0], "mode": "SD"}, *sd, ar["tokens_per_s"]))
        for coupling in couplings:
            ssd = best(times, known[T, coupling], "ssd", fallback="auto", devices=1, batch=batch)
            out.append(answer(what | {"coupling": coupling, "mode": "SSD"}, *ssd, ar["tokens_per_s"]))
    return out


def what_if() -> dict:
    found = fit(LLAMA)
    times, known = found["times"], profiles(found)
    lists = [
        {"temperature": T, "coupling": coupling, "acceptance": profile.acceptance,
         "list": fan_out_list(Plan(k=SSD_K, fan_out=M), profile, SSD_K)}
        for (T, coupling), profile in known.items()
    ]  # fmt: skip
    return {
        "profiles": lists,
        "ladder": ladder(times, known),
        "devices": more_devices(times, known),
        "batch": larger_batches(times, known),
    }
