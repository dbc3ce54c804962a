"""llama.cpp's GGUF files: a checkpoint whose config, tokenizer and quantised weights are in one file.

Knows: the layout of the file, the names and numbers in its metadata, its quantised blocks. Does not
know: parameters (weights.py), how text is encoded (tokenizer.py). Read next: weights.py.

The header is read here, with a bound on everything that a file may claim: the `gguf` package trusts
it, and takes 8 s for SmolLM2's. The package turns the blocks of the rarer types into numbers; the
common ones are done here by torch, which is several times as fast and gives the same bits.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.tokenizer import LLAMA3_PATTERN

HEADER_LIMIT = 32 << 20  # bytes of metadata and tensor names; a vocabulary of 262,144 tokens needs 16 MB
ENTRY_LIMIT = 1 << 16  # metadata keys, tensors; a 405B model has 1,138 tensors
CHUNK = 1 << 17  # weights turned into numbers at a time: what fits a core's cache is several times faster
INSTALL = 'pip install "gguf>=0.19"'
SCALARS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}  # struct's letter of a metadata type
STRING, ARRAY = 8, 9
# Number of a tensor type: its name, weights in a block, bytes of a block.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 28: ("F64", 1, 8),
    30: ("BF16", 1, 2),
}  # fmt: skip
MODEL_TYPES = ("llama", "qwen2", "qwen3")  # general.architecture; Mistral is written as llama
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


class Entry(NamedTuple):
    """A tensor as the header describes it: shape in PyTorch's order, and where its bytes are."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


class File(NamedTuple):
    """A GGUF file that is mapped and whose header has been checked against its size."""

    path: Path
    data: mmap.mmap
    metadata: dict
    entries: dict[str, Entry]


# ---- the header


class Cursor:
    """Reads the header from left to right; what would leave it is an error, before anything is allocated."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0
        self.end = min(len(data), HEADER_LIMIT)

    def damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged or is not a GGUF file ({what}): fetch it again")

    def skip(self, size: int, what: str) -> int:
        """The place of the next `size` bytes."""
        at, self.at = self.at, self.at + size
        if self.at > self.end:
            short = self.end == len(self.data)
            where = "the end of the file" if short else f"the {HEADER_LIMIT >> 20} MiB that a header may have"
            raise self.damaged(f"{what} of {size} bytes at byte {at} runs past {where}")
        return at

    def number(self, letter: str, what: str):
        return struct.unpack_from(f"<{letter}", self.data, self.skip(struct.calcsize(letter), what))[0]

    def text(self, what: str) -> str:
        at = self.skip(self.number("Q", f"the length of {what}"), what)
        try:
            return self.data[at : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8") from error

    def count(self, what: str) -> int:
        count = self.number("Q", f"the number of {what}")
        if count > ENTRY_LIMIT:
            raise self.damaged(f"it claims {count} {what}")
        return count

    def value(self, key: str):
        """A value of the metadata: a number, a text, or a list of one of these (numbers as a memoryview)."""
        what = f"the value of {shorten(key)}"
        kind = self.number("I", what)
        if kind == STRING:
            return self.text(what)
        if kind != ARRAY:
            return self.number(self.letter(kind, what), what)
        kind, count = self.number("I", what), self.number("Q", what)
        if kind == STRING:
            self.at = self.skip(8 * count, what)  # every text has at least its length
            return [self.text(what) for _ in range(count)]
        letter = self.letter(kind, what)
        at = self.skip(struct.calcsize(letter) * count, what)
        return memoryview(self.data[at : self.at]).cast(letter)

    def letter(self, kind: int, what: str) -> str:
        if kind not in SCALARS:
            raise self.damaged(f"{what} has the unknown type {kind}")
        return SCALARS[kind]

    def entry(self) -> tuple[str, Entry]:
        """The description of a tensor; its offset counts from where the header ends."""
        name = self.text("a tensor's name")
        dims = self.number("I", f"the shape of {shorten(name)}")
        if not 1 <= dims <= 4:
            raise self.damaged(f"tensor {shorten(name)} has {dims} axes")
        shape = [self.number("Q", f"the shape of {shorten(name)}") for _ in range(dims)]
        kind, offset = self.number("I", "a tensor's type"), self.number("Q", "a tensor's offset")
        return name, Entry(tuple(reversed(shape)), kind, offset, tensor_bytes(name, shape, kind, self.path))


def open_gguf(path: str | Path) -> File:
    """A mapped GGUF file. ValueError in one sentence if it is not one, or if its parts do not fit into it."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise ValueError(f"{path} is unreadable ({error}), wanted a GGUF file: fetch it again") from error
    if data[:4] != b"GGUF":
        raise ValueError(
            f"{path} is a file but not a GGUF file, wanted one or a folder with config.json: "
            f"give {path.parent} if it holds a checkpoint"
        )
    cursor = Cursor(path, data)
    cursor.at = 4
    version = cursor.number("I", "its version")
    if version not in (2, 3):
        raise ValueError(f"{path} is GGUF version {version}, wanted 2 or 3 (little-endian): convert it again")
    tensors, keys = cursor.count("tensors"), cursor.count("metadata keys")
    metadata, entries = {}, {}
    for _ in range(keys):
        key = cursor.text("a metadata key")
        if key in metadata:
            raise cursor.damaged(f"it has {shorten(key)} twice")
        metadata[key] = cursor.value(key)
    for _ in range(tensors):
        name, entry = cursor.entry()
        if name in entries:
            raise cursor.damaged(f"it has tensor {shorten(name)} twice")
        entries[name] = entry
    if metadata.get("split.count", 0) not in (0, 1):
        raise ValueError(f"{path} is one of {metadata['split.count']} parts: join them with llama-gguf-split --merge")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment not in (1 << shift for shift in range(17)):
        raise cursor.damaged(f"its alignment is {shorten(str(alignment))}")
    start = -(-cursor.at // alignment) * alignment
    for name, entry in entries.items():
        if start + entry.offset + entry.nbytes > len(data):
            raise cursor.damaged(f"tensor {shorten(name)} runs past the end of the file")
        entries[name] = entry._replace(offset=start + entry.offset)
    return File(path, data, metadata, entries)


def tensor_bytes(name: str, shape: list[int], kind: int, path: Path) -> int:
    """Bytes of a tensor in the file. ValueError for types that nobody here can read."""
    label, block, size = block_of(kind, f"{path}: tensor {shorten(name)}")
    if shape[0] % block:
        raise ValueError(
            f"{path} is damaged: tensor {shorten(name)} has rows of {shape[0]}, which blocks of {block} ({label}) "
            "do not fill: fetch it again"
        )
    return math.prod(shape) // block * size


def block_of(kind: int, what: str) -> tuple[str, int, int]:
    """Name of a tensor type, weights in a block of it, bytes of a block."""
    if kind in TYPES:
        return TYPES[kind]
    package = import_package(f"{what} has a type (number {kind})")
    try:
        known = package.GGMLQuantizationType(kind)
        return known.name, *package.GGML_QUANT_SIZES[known]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{what} has the unknown type {kind}: use another file of this model") from error


def import_package(what: str):
    """The `gguf` package, which a plain installation does without."""
    try:
        import gguf
        import gguf.quants  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{what} that the package gguf reads, which is not installed: {INSTALL}") from error
    return gguf


def shorten(name: str) -> str:
    """A stranger's text as it may stand in a message: quoted, on one line, not too long."""
    return repr(name) if len(name) < 100 else f"{name[:80]!r}... of {len(name)} characters"


# ---- weights


class Quantised:
    """A tensor of the file as floats, under the interface of a safetensors slice.

    rotary: the heads of a q or k projection of Llama, else 0. There the rows of a head are interleaved,
    as RoPE of neighbouring pairs wants them: rows 2i and 2i + 1 are rows i and i + D/2 here.
    """

    def __init__(self, file: File, name: str, rotary: int = 0):
        self.file, self.name, self.entry, self.rotary = file, name, file.entries[name], rotary

    def get_shape(self) -> list[int]:
        return list(self.entry.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, everything) -> torch.Tensor:
        return self.copy_to(torch.empty(self.entry.shape))

    def copy_to(self, out: torch.Tensor, spread=map) -> torch.Tensor:
        """Write the weights into `out`, a few rows at a time. spread: map, or that of an executor."""
        shape, kind = self.entry.shape, self.entry.kind
        rows, target = (1, out[None]) if len(shape) == 1 else (shape[0], out)
        raw = torch.frombuffer(self.file.data, dtype=torch.uint8, count=self.entry.nbytes, offset=self.entry.offset)
        raw = raw.view(rows, -1)
        if self.rotary and rows == 1:
            out.copy_(floats(raw, kind)[0][self.order(shape[0])])
            return out
        if self.rotary:
            raw = raw[self.order(rows)]
        step = max(1, CHUNK // shape[-1])

        def fill(start: int) -> None:
            target[start : start + step].copy_(floats(raw[start : start + step], kind))

        list(spread(fill, range(0, rows, step)))
        return out

    def order(self, rows: int) -> torch.Tensor:
        """For each row here, the row of the file."""
        return torch.arange(rows).view(self.rotary, -1, 2).transpose(1, 2).flatten()


def floats(raw: torch.Tensor, kind: int) -> torch.Tensor:
    """Bytes (rows, bytes of a row) of one tensor type -> float32 (rows, weights of a row)."""
    label, block, size = block_of(kind, "a tensor")
    if label in PLAIN:
        return raw.contiguous().view(PLAIN[label]).float()
    blocks = raw.reshape(-1, size)
    if label in UNPACK:
        return UNPACK[label](blocks).view(len(raw), -1)
    package = import_package(f"tensors of type {label} need numbers")
    return torch.from_numpy(package.quants.dequantize(raw.numpy(), package.GGMLQuantizationType(kind)))


PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def halves(blocks: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """float16 numbers of every block, from byte `start` on, as float32 (blocks, count)."""
    return blocks[:, start : start + 2 * count].contiguous().view(torch.float16).float()


def nibbles(data: torch.Tensor) -> torch.Tensor:
    """(blocks, n) bytes -> (blocks, 2 n): the low halves, then the high ones."""
    return torch.cat((data & 15, data >> 4), 1)


def unpack_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8) * halves(blocks, 0, 1)


def unpack_q4_1(blocks: torch.Tensor) -> torch.Tensor:
    scale, least = halves(blocks, 0, 2).split(1, 1)
    return (nibbles(blocks[:, 4:]).float().mul_(scale)).add_(least)


UNPACK = {"Q8_0": unpack_q8_0, "Q4_1": unpack_q4_1}


# ---- config and names


def open_checkpoint(path: str | Path) -> tuple[dict, dict[str, Quantised]]:
    """The config.json that the metadata amounts to, and the tensors, in the names of Hugging Face."""
    file = open_gguf(path)
    raw = config_of(file)
    rotary = {"attn_q": raw["num_attention_heads"], "attn_k": raw["num_key_value_heads"]}
    tensors = {}
    for name in file.entries:
        if name == "rope_freqs.weight":  # llama3's factors are part of the config
            continue
        layer, _, rest = name.removeprefix("blk.").partition(".") if name.startswith("blk.") else ("", "", name)
        part, _, leaf = rest.rpartition(".")
        known = part in NAMES and leaf in ("weight", "bias")
        prefix = f"model.layers.{layer}." if layer else ""
        heads = rotary.get(part, 0) if raw["model_type"] == "llama" else 0
        tensors[f"{prefix}{NAMES[part]}.{leaf}" if known else name] = Quantised(file, name, heads)
    return raw, tensors


def config_of(file: File) -> dict:
    """config.json of the model in a GGUF file. ValueError names what is not understood."""
    metadata, entries = file.metadata, file.entries
    kind = metadata.get("general.architecture")
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"{file.path} has architecture {shorten(str(kind))}, wanted one of {', '.join(MODEL_TYPES)}: "
            "use such a checkpoint"
        )

    def get(key: str, default=None):
        return metadata.get(f"{kind}.{key}", default)

    heads, width = get("attention.head_count"), get("embedding_length")
    raw = {
        "model_type": kind,
        "vocab_size": entries["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", width // heads),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": short(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": short(get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in entries,
        "attention_bias": "blk.0.attn_q.bias" in entries,
        "mlp_bias": "blk.0.ffn_gate.bias" in entries,
    }
    return raw


def short(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    decimals = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next((each for each in decimals if struct.pack("f", each) == struct.pack("f", value)), value)


# ---- tokenizer

GPT2 = [{"type": "ByteLevel", "add_prefix_space": False}]
SMOLLM = [{"type": "Digits", "individual_digits": True}, *GPT2]


def split_by(pattern: str) -> list[dict]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]


QWEN2 = split_by(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3 = split_by(LLAMA3_PATTERN)
# tokenizer.ggml.pre -> how text is split, whether a piece that is a token stays whole, whether BOS comes first if the
# file does not say, and the normalizer, which the file leaves out.
PRE = {
    "gpt-2": (GPT2, False, False, []), "smollm": (SMOLLM, False, False, []),
    "qwen2": (QWEN2, False, False, [{"type": "NFC"}]),
    "llama-bpe": (LLAMA3, True, True, []), "llama3": (LLAMA3, True, True, []), "llama-v3": (LLAMA3, True, True, []),
}  # fmt: skip
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
# Names of control tokens that end a text or a turn, in any model: metadata names one of them at most.
ENDS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>",
)  # fmt: skip


class TokenizerFiles(NamedTuple):
    """What Hugging Face's files would say: tokenizer.json or else tokenizer.model, and tokenizer_config.json."""

    spec: dict
    model: bytes | None
    config: dict
    added: list[dict]
    eos_ids: tuple[int, ...]


def tokenizer_of(path: str | Path) -> TokenizerFiles | None:
    """The tokenizer in a GGUF file; None where it has none. ValueError names what is not understood."""
    file = open_gguf(path)
    metadata = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    kind, tokens = metadata.get("model", "none"), metadata.get("tokens")
    if kind in ("none", "no_vocab") or tokens is None:
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{path} has a tokenizer of model {shorten(str(kind))}, wanted gpt2 or llama: use another file")
    if metadata.get("add_eos_token"):
        raise ValueError(f"{path} has add_eos_token, wanted a tokenizer that adds nothing after a text: use another file")
    types = metadata.get("token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"{path} has {len(tokens)} tokens but {len(types)} token types: fetch it again")
    added = [
        {"id": id, "content": tokens[id], "special": kind != USER}
        for id, kind in enumerate(types)
        if kind in (UNKNOWN, CONTROL, USER)
    ]
    config = {"chat_template": metadata.get("tokenizer.chat_template")}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        id = metadata.get(f"{key}_token_id")
        if isinstance(id, int) and 0 <= id < len(tokens):
            config[f"{name}_token"] = tokens[id]
    if kind == "llama":
        config["add_bos_token"] = bool(metadata.get("add_bos_token", True))
        return TokenizerFiles({}, pieces_model(metadata, tokens, types), config, added, eos_of(metadata, tokens, types))
    spec, add_bos = byte_level_spec(path, metadata, tokens, types)
    bos = config.get("bos_token")
    if metadata.get("add_bos_token", add_bos) and bos:
        part = {"special_tokens": {bos: {"ids": [metadata["bos_token_id"]]}}, "type": "TemplateProcessing"}
        spec["post_processor"] = part | {"single": [{"SpecialToken": {"id": bos}}, {"Sequence": {"id": "A"}}]}
    return TokenizerFiles(spec, None, config, added, eos_of(metadata, tokens, types))


def byte_level_spec(path, metadata: dict, tokens: list[str], types) -> tuple[dict, bool]:
    """tokenizer.json of a byte-level BPE, and whether BOS comes first where the file does not say."""
    pre = metadata.get("pre")
    if pre not in PRE:
        raise ValueError(
            f"{path} splits text by {shorten(str(pre))} (tokenizer.ggml.pre), wanted one of {', '.join(PRE)}: "
            "use another file of this model"
        )
    splitters, whole, add_bos, normalizers = PRE[pre]
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    vocab = {token: id for id, (token, kind) in enumerate(zip(tokens, types)) if kind == NORMAL}
    model = {"type": "BPE", "vocab": vocab, "merges": metadata.get("merges", []), "ignore_merges": whole}
    return {
        "model": model,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splitters, bytes_only]},
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
    }, add_bos


def eos_of(metadata: dict, tokens: list[str], types) -> tuple[int, ...]:
    """Ids that end a text or a turn: those that the metadata names, and the control tokens known to do so."""
    ids = [metadata.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    ids += [id for id, kind in enumerate(types) if kind == CONTROL and tokens[id] in ENDS]
    return tuple(dict.fromkeys(id for id in ids if isinstance(id, int) and 0 <= id < len(tokens)))


def pieces_model(metadata: dict, tokens: list[str], types) -> bytes:
    """sentencepiece's tokenizer.model, a protobuf message, from the pieces and their scores."""

    def field(number: int, data: bytes) -> bytes:
        size, length = len(data), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + data

    scores = metadata["scores"]
    parts = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        parts.append(field(1, field(1, token.encode()) + struct.pack("<Bf", 0x15, score) + bytes([0x18, kind])))
    trainer = b"\x18\x02" + b"\x98\x02\x01"  # model_type: BPE, byte_fallback: true
    prefix = bool(metadata.get("add_space_prefix", True))
    squeeze = bool(metadata.get("remove_extra_whitespaces", False))
    normalizer = field(1, b"identity") + bytes([0x18, prefix, 0x20, squeeze, 0x28, 1])
    return b"".join(parts) + field(2, trainer) + field(3, normalizer)
