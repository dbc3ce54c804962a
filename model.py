"""The Llama family, written by hand: one transformer that its checkpoint's config.json configures.

Knows: the architecture and its numbers. Does not know: files' formats beyond config.json (weights.py), how texts are
sampled (sampling.py), when and where it runs (runtime.py). Read next: kernels.py for attention, cache.py for slots.

Covers Llama 2 / 3 / 3.1 / 3.2, TinyLlama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3. A setting that is not understood is
an error that names it: a model that loads must compute what its author meant.

Shape letters: B batch, T tokens per row, E hidden size, H query heads, G key/value heads, D head size, V vocabulary,
P positions.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from cache import KVCache, Placement, write
from kernels import tree_attention
from unlocked import all_layers

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_KEYS = (
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "finetuned",
)  # fmt: skip
# What config.json may say about computing that this file does not implement unless it has exactly this value.
FIXED = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "pretraining_tp": 1}


@dataclass(frozen=True)
class Config:
    """The numbers of one checkpoint. `windows` has one sliding window per layer, 0 for full attention."""

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

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """Read Hugging Face's config.json (the layouts of transformers 4 and 5). ValueError names what does not fit."""
        kind = raw.get("model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(f"model_type is {kind!r}, wanted one of {', '.join(MODEL_TYPES)}: use such a checkpoint")
        for key, wanted in FIXED.items():
            if raw.get(key, wanted) not in (wanted, None):
                raise ValueError(f"{key} is {raw[key]!r}, but only {wanted!r} is implemented: use another checkpoint")
        if raw.get("quantization_config"):
            raise ValueError("the checkpoint is quantised, wanted plain weights: use the unquantised checkpoint")
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
        )
        if config.num_heads % config.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {config.num_kv_heads}: "
                "the config.json is damaged, fetch it again"
            )
        if config.head_dim % 2:
            raise ValueError(f"head_dim is {config.head_dim}, wanted an even number for RoPE: fetch config.json again")
        return config


def _whole(raw: dict, key: str, default: int | None = None, least: int = 1, most: int = 1 << 24) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"config.json says {key} = {value!r}, wanted a whole number {least} to {most}: fetch it again")
    return value


def _flag(raw: dict, key: str, default: bool = False) -> bool:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"config.json says {key} = {value!r}, wanted true or false: fetch it again")
    return value


def _real(raw: dict, key: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e300:
        raise ValueError(f"config.json says {key} = {value!r}, wanted a non-negative number: fetch it again")
    return float(value)


def _rope(raw: dict) -> tuple[dict, float]:
    """RoPE scaling as one flat dict with a "type", and theta; transformers 5 says rope_parameters, 4 rope_scaling."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"the RoPE scaling in config.json is {rope!r}, wanted an object: fetch it again")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type is {kind!r}, wanted one of {', '.join(ROPE_TYPES)}: use another checkpoint")
    for key, value in rope.items():
        if key not in ROPE_KEYS or (key == "partial_rotary_factor" and value not in (1.0, None)):
            raise ValueError(f"RoPE scaling has {key} = {value!r}, which is not implemented: use another checkpoint")
    needs = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor",),
    }[kind]
    flat = {key: _real(rope, key) for key in needs}
    theta = _real(raw if rope.get("rope_theta") is None else rope, "rope_theta", 10000.0)
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
        flat["original_max_position_embeddings"] = _real({"original": original}, "original")
        flat |= {key: _real(rope, key, default) for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))}
        flat |= {key: _real(rope, key) for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key)}
        flat["truncate"] = _flag(rope, "truncate", True)
    if any(value == 0 for key, value in flat.items() if key != "truncate") or theta <= 1:
        raise ValueError(f"RoPE has theta {theta} and {rope!r}, wanted theta > 1 and no zeros: fetch config.json again")
    if kind == "llama3" and flat["low_freq_factor"] >= flat["high_freq_factor"]:
        raise ValueError(f"RoPE has low_freq_factor >= high_freq_factor in {rope!r}: fetch config.json again")
    return {"type": kind, **flat}, theta


def _windows(raw: dict, kind: str, layers: int) -> tuple[int, ...]:
    """One sliding window per layer, 0 for none. Defaults are transformers': a config.json may leave them out."""
    slides = kind == "mistral" or (kind != "llama" and _flag(raw, "use_sliding_window"))
    window = raw.get("sliding_window", 4096) if slides else None
    window = _whole(raw, "sliding_window", 4096) if window else 0
    types = raw.get("layer_types")
    if types is None:  # Qwen: the first max_window_layers see everything; Mistral: every layer slides
        full = _whole(raw, "max_window_layers", 28, least=0) if window and kind != "mistral" else 0
        full = min(full, layers) if window else layers
        types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if not isinstance(types, list) or len(types) != layers:
        raise ValueError(f"layer_types has not one entry for each of {layers} layers: fetch config.json again")
    for name in types:
        if name != "full_attention" and not (window and name == "sliding_attention"):
            wanted = "full_attention" + " or sliding_attention" * bool(window)
            raise ValueError(f"layer type {name!r} is not implemented here, wanted {wanted}: use another checkpoint")
    return tuple(window if name == "sliding_attention" else 0 for name in types)


def rope_frequencies(config: Config) -> tuple[torch.Tensor, float]:
    """Angle per position of each rotary pair, (D/2,) float64, and the factor on cos and sin (yarn's, else 1).

    Sources: RoPE (arXiv 2104.09864); llama3 scaling as in Meta's Llama 3.1 release; yarn (arXiv 2309.00071).
    """
    D, rope = config.head_dim, config.rope
    frequency = config.rope_theta ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    if rope["type"] == "linear":
        return frequency / rope["factor"], 1.0
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

    def pair_with(turns):  # the (fractional) rotary pair that makes so many turns over the original context
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
    return frequency * (keep + (1 - keep) / factor), magnitude(1.0) if amplitude is None else amplitude


def rope_tables(config: Config, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin, (P, D) float32: rotate(x) = x * cos + swap_halves(x) * sin, the sign being in sin already."""
    frequency, amplitude = rope_frequencies(config)
    angle_PD = torch.outer(torch.arange(positions, dtype=torch.float64), frequency).repeat(1, 2)
    sign_D = torch.ones(config.head_dim, dtype=torch.float64)
    sign_D[: config.head_dim // 2] = -1
    return angle_PD.cos() * amplitude, angle_PD.sin() * amplitude * sign_D


def rotate(x_BTHD: torch.Tensor, cos_BT1D: torch.Tensor, sin_BT1D: torch.Tensor) -> torch.Tensor:
    swapped = x_BTHD.roll(x_BTHD.shape[-1] // 2, -1)
    return torch.addcmul(x_BTHD * cos_BT1D, swapped, sin_BT1D)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # bfloat16 and float16: normalise in float32, round, then scale, as the reference implementations do.
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config: Config, window: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.window = window
        width = self.heads + 2 * self.kv_heads
        self.qkv = nn.Linear(config.hidden_size, width * self.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.out_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BTE, cos, sin, place: Placement | None, k_BGSD, v_BGSD):
        B, T, _ = x_BTE.shape
        H, G, D = self.heads, self.kv_heads, self.head_dim
        qkv = self.qkv(x_BTE).view(B, T, H + 2 * G, D)
        if self.q_norm is not None:
            query, key = self.q_norm(qkv[:, :, :H]), self.k_norm(qkv[:, :, H : H + G])
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        else:
            query, key = rotate(qkv[:, :, : H + G], cos, sin).split((H, G), 2)
        if place is None:  # whole texts, for training: plain causal attention
            heads_first = (x.transpose(1, 2) for x in (query, key, qkv[:, :, H + G :]))
            mixed = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
            return self.out(mixed.reshape(B, T, H * D))
        write(k_BGSD, v_BGSD, place.slots_BT, key, qkv[:, :, H + G :])
        # A window counts positions; on the trunk a token's slot is its position, so the two bounds agree.
        first_BT = (place.positions_BT + 1 - self.window).clamp(min=0) if self.window else None
        mixed = tree_attention(
            query, k_BGSD, v_BGSD, place.limit_BT, first_BT,
            scale=D**-0.5, extent=place.extent, tight=place.tight, chain=place.chain, window=self.window,
        )  # fmt: skip
        return self.out(mixed.reshape(B, T, H * D))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTE):
        gate, up = self.gate_up(x_BTE).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config, window: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, window)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTE, cos, sin, place: Placement | None, k_BGSD, v_BGSD):
        x_BTE = x_BTE + self.attention(self.attention_norm(x_BTE), cos, sin, place, k_BGSD, v_BGSD)
        return x_BTE + self.mlp(self.mlp_norm(x_BTE))


class Transformer(nn.Module):
    """tokens_BT at a Placement -> logits (B, T, V) in the weights' dtype, writing keys and values into `cache`.

    Without a cache (training) the tokens are whole texts from position 0 on.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, window) for window in config.windows)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.cos_PD = self.sin_PD = self._weights = None

    def set_positions(self, positions: int) -> None:
        """Make RoPE tables for positions 0..positions-1 in the weights' dtype and device; called once per run."""
        weight = self.embed.weight
        if self.cos_PD is None or len(self.cos_PD) < positions or self.cos_PD.dtype != weight.dtype:
            # Rounded to float32 first, like the reference implementations; float64 weights keep all of it.
            tables = rope_tables(self.config, positions)
            if weight.dtype != torch.float64:
                tables = [table.float() for table in tables]
            self.cos_PD, self.sin_PD = (table.to(weight.device, weight.dtype) for table in tables)

    def forward(self, tokens_BT, place: Placement | None = None, cache: KVCache | None = None, logits: bool = True):
        x_BTE = self.embed(tokens_BT)
        where = torch.arange(tokens_BT.shape[1])[None] if place is None else place.positions_BT
        cos, sin = self.cos_PD[where][:, :, None], self.sin_PD[where][:, :, None]
        if place is not None and place.quick and not any(self.config.windows):
            x_BTE = all_layers(x_BTE, cos, sin, *self._for_all_layers(place, cache))
        else:
            for layer, block in enumerate(self.layers):
                x_BTE = block(x_BTE, cos, sin, place, *(cache[layer] if cache is not None else (None, None)))
        return self.head(self.norm(x_BTE)) if logits else None

    def _for_all_layers(self, place: Placement, cache: KVCache) -> tuple:
        """What unlocked.all_layers takes besides x, cos and sin; the lists of weights are made once."""
        if self._weights is None:
            blocks = [(b.attention, b.mlp) for b in self.layers]
            linears = [[a.qkv for a, _ in blocks], [a.out for a, _ in blocks], [m.gate_up for _, m in blocks],
                       [m.down for _, m in blocks]]  # fmt: skip
            norms = [[b.attention_norm for b in self.layers], [b.mlp_norm for b in self.layers],
                     [a.q_norm for a, _ in blocks], [a.k_norm for a, _ in blocks]]  # fmt: skip
            weight = lambda modules, name: [getattr(module, name, None) for module in modules]  # noqa: E731
            self._weights = (
                [weight(modules, "weight") for modules in norms], [weight(modules, "weight") for modules in linears],
                [weight(modules, "bias") for modules in linears], self.config.norm_eps,
                type(linears[0][0]) is not nn.Linear,
            )  # fmt: skip
        base, steps, _ = place.chain or (0, 0, None)
        bias, group = place.bias, self.config.num_heads // self.config.num_kv_heads
        bias = bias if bias is None else bias.repeat_interleave(group, 2)
        return place.slots_BT, cache.k_L, cache.v_L, bias, place.dead, place.extent, base, steps, *self._weights
