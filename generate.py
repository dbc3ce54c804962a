"""The terminal program: flags in, text and one line of figures out.

Knows: flags, streams, exit codes. Does not know: anything about models or rounds. Read next: ssd.py.

    python generate.py                      plain decoding of a built-in prompt by the demo pair, on the CPU
    python generate.py --ssd --compare      the three modes side by side on the same prompt and seed
"""

import argparse
import json
import sys
import time
from pathlib import Path

DEMO = Path(__file__).resolve().parent / "assets" / "demo"
PROMPT = "def fibonacci(n):\n"
FILE_LIMIT = 1 << 26  # bytes of a prompt file
INTERRUPTED, MISTAKE = 130, 2


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="generate.py", description="Complete text with a Llama-family model, and let a draft model speed it up.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = p.add_argument
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--sd", action="store_true", help="speculative decoding: draft and target take turns")
    mode.add_argument("--ssd", action="store_true", help="SSD: the draft prepares while the target verifies")
    mode.add_argument("--compare", action="store_true", help="AR, SD and SSD on the same prompt and seed, side by side")
    text = p.add_mutually_exclusive_group()
    text.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or several prompts (a batch)")
    text.add_argument("--prompt-file", metavar="FILE", help="a text (one prompt), or .jsonl with a prompt a line")
    text.add_argument("--chat", action="store_true", help="talk with a chat model, turn by turn")
    add("--target", metavar="DIR|HUB_ID", default=str(DEMO / "target"), help="the model whose text you want")
    add("--draft", metavar="DIR|HUB_ID", help="the small model that drafts (default: the demo target's)")
    add("--device", help="where the target runs: cpu, cpu:0-1 (cores), cuda:0 (default: best for the mode)")
    add("--draft-device", help="where the draft runs")
    add("--dtype", help="float32, bfloat16, float16, float64 (default: float32 on a CPU, bfloat16 on CUDA)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="most new tokens per prompt")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    add("--top-k", type=int, default=0, metavar="N", help="keep the N likeliest tokens; 0 is off")
    add("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens that sum to P; 1 is off")
    add("--seed", type=int, default=0, metavar="S", help="same seed, same text, in every mode")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end the output")
    add("--ignore-eos", action="store_true", help="go on behind the end of the text")
    add("--k", type=int, default=argparse.SUPPRESS, metavar="K", help="most draft tokens a round")
    add("--fan-out", type=int, default=argparse.SUPPRESS, metavar="M", help="SSD: outcomes prepared a round")
    add("--cut", action=argparse.BooleanOptionalAction, default=True, help="SSD: use the chains that are ready in time")
    add("--fallback", default="auto", metavar="auto|jit|fast", help="SSD, on a miss: draft now, guess, or the faster")
    add("--coupling", default="shared", metavar="shared|maximal|independent", help="how the models share randomness")
    add("--saguaro-c", type=float, default=1.0, metavar="C", help="SSD, independent: weigh down the draft's top tokens")
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile (default: on CUDA only)")
    add("--json", metavar="FILE|-", help="write the figures as one JSON object; - prints it as the last line")
    add("--trace", metavar="FILE", help="write a Chrome/Perfetto trace of both lanes")
    return p


def read_prompts(args) -> list[str]:
    if args.prompt_file is None:
        return args.prompt or [PROMPT]
    path = Path(args.prompt_file)
    try:
        if path.stat().st_size > FILE_LIMIT:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, wanted at most {FILE_LIMIT}: use a smaller file")
        text = path.read_bytes().decode()
    except OSError as error:
        raise ValueError(f"the prompt file {path} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
    if path.suffix != ".jsonl":
        return [text]
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                prompts.append(json.loads(line)["prompt"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f'line {number} of {path} is not a JSON object with a "prompt": correct it') from error
            if not isinstance(prompts[-1], str):
                raise ValueError(f'"prompt" in line {number} of {path} is no text: put it in quotes')
    if not prompts:
        raise ValueError(f"{path} holds no prompts, wanted one a line: add some")
    return prompts


def settings_of(args, mode: str) -> dict:
    names = "max_new_tokens temperature top_k top_p seed ignore_eos cut fallback coupling saguaro_c".split()
    chosen = {name: getattr(args, name) for name in names} | {"mode": mode, "stop": tuple(args.stop)}
    return chosen | {name: getattr(args, name) for name in ("k", "fan_out") if hasattr(args, name)}


def complete(engine, prompts: list[str], settings: dict, quiet: bool, keep: bool = False):
    """Run one generation, one prompt streaming to stdout as it comes. -> the result, and whether it was interrupted."""
    decoding, interrupted = engine.start(prompts, keep, **settings), False
    try:
        for _ in decoding.rounds():
            if len(prompts) == 1 and not quiet and (piece := decoding.rows[0].piece()):
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    result = engine.finish(decoding)
    if not quiet and len(prompts) > 1:
        for number, text in enumerate(result.text, 1):
            print(f"--- {number} ---\n{text}")
    elif not quiet:
        print(decoding.rows[0].text[decoding.rows[0].told :])
    return result, interrupted


def figures_line(stats: dict) -> str:
    """One line of figures: speed first, then what explains it."""
    show = [f"{stats['mode']}: {sum(stats['new_tokens'])} tokens, {stats['tokens_per_s']:.1f} tokens/s"]
    add = lambda key, text, scale=1: show.append(text.format(stats[key] * scale)) if stats[key] is not None else None  # noqa: E731
    add("tokens_per_round", "{:.2f} tokens a round")
    add("acceptance_rate", "acceptance {:.0f}%", 100)
    add("hit_rate", "hits {:.0f}%", 100)
    add("verify_ms", "verify {:.1f} ms")
    add("draft_ms", "draft {:.1f} ms")
    add("hidden", "hidden {:.0f}%", 100)
    add("bandwidth_fraction", "{:.0f}% of memory bandwidth", 100)
    add("peak_memory_gb", "{:.2f} GB")
    return " | ".join(show)


def write_json(where: str, stats: dict) -> None:
    line = json.dumps(stats)
    if where == "-":
        print(line)
    else:
        Path(where).write_text(line + "\n")


def chat(engine, settings: dict) -> int:
    """Turns from stdin until it ends; each keeps the KV of the turns before it."""
    messages, prompt = [], "> " if sys.stdin.isatty() else ""
    while True:
        try:
            said = input(prompt)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            return INTERRUPTED
        if not said.strip():
            continue
        ids = engine.tokenizer.encode_chat([*messages, {"role": "user", "content": said}])
        result, interrupted = complete(engine, [ids], settings, quiet=False, keep=True)
        print(figures_line(result.stats), file=sys.stderr)
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": result.text[0]}]
        if interrupted and not sys.stdin.isatty():
            return INTERRUPTED


def run(args) -> int:
    prompts = None if args.chat else read_prompts(args)
    for path in filter(None, (args.json, args.trace)):
        if path != "-" and not Path(path).resolve().parent.is_dir():
            raise ValueError(f"{path} cannot be written, its folder does not exist: create it first")
    mode = "sd" if args.sd else "ssd" if args.ssd else "ar"
    speculative = mode != "ar" or args.compare
    if args.draft is None and speculative:
        if Path(args.target).resolve() != DEMO / "target" and not args.target.startswith("inflate:"):
            raise ValueError("no --draft was given, wanted a small model with the target's vocabulary: name one")
        args.draft = str(DEMO / "draft")
    from settings import Settings  # before the models: a wrong flag should not wait for them

    Settings(**settings_of(args, mode))
    from ssd import load

    began = time.perf_counter()
    engine = load(args.target, args.draft if speculative else None, args.device, args.draft_device, args.dtype,
                  args.compile)  # fmt: skip
    print(f"loaded in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    if args.chat:
        if engine.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer files, which --chat needs: use another checkpoint")
        return chat(engine, settings_of(args, mode))
    if args.compare:
        from compare import compare

        return compare(engine, prompts, settings_of(args, "ssd"), args.json, args.trace)
    result, interrupted = complete(engine, prompts, settings_of(args, mode), quiet=args.json == "-")
    print(figures_line(result.stats), file=sys.stderr)
    if args.trace:
        from trace import write_trace

        write_trace(args.trace, engine)
    if args.json:
        write_json(args.json, result.stats)
    return INTERRUPTED if interrupted else 0


def main() -> int:
    args = parser().parse_args()
    try:
        return run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
