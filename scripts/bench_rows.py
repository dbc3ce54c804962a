"""More prompts than fit at once: rows that join where others end, beside batches that wait.

    python scripts/bench_rows.py PROMPTS.jsonl --out results/batches.json

Continuous rows are one call with `batch`; a batch of a fixed size waits for its slowest row. Greedy
plain decoding on all cores, prompts included, the ways in turn. Then generate.py --out is killed
with -9 when half of its rows are on disk, and started again: no row may be missing or come twice.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from runner import check_out, environment, keep  # noqa: E402

from engine import load  # noqa: E402
from generate import read_prompts  # noqa: E402


def compare(args, texts: list[str]) -> dict:
    """Tokens a second of every way and run, and whether all texts are the same."""
    engine = load(args.target, device=args.device)
    ids = [engine.tokenizer.encode(text) for text in texts]
    settings = {"mode": "ar", "max_new_tokens": args.new_tokens}
    engine.generate(ids[:1], **settings)
    name = f"rows that join, {args.batch} at once"
    found, seen = {name: []} | {f"batches of {n}": [] for n in args.fixed}, set()
    for _ in range(args.runs):
        for way, size in zip(found, (None, *args.fixed)):
            begin, got = time.perf_counter(), []
            for at in range(0, len(ids), size or len(ids)):
                rows = ids[at : at + (size or len(ids))]
                more = {} if size else {"batch": args.batch}
                got += engine.generate(rows, **settings, **more).token_ids
            tokens = sum(map(len, got))
            found[way].append(tokens / (time.perf_counter() - begin))
            seen.add(json.dumps(got))
            print(f"{way}: {found[way][-1]:.1f} tokens/s, {tokens} tokens", flush=True)
    rates = {way: median(values) for way, values in found.items()}
    best = max(rate for way, rate in rates.items() if way != name)
    return {"runs": found, "over_best_fixed": rates[name] / best, "different_texts": len(seen) - 1}


def killed(args, count: int) -> dict:
    """What a file of rows holds after a kill -9 in the middle and a second start."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        run = [sys.executable, str(ROOT / "generate.py"), "--prompt-file", args.prompts]
        run += ["--batch", str(args.batch), "--max-new-tokens", str(args.new_tokens)]
        run += ["--out", str(out), *(["--target", args.target] if args.target else [])]
        first = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while first.poll() is None and len(numbers(out)) < count // 2:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
        kept = numbers(out)
        again = subprocess.run(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = numbers(out)
    missing, twice = count - len(set(found)), len(found) - len(set(found))
    return {
        "rows_at_the_kill": len(kept), "exit_code": again.returncode, "rows": len(found),
        "missing": missing, "twice": twice, "kept_ones_stay": found[: len(kept)] == kept,
    }  # fmt: skip


def numbers(out: Path) -> list[int]:
    """The numbers of the prompts whose rows are whole in the file."""
    lines = out.read_text().splitlines(keepends=True) if out.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row["number"] for row in rows if "number" in row]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="bench_rows.py", description=__doc__.splitlines()[0])
    p.add_argument("prompts", metavar="PROMPTS.jsonl", help='a "prompt" a line')
    p.add_argument("--target", help="folder, .gguf file or hub id (the default model)")
    p.add_argument("--device", default="cpu", help="(cpu)")
    p.add_argument("--batch", type=int, default=8, help="rows at once (8)")
    p.add_argument("--fixed", type=int, nargs="+", default=[4, 8, 16], help="sizes (4 8 16)")
    p.add_argument("--runs", type=int, default=3, help="of every way (3)")
    p.add_argument("--new-tokens", type=int, default=48, help="at most, of a row (48)")
    p.add_argument("--out", metavar="FILE", help="keep the figures there, under `rows`")
    args = p.parse_args(argv)
    args.prompt_file, args.prompt = args.prompts, None
    try:
        check_out(args.out)
        texts = read_prompts(args)
    except ValueError as error:
        print(f"bench_rows.py: {error}", file=sys.stderr)
        return 2
    found = {"environment": environment(), "prompts": len(texts)} | compare(args, texts)
    found["killed"] = killed(args, len(texts))
    print(json.dumps({key: found[key] for key in ("over_best_fixed", "different_texts", "killed")}))
    if args.out:
        keep(args.out, "rows", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
