"""AR, SD and SSD measured beside what one would use instead: one table of comparisons, one runner.

Knows: what is compared with what, and why. Does not know: how a way to decode is run and timed
(runner.py), how results are shown (render.py). Read next: TABLE, then runner.py.

    python scripts/bench.py --prompts DIR --out results/smollm2.json    all of it, the default pair
    python scripts/bench.py --only overlap --out results/smollm2.json   the rest of the file is kept
    python scripts/bench.py --quick                                     to see that it works
    python scripts/bench.py --target T.gguf --draft D.gguf --out results/qwen.json

One repeat runs every way once on the same prompts, in an order that turns round each time. A ratio
is the median of the repeats' own ratios. Intervals come from order statistics and hold in 95%. What
the memory allows is printed first, and one JSON object with the ratios last.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import quantiles

if str(Path(__file__).resolve().parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from runner import PLACES, Runner, Way, check_out, environment, keep, rounded  # noqa: E402

INTERRUPTED, MISTAKE = 130, 2
KINDS = ("code", "chat", "text")
WORDS = 48  # of a free text: what is continued
COUPLINGS = ("shared", "maximal", "independent")
BUDGETS = (4, 8, 16, 32)
# few_bits.cpp computes 8 rows at a time with VNNI and 4 with AVX2, which K = 3 fills.
KS = (2, 3, 6)
TURNS = tuple({"k": k} for k in KS)
AT_ONCE = tuple({"k": k, "fan_out": m} for k in KS for m in (4, 8))
AT_ONCE += tuple({"k": k, "fan_out": 2, "cut": False} for k in KS)  # for a draft that is slow
IN_TURN = ({"mode": "sd", "k": 2}, {"mode": "sd", "k": 3})  # auto may let them take turns, too
TURN, PLAN = {"k": 3}, {"k": 3, "fan_out": 16}
COUNTED = {"cut": False, "fallback": "jit", "ignore_eos": False}  # nothing hangs on timing
BUILT_IN = {
    "code": (
        'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
        'class Stack:\n    """Last in, first out."""\n\n    def __init__(self):\n',
        "def search(values, wanted):\n    low, high = 0, len(values)\n    while low < high:\n",
        'def word_count(text):\n    """How often each word occurs."""\n    counts = {}\n',
    ),
    "chat": (
        "Why is the sky blue?",
        "Give me three tips for learning a new language.",
        "What is the difference between a list and a tuple in Python?",
        "A train leaves at 9:40 and arrives at 11:15. How long does it take?",
    ),
    "text": (
        "The old lighthouse had stood on the cliff for more than a century, and",
        "In the early years of the railway, most people travelled",
        "Bread is made from flour, water and salt. The dough is",
        "The committee met on Tuesday to discuss the new budget. After two hours",
    ),
}


@dataclass(frozen=True)
class Comparison:
    """One row of TABLE. `ratios` are pairs of names; `judge` adds what follows."""

    name: str
    asks: str
    minutes: float  # with SmolLM2-135M on two cores, 90 tokens/s of AR a core
    ways: tuple[Way, ...]
    ratios: tuple[tuple[str, str], ...] = ()
    temperatures: tuple[float, ...] = (0.0,)
    by_kind: bool = False  # each kind of prompts by itself, not all in turn
    repeats: int = 12
    batch: int = 1
    tokens: int = 48
    sweep_repeats: int = 3
    sweep_tokens: int = 24
    judge: Callable[[dict], dict] = field(default=lambda group: {})


def against(of: str, *others: str) -> tuple[tuple[str, str], ...]:
    return tuple((of, other) for other in others)


def ceiling(group: dict) -> dict:
    """The most that SSD could gain over SD here, and how much of it was reached.

    A round of SD verifies and drafts; one of SSD would only verify, as long as it does beside a
    busy draft, for the tokens a round that SSD reached.
    """
    ssd, sd = group["ways"]["SSD"], group["ways"]["SD"]
    most = (sd["verify_ms"] + sd["draft_ms"]) / ssd["verify_ms"]
    most *= ssd["tokens_per_round"] / sd["tokens_per_round"]
    return {"ceiling": most, "share_of_ceiling": group["ratios"]["SSD over SD"]["median"] / most}


def steadiness(group: dict) -> dict:
    """The tenth percentile of a command's repeats over their median: 1 is perfectly steady."""
    out = {}
    for name, way in group["ways"].items():
        rates = [run["tokens_per_s"] for run in way["runs"]]
        out[name] = quantiles(rates, n=10, method="inclusive")[0] / way["tokens_per_s"]["median"]
    return {"steadiness": out}


def here_and_there(*ways: Way) -> tuple[Way, ...]:
    """Each way twice: by this checkout and by the other one."""
    return tuple(
        replace(w, name=f"{w.name}{end}", beside=bool(end)) for w in ways for end in ("", " before")
    )


BESIDE = (
    Way("AR", "ar"), Way("AR both cores", "ar", "both"), Way("SD", "sd", "one", TURN),
    Way("SSD", "ssd", "apart", PLAN), Way("SSD auto", "ssd", "apart"),
    *(Way(f"SSD {c}, T=1", "ssd", "apart", PLAN | COUNTED | {"temperature": 1.0, "coupling": c})
      for c in COUPLINGS),
)  # fmt: skip

TABLE = (
    Comparison(
        "modes", "How fast is each mode at its best, beside what one would use instead?", 6.5,
        (
            Way("AR", "ar"), Way("AR both cores", "ar", "both"),
            Way("SD", "sd", "one", {}, TURNS), Way("SD both cores", "sd", "both", {}, TURNS),
            Way("SSD", "ssd", "apart", {}, AT_ONCE), Way("SSD auto", "ssd", "apart"),
            Way("transformers", "transformers"),
            Way("transformers both cores", "transformers", "both"),
            Way("transformers assisted", "transformers assisted", "both", {}, TURNS),
            Way("transformers lookup", "transformers lookup", "both", {}, TURNS),
            Way("llama.cpp", "llama.cpp"), Way("llama.cpp both cores", "llama.cpp", "both"),
            Way("llama.cpp draft", "llama.cpp draft", "both", {}, TURNS),
        ),
        against("SSD", "SD", "AR", "SD both cores", "AR both cores")
        + against("SSD", "transformers assisted", "llama.cpp draft") + against("SSD auto", "SSD")
        + against("SD", "AR") + against("SD both cores", "AR both cores")
        + against("AR", "transformers", "llama.cpp")
        + against("AR both cores", "transformers both cores", "llama.cpp both cores"),
        temperatures=(0.0, 1.0), repeats=9,
    ),
    Comparison(
        "accept", "What is accepted, and how often is a chain ready?", 14,
        tuple(Way(f"{c} M={m}", "ssd", "both", {"k": 4, "fan_out": m, "coupling": c} | COUNTED)
              for c in COUPLINGS for m in BUDGETS),
        temperatures=(0.0, 0.7, 1.0), by_kind=True, repeats=1, batch=14, tokens=32,
    ),
    Comparison(
        "overlap", "How much of the draft's time does SSD hide, and what is left to gain?", 2,
        (Way("SD", "sd", "one", TURN), Way("SSD", "ssd", "apart", PLAN)),
        against("SSD", "SD"), repeats=20, judge=ceiling,
    ),
    Comparison(
        "auto", "Is the engine's own choice of K and M as good as the best of all?", 4,
        (Way("auto", "ssd", "apart"), Way("best", "ssd", "apart", {}, AT_ONCE + IN_TURN)),
        against("auto", "best"), temperatures=(0.0, 1.0), tokens=96, sweep_repeats=6,
    ),
    *(
        Comparison(
            f"halves{batch}", f"Do two halves of {batch} rows that take turns pay?", 3,
            (
                Way("SD", "sd", "one", TURN), Way("SD both cores", "sd", "both", TURN),
                Way("SD halves", "sd", "apart", TURN | {"batch_halves": "on"}),
                Way("SSD", "ssd", "apart", PLAN),
                Way("SSD halves", "ssd", "apart", PLAN | {"batch_halves": "on"}),
            ),
            against("SD halves", "SD", "SD both cores", "SSD")
            + against("SSD halves", "SD", "SD both cores", "SSD"),
            repeats=20, batch=batch, tokens=16,
        )
        for batch in (2, 4, 8, 16)
    ),
    Comparison(
        "steady", "Is one command as fast every time it is run?", 3,
        (Way("generate.py --ssd", "command", "apart"),), repeats=20, tokens=64, judge=steadiness,
    ),
    Comparison(
        "ablate", "What does each choice give: cutting chains, and what to do on a miss?", 2,
        (
            Way("as it is", "ssd", "apart", PLAN),
            Way("chains are waited for", "ssd", "apart", PLAN | {"cut": False}),
            Way("jit on a miss", "ssd", "apart", PLAN | {"fallback": "jit"}),
            Way("fast on a miss", "ssd", "apart", PLAN | {"fallback": "fast"}),
        ),
        tuple((f"{way} on a miss", "as it is") for way in ("jit", "fast"))
        + against("chains are waited for", "as it is"),
        temperatures=(1.0,),
    ),
    Comparison(
        "beside", "Is what was taken out missed? The same by another checkout (--beside).", 6,
        here_and_there(*BESIDE), tuple((way.name, f"{way.name} before") for way in BESIDE),
        repeats=20,
    ),
)  # fmt: skip


def quick(c: Comparison) -> Comparison:
    """A fifth of a comparison: it shows that everything works, and no more."""
    ways = [replace(way, sweep=way.sweep[:2]) for way in c.ways]
    if c.name == "accept":
        ways = [way for way in ways if way.settings["fan_out"] in BUDGETS[::2]]
    heats = c.temperatures[-1:] if c.by_kind else c.temperatures[:1]
    few = {"repeats": min(c.repeats, 3), "batch": min(c.batch, 6), "tokens": 16}
    return replace(c, ways=tuple(ways), temperatures=heats, sweep_repeats=1, sweep_tokens=12, **few)


# ---- prompts


def prompts(folder: str | None, count: int) -> dict[str, list[str]]:
    """Texts by kind: code to go on with, questions for the chat template, free text."""
    if folder is None:
        return {kind: list(BUILT_IN[kind])[:count] for kind in KINDS}
    code = [row["prompt"] for row in read_lines(folder, "humaneval_prompts.jsonl")]
    rows = read_lines(folder, "spec_bench.jsonl")
    chat = [r["turns"][0] for r in rows if r["task"] in ("mt_bench", "qa", "math_reasoning")]
    articles = [
        r["turns"][0].split(":", 1)[-1].split() for r in rows if r["task"] == "summarization"
    ]
    texts = {"code": code, "chat": chat, "text": [" ".join(words[:WORDS]) for words in articles]}
    return {kind: spread(texts[kind], count) for kind in KINDS}


def spread(texts: list[str], count: int) -> list[str]:
    """`count` of the shorter half, from all over the list: long ones cost time and tell no more."""
    longest = sorted(map(len, texts))[min(max(count, len(texts) // 2), len(texts)) - 1]
    short = [text for text in texts if len(text) <= longest]
    return short[:: max(1, len(short) // count)][:count]


def read_lines(folder: str, name: str) -> list[dict]:
    try:
        return [
            json.loads(line)
            for line in (Path(folder) / name).read_text(encoding="utf-8").split("\n")
            if line.strip()  # not splitlines: JSON may hold U+2028
        ]
    except (OSError, ValueError) as error:
        wanted = "wanted a folder with humaneval_prompts.jsonl and spec_bench.jsonl"
        raise ValueError(
            f"--prompts {folder}: {name} cannot be read ({error}), {wanted}"
        ) from error


# ---- the program


def parser() -> argparse.ArgumentParser:
    names = ", ".join(f"{c.name} ({c.minutes:g} min)" for c in TABLE)
    p = argparse.ArgumentParser(
        prog="bench.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = p.add_argument
    add("--only", metavar="NAME[,NAME]", help=f"some of {names}")
    add("--quick", action="store_true", help="a fifth of everything")
    add("--temperature", type=float, metavar="T", nargs="+", help="some of a comparison's own")
    add(
        "--out",
        metavar="FILE",
        help="write the results as JSON; other comparisons in the file are kept",
    )
    add("--target", metavar="MODEL", help="folder, .gguf file or hub id (the default model)")
    add("--draft", metavar="MODEL", help="its draft (the default model's)")
    add("--dtype", help="float32, bfloat16 (what the engine chooses; transformers' what is faster)")
    add("--quantize", help="none, int8, int4 (what the engine chooses)")
    add("--draft-quantize", help="the same for the draft")
    add("--device", metavar="D", help="the target's, where it is not to be two CPU cores")
    add("--draft-device", metavar="D", help="the draft's in SSD")
    add(
        "--prompts",
        metavar="DIR",
        help="humaneval_prompts.jsonl and spec_bench.jsonl (built-in prompts)",
    )
    add(
        "--count", type=int, metavar="N", default=14, help="prompts of each of the three kinds (14)"
    )
    add(
        "--longest",
        type=int,
        metavar="N",
        default=192,
        help="tokens of a prompt: longer ones are left out (192)",
    )
    add("--llama", metavar="DIR", help="folder with llama.cpp's programs, a peer for .gguf files")
    add("--beside", metavar="DIR", help="another checkout of this repository, to compare with")
    return p


def chosen(args) -> list[Comparison]:
    names = [c.name for c in TABLE if c.name != "beside" or args.beside]
    usual = [name for name in names if not name.startswith("halves")]  # in a file of their own
    wanted = args.only.split(",") if args.only else usual
    if wrong := [name for name in wanted if name not in names]:
        raise ValueError(f"--only names {wrong[0]!r}, wanted some of {', '.join(names)}")
    check_out(args.out)
    table = [quick(c) if args.quick else c for c in TABLE if c.name in wanted]
    if args.temperature is None:
        return table
    for n, c in enumerate(table):
        heats = tuple(heat for heat in c.temperatures if heat in args.temperature)
        if not heats:
            known = ", ".join(f"{heat:g}" for heat in c.temperatures)
            raise ValueError(f"--temperature has none of {c.name}'s, wanted some of {known}")
        table[n] = replace(c, temperatures=heats)
    return table


def measure(runner: Runner, c: Comparison) -> dict:
    """A comparison's entry in the file of results."""
    out = {
        "asks": c.asks,
        "environment": environment() | runner.numbers | {"commit": runner.commit},
        "ceiling": runner.ceiling(),
        "groups": {},
    }
    out["pair"] = [Path(name).name for name in runner.pair]
    for place, most in out["ceiling"].items():
        if most:
            print(
                f"{c.name}: memory allows {most:.1f} passes of the target a second, {PLACES[place]}"
            )
    for kind in runner.prompts if c.by_kind else (None,):
        for temperature in c.temperatures:
            ways = c.ways
            if c.name == "accept" and not temperature:  # there the couplings are one
                ways = tuple(way for way in ways if way.settings["coupling"] == "shared")
            group = runner.group(replace(c, ways=ways), temperature, kind)
            label = f"T={temperature:g} {kind}" if kind else f"T={temperature:g}"
            whole = all(way.name in group["ways"] for way in ways)
            out["groups"][label] = group | (c.judge(group) if whole else {})
    return rounded(out | {"skipped": dict(runner.skipped)})


def headline(results: dict) -> dict:
    """The ratios by name, and how many texts differ that should be the same."""
    out, differ = {}, 0
    for name, found in results.items():
        for label, group in found["groups"].items():
            out |= {
                f"{name} {label}: {key}": round(r["median"], 3)
                for key, r in group["ratios"].items()
            }
            out |= {
                f"{name} {label}: {key}": group[key]
                for key in ("share_of_ceiling", "steadiness")
                if key in group
            }
            differ += group["same_text"]["differ"]
    return out | {"texts_differ": differ}


def run(args) -> dict:
    """What was measured; each comparison is on disk as soon as it is done."""
    table, results = chosen(args), {}
    texts = prompts(args.prompts, args.count)
    runner = Runner(args, texts)
    try:
        for c in table:
            results[c.name] = measure(runner, c)
            if args.out:
                keep(args.out, c.name, results[c.name], args.temperature is not None)
    finally:
        runner.close()
    return results


def main(argv: list[str] | None = None) -> int:
    try:
        results = run(parser().parse_args(argv))
    except ValueError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return MISTAKE
    except RuntimeError as error:  # a measurement that failed; earlier comparisons are in the file
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    print(json.dumps(headline(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
