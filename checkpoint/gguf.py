"""llama.cpp's GGUF files: a checkpoint whose config, tokenizer and quantised weights are in one
file.

Knows: the layout of the file, what its metadata means in the words of Hugging Face's files, how
blocks of quantised weights become numbers. Does not know: the parameters of a model (weights.py),
how text is encoded (tokenizer.py). Read next: tokenizer.py.

The header is read here, with a bound on everything that a file may claim: the `gguf` package
believes it, and takes 8 s for SmolLM2's. That package turns the rarer types of blocks into numbers;
torch does the common ones here, ten times as fast and bit for bit the same.
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from copy import copy
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.config import CheckpointError, shorten
from checkpoint.tokenizer import LLAMA3_PATTERN, Files

# Bytes of metadata and tensor names; 262,144 tokens and their merges take 16 MB.
HEADER_LIMIT = 32 << 20
ENTRY_LIMIT = 1 << 16  # metadata keys, and tensors; a 405B model has 1,138 tensors
# Weights turned into numbers at a time: more leave the cache, fewer pay for the calls.
CHUNK = 1 << 19
# Weights of a row that share a scale and a zero in every type of four bits; a scale in Q6_K.
GROUP, HALF = 32, 16
BITS_OF = {GROUP: 4, HALF: 6}
# Struct's letters of metadata types.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


# ---- the header


class Entry(NamedTuple):
    """A tensor as the header describes it: its shape in PyTorch's order, and its bytes."""

    shape: tuple[int, ...]
    blocks: "Blocks"
    offset: int
    nbytes: int


class File(NamedTuple):
    """A mapped GGUF file whose header agrees with its size."""

    path: Path
    data: mmap.mmap
    metadata: dict
    entries: dict[str, Entry]


class Cursor:
    """Reads a header from left to right; what would leave it is an error before anything is
    allocated.
    """

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 4  # after the magic bytes
        self.end = min(len(data), HEADER_LIMIT)

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is a damaged GGUF file ({what}): fetch it again")

    def skip(self, size: int, what: str) -> int:
        """The place of the next `size` bytes, which are passed over."""
        at = self.at
        self.at += size
        if self.at > self.end:
            raise self.damaged(
                f"{what} has {size} bytes at byte {at}, but its header ends at {self.end} at most"
            )
        return at

    def numbers(self, letter: str, what: str, count: int = 1) -> memoryview:
        at = self.skip(struct.calcsize(letter) * count, what)
        return memoryview(self.data[at : self.at]).cast(letter)

    def texts(self, count: int, what: str) -> list[str]:
        """So many texts; a vocabulary has 150,000, so this loop calls as little as it can."""
        self.at = self.skip(8 * count, what)  # each text has at least its length: room for so many?
        data, at, end, size_at = self.data, self.at, self.end, struct.Struct("<Q").unpack_from
        texts = []
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + size_at(data, at)[0]
                if at > end:
                    break
                texts.append(data[begin:at].decode())
        except (struct.error, UnicodeDecodeError) as error:
            raise self.damaged(f"{what} at byte {at} is not UTF-8, or not there") from error
        self.skip(at - self.at, what)
        return texts

    def table(self, what: str, count: int, read: Callable) -> dict:
        """`count` names, each followed by what `read` makes of the bytes after it."""
        if count > ENTRY_LIMIT:
            raise self.damaged(f"it claims to have {count} of one {what}")
        found = {}
        for _ in range(count):
            (name,) = self.texts(1, f"the name of a {what}")
            if name in found:
                raise self.damaged(f"it has the {what} {shorten(name)} twice")
            found[name] = read(f"{what} {shorten(name)}")
        return found

    def value(self, what: str):
        """A value of the metadata: a number, a text, or an array of one of these."""
        (kind,) = self.numbers("I", what)
        count = 1
        array = kind == ARRAY
        if array:
            (kind,) = self.numbers("I", what)
            (count,) = self.numbers("Q", what)
        if kind == STRING:
            found = self.texts(count, what)
        elif kind in SCALARS:
            found = self.numbers(SCALARS[kind], what, count)
        else:
            raise self.damaged(f"{what} has a value of the unknown type {kind}")
        return found if array else found[0]

    def entry(self, what: str) -> Entry:
        """The description of a tensor; its offset counts from the end of the header."""
        (axes,) = self.numbers("I", what)
        if not 1 <= axes <= 4:
            raise self.damaged(f"{what} has {axes} axes")
        shape = tuple(reversed(self.numbers("Q", what, axes)))
        (kind,) = self.numbers("I", what)
        (offset,) = self.numbers("Q", what)
        blocks = blocks_of(kind, f"{self.path}: {what}")
        row = shape[-1] if axes > 1 else 1  # in one axis, numbers that are not in blocks
        if not all(shape) or row % blocks.weights:
            raise self.damaged(f"{what} has rows of {row}, wanted whole blocks of {blocks.name}")
        return Entry(shape, blocks, offset, math.prod(shape) // blocks.weights * blocks.size)


def open_gguf(path: str | Path) -> File:
    """A mapped GGUF file. ValueError in one sentence if it is not one, or if its parts do not fit
    in it.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            # A private, writable map: torch warns of views of read-only memory. Nothing writes to
            # it.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise CheckpointError(
            f"{path} is unreadable ({error}), wanted a GGUF file: fetch it again"
        ) from error
    if data[:4] != b"GGUF":
        raise CheckpointError(
            f"{path} is a file but not a GGUF file, wanted one, or a folder with config.json: "
            f"give {path.parent} if it holds a checkpoint"
        )
    cursor = Cursor(path, data)
    (version,) = cursor.numbers("I", "its version")
    tensors, keys = cursor.numbers("Q", "the number of tensors and of keys", 2)
    if version not in (2, 3):
        raise CheckpointError(
            f"{path} is GGUF version {version}, wanted 2 or 3 (little-endian): convert it again"
        )
    metadata = cursor.table("metadata key", keys, cursor.value)
    entries = cursor.table("tensor", tensors, cursor.entry)
    parts = metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise CheckpointError(
            f"{path} is one of {shorten(parts)} parts, wanted a whole model: join them with "
            "`llama-gguf-split --merge`"
        )
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in range(8, 1 << 17, 8):
        raise cursor.damaged(f"its alignment is {shorten(alignment)}")
    start = -(-cursor.at // alignment) * alignment
    for name, entry in entries.items():
        at = start + entry.offset
        if entry.offset % alignment or at + entry.nbytes > len(data):
            raise cursor.damaged(
                f"tensor {shorten(name)} has {entry.nbytes} bytes at byte {at} of {len(data)}"
            )
        entries[name] = entry._replace(offset=at)
    return File(path, data, metadata, entries)


# ---- blocks of weights


class Blocks(NamedTuple):
    """A tensor type: weights and bytes of a block; unpack makes float32 of bytes (blocks, size).

    codes: of a type that is kept as it is, what those are. group: the weights of one scale there.
    """

    name: str
    weights: int
    size: int
    unpack: Callable[[torch.Tensor], torch.Tensor]
    codes: "Unpack | None" = None
    group: int = GROUP


def blocks_of(kind: int, what: str) -> Blocks:
    """The tensor type with this number. ValueError if neither this file nor the `gguf` package can
    read it.
    """
    if kind in TYPES:
        return TYPES[kind]
    try:
        import gguf
        from gguf.quants import dequantize
    except ImportError as error:
        raise CheckpointError(
            f"{what} has type number {kind}, which the package gguf reads, and it is not "
            'installed: run `pip install "gguf>=0.19"`'
        ) from error
    try:
        known = gguf.GGMLQuantizationType(kind)
        weights, size = gguf.GGML_QUANT_SIZES[known]
        dequantize(torch.zeros(1, size, dtype=torch.uint8).numpy(), known)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"{what} has type number {kind}, which nothing here can read: use another file"
        ) from error
    return Blocks(
        known.name,
        weights,
        size,
        lambda blocks: torch.from_numpy(dequantize(blocks.numpy(), known)),
    )


# What unpacks a type that has codes of groups: (codes 0..63 as bytes, scale, least), where a weight
# is code * scale + least, from the bytes of blocks.
Unpack = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def part(blocks: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Bytes start..end of each block; in one piece, because the next operation is faster on it."""
    return blocks[:, start:end].contiguous()


def halves(blocks: torch.Tensor, start: int, count: int = 1) -> torch.Tensor:
    """`count` float16 numbers of each block, from byte `start` on, as float32 (blocks, count)."""
    return part(blocks, start, start + 2 * count).view(torch.float16).float()


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Bytes (..., n) -> (..., 2, n): the low half of every byte, then the high one."""
    return torch.stack((codes, codes >> 4), -2).bitwise_and_(15)


@cache
def fifth_bits() -> torch.Tensor:
    """For each value of a byte, its eight bits, worth 16 each, as the bytes of one int64."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return bits.mul(16).byte().view(torch.int64).flatten()


def simple(least: bool, fifth: bool) -> Unpack:
    """Q4_0, Q4_1 (with a least number), Q5_0 and Q5_1 (with a fifth bit): one group of 32."""
    at = 4 if least else 2
    end = at + 4 if fifth else at

    def unpack(blocks):
        scale = halves(blocks, 0)
        codes = nibbles(part(blocks, end, end + 16)).flatten(1)
        if fifth:
            codes |= fifth_bits()[part(blocks, at, end).int()].view(torch.uint8)
        return codes, scale, halves(blocks, 2) if least else scale * (-16 if fifth else -8)

    return unpack


def eight_groups(fifth: bool) -> Unpack:
    """Q4_K and Q5_K: eight groups, with scales and minima of six bits, times a float16 each."""
    start = 48 if fifth else 16

    def unpack(blocks):
        low = part(blocks, 4, 12).view(-1, 2, 4)
        high = nibbles(part(blocks, 12, 16))
        sixes = torch.cat((low & 63, low >> 6 << 4 | high), 2).float()
        scale, least = sixes.mul_(halves(blocks, 0, 2)[..., None]).unbind(1)
        codes = nibbles(part(blocks, start, start + 128).view(-1, 4, 32)).flatten(1)
        if fifth:
            bits = part(blocks, 16, 48)
            codes |= (torch.stack([bits >> group for group in range(8)], 1) & 1).flatten(1) << 4
        return codes, scale, -least

    return unpack


def affine(unpack: Unpack) -> Callable[[torch.Tensor], torch.Tensor]:
    """The numbers that are meant by codes of groups, as float32 (blocks, groups, weights)."""

    def numbers(blocks):
        codes, scale, least = unpack(blocks)
        groups = codes.view(*scale.shape, -1).float()
        return groups.mul_(scale[..., None]).add_(least[..., None])

    return numbers


def q8_0(blocks):
    return blocks[:, 2:].view(torch.int8).float().mul_(halves(blocks, 0))


def q6_k(blocks):
    """Sixteen groups of 16, whose codes 0..63 mean -32..31."""
    bits = part(blocks, 128, 192).view(-1, 2, 32)
    upper = torch.stack((bits << 4, bits << 2, bits, bits >> 2), 2).bitwise_and_(0x30)
    codes = nibbles(part(blocks, 0, 128).view(-1, 2, 64)).view(-1, 2, 4, 32).bitwise_or_(upper)
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(halves(blocks, 208))
    return codes.flatten(1), scale, -32 * scale


def plain(dtype: torch.dtype):
    return lambda blocks: blocks.contiguous().view(dtype).float()


def kept(name: str, weights: int, size: int, codes: Unpack, group: int = GROUP) -> Blocks:
    return Blocks(name, weights, size, affine(codes), codes, group)


TYPES = {  # the layouts of blocks are ggml's (ggml-common.h)
    0: Blocks("F32", 1, 4, plain(torch.float32)),
    1: Blocks("F16", 1, 2, plain(torch.float16)),
    2: kept("Q4_0", 32, 18, simple(False, False)),
    3: kept("Q4_1", 32, 20, simple(True, False)),
    6: Blocks("Q5_0", 32, 22, affine(simple(False, True))),
    7: Blocks("Q5_1", 32, 24, affine(simple(True, True))),
    8: Blocks("Q8_0", 32, 34, q8_0),
    12: kept("Q4_K", 256, 144, eight_groups(False)),
    13: Blocks("Q5_K", 256, 176, affine(eight_groups(True))),
    14: kept("Q6_K", 256, 210, q6_k, HALF),
    28: Blocks("F64", 1, 8, plain(torch.float64)),
    30: Blocks("BF16", 1, 2, plain(torch.bfloat16)),
}


class Groups(NamedTuple):
    """A weight in 4 bits or 8: (codes - 8) * scale + zero, both for GROUP in a row; or in 6, for
    HALF of them.
    """

    codes_NK: torch.Tensor  # uint8, 0..15, 0..63 or 0..255
    scale_NG: torch.Tensor
    zero_NG: torch.Tensor

    @property
    def bits(self) -> int:
        """Of a weight that a file has in groups: 4 or 6."""
        return BITS_OF[self.codes_NK.shape[1] // self.scale_NG.shape[1]]

    def dense(self) -> torch.Tensor:
        """The numbers that are meant, (N, K) in the scales' dtype."""
        codes = self.codes_NK.to(self.scale_NG.dtype).unflatten(1, (self.scale_NG.shape[1], -1)) - 8
        return (codes * self.scale_NG[..., None] + self.zero_NG[..., None]).flatten(1)


class Quantised:
    """A tensor of the file as float32, under the interface of a safetensors slice.

    interleaved: the heads of Llama's q and k, else 0. llama.cpp turns neighbouring pairs of a head
    by RoPE: rows 2i and 2i + 1 of a head there are rows i and i + D/2 here.
    """

    def __init__(self, file: File, name: str, interleaved: int = 0):
        self.data, self.entry, self.interleaved = file.data, file.entries[name], interleaved
        self.part = [slice(0, size) for size in self.entry.shape]  # of each axis, what is read
        self.bits = 8 * self.entry.nbytes / math.prod(self.entry.shape)  # a weight

    def narrow(self, axis: int, part: range) -> "Quantised":
        """The tensor that has only these rows (axis 0) or columns (axis 1)."""
        less = copy(self)
        less.part = [*self.part]
        less.part[axis] = slice(part.start, part.stop)
        return less

    def get_shape(self) -> list[int]:
        return [part.stop - part.start for part in self.part]

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, everything: slice) -> torch.Tensor:
        return self.copy_to(torch.empty(self.get_shape()))

    def parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of the rows with the bytes of their blocks, (blocks, size), in our order."""
        (rows, *_), blocks, offset, nbytes = self.entry
        raw = torch.frombuffer(self.data, dtype=torch.uint8, count=nbytes, offset=offset)
        raw = raw.view(rows, -1)
        if self.interleaved:
            raw = raw[torch.arange(rows).view(self.interleaved, -1, 2).transpose(1, 2).flatten()]
        step = max(1, CHUNK * rows // math.prod(self.entry.shape))
        raw = raw[self.part[0]]
        for start in range(0, len(raw), step):
            part = slice(start, start + step)
            yield part, raw[part].reshape(-1, blocks.size)
        if hasattr(mmap, "MADV_DONTNEED"):  # pages that were read count as this process's memory
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.data.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)

    def copy_to(self, out: torch.Tensor) -> torch.Tensor:
        """Write the weights into `out`, a part at a time, so that no second copy of them is ever in
        memory.
        """
        by_row = out.view(out.shape[0], -1)
        width = math.prod(self.entry.shape[1:])
        columns = self.part[1] if len(self.part) > 1 else slice(None)
        for part, raw in self.parts():
            by_row[part].copy_(self.entry.blocks.unpack(raw).view(-1, width)[:, columns])
        return out

    def kept_bits(self) -> int:
        """4 or 6, if these are weights in so many bits and whole groups of them, else 0."""
        whole = all(edge % GROUP == 0 for edge in (self.part[-1].start, self.part[-1].stop))
        kept = self.entry.blocks.codes is not None and len(self.part) == 2 and whole
        return BITS_OF[self.entry.blocks.group] if kept else 0

    def groups(self) -> Groups:
        """The weights in the four bits or six that the file has them in."""
        N, K = self.get_shape()
        width, columns = self.entry.shape[1], self.part[1]
        size = self.entry.blocks.group
        groups = slice(columns.start // size, columns.stop // size)
        codes_NK = torch.empty(N, K, dtype=torch.uint8)
        scale_NG, zero_NG = torch.empty(2, N, K // size)
        for part, raw in self.parts():
            codes, scale, least = self.entry.blocks.codes(raw)
            codes_NK[part] = codes.view(-1, width)[:, columns]
            scale_NG[part] = scale.reshape(-1, width // size)[:, groups]
            zero_NG[part] = (least + 8 * scale).reshape(-1, width // size)[:, groups]
        return Groups(codes_NK, scale_NG, zero_NG)


# ---- the config

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # general.architecture; Mistral is written as llama
# Keys of config.json, and where an architecture's metadata say the same.
NEEDED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
MAY_HAVE = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
}
ROPE_SCALING = {
    "type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "finetuned": "rope.scaling.finetuned",
}
SAME_AS_HEAD_DIM = ("attention.value_length", "rope.dimension_count")
OLD_LINEAR = "rope.scale_linear"  # how older files give a factor
READ = {
    "vocab_size",
    OLD_LINEAR,
    *SAME_AS_HEAD_DIM,
    *NEEDED.values(),
    *MAY_HAVE.values(),
    *ROPE_SCALING.values(),
}
ONLY = {  # what is implemented for one value only
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "use_parallel_residual": False,
    "tensor_data_layout": "Meta AI original pth",
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
ROPE_FACTORS = "rope_freqs.weight"  # llama3's scaling: what each frequency is divided by
MOST_FACTORS = 1 << 12  # half of a head's size


def open_checkpoint(path: Path) -> tuple[dict, dict[str, Quantised]]:
    """What config.json would say of a GGUF file, and its tensors in the file's own names."""
    file = open_gguf(path)
    raw, heads, tensors = config_json(file), {}, {}
    if file.metadata["general.architecture"] == "llama":
        heads["attn_q"] = raw["num_attention_heads"]
        heads["attn_k"] = raw["num_key_value_heads"] or heads["attn_q"]
    for name in file.entries:
        if name != ROPE_FACTORS:
            part = name.rpartition(".")[0].rpartition(".")[2]
            tensors[name] = Quantised(file, name, heads.get(part, 0))
    return raw, tensors


def config_json(file: File) -> dict:
    """What config.json would say. ValueError names what is missing, and what is not understood."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{file.path} has {what}: use another checkpoint")

    kind = file.metadata.get("general.architecture")
    entries = file.entries
    if kind not in ARCHITECTURES:
        raise refuse(f"architecture {shorten(kind)}, wanted one of {', '.join(ARCHITECTURES)}")
    what = file.metadata.get("general.type", "model")
    if what != "model":
        raise refuse(f"general.type {shorten(what)}, wanted a model")
    said = {
        key.removeprefix(f"{kind}."): one_value(value)
        for key, value in file.metadata.items()
        if key.startswith(f"{kind}.")
    }
    for key, value in said.items():
        if key not in READ and value != ONLY.get(key):
            raise refuse(f"{shorten(key)} = {shorten(value)}, which is not implemented here")
    for key in NEEDED.values():
        if key not in said:
            raise refuse(f"no {kind}.{key}")
    if "token_embd.weight" not in entries:
        raise refuse("no token_embd.weight")
    raw = {ours: said.get(theirs) for ours, theirs in (NEEDED | MAY_HAVE).items()}
    head_dim = raw["head_dim"] or said.get("rope.dimension_count")
    for key in SAME_AS_HEAD_DIM:
        if said.get(key, head_dim) != head_dim:
            raise refuse(
                f"{key} = {shorten(said[key])}, wanted {shorten(head_dim)}, as the keys have"
            )
    if raw["sliding_window"] and kind != "llama":
        raise refuse("attention.sliding_window, which is not implemented")
    return raw | {
        "model_type": "mistral" if raw["sliding_window"] else kind,
        "head_dim": head_dim,
        "vocab_size": entries["token_embd.weight"].shape[0],
        "rope_scaling": rope_scaling(file, said),
        "tie_word_embeddings": "output.weight" not in entries,
        "attention_bias": "blk.0.attn_q.bias" in entries,
        "mlp_bias": "blk.0.ffn_up.bias" in entries,
    }


def one_value(value):
    """A value as its author wrote it: the number that an array has for each layer, and seven digits
    of a float32, so that 9.9999997e-06 is 1e-05.
    """
    if isinstance(value, memoryview):
        same = bool(value) and all(each == value[0] for each in value)
        value = value[0] if same else "different numbers"
    return float(f"{value:.7g}") if isinstance(value, float) else value


def rope_scaling(file: File, said: dict) -> dict:
    """RoPE scaling as in config.json; "factors" is ours, for the tensor that llama3's scaling
    becomes.
    """
    rope = {ours: said[theirs] for ours, theirs in ROPE_SCALING.items() if theirs in said}
    if rope.get("type", "none") == "none":
        rope = {"type": "linear"} if said.get(OLD_LINEAR, 1.0) != 1 else {}
    if rope:
        rope.setdefault("factor", said.get(OLD_LINEAR))
    if ROPE_FACTORS not in file.entries:
        return rope
    shape = file.entries[ROPE_FACTORS].shape
    if rope or len(shape) > 1 or shape[0] > MOST_FACTORS:
        raise CheckpointError(
            f"{file.path} has {ROPE_FACTORS}, wanted one row of factors and no other RoPE scaling: "
            "use another file"
        )
    return {"type": "factors", "factors": Quantised(file, ROPE_FACTORS)[:].flatten().tolist()}


# ---- the tokenizer

BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2 = [BYTES_ONLY | {"use_regex": True}]
DIGITS = {"type": "Digits", "individual_digits": True}


def split_by(pattern: str) -> list[dict]:
    where = {"Regex": pattern}
    return [
        {"type": "Split", "pattern": where, "behavior": "Isolated", "invert": False},
        BYTES_ONLY,
    ]


class Splitting(NamedTuple):
    """What tokenizer.json says beside the vocabulary, and a GGUF file only by a name,
    tokenizer.ggml.pre.
    """

    pre_tokenizers: list[dict]
    ignore_merges: bool = False
    add_bos: bool = False  # where the file does not say
    normalizers: tuple[dict, ...] = ()


LLAMA3 = Splitting(split_by(LLAMA3_PATTERN), ignore_merges=True, add_bos=True)
SPLITTINGS = {
    "gpt-2": Splitting(GPT2),
    "smollm": Splitting([DIGITS, *GPT2]),
    "qwen2": Splitting(
        split_by(LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")), normalizers=({"type": "NFC"},)
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), LLAMA3),
}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SENTENCEPIECE = Splitting([], add_bos=True, normalizers=(SPACES,))
# Of tokenizer.ggml.token_type; 5 is unused.
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
# Control tokens that end a text or a turn in whatever model has them: metadata name one or two at
# most.
ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
)
TOKEN_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def read_tokenizer(path: Path) -> Files | None:
    """The tokenizer in a GGUF file, None where it has none. ValueError: what is not understood."""
    metadata = open_gguf(path).metadata
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    model = values.get("model", "none")
    if model in ("none", "no_vocab"):
        return None
    tokens, types = values.get("tokens", []), values.get("token_type", [])
    texts = all(isinstance(token, str) for token in tokens)
    if not tokens or not texts or len(types) != len(tokens):
        raise CheckpointError(
            f"{path} has no tokens, or not a type for each of them: fetch it again"
        )
    for key in ("add_eos_token", "remove_extra_whitespaces", "precompiled_charsmap"):
        if values.get(key):
            raise CheckpointError(f"{path} has {key}, which is not implemented: use another file")
    if model == "llama":
        values = {"bos_token_id": 1, "eos_token_id": 2} | values
        splitting, merges = SENTENCEPIECE, pieces_by_score(path, values, tokens, types)
        if values.get("add_space_prefix", True):
            first = {"type": "Prepend", "prepend": "▁"}
            splitting = splitting._replace(normalizers=(first, SPACES))
    else:
        splitting, merges = splitting_of(path, values), values.get("merges", [])
    named = {
        key.removesuffix("_token_id"): id
        for key, id in values.items()
        if key.endswith("_token_id") and id in range(len(tokens))
    }
    config = {
        f"{ours}_token": tokens[named[key]] for ours, key in TOKEN_NAMES.items() if key in named
    }
    added = [
        {"id": id, "content": tokens[id], "special": kind != USER}
        for id, kind in enumerate(types)
        if kind in (UNKNOWN, CONTROL, USER)
    ]
    ends = [named[key] for key in ("eos", "eot", "eom") if key in named]
    ends += [id for id, kind in enumerate(types) if kind == CONTROL and tokens[id] in ENDS]
    vocab = {token: id for id, token in enumerate(tokens) if types[id] in (NORMAL, BYTE)}
    opens = values.get("add_bos_token", splitting.add_bos) and "bos" in named
    bos = {tokens[named["bos"]]: named["bos"]} if opens else {}
    return Files(
        tokenizer_json(splitting, vocab, merges, bos),
        None,
        config | {"chat_template": metadata.get("tokenizer.chat_template")},
        added,
        tuple(dict.fromkeys(ends)),
    )


def splitting_of(path: Path, values: dict) -> Splitting:
    """How a byte-level BPE splits text. ValueError where that, or another tokenizer, is unknown."""
    model, pre = values["model"], values.get("pre")
    if model != "gpt2":
        raise CheckpointError(
            f"{path} has the tokenizer model {shorten(model)}, wanted gpt2 or llama: use another "
            "file"
        )
    if not isinstance(pre, str) or pre not in SPLITTINGS:
        raise CheckpointError(
            f"{path} splits text as {shorten(pre)} does (tokenizer.ggml.pre), wanted one of "
            f"{', '.join(SPLITTINGS)}: use another file"
        )
    return SPLITTINGS[pre]


def pieces_by_score(path: Path, values: dict, tokens: list[str], types) -> list[list[str]]:
    """Merges of a sentencepiece model, which makes the piece with the highest score first.

    Which halves a piece is made from does not matter, so each is told whole.
    """
    scores = values.get("scores", ())
    if len(scores) != len(tokens) or not isinstance(scores, memoryview):
        raise CheckpointError(f"{path} has no score for each token: fetch it again")
    ids = [id for id, kind in enumerate(types) if kind == NORMAL]
    return [[tokens[id], ""] for id in sorted(ids, key=lambda id: -scores[id])]


def tokenizer_json(splitting: Splitting, vocab: dict, merges: list, bos: dict[str, int]) -> dict:
    """tokenizer.json of a BPE. bos: the token that opens every text, with its id, if one does."""
    parts = [{"SpecialToken": {"id": token}} for token in bos] + [{"Sequence": {"id": "A"}}]
    return {
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "ignore_merges": splitting.ignore_merges,
            "byte_fallback": True,
        },
        "normalizer": {"type": "Sequence", "normalizers": list(splitting.normalizers)},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitting.pre_tokenizers},
        "post_processor": {
            "type": "TemplateProcessing",
            "special_tokens": {token: {"ids": [id]} for token, id in bos.items()},
            "single": parts,
        },
    }
