"""Do AR, SD and SSD print the same text? The whole grid of settings, on real prompts.

Knows: the grid, and what counts as a floating-point tie. Does not know: how anything is computed.
Read next: ssd.py.

    python scripts/check_same_text.py PROMPTS.jsonl              40 prompts, 128 new tokens each
    python scripts/check_same_text.py PROMPTS.jsonl --quick      8 prompts, 48 new tokens each
    python scripts/check_same_text.py PROMPTS.jsonl --batches    batches of 1, 4, 16; halves on, off

Coupling `shared`: the text of a seed must not depend on the mode, K, the budget, the fallback,
cutting or the batch. Where it does, the target is asked again. If its scores of both tokens lie
within 1e-4 (float32) of its best, rounding decides between them, which is reported and counted as a
tie. Where products are rounded to bfloat16, which those of few_bits.cpp are not, two of its steps
count as one. Anything else is a difference, and the exit code is 1.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from runner import check_out  # noqa: E402

from generate import read_prompts  # noqa: E402
from linear import few_bits_problem  # noqa: E402
from runtime import DraftLost  # noqa: E402
from sampling import TOKEN, Params, gumbel  # noqa: E402
from ssd import load  # noqa: E402

TIE, STEPS = 1e-4, 2**-7  # of float32 in all; of bfloat16 two steps, of the largest logit
BATCH = 8
HEAT = ((0.0, 0), (0.7, 0), (0.7, 1), (1.0, 0), (1.0, 1), (1.0, 2))  # temperature, seed
BUDGETS, FALLBACKS = (4, 8, 16, 32), ("jit", "fast", "auto")


def cells(quick: bool):
    """The settings of every cell: K from 1 to 8, the rest of SSD's settings in turn."""
    for place, (temperature, seed) in enumerate(HEAT[::3] if quick else HEAT):
        heat = {"temperature": temperature, "seed": seed}
        yield heat | {"mode": "ar", "batch": 1}
        for n, k in enumerate((2, 5) if quick else range(1, 9)):
            yield heat | {"mode": "sd", "k": k, "batch": 1 if k in (2, 7) else BATCH}
            turns = {"fan_out": BUDGETS[(place + n) % 4], "fallback": FALLBACKS[(place + n) % 3]}
            turns |= {"cut": (place + n // 2) % 2 == 0, "batch": 1 if k in (3, 5) else BATCH}
            yield heat | {"mode": "ssd", "k": k} | turns


def batches():
    """The settings of every cell of --batches: the rows of a batch, which half of it each is in."""
    for temperature in (0.0, 1.0):
        for batch in (1, 4, 16):
            cell = {"temperature": temperature, "seed": 0, "batch": batch}
            yield cell | {"mode": "ar"}
            for halves in ("off",) if batch == 1 else ("off", "on"):
                yield cell | {"mode": "sd", "k": 3, "batch_halves": halves}
                yield cell | {"mode": "ssd", "k": 3, "fan_out": 8, "batch_halves": halves}


def run(engine, prompts: list, settings: dict, new: int) -> list[list[int]]:
    """New tokens per prompt. Each row has its own seed: its text does not depend on its batch."""
    seeds = [settings["seed"] * 1000 + number for number in range(len(prompts))]
    options = settings | {"seed": seeds, "max_new_tokens": new, "ignore_eos": True}
    return engine.generate(prompts, **options).token_ids


def gap(engine, ids: list[int], tokens: tuple[int, int], settings: dict, number: int) -> tuple:
    """How far the worse of two tokens lies below the target's best after `ids`, noise included, and
    what counts as a tie there.
    """
    with torch.inference_mode():
        logits_V = engine.target.transformer(torch.tensor([ids]))[0, -1].float()
        temperature, limit = settings["temperature"], TIE
        bits = engine.target.bits
        if bits == "bfloat16" or (bits != "none" and few_bits_problem()):
            limit = STEPS * float(logits_V.abs().max()) / (temperature or 1.0)
        if temperature:
            seed = settings["seed"] * 1000 + number
            params = Params.make([temperature], [0], [1.0], [seed], [0], "cpu")
            noise = gumbel(params, torch.tensor([[len(ids)]]), TOKEN, len(logits_V))
            logits_V = logits_V / temperature + noise[0, 0]
    return float(logits_V.max() - logits_V[list(tokens)].min()), limit


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt_file", metavar="PROMPTS", help='.jsonl with a "prompt" a line')
    parser.add_argument("--target", help="folder, .gguf file or hub id (the default model)")
    parser.add_argument("--draft", help="its draft (the default model's)")
    numbers = {"metavar": "none|int8|int4|default"}
    parser.add_argument("--quantize", default="none", **numbers, help="the target's weights (none)")
    parser.add_argument("--draft-quantize", default="none", **numbers, help="the draft's (none)")
    parser.add_argument("--quick", action="store_true", help="a small part of the grid")
    parser.add_argument("--batches", action="store_true", help="rows and halves, not K and M")
    parser.add_argument("--count", type=int, metavar="N", help="prompts (40; 8 with --quick)")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="(128; 48 with --quick)")
    parser.add_argument("--out", metavar="FILE", help="write what was found, after every cell")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = flags().parse_args(argv)
    few, short = (8, 48) if args.quick else (40, 128)
    count, new = args.count or few, args.new_tokens or short
    try:
        check_out(args.out)
        texts = read_prompts(args)[:count]
        bits = [None if x == "default" else x for x in (args.quantize, args.draft_quantize)]
        dtype = None if None in bits else "float32"  # what a CPU is fast with, or float32
        engine = load(args.target, args.draft, "cpu:0", "cpu:1", dtype, None, *bits)
    except ValueError as error:
        print(f"check_same_text.py: {error}", file=sys.stderr)
        return 2

    def lost(text: str):  # a cell that quietly went on as AR would prove nothing
        raise DraftLost(text)

    engine.warn = lost
    room = engine.target.config.max_positions - new
    prompts = [engine.tokenizer.encode(text)[:room] for text in texts]
    truth, ties, differences, done = {}, [], [], []
    for settings in batches() if args.batches else cells(args.quick):
        found = run(engine, prompts, settings, new)
        # Each temperature and seed begins with AR in batches of one: what all others must print.
        wanted = truth.setdefault((settings["temperature"], settings["seed"]), found)
        for number, (ours, theirs) in enumerate(zip(found, wanted)):
            if ours != theirs:
                at = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
                before, two = prompts[number] + theirs[:at], (ours[at], theirs[at])
                distance, limit = gap(engine, before, two, settings, number)
                where = {"prompt": number, "position": at, "gap": distance, **settings}
                (ties if distance < limit else differences).append(where)
                print(f"  {'tie' if distance < limit else 'DIFFERENT'}: {where}", flush=True)
        done.append(settings)
        print(f"{len(done):3d}: {settings}", flush=True)
        result = {"prompts": len(prompts), "new_tokens": new, "cells": len(done)}
        result |= {"texts": len(done) * len(prompts), "differences": len(differences)}
        result |= {"ties": len(ties), "details": differences + ties}
        if args.out:
            Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['texts']} texts of {new} tokens in {len(done)} cells: {len(ties)} ties, "
          f"{len(differences)} differences")  # fmt: skip
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
