"""The Llama family, written by hand: one transformer that its checkpoint's config.json configures.

Knows: what a model computes, and its numbers. Does not know: files (checkpoint/), how texts are
sampled (sampling.py), when and where it runs (runtime.py). Read next: kernels.py, its attention.

This is what runs: on every device, eager, scripted, compiled and captured, and in training.

Shape letters: B batch, T tokens per row, E hidden size, F feed-forward size, H query heads, G
key/value heads, D head size, V vocabulary, P positions, S cache slots.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint.config import Config, rope_frequencies
from kernels import script, tree_attention
from parallel import ALONE

Pair = tuple[torch.Tensor, torch.Tensor]  # cos and sin, or keys and values


class Location(NamedTuple):
    """Where the tokens of one forward pass sit, and what each of them may see.

    Made by KVCache.locate and locate_chain. Tensors are int64 on the model's device, mask's apart.

    positions_BT  for RoPE
    slots_BT      where keys and values are written
    limit_BT      the trunk slots that are seen, [0, limit)
    extent        a bound on all limits that the host knows: no slot from there on is read
    tight         as in kernels.tree_attention: below extent all slots hold finite numbers
    chain         as in kernels.tree_attention, None for trunk tokens
    mask          as there, made once for all layers; None where nobody reads it
    """

    positions_BT: torch.Tensor
    slots_BT: torch.Tensor
    limit_BT: torch.Tensor
    extent: int
    tight: bool
    chain: tuple[int, int, torch.Tensor] | None
    mask: torch.Tensor | None


def before_layers(tokens_BT, positions_BT, embed: nn.Module, rope: Pair):
    """What the layers begin with: the residual stream, a change to it that is zero yet, and each
    token's rows of the RoPE tables, (B, T, 1, D) each.
    """
    x_BTE = embed(tokens_BT).to(rope[0].dtype)  # beside weights of few bits it is in bfloat16
    return x_BTE, torch.zeros_like(x_BTE), tuple(table[positions_BT][:, :, None] for table in rope)


def after_layers(x_BTE, change_BTE, norm: nn.Module, head: nn.Module) -> torch.Tensor:
    """The logits (B, T, V) of what the layers end with."""
    return head(norm(x_BTE + change_BTE))


class Transformer(nn.Module):
    """tokens_BT at a Location -> logits (B, T, V) in the weights' dtype.

    Keys and values are written into `cache`. Without a cache (training) the tokens are whole texts
    from position 0 on. A draft may have a head for fewer tokens than it reads: token_ids_V then
    holds the id that each row of its head stands for.
    """

    rope: Pair | None = None  # cos_PD, sin_PD
    group = ALONE  # the processes that share the model
    # Policy.compile puts others here.
    before, after = staticmethod(before_layers), staticmethod(after_layers)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        V = config.own_tokens or config.vocab_size
        self.embed = nn.Embedding(V, config.hidden_size)
        self.layers = Layers(Block(config, window) for window in config.windows)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.head_tokens or V, bias=False)
        if config.tied and not config.head_tokens:
            self.head.weight = self.embed.weight
        self.register_buffer("token_ids_V", None, persistent=False)

    def forward(self, tokens_BT, where: Location | None = None, cache=None, logits: bool = True):
        """Logits, or None without `logits`. cache is a KVCache."""
        at_BT = torch.arange(tokens_BT.shape[1])[None] if where is None else where.positions_BT
        kv = None if cache is None else cache.layers
        with torch.jit.optimized_execution(False):  # a script gains nothing; it would take seconds
            stream = self.layers(*self.before(tokens_BT, at_BT, self.embed, self.rope), where, kv)
        return self.after(*stream, self.norm, self.head) if logits else None

    def script(self) -> None:
        """Make the layers one call without Python's lock, for a CPU where nothing is learnt."""
        # TorchScript keeps what it made of a class. Whoever edits a method between two loads in one
        # process must not get the old one.
        jit = torch.jit._recursive
        jit.concrete_type_store = jit.ConcreteTypeStore()
        self.layers = script(self.layers)

    def set_positions(self, positions: int) -> None:
        """Make RoPE tables for positions 0..positions-1, in the weights' dtype and on their device.

        Captured CUDA graphs read the tables that were here: whoever holds graphs holds `rope` too.
        """
        weight, made = self.norm.weight, self.rope
        if made is None or len(made[0]) < positions or made[0].dtype != weight.dtype:
            tables = rope_tables(self.config, positions)
            # Rounded to float32 first, like the reference implementations; float64 keeps all of it.
            if weight.dtype != torch.float64:
                tables = [table.float() for table in tables]
            self.rope = tuple(table.to(weight.device, weight.dtype) for table in tables)


class Layers(nn.ModuleList):
    """The blocks in order, with what goes in and out of each.

    kv: each layer's keys and values, (B, G, S, D), which are written as well as read.
    """

    def forward(self, x_BTE, change_BTE, rope: Pair, where: Location | None, kv: list[Pair] | None):
        for layer, block in enumerate(self):
            kv_BGSD = None if kv is None else kv[layer]
            x_BTE, change_BTE = block(x_BTE, change_BTE, rope, where, kv_BGSD)
        return x_BTE, change_BTE


class Block(nn.Module):
    """One layer: the residual stream, and what the layer before adds to it -> the same two.

    The sum is left to the next layer's norm: compiled for a GPU, the two are one kernel.
    """

    def __init__(self, config: Config, window: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, window)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTE, change_BTE, rope: Pair, where: Location | None, kv_BGSD: Pair | None):
        x_BTE = x_BTE + change_BTE
        x_BTE = x_BTE + self.attention(self.attention_norm(x_BTE), rope, where, kv_BGSD)
        return x_BTE, self.mlp(self.mlp_norm(x_BTE))


class Attention(nn.Module):
    """Grouped-query attention over the row's own past; window: of how many positions, 0 for all."""

    def __init__(self, config: Config, window: int):
        super().__init__()
        E, H, G, D = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.heads, self.kv_heads, self.head_dim, self.window = H, G, D, window
        self.qkv = nn.Linear(E, (H + 2 * G) * D, bias=config.qkv_bias)
        self.out = nn.Linear(H * D, E, bias=config.out_bias)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BTE, rope: Pair, where: Location | None, kv_BGSD: Pair | None):
        H, G, D = self.heads, self.kv_heads, self.head_dim
        qkv = self.qkv(x_BTE).unflatten(-1, (H + 2 * G, D))
        qk_BTHD, value_BTGD = qkv.split((H + G, G), 2)
        if self.q_norm is not None:
            query, key = qk_BTHD.split((H, G), 2)
            qk_BTHD = torch.cat((self.q_norm(query), self.k_norm(key)), 2)
        query_BTHD, key_BTGD = rotate(qk_BTHD, rope[0], rope[1]).split((H, G), 2)
        if where is None or kv_BGSD is None:  # whole texts, for training: plain causal attention
            mixed_BHTD = F.scaled_dot_product_attention(
                query_BTHD.transpose(1, 2),
                key_BTGD.transpose(1, 2),
                value_BTGD.transpose(1, 2),
                is_causal=True,
                enable_gqa=True,
            )
            return self.out(mixed_BHTD.transpose(1, 2).flatten(2))
        k_BGSD, v_BGSD = kv_BGSD
        write(k_BGSD, v_BGSD, where.slots_BT, key_BTGD, value_BTGD)
        # A window counts positions; on the trunk a token's slot is its position.
        first_BT = (where.positions_BT + 1 - self.window).clamp(min=0) if self.window else None
        mixed_BTHD = tree_attention(
            query_BTHD,
            k_BGSD,
            v_BGSD,
            where.limit_BT,
            first_BT,
            scale=D**-0.5,
            extent=where.extent,
            tight=where.tight,
            chain=where.chain,
            window=self.window,
            mask=None if self.window else where.mask,
        )
        return self.out(mixed_BTHD.flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config):
        super().__init__()
        E, self.wide = config.hidden_size, config.intermediate_size
        self.gate_up = nn.Linear(E, 2 * self.wide, bias=config.mlp_bias)
        self.down = nn.Linear(self.wide, E, bias=config.mlp_bias)

    def forward(self, x_BTE):
        gate_BTF, up_BTF = self.gate_up(x_BTE).split((self.wide, self.wide), -1)
        return self.down(F.silu(gate_BTF) * up_BTF)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # bfloat16 and float16: normalise in float32, round, then scale, as the reference
        # implementations do.
        wide = x if x.dtype == torch.float64 else x.float()
        # On a CPU each operator costs a microsecond or more: these are 9, those of F.rms_norm 22.
        norm = torch.linalg.vector_norm(wide, 2.0, [-1], True)
        scale = torch.full_like(norm, self.eps).addcmul_(norm, norm, value=1 / x.shape[-1])
        return (wide * scale.rsqrt_()).to(x.dtype) * self.weight


def rotate(x_BTHD: torch.Tensor, cos_BT1D: torch.Tensor, sin_BT1D: torch.Tensor) -> torch.Tensor:
    """RoPE: every head turned by its token's position."""
    swapped = x_BTHD.roll(x_BTHD.shape[-1] // 2, -1)
    return torch.addcmul(x_BTHD * cos_BT1D, swapped, sin_BT1D)


def write(
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    slots_BT: torch.Tensor,
    k_BTGD: torch.Tensor,
    v_BTGD: torch.Tensor,
) -> None:
    """Put the keys and values of T tokens a row into their slots, in place."""
    if len(slots_BT) == 1:
        slots_T = slots_BT[0]
        k_BGSD.index_copy_(2, slots_T, k_BTGD.transpose(1, 2))
        v_BGSD.index_copy_(2, slots_T, v_BTGD.transpose(1, 2))
    else:
        row_B1 = torch.arange(len(slots_BT), device=slots_BT.device)[:, None]
        # Written to the cache itself: through a transposed view, compiled code would copy all of it
        # there and back.
        k_BGSD[row_B1, :, slots_BT] = k_BTGD
        v_BGSD[row_B1, :, slots_BT] = v_BTGD


def rope_tables(config: Config, positions: int) -> Pair:
    """cos and signed sin, (P, D) float64: rotate(x) is x * cos + x.roll(D // 2) * sin."""
    frequency, amplitude = rope_frequencies(config)
    angle_PD = torch.outer(torch.arange(positions, dtype=torch.float64), frequency).repeat(1, 2)
    sign_D = torch.ones(config.head_dim, dtype=torch.float64)
    sign_D[: config.head_dim // 2] = -1
    return angle_PD.cos() * amplitude, angle_PD.sin() * amplitude * sign_D
