"""What a stranger meets first: the README's commands, packaging, CI, and the rules that the files keep."""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from test_generate import KEYS

import generate
import runtime

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
if sys.version_info >= (3, 11):
    import tomllib

    PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


COMMANDS = [line for block in fenced("bash") for line in block.splitlines()]
PROGRAM = [line for line in COMMANDS if line.startswith("python generate.py")]


# ---- the README's commands


@pytest.mark.parametrize("command", PROGRAM)
def test_a_command_of_the_readme_runs(command, monkeypatch, tmp_path, capsys):
    """With few tokens. Commands that name a hub's model or a GPU are only read, here is neither."""
    words = [word.replace("/tmp/", f"{tmp_path}/") for word in shlex.split(command, comments=True)[2:]]
    args = generate.parser().parse_args(words)
    if "cuda" in command or not str(args.target).startswith((str(ROOT), "inflate:")):
        return
    cores = set(map(int, re.findall(r"\d+", f"{args.device} {args.draft_device}")))
    if not cores <= set(runtime.available_cores()):
        pytest.skip(f"the command wants the cores {cores}")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runtime, "read_bandwidth", lambda lane: 1e10)
    monkeypatch.setattr(sys, "argv", ["generate.py", *words, "--max-new-tokens", "6"])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code = generate.main()
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out.strip() and "tokens/s" in out + err


def test_the_readme_has_what_it_needs():
    first_screen = README.split("## ")[0]
    assert "pip install -c constraints.txt -e . && python generate.py --ssd" in first_screen
    assert "What it is not" in first_screen
    assert len(PROGRAM) >= 8 and len(fenced("python")) >= 1
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(r"`((?:tests|scripts)/\w+\.py)`", README):
        assert (ROOT / path).exists(), path


def test_every_flag_is_in_the_readme_and_no_other():
    flags = {option for action in generate.parser()._actions for option in action.option_strings} - {"-h"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    assert flags - named == set() and named - flags == set()
    assert all(f"`{key}`" in README for key in KEYS)


def test_every_file_is_in_the_readme():
    assert sorted(re.findall(r"^\| \[(\w+)\.py\]", README, re.M)) == MODULES


# ---- packaging and CI


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_an_install_has_every_module():
    assert sorted(PROJECT["tool"]["setuptools"]["py-modules"]) == MODULES


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_constraints_pin_every_package_within_its_range():
    requirement = pytest.importorskip("packaging.requirements").Requirement
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {pin.name.lower().replace("_", "-"): pin for pin in map(requirement, lines)}
    asked = [*PROJECT["project"]["dependencies"], *sum(PROJECT["project"]["optional-dependencies"].values(), [])]
    for need in map(requirement, asked):
        (pin,) = pins[need.name.lower()].specifier
        assert pin.operator == "==" and need.specifier.contains(pin.version), f"{need} against {pin}"
    torch = next(need for need in map(requirement, asked) if need.name == "torch")
    assert torch.specifier.contains("2.11.0") and torch.specifier.contains("2.13.0")
    if os.environ.get("CI") == "true":  # CI tests the very versions that are pinned
        for name, pin in pins.items():
            with contextlib.suppress(PackageNotFoundError):
                assert pin.specifier.contains(version(name)), f"{name} {version(name)} is installed, pinned is {pin}"


def test_ci_runs_what_the_readme_says():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")]).returncode == 0
    steps = [line.split(None, 2)[2] for line in CI.splitlines() if line.startswith("step ")]
    for command in (line for line in COMMANDS if line.startswith("pip install")):
        assert all(part in steps for part in command.split(" && ")), command
    assert "ruff check" in steps


# ---- the files


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def test_nothing_names_a_package_registry():
    hosts = re.compile("|".join(("py" + "pi", "python" + "hosted", "pytorch" + r"\.org", "index" + "-url")), re.I)
    for path in files("*.py", "*.md", "*.toml", "*.txt", "scripts/*", "tests/*.py", ".ci/run", "docs/*.md"):
        if path.is_file():
            assert not hosts.search(path.read_text()), path


def test_importing_has_no_side_effects_and_needs_no_gpu_libraries():
    """No output, no threads, no random state, no settings of torch; neither Triton, transformers nor NumPy."""
    program = f"""
import sys, threading, warnings
warnings.simplefilter("ignore")
absent = ["triton", "transformers", "numpy", "matplotlib", "scipy"]
sys.modules |= dict.fromkeys(absent)
import torch
state = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(),
                 hash(tuple(torch.get_rng_state().tolist())), threading.active_count(), torch.cuda.is_initialized())
before = state()
import {", ".join(MODULES)}
assert state() == before, (before, state())
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("path", files("*.py", "scripts/*.py"), ids=lambda path: path.name)
def test_a_file_keeps_the_rules(path):
    """At most 400 lines, functions of 50, main of 80; a docstring on top that says what to read next."""
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    head = ast.get_docstring(tree) or ""
    assert head
    if path.parent == ROOT:
        assert re.search(r"Knows:.*Does\s+not\s+know:.*Read\s+(next|first)", head, re.S)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            told = node.body[0] if ast.get_docstring(node) is not None else None  # what explains is not counted
            length = node.end_lineno - node.lineno + 1 - (told.end_lineno - told.lineno + 1 if told else 0)
            kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)  # Triton's are one piece
            most = 80 if node.name == "main" or kernel else 50
            assert length <= most, f"{node.name} has {length} lines, wanted {most} at most"
        if isinstance(node, ast.Assert):
            assert node.msg is not None, f"the assert in line {node.lineno} has no message"
        if isinstance(node, ast.ExceptHandler):
            silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            assert not silent, f"line {node.lineno} drops an exception in silence"


def test_the_licence_is_mit_and_the_log_is_dated():
    licence = (ROOT / "LICENSE").read_text()
    assert licence.startswith("MIT License") and "The ssd authors" in licence
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d)", (ROOT / "LOG.md").read_text(), re.M)
    assert dates and dates == sorted(dates, reverse=True)


def test_the_tree_stays_small():
    """Under 60 MB with the weights, which are under 32 MB: it is cloned by everybody."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    assert sum(sizes.values()) < 60e6, sorted(sizes, key=sizes.get)[-5:]
    assert sum(size for name, size in sizes.items() if name.startswith("assets/")) < 32e6


def test_the_demo_pair_is_there_and_completes_python(capsys, monkeypatch):
    """The main job, in this process: real weights, real text."""
    monkeypatch.setattr(sys, "argv", ["generate.py", "--ssd", "--json", "-", "--max-new-tokens", "24"])
    assert generate.main() == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["target"].endswith("target") and stats["new_tokens"] and stats["text"][0].strip()
