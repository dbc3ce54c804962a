"""config.json as numbers: what a checkpoint of the Llama family computes, and nothing that is not
understood.

Knows: the keys of Hugging Face's config.json and what they mean. Does not know: tensors of weights,
files beside config.json. Read next: weights.py.

Covers Llama 2 / 3 / 3.1 / 3.2, TinyLlama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3. A setting that
is not understood is an error that names it: a model that loads must compute what its author meant.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# For each type, the numbers that it cannot do without. "factors" is ours: a GGUF file holds
# llama3's scaling as one factor for each frequency.
ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor",),
    "factors": (),
}
ROPE_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "finetuned",
    "factors",
)
# What config.json may say about computing that this file does not implement unless it has exactly
# this value.
IMPLEMENTED = {"hidden_act": "silu", "partial_rotary_factor": 1.0}


@dataclass(frozen=True)
class Config:
    """The numbers of one checkpoint. `windows` has one sliding window per layer, 0 for full
    attention.

    head_tokens: the rows of a draft's output head, which may know fewer tokens than it reads; 0 for
    all.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope: dict
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    head_tokens: int = 0

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """Read Hugging Face's config.json (the layouts of transformers 4 and 5). ValueError names
        what does not fit.
        """
        kind = raw.get("model_type")
        _refuse(raw, kind)
        hidden, heads = _whole(raw, "hidden_size"), _whole(raw, "num_attention_heads")
        layers = _whole(raw, "num_hidden_layers", most=4096)
        rope, theta = _rope(raw)
        config = cls(
            model_type=kind,
            vocab_size=_whole(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_whole(raw, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=_whole(raw, "num_key_value_heads", heads),
            head_dim=_whole(raw, "head_dim", hidden // heads or 1),
            max_positions=_whole(raw, "max_position_embeddings", 2048),
            norm_eps=_real(raw, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope=rope,
            tied=_flag(raw, "tie_word_embeddings"),
            qkv_bias=_flag(raw, "attention_bias") or kind == "qwen2",
            out_bias=_flag(raw, "attention_bias") and kind != "qwen2",
            mlp_bias=_flag(raw, "mlp_bias"),
            qk_norm=kind == "qwen3",
            windows=_windows(raw, kind, layers),
            head_tokens=_whole(raw, "head_tokens", 0, least=0),
        )
        _consistent(config)
        return config


def _consistent(config: Config) -> None:
    """ValueError for numbers that are sound one by one and do not fit together."""
    heads, groups, half = config.num_heads, config.num_kv_heads, config.head_dim // 2
    factors = config.rope.get("factors")
    if heads % groups:
        raise ValueError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}: "
            "the config.json is damaged, fetch it again"
        )
    if factors is not None and len(factors) != half:
        raise ValueError(
            f"RoPE has {len(factors)} factors, wanted {half}, half of head_dim: "
            "the checkpoint is damaged, fetch it again"
        )
    if config.head_tokens > config.vocab_size:
        raise ValueError(
            f"head_tokens is {config.head_tokens}, wanted at most vocab_size "
            f"{config.vocab_size}: train the draft again"
        )
    if config.head_dim % 2:
        raise ValueError(
            f"head_dim is {config.head_dim}, wanted an even number for RoPE: fetch config.json "
            "again"
        )


def _refuse(raw: dict, kind) -> None:
    """ValueError for what config.json says and nothing here computes."""
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"model_type is {kind!r}, wanted one of {', '.join(MODEL_TYPES)}: use such a checkpoint"
        )
    for key, wanted in IMPLEMENTED.items():
        if raw.get(key, wanted) not in (wanted, None):
            raise ValueError(
                f"{key} is {raw[key]!r}, but only {wanted!r} is implemented: use another checkpoint"
            )
    if raw.get("quantization_config"):
        raise ValueError(
            "the checkpoint is quantised, wanted plain weights: use the unquantised checkpoint"
        )


def _value(raw: dict, key: str, default, fits: Callable, wanted: str):
    """raw[key], or the default where it says nothing (null is nothing, too), if it fits."""
    value = raw.get(key)
    value = default if value is None else value
    if not fits(value):
        raise ValueError(f"config.json says {key} = {value!r}, wanted {wanted}: fetch it again")
    return value


def _whole(raw: dict, key: str, default=None, least: int = 1, most: int = 1 << 24) -> int:
    fits = lambda value: type(value) is int and least <= value <= most  # noqa: E731
    return _value(raw, key, default, fits, f"a whole number {least} to {most}")


def _flag(raw: dict, key: str, default: bool = False) -> bool:
    return _value(raw, key, default, lambda value: type(value) is bool, "true or false")


def _real(raw: dict, key: str, default: float | None = None) -> float:
    fits = lambda value: type(value) in (int, float) and 0 <= value < 1e300  # noqa: E731
    return float(_value(raw, key, default, fits, "a non-negative number"))


def _yarn_numbers(rope: dict, positions) -> dict:
    """yarn's numbers, with transformers' defaults for those that are not given."""
    original = rope.get("original_max_position_embeddings") or positions
    flat = {"original_max_position_embeddings": _real({"original": original}, "original")}
    flat |= {
        "beta_fast": _real(rope, "beta_fast", 32.0),
        "beta_slow": _real(rope, "beta_slow", 1.0),
    }
    given = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key)]
    flat |= {key: _real(rope, key) for key in given}
    return flat | {"truncate": _flag(rope, "truncate", True)}


def _rope(raw: dict) -> tuple[dict, float]:
    """RoPE scaling as one flat dict with a "type", and theta; transformers 5 says rope_parameters,
    4 rope_scaling.
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(
            f"the RoPE scaling in config.json is {rope!r}, wanted an object: fetch it again"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_NEEDS:
        raise ValueError(
            f"rope type is {kind!r}, wanted one of {', '.join(ROPE_NEEDS)}: use another checkpoint"
        )
    for key, value in rope.items():
        if key not in ROPE_KEYS or (key == "partial_rotary_factor" and value not in (1.0, None)):
            raise ValueError(
                f"RoPE scaling has {key} = {value!r}, which is not implemented: use another "
                "checkpoint"
            )
    flat = {key: _real(rope, key) for key in ROPE_NEEDS[kind]}
    theta = _real(raw if rope.get("rope_theta") is None else rope, "rope_theta", 10000.0)
    if kind == "yarn":
        flat |= _yarn_numbers(rope, raw.get("max_position_embeddings"))
    if kind == "factors":
        factors = rope.get("factors")
        factors = factors if isinstance(factors, list) else []
        flat["factors"] = tuple(_real({"factors": each}, "factors") for each in factors)
        if not all(flat["factors"]):
            raise ValueError("RoPE has a factor of 0, wanted more: fetch the checkpoint again")
    if any(value == 0 for key, value in flat.items() if key != "truncate") or theta <= 1:
        raise ValueError(
            f"RoPE has theta {theta} and {rope!r}, wanted theta > 1 and no zeros: fetch "
            "config.json again"
        )
    if kind == "llama3" and flat["low_freq_factor"] >= flat["high_freq_factor"]:
        raise ValueError(
            f"RoPE has low_freq_factor >= high_freq_factor in {rope!r}: fetch config.json again"
        )
    return {"type": kind, **flat}, theta


def _windows(raw: dict, kind: str, layers: int) -> tuple[int, ...]:
    """One sliding window per layer, 0 for none. Defaults are transformers': a config.json may leave
    them out.
    """
    slides = kind == "mistral" or (kind != "llama" and _flag(raw, "use_sliding_window"))
    window = raw.get("sliding_window", 4096) if slides else None
    window = _whole(raw, "sliding_window", 4096) if window else 0
    types = raw.get("layer_types")
    # Qwen: the first max_window_layers see everything; Mistral: every layer slides.
    if types is None:
        full = _whole(raw, "max_window_layers", 28, least=0) if window and kind != "mistral" else 0
        full = min(full, layers) if window else layers
        types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if not isinstance(types, list) or len(types) != layers:
        raise ValueError(
            f"layer_types has not one entry for each of {layers} layers: fetch config.json again"
        )
    for name in types:
        if name != "full_attention" and not (window and name == "sliding_attention"):
            wanted = "full_attention" + " or sliding_attention" * bool(window)
            raise ValueError(
                f"layer type {name!r} is not implemented here, wanted {wanted}: use another "
                "checkpoint"
            )
    return tuple(window if name == "sliding_attention" else 0 for name in types)


def rope_frequencies(config: Config) -> tuple[torch.Tensor, float]:
    """Angle per position of each rotary pair, (D/2,) float64, and the factor on cos and sin
    (yarn's, else 1).

    Sources: RoPE (arXiv 2104.09864); llama3 scaling as in Meta's Llama 3.1 release; yarn (arXiv
    2309.00071).
    """
    D, rope = config.head_dim, config.rope
    frequency = config.rope_theta ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    if rope["type"] == "linear":
        return frequency / rope["factor"], 1.0
    if rope["type"] == "factors":
        return frequency / torch.tensor(rope["factors"], dtype=torch.float64), 1.0
    if rope["type"] == "llama3":
        # Long wavelengths are slowed by the factor, short ones kept, and a band between is blended.
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (keep + (1 - keep) / rope["factor"]), 1.0
    if rope["type"] == "yarn":
        return _yarn(config, frequency)
    return frequency, 1.0


def _yarn(config: Config, frequency: torch.Tensor) -> tuple[torch.Tensor, float]:
    D, rope, factor = config.head_dim, config.rope, config.rope["factor"]

    # The (fractional) rotary pair that makes so many turns over the original context.
    def pair_with(turns):
        length = rope["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return D * math.log(length) / (2 * math.log(config.rope_theta))

    low, high = pair_with(rope["beta_fast"]), pair_with(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    span = high - low or 0.001
    keep = 1 - ((torch.arange(D // 2, dtype=torch.float64) - low) / span).clamp(0, 1)

    def magnitude(scale):
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    amplitude = rope.get("attention_factor")
    if amplitude is None and "mscale" in rope and "mscale_all_dim" in rope:
        amplitude = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return frequency * (keep + (1 - keep) / factor), magnitude(
        1.0
    ) if amplitude is None else amplitude
