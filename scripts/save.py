"""Write a model as a checkpoint: config.json and safetensors in Hugging Face's layout.

The engine only reads checkpoints. This is for what makes new ones: inflate.py and the tests.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint.config import Config  # noqa: E402
from checkpoint.weights import Fill, Piece, pieces, pieces_of  # noqa: E402


def weight_bytes(config: Config, dtype: torch.dtype) -> int:
    return sum(math.prod(piece.shape) for piece in pieces(config)) * dtype.itemsize


def split_pieces(config: Config, dtype: torch.dtype, shard_bytes: int) -> list[list[Piece]]:
    """The pieces of a checkpoint in their order, in files of about `shard_bytes`."""
    shards, room = [[]], shard_bytes
    for piece in pieces(config):
        size = math.prod(piece.shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(piece)
        room -= size
    return shards


def save_model(
    source: nn.Module | Fill,
    raw: dict,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 2 << 30,
) -> list[Path]:
    """Write config.json and weights in Hugging Face's layout, in shards of about `shard_bytes`;
    returns the files.

    `source` is a model, or a function that fills one piece: then one shard is all that is ever in
    memory. `raw` is the content of config.json. `dtype` None: the model's own. Each file appears
    whole or not at all.
    """
    folder, config = Path(folder), Config.from_dict(raw)
    if isinstance(source, nn.Module):
        views = pieces_of(source)
        dtype = dtype or source.norm.weight.dtype
        fill = lambda piece, out: out.copy_(views[piece.theirs])  # noqa: E731
    else:
        dtype, fill = dtype or torch.float32, source
    shards = split_pieces(config, dtype, shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    names = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        (folder / "model.safetensors").unlink(missing_ok=True)  # it would hide the shards
    for name, shard in zip(names, shards, strict=True):
        tensors = {piece.theirs: torch.empty(piece.shape, dtype=dtype) for piece in shard}
        for piece in shard:
            fill(piece, tensors[piece.theirs])
        # transformers insists on the format.
        save_file(tensors, folder / f"{name}.tmp", metadata={"format": "pt"})
        os.replace(folder / f"{name}.tmp", folder / name)
    if len(shards) > 1:
        where = {
            piece.theirs: name for name, shard in zip(names, shards, strict=True) for piece in shard
        }
        index = {"metadata": {"total_size": weight_bytes(config, dtype)}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    raw = {key: value for key, value in raw.items() if key != "dtype"} | {
        "torch_dtype": str(dtype)[6:]
    }
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    return [folder / name for name in names]
