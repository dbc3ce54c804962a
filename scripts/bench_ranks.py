"""What it costs to share a target: ranks on some cores against one process on the same cores.

    python scripts/bench_ranks.py --target DIR [--draft DIR] [--ranks 2] [--json FILE]

Each run is a process of its own; the two kinds take turns. Then one more run of the ranks says
where rank 0's time goes, and a probe how long a sum over the ranks takes by the bytes of its
message, which studies/simulate.py asks for. On GPUs (never run): --device cuda.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from engine import load  # noqa: E402
from parallel import summed  # noqa: E402
from ranks import join  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "def quicksort(numbers):"
MESSAGES = tuple(1 << size for size in range(10, 23, 2))  # bytes
KINDS = {  # where time goes, by the names of torch's operators
    "sums over the ranks": ("c10d", "wait_tensor"),
    "linear layers": ("mm", "linear", "mkldnn"),
    "attention": ("attention", "softmax", "bmm"),
}


def command(args, ranks: int, program: str, *more: str) -> list[str]:
    """How a program is started on so many ranks, or alone."""
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *several, str(ROOT / program), "--device", args.device, *more]


def told(run: list[str], path: Path) -> dict:
    """The JSON that a program writes to a file. RuntimeError with what it said if it failed."""
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(run)} failed: {done.stderr[-800:]}")
    return json.loads(path.read_text())


def flags(args) -> list[str]:
    names = ["--target", args.target] if args.target else []
    draft = ["--draft", args.draft, "--ssd"] if args.draft else []
    return [*names, *draft, "--max-new-tokens", str(args.tokens), "--ignore-eos"]


def compare(args, path: Path) -> dict:
    """Both kinds in turns: tokens a second and milliseconds of a verification, each a list."""
    more = [*flags(args), "--prompt", PROMPT, "--json", str(path)]
    found = {"one process": [], f"{args.ranks} ranks": []}
    for _ in range(args.runs):
        for name, ranks in zip(found, (1, args.ranks)):
            stats = told(command(args, ranks, "generate.py", *more), path)
            found[name].append({key: stats[key] for key in ("tokens_per_s", "verify_ms")})
            found[name][-1]["texts"] = stats["token_ids"]
    same = [run.pop("texts") for runs in found.values() for run in runs]
    return found | {"texts are equal": all(text == same[0] for text in same)}


def profile(args) -> dict:
    """On every rank, by torchrun: milliseconds of rank 0's steps a token, by kind."""
    engine = load(args.target or None, device=args.device)
    settings = {"max_new_tokens": args.tokens, "ignore_eos": True}
    engine.generate([PROMPT], **settings)
    lane = engine.devices.lanes("ar")[0]
    look = torch.profiler.profile()
    lane.start(look.__enter__).result()
    engine.generate([PROMPT], **settings)
    lane.start(look.__exit__, None, None, None).result()
    spent = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in look.key_averages():
        kind = [k for k, names in KINDS.items() if any(name in event.key for name in names)]
        spent[(kind or ["the rest"])[0]] += event.self_cpu_time_total / 1e3 / args.tokens
    return spent


def sums(args) -> dict:
    """On every rank: microseconds of a sum over the ranks, by the bytes of its message."""
    group, device, _ = join(args.target or None, args.device, None, {})
    found = {}
    for size in MESSAGES:
        x = torch.ones(1, size // 4, device=device.partition(":")[0])
        took = []
        for _ in range(100):
            begin = time.perf_counter()
            summed(x, group.ranks, group.name)
            if x.is_cuda:
                torch.cuda.synchronize()
            took.append(1e6 * (time.perf_counter() - begin))
        found[size] = median(took[10:])
    if group.rank > 0:  # what rank 0 does at its end; gloo's threads may not outlive the process
        group.watch.stop()
        torch.distributed.destroy_process_group()
    return found


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="bench_ranks.py", description=__doc__.splitlines()[0])
    p.add_argument("--target", default="", help="folder, GGUF file or hub id (the default model)")
    p.add_argument("--draft", default="", help="with one, SSD is measured, else plain decoding")
    p.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    p.add_argument("--ranks", type=int, default=2, help="processes that share the target (2)")
    p.add_argument("--runs", type=int, default=5, help="runs of each kind (5)")
    p.add_argument("--tokens", type=int, default=64, help="new tokens of a run (64)")
    p.add_argument("--json", default="", help="write the figures to this file")
    p.add_argument("--part", choices=("profile", "sums"), help="what a rank of this program does")
    args = p.parse_args(argv)
    if args.part:  # the ranks that serve do not come back from load()
        own = {"profile": profile, "sums": sums}[args.part](args)
        if os.environ["RANK"] == "0":
            Path(args.json).write_text(json.dumps(own))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "told.json"
        found = {"target": args.target or "default", "torch": torch.__version__}
        found |= compare(args, path)
        own = ["--target", args.target, "--tokens", str(args.tokens), "--json", str(path), "--part"]
        for part in ("profile", "sums"):
            run = command(args, args.ranks, "scripts/bench_ranks.py", *own, part)
            found[part] = told(run, path)
    for name, what in found.items():
        if isinstance(what, list):
            rates = [run["tokens_per_s"] for run in what]
            verify = median(run["verify_ms"] for run in what)
            what = f"{median(rates):.1f} [{min(rates):.1f}, {max(rates):.1f}] tokens/s, " \
                f"a verification {verify:.1f} ms"  # fmt: skip
        elif isinstance(what, dict):
            what = ", ".join(f"{key} {value:.3g}" for key, value in what.items())
        unit = {"profile": " (ms a token)", "sums": " (bytes, us)"}.get(name, "")
        print(f"{name}{unit}: {what}")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
