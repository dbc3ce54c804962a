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
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.tokenizer import LLAMA3_PATTERN

# Bytes of metadata and tensor names; 262,144 tokens and their merges take 16 MB.
HEADER_LIMIT = 32 << 20
ENTRY_LIMIT = 1 << 16  # metadata keys, and tensors; a 405B model has 1,138 tensors
# Weights turned into numbers at a time: more leave the cache, fewer pay for the calls.
CHUNK = 1 << 19
GROUP = 32  # weights of a row that share a scale and a zero, in every type of four bits
INSTALL = 'pip install "gguf>=0.19"'
# Struct's letters of metadata types.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def shorten(text: object) -> str:
    """A stranger's text as it may stand in a message: quoted, on one line, not too long."""
    text = str(text)
    return repr(text) if len(text) < 150 else f"{text[:80]!r}... of {len(text)} characters"


# ---- the header


class Entry(NamedTuple):
    """A tensor as the header describes it: its shape in PyTorch's order, and its bytes."""

    shape: tuple[int, ...]
    kind: int
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

    def damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is a damaged GGUF file ({what}): fetch it again")

    def skip(self, size: int, what: str) -> int:
        """The place of the next `size` bytes, which are passed over."""
        at = self.at
        self.at += size
        if self.at > self.end:
            whole = self.end == len(self.data)
            end = (
                "the end of the file"
                if whole
                else f"the {HEADER_LIMIT >> 20} MiB that a header may have"
            )
            raise self.damaged(f"{what} has {size} bytes at byte {at}, past {end}")
        return at

    def number(self, letter: str, what: str):
        size = struct.calcsize(f"<{letter}")
        return struct.unpack_from(f"<{letter}", self.data, self.skip(size, what))[0]

    def text(self, what: str) -> str:
        size = self.number("Q", what)
        at = self.skip(size, what)
        try:
            return self.data[at : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} at byte {at} is not UTF-8") from error

    def table(self, what: str, count: int, read: Callable) -> dict:
        """`count` names, each followed by what `read` makes of the bytes after it."""
        if count > ENTRY_LIMIT:
            raise self.damaged(f"it claims to have {count} of one {what}")
        found = {}
        for _ in range(count):
            name = self.text(f"the name of a {what}")
            if name in found:
                raise self.damaged(f"it has the {what} {shorten(name)} twice")
            found[name] = read(f"{what} {shorten(name)}")
        return found

    def value(self, what: str):
        """A value of the metadata: a number, a text, or an array of one of these."""
        kind = self.number("I", what)
        if kind == ARRAY:
            kind, count = self.number("I", what), self.number("Q", what)
            if kind == STRING:
                return self.texts(count, what)
            letter = self.letter(kind, what)
            at = self.skip(struct.calcsize(letter) * count, what)
            return memoryview(self.data[at : self.at]).cast(letter)
        return self.text(what) if kind == STRING else self.number(self.letter(kind, what), what)

    def texts(self, count: int, what: str) -> list[str]:
        """An array of texts; a vocabulary has 150,000, so this loop calls as little as it can."""
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
            raise self.damaged(
                f"a text of {what} at byte {at} is not UTF-8, or not there"
            ) from error
        self.skip(at - self.at, what)
        return texts

    def letter(self, kind: int, what: str) -> str:
        if kind not in SCALARS:
            raise self.damaged(f"{what} has a value of the unknown type {kind}")
        return SCALARS[kind]

    def entry(self, what: str) -> Entry:
        """The description of a tensor; its offset counts from the end of the header."""
        axes = self.number("I", what)
        if not 1 <= axes <= 4:
            raise self.damaged(f"{what} has {axes} axes")
        shape = [self.number("Q", what) for _ in range(axes)]
        kind, offset = self.number("I", what), self.number("Q", what)
        blocks = blocks_of(kind, f"{self.path}: {what}")
        if not all(shape) or shape[0] % blocks.weights:
            raise self.damaged(
                f"{what} has rows of {shape[0]}, wanted whole blocks of {blocks.name}"
            )
        return Entry(
            tuple(reversed(shape)), kind, offset, math.prod(shape) // blocks.weights * blocks.size
        )


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
        raise ValueError(
            f"{path} is unreadable ({error}), wanted a GGUF file: fetch it again"
        ) from error
    if data[:4] != b"GGUF":
        raise ValueError(
            f"{path} is a file but not a GGUF file, wanted one, or a folder with config.json: "
            f"give {path.parent} if it holds a checkpoint"
        )
    cursor = Cursor(path, data)
    version = cursor.number("I", "its version")
    if version not in (2, 3):
        raise ValueError(
            f"{path} is GGUF version {version}, wanted 2 or 3 (little-endian): convert it again"
        )
    tensors, keys = (
        cursor.number("Q", "the number of tensors"),
        cursor.number("Q", "the number of keys"),
    )
    metadata = cursor.table("metadata key", keys, cursor.value)
    entries = cursor.table("tensor", tensors, cursor.entry)
    parts = metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise ValueError(
            f"{path} is one of {shorten(parts)} parts, wanted a whole model: join them with "
            "`llama-gguf-split --merge`"
        )
    alignment = metadata.get("general.alignment", 32)
    if alignment not in [1 << shift for shift in range(3, 17)]:
        raise cursor.damaged(f"its alignment is {shorten(alignment)}")
    start = -(-cursor.at // alignment) * alignment
    for name, entry in entries.items():
        if entry.offset % alignment or start + entry.offset + entry.nbytes > len(data):
            raise cursor.damaged(
                f"tensor {shorten(name)} has {entry.nbytes} bytes at byte {start + entry.offset} "
                f"of {len(data)}"
            )
        entries[name] = entry._replace(offset=start + entry.offset)
    return File(path, data, metadata, entries)


# ---- blocks of weights


class Blocks(NamedTuple):
    """A tensor type: weights and bytes of a block; unpack makes float32 of bytes (blocks, size)."""

    name: str
    weights: int
    size: int
    unpack: Callable[[torch.Tensor], torch.Tensor]


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
        raise ValueError(
            f"{what} has type number {kind}, which the package gguf reads, and it is not "
            f"installed: run `{INSTALL}`"
        ) from error
    try:
        known = gguf.GGMLQuantizationType(kind)
        weights, size = gguf.GGML_QUANT_SIZES[known]
        dequantize(torch.zeros(1, size, dtype=torch.uint8).numpy(), known)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"{what} has type number {kind}, which nothing here can read: use another file"
        ) from error
    return Blocks(
        known.name,
        weights,
        size,
        lambda blocks: torch.from_numpy(dequantize(blocks.numpy(), known)),
    )


def plain(dtype: torch.dtype):
    return lambda blocks: blocks.contiguous().view(dtype).float()


def halves(blocks: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """`count` float16 numbers of each block, from byte `start` on, as float32 (blocks, count)."""
    return blocks[:, start : start + 2 * count].contiguous().view(torch.float16).float()


def words(blocks: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Bytes start..end of each block as int32: shifts and masks do four bytes at a time."""
    return blocks[:, start:end].contiguous().view(torch.int32)


def masked(parts, mask: int) -> torch.Tensor:
    return torch.stack(parts, -2).bitwise_and_(mask)


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """Words (..., n) -> (..., 2, n): the low half of every byte, then the high one."""
    return masked((words, words >> 4), 0x0F0F0F0F)


def numbers(words: torch.Tensor, group: int, less: int = 0) -> torch.Tensor:
    """Bytes of words, lowered by `less`, as float32 (blocks, groups in a block, group)."""
    count, data = len(words), words.view(torch.uint8)
    data = data.view(torch.int8).sub_(less) if less else data
    return data.float().view(count, -1, group)


def fifth_bits(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The four bytes from `start` on: bit i, as 16 or 0, in byte i of the words (blocks, 2, 4)."""
    return FIFTH_BITS[blocks[:, start : start + 4].int()].view(torch.int32).unflatten(1, (2, 4))


FIFTH_BITS = torch.tensor(  # for each value of a byte, its eight bits as bytes of one int64
    [[(byte >> bit & 1) << 4 for bit in range(8)] for byte in range(256)], dtype=torch.uint8
).view(torch.int64)[:, 0]


def affine(parts: Callable) -> Callable:
    """unpack of a type whose weights are codes 0..15 of groups: code * scale + least."""

    def unpack(blocks):
        words, scale, least = parts(blocks)
        return numbers(words, GROUP).mul_(scale).add_(least)

    return unpack


def q4_0(blocks):
    scale = halves(blocks, 0, 1)[:, None]
    return nibbles(words(blocks, 2, 18)), scale, -8 * scale


def q4_1(blocks):
    return nibbles(words(blocks, 4, 20)), *halves(blocks, 0, 2)[:, None].split(1, 2)


def q5_0(blocks):
    fives = nibbles(words(blocks, 6, 22)).bitwise_or_(fifth_bits(blocks, 2))
    return numbers(fives, 32, 16).mul_(halves(blocks, 0, 1)[:, None])


def q5_1(blocks):
    scale, least = halves(blocks, 0, 2)[:, None].split(1, 2)
    fives = nibbles(words(blocks, 8, 24)).bitwise_or_(fifth_bits(blocks, 4))
    return numbers(fives, 32).mul_(scale).add_(least)


def q8_0(blocks):
    return blocks[:, 2:].view(torch.int8).float().mul_(halves(blocks, 0, 1))


def scales_and_minima(blocks):
    """Q4_K's and Q5_K's: two times eight numbers of six bits in twelve bytes, times two float16
    each.
    """
    low, middle, high = words(blocks, 4, 16).unbind(1)
    rest = [
        (high & 0x0F0F0F0F) | (low >> 2 & 0x30303030),
        (high >> 4 & 0x0F0F0F0F) | (middle >> 2 & 0x30303030),
    ]
    sixes = torch.stack((low, rest[0], middle, rest[1]), 1).bitwise_and_(0x3F3F3F3F)
    factors = sixes.view(torch.uint8).view(-1, 2, 8).float().mul_(halves(blocks, 0, 2)[:, :, None])
    return factors[..., None].unbind(1)


def q4_k(blocks):
    scale, least = scales_and_minima(blocks)
    return nibbles(words(blocks, 16, 144).unflatten(1, (4, 8))), scale, -least


def q5_k(blocks):
    scale, least = scales_and_minima(blocks)
    bits = words(blocks, 16, 48)
    fifths = masked(
        [bits << 4 - bit if bit < 4 else bits >> bit - 4 for bit in range(8)], 0x10101010
    )
    fives = nibbles(words(blocks, 48, 176).unflatten(1, (4, 8))).view(-1, 8, 8).bitwise_or_(fifths)
    return numbers(fives, 32).mul_(scale).sub_(least)


def q6_k(blocks):
    bits = words(blocks, 128, 192).unflatten(1, (2, 8))
    upper = masked((bits << 4, bits << 2, bits, bits >> 2), 0x30303030)
    sixes = (
        nibbles(words(blocks, 0, 128).unflatten(1, (2, 16))).view(-1, 2, 4, 8).bitwise_or_(upper)
    )
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(halves(blocks, 208, 1))
    return numbers(sixes, 16, 32).mul_(scale[..., None])


TYPES = {  # the layouts of blocks are ggml's (ggml-common.h)
    0: Blocks("F32", 1, 4, plain(torch.float32)),
    1: Blocks("F16", 1, 2, plain(torch.float16)),
    2: Blocks("Q4_0", 32, 18, affine(q4_0)),
    3: Blocks("Q4_1", 32, 20, affine(q4_1)),
    6: Blocks("Q5_0", 32, 22, q5_0),
    7: Blocks("Q5_1", 32, 24, q5_1),
    8: Blocks("Q8_0", 32, 34, q8_0),
    12: Blocks("Q4_K", 256, 144, affine(q4_k)),
    13: Blocks("Q5_K", 256, 176, q5_k),
    14: Blocks("Q6_K", 256, 210, q6_k),
    28: Blocks("F64", 1, 8, plain(torch.float64)),
    30: Blocks("BF16", 1, 2, plain(torch.bfloat16)),
}
FOUR_BITS = {2: q4_0, 3: q4_1, 12: q4_k}


class Groups(NamedTuple):
    """A weight in four bits: (codes - 8) * scale + zero, a scale and a zero for 32 in a row."""

    codes_NK: torch.Tensor  # uint8, 0..15
    scale_NG: torch.Tensor
    zero_NG: torch.Tensor

    def dense(self) -> torch.Tensor:
        """The numbers that are meant, (N, K) in the scales' dtype."""
        codes = self.codes_NK.to(self.scale_NG.dtype).unflatten(1, (-1, GROUP)) - 8
        return (codes * self.scale_NG[..., None] + self.zero_NG[..., None]).flatten(1)


class Quantised:
    """A tensor of the file as float32, under the interface of a safetensors slice.

    interleaved: the heads of Llama's q and k, else 0. llama.cpp turns neighbouring pairs of a head
    by RoPE: rows 2i and 2i + 1 of a head there are rows i and i + D/2 here.
    """

    def __init__(self, file: File, name: str, interleaved: int = 0):
        self.file, self.name, self.entry, self.interleaved = (
            file,
            name,
            file.entries[name],
            interleaved,
        )

    def get_shape(self) -> list[int]:
        return list(self.entry.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, everything: slice) -> torch.Tensor:
        return self.copy_to(torch.empty(self.entry.shape))

    def copy_to(self, out: torch.Tensor) -> torch.Tensor:
        """Write the weights into `out`, a part at a time, so that no second copy of them is ever in
        memory.
        """
        shape, kind, _, _ = self.entry
        blocks = blocks_of(kind, self.name)
        rows = shape[0] if len(shape) > 1 or blocks.weights == 1 else 1
        by_row = out.view(rows, -1)
        for part, raw in self.parts(rows, by_row.shape[1]):
            by_row[part].copy_(blocks.unpack(raw).view(-1, by_row.shape[1]))
        return out

    def parts(self, rows: int, width: int):
        """Slices of the rows with the bytes of their blocks, (blocks, size), in our order."""
        _, kind, offset, nbytes = self.entry
        raw = torch.frombuffer(self.file.data, dtype=torch.uint8, count=nbytes, offset=offset)
        raw = raw.view(rows, -1)
        if self.interleaved:
            raw = raw[torch.arange(rows).view(self.interleaved, -1, 2).transpose(1, 2).flatten()]
        step = max(1, CHUNK // width)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            yield part, raw[part].reshape(-1, blocks_of(kind, self.name).size)
        if hasattr(mmap, "MADV_DONTNEED"):  # pages that were read count as this process's memory
            page = mmap.PAGESIZE
            start = offset // page * page
            self.file.data.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)

    def groups(self) -> Groups | None:
        """The weights in the four bits that the file has them in; None if of another type."""
        if self.entry.kind not in FOUR_BITS or len(self.entry.shape) != 2:
            return None
        N, K = self.entry.shape
        codes_NK = torch.empty(N, K, dtype=torch.uint8)
        scale_NG, zero_NG = torch.empty(2, N, K // GROUP)
        for part, raw in self.parts(N, K):
            words, scale, least = FOUR_BITS[self.entry.kind](raw)
            codes_NK[part] = words.view(torch.uint8).view(-1, K)
            scale_NG[part] = scale.reshape(-1, K // GROUP)
            zero_NG[part] = (least + 8 * scale).reshape(-1, K // GROUP)
        return Groups(codes_NK, scale_NG, zero_NG)

    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.entry.nbytes / math.prod(self.entry.shape)


# ---- the config and the names of tensors

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # general.architecture; Mistral is written as llama
# Keys of an architecture: those read below, and those that are implemented for one value only.
READ = (
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)
ONLY = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "use_parallel_residual": False,
    "tensor_data_layout": "Meta AI original pth",
    "rope.scaling.yarn_ext_factor": 1.0,
}
ROPE_FACTORS = "rope_freqs.weight"  # llama3's scaling: what each frequency is divided by
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_checkpoint(path: str | Path) -> tuple[dict, dict[str, Quantised]]:
    """What config.json would say of a GGUF file, and its tensors in the names of Hugging Face."""
    file = open_gguf(path)
    raw = config_json(file)
    heads = {"attn_q": raw["num_attention_heads"], "attn_k": raw["num_key_value_heads"]}
    tensors = {}
    for name in file.entries.keys() - {ROPE_FACTORS}:
        match = re.fullmatch(r"(?:blk\.(0|[1-9]\d*)\.)?(\w+)\.(weight|bias)", name, re.ASCII)
        layer, part, leaf = match.groups() if match else (None, None, None)
        if part not in TENSOR_NAMES or (layer is None) != (
            part in ("token_embd", "output_norm", "output")
        ):
            raise ValueError(
                f"{path} holds {shorten(name)}, which no part of the model uses: use another file"
            )
        prefix = "" if layer is None else f"model.layers.{layer}."
        interleaved = heads.get(part, 0) if file.metadata["general.architecture"] == "llama" else 0
        tensors[f"{prefix}{TENSOR_NAMES[part]}.{leaf}"] = Quantised(file, name, interleaved)
    return raw, tensors


def gguf_name(name: str) -> str:
    """Hugging Face's name of a tensor in the words of a GGUF file."""
    stem, _, leaf = name.removeprefix("model.layers.").rpartition(".")
    layer, _, part = stem.partition(".") if name.startswith("model.layers.") else ("", "", stem)
    here = next(ours for ours, theirs in TENSOR_NAMES.items() if theirs == part)
    return f"blk.{layer}.{here}.{leaf}" if layer else f"{here}.{leaf}"


class Metadata:
    """The keys of a file's architecture. A value of another kind than asked for is an error."""

    def __init__(self, file: File, kind: str):
        self.path, self.kind = file.path, kind
        self.values = {
            key.removeprefix(f"{kind}."): value
            for key, value in file.metadata.items()
            if key.startswith(f"{kind}.")
        }
        for key, value in self.values.items():
            if key not in READ and (key not in ONLY or value != ONLY[key]):
                raise ValueError(
                    f"{self.path} has {shorten(f'{kind}.{key}')} = {shorten(value)}, which is not "
                    "implemented here: "
                    "use another checkpoint"
                )

    def get(self, key: str, default, types: tuple):
        value = self.values.get(key, default)
        if isinstance(value, memoryview) and value and all(each == value[0] for each in value):
            value = value[0]  # one for each layer, all the same
        if not isinstance(value, types) or isinstance(value, bool):
            raise ValueError(
                f"{self.path} has {self.kind}.{key} = {shorten(value)}, wanted one "
                f"{types[0].__name__}: "
                "use another checkpoint"
            )
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default, (int,))
        if value < 1:
            raise ValueError(
                f"{self.path} has {self.kind}.{key} = {value}, wanted at least 1: fetch it again"
            )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A number as its author wrote it: the shortest decimal that float32 stores so, 1e-05 for
        9.9999997e-06.
        """
        value = self.get(key, default, (float, int))
        if not math.isfinite(value):
            raise ValueError(
                f"{self.path} has {self.kind}.{key} = {value}, wanted a finite number: fetch it "
                "again"
            )
        decimals = [float(f"{value:.{digits}g}") for digits in range(1, 10)]
        same = torch.tensor(decimals, dtype=torch.float32) == torch.tensor(
            value, dtype=torch.float32
        )
        return decimals[int(same.int().argmax())]


def architecture(file: File) -> str:
    """general.architecture, if it is one that we know and the file holds a model of it; else
    ValueError.
    """
    kind = file.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{file.path} has architecture {shorten(kind)}, wanted one of "
            f"{', '.join(ARCHITECTURES)}: "
            "use such a checkpoint"
        )
    if file.metadata.get("general.type", "model") != "model":
        what = shorten(file.metadata["general.type"])
        raise ValueError(f"{file.path} has general.type {what}, wanted a model: use another file")
    if "token_embd.weight" not in file.entries:
        raise ValueError(
            f"{file.path} lacks token_embd.weight, wanted a whole model: fetch it again"
        )
    return kind


def config_json(file: File) -> dict:
    """What config.json would say. ValueError names what is missing, and what is not understood."""
    kind, entries = architecture(file), file.entries
    metadata = Metadata(file, kind)
    width, heads = metadata.whole("embedding_length"), metadata.whole("attention.head_count")
    head_dim = metadata.whole("attention.key_length", width // heads or 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.whole(key, head_dim) != head_dim:
            raise ValueError(
                f"{file.path} has {kind}.{key} = {metadata.whole(key)}, wanted {head_dim}, as the "
                "keys have: "
                "use another checkpoint"
            )
    raw = {
        "model_type": kind,
        "vocab_size": entries["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": metadata.whole("feed_forward_length"),
        "num_hidden_layers": metadata.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.whole("context_length"),
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.real("rope.freq_base", 10000.0),
        "rope_scaling": read_rope(file, metadata),
        "tie_word_embeddings": "output.weight" not in entries,
        "attention_bias": "blk.0.attn_q.bias" in entries,
        "mlp_bias": "blk.0.ffn_up.bias" in entries,
    }
    window = metadata.get("attention.sliding_window", 0, (int,))
    if window and kind != "llama":
        raise ValueError(
            f"{file.path} has {kind}.attention.sliding_window, which is not implemented: use "
            "another file"
        )
    return raw | ({"model_type": "mistral", "sliding_window": window} if window else {})


def read_rope(file: File, metadata: Metadata) -> dict:
    """RoPE scaling as in config.json; "factors" is ours, for the tensor that llama3's scaling
    becomes.
    """
    scaling = metadata.get("rope.scaling.type", "none", (str,))
    linear = metadata.real("rope.scale_linear", 1.0)  # how older files say it
    factor = metadata.real("rope.scaling.factor", linear)
    if ROPE_FACTORS in file.entries:
        if scaling != "none" or factor != 1:
            raise ValueError(
                f"{file.path} has {ROPE_FACTORS} and another RoPE scaling, wanted one: use another "
                "file"
            )
        return {
            "rope_type": "factors",
            "factors": Quantised(file, ROPE_FACTORS)[:].flatten().tolist(),
        }
    if scaling == "yarn":
        raw = {"rope_type": "yarn", "factor": factor}
        raw["original_max_position_embeddings"] = metadata.whole(
            "rope.scaling.original_context_length", metadata.whole("context_length")
        )
        for key in ("beta_fast", "beta_slow"):
            raw[key] = metadata.real(
                f"rope.scaling.yarn_{key}", {"beta_fast": 32.0, "beta_slow": 1.0}[key]
            )
        amplitude = metadata.real(
            "rope.scaling.attn_factor", metadata.real("rope.scaling.yarn_attn_factor", 1.0)
        )
        # Llama.cpp multiplies yarn's own; config.json replaces it.
        if amplitude != 1 and factor > 0:
            raw["attention_factor"] = amplitude * (0.1 * math.log(max(factor, 1.0)) + 1)
        return raw
    if scaling == "linear" or (
        scaling == "none" and "rope.scale_linear" in metadata.values and factor != 1
    ):
        return {"rope_type": "linear", "factor": factor}
    if scaling != "none":
        raise ValueError(
            f"{file.path} has RoPE scaling {shorten(scaling)}, wanted none, linear or yarn"
        )
    return {}


# ---- the tokenizer

BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2 = [BYTES_ONLY | {"use_regex": True}]
DIGITS = {"type": "Digits", "individual_digits": True}


def split_by(pattern: str) -> list[dict]:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return [split, BYTES_ONLY]


QWEN2 = split_by(LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"))
LLAMA3 = split_by(LLAMA3_PATTERN)


class Splitting(NamedTuple):
    """What tokenizer.json says beside the vocabulary, and a GGUF file only by a name,
    tokenizer.ggml.pre.
    """

    pre_tokenizers: list[dict]
    ignore_merges: bool = False
    add_bos: bool = False  # where the file does not say
    normalizers: tuple[dict, ...] = ()


SPLITTINGS = {
    "gpt-2": Splitting(GPT2),
    "smollm": Splitting([DIGITS, *GPT2]),
    "qwen2": Splitting(QWEN2, normalizers=({"type": "NFC"},)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3"), Splitting(LLAMA3, ignore_merges=True, add_bos=True)
    ),
}
NORMAL, UNKNOWN, CONTROL, USER = 1, 2, 3, 4  # of tokenizer.ggml.token_type; 5 is unused, 6 a byte
# Control tokens that end a text or a turn in whatever model has them: metadata names one or two at
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


class TokenizerFiles(NamedTuple):
    """What Hugging Face's files would say: tokenizer.json or else tokenizer.model, and
    tokenizer_config.json.
    """

    spec: dict
    model: bytes | None
    config: dict
    added: list[dict]
    eos_ids: tuple[int, ...]


def read_tokenizer(path: str | Path) -> TokenizerFiles | None:
    """The tokenizer in a GGUF file, None where it has none. ValueError: what is not understood."""
    metadata = open_gguf(path).metadata
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    model = values.get("model", "none")
    if model in ("none", "no_vocab"):
        return None
    known = model in ("gpt2", "llama")
    if not known or values.get("add_eos_token"):
        got = "add_eos_token" if known else f"the tokenizer model {shorten(model)}"
        raise ValueError(
            f"{path} has {got}, wanted gpt2 or llama that adds nothing after a text: use another "
            "file"
        )
    tokens, types = values.get("tokens", []), values.get("token_type", [])
    texts = all(isinstance(token, str) for token in tokens)
    if not tokens or not texts or len(types) != len(tokens):
        raise ValueError(f"{path} has no tokens, or not a type for each of them: fetch it again")
    added = [
        {"id": id, "content": tokens[id], "special": kind != USER}
        for id, kind in enumerate(types)
        if kind in (UNKNOWN, CONTROL, USER)
    ]
    named = {
        key: values[f"{key}_token_id"]
        for key in ("bos", "eos", "unknown", "padding", "eot", "eom")
        if values.get(f"{key}_token_id") in range(len(tokens))
    }
    config = {"chat_template": metadata.get("tokenizer.chat_template")}
    short = {"unknown": "unk", "padding": "pad"}
    config |= {f"{short.get(key, key)}_token": tokens[id] for key, id in named.items()}
    ends = [named[key] for key in ("eos", "eot", "eom") if key in named]
    ends += [id for id, kind in enumerate(types) if kind == CONTROL and tokens[id] in ENDS]
    spec, data = {}, None
    if model == "llama":
        data = sentencepiece_model(path, values, tokens, types)
        config["add_bos_token"] = bool(values.get("add_bos_token", True))
    else:
        splitting = splitting_of(path, values)
        before = named.get("bos") if values.get("add_bos_token", splitting.add_bos) else None
        spec = byte_level_spec(splitting, tokens, types, values.get("merges", []), before)
    return TokenizerFiles(spec, data, config, added, tuple(dict.fromkeys(ends)))


def splitting_of(path: str | Path, values: dict) -> Splitting:
    pre = values.get("pre")
    if not isinstance(pre, str) or pre not in SPLITTINGS:
        raise ValueError(
            f"{path} splits text as {shorten(pre)} does (tokenizer.ggml.pre), wanted one of "
            f"{', '.join(SPLITTINGS)}: "
            "use another file"
        )
    return SPLITTINGS[pre]


def byte_level_spec(
    splitting: Splitting, tokens: list[str], types, merges: list[str], before: int | None
) -> dict:
    """tokenizer.json of a byte-level BPE; `before` is the id that opens every text, or None.

    Tokens that are unused or added are not in its vocabulary.
    """
    vocab = {
        t: id for id, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL
    }
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    spec = {
        "model": model | {"ignore_merges": splitting.ignore_merges},
        "normalizer": {"type": "Sequence", "normalizers": list(splitting.normalizers)},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitting.pre_tokenizers},
    }
    if before is not None:
        bos = tokens[before]
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "special_tokens": {bos: {"ids": [before]}},
            "single": [{"SpecialToken": {"id": bos}}, {"Sequence": {"id": "A"}}],
        }
    return spec


def sentencepiece_model(path: str | Path, values: dict, tokens: list[str], types) -> bytes:
    """sentencepiece's tokenizer.model, a protobuf message, from pieces, their scores and types."""

    def field(number: int, data: bytes) -> bytes:
        size, length = len(data), []
        while size > 127:
            length.append(size & 127 | 128)
            size >>= 7
        return bytes([number << 3 | 2, *length, size]) + data

    scores = values.get("scores", ())
    if (
        len(scores) != len(tokens)
        or not isinstance(scores, memoryview)
        or values.get("precompiled_charsmap")
    ):
        raise ValueError(
            f"{path} has no score for each token, or a map of characters: use another file"
        )
    pieces = [
        field(1, field(1, token.encode()) + struct.pack("<BfBB", 0x15, score, 0x18, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    ]
    trainer = bytes([3 << 3, 2, 0x98, 2, 1])  # model_type: BPE; byte_fallback (field 35): true
    prefix, squeeze = (
        values.get("add_space_prefix", True),
        values.get("remove_extra_whitespaces", False),
    )
    normalizer = field(1, b"identity") + bytes(
        [3 << 3, bool(prefix), 4 << 3, bool(squeeze), 5 << 3, 1]
    )
    return b"".join(pieces) + field(2, trainer) + field(3, normalizer)
