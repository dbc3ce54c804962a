"""The terminal program: flags in, text and one line of figures out.

Knows: flags, streams, exit codes. Does not know: anything about models or rounds. Read next:
ssd.py.

    python generate.py                  the default model answers a question by plain decoding
    python generate.py --ssd            the same answer, faster where the draft has its own device
    python generate.py --compare        the three modes side by side on one prompt and seed
"""

import argparse
import hashlib
import io
import json
import os
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import fields
from functools import cache, partial
from pathlib import Path

from figures import MODES, UNUSED, compare, explain, figures_line, table, write_trace
from rows import AUTO, Range, Settings

QUESTION = "Why is the sky blue?"
FILE_LIMIT = 1 << 26  # bytes of a prompt file
# Exit codes; the last two are 128 + a signal.
FAILED, MISTAKE, INTERRUPTED, NOBODY_READS = 1, 2, 130, 141
# Of no effect at temperature 0.
SAMPLING_FLAGS = ("top_k", "top_p", "seed", "coupling", "saguaro_c")
LINE_BEGINS = b'{"number": '  # of --out
TEXTS = {"nargs": "+", "action": "extend", "metavar": "TEXT"}
SWITCH = argparse.BooleanOptionalAction


class Parser(argparse.ArgumentParser):
    # One sentence, like every other mistake, instead of the whole usage.
    def error(self, message: str):
        raise ValueError(f"{message} (python generate.py --help lists the flags)")


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="generate.py",
        description="Complete text with a Llama-family model, and let a draft model speed it up.",
        epilog="Text goes to stdout, figures to stderr. Exit codes: 0 done, 1 a device failed or "
        "some of several prompts were refused, 2 a mistake in what was given, 130 Ctrl-C, 141 "
        "nobody reads the output any more. A text that begins with a dash is given as "
        "--prompt=-TEXT.",
        allow_abbrev=False,
    )
    add_modes_and_texts(p)
    add_models(p.add_argument)
    add_settings(p.add_argument)
    said = "write each text as a JSON line once it is done; started again, go on where it ended"
    p.add_argument("--out", metavar="FILE.jsonl", help=said)
    p.add_argument("--json", metavar="FILE|-", help="write the figures as JSON; -: to stdout only")
    p.add_argument("--trace", metavar="FILE", help="write a Chrome/Perfetto trace of both lanes")
    return p


def add_modes_and_texts(p: argparse.ArgumentParser) -> None:
    mode, text = p.add_mutually_exclusive_group(), p.add_mutually_exclusive_group()
    flag = {"action": "store_true"}
    mode.add_argument("--sd", **flag, help="speculative decoding: draft and target take turns")
    mode.add_argument("--ssd", **flag, help="SSD: the draft prepares while the target verifies")
    mode.add_argument("--compare", **flag, help="plain decoding, SD and SSD side by side")
    text.add_argument("--prompt", **TEXTS, help="a text to complete, or several (a batch)")
    said = 'a text (one prompt), or .jsonl with a "prompt" a line'
    text.add_argument("--prompt-file", metavar="FILE", help=said)
    text.add_argument("--chat", **flag, help="talk with a chat model, a line of stdin a turn")
    p.add_argument("--system", metavar="TEXT", help="chat: instructions before the first turn")
    said = "chat: let a model that can think aloud do so, or not"
    p.add_argument("--thinking", action=SWITCH, default=None, help=said)


def add_models(add) -> None:
    model = {"metavar": "DIR|FILE|HUB_ID"}
    add("--target", **model, help="the model whose text you want (SmolLM2-135M-Instruct)")
    add("--draft", **model, help="the small model that drafts (the default target has one); "
        "--sd also knows ngram: not a model")  # fmt: skip
    add("--device", help="where the target runs: cpu, cpu:0-1 (cores), cuda:0 (suits the mode)")
    add("--draft-device", help="where the draft runs (suits the mode)")
    add("--dtype", help="float32, bfloat16, float16, float64 (bfloat16 on CUDA and where a CPU is "
        "faster with it, else float32)")  # fmt: skip
    bits = {"metavar": "none|int8|int4"}
    add("--quantize", **bits, help="bits of the target's weights (a GGUF file's own where this CPU "
        "is fast with few bits, without --dtype and --compile; else none)")  # fmt: skip
    add("--draft-quantize", **bits, help="of the draft's: fewer cost hits, never exactness (on a "
        "CPU what is fastest there)")  # fmt: skip
    add("--compile", action=SWITCH, default=None, help="torch.compile (on CUDA only)")


def add_settings(add) -> None:
    """A flag for each of the Settings but the mode."""
    for asked in fields(Settings)[1:]:
        said, wanted, usual = *asked.metadata.values(), asked.default
        if isinstance(wanted, Range):
            shown = wanted.letter + "|auto" * wanted.auto
            how = {"type": partial(number, wanted), "metavar": shown, "default": usual}
        elif wanted:
            how = {"metavar": "|".join(wanted), "default": usual}
        elif usual == ():
            how = TEXTS | {"default": []}
        else:
            how = {"action": SWITCH if usual else "store_true", "default": usual}
        add("--" + asked.name.replace("_", "-"), help=said, **how)


def number(wanted: Range, text: str) -> int | float | str:
    try:
        return text if wanted.auto and text == AUTO else wanted.kind(text)
    except ValueError:
        what = wanted.what + " or auto" * wanted.auto
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}, wanted {what}") from None


def read_prompts(args) -> list[str]:
    """The texts to complete; none where nothing was given."""
    if args.prompt_file is None:
        return args.prompt or []
    path = Path(args.prompt_file)
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT + 1)
        if len(data) > FILE_LIMIT:
            raise ValueError(
                f"{path} has more than {FILE_LIMIT >> 20} MiB, the limit: use a smaller file"
            )
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"the prompt file {path} cannot be read ({error.strerror}): check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {error.start}, wanted UTF-8 text: save it as UTF-8"
        ) from error
    if path.suffix != ".jsonl":
        return [text]
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold U+2028
        if line.strip():
            try:
                prompts.append(json.loads(line)["prompt"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f'line {number} of {path} is not a JSON object with a "prompt": correct it'
                ) from error
            if not isinstance(prompts[-1], str):
                raise ValueError(
                    f'"prompt" in line {number} of {path} is not a text: put it in quotes'
                )
    if not prompts:
        raise ValueError(f"{path} holds no prompts, wanted one a line: add some")
    return prompts


def tell(text: str) -> None:
    print(text, file=sys.stderr)


class Answers:
    """The file of --out: a JSON line for each row that has ended, on disk at once. What it holds
    already is not decoded again.
    """

    def __init__(self, args, prompts: list[str]):
        if not prompts or args.compare:
            raise ValueError(
                "--out was given with --compare or without a prompt, wanted texts to complete: "
                "use --prompt or --prompt-file"
            )
        self.path, self.prompts, self.made_with = Path(args.out), prompts, set()
        named = "target max_new_tokens temperature top_k top_p seed stop ignore_eos coupling"
        asked = json.dumps([getattr(args, name) for name in named.split()])
        self.settings = hashlib.sha256(asked.encode()).hexdigest()[:12]  # the texts hang on these
        self.file = self.path.open("a+b")
        lock(self.file)
        self.file.seek(0)
        *lines, end = self.file.read().split(b"\n")
        self.known = {self.checked(*line) for line in enumerate(lines, 1)}
        # A program that was killed may have left part of a line. Anything else is not ours to cut.
        if not end.startswith(LINE_BEGINS[: len(end)]):
            raise self.foreign(len(lines) + 1)
        self.file.truncate(self.file.tell() - len(end))
        self.left = [n for n in range(len(prompts)) if n not in self.known]
        if self.known:
            tell(f"{self.path} holds {len(self.known)} of {len(prompts)} texts")

    def checked(self, at: int, line: bytes) -> int:
        """The number of the prompt that a line answers, from 0."""
        with suppress(ValueError, KeyError, TypeError, IndexError, RecursionError):
            told = json.loads(line)
            number, known = told["number"] - 1, (told["prompt"], told["settings"])
            self.made_with.add((told["dtype"], told["quantize"]))
            if known == (self.prompts[number], self.settings) and number >= 0:
                return number
        raise self.foreign(at)

    def foreign(self, at: int) -> ValueError:
        return ValueError(
            f"line {at} of {self.path} does not answer one of these prompts with these "
            "settings: give those that it was written with, or name another file"
        )

    def use(self, numbers: dict) -> None:
        """Write from now on, with the engine's own dtype and quantize in each line. ValueError if
        the file has texts of others, which the same flags may give on another machine.
        """
        self.numbers = numbers
        for other in self.made_with - {tuple(numbers.values())}:
            raise ValueError(
                f"{self.path} holds texts of weights in {' and '.join(other)}, but these are in "
                f"{' and '.join(numbers.values())}: give --dtype and --quantize so that they are "
                "the same, or name another file"
            )

    def write(self, rows: list) -> None:
        """Add the rows that have ended since the last call. rows: of `left`, in that order."""
        for number, row in zip(self.left, rows):
            if row.finish and not row.refused and number not in self.known:
                line = {
                    "number": number + 1,
                    "prompt": self.prompts[number],
                    "text": row.text,
                    "finish_reason": row.finish,
                    "token_ids": row.new_ids,
                    **self.numbers,
                    "settings": self.settings,
                }
                line = json.dumps(line).encode() + b"\n"
                self.known.add(number)
                self.file.write(line)
                self.file.flush()


def lock(file) -> None:
    """Keep other runs from writing to a file, where platform and file system know locks. ValueError
    if another run has it.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run writes to {file.name}: wait until it ends, or name another file"
        ) from None
    except (ImportError, OSError):
        return


def progress_bar(rows: int, quiet: bool):
    """A bar over the rows, which nobody sees where there is no terminal."""
    from tqdm import tqdm  # huggingface-hub brings it along

    off = quiet or rows < 2 or not sys.stderr.isatty()
    return tqdm(total=rows, unit="row", disable=off)


def show(bar, rows: list) -> None:
    """Move a progress bar on to what the rows have come to."""
    if not bar.disable:
        made = sum(len(row.new_ids) for row in rows)
        bar.set_postfix_str(f"{made / (time.time() - bar.start_t):.0f} tokens/s", refresh=False)
        bar.update(sum(row.finish is not None for row in rows) - bar.n)


def tell_refused(numbers, rows: list) -> bool:
    """Whether any row was refused; says which. numbers: of their prompts, from 0."""
    refused = [str(n + 1) for n, row in zip(numbers, rows) if row.refused]
    if refused:
        were = f"{len(refused)} of {len(rows)} prompts {'were' if refused[1:] else 'was'}"
        tell(f"{were} refused: {', '.join(refused)}")
    return bool(refused)


def check_outputs(args) -> None:
    """ValueError for a file that cannot be written, or that two flags name: no such thing should be
    found out after the work.
    """
    used = {}
    for flag in ("--prompt-file", "--out", "--json", "--trace"):
        name = vars(args)[flag[2:].replace("-", "_")]
        if name is None or (flag, name) == ("--json", "-"):
            continue
        path = Path(name)
        if flag != "--prompt-file":
            check_output(flag, name)
        other = used.setdefault(path.resolve(), flag)
        if other != flag and (path.is_file() or not path.exists()):
            raise ValueError(f"{other} and {flag} are both {name}, wanted two files: name another")


def check_output(flag: str, name: str) -> None:
    path = Path(name)
    place = path if path.exists() else path.resolve().parent
    for wrong, said in (
        (name == "-", "is no file, wanted one: only --json writes to stdout"),
        (path.is_dir(), "is a folder, wanted a file to write: name one in it"),
        (
            flag == "--out" and place == path and not path.is_file(),
            "is a pipe or a device, wanted an ordinary file: name one",
        ),
        (
            place != path and not place.is_dir(),
            "cannot be written, its folder does not exist: create it first",
        ),
        (
            not os.access(place, os.W_OK),
            "cannot be written, it or its folder is read-only: name another file",
        ),
    ):
        if wrong:
            raise ValueError(f"{flag} {name or repr(name)} {said}")


def note_idle_flags(args, mode: str, rows: int) -> None:
    """Say which flags were given and do nothing here; nothing is dropped in silence."""
    idle = UNUSED[mode] + (SAMPLING_FLAGS if args.temperature == 0 else ())
    if args.draft == "ngram":
        idle += ("draft_device", "draft_quantize", "batch_halves", "saguaro_c")
    idle += ("batch",) if rows < 2 else ()
    idle += ("batch_halves",) if min(rows, args.batch or rows) < 2 else ()
    usual = vars(parser().parse_args([]))
    given = [
        "--" + name.replace("_", "-")
        for name in dict.fromkeys(idle)
        if vars(args)[name] != usual[name]
    ]
    if given:
        where = f"in mode {mode} at temperature {args.temperature:g}"
        tell(f"note: {where}, {', '.join(given)} changes nothing")


def settings_of(args, mode: str) -> dict:
    return {"mode": mode} | {f.name: getattr(args, f.name) for f in fields(Settings)[1:]}


def chat_ids(engine, args, said: str, earlier: list[dict] = ()) -> list[int]:
    """The ids of a conversation up to the answer to what was said last, by the model's own chat
    template.
    """
    if engine.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer files, which a chat needs: use another")
    first = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = [*first, *earlier, {"role": "user", "content": said}]
    return engine.tokenizer.encode_chat(messages, thinking=args.thinking)


def complete(engine, prompts: list, settings: dict, quiet=False, keep=False, opening="", out=None):
    """The result of one generation, the run, and what ended it early: an error, Ctrl-C, or None.

    A single text streams to stdout as it comes, after `opening`. Whatever ends the generation, the
    text so far has been printed. out: the Answers that take the texts instead.
    """
    decoding = engine.start(prompts, keep, numbers=out and out.left, **settings)
    ended, bar = None, progress_bar(len(prompts), quiet and out is None)
    quiet = quiet or out is not None
    if not quiet:
        print(opening, end="", flush=True)
    try:
        for _ in decoding.rounds():
            show(bar, decoding.all_rows)
            if out is not None:
                out.write(decoding.all_rows)
            if len(prompts) == 1 and not quiet and (piece := decoding.rows[0].piece()):
                print(piece, end="", flush=True)
    except (KeyboardInterrupt, ValueError, RuntimeError) as raised:
        ended = raised.with_traceback(None)  # which would keep all that is here alive
    bar.close()
    if out is not None:
        out.write(decoding.all_rows)
    if not quiet and len(prompts) > 1:
        for number, row in enumerate(decoding.all_rows, 1):
            print(f"--- {number} ---\n{row.text}", flush=True)
    elif not quiet:
        print(decoding.rows[0].text[decoding.rows[0].told :], flush=True)
    try:
        return engine.finish(decoding), decoding, ended
    except KeyboardInterrupt as raised:  # the file of --json is written all the same
        return engine.finish(decoding), decoding, raised


def compare_modes(engine, prompts: list[str], args) -> int:
    """The three modes on the same prompts and seed; a short run before each, so that nothing is
    timed cold. Modes that are done before an error or Ctrl-C are shown.
    """
    runs, decoding, ended = {}, None, None
    engine.warn = cache(engine.warn)  # the same sentence once, not in every mode
    try:
        for mode in MODES:
            settings = settings_of(args, mode)
            engine.generate(prompts, **settings | {"max_new_tokens": min(8, args.max_new_tokens)})
            decoding = engine.start(prompts, **settings)
            for _ in decoding.rounds():
                pass
            runs[mode] = engine.finish(decoding).stats
    except (KeyboardInterrupt, ValueError, RuntimeError) as raised:
        ended = raised
    told = map(figures_line, runs.values())
    if ended is None:
        runs = compare(runs)
        told = table(runs), *explain(runs)
    if runs and args.json != "-":
        print("\n\n".join(runs["ar"]["text"]), *told, sep="\n")
    if runs:
        save(args, runs, decoding)
    if ended is not None:
        raise ended
    return FAILED if tell_refused(range(len(prompts)), decoding.all_rows) else 0


def save(args, stats: dict, decoding) -> None:
    """Write the files of --json and --trace."""
    if args.json == "-":
        print(json.dumps(stats))
    elif args.json is not None:
        Path(args.json).write_text(json.dumps(stats) + "\n")
    if args.trace is not None:
        write_trace(args.trace, decoding)


def chat(engine, args, settings: dict) -> int:
    """Turns from stdin until it ends; each keeps the KV of the turns before it."""
    # No template: say so before anybody types.
    chat_ids(engine, args, "?")
    messages = []
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            said = input(prompt)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            return INTERRUPTED
        except UnicodeDecodeError as error:
            raise ValueError(
                "a line of stdin is not UTF-8, wanted UTF-8 text: convert it"
            ) from error
        if not said.strip():
            continue
        ids = chat_ids(engine, args, said, messages)
        result, _, ended = complete(engine, [ids], settings, keep=True)
        tell(figures_line(result.stats))
        messages += [
            {"role": "user", "content": said},
            {"role": "assistant", "content": result.text[0]},
        ]
        if ended and not (isinstance(ended, KeyboardInterrupt) and sys.stdin.isatty()):
            raise ended


def load_pair(args, mode: str):
    """The engine of the models that were asked for; the default target has a draft of its own."""
    from engine import DEFAULT_DRAFT, default_target, load

    if args.draft == "ngram" and mode == "ssd":
        raise ValueError(
            "--draft is ngram, which only --sd can use: name a small model, or choose --sd"
        )
    if args.draft is None and mode != "ar" and args.target is not None:
        raise ValueError(
            "no --draft was given, wanted a small model with the target's vocabulary: name one"
        )
    began = time.perf_counter()
    draft = (args.draft or DEFAULT_DRAFT) if mode != "ar" else None
    target = default_target() if args.target is None else args.target
    bits = args.quantize, args.draft_quantize
    engine = load(target, draft, args.device, args.draft_device, args.dtype, args.compile, *bits)
    tell(f"loaded in {time.perf_counter() - began:.1f} s")
    return engine


def started_ranks(args, mode: str) -> int:
    """How many ranks torchrun started, 1 without it. Returns on rank 0 only, which has the text."""
    if not {"WORLD_SIZE", "RANK"} & os.environ.keys():
        return 1
    from ranks import own_rank

    ranks, rank = own_rank()
    if rank > 0:
        sys.stderr = io.StringIO()
        load_pair(args, mode)  # serves rank 0 until that ends
    return ranks


def run(args) -> int:
    # torch misses NumPy at each start; nobody here does.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    mode = "ssd" if args.ssd or args.compare else "sd" if args.sd else "ar"
    ranks = started_ranks(args, mode)
    if args.chat and (args.compare or args.json is not None or args.trace is not None):
        raise ValueError(
            "--chat was given with --compare, --json or --trace, which are of one text: choose"
        )
    prompts = read_prompts(args)
    if prompts and (args.system is not None or args.thinking is not None):
        raise ValueError(
            "--system or --thinking was given with a prompt to complete, wanted a chat: add --chat"
        )
    check_outputs(args)
    settings = settings_of(args, mode)
    Settings(**settings)  # before files and models: a wrong flag makes none and waits for none
    out = None if args.out is None else Answers(args, prompts)
    if out is not None:
        prompts = [prompts[n] for n in out.left]
        if not prompts:
            tell("nothing is left to do, so there are no figures")
            if ranks > 1:
                load_pair(args, mode)  # the others wait for rank 0
            return 0
    engine = load_pair(args, mode)
    if out is not None:
        out.use(engine.target.numbers())
    note_idle_flags(args, mode, len(prompts))
    if args.chat:
        return chat(engine, args, settings)
    quiet = args.json == "-"
    opening = "" if prompts else f"> {QUESTION}\n"
    if not prompts:  # nothing to complete: the built-in question, asked as a user would
        prompts = [chat_ids(engine, args, QUESTION)]
    if args.compare:
        return compare_modes(engine, prompts, args)
    if len(prompts) > 1:
        engine.tell = tell
    result, decoding, ended = complete(engine, prompts, settings, quiet, opening=opening, out=out)
    tell(figures_line(result.stats))
    save(args, result.stats, decoding)
    refused = tell_refused(out.left if out else range(len(prompts)), decoding.all_rows)
    if ended is not None:
        raise ended
    return FAILED if refused else 0


def main() -> int:
    for name, how in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it is closed; print() would take stdout for stderr
            nowhere = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(nowhere, how, errors="replace"))
    # A character that the terminal cannot show is no reason to stop.
    sys.stdout.reconfigure(errors="replace")
    try:
        try:
            return run(parser().parse_args())
        finally:
            sys.stdout.flush()
    # `| head` has what it wanted; without the next lines the last flush would complain.
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return NOBODY_READS
    except (ValueError, OSError) as error:
        tell(f"error: {error}")
        return MISTAKE
    except RuntimeError as error:  # a device that failed or is full, say
        tell(f"error: {str(error).splitlines()[0]}")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
