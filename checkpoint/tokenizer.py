"""Text to token ids and back, for checkpoints of the Llama family: Hugging Face's folders and GGUF
files.

Knows: byte-level BPE from tokenizer.json (Llama 3, Qwen, SmolLM2) and Llama 3's own tokenizer.model
(base64 and rank); sentencepiece's tokenizer.model (Llama 2, TinyLlama, Mistral) and the
tokenizer.json made from one; special tokens, BOS, EOS, streaming, chat templates. tokenizer.json
wins where both exist. What is in a file decides, never a folder's name, and what is not supported
is refused: a tokenizer that is nearly right makes a model speak gibberish. The reference is
transformers 5 (AutoTokenizer), but a tokenizer.model alone is encoded as its authors do: text that
opens with a space keeps it, BOS is on unless tokenizer_config.json has "add_bos_token": false, and
text after a special token opens with "▁" unless it has "legacy": false. (transformers 5 drops that
space, and takes both flags for false where they lack.)

Does not know: models, devices, tensors. Read next: chat.py.
"""

import base64
import codecs
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from checkpoint.chat import render_chat
from checkpoint.config import CheckpointError, read_file, read_json, shorten

MAX_FILE_BYTES = 64 << 20  # the largest tokenizer.json in use (Gemma's) has 33 MB
MAX_TOKEN_ID = 1 << 24  # no loop here gets longer because a file made up an id
# A pattern's repetitions are written out when it is compiled. Published ones have {1,3}.
MAX_PATTERN, MAX_REPEATED = 1 << 13, 1 << 10
SPLIT_SECONDS = 60  # of one pattern on one text; published ones take a second for 2 to 5 MB
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3's tokenizer.model holds ranks only; how it splits text and its special tokens were
# published as code. The special tokens are Llama 3.1's; in 3.0 finetune_right_pad_id, eom_id and
# python_tag were reserved names too.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "reserved_special_token_2",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    *(f"reserved_special_token_{number}" for number in range(3, 248)),
]
# (text without added tokens, whether nothing stands before it) -> ids
Encoder = Callable[[str, bool], list[int]]
# Bytes by id; whether decoded text opens with a space that is not in it.
Coder = tuple[Encoder, dict[int, bytes], bool]


class Files(NamedTuple):
    """What the files of a tokenizer say: tokenizer.json or else tokenizer.model, and
    tokenizer_config.json; the added tokens that are named elsewhere; the ids that end a text.
    """

    spec: dict
    model: bytes | None
    config: dict
    added: list[dict]
    eos_ids: tuple[int, ...]


def _read_json(path: Path) -> dict:
    """The object in a file, {} where there is none. Devices and pipes, which may have no end, are
    no files.
    """
    return read_json(path, MAX_FILE_BYTES) if path.is_file() else {}


def _are_ids(values: Iterable) -> bool:
    """Whether tokens can have all of these ids."""
    return all(type(value) is int and 0 <= value < MAX_TOKEN_ID for value in values)


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a text: eos_token_id, an id or a list, of generation_config.json, else of
    config.json, else (). A GGUF file names them with its tokenizer's tokens only.
    """
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not _are_ids(ids):
            raise CheckpointError(
                f"{name} in {folder} has eos_token_id {shorten(value)}, wanted a token id or a "
                "list: correct it"
            )
        if ids:
            return tuple(dict.fromkeys(ids))
    return ()


def _bpe(
    id_of: dict[bytes, int],
    merged: list[bytes],
    patterns: list[str | None],
    ignore_merges: bool = False,
    unknown: Iterable[int] = (),
    prepare: Callable[[str, bool], str] = lambda text, first: text,
) -> Encoder:
    """Byte-pair encoding by tiktoken: prepare the text, split it by pattern after pattern, merge
    each piece's bytes.

    tiktoken merges the neighbours whose union has the lowest rank, so `merged` is in the order of
    merges. Ids need not follow that order (special tokens may come first), nor exist: what has none
    is written in bytes, and a byte that has none as `unknown`.
    """
    import regex  # here and below, what only some checkpoints need is imported where it is used
    import tiktoken

    def ids_of(token: bytes) -> list[int]:
        if token in id_of:
            return [id_of[token]]
        return [id for byte in token for id in ids_of(bytes([byte]))] if token[1:] else [*unknown]

    ranked = list(dict.fromkeys([bytes([byte]) for byte in range(256)] + merged))
    ids = list(map(ids_of, ranked))
    # Text is split before tiktoken sees it, so its own split, pat_str, leaves every piece whole.
    ranks = {token: rank for rank, token in enumerate(ranked)}
    merge = tiktoken.Encoding(
        "ssd", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={}
    ).encode_ordinary
    steps = [None if pattern is None else regex.compile(pattern) for pattern in patterns]

    def split(step: "regex.Pattern | None", text: str) -> list[str]:
        if step is None:  # ByteLevel's add_prefix_space
            return [text if text.startswith(" ") else " " + text]
        found = step.finditer(text, timeout=SPLIT_SECONDS)
        try:
            ends = sorted({0, len(text), *(end for match in found for end in match.span())})
        except TimeoutError:
            wanted = f"one that splits a text in {SPLIT_SECONDS} s"
            raise _unsupported("pattern", step.pattern, wanted) from None
        return [text[start:end] for start, end in zip(ends, ends[1:])]

    def encode(text: str, first: bool) -> list[int]:
        pieces = [prepare(text, first)]
        out = []
        # Each step sees one piece at a time: a look-ahead never sees past an earlier cut.
        for step in steps:
            pieces = [part for piece in pieces for part in split(step, piece)]
        for piece in pieces:  # Llama 3 ignores merges for a piece that is a token: it stays whole
            whole = id_of.get(piece.encode()) if ignore_merges else None
            out += [id for rank in merge(piece) for id in ids[rank]] if whole is None else [whole]
        return out

    return encode


def _from_ranks(data: bytes) -> tuple[Coder, list[dict]]:
    """Llama 3's tokenizer.model, lines of a token in base64 and its rank, which is its id; and its
    added tokens.
    """
    lines = map(bytes.split, data.splitlines())
    tokens = {int(rank): base64.b64decode(token, validate=True) for token, rank in lines}
    id_of = {token: id for id, token in tokens.items()}
    merged = [tokens[id] for id in sorted(tokens)]
    encode = _bpe(id_of, merged, [LLAMA3_PATTERN], ignore_merges=True)
    special = enumerate(LLAMA3_SPECIAL, max(tokens) + 1)
    added = [{"id": id, "content": f"<|{name}|>", "special": True} for id, name in special]
    return (encode, tokens, False), added


def _from_pieces(data: bytes, legacy: bool) -> tuple[Coder, list[dict]]:
    """sentencepiece's tokenizer.model, and its control tokens. `legacy`: "▁" opens text after one
    of those, too.
    """
    from sentencepiece import SentencePieceProcessor

    sp = SentencePieceProcessor(model_proto=data)
    # Protobuf messages add up: these four bytes, appended, say normalizer_spec { add_dummy_prefix:
    # false }.
    later = sp if legacy else SentencePieceProcessor(model_proto=data + b"\x1a\x02\x18\x00")
    ids = range(len(sp))
    tokens = {id: _piece_bytes(sp.id_to_piece(id), sp.is_byte(id)) for id in ids}
    added = [
        {"id": id, "content": sp.id_to_piece(id), "special": True}
        for id in ids
        if sp.is_control(id) or sp.is_unknown(id)
    ]
    encode = lambda text, first: (sp if first else later).encode(text)  # noqa: E731
    return (encode, tokens, sp.normalize("a") == "▁a"), added


def _piece_bytes(piece: str, is_byte: bool) -> bytes:
    # A byte is spelt <0x0A>.
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()


def _unsupported(part: str, got: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"tokenizer: got {part} {shorten(got)}, wanted {wanted}: use another checkpoint"
    )


def _patterns(splitters: list[dict]) -> list[str | None]:
    """What each pre_tokenizer splits by; None for a space that is put before the text."""
    patterns: list[str | None] = []
    for node in splitters:
        match node:
            case {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}:
                found = pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
                counts = map(int, re.findall(r"(?<=[{,])\d+(?=[,}])", found[:MAX_PATTERN]))
                if found[MAX_PATTERN:] or math.prod(filter(None, counts)) > MAX_REPEATED:
                    raise _unsupported("pattern", found, "one with few repetitions, as {1,3}")
                patterns.append(found)
            case {"type": "Digits", "individual_digits": single}:
                patterns.append(r"\p{N}" if single else r"\p{N}+")
            case {"type": "ByteLevel", "add_prefix_space": space}:
                patterns += [None] * bool(space)
                patterns += [GPT2_PATTERN] * bool(node.get("use_regex", True))
            case _:
                raise _unsupported(
                    "pre_tokenizer", node, "Split (Isolated, not inverted), Digits or ByteLevel"
                )
    return patterns


def _byte_level(
    model: dict, normalizers: list[dict], splitters: list[dict], merged: list[str]
) -> Coder:
    """tokenizer.json of Llama 3, Qwen, GPT-2: tokens are bytes, spelt in an alphabet of 256 visible
    characters.
    """
    # Visible bytes stand for themselves; the rest are spelt 256, 257, ... in their order.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = dict.fromkeys(hidden, "\uffff")
    alphabet |= {256 + place: byte for place, byte in enumerate(hidden)}
    if any(node != {"type": "NFC"} for node in normalizers):
        raise _unsupported("normalizer", normalizers, "NFC or none")
    vocab = model["vocab"]
    # What is not spelt in the alphabet is an added token, found only as it is written: any bytes
    # that differ will do.
    tokens = {
        id: token.translate(alphabet).encode("latin-1", "backslashreplace")
        for token, id in vocab.items()
    }
    encode = _bpe(
        {token: id for id, token in tokens.items()},
        [tokens[vocab[token]] for token in merged],
        _patterns(splitters),
        bool(model.get("ignore_merges")),
        [vocab[name] for name in [model.get("unk_token")] if name in vocab],
        lambda text, first: unicodedata.normalize("NFC", text) if normalizers else text,
    )
    return encode, tokens, False


def _spacing(nodes: list[dict]) -> tuple[str, bool]:
    """When "▁" opens a text (always, first or never), and whether one "▁" will do."""
    scheme, metaspace = "never", False
    for node in nodes:
        match node:
            case {"type": "Prepend", "prepend": "▁"}:
                scheme = "always"
            case {
                "type": "Metaspace",
                "replacement": "▁",
                "split": False,
                "prepend_scheme": scheme,
            }:
                metaspace = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass  # done below in any case
            case _:
                raise _unsupported(
                    "normalizer or pre_tokenizer",
                    node,
                    "Llama's: Prepend, Replace, unsplit Metaspace",
                )
    return scheme, metaspace


def _character_level(
    model: dict, normalizers: list[dict], splitters: list[dict], merged: list[str]
) -> Coder:
    """tokenizer.json made from a sentencepiece model: merges characters, and spells those that it
    lacks in bytes.

    Merging bytes does the same, if the merges that put each known character together come first.
    """
    scheme, metaspace = _spacing(normalizers + splitters)

    def prepare(text: str, first: bool) -> str:
        text = text.replace("▁", " ")  # which both mean "▁"
        spaced = scheme == "always" or (scheme == "first" and first)
        return " " + text if spaced and not (metaspace and text[0] == " ") else text

    vocab = model["vocab"]
    byte_names = dict.fromkeys(f"<0x{byte:02X}>" for byte in range(256))
    tokens = {id: _piece_bytes(piece, piece in byte_names) for piece, id in vocab.items()}
    characters = [piece for piece in vocab if len(piece) == 1]
    # Of two for the same bytes the later one wins: a character that is a piece is not spelt.
    ids = [vocab[piece] for piece in [*byte_names, *characters, *merged]]
    known = [tokens[id] for id in ids[256:]]
    beginnings = [c[:end] for c in known[: len(characters)] for end in range(2, len(c))]
    id_of = {tokens[id]: id for id in ids}
    encode = _bpe(id_of, beginnings + known, [], prepare=prepare)
    return encode, tokens, scheme != "never"


def _from_json(spec: dict) -> tuple[Coder, list[int]]:
    """tokenizer.json: its model, and the ids that its post_processor puts before a text (BOS)."""

    def nodes(part: str, inner: str) -> list[dict]:
        node = spec.get(part) or {"type": "Sequence", inner: []}
        return node[inner] if node["type"] == "Sequence" else [node]

    model = {key: value for key, value in spec["model"].items() if key not in ("vocab", "merges")}
    odd = {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}
    normalizers = nodes("normalizer", "normalizers")
    splitters = nodes("pre_tokenizer", "pretokenizers")
    byte_level = any(node["type"] == "ByteLevel" for node in splitters)
    known = model.get("type", "BPE") == "BPE" and (byte_level or model.get("byte_fallback"))
    if not known or any(map(model.get, odd)):
        wanted = "BPE, byte-level or with byte_fallback, and no dropout, prefix or suffix"
        raise _unsupported("model", model, wanted)
    bos = []
    for node in nodes("post_processor", "processors"):
        match node:
            case {"type": "ByteLevel"}:
                pass  # about offsets only
            case {"type": "TemplateProcessing", "single": [*parts, {"Sequence": _}]}:
                for part in parts:
                    bos += node["special_tokens"][part["SpecialToken"]["id"]]["ids"]
            case _:
                wanted = "one that adds BOS before the text, and nothing after it"
                raise _unsupported("post_processor", node, wanted)
    merges = spec["model"]["merges"]  # pairs, or in older files texts
    merged = [m.replace(" ", "") if isinstance(m, str) else "".join(m) for m in merges]
    build = _byte_level if byte_level else _character_level
    return build(spec["model"], normalizers, splitters, merged), bos


class Detokenizer:
    """Text from ids, one at a time; a character comes out with its last byte. Made by
    Tokenizer.stream().
    """

    def __init__(self, tokens: dict[int, bytes], hidden: set[int], drop_space: bool):
        self.tokens, self.hidden, self.drop_space = tokens, hidden, drop_space
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Text that is complete with this id, often "". Special tokens, and ids without a token,
        have none.
        """
        return self._text(b"" if id in self.hidden else self.tokens.get(id, b""))

    def flush(self) -> str:
        """What is left at the end: "�" for a character whose last bytes never came."""
        return self._text(b"", final=True)

    def _text(self, data: bytes, final: bool = False) -> str:
        text = self.utf8.decode(data, final)
        if text and self.drop_space:
            text, self.drop_space = text.removeprefix(" "), False
        return text


class Tokenizer:
    """Made by load_tokenizer. vocab_size: largest id + 1; bos_id: int or None; eos_ids: the ids
    that end a text.
    """

    def __init__(
        self,
        model: Coder,
        added: dict[str, dict],
        before: list[int],
        names: dict[str, str],
        eos_ids: tuple[int, ...],
        template: str | None,
    ):
        self._encode, tokens, self._drops_space = model
        self._added, self._before, self._names, self._template = added, before, names, template
        longest_first = sorted(filter(None, added), key=len, reverse=True)
        # (?!) is found nowhere.
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._tokens = tokens | {token["id"]: name.encode() for name, token in added.items()}
        self._hidden = {token["id"] for token in added.values() if token["special"]}
        if not _are_ids(self._tokens):
            raise CheckpointError(
                f"the tokenizer has ids outside 0..{MAX_TOKEN_ID - 1}: download its files again"
            )
        self.vocab_size = max(self._tokens) + 1
        ids = {kind: added[name]["id"] for kind, name in names.items() if name in added}
        self.bos_id = ids.get("bos_token", before[0] if before else None)
        named = (ids["eos_token"],) if "eos_token" in ids else ()
        self.eos_ids = eos_ids or named

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text; with bos, after what the checkpoint puts before every text (nothing for
        Qwen).

        Special tokens written in the text become those tokens, as in the reference. ValueError for
        a lone surrogate.
        """
        if re.search("[\ud800-\udfff]", text):  # Python's picture of a byte that is not UTF-8
            raise CheckpointError(
                "got a text with a byte that is not UTF-8, wanted UTF-8: convert it"
            )
        ids = list(self._before) if bos else []
        for place, part in enumerate(self._cut.split(text)):  # text, token, text, token, ..., text
            if place % 2:
                ids.append(self._added[part]["id"])
            elif part:
                ids += self._encode(part, place == 0)
        return ids

    def stream(self, continuing: bool = True) -> Detokenizer:
        """For ids that follow a prompt. With continuing=False a whole text: sentencepiece's first
        space is dropped.
        """
        return Detokenizer(self._tokens, self._hidden, self._drops_space and not continuing)

    def decode(self, ids: Iterable[int], continuing: bool = False) -> str:
        """Text of ids without special tokens, "�" for what is not UTF-8; as stream() otherwise."""
        stream = self.stream(continuing)
        return "".join([*map(stream.push, ids), stream.flush()])

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for: its name for a special one, b"" for an id without a
        token.
        """
        return self._tokens.get(id, b"")

    def encode_chat(
        self, messages: list[dict], system: str | None = None, thinking: bool | None = None
    ) -> list[int]:
        """Ids of [{"role": "user", "content": ...}, ...] up to the answer. ValueError when the chat
        template fails.

        system: a first message of that role. thinking: what the template is told as enable_thinking
        (Qwen3's knows it); None says nothing.
        """
        if not isinstance(self._template, str):
            raise CheckpointError(
                "this checkpoint has no chat template: use one trained to chat, or a plain prompt"
            )
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        messages = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        variables = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        variables |= {} if thinking is None else {"enable_thinking": thinking}
        return self.encode(render_chat(self._template, self._names | variables), bos=False)


def vocabulary_difference(a: Tokenizer, b: Tokenizer) -> tuple[int, bytes, bytes] | None:
    """The first id, below both sizes, that means different tokens, with its bytes in a and in b;
    None without one.
    """
    for id in range(min(a.vocab_size, b.vocab_size)):
        ours, theirs = a.token_bytes(id), b.token_bytes(id)
        if ours != theirs:
            return id, ours, theirs
    return None


def _read_folder(folder: Path) -> Files | None:
    spec = _read_json(folder / "tokenizer.json")
    model = folder / "tokenizer.model"
    if not spec and not model.is_file():
        return None
    config = _read_json(folder / "special_tokens_map.json")
    config |= _read_json(folder / "tokenizer_config.json")
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = read_file(template, MAX_FILE_BYTES).decode()
    named = _read_json(folder / "added_tokens.json")
    added = [{"id": id, "content": token} for token, id in named.items()]
    decoder = config.get("added_tokens_decoder", {})
    added += [token | {"id": int(id)} for id, token in decoder.items()]
    data = None if spec else read_file(model, MAX_FILE_BYTES)
    return Files(spec, data, config, added, read_eos_ids(folder))


def _build(files: Files) -> Tokenizer:
    config, added, before, usual = files.config, {}, [], {}
    if files.spec:
        model, before = _from_json(files.spec)
        entries = files.added + files.spec.get("added_tokens", [])
    elif re.fullmatch(rb"(?:[A-Za-z0-9+/]+=* \d+\s+)*", files.model):
        model, special = _from_ranks(files.model)
        entries = special + files.added
        usual = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    else:
        model, special = _from_pieces(files.model, config.get("legacy") is not False)
        entries = special + files.added
        usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names = usual | {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    for entry in entries:  # of two for one text, the later
        if any(map(entry.get, ("single_word", "lstrip", "rstrip"))):
            raise _unsupported("added token", entry, "one without single_word, lstrip and rstrip")
        special = entry.get("special") or entry["content"] in names.values()
        added[entry["content"]] = entry | {"special": special}
    if usual and config.get("add_bos_token", True) and names["bos_token"] in added:
        before = [added[names["bos_token"]]["id"]]
    template = config.get("chat_template")
    if isinstance(template, list):  # of named ones
        template = {each["name"]: each["template"] for each in template}.get("default")
    return Tokenizer(model, added, before, names, files.eos_ids, template)


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder or GGUF file; None where it has none. ValueError: it
    is of no use.
    """
    from checkpoint.gguf import read_tokenizer

    try:
        read = read_tokenizer if Path(folder).is_file() else _read_folder
        files = read(Path(folder))
        return None if files is None else _build(files)
    except CheckpointError:
        raise
    except Exception as error:  # a file that is not what it should be fails in many ways
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(
            f"the tokenizer in {folder} is damaged ({what}): download it again"
        ) from error
