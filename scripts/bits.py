"""What few bits cost and give: memory, tokens a second, perplexity; for a draft, what is accepted.

Knows: the formats, processes that take turns. Does not know: how a format computes (linear.py).
Read next: render.py, which makes the tables.

    python scripts/bits.py [--target MODEL --draft MODEL] [--prompts DIR] [--out results/bits.json]

Each format has a process of its own that loads the pair once. `stored` are the bits of a GGUF file;
`chosen` is what the engine takes by itself. The draft's formats are compared under one target, as
it is stored. Perplexity is that of texts that people wrote: the engine's own would be too easy.
"""

import argparse
import json
import math
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench import prompts as read_prompts  # noqa: E402
from bench import read_lines  # noqa: E402
from runner import (  # noqa: E402
    Worker,
    available_cores,
    check_out,
    environment,
    interval,
    keep,
    rounded,
)

# --quantize and --dtype.
FORMATS = {"none": ("none", "float32"), "int8": ("int8", None), "int4": ("int4", None)}
FORMATS |= {"chosen": (None, None)}
WORDS, CHUNK = 160, 256  # of a text that perplexity is measured on; tokens of a pass


@contextmanager
def anonymous_peak():
    """A list that will hold by how many bytes this process grew, files apart, at most."""
    grown, ended, least = [], threading.Event(), anonymous_bytes()

    def look() -> None:
        most = least
        while not ended.wait(0.002):
            most = max(most, anonymous_bytes())
        grown.append(most - least)

    thread = threading.Thread(target=look)
    thread.start()
    yield grown
    ended.set()
    thread.join()


def anonymous_bytes() -> int:
    """What this process holds, files that are mapped apart."""
    lines = dict(x.split(":") for x in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["RssAnon"].split()[0])


class Pair:
    """One pair of models in one format each."""

    def __init__(self, target: str | None, draft: str | None, bits: tuple, draft_bits: tuple):
        from ssd import load

        how = {"quantize": bits[0], "dtype": bits[1], "draft_quantize": draft_bits[0]}
        with anonymous_peak() as grown:
            self.engine = load(target, draft, "cpu", **how)
        model = self.engine.target
        measured = model if draft == "ngram" else self.engine.draft
        self.told = {"name": Path(measured.name).name, "load_bytes": grown[0]}
        self.told |= {"step_bytes": measured.step_bytes, **measured.numbers()}

    def about(self) -> dict:
        return self.told

    def ids(self, texts: list[str], chat: bool) -> list[list[int]]:
        encode = self.engine.tokenizer.encode_chat if chat else self.engine.tokenizer.encode
        return [encode([{"role": "user", "content": x}] if chat else x) for x in texts]

    def run(self, texts: list[str], chat: bool, new: int, mode: str, **settings) -> dict:
        settings |= {"mode": mode, "max_new_tokens": new, "ignore_eos": True}
        stats = self.engine.generate(self.ids(texts, chat), **settings).stats
        return {key: stats.get(key) for key in ("tokens_per_s", "acceptance_rate", "draft_ms")}

    def loss(self, texts: list[str]) -> tuple[float, int]:
        """Nats of all tokens but the first of each text, summed, and their number."""
        import torch

        from cache import KVCache

        model, total, count = self.engine.target.transformer, 0.0, 0
        weight = model.norm.weight
        model.set_positions(CHUNK)
        for ids in self.ids(texts, False):
            ids = ids[:CHUNK]
            cache = KVCache(model.config, 1, len(ids), device="cpu", dtype=weight.dtype)
            start, ids_1T = torch.zeros(1, dtype=torch.long), torch.tensor([ids])
            with torch.inference_mode():
                where = cache.locate(start, start + len(ids), len(ids), len(ids), True)
                logp_TV = model(ids_1T, where, cache)[0, :-1].float().log_softmax(-1)
            total -= float(logp_TV.gather(1, ids_1T[0, 1:, None]).double().sum())
            count += len(ids) - 1
        return total, count


def human(folder: str | None, count: int) -> dict[str, list[str]]:
    """Texts of each kind that people wrote."""
    if folder is None:
        return {kind: texts for kind, texts in read_prompts(None, 4).items() if kind != "chat"}
    code = [row["prompt"] for row in read_lines(folder, "humaneval_prompts.jsonl")]
    rows = [r for r in read_lines(folder, "spec_bench.jsonl") if r["task"] == "summarization"]
    words = [row["turns"][0].split(":", 1)[-1].split()[:WORDS] for row in rows]
    return {"code": code[:count], "text": [" ".join(w) for w in words[:count]]}


def compare(pairs: dict[str, Worker], args, accept: bool) -> dict:
    """Every format in turn, `runs` times, then what does not hang on the clock, once."""
    texts = read_prompts(args.prompts, args.runs)
    found = {name: {"runs": []} | pair.ask("about") for name, pair in pairs.items()}
    mode = {"mode": "sd", "k": 4} if accept else {"mode": "ar"}
    for turn in range(args.runs):
        for name, pair in pairs.items():
            prompt = texts["chat"][turn % len(texts["chat"])]
            how = {"texts": [prompt], "chat": True, "new": args.tokens}
            found[name]["runs"].append(pair.ask("run", **how, **mode))
            print(f"{name}: {found[name]['runs'][-1]}", file=sys.stderr, flush=True)
    for name, pair in pairs.items():
        rates = [run["tokens_per_s"] for run in found[name]["runs"]]
        found[name] |= {"tokens_per_s": interval(rates)}
        if accept:
            rates = []
            for kind, of_kind in texts.items():
                how = {"texts": of_kind, "chat": kind == "chat", "new": args.tokens, "mode": "sd"}
                for temperature in (0.0, 1.0):
                    rates.append(pair.ask("run", **how, k=4, temperature=temperature))
            found[name]["accepted"] = mean(rate["acceptance_rate"] for rate in rates)
        else:
            for kind, of_kind in human(args.prompts, args.count).items():
                total, count = pair.ask("loss", texts=of_kind)
                found[name][f"perplexity {kind}"] = math.exp(total / count)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bits.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--target", help="folder or .gguf file (the default model)")
    add("--draft", help="its draft (the default model's)")
    add("--prompts", metavar="DIR", help="as in bench.py (its built-in prompts)")
    add("--formats", default=",".join(FORMATS), help=f"some of {','.join(FORMATS)} (all)")
    add("--runs", type=int, default=6, help="timed runs of each format (6)")
    add("--tokens", type=int, default=32, help="new tokens of a run (32)")
    add("--count", type=int, default=20, help="texts of each kind, for perplexity (20)")
    add("--out", metavar="FILE", help="JSON; what it holds of other pairs is kept")
    args = parser.parse_args(argv)
    names = args.formats.split(",")
    if wrong := [name for name in names if name not in FORMATS]:
        print(f"bits.py: --formats names {wrong[0]!r}, wanted some of {', '.join(FORMATS)}",
              file=sys.stderr)  # fmt: skip
        return 2
    cores, result = available_cores(), {"environment": environment()}
    try:
        check_out(args.out)
        if (args.target is None) != (args.draft is None):
            raise ValueError("one of --target and --draft was given, wanted both or neither")
        for what in ("target", "draft"):
            makers = {}
            for name in names:
                how = (FORMATS[name], (None, None)) if what == "target" else ((None, None),) * 2
                if what == "draft":
                    how = (None, None), FORMATS[name]
                draft = "ngram" if what == "target" else args.draft
                makers[name] = Worker(cores, Pair, args.target, draft, *how)
            result[what] = compare(makers, args, what == "draft")
            for worker in makers.values():
                worker.close()
    except ValueError as error:
        print(f"bits.py: {error}", file=sys.stderr)
        return 2
    pair = " and ".join(next(iter(result[what].values()))["name"] for what in ("target", "draft"))
    if args.out:
        there = json.loads(Path(args.out).read_text()) if Path(args.out).exists() else {}
        groups = there.get("bits", {}).get("groups", {}) | {pair: rounded(result)}
        keep(args.out, "bits", {"groups": groups})
    return 0


if __name__ == "__main__":
    sys.exit(main())
