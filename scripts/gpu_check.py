"""What only a GPU can show: correctness on CUDA, and times as fractions of what the machine can do.

Knows: parts, time limits, the environment, the pair of models, the file of results and its tables.
Does not know: how anything is checked or timed (gpu_parts.py). Read next: gpu_parts.py.

    python scripts/gpu_check.py --call 1 --out F.json     on cuda:0, under 9 minutes
    python scripts/gpu_check.py --call 2 --out F.json     the other parts, under 9 minutes
    python scripts/gpu_check.py --only kernels,decode     some parts
    python scripts/gpu_check.py --only correct --sanitize the kernel's checks, compute-sanitizer
    python scripts/gpu_check.py --only ranks              where there are several cards
    python scripts/gpu_check.py --device cpu              every line at toy size, without meaning
    python scripts/gpu_check.py --show F.json             the tables again

What is worth most comes first, in case that the machine goes away. Each part is a process of its
own, killed at its limit. What it had found by then is kept, and so are the other parts of a file
that is there already. Beside F.json lie F.log, all that was printed (with the compiler's reasons to
compile anew), and the trace of a round. All parts share one folder of compiled code.

Exit code 0: all right; 1: something is wrong, too slow, failed or unfinished; 2: a mistake of the
caller.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "scripts" / "gpu_parts.py"
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402

from checkpoint.config import Config  # noqa: E402
from checkpoint.weights import load_config  # noqa: E402
from model import Transformer  # noqa: E402
from runtime import parse_device  # noqa: E402
from scripts.gpu_parts import GOALS  # noqa: E402
from scripts.runner import environment  # noqa: E402
from scripts.save import save_model  # noqa: E402

# Call -> its parts, what is worth most first, and their limits in seconds. A call may be all that
# there is time for on a machine, and the next one may find another, with no compiled code.
CALLS = {
    1: {"decode": 80, "ssd": 240, "profile": 90, "tuner": 110},
    2: {"kernels": 90, "loop": 120, "wide": 110, "linear": 60, "transformers": 120},
}
PARTS = CALLS[1] | CALLS[2]
EXTRA = {"correct": 120, "ranks": 120}  # only by name: a part of kernels; for several cards
WRONG, MISTAKE = 1, 2
# The random pair, where none is given, and how far its draft is from it.
SHAPE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2,
    "max_position_embeddings": 4096,
}  # fmt: skip
NOISE = 0.05
# The pair is grown for these parts; `ssd` grows its drafts itself.
LARGE, LARGE_PARTS = "inflate:llama-3.1-8b:", ("decode", "ssd", "profile", "tuner", "wide")
LARGE_DRAFT = "inflate:llama-3.2-1b:"
CODE = Path(tempfile.gettempdir()) / "gpu_check"  # compiled code of all parts


# ---- the environment


def device_environment(device: torch.device) -> dict:
    """Where the numbers come from, without names of hosts or people."""
    found = environment() | {"python": platform.python_version(), "cuda": torch.version.cuda}
    if device.type == "cuda":
        return found | {"device": torch.cuda.get_device_name(device)} | nvidia_smi()
    return found | {"device": "cpu"}


def nvidia_smi() -> dict:
    """Driver, power cap and clocks of the first GPU, as far as the tool is there and tells."""
    keys = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "memory.total")
    ask = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"nvidia_smi": str(error)}
    line = told.stdout.strip().partition("\n")[0]
    return dict(zip(keys, map(str.strip, line.split(",")))) if line else {"nvidia_smi": told.stderr}


# ---- one part, in a process of its own


def run_part(part: str, how: dict, limit_s: float, log: Path, sanitizer: str | None = None) -> dict:
    """{"records", "seconds", "end"}: end is "done", or in a sentence why not. What the part prints
    is added to `log`.
    """
    command = [sys.executable, str(PROGRAM), part, json.dumps(how)]
    if sanitizer:
        command = [sanitizer, "--error-exitcode", "99", *command]
    env = {"TORCHINDUCTOR_CACHE_DIR": str(CODE), "TRITON_CACHE_DIR": str(CODE / "triton")}
    env |= {"TORCH_LOGS": "recompiles"} | os.environ
    if how["spec"].startswith("cpu") and part == "correct":
        env["TRITON_INTERPRET"] = "1"
    began, records, tail = time.perf_counter(), [], []
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    child = subprocess.Popen(command, env=env, text=True, errors="replace", **both)

    def listen():
        with log.open("a") as file:
            for line in child.stdout:
                file.write(line)
                record = parse(line)
                if record is None:
                    tail.append(line.rstrip())
                    del tail[:-25]
                else:
                    records.append(record)
                    say(f"  {part}: {row(record)}")

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        code = child.wait(limit_s)
        end = "done" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        kill(child)
        end = f"killed at its limit of {limit_s:.0f} s: what it had found is kept"
    listener.join(5)
    if end != "done":
        say(f"  {part} {end}")
        say("    " + "\n    ".join(tail))
    out = {"records": records, "seconds": round(time.perf_counter() - began, 1), "end": end}
    return out if end == "done" else out | {"last_lines": tail}


def kill(child: subprocess.Popen) -> None:
    """The child and the compilers it started: its own process group, nothing else."""
    try:
        os.killpg(child.pid, 9)
    except ProcessLookupError:
        say("  it ended by itself in that moment")
    child.wait(30)


def parse(line: str) -> dict | None:
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "name" in record else None


# ---- the tables


def row(record: dict) -> str:
    value, unit = record["value"], record.get("unit", "")
    text = value if isinstance(value, str) else f"{value:.4g} {unit}".rstrip()
    if record.get("low") is not None:
        text += f" ({record['low']:.4g} to {record['high']:.4g})"
    verdict = {True: "PASS", False: "FAIL", None: ""}[record.get("pass")]
    more = "".join(
        f", {key} {record[key]}"
        for key in ("near_ties", "differences", "worst_case", "rounds")
        if record.get(key)
    )
    lines = [f"{verdict:5}{record['name']}: {text}{more}"]
    if kernels := record.get("kernels"):
        lines[0] += f", of it gaps {record['gaps_us']:.4g} us"
        lines += [f"{n:14.4g} x{us:10.4g} us{share:7.1%}  {name}" for name, n, us, share in kernels]
    return "\n".join(lines)


def goals(results: dict) -> list[str]:
    """The first table: each goal, what was measured, and its fraction of the goal: 1 or more is
    reached.
    """
    records = [(part, r) for part, found in results["parts"].items() for r in found["records"]]
    lines = [f"{'goal':46}{'wanted':>9}{'aim':>6}{'measured':>10}{'fraction':>10}"]
    for key, (what, kind, limit, aim) in GOALS.items():
        begin = f"{what:46}{'>= <='.split()[kind == 'most']:>3}{limit:6g}{aim or '':>6}"
        measured = [(part, r) for part, r in records if r.get("goal") == key]
        lines += [begin + f"{'-':>10}{'-':>10}  not measured"] * (not measured)
        for part, r in measured:
            value = max(r["value"], 1e-9)
            fraction = value / limit if kind == "least" else limit / value
            verdict = {True: "PASS", False: "FAIL", None: "toy "}[r["pass"]]
            lines += [f"{begin}{value:10.4g}{fraction:10.3g}  {verdict} {part}: {r['name']}"]
    return lines


def tables(results: dict) -> str:
    """The whole file as text: the goals, then everything by parts."""
    lines = goals(results)
    for part, found in results["parts"].items():
        where = found["environment"]
        head = f"{part}: {found['end']}, {found['seconds']:.0f} s, {where['device']}"
        lines += ["", f"{head}, torch {where['torch']}, commit {where['commit']}"]
        lines += [f"  {row(record)}" for record in found["records"]]
    lines += ["", summary(results)]
    return "\n".join(lines)


def summary(results: dict) -> str:
    parts = results["parts"].items()
    verdicts = [record.get("pass") for _, found in parts for record in found["records"]]
    broken = [f"; {part} {found['end']}" for part, found in parts if found["end"] != "done"]
    return f"{verdicts.count(True)} PASS, {verdicts.count(False)} FAIL" + "".join(broken)


def all_right(results: dict, parts) -> bool:
    found = [results["parts"][part] for part in parts]
    return all(
        f["end"] == "done" and all(r.get("pass") is not False for r in f["records"]) for f in found
    )


# ---- the command line


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        description="Check and time the engine on a GPU.", allow_abbrev=False
    )
    out.add_argument(
        "--device", default="cuda:0", help="cuda:N, or cpu for toy sizes (default cuda:0)"
    )
    out.add_argument(
        "--call", type=int, choices=CALLS, help="the parts of a call (default: of both)"
    )
    out.add_argument(
        "--only", default="", help=f"parts, with commas between: {', '.join([*PARTS, *EXTRA])}"
    )
    out.add_argument(
        "--limit", type=float, default=0, help="seconds for each part instead of its own limit"
    )
    out.add_argument("--target", help="a small checkpoint that is grown (default: random weights)")
    out.add_argument("--draft", help="its draft (default: the random weights and some noise)")
    out.add_argument(
        "--sanitize", action="store_true", help="run the parts under compute-sanitizer"
    )
    out.add_argument("--out", type=Path, help="file of results (default results/DEVICE.json)")
    out.add_argument("--show", type=Path, help="print the tables of a file and do nothing else")
    return out


def plan(args) -> tuple[torch.device, list[str], str | None]:
    """Device, parts and sanitizer; ValueError with one sentence for a mistake of the caller."""
    if args.only and args.call:
        raise ValueError("--only and --call were given, wanted one: leave out the other")
    parts = [part for part in args.only.split(",") if part] or list(CALLS.get(args.call, PARTS))
    if unknown := [part for part in parts if part not in PARTS | EXTRA]:
        raise ValueError(f"--only has {unknown[0]!r}, wanted some of {', '.join([*PARTS, *EXTRA])}")
    if args.limit < 0:
        raise ValueError(f"--limit is {args.limit:g}, wanted seconds above 0: leave it out")
    device, _ = parse_device(args.device)
    if (args.target is None) != (args.draft is None):
        raise ValueError(
            "one of --target and --draft was given, wanted a pair: give both or neither"
        )
    for name in filter(None, (args.target, args.draft)):
        load_config(name)
    sanitizer = shutil.which("compute-sanitizer") if args.sanitize else None
    if args.sanitize and sanitizer is None:
        raise ValueError(
            "--sanitize was given, but compute-sanitizer is missing: install it, or leave it out"
        )
    return device, parts, sanitizer


def play(part: str, args, out: Path, where: dict, sanitizer: str | None, results: dict) -> None:
    """Run a part and put what it found into the results, in their order."""
    say(f"{part} on {where['device']}")
    tiny = args.device.startswith("cpu")
    target = LARGE if part in LARGE_PARTS and not tiny else ""
    draft = LARGE_DRAFT if target and part != "ssd" else ""
    how = {"spec": args.device, "target": target + args.target, "draft": draft + args.draft}
    how |= {"tiny": tiny, "folder": str(out.parent.resolve())}
    limit_s = args.limit or (PARTS | EXTRA)[part]
    found = run_part(part, how, limit_s, out.with_suffix(".log"), sanitizer)
    results["parts"][part] = found | {"environment": where, "sanitized": bool(sanitizer)}
    order = [*PARTS, *EXTRA]
    results["parts"] = dict(sorted(results["parts"].items(), key=lambda item: order.index(item[0])))


def random_pair(folder: Path) -> tuple[str, str]:
    """A small random checkpoint, and the same weights with some noise as its draft."""
    names = []
    for name, noise in (("target", 0.0), ("draft", NOISE)):
        model = Transformer(Config.from_dict(SHAPE)).requires_grad_(False)
        own, more = (torch.Generator().manual_seed(seed) for seed in (0, 1))
        for weight in model.parameters():
            if weight.ndim == 2:
                random = torch.randn(weight.shape, generator=own)
                random += noise * torch.randn(weight.shape, generator=more)
                weight.copy_(random * weight.shape[1] ** -0.5)
        model.head.weight.mul_(6.0)  # a distribution as sharp as a trained model's
        save_model(model, SHAPE, folder / name)
        names.append(str(folder / name))
    return names[0], names[1]


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.show:
            print(tables(json.loads(args.show.read_text())))
            return 0
        device, parts, sanitizer = plan(args)
    except (ValueError, OSError, KeyError) as error:
        say(f"gpu_check.py: {error}")
        return MISTAKE
    where, tiny = device_environment(device), device.type == "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    out = args.out or ROOT / "results" / (f"{name}-toy.json" if tiny else f"{name}.json")
    results = json.loads(out.read_text()) if out.exists() else {"parts": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.target is None:
            args.target, args.draft = random_pair(Path(folder))
        for part in parts:
            play(part, args, out, where, sanitizer, results)
            out.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))
    print(f"written to {out}")
    return 0 if all_right(results, parts) else WRONG


if __name__ == "__main__":
    raise SystemExit(main())
