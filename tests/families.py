"""Tiny random checkpoints for the tests: one of each family by transformers, and our own models
without it.
"""

import json
from pathlib import Path

import pytest
import torch

from cache import KVCache
from checkpoint.config import Config
from model import Transformer

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN = {"num_hidden_layers": 3, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6}
# What differs from LLAMA above. Every setting that the family's real checkpoints use is here once.
FAMILIES = {
    "llama-2": {"num_key_value_heads": 4},
    "llama-3": {"rope_theta": 500000.0},
    "llama-3.1": {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "llama-3.2": {
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "tinyllama": {"num_attention_heads": 6, "num_key_value_heads": 1, "num_hidden_layers": 3},
    "smollm2": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_theta": 1e5,
    },
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-head-dim": {"head_dim": 32},
    "llama-linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": 9},
    "mistral-full": {
        "model_type": "mistral",
        "sliding_window": None,
        "rope_theta": 1000000.0,
        "head_dim": 16,
    },
    "qwen2": QWEN | {"model_type": "qwen2"},
    "qwen2.5-tied": QWEN | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-sliding": QWEN
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen2-all-slide": QWEN
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
    },
    "qwen2-yarn": QWEN
    | {"model_type": "qwen2"}
    | {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    },
    "qwen3": QWEN | {"model_type": "qwen3", "head_dim": 20},
    "qwen3-sliding-bias": QWEN
    | {
        "model_type": "qwen3",
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    }
    | {"attention_bias": True},
    "yarn-all-keys": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 6.0,
            "original_max_position_embeddings": 40,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "mscale": 1.3,
            "mscale_all_dim": 0.7,
            "truncate": False,
        },
    },
    "yarn-attention-factor": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.25,
        },
    },
}


def raw_config(family: str) -> dict:
    """The family's config.json as transformers 4 would have written it."""
    return {"architectures": ["Any"], "hidden_act": "silu"} | LLAMA | FAMILIES[family]


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int) -> None:
    """Weights so large that a wrong norm, bias, head or angle shows in the logits (of the order of
    1).
    """
    rng = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=rng, dtype=torch.float64)
        if weight.ndim == 1:
            noise = 0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise
        else:
            noise *= 0.3 if "embed" in name else 1.4 * weight.shape[1] ** -0.5
        weight.copy_(noise)


def hugging_face(family: str, folder: Path, seed: int = 0):
    """Write the family's checkpoint with transformers, in the layout of version 5; returns
    transformers' own model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = {
        key: value
        for key, value in raw_config(family).items()
        if key not in ("architectures", "model_type")
    }
    config = AutoConfig.for_model(raw_config(family)["model_type"], **raw)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model, seed)
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.save_pretrained(folder)
    return model


def to_old_layout(folder: Path, family: str) -> None:
    """Replace config.json by one as transformers 4 wrote them: RoPE and torch_dtype at the top
    level.
    """
    raw = raw_config(family) | {
        "torch_dtype": "float32",
        "use_cache": True,
        "transformers_version": "4.40.0",
    }
    if raw.get("rope_scaling"):  # still older ones call the type just type
        raw["rope_scaling"] = {
            "type" if k == "rope_type" else k: v for k, v in raw["rope_scaling"].items()
        }
    (folder / "config.json").write_text(json.dumps(raw))


def tiny_model(seed: int = 0, dtype=torch.float64, **changes) -> Transformer:
    """Our own model with random weights and RoPE tables for 256 positions."""
    model = Transformer(Config.from_dict(LLAMA | changes)).to(dtype)
    randomise(model, seed)
    model.requires_grad_(False).set_positions(256)
    return model


def new_cache(
    model: Transformer, batch: int, trunk: int, branches: int = 0, steps: int = 0
) -> KVCache:
    weight = model.embed.weight
    return KVCache(
        model.config, batch, trunk, branches, steps, device=weight.device, dtype=weight.dtype
    )


def feed(
    model,
    cache,
    rows: list[list[int]],
    start: list[int],
    width: int = 0,
    extent: int = 0,
    tight=False,
):
    """Logits (B, T, V) of every row's tokens at its own positions, padded on the right to the
    longest or to `width`.
    """
    width = width or max(map(len, rows))
    tokens_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    counts_B = torch.tensor([len(row) for row in rows])
    extent = extent or max(at + len(row) for at, row in zip(start, rows, strict=True))
    where = cache.locate(torch.tensor(start), counts_B, width, max(extent, 1), tight)
    return model(tokens_BT, where, cache)


def whole(model, text: list[int]) -> torch.Tensor:
    """The slow truth: logits (T, V) of a text fed at once into a fresh cache of its length."""
    return feed(model, new_cache(model, 1, len(text)), [text], [0])[0]


def greedy(model, text: list[int], count: int) -> list[int]:
    """`count` tokens, one cached step at a time."""
    model.set_positions(len(text) + count)
    cache, new, feeding, at = new_cache(model, 1, len(text) + count), [], text, 0
    for _ in range(count):
        new.append(feed(model, cache, [feeding], [at])[0, -1].argmax().item())
        at, feeding = at + len(feeding), new[-1:]
    return new


def random_text(length: int, seed: int, words: int = 96) -> list[int]:
    return torch.randint(words, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def refuses(match: str, name, load) -> str:
    """`load(name)` fails with one sentence that matches; returns it."""
    with pytest.raises(ValueError, match=match) as caught:
        load(name)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and len(message) < 700, message
    return message
