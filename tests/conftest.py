"""A tiny checkpoint pair on disk, for every test that goes through files: random weights, a real tokenizer, a chat template.

The target's text is noise, with many bytes that are no whole character: what a terminal program must cope with.
"""

import json
from pathlib import Path

import pytest
import torch

WORDS = 400
CONTEXT = 320
SHAPE = {
    "model_type": "llama", "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "eos_token_id": 2,
}  # fmt: skip
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
SENTENCES = (
    "def fibonacci(n):", "    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)", "class Tree(object):",
    "for number, line in enumerate(lines, 1):", "print('naïve café ☕')", "import os, sys", "raise ValueError(message)",
)  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """A sentencepiece model of WORDS pieces, 256 of them single bytes, that gives every text back as it was."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3), model_prefix=str(folder / "tokenizer"), vocab_size=WORDS,
        model_type="bpe", byte_fallback=True, character_coverage=0.98, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))


def write_checkpoint(folder: Path, seed: int, noise: float = 0.0, tokenizer: Path | None = None, **changes) -> Path:
    """Random weights of `seed`, plus noise of another seed: a draft that is often, not always, right."""
    from model import Config, Transformer
    from weights import save_model

    raw = SHAPE | changes
    model = Transformer(Config.from_dict(raw)).requires_grad_(False)
    for own, scale in ((seed, 1.0), (seed + 1, noise)):
        rng = torch.Generator().manual_seed(own)
        for weight in model.parameters():
            if weight.ndim == 2:
                fresh = torch.randn(weight.shape, generator=rng) * weight.shape[1] ** -0.5
                weight.copy_(fresh if own == seed else weight + scale * fresh)
    model.head.weight.mul_(6.0)  # a sharp distribution, as a trained model has
    save_model(model, raw, folder)
    if tokenizer is None:
        write_tokenizer(folder)
    else:
        for path in tokenizer.glob("tokenizer*"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A folder laid out as assets/demo is: target/ and draft/."""
    root = tmp_path_factory.mktemp("demo")
    write_checkpoint(root / "target", seed=0)
    write_checkpoint(root / "draft", seed=0, noise=0.1, tokenizer=root / "target")
    return root
