"""config.json as numbers: what a checkpoint of the Llama family computes, and nothing that is not
understood.

Knows: the keys of Hugging Face's config.json and what they mean. Does not know: tensors of weights,
files beside config.json. Read next: weights.py.

Covers Llama 2 / 3 / 3.1 / 3.2, TinyLlama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3. A value that is
not understood, or an unknown key of RoPE, is an error that names it: a model that loads must
compute what its author meant. Keys that these families do not have are not looked at.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# The numbers of each type of RoPE, all above 0, with transformers' defaults. "factors" is ours: a
# GGUF file holds llama3's scaling as one factor for each frequency.
ROPE = {
    "default": {},
    "linear": {"factor": None},
    "llama3": {
        "factor": None,
        "low_freq_factor": None,
        "high_freq_factor": None,
        "original_max_position_embeddings": None,
    },
    "yarn": {
        "factor": None,
        "original_max_position_embeddings": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "factors": {},
}
YARN_MAY_HAVE = ("attention_factor", "mscale", "mscale_all_dim")
ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "truncate",
    "finetuned",
    "factors",
    *YARN_MAY_HAVE,
    *ROPE["llama3"],
    *ROPE["yarn"],
}
# What config.json may say about computing that this file does not implement unless it has exactly
# this value.
IMPLEMENTED = {"hidden_act": "silu", "partial_rotary_factor": 1.0}


def shorten(value: object) -> str:
    """A stranger's value as it may stand in a message: on one line, not too long."""
    text = repr(value)
    return text if len(text) < 150 else f"{text[:80]}... of {len(text)} characters"


class CheckpointError(ValueError):
    """One sentence for the user: what there was, what was wanted, what to do."""


def read_file(path: Path, limit: int) -> bytes:
    """Content of a file of at most `limit` bytes; a stranger's file costs no more than that."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path} is unreadable ({error}): fetch it again") from error
    if len(data) > limit:
        raise CheckpointError(f"{path} has more than {limit} bytes: fetch the checkpoint again")
    return data


def read_json(path: Path, limit: int = 1 << 20) -> dict:
    """The object in a JSON file of at most `limit` bytes."""
    data = read_file(path, limit)
    try:
        value = json.loads(data)
        got = f"holds {shorten(value)}"
    except (ValueError, RecursionError) as error:
        value, got = None, f"is unreadable ({str(error)[:200]})"
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} {got}, wanted a JSON object: fetch the checkpoint again")
    return value


@dataclass(frozen=True)
class Config:
    """The numbers of one checkpoint. `windows` has one sliding window per layer, 0 for full
    attention.

    head_tokens: the rows of a draft's output head, which may know fewer tokens than it reads; 0 for
    all. own_tokens: the rows of embedding and head that this process has, of a model that several
    share; 0 for all. The other numbers of such a config are this process's share as well.
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
    own_tokens: int = 0

    @property
    def own_embed(self) -> bool:
        """Whether the checkpoint has an embedding; a trained draft takes its target's."""
        return not self.head_tokens

    @property
    def own_head(self) -> bool:
        return self.own_embed and not self.tied

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """Read Hugging Face's config.json (the layouts of transformers 4 and 5). ValueError names
        what does not fit.
        """
        kind = _choice(raw, "model_type", MODEL_TYPES)
        if raw.get("quantization_config"):
            raise CheckpointError(
                "the checkpoint is quantised, wanted plain weights: use the unquantised checkpoint"
            )
        hidden = _whole(raw, "hidden_size")
        heads = _whole(raw, "num_attention_heads")
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
    factors = config.rope["factor"] if config.rope["type"] == "factors" else [1.0] * half
    for wrong, what in (
        (
            heads % groups,
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}",
        ),
        (config.head_dim % 2, f"head_dim is {config.head_dim}, wanted an even number for RoPE"),
        (len(factors) != half, f"RoPE has {len(factors)} factors, wanted {half}, half of head_dim"),
        (config.head_tokens > config.vocab_size, "head_tokens is more than vocab_size"),
    ):
        if wrong:
            raise CheckpointError(f"{what}: the checkpoint is damaged, fetch it again")


def _value(raw: dict, key: str, default, fits: Callable, wanted: str, advice="fetch it again"):
    """raw[key], or the default where it says nothing (null is nothing, too), if it fits."""
    value = raw.get(key)
    value = default if value is None else value
    if not fits(value):
        raise CheckpointError(f"{key} = {shorten(value)}, wanted {wanted}: {advice}")
    return value


def _whole(raw: dict, key: str, default=None, least: int = 1, most: int = 1 << 24) -> int:
    return _value(
        raw,
        key,
        default,
        lambda value: type(value) is int and least <= value <= most,
        f"a whole number {least} to {most}",
    )


def _flag(raw: dict, key: str, default: bool = False) -> bool:
    return _value(raw, key, default, lambda value: type(value) is bool, "true or false")


def _real(raw: dict, key: str, default: float | None = None, above: float = 0.0) -> float:
    value = _value(
        raw,
        key,
        default,
        lambda value: type(value) in (int, float) and above < value < 1e300,
        f"a number above {above:g}",
    )
    return float(value)


def _choice(raw: dict, key: str, known: Iterable, default=None):
    known = list(known)
    wanted = f"one of {', '.join(map(str, known))}"
    return _value(raw, key, default, known.__contains__, wanted, "use another checkpoint")


def _rope(raw: dict) -> tuple[dict, float]:
    """RoPE scaling as one flat dict with a "type", and theta; transformers 5 says rope_parameters,
    4 rope_scaling.
    """
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = _value(raw, key, {}, lambda value: isinstance(value, dict), "an object")
    rope = {key: value for key, value in rope.items() if value is not None}
    for key, value in IMPLEMENTED.items():
        _choice(raw | rope, key, [value], value)
    kind = _choice(rope, "rope_type" if "rope_type" in rope else "type", ROPE, "default")
    for key in rope.keys() - ROPE_KEYS:
        raise CheckpointError(f"{shorten(key)} of RoPE is not implemented: use another checkpoint")
    if kind == "yarn":
        rope = {"original_max_position_embeddings": raw.get("max_position_embeddings")} | rope
    flat = {key: _real(rope, key, default) for key, default in ROPE[kind].items()}
    if kind == "yarn":
        flat |= {key: _real(rope, key) for key in YARN_MAY_HAVE if rope.get(key)}
        flat["truncate"] = _flag(rope, "truncate", True)
    if kind == "factors":
        factors = _value(rope, "factors", None, lambda value: isinstance(value, list), "a list")
        flat["factor"] = tuple(_real({"factor": each}, "factor") for each in factors)
    if kind == "llama3" and flat["low_freq_factor"] >= flat["high_freq_factor"]:
        raise CheckpointError(
            "RoPE has low_freq_factor >= high_freq_factor: fetch config.json again"
        )
    return {"type": kind, **flat}, _real(raw | rope, "rope_theta", 10000.0, above=1.0)


def _windows(raw: dict, kind: str, layers: int) -> tuple[int, ...]:
    """One sliding window per layer, 0 for none. Defaults are transformers': a config.json may leave
    them out.
    """
    slides = kind == "mistral" or (kind != "llama" and _flag(raw, "use_sliding_window"))
    slides = slides and raw.get("sliding_window", 4096) not in (None, 0)
    window = _whole(raw, "sliding_window", 4096) if slides else 0
    # Qwen: the first max_window_layers see everything; Mistral: every layer slides.
    full = 0 if kind == "mistral" else _whole(raw, "max_window_layers", 28, least=0)
    names = ["full_attention", "sliding_attention"][: 2 if slides else 1]
    usual = [names[-1] if layer >= full else names[0] for layer in range(layers)]
    types = _value(
        raw,
        "layer_types",
        usual,
        lambda value: isinstance(value, list) and len(value) == layers,
        f"one entry for each of {layers} layers",
    )
    known = [_choice({"layer type": name}, "layer type", names) for name in types]
    return tuple(window if name == "sliding_attention" else 0 for name in known)


def rope_frequencies(config: Config) -> tuple[torch.Tensor, float]:
    """Angle per position of each rotary pair, (D/2,) float64, and the factor on cos and sin
    (yarn's, else 1).

    Sources: RoPE (arXiv 2104.09864); llama3 scaling as in Meta's Llama 3.1 release; yarn (arXiv
    2309.00071).
    """
    D, rope, keep, amplitude = config.head_dim, config.rope, 0.0, 1.0
    frequency = config.rope_theta ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    if rope["type"] == "llama3":
        # Long wavelengths are slowed by the factor, short ones kept, and a band between is blended.
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    if rope["type"] == "yarn":
        keep, amplitude = _yarn(config)
    factor = torch.tensor(rope.get("factor", 1.0), dtype=torch.float64)
    return frequency * (keep + (1 - keep) / factor), amplitude


def _yarn(config: Config) -> tuple[torch.Tensor, float]:
    """How much of each frequency yarn keeps, (D/2,), and its factor on cos and sin."""
    rope = config.rope
    half = config.head_dim // 2

    # The (fractional) rotary pair that makes so many turns over the original context.
    def pair_with(turns):
        length = math.log(rope["original_max_position_embeddings"]) - math.log(turns * 2 * math.pi)
        return half * length / math.log(config.rope_theta)

    def magnitude(scale):
        return 0.1 * scale * math.log(max(rope["factor"], 1.0)) + 1.0

    low, high = pair_with(rope["beta_fast"]), pair_with(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    keep = 1 - ((torch.arange(half, dtype=torch.float64) - low) / (high - low or 0.001)).clamp(0, 1)
    both = "mscale" in rope and "mscale_all_dim" in rope
    scale = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"]) if both else magnitude(1)
    return keep, rope.get("attention_factor", scale)
