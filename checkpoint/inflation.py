"""Grow a small checkpoint to the cost of a large one without changing what it computes.

Knows: which shapes there are, and where the numbers of the small model go in the large one. Does
not know: files, how a model computes (model.py). It walks the table of tensors of weights.py.

Why: real acceptance and hit rates at the compute and memory traffic of, say, Llama-3.1-8B, with
nothing to download. Small letters are the small model's sizes, capitals the large one's:

* The residual stream lives in the first d of D columns; the rest stay zero, because o_proj and
  down_proj have zero rows there. RMSNorm divides by D instead of d, which weights * sqrt(d/D) and
  eps * d/D undo.
* A head of h dimensions becomes one of n*h: dimension i goes to n*i, so that rotary pair i turns as
  fast as before. The rest of k and v is zero; q is scaled by sqrt(n), because attention divides by
  sqrt(n*h). With q/k norm (Qwen3) the rest of q is zero too, the norms' weights take the scale, and
  q and k are scaled to suit the eps they share.
* Query head t of KV head j stays under KV head j. If the large model has fewer query heads for each
  KV head, several copies of KV head j share them. New heads, new feed-forward units and new layers
  compute, and are multiplied by zero.
* New words need logits that are never drawn. Column d of the residual stream holds the constant c,
  c^2 = eps*d/2, and eps becomes eps*d/(2D): every norm stays exact. The final norm alone lets c
  through, to the new rows of lm_head, whose logits are -30,000 where they are lowest (finite in
  float16) and fall off as 1/rms of the final hidden state.

Everything else is random, and not zero, since zeros draw less power and let a GPU run faster than
it would.
"""

import re
from pathlib import Path

import torch
from torch import nn

from checkpoint.config import Config
from checkpoint.weights import (
    Fill,
    Piece,
    load_model,
    parse_config,
    pieces_of,
    read_config,
)

NAMES = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
}
# The published sizes, and two small ones. What a shape does not name stays the checkpoint's own, so
# 60m and 200m keep the vocabulary.
SHAPES = {
    "60m": (768, 9, 12, 4, 64, 2048, None),
    "200m": (1024, 17, 16, 4, 64, 2816, None),
    "llama-3.2-1b": (2048, 16, 32, 8, 64, 8192, 128256),
    "llama-3.1-8b": (4096, 32, 32, 8, 128, 14336, 128256),
    "qwen3-8b": (4096, 36, 32, 8, 128, 12288, 151936),
    "llama-3.1-70b": (8192, 80, 64, 8, 128, 28672, 128256),
}
# Rows and columns of a large tensor that no row or column of the small one goes to.
RANDOM, ZERO = (-1, -2)
LOWEST = 30000.0  # float16 ends at 65504


def parse_shape(text: str) -> dict[str, int]:
    """A preset's name, or sizes like `hidden=1024,layers=12`, as {name: size}."""
    if text in SHAPES:
        return {name: size for name, size in zip(NAMES, SHAPES[text], strict=True) if size}
    shape = {}
    for part in text.split(","):
        size = re.fullmatch(r"(\w+)=([1-9][0-9]{0,7})", part)
        if size is None or size[1] not in NAMES:
            raise ValueError(
                f"shape {text[:100]!r} is unknown: give one of {', '.join(SHAPES)}, or sizes of "
                f"{', '.join(NAMES)}, like hidden=1024,layers=12"
            )
        shape[size[1]] = int(size[2])
    return shape


def grow_config(raw: dict, shape: dict[str, int]) -> dict:
    """The config.json of the grown model. ValueError names the dimension that cannot grow so."""
    small = Config.from_dict(raw)
    old = (small.hidden_size, small.num_layers, small.num_heads, small.num_kv_heads, small.head_dim)
    old = dict(zip(NAMES, (*old, small.intermediate_size, small.vocab_size), strict=True))
    new = old | shape
    for name, size in old.items():
        if new[name] < size:
            raise ValueError(
                f"{name}={new[name]} is less than the checkpoint's {size}: ask for at least "
                f"{name}={size}"
            )
    heads, groups, head_dim = new["heads"], new["kv_heads"], new["head_dim"]
    need = small.num_kv_heads * copies_of(small, max(1, heads // groups))
    words, wider = new["vocab"] > small.vocab_size, head_dim > small.head_dim
    for wrong, what in (
        (
            head_dim % small.head_dim,
            f"head_dim={head_dim} is not a multiple of the checkpoint's: use {2 * small.head_dim}",
        ),
        (heads % groups, f"heads={heads} is not a multiple of kv_heads={groups}: choose one"),
        (
            groups < need,
            f"heads={heads} over kv_heads={groups} has no room for the checkpoint's "
            f"{small.num_heads} over {small.num_kv_heads}: ask for kv_heads={need} or more heads",
        ),
        (
            wider and small.rope["type"] == "yarn",
            "head_dim cannot grow with yarn RoPE, whose bands depend on it: leave it as it is",
        ),
        (
            words and new["hidden"] == small.hidden_size,
            f"vocab={new['vocab']} needs a spare column: make hidden larger as well",
        ),
    ):
        if wrong:
            raise ValueError(what)
    grown = raw | {NAMES[name]: size for name, size in new.items()}
    # Half of eps is left for the constant column, where there is one.
    share = small.hidden_size / new["hidden"] / (2 if words else 1)
    grown |= {
        "rms_norm_eps": small.norm_eps * share,
        "tie_word_embeddings": small.tied and not words,
    }
    if small.rope["type"] == "factors":  # pair i of a head becomes pair i * head_dim / old
        factors = [f for f in small.rope["factor"] for _ in range(head_dim // small.head_dim)]
        grown["rope_scaling"] = {"type": "factors", "factors": factors}
    if types := raw.get("layer_types"):
        grown["layer_types"] = types + types[-1:] * (new["layers"] - small.num_layers)
    return grown


def copies_of(small: Config, room: int) -> int:
    """KV heads it takes to serve a KV head's query heads at `room` of them for each."""
    return -(-small.num_heads // small.num_kv_heads // room)


class Growth:
    """The large model's tensors, one at a time: `fill` writes one piece from the small model
    `source` and noise.
    """

    def __init__(self, source: nn.Module, config: Config, seed: int):
        small = source.config
        self.config, self.small = config, small
        device = source.embed.weight.device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.old = pieces_of(source)
        self.old.setdefault("lm_head.weight", source.embed.weight.data)
        self.axes = {letter: index.to(device) for letter, index in self._axes().items()}
        n = config.head_dim // small.head_dim
        narrow = small.hidden_size / config.hidden_size
        norms = ("input_layernorm", "post_attention_layernorm", "norm")
        self.scale = dict.fromkeys(norms, narrow**0.5) | {"q_proj": n**0.5}
        if config.qk_norm:
            shared = (n * config.norm_eps / small.norm_eps) ** 0.5
            self.scale |= {"q_proj": shared, "k_proj": shared, "k_norm": n**-0.5}
        self.constant = self.loud = 0.0
        if config.vocab_size > small.vocab_size:
            self.constant = (small.norm_eps * small.hidden_size / 2) ** 0.5
            # The final norm makes of c: weight * sqrt(eps*D/2) / rms. Half of the volume goes to
            # the norm's weight and half to lm_head, so that neither leaves float16.
            most = (small.norm_eps * config.hidden_size / 2) ** 0.5
            self.loud = (LOWEST * smallest_rms(source, self.generator) / most) ** 0.5

    def _axes(self) -> dict[str, torch.Tensor]:
        """For each letter of a piece's axes: where each index of the large model comes from, or
        RANDOM, or ZERO.
        """
        small, large = self.small, self.config
        h = small.head_dim
        queries = small.num_heads // small.num_kv_heads
        room = large.num_heads // large.num_kv_heads
        spread = torch.full((large.head_dim,), ZERO)
        spread[:: large.head_dim // h] = torch.arange(h)
        new = torch.full_like(spread, RANDOM)

        def head_at(place: int, rest: int) -> torch.Tensor:
            """The rows of a head, from those of the small model's head number `place`."""
            return torch.where(spread >= 0, spread + place * h, rest)

        # Between a spread query's numbers anything may stand, as k is zero there: unless a norm
        # adds it up.
        rest, q, k = ZERO if large.qk_norm else RANDOM, [], []
        for head in range(large.num_kv_heads):
            kv, copy = divmod(head, copies_of(small, room))
            used = kv < small.num_kv_heads
            k.append(head_at(kv, ZERO) if used else new)
            for query in range(copy * room, (copy + 1) * room):
                mine = used and query < queries
                q.append(head_at(kv * queries + query, rest) if mine else new)
        axes = {"Q": torch.cat(q), "K": torch.cat(k), "D": spread}
        for letter, name in (("E", "hidden_size"), ("F", "intermediate_size"), ("V", "vocab_size")):
            index = torch.arange(getattr(large, name))
            axes[letter] = torch.where(index < getattr(small, name), index, RANDOM)
        return axes

    def fill(self, piece: Piece, out: torch.Tensor) -> None:
        """Write one tensor of the large model. To be called in the order of weights.pieces, for the
        same noise.
        """
        role, kind = piece.theirs.split(".")[-2:]
        new_layer = piece.layer >= self.small.num_layers
        axes = [self.axes[letter] for letter in piece.axes]
        if role.endswith("norm"):
            out.fill_(self.scale.get(role, 1.0))
        elif kind == "bias" or role in ("o_proj", "down_proj", "embed_tokens"):
            out.zero_()
        else:
            # Uniform with the variance 1/D: what a new unit computes stays of the order of 1.
            bound = (3 / self.config.hidden_size) ** 0.5
            out.uniform_(-bound, bound, generator=self.generator)
            if not new_layer:
                out[axes[0] == ZERO] = 0.0
        if not new_layer:
            old = self.old[piece.theirs] * self.scale.get(role, 1.0)
            to = [(index >= 0).nonzero()[:, 0] for index in axes]
            of = [index[at] for index, at in zip(axes, to, strict=True)]
            out[torch.meshgrid(*to, indexing="ij")] = old[torch.meshgrid(*of, indexing="ij")].to(
                out.dtype
            )
        if self.constant:
            self._place_constant(role, axes[0], out)

    def _place_constant(self, role: str, rows: torch.Tensor, out: torch.Tensor) -> None:
        d = self.small.hidden_size
        if role in ("input_layernorm", "post_attention_layernorm"):
            out[d] = 0.0  # no layer sees the constant
        elif role == "norm":
            out[d] = self.loud
        elif role == "embed_tokens":
            out[:, d] = self.constant
        elif role == "lm_head":
            out[:, d] = torch.where(rows >= 0, 0.0, -self.loud).to(out.dtype)


@torch.no_grad()
def smallest_rms(source: nn.Module, generator: torch.Generator) -> float:
    """The least root mean square that the final norm meets on 1,024 random words of the small
    model.
    """
    seen = []
    hook = source.norm.register_forward_hook(
        lambda module, inputs, out: seen.append(inputs[0].double())
    )
    source.set_positions(64)
    device = source.embed.weight.device
    source(torch.randint(source.config.vocab_size, (16, 64), generator=generator, device=device))
    hook.remove()
    return (seen[0].square().mean(-1) + source.config.norm_eps).min().sqrt().item()


def grown(
    text: str, folder: Path, device, dtype: torch.dtype, make, seed: int = 0
) -> tuple[dict, Config, Fill]:
    """config.json, config and fill function of the checkpoint in `folder` grown to the shape
    `text`.
    """
    raw = grow_config(read_config(folder), parse_shape(text))
    config = parse_config(raw, folder)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    source = load_model(folder, device, exact, make)
    return raw, config, Growth(source, config, seed).fill
