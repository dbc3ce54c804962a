"""The Llama family, written by hand: one transformer that its checkpoint's config.json configures.

Knows: the architecture and its numbers. Does not know: files' formats beyond config.json (weights.py), how texts are
sampled (sampling.py), when and where it runs (runtime.py). Read next: kernels.py for attention, cache.py for slots.

Covers Llama 2 / 3 / 3.1 / 3.2, TinyLlama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3. A setting that is not understood is
an error that names it: a model that loads must compute what its author meant.

Shape letters: B batch, T tokens per row, E hidden size, H query heads, G key/value heads, D head size, V vocabulary,
P positions.
"""

import torch
import torch.nn.functional as F
from torch import nn

from cache import KVCache, Placement, write
from checkpoint.config import Config, rope_frequencies
from kernels import tree_attention
from unlocked import all_layers


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
