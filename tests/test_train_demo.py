"""scripts/train_demo.py from end to end at toy size: a whole pair, exact resuming, and sentences for mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script():
    """The script as a module: one start of Python instead of one for each mistake."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import train_demo

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on toy matrices, and beside other work, threads only wait for each other
    yield train_demo
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    command = [sys.executable, str(ROOT / "scripts" / "train_demo.py"), "--tiny", "--work-dir", str(work)]
    command += ["--out", str(out)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return work, out


def test_pair_is_complete(made):
    from checkpoint.config import Config

    _, out = made
    for name in ("target", "draft"):
        config = Config.from_dict(json.loads((out / name / "config.json").read_text()))
        weights = load_file(out / name / "model.safetensors")
        assert {x.dtype for x in weights.values()} == {torch.bfloat16}, "the pair is stored in bfloat16"
        assert weights["model.embed_tokens.weight"].shape == (config.vocab_size, config.hidden_size)
        rows = config.num_kv_heads * config.head_dim
        assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (rows, config.hidden_size)
        assert len(weights) == 2 + 9 * config.num_layers, "two shared tensors and nine for each layer"
        settings = json.loads((out / name / "tokenizer_config.json").read_text())
        assert settings["add_bos_token"] is True and settings["add_eos_token"] is False
        assert json.loads((out / name / "generation_config.json").read_text())["eos_token_id"] == 2
    assert (out / "target/tokenizer.model").read_bytes() == (out / "draft/tokenizer.model").read_bytes()
    assert len(json.loads((out / "manifest.json").read_text())["sha256"]) == 64
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")], "temporary folders are gone"


def test_report_has_the_figures(made):
    report = json.loads((made[1] / "report.json").read_text())
    assert 0 < report["held_out"]["top1_agreement"] <= 1
    assert 0 < report["held_out"]["nats_per_token"]["target"] < 6.3, "better than a uniform guess over 512 tokens"
    assert set(report["own_text"]) == set(report["texts"]) == {"greedy", "T=0.8", "T=1.0"}


def test_tokenizer_gives_back_every_text(made):
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(made[1] / "target" / "tokenizer.model"))
    ids = [tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()]
    assert (ids, tokenizer.vocab_size()) == ([0, 1, 2], 512)
    for text in ("def f(x):\n    return  x\n\n", "  two  spaces ", "\t\ttab", "é 漢字 \U0001f642 \r\n", "x" * 100):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_resuming_changes_nothing(made, script, tmp_path):
    """A run stopped after 6 of 12 steps and started again ends with the weights of the run that never stopped."""
    for steps in (6, 12):
        assert script.main(["--tiny", "--work-dir", str(tmp_path), "--stage", "target", "--steps", str(steps)]) == 0
        state = torch.load(tmp_path / "target.pt", weights_only=True)
        assert state["step"] == steps, "the checkpoint says how far it is"
    whole = torch.load(made[0] / "target.pt", weights_only=True)
    assert whole["step"] == 12
    for name, weight in whole["model"].items():
        assert torch.equal(weight, state["model"][name]), f"{name} differs after resuming"


def test_finishing_leaves_the_target_alone(made):
    stable, finished = (torch.load(made[0] / f"{name}.pt", weights_only=True) for name in ("target", "finish"))
    assert finished["base"] == f"target {stable['step']}"
    assert not torch.equal(stable["model"]["embed.weight"], finished["model"]["embed.weight"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--stage", "finish"), ("target.pt", "--stage target")),
        (("--stage", "draft"), ("finish.pt", "--stage finish")),
        (("--report",), ("holds no target",)),
        (("--steps", "0", "--stage", "target"), ("--steps 0",)),
        (("--steps", "5"), ("--steps 5",)),
        (("--seed", "-1"), ("--seed is -1",)),
        (("--device", "warp9"), ("warp9",)),
    ],
)
def test_mistakes_are_one_sentence(made, script, flags, words, tmp_path, capsys):
    shutil.copyfile(made[0] / "tokenizer.model", tmp_path / "tokenizer.model")  # spares training it again
    try:
        code = script.main(["--tiny", "--work-dir", str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    except SystemExit as stop:  # argparse's own way
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in said
    for word in words:
        assert word in said
