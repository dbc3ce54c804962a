"""The terminal program: every flag does what --help says, and every mistake ends in one sentence
and exit code 2.

Most runs are calls of generate.main in this process; a few are real ones, where the process itself
is what matters.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, SCRIPT, SHAPE

import engine
import generate
import runtime
import ssd
import steps
from checkpoint.tokenizer import Tokenizer
from engine import load

PROGRAM = Path(generate.__file__)
ASKED = f"> {generate.QUESTION}\n"  # shown where no prompt is given, and answered
SPOKEN = 9  # tokens of SCRIPT, without the end-of-text token
KEYS = (
    *(
        "mode",
        "target",
        "draft",
        "device",
        "draft_device",
        "dtype",
        "quantize",
        "draft_quantize",
        "k",
        "fan_out",
        "cut",
        "fallback",
        "coupling",
    ),
    *(
        "temperature",
        "seed",
        "auto",
        "prompts",
        "prompt_tokens",
        "new_tokens",
        "token_ids",
        "text",
        "finish_reason",
    ),
    *(
        "prefill_s",
        "decode_s",
        "tokens_per_s",
        "rounds",
        "tokens_per_round",
        "acceptance_rate",
        "accepted_fraction",
    ),
    *("hit_rate", "distinct_4grams", "round_ms", "verify_ms", "draft_ms", "exposed_ms", "hidden"),
    *("speedup_ceiling", "bandwidth_fraction", "peak_memory_gb"),
)
NULL = {  # what does not apply in a mode
    "ar": "draft draft_device draft_quantize k fan_out cut fallback coupling acceptance_rate "
    "accepted_fraction hit_rate draft_ms exposed_ms hidden speedup_ceiling".split(),
    "sd": "fan_out cut fallback hit_rate hidden speedup_ceiling".split(),
    "ssd": [],
}
FLAG = {"ar": [], "sd": ["--sd"], "ssd": ["--ssd"]}
two_cores = pytest.mark.skipif(
    not {0, 1} <= set(runtime.available_cores()), reason="needs the CPU cores 0 and 1"
)


@pytest.fixture(autouse=True)
def small(demo, monkeypatch):
    """The default pair is the tiny one, the bandwidth is not measured, and no lane outlives its
    test.
    """
    lanes, start = [], runtime.Lane.__init__

    def kept(lane, *args, **more):
        lanes.append(lane)
        start(lane, *args, **more)

    monkeypatch.setattr(engine, "default_target", lambda: str(demo / "target"))
    monkeypatch.setattr(engine, "DEFAULT_DRAFT", str(demo / "draft"))
    monkeypatch.setattr(runtime, "read_bandwidth", lambda lane: 1e10)
    monkeypatch.setattr(runtime.Lane, "__init__", kept)
    yield
    for lane in lanes:
        lane.close()


@pytest.fixture
def program(monkeypatch, capsys):
    """program(*flags, stdin="") -> (exit code, stdout, stderr)"""

    class Stdin(io.TextIOWrapper):
        terminal = False

        def isatty(self):
            return self.terminal

    def run(*flags, stdin=None, terminal=False):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
        if stdin is not None:
            monkeypatch.setattr(
                sys, "stdin", Stdin(io.BytesIO(stdin.encode("utf-8", "surrogateescape")))
            )
            sys.stdin.terminal = terminal
        capsys.readouterr()
        code = generate.main()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def figures(program):
    """figures(*flags) -> the JSON object of a run that must succeed"""

    def run(*flags, **more):
        code, out, err = program(*flags, "--json", "-", **more)
        assert code == 0, err
        assert out.count("\n") == 1 and out.endswith("\n")
        return json.loads(out)

    return run


def text_of(said: tuple[int, str, str]) -> str:
    code, out, err = said
    assert code == 0, err
    return out


# ---- mistakes

MISTAKES = {
    # what is wrong: (flags, what the sentence must say)
    "no folder": (["--target", "./no/such"], "no folder './no/such'"),
    "empty target": (["--target", ""], "no folder ''"),
    "a file as target": (
        ["--target", __file__],
        "is a file but not a GGUF file, wanted one, or a folder",
    ),
    "folder without anything": (["--target", "EMPTY"], "no config.json"),
    "folder without weights": (
        ["--target", "BARE"],
        "no 'model.safetensors', wanted safetensors only",
    ),
    "unknown architecture": (
        ["--target", "FOREIGN"],
        "model_type = 'gpt2', wanted one of llama, mistral",
    ),
    "no draft": (["--target", "SCRIPTED", "--ssd"], "no --draft was given"),
    "ngram for SSD": (["--ssd", "--draft", "ngram"], "--draft is ngram, which only --sd can use"),
    "missing draft": (["--draft", "./no/such", "--sd"], "no folder './no/such'"),
    "inflate without shape": (["--target", "inflate:x"], "inflate:SHAPE:FOLDER"),
    "empty prompt": (["--prompt", ""], "prompt 1 is empty, wanted at least one character"),
    "one empty prompt of two": (["--prompt", "a", ""], "prompt 2 is empty"),
    "prompt without text": (["--prompt"], "--prompt: expected at least one argument"),
    "no such file": (["--prompt-file", "no/such.txt"], "no/such.txt cannot be read (No such file"),
    "folder as file": (["--prompt-file", "."], "cannot be read (Is a directory)"),
    "bytes in argv": (["--prompt", "caf\udce9"], "wanted UTF-8"),
    "two modes": (["--sd", "--ssd"], "--ssd: not allowed with argument --sd"),
    "two prompts": (["--prompt", "a", "--prompt-file", "x"], "not allowed with argument --prompt"),
    "chat and prompt": (["--prompt", "a", "--chat"], "not allowed with argument --prompt"),
    "chat and json": (
        ["--chat", "--json", "-"],
        "--chat was given with --compare, --json or --trace",
    ),
    "chat and compare": (
        ["--chat", "--compare"],
        "--chat was given with --compare, --json or --trace",
    ),
    "system and prompt": (["--prompt", "a", "--system", "b"], "wanted a chat: add --chat"),
    "thinking and prompt": (["--prompt", "a", "--no-thinking"], "wanted a chat: add --chat"),
    "chat and trace": (
        ["--chat", "--trace", "x"],
        "--chat was given with --compare, --json or --trace",
    ),
    "unknown flag": (["--temprature", "1"], "unrecognized arguments: --temprature 1"),
    "half a flag": (["--temp", "1"], "unrecognized arguments"),
    "stray words": (["def f(n):"], "unrecognized arguments: def f(n):"),
    "json into no folder": (
        ["--json", "no/such/x.json"],
        "no/such/x.json cannot be written, its folder does",
    ),
    "trace into no folder": (["--trace", "no/such/x.json"], "its folder does not exist"),
    "json into a folder": (["--json", "."], ". is a folder, wanted a file"),
    "json into nothing": (["--json", ""], "is a folder, wanted a file"),
    "out to stdout": (
        ["--prompt", "a", "--out", "-"],
        "--out - is no file, wanted one: only --json",
    ),
    "trace to stdout": (["--trace", "-"], "--trace - is no file, wanted one: only --json"),
    "out into a device": (["--prompt", "a", "--out", "/dev/null"], "is a pipe or a device"),
    "two in one file": (["--json", "x", "--trace", "./x"], "--json and --trace are both ./x"),
    "empty stop": (["--stop", ""], "stop is ('',), wanted texts of at least one character"),
    "saguaro alone": (["--ssd", "--saguaro-c", "0.5"], "use --coupling independent"),
    "fan-out of all": (
        ["--ssd", "--fan-out", SHAPE["vocab_size"]],
        "fan_out is 400, wanted less than the vocabulary",
    ),
    **{
        f"max-new-tokens {x}": (["--max-new-tokens", x], f"max_new_tokens is {x}, wanted")
        for x in (0, -5, 10**12)
    },
    **{
        f"max-new-tokens {x!r}": (["--max-new-tokens", x], f"got '{x}', wanted a whole")
        for x in ("x", "", "1.5")
    },
    **{
        f"temperature {x}": (["--temperature", x], "temperature is")
        for x in ("nan", "inf", "-1", "1e9")
    },
    **{f"top-p {x}": (["--top-p", x], "top_p is") for x in ("0", "2", "nan", "-0.1")},
    **{f"top-k {x}": (["--top-k", x], "top_k is") for x in (-1, 10**12)},
    **{
        f"k {x}": (["--sd", "--k", x], f"k is {x}, wanted a whole number from 1 to 64")
        for x in (0, -1, 1000)
    },
    **{
        f"fan-out {x}": (["--ssd", "--fan-out", x], f"fan_out is {x}, wanted")
        for x in (0, -1, 100000)
    },
    **{f"seed {x}": (["--seed", x], f"seed is {x}, wanted") for x in (-1, 2**64)},
    **{
        f"saguaro-c {x}": (["--saguaro-c", x, "--coupling", "independent"], "saguaro_c is")
        for x in ("0", "2", "nan")
    },
    "words for numbers": (["--temperature", "hot"], "--temperature: got 'hot', wanted a number"),
    "a word for k": (["--k", "x"], "--k: got 'x', wanted a whole number"),
    "a flood of digits": (["--seed", "9" * 5000], "wanted a whole number"),
    "coupling": (
        ["--coupling", "x"],
        "coupling is 'x', wanted one of shared, maximal, independent",
    ),
    "fallback": (["--fallback", "x"], "fallback is 'x', wanted one of auto, jit, fast"),
    "dtype": (["--dtype", "int8"], "dtype is 'int8', wanted one of float32"),
    "quantize": (["--quantize", "int2"], "quantize is 'int2', wanted one of none, int8, int4"),
    "draft_quantize": (
        ["--sd", "--draft-quantize", "x"],
        "draft_quantize is 'x', wanted one of none, int8, int4",
    ),
    **{
        f"device {x}": (["--device", x], f"device is '{x}', wanted cpu, cpu:CORES")
        for x in (
            "tpu",
            "cpu:0-",
            "cpu:-1",
            "cpu:",
            "cpu:x",
            "cpu:1-0",
            "cpu:0,",
            "CPU",
            "cuda:x",
            "cuda:",
            "",
        )
    },
    "cores we have not": (["--device", "cpu:0-4000"], "this process may run on cores"),
    "a far core": (["--device", "cpu:99999"], "this process may run on cores"),
    "a GPU we have not": (["--device", "cuda:77"], "device is 'cuda:77', but torch finds"),
    "a draft's GPU we have not": (
        ["--sd", "--draft-device", "cuda:77"],
        "device is 'cuda:77', but torch finds",
    ),
}


def check_mistake(said: tuple[int, str, str], must_say: str) -> None:
    code, out, err = said
    lines = [line for line in err.splitlines() if not line.startswith(("loaded in", "note: "))]
    assert code == 2, (out, err)
    assert out in ("", ASKED)
    assert len(lines) == 1 and lines[0].startswith("error: ") and must_say in lines[0], err
    assert len(lines[0]) < 500 and "Traceback" not in err


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_sentence(name, program, tmp_path, scripted):
    flags, must_say = MISTAKES[name]
    folders = {name: tmp_path / name for name in ("EMPTY", "BARE", "FOREIGN")} | {
        "SCRIPTED": scripted
    }
    for name, kind in (("EMPTY", None), ("BARE", "llama"), ("FOREIGN", "gpt2")):
        folders[name].mkdir()
        if kind:
            (folders[name] / "config.json").write_text(json.dumps(SHAPE | {"model_type": kind}))
    weights = (scripted / "model.safetensors").read_bytes()
    (folders["FOREIGN"] / "model.safetensors").write_bytes(weights)
    check_mistake(program(*(folders.get(flag, flag) for flag in flags)), must_say)


FILES = {
    "x.txt": (b"", "prompt 1 is empty"),
    "y.txt": (b"fine\xff", "y.txt is not UTF-8 at byte 4, wanted UTF-8 text"),
    "a.jsonl": (b'{"prompt": "a"}\n\nnonsense\n', "line 3 of"),
    "b.jsonl": (b'{"text": "a"}', "line 1 of"),
    "c.jsonl": (b'["prompt"]', 'is not a JSON object with a "prompt"'),
    "d.jsonl": (b'{"prompt": 5}', '"prompt" in line 1 of'),
    "e.jsonl": (b"\n \n", "holds no prompts"),
    "f.jsonl": (b'{"prompt": "\\ud800"}', "wanted UTF-8"),
    "g.jsonl": (b"[" * 100000, "line 1 of"),
    "h.jsonl": (b'{"prompt": ""}', "prompt 1 is empty"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_prompt_file_that_is_wrong(name, program, tmp_path):
    (tmp_path / name).write_bytes(FILES[name][0])
    check_mistake(program("--prompt-file", tmp_path / name), FILES[name][1])


def test_a_prompt_file_without_end(program, monkeypatch):
    monkeypatch.setattr(generate, "FILE_LIMIT", 1 << 20)
    check_mistake(program("--prompt-file", "/dev/zero"), "has more than 1 MiB")


def test_a_prompt_longer_than_the_context_names_both_lengths(program):
    said = program("--prompt", "☕" * 200)
    check_mistake(said, f"prompt 1 has 601 tokens, but the context of the target is {CONTEXT}")
    code, out, err = program("--prompt", "fine", "☕" * 200, "--max-new-tokens", 3)
    assert code == 1 and out.startswith("--- 1 ---\n") and "Traceback" not in err
    assert f"prompt 2 has 601 tokens, but the context of the target is {CONTEXT}" in err
    assert "1 of 2 prompts was refused: 2" in err


@pytest.mark.parametrize("mode", FLAG)
def test_a_kv_cache_that_does_not_fit_is_refused_before_it_is_allocated(mode, program, monkeypatch):
    monkeypatch.setattr(engine, "available_bytes", lambda device: 1000)
    check_mistake(program(*FLAG[mode]), "GB, but cpu has 0.00 GB free")


def test_a_checkpoint_without_tokenizer_or_chat_template(program, tmp_path, demo):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((demo / "target" / name).read_bytes())
    check_mistake(program("--target", tmp_path), "no tokenizer files")
    check_mistake(
        program("--target", tmp_path, "--chat", stdin="hi\n"),
        "no tokenizer files, which a chat needs",
    )
    (tmp_path / "tokenizer.model").write_bytes((demo / "target" / "tokenizer.model").read_bytes())
    check_mistake(program("--target", tmp_path, "--chat", stdin="hi\n"), "no chat template")


def test_stdin_of_a_chat_that_is_not_utf8(program):
    check_mistake(program("--chat", stdin="caf\udce9\n"), "a line of stdin is not UTF-8")


def test_a_disk_that_is_full(program, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    code, out, err = program("--max-new-tokens", 1, "--json", "/dev/full")
    assert code == 2 and "error: [Errno 28] No space left" in err and "Traceback" not in err
    flags = ["--max-new-tokens", 1, "--json", tmp_path / "x.json"]
    assert program(*flags, "--trace", "/dev/full")[0] == 2
    assert json.loads((tmp_path / "x.json").read_text())["new_tokens"] == [1]


def test_what_cannot_be_written_is_said_before_the_work(program, tmp_path, monkeypatch):
    (tmp_path / "there").touch()
    monkeypatch.setattr(os, "access", lambda path, how: False)  # root may write everywhere
    for flag in ("--json", "--trace"):
        for name in ("there", "new"):
            check_mistake(program(flag, tmp_path / name), "is read-only: name another file")


def test_a_device_that_fails_is_no_mistake_of_the_user(program, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore than there is")

    monkeypatch.setattr(steps.Runner, "verify", full)
    code, out, err = program("--prompt", "x")
    assert code == 1 and err.endswith("error: CUDA out of memory. Tried to allocate\n")


def fail_in(monkeypatch, run: int, error: BaseException) -> None:
    """In this run, counted from 1, the third round does not come to an end."""
    rounds, runs = ssd.Decoding.rounds, []

    def broken(decoding):
        runs.append(decoding)
        for number, _ in enumerate(rounds(decoding)):
            yield
            if number == 2 and len(runs) == run:
                raise error

    monkeypatch.setattr(ssd.Decoding, "rounds", broken)


def test_a_device_that_fails_leaves_the_text_and_the_figures_so_far(
    program, monkeypatch, scripted, tmp_path
):
    flags, file = ["--target", scripted, "--prompt", "x"], tmp_path / "x.json"
    fail_in(monkeypatch, 1, RuntimeError("the device is lost"))
    code, out, err = program(*flags, "--json", "-")
    text = json.loads(out)["text"][0]
    assert code == 1 and err.endswith("error: the device is lost\n") and SCRIPT.startswith(text)
    fail_in(monkeypatch, 1, RuntimeError("the device is lost"))
    code, out, err = program(*flags, "--json", file)
    assert code == 1 and out == text + "\n" and json.loads(file.read_text())["text"] == [text]


@pytest.mark.parametrize("error", (KeyboardInterrupt(), RuntimeError("the device is lost")))
def test_a_comparison_that_ends_early_shows_what_is_done(error, program, monkeypatch, tmp_path):
    fail_in(monkeypatch, 6, error)  # there are two runs of each mode
    file = tmp_path / "x.json"
    code, out, err = program("--compare", "--json", file)
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1) and "Traceback" not in err
    saved = json.loads(file.read_text())
    assert sorted(saved) == ["ar", "sd"] and saved["ar"]["text"][0] in out
    assert all(re.search(rf"^{mode}: \d+ tokens", out, re.M) for mode in ("ar", "sd"))


def test_a_comparison_with_a_refused_prompt(program):
    flags = ["--compare", "--prompt", "fine", "☕" * 200, "--max-new-tokens", 3]
    code, _, err = program(*flags)
    assert code == 1 and err.count("prompt 2 has 601 tokens") == 1
    assert "1 of 2 prompts was refused: 2" in err


@pytest.mark.parametrize(
    ("known", "says"),
    (
        ({"WORLD_SIZE": "2"}, "has no RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "has no LOCAL_WORLD_SIZE"),
        ({"RANK": "1"}, "has no WORLD_SIZE, LOCAL_RANK"),
    ),
)
def test_an_environment_that_names_ranks_in_part(known, says, program, monkeypatch):
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    check_mistake(program("--max-new-tokens", 1), says)


# ---- what is printed, and where


def test_help_names_every_flag_and_prints_no_nonsense(program, capsys):
    with pytest.raises(SystemExit) as end:
        program("--help")
    out = capsys.readouterr().out
    assert end.value.code == 0
    flags = [option for action in generate.parser()._actions for option in action.option_strings]
    assert all(flag in out for flag in flags) and "None" not in out and "SUPPRESS" not in out


@pytest.mark.parametrize("mode", FLAG)
def test_text_goes_to_stdout_and_figures_to_stderr(mode, program, scripted):
    code, out, err = program("--target", scripted, "--draft", scripted, *FLAG[mode])
    assert (code, out) == (0, ASKED + SCRIPT + "\n")
    assert f"{mode}: {SPOKEN + 1} tokens, " in err and "tokens/s" in err and "verify" in err


@pytest.mark.parametrize("mode", FLAG)
@pytest.mark.parametrize("prompts", (1, 3))
def test_the_json_object_has_the_keys_of_the_contract(mode, prompts, figures):
    chosen = [] if mode == "ar" else ["--k", 3, "--fan-out", 8][: 4 if mode == "ssd" else 2]
    texts = ["def f(n):", "x", "import os, sys"][:prompts]
    stats = figures(*FLAG[mode], *chosen, "--prompt", *texts, "--max-new-tokens", 40)
    assert sorted(stats) == sorted(KEYS)
    assert [key for key in KEYS if stats[key] is None] == [key for key in KEYS if key in NULL[mode]]
    assert stats["mode"] == mode and stats["prompts"] == prompts and stats["dtype"] == "float32"
    assert stats["new_tokens"] == list(map(len, stats["token_ids"]))
    lists = ("prompt_tokens", "new_tokens", "token_ids", "text", "finish_reason")
    assert all(len(stats[key]) == prompts for key in lists)
    assert stats["tokens_per_s"] == pytest.approx(
        (sum(stats["new_tokens"]) - prompts) / stats["decode_s"]
    )
    assert stats["rounds"] > 0 and stats["prefill_s"] > 0 and 0 < stats["distinct_4grams"] <= 1


def test_json_into_a_file_comes_beside_the_text(program, tmp_path, scripted):
    assert (
        text_of(program("--target", scripted, "--json", tmp_path / "x.json"))
        == ASKED + SCRIPT + "\n"
    )
    stats = json.loads((tmp_path / "x.json").read_text())
    assert stats["text"] == [SCRIPT] and stats["target"] == str(scripted)


def test_a_comparison_of_one_token_has_no_rates_to_divide(figures):
    compared = figures("--compare", "--max-new-tokens", 1)
    assert compared["same_text"] and compared["ssd"]["over_sd"] is None


def test_flags_that_do_nothing_are_named(program):
    code, _, err = program("--k", 3, "--draft", "x", "--no-cut", "--seed", 4, "--max-new-tokens", 2)
    assert code == 0
    assert "note: in mode ar at temperature 0, --draft, --k, --cut, --seed changes nothing" in err
    _, _, err = program("--sd", "--k", 3, "--seed", 4, "--temperature", 1, "--max-new-tokens", 2)
    assert "note:" not in err
    flags = ("--draft-quantize", "int8", "--coupling", "maximal", "--batch-halves", "on")
    _, _, err = program("--sd", "--draft", "ngram", *flags, "--max-new-tokens", 2)
    idle = "--coupling, --draft-quantize, --batch-halves"
    assert f"note: in mode sd at temperature 0, {idle} changes nothing" in err
    flags = ("--batch-halves", "on", "--max-new-tokens", 2)
    for more in (("--draft", "ngram"), ("--batch", 1)):
        _, _, err = program("--sd", "--prompt", "a", "b", *more, *flags)
        assert "--batch-halves changes nothing" in err
    assert "--batch-halves" not in program("--sd", "--prompt", "a", "b", *flags)[2]


# ---- texts


@pytest.mark.parametrize("temperature", (0, 0.8))
def test_every_mode_and_setting_gives_the_same_text(temperature, figures):
    flags = [
        "--prompt",
        "def f(n):",
        "for",
        "--temperature",
        temperature,
        "--seed",
        3,
        "--max-new-tokens",
        24,
    ]
    plain = figures(*flags)
    for more in (
        ["--sd"],
        ["--sd", "--k", 1],
        ["--sd", "--k", 7],
        ["--ssd"],
        ["--ssd", "--k", 2, "--fan-out", 3],
        ["--ssd", "--fan-out", 64],
        ["--ssd", "--no-cut"],
        ["--ssd", "--fallback", "jit"],
        ["--ssd", "--fallback", "fast"],
        ["--ssd", "--k", 3, "--fan-out", 8],
    ):
        other = figures(*flags, *more)
        assert other["token_ids"] == plain["token_ids"], more
        assert other["text"] == plain["text"] and other["finish_reason"] == plain["finish_reason"]
        wanted = dict(zip(more[1::2], more[2::2])) if "--no-cut" not in more else {}
        assert all(other[flag[2:].replace("-", "_")] == value for flag, value in wanted.items())
        assert other["cut"] is ("--no-cut" not in more if other["mode"] == "ssd" else None)
    assert other["acceptance_rate"] > 0.2 and other["hit_rate"] > 0.2


def test_auto_may_be_asked_for_by_name(figures):
    """A word of a command line is another object than the default."""
    auto = "".join(["au", "to"])
    words = ["--ssd", "--k", auto, "--fan-out", auto, "--fallback", auto, "--max-new-tokens", 9]
    assert figures(*words)["new_tokens"] == [9]


def test_a_draft_without_a_model(figures):
    plain = figures("--max-new-tokens", 40)
    stats = figures("--max-new-tokens", 40, "--sd", "--draft", "ngram")
    assert stats["token_ids"] == plain["token_ids"]
    assert (stats["draft"], stats["draft_device"]) == ("ngram", None)


@pytest.mark.parametrize("coupling", ("maximal", "independent"))
@pytest.mark.parametrize("mode", ("sd", "ssd"))
def test_other_couplings_run_and_are_greedy_at_temperature_0(mode, coupling, figures):
    flags = [*FLAG[mode], "--coupling", coupling, "--max-new-tokens", 24]
    plain = figures("--max-new-tokens", 24)
    assert figures(*flags)["token_ids"] == plain["token_ids"]
    flags += ["--k", 3]  # the draw depends on K, and what --k auto chooses on the clock
    sampled = [
        figures(*flags, "--temperature", 1, "--seed", seed)["token_ids"] for seed in (1, 1, 2)
    ]
    assert sampled[0] != sampled[2]
    assert sampled[0] == sampled[1] or mode == "ssd"  # so it does on where a chain is cut
    if coupling == "independent":
        assert figures(*flags, "--temperature", 1, "--saguaro-c", 0.3)["new_tokens"] == [24]


def test_sampling_flags(figures):
    flags = ["--max-new-tokens", 24, "--temperature", 1]
    greedy = figures("--max-new-tokens", 24)["token_ids"]
    sampled = figures(*flags)["token_ids"]
    assert sampled != greedy
    assert (
        figures(*flags)["token_ids"] == sampled != figures(*flags, "--seed", 2**64 - 1)["token_ids"]
    )
    assert (
        figures(*flags, "--top-k", 1)["token_ids"]
        == greedy
        == figures(*flags, "--top-p", 1e-9)["token_ids"]
    )
    assert figures(*flags, "--top-k", 400, "--top-p", 1)["token_ids"] == sampled
    assert figures("--max-new-tokens", 24, "--seed", 5)["token_ids"] == greedy


@pytest.mark.parametrize("mode", FLAG)
def test_ends_of_a_text(mode, figures, scripted):
    flags = ["--target", scripted, "--draft", scripted, *FLAG[mode]]
    whole = figures(*flags)
    assert (whole["finish_reason"], whole["text"]) == (["eos"], [SCRIPT])
    assert whole["token_ids"][0][-1] == SHAPE["eos_token_id"] and whole["new_tokens"] == [
        SPOKEN + 1
    ]
    for n in (1, 2, 5):
        short = figures(*flags, "--max-new-tokens", n)
        assert (short["finish_reason"], short["new_tokens"]) == (["length"], [n])
        assert short["token_ids"][0] == whole["token_ids"][0][:n]
    on = figures(*flags, "--ignore-eos", "--max-new-tokens", 20)
    assert (on["finish_reason"], on["text"]) == (["length"], [SCRIPT * 2])
    full = figures(*flags, "--ignore-eos", "--max-new-tokens", 10000)
    assert full["finish_reason"] == ["context"]
    assert full["prompt_tokens"][0] + full["new_tokens"][0] == CONTEXT
    if mode != "ar":  # a draft that is the target: every token of every proposal is right
        assert on["acceptance_rate"] == 1


@pytest.mark.parametrize("mode", FLAG)
@pytest.mark.parametrize(
    ("stops", "left"),
    (
        (["fé"], "return ca"),  # spans two tokens, ends in the middle of a character's bytes
        (["n c"], "retur"),
        (["☕", "caf"], "return "),
        (["r"], ""),
        # A beginning that never becomes the whole comes out at the end.
        (["line\n", "☕ lines", "nothing"], SCRIPT),
    ),
)
def test_a_stop_text_is_never_printed(mode, stops, left, program, figures, scripted):
    flags = ["--target", scripted, "--draft", scripted, *FLAG[mode], "--stop", *stops]
    assert text_of(program(*flags)) == ASKED + left + "\n"
    stats = figures(*flags)
    assert stats["text"] == [left]
    assert stats["finish_reason"] == ["eos" if left == SCRIPT else "stop"]


def test_flags_with_lists_can_be_repeated(figures, scripted):
    stats = figures(
        "--target", scripted, "--prompt", "a", "--prompt", "b", "c", "--stop", "☕", "--stop", "fé"
    )
    assert stats["text"] == ["return ca"] * 3


def test_a_batch_prints_every_prompt_and_each_text_is_its_own(program, figures):
    prompts = ["def f(n):", "import os, sys", "x"]
    alone = [figures("--prompt", prompt, "--max-new-tokens", 12)["text"][0] for prompt in prompts]
    stats = figures("--prompt", *prompts, "--max-new-tokens", 12)
    assert stats["text"] == alone and stats["prompts"] == 3
    out = text_of(program("--prompt", *prompts, "--max-new-tokens", 12))
    assert out == "".join(f"--- {n} ---\n{text}\n" for n, text in enumerate(alone, 1))
    same = figures("--prompt", "x", "x", "--max-new-tokens", 12, "--temperature", 1)["token_ids"]
    assert same[0] != same[1]


def test_prompt_files(figures, tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffdef f(n):\n    return".encode())
    (tmp_path / "b.jsonl").write_bytes(
        '{"prompt": "import\u2028os", "id": 1}\r\n\r\n{"prompt": "x"}'.encode()
    )
    text = figures("--prompt-file", tmp_path / "a.txt", "--max-new-tokens", 9)
    assert (
        text["token_ids"]
        == figures("--prompt", "def f(n):\n    return", "--max-new-tokens", 9)["token_ids"]
    )
    lines = figures("--prompt-file", tmp_path / "b.jsonl", "--max-new-tokens", 9)
    assert (
        lines["token_ids"]
        == figures("--prompt", "import\u2028os", "x", "--max-new-tokens", 9)["token_ids"]
    )


def test_the_program_starts_without_torch():
    """torch takes a second to import; Ctrl-C in that second must meet main()."""
    code = "import sys, generate; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROGRAM.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr or "generate.py imports torch before main() runs"


def test_a_prompt_that_begins_with_a_dash(figures):
    assert figures("--prompt=-1", "--max-new-tokens", 1)["prompt_tokens"] == [3]


@pytest.mark.parametrize("mode", FLAG)
def test_dtypes(mode, figures):
    texts = {}
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        stats = figures(*FLAG[mode], "--dtype", dtype, "--max-new-tokens", 6)
        assert stats["dtype"] == dtype and stats["new_tokens"] == [6]
        texts[dtype] = stats["token_ids"]
    assert texts["float32"] == texts["float64"]


@pytest.mark.parametrize("bits", ["none", "int8", "int4"])
def test_weights_of_few_bits(bits, figures):
    """In the target and in the draft: every mode prints the text of plain decoding."""
    flags = ["--quantize", bits, "--max-new-tokens", 12]
    plain = figures(*flags)
    assert plain["quantize"] == bits and plain["dtype"] == "float32"
    for mode in ("sd", "ssd"):
        for few in ("none", "int8", "int4"):
            stats = figures(*FLAG[mode], *flags, "--draft-quantize", few)
            assert stats["token_ids"] == plain["token_ids"]
            assert stats["quantize"] == bits and stats["draft_quantize"] == few
    assert figures(*flags, "--dtype", "float64")["dtype"] == "float64"


@two_cores
def test_devices(figures):
    places = {
        ("--device", "cpu"): ("cpu", "cpu"),
        ("--device", "cpu:0"): ("cpu:0", "cpu:0"),
        ("--device", "cpu:0-1"): ("cpu:0-1", "cpu:0-1"),
        ("--device", "cpu:1", "--draft-device", "cpu:0"): ("cpu:1", "cpu:0"),
        ("--device", "cpu:0", "--draft-device", "cpu:0"): ("cpu:0", "cpu:0"),
        ("--draft-device", "cpu:1"): (None, "cpu:1"),
    }
    text = figures("--max-new-tokens", 10)["token_ids"]
    for flags, (target, draft) in places.items():
        for mode in ("sd", "ssd"):
            stats = figures(*FLAG[mode], *flags, "--max-new-tokens", 10)
            assert stats["device"] == target or target is None
            assert (stats["draft_device"], stats["token_ids"]) == (draft, text)


# ---- streams


def test_text_streams_and_a_piece_is_never_half_a_character(scripted, demo):
    loaded = load(str(scripted))
    pieces = list(loaded.stream("x"))
    assert len(pieces) > 3 and "".join(pieces) == SCRIPT
    assert all("\ufffd" not in piece for piece in pieces)
    assert list(loaded.stream("x", stop=("é",))) == ["return", " caf"]
    noise = load(str(demo / "target"))
    for seed in range(3):
        settings = {"temperature": 1.0, "seed": seed, "max_new_tokens": 60}
        assert "".join(noise.stream("x", **settings)) == noise.generate(["x"], **settings).text[0]


def test_a_character_that_is_never_completed_shows_once_at_the_end(figures, scripted):
    assert figures("--target", scripted, "--max-new-tokens", 3)["text"] == ["return caf\ufffd"]
    assert figures("--target", scripted, "--max-new-tokens", 7)["text"] == ["return café \ufffd"]


# ---- chat


@pytest.mark.parametrize("mode", FLAG)
def test_a_chat_keeps_what_earlier_turns_have_read(mode, program, scripted, monkeypatch):
    read, prefill = [], steps.Runner.prefill

    def spy(self, ids, start):
        read.extend([(len(ids[0]), start[0])] if ids[0] else [])
        return prefill(self, ids, start)

    monkeypatch.setattr(steps.Runner, "prefill", spy)
    flags = ["--target", scripted, "--draft", scripted, *FLAG[mode], "--chat", "--k", 3]
    flags += ["--fan-out", 8] if mode == "ssd" else []
    long = "import os, sys, " * 8
    code, out, err = program(*flags, stdin=f"{long}\n\nand?\nwell\n")
    assert code == 0, err
    assert out == (SCRIPT + "\n") * 3 and err.count("tokens/s") == 3
    models = 1 if mode == "ar" else 2
    turns = [sum(turn) for turn in read[::models]]  # tokens read by the end of each turn's prefill
    assert len(read) == 3 * models and turns[0] < turns[1] < turns[2]
    for count, start in read[models:]:
        # The new line and the answer's last tokens, not the long first turn.
        assert 0 < count < 30 and start > 50


def test_a_chat_gives_the_text_that_a_fresh_start_gives(program, demo):
    loaded = load(str(demo / "target"))
    messages, answers = [], []
    for said in ("import", "def f(n):"):
        messages.append({"role": "user", "content": said})
        ids = loaded.tokenizer.encode_chat(messages)
        answers.append(loaded.generate([ids], max_new_tokens=12).text[0])
        messages.append({"role": "assistant", "content": answers[-1]})
    out = text_of(program("--chat", "--max-new-tokens", 12, stdin="import\ndef f(n):\n"))
    assert out == "".join(answer + "\n" for answer in answers)


def test_a_chat_that_outgrows_the_context(program):
    code, out, err = program("--chat", "--max-new-tokens", 1, stdin="a\n" + "☕" * 120 + "\n")
    assert code == 2 and out.count("\n") == 1
    assert f"but the context of the target is {CONTEXT}" in err and "Traceback" not in err


def test_the_system_prompt_and_thinking_reach_the_template(program, monkeypatch, scripted):
    """Both are told for the turns of a chat, and for the built-in question."""
    asked = []

    def spy(self, messages, thinking=None):
        asked.append((messages, thinking))
        return [1, 2, 3]

    monkeypatch.setattr(Tokenizer, "encode_chat", spy)
    flags = ["--target", scripted, "--max-new-tokens", 1]
    for more, thinking in (([], None), (["--thinking"], True), (["--no-thinking"], False)):
        assert program(*flags, "--chat", "--system", "Be brief.", *more, stdin="hi\n")[0] == 0
        first = {"role": "system", "content": "Be brief."}
        assert asked[-1] == ([first, {"role": "user", "content": "hi"}], thinking)
    assert program(*flags, "--system", "Be brief.", "--no-thinking")[0] == 0
    assert asked[-1] == ([first, {"role": "user", "content": generate.QUESTION}], False)
    assert program(*flags, "--system", "")[0] == 0  # not the model's own, which none would mean
    assert asked[-1][0][0] == {"role": "system", "content": ""}


def test_a_prompt_is_completed_as_it_is_and_a_question_is_asked(figures, demo):
    """--prompt is plain completion; without it the chat template wraps the built-in question."""
    known = load(str(demo / "target")).tokenizer
    plain, asked = figures("--prompt", generate.QUESTION), figures()
    question = known.encode_chat([{"role": "user", "content": generate.QUESTION}])
    assert plain["prompt_tokens"] == [len(known.encode(generate.QUESTION))]
    assert asked["prompt_tokens"] == [len(question)] and asked["target"] == str(demo / "target")


# ---- Ctrl-C


@pytest.mark.parametrize("mode", FLAG)
def test_ctrl_c_prints_what_there_is(mode, program, scripted, monkeypatch):
    rounds = ssd.Decoding.rounds

    def interrupted(decoding):
        for number, _ in enumerate(rounds(decoding)):
            yield
            if number == 1:
                raise KeyboardInterrupt

    flags = ["--target", scripted, "--draft", scripted, *FLAG[mode], "--ignore-eos"]
    monkeypatch.setattr(ssd.Decoding, "rounds", interrupted)
    code, out, err = program(*flags)
    assert (
        code == 130
        and out.startswith(ASKED + "return")
        and out.endswith("\n")
        and "Traceback" not in err
    )
    code, out, err = program(*flags, "--json", "-")
    stats = json.loads(out)
    assert (
        code == 130 and stats["finish_reason"] == [None] and stats["text"][0].startswith("return")
    )


@pytest.mark.parametrize("where", ("load", "start", "prefill"))
def test_ctrl_c_before_the_first_token(where, program, monkeypatch):
    def interrupt(*args, **more):
        raise KeyboardInterrupt

    owner = {"load": engine, "start": engine.Engine, "prefill": ssd.Decoding}[where]
    monkeypatch.setattr(owner, where, interrupt)
    code, out, err = program("--ssd")
    assert code == 130 and out.strip() in ("", ASKED.strip()) and "Traceback" not in err


def test_ctrl_c_in_a_chat_ends_the_answer_and_on_a_terminal_not_the_chat(
    program, scripted, monkeypatch
):
    rounds, calls = ssd.Decoding.rounds, []

    def interrupted(decoding):
        calls.append(decoding)
        for number, _ in enumerate(rounds(decoding)):
            yield
            if number == 1 and len(calls) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(ssd.Decoding, "rounds", interrupted)
    code, out, err = program("--target", scripted, "--chat", stdin="a\nb\n")
    assert (code, len(calls)) == (130, 1) and SCRIPT.startswith(out.strip()) and out.strip()
    calls.clear()
    code, out, err = program("--target", scripted, "--chat", stdin="a\nb\n", terminal=True)
    assert code == 0 and len(calls) == 2 and out.endswith(SCRIPT + "\n> ")


def test_ctrl_c_while_a_chat_reads_leaves_no_half_read_text_behind(program, demo, monkeypatch):
    prefill, calls = ssd.Decoding.prefill, []

    def interrupted(decoding):
        calls.append(decoding)
        if len(calls) == 1:
            raise KeyboardInterrupt
        prefill(decoding)

    loaded = load(str(demo / "target"))
    messages = [{"role": "user", "content": "import"}, {"role": "assistant", "content": ""}]
    ids = loaded.tokenizer.encode_chat([*messages, {"role": "user", "content": "def f(n):"}])
    answer = loaded.generate([ids], max_new_tokens=12).text[0]
    monkeypatch.setattr(ssd.Decoding, "prefill", interrupted)
    said = program("--chat", "--max-new-tokens", 12, stdin="import\ndef f(n):\n", terminal=True)
    assert text_of(said) == f"> \n> {answer}\n> "


# ---- the Python contract


@two_cores
def test_the_python_contract(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    text = (PROGRAM.parent / "README.md").read_text()
    contract = next(
        code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "engine.stream" in code
    )
    scope = {}
    exec(contract, scope)
    result, used = scope["result"], scope["engine"]
    assert [len(ids) for ids in result.token_ids] == [128, 128] or result.finish_reason != [
        "length"
    ] * 2
    assert capsys.readouterr().out == used.generate(["def fib(n):"], mode="ssd").text[0]
    assert sorted(result.stats) == sorted(KEYS) and result.stats["temperature"] == [1.0, 0.0]
    json.dumps(result.stats)


def test_settings_per_row(demo):
    loaded = load(str(demo / "target"), draft=str(demo / "draft"))
    prompts, each = (
        [[1, 17, 4], [1, 9], [1, 9]],
        {"temperature": [1.0, 0.0, 1.0], "seed": [7, 8, 9]},
    )
    each |= {"max_new_tokens": [5, 12, 9], "top_k": [0, 5, 1], "top_p": [1, 0.5, 0.9]}
    for mode in ("ar", "sd", "ssd"):
        result = loaded.generate(prompts, mode=mode, **each)
        assert list(map(len, result.token_ids)) == [5, 12, 9]
        for b, prompt in enumerate(prompts):  # a list of seeds: a row's text is the same alone
            alone = loaded.generate(
                [prompt], mode=mode, **{name: [values[b]] for name, values in each.items()}
            )
            assert alone.token_ids[0] == result.token_ids[b]
    assert result.token_ids[1][:9] == result.token_ids[2]  # top-k 1 is greedy


def test_wrong_values_in_python_raise_the_terminals_sentence(demo):
    loaded = load(str(demo / "target"))
    for prompts, settings, says in (
        ("a text", {}, "got a str to complete, wanted a list with at least one prompt"),
        ([], {}, "got no prompts to complete, wanted a list with at least one prompt"),
        (["x"], {"temprature": 1.0}, "there is no setting 'temprature': did you mean temperature?"),
        (
            ["x"],
            {"max_tokens": 9},
            "there is no setting 'max_tokens': did you mean max_new_tokens?",
        ),
        (["x"], {"qqq": 9}, "there is no setting 'qqq': use one of mode, max_new_tokens, "),
        ([""], {}, "prompt 1 is empty"),
        ([[]], {}, "prompt 1 is []"),
        ([[1, 400]], {}, "prompt 1 holds 400, wanted token ids from 0 to 399"),
        ([[1, -1]], {}, "prompt 1 holds -1"),
        ([[1, 2.5]], {}, "prompt 1 holds 2.5"),
        ([None], {}, "prompt 1 is None"),
        (["x"], {"mode": "fast"}, "mode is 'fast', wanted one of ar, sd, ssd"),
        (["x"], {"mode": "sd"}, "mode sd needs a draft"),
        (["x"], {"temperature": [1.0, 2.0]}, "temperature has 2 values for 1 prompts"),
        (["x"], {"temperature": float("nan")}, "temperature is nan"),
        (["x"], {"k": True}, "k is True"),
        (["x"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (["x"], {"stop": ["", "a"]}, "wanted texts of at least one character"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            loaded.generate(prompts, **settings)


# ---- the process itself


def start(root: Path, *flags, **more) -> subprocess.Popen:
    demo = root / "assets" / "demo"
    return subprocess.Popen(
        [
            sys.executable,
            PROGRAM,
            "--target",
            demo / "target",
            "--draft",
            demo / "draft",
            *map(str, flags),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=root,
        **more,
    )


HIDE = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in ("auto", "halves"):
            raise ModuleNotFoundError(f"{name}.py was deleted")

sys.meta_path.insert(0, Hide())
import generate

flags = sys.argv[1:]
sys.argv[1:] = [*flags, "--k", "4", "--fan-out", "16"]
assert generate.main() == 0
sys.argv[1:] = flags
generate.main()
"""


def test_the_planner_and_halves_can_be_deleted(demo):
    """They are not part of the method: with --k and --fan-out nothing asks for auto.py, and nothing
    for halves.py without --batch-halves.
    """
    flags = ["--ssd", "--target", demo / "target", "--draft", demo / "draft", "--prompt", "x"]
    words = [sys.executable, "-c", HIDE, *flags, "--max-new-tokens", "6"]
    run = subprocess.run(words, cwd=PROGRAM.parent, capture_output=True, text=True)
    assert run.returncode == 1 and "auto.py was deleted" in run.stderr, run.stderr
    assert "| K 4 | M 16 |" in run.stderr, "with both given it ran"


def test_a_real_run_and_a_real_mistake(root):
    run = start(root, "--ssd", "--json", "-", "--max-new-tokens", 8)
    mistake = start(root, "--prompt", b"caf\xe9".decode("utf-8", "surrogateescape"))
    out, err = run.communicate(timeout=100)
    assert run.returncode == 0, err
    assert json.loads(out)["new_tokens"] == [8] and b"tokens/s" in err and b"Warning" not in err
    out, err = mistake.communicate(timeout=100)
    assert (
        (mistake.returncode, out) == (2, b"") and b"wanted UTF-8" in err and b"Traceback" not in err
    )


def test_ctrl_c_of_a_real_run(root):
    run = start(root, "--ssd", "--ignore-eos", "--prompt", "x")
    loading = start(root)
    deadline, maps = time.monotonic() + 60, Path(f"/proc/{loading.pid}/maps")
    while maps.exists() and "libtorch" not in maps.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    loading.send_signal(signal.SIGINT)  # while torch is imported
    first = run.stdout.read(1)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=100)
    assert run.returncode == 130 and b"Traceback" not in err, err
    whole = (
        load(str(root / "assets" / "demo" / "target"))
        .generate(["x"], ignore_eos=True)
        .text[0]
        .encode()
    )
    assert whole.startswith((first + out)[:-1].rstrip(b"\xef\xbf\xbd")) and len(out) < len(whole)
    out, err = loading.communicate(timeout=100)
    assert (loading.returncode, out, err) == (130, b"", b"")


PRINTS = """
import sys, generate

def run(args):
    sys.stdin.read()
    print("a text")
    print("figures", file=sys.stderr)
    return 0

generate.run = run
sys.exit(generate.main())
"""


@pytest.mark.parametrize("closed", ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"))
def test_streams_that_are_closed(closed):
    words = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, PRINTS]
    run = subprocess.run(words, cwd=PROGRAM.parent, stdin=subprocess.DEVNULL, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == (b"" if " >&-" in " " + closed else b"a text\n")
    assert run.stderr == (b"" if "2>&-" in closed else b"figures\n")


@pytest.mark.parametrize("stderr", (subprocess.PIPE, subprocess.STDOUT))
def test_a_reader_that_is_gone_before_a_text_that_is_not_flushed(stderr):
    words, pipe = [sys.executable, "-c", PRINTS], subprocess.PIPE
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    how = {"cwd": PROGRAM.parent, "env": buffered}
    run = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=stderr, **how)
    run.stdout.close()
    run.stdin.close()
    err = run.stderr.read() if run.stderr else b""
    assert run.wait(timeout=100) == 141 and err in (b"", b"figures\n")


def test_a_reader_that_leaves_early_is_no_error(root):
    run = start(root, "--ignore-eos")
    run.stdout.read(1)
    run.stdout.close()
    err = run.stderr.read()
    assert run.wait(timeout=100) == 141 and b"Traceback" not in err and b"Error" not in err


# ---- many prompts, and a file of their texts


def many(folder: Path, count: int) -> tuple[Path, list[str]]:
    texts = [f"def f{n}(x): return {n}"[: 9 + n % 9] for n in range(count)]
    (folder / "in.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    return folder / "in.jsonl", texts


@pytest.mark.parametrize("mode", FLAG)
def test_texts_go_to_a_file_and_what_is_there_is_not_made_again(mode, program, tmp_path):
    asked, prompts = many(tmp_path, 9)
    out = tmp_path / "out.jsonl"
    flags = [*FLAG[mode], "--prompt-file", asked, "--max-new-tokens", 7, "--temperature", 1]
    whole = json.loads(program(*flags, "--json", "-")[1])
    assert program(*flags, "--batch", 2, "--out", out)[:2] == (0, "")
    lines = out.read_text().splitlines(keepends=True)
    rows = {row["number"] - 1: row for row in map(json.loads, lines)}
    assert [rows[n]["token_ids"] for n in range(9)] == whole["token_ids"]
    assert [rows[n]["text"] for n in range(9)] == whole["text"]
    assert [rows[n]["prompt"] for n in range(9)] == prompts
    out.write_text("".join(lines[:4]) + lines[4][:20])  # as a kill may leave it
    code, _, err = program(*flags, "--batch", 3, "--out", out)
    assert code == 0 and "holds 4 of 9 texts" in err
    assert sorted(out.read_text().splitlines()) == sorted("".join(lines).splitlines())
    code, _, err = program(*flags, "--out", out, "--json", tmp_path / "x.json")
    assert code == 0 and "nothing is left to do, so there are no figures" in err
    check_mistake(program(*flags, "--out", out, "--max-new-tokens", 3), "line 1 of")
    check_mistake(program(*flags, "--out", out, "--seed", 1), "line 1 of")
    check_mistake(program("--prompt", "x", "--out", out), "line 1 of")
    wrong = tmp_path / "wrong.jsonl"
    check_mistake(program("--prompt", "x", "--out", wrong, "--temperature", -1), "temperature")
    assert not wrong.exists(), "a mistake leaves no file"


def test_weights_of_other_numbers_do_not_write_to_the_same_file(program, tmp_path):
    """The same flags may choose others on another machine."""
    asked, _ = many(tmp_path, 2)
    out = tmp_path / "out.jsonl"
    flags = ["--prompt-file", asked, "--max-new-tokens", 2, "--out", out]
    assert program(*flags)[0] == 0
    first = out.read_text().splitlines(keepends=True)[0]
    out.write_text(first.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    code, _, err = program(*flags)
    assert code == 2 and "error:" in err
    assert "holds texts of weights in bfloat16 and none, but these are in float32 and none" in err
    assert program(*flags, "--dtype", "float64")[0] == 2
    out.write_text(first)
    assert program(*flags, "--dtype", "float32")[0] == 0, "the same, said and not chosen"


HELD = (b'{"traceEvents": []}', b"my notes", b'{"prompt": "a"}', b"[" * 100_000 + b"\n")


def test_ctrl_c_while_a_line_is_made_loses_no_row(program, tmp_path, monkeypatch):
    dumps, hit = json.dumps, []

    def interrupted(told, **how):
        if "finish_reason" in told and not hit:
            hit.append(told)
            raise KeyboardInterrupt
        return dumps(told, **how)

    monkeypatch.setattr(json, "dumps", interrupted)
    out = tmp_path / "out.jsonl"
    assert program("--prompt", "a", "b", "--max-new-tokens", 3, "--out", out)[0] == 130 and hit
    assert sorted(json.loads(line)["number"] for line in out.read_text().splitlines()) == [1, 2]


def test_ctrl_c_while_figures_are_made_loses_no_text(program, monkeypatch):
    def interrupted(self, decoding):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.Engine, "finish", interrupted)
    code, out, _ = program("--prompt", "a", "b", "--max-new-tokens", 3)
    assert code == 130 and "--- 1 ---" in out and "--- 2 ---" in out


def test_ctrl_c_while_figures_are_made_loses_no_figure(program, monkeypatch, tmp_path):
    """Once: what is pressed again ends the program."""
    finish, times = engine.Engine.finish, []

    def interrupted(self, decoding):
        times.append(1)
        result = finish(self, decoding)
        if len(times) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(engine.Engine, "finish", interrupted)
    file = tmp_path / "x.json"
    assert program("--prompt", "a", "--max-new-tokens", 3, "--json", file)[0] == 130
    assert json.loads(file.read_text())["new_tokens"] == [3]


@pytest.mark.parametrize("held", HELD)
def test_a_file_of_something_else_is_left_as_it_is(held, program, tmp_path):
    """It has no newline, and so looks like the part of a line that a killed program leaves."""
    file = tmp_path / "file"
    file.write_bytes(held)
    check_mistake(program("--prompt", "a", "--out", file), "line 1 of")
    check_mistake(program("--prompt-file", file, "--out", file), "--prompt-file and --out are both")
    assert file.read_bytes() == held


def test_texts_do_not_go_into_a_pipe(program, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    check_mistake(program("--prompt", "a", "--out", tmp_path / "pipe"), "is a pipe or a device")


def test_two_runs_do_not_write_to_one_file(program, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    flags = ["--prompt", "a", "--max-new-tokens", 2, "--out", tmp_path / "out.jsonl"]
    with (tmp_path / "out.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        check_mistake(program(*flags), "another run writes to")
    assert program(*flags)[0] == 0


def test_ranks_do_not_wait_for_one_that_has_nothing_to_do(program, tmp_path, monkeypatch):
    flags, loaded = ["--prompt", "a", "--max-new-tokens", 2, "--out", tmp_path / "x"], []
    assert program(*flags)[0] == 0
    known = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (known | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(generate, "load_pair", lambda args, mode: loaded.append(mode))
    assert program(*flags)[0] == 0 and loaded == ["ar"]


def test_a_program_that_is_killed_loses_no_row_and_makes_none_twice(demo, tmp_path):
    asked, prompts = many(tmp_path, 60)
    out = tmp_path / "out.jsonl"
    command = [sys.executable, generate.__file__, "--target", demo / "target", "--prompt-file"]
    command += [asked, "--batch", "3", "--max-new-tokens", "30", "--out", out]
    first = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    while not out.exists() or out.read_bytes().count(b"\n") < 10:
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    first.kill()
    first.wait()
    assert out.read_bytes().count(b"\n") < 60
    assert subprocess.run(list(map(str, command)), stderr=subprocess.DEVNULL).returncode == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["number"] for row in rows) == list(range(1, 61))
    assert all(row["prompt"] == prompts[row["number"] - 1] for row in rows)


def test_a_bar_shows_rows_and_speed_on_a_terminal_only(program, tmp_path, monkeypatch):
    asked, _ = many(tmp_path, 4)
    flags = ["--prompt-file", asked, "--max-new-tokens", 3]
    assert "row" not in program(*flags)[2].replace("rows of", "")
    monkeypatch.setattr(sys.stderr.__class__, "isatty", lambda self: True, raising=False)
    err = program(*flags)[2]
    assert "/4 [" in err and "tokens/s" in err
    assert "/4 [" not in program(*flags, "--json", "-")[2]
