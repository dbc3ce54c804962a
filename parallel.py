"""Tensor parallelism: one target on several devices, with a process (a rank) for each.

Knows: Megatron's split of a model, what ranks tell each other. Does not know: rounds, texts, what a
step computes, how ranks start, serve and fail (ranks.py). Read next: ranks.py.

Attention is split by its key/value heads, the MLP by its width, embedding and head by the
vocabulary. A layer sums twice over the ranks; what lies between its parts is the same on all.

Rank 0 has the loop, the text and the draft. It tells the other ranks the numbers of each step, and
all of them run it. A draw needs each rank's best score only; the logits are gathered, on rank 0
alone, where a top-k or top-p or the other couplings' residuals need all of them.

On CUDA the collectives are captured in the graphs of the steps. That was never run.
"""

import pickle
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from checkpoint.config import Config
from checkpoint.gguf import GROUP, Quantised
from checkpoint.weights import pieces

SUMMED = ("attention.out", "mlp.down")  # layers whose inputs lie on several ranks
MESSAGE = 4096  # bytes that one broadcast carries; most steps fit


def gathered(x: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """(ranks, *x.shape): x of each rank, on all of them."""
    together = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), ranks, group)
    return torch.ops._c10d_functional.wait_tensor(together).unflatten(0, (ranks, -1))


def summed(x: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """The sum of x over the ranks, on all of them: one all-reduce.

    It adds in the order of the ranks. Rings add in an order that hangs on a number's place, so
    that a token's last bits would differ between a plain step and a verification.
    """
    parts = gathered(x, ranks, group)
    if x.dtype == torch.bfloat16 or x.dtype == torch.float16:
        parts = parts.float()
    total = parts[0]
    for rank in range(1, ranks):
        total = total + parts[rank]
    return total.to(x.dtype)


class Summed(nn.Module):
    """A linear layer that has some of its inputs on each rank."""

    def __init__(self, layer: nn.Module, ranks: int, group: str):
        super().__init__()
        self.layer, self.ranks, self.group = layer, ranks, group

    def forward(self, x):
        return summed(self.layer(x), self.ranks, self.group)


class Tokens(nn.Module):
    """An embedding of which each rank has some rows."""

    def __init__(self, weight: nn.Parameter, first: int, group: "Group"):
        super().__init__()
        self.weight, self.first, self.ranks, self.group = weight, first, group.ranks, group.name

    def forward(self, tokens_BT):
        at_BT = tokens_BT - self.first
        mine_BT1 = ((at_BT >= 0) & (at_BT < len(self.weight)))[..., None]
        rows_BTE = F.embedding(at_BT.clamp(0, len(self.weight) - 1), self.weight)
        return summed(rows_BTE.masked_fill(~mine_BT1, 0.0), self.ranks, self.group)


class Part:
    """Some rows or columns of a tensor in a safetensors file; nothing else of it is read."""

    def __init__(self, tensor, axis: int, part: range):
        self.tensor, self.index = tensor, (slice(None),) * axis + (slice(part.start, part.stop),)

    def __getitem__(self, everything: slice) -> torch.Tensor:
        return self.tensor[self.index]


def narrow(tensor, axis: int, part: range):
    """Some rows or columns of a tensor of a file."""
    return tensor.narrow(axis, part) if isinstance(tensor, Quantised) else Part(tensor, axis, part)


def is_summed(layer: str) -> bool:
    """Whether a linear layer of this name has some of its inputs on each rank."""
    return layer.endswith(SUMMED)


class Group:
    """The ranks that share a target, seen from one of them. A process alone is a group, too."""

    def __init__(self, rank: int = 0, ranks: int = 1, watch=None):
        self.rank, self.ranks, self.watch = rank, ranks, watch
        self.serving = self.broken = False  # whether the others listen; whether one was lost
        self.name = dist.group.WORLD.group_name if ranks > 1 else ""

    # ---- the model's parts

    def own(self, count: int, unit: int = 1) -> range:
        """This rank's share of `count` things, in whole units."""
        cuts = [count // unit * r // self.ranks * unit for r in (self.rank, self.rank + 1)]
        return range(*cuts)

    def tokens(self, config: Config) -> range:
        """The tokens whose rows of embedding and head are this rank's; the last has fewer."""
        wide = -(-config.vocab_size // self.ranks)
        return range(wide * self.rank, min(wide * (self.rank + 1), config.vocab_size))

    def share(self, config: Config, tensors: dict) -> tuple[Config, dict]:
        """The config and the tensors of what this rank has of a checkpoint."""
        R, D, F = config.num_heads // config.num_kv_heads, config.head_dim, config.intermediate_size
        heads = self.own(config.num_kv_heads)
        tokens = self.tokens(config)
        whole = F % GROUP == 0 and F // GROUP >= self.ranks  # groups of four bits stay whole
        own = {"V": tokens, "F": self.own(F, GROUP if whole else 1)}
        for letter, size in (("Q", R * D), ("K", D)):
            own[letter] = range(heads.start * size, heads.stop * size)
        parts = {}
        for piece in pieces(config):
            part = tensors[piece.theirs]
            for axis, letter in enumerate(piece.axes):
                if letter in own:  # at most one axis is split
                    part = narrow(part, axis, own[letter])
            parts[piece.theirs] = part
        numbers = {"num_kv_heads": len(heads), "num_heads": R * len(heads)}
        numbers |= {"intermediate_size": len(own["F"]), "own_tokens": len(tokens)}
        return replace(config, **numbers), parts

    def split(self, model: nn.Module) -> None:
        """Let a model that has this rank's weights sum over the ranks."""
        for block in model.layers:
            for module, name in ((block.attention, "out"), (block.mlp, "down")):
                layer = getattr(module, name)
                if self.rank > 0:
                    layer.bias = None  # rank 0 adds it
                setattr(module, name, Summed(layer, self.ranks, self.name))
        tokens = self.tokens(model.config)
        weight = model.embed.weight
        model.embed = Tokens(weight, tokens.start, self)
        model.token_ids_V = torch.arange(tokens.start, tokens.stop, device=weight.device)
        model.group = self

    @property
    def lost(self) -> bool:
        """Whether another rank is gone, so that this one may wait for it for ever."""
        return self.broken or (self.watch is not None and self.watch.told)

    # ---- what ranks tell each other

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """The largest x of all ranks, number by number."""
        return gathered(x, self.ranks, self.name).amax(0) if self.ranks > 1 else x

    def best(self, score: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best score of all ranks and its token; of equal ones the first, as of one process."""
        both = gathered(torch.stack((score, token.to(score.dtype))), self.ranks, self.name)
        score, rank = both[:, 0].max(0)
        return score, both[:, 1].gather(0, rank[None])[0].long()

    def whole(self, logits: torch.Tensor, vocab: int) -> torch.Tensor:
        """The logits of all tokens on rank 0; the others keep their own."""
        wide = -(-vocab // self.ranks)
        own = F.pad(logits, (0, wide - logits.shape[-1])).contiguous()
        every = None if self.rank else [torch.empty_like(own) for _ in range(self.ranks)]
        dist.gather(own, every, dst=0)
        return torch.cat(every, -1)[..., :vocab] if every else logits

    def tell(self, *said) -> None:
        """On rank 0: say what it does next, for the others to do the same. Elsewhere: nothing."""
        if self.ranks > 1 and self.rank == 0:
            data = pickle.dumps(said)
            data = bytearray(len(data).to_bytes(8, "little") + data)
            for part in (data[:MESSAGE].ljust(MESSAGE, b" "), data[MESSAGE:]):
                if part:
                    dist.broadcast(torch.frombuffer(part, dtype=torch.uint8), 0)

    def hear(self) -> tuple:
        """What rank 0 tells."""
        data = bytearray(MESSAGE)
        dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), 0)
        rest = bytearray(max(0, 8 + int.from_bytes(data[:8], "little") - MESSAGE))
        if rest:
            dist.broadcast(torch.frombuffer(rest, dtype=torch.uint8), 0)
        return pickle.loads((data + rest)[8:])

    def same(self, value):
        """Rank 0's value, on all ranks."""
        self.tell(value)
        return self.hear()[0] if self.rank else value

    @contextmanager
    def guard(self):
        """Make a RankLost of what a collective raises when another rank is gone."""
        try:
            yield
        except RuntimeError as error:
            self.broken = self.ranks > 1  # in the middle of a step: nobody listens
            if self.broken and self.rank == 0 and (lost := self.watch.why(error)):
                raise lost from error
            raise


ALONE = Group()  # a process that shares with nobody
