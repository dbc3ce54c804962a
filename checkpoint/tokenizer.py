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

Does not know: models, devices, tensors. Read next: inflation.py.
"""

import base64
import codecs
import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

MAX_FILE_BYTES = 64 << 20  # the largest tokenizer.json in use (Gemma's) has 33 MB
MAX_TOKEN_ID = 1 << 24  # no loop here gets longer because a file made up an id
MAX_TEMPLATE_CHARS, MAX_CHAT_CHARS, CHAT_BYTES, CHAT_SECONDS = 256 << 10, 8 << 20, 512 << 20, 10
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3's tokenizer.model holds ranks only; how it splits text and its special tokens were
# published as code. The special tokens are Llama 3.1's; in 3.0 finetune_right_pad_id, eom_id and
# python_tag were reserved names too.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
    *("finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id"),
    *("eom_id", "eot_id", "python_tag"),
    *(f"reserved_special_token_{number}" for number in range(3, 248)),
]
# (text without added tokens, whether nothing stands before it) -> ids
Encoder = Callable[[str, bool], list[int]]
# Bytes by id; whether decoded text opens with a space that is not in it.
Coder = tuple[Encoder, dict[int, bytes], bool]


class TokenizerError(ValueError):
    """One sentence for the user: what there was, what was wanted, what to do."""


class Files(NamedTuple):
    """What the files of a tokenizer say: tokenizer.json or else tokenizer.model, and
    tokenizer_config.json; the added tokens that are named elsewhere; the ids that end a text.
    """

    spec: dict
    model: bytes | None
    config: dict
    added: list[dict]
    eos_ids: tuple[int, ...]


def _read(path: Path) -> bytes | None:
    """Content of a file, None where there is none. ValueError when it is larger than any real
    tokenizer file.
    """
    if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{path} has over {MAX_FILE_BYTES >> 20} MiB, the limit for a tokenizer file: replace "
            "it"
        )
    # Devices and pipes, which may have no end, are no files.
    return path.read_bytes() if path.is_file() else None


def _read_json(path: Path) -> dict:
    """A JSON object from a file, {} where there is none. ValueError when it holds anything else."""
    data = _read(path)
    try:
        return {} if data is None else {**json.loads(data)}
    except (ValueError, TypeError, RecursionError) as error:
        raise TokenizerError(f"{path} is not a JSON object ({error}): download it again") from error


def _read_gguf(path: Path):
    """Files of a GGUF file, or None."""
    from checkpoint.gguf import read_tokenizer

    try:
        return read_tokenizer(path)
    except ValueError as error:
        raise TokenizerError(str(error)) from error


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a text: eos_token_id, an id or a list, of generation_config.json, else of
    config.json, else (). A GGUF file names them with its tokenizer's tokens only.
    """
    folder = Path(folder)
    for path in (folder / "generation_config.json", folder / "config.json"):
        value = _read_json(path).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(id) is int and 0 <= id < MAX_TOKEN_ID for id in ids):
            raise TokenizerError(
                f"{path}: got eos_token_id {str(value):.80}, wanted a token id or a list: correct "
                "it"
            )
        if ids:
            return tuple(dict.fromkeys(ids))
    return ()


def _bpe(
    id_of: dict[bytes, int],
    merged: list[bytes],
    patterns: list[str | None],
    ignore_merges: bool,
    lacking: Callable[[bytes], list[int]] = lambda token: [],
    prepare: Callable[[str, bool], str] = lambda text, first: text,
) -> Encoder:
    """Byte-pair encoding by tiktoken: prepare the text, split it by pattern after pattern, merge
    each piece's bytes.

    tiktoken merges the neighbours whose union has the lowest rank, so `merged` is in the order of
    merges. Ids need not follow that order (special tokens may come first), nor exist (`lacking`
    tells what to write instead).
    """
    import regex  # here and below, what only some checkpoints need is imported where it is used
    import tiktoken

    ranked = list(dict.fromkeys([bytes([byte]) for byte in range(256)] + merged))
    ids = [[id_of[token]] if token in id_of else lacking(token) for token in ranked]
    # Text is split before tiktoken sees it, so its own split, pat_str, leaves every piece whole.
    ranks = {token: rank for rank, token in enumerate(ranked)}
    merge = tiktoken.Encoding(
        "ssd", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={}
    ).encode_ordinary
    steps = [pattern and regex.compile(pattern) for pattern in patterns]

    def split(step: "regex.Pattern | None", text: str) -> list[str]:
        if step is None:  # ByteLevel's add_prefix_space
            return [text if text.startswith(" ") else " " + text]
        cuts = sorted(
            {0, len(text), *(end for match in step.finditer(text) for end in match.span())}
        )
        return [text[start:end] for start, end in zip(cuts, cuts[1:])]

    def encode(text: str, first: bool) -> list[int]:
        pieces, out = [prepare(text, first)], []
        for (
            step
        ) in steps:  # each sees one piece at a time: a look-ahead never sees past an earlier cut
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
    tokens = {
        int(rank): base64.b64decode(token, validate=True)
        for token, rank in map(bytes.split, data.splitlines())
    }
    id_of = {token: id for id, token in tokens.items()}
    encode = _bpe(
        id_of, [tokens[id] for id in sorted(tokens)], [LLAMA3_PATTERN], ignore_merges=True
    )
    special = enumerate(LLAMA3_SPECIAL, max(tokens) + 1)
    return (encode, tokens, False), [
        {"id": id, "content": f"<|{name}|>", "special": True} for id, name in special
    ]


def _from_pieces(data: bytes, legacy: bool) -> tuple[Coder, list[dict]]:
    """sentencepiece's tokenizer.model, and its control tokens. `legacy`: "▁" opens text after one
    of those, too.
    """
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=data)
    # Protobuf messages add up: these four bytes, appended, say normalizer_spec { add_dummy_prefix:
    # false }.
    later = (
        sp
        if legacy
        else sentencepiece.SentencePieceProcessor(model_proto=data + b"\x1a\x02\x18\x00")
    )
    pieces = [sp.id_to_piece(id) for id in range(len(sp))]
    tokens = {id: _piece_bytes(piece, sp.is_byte(id)) for id, piece in enumerate(pieces)}
    added = [
        {"id": n, "content": pieces[n], "special": True}
        for n in tokens
        if sp.is_control(n) or sp.is_unknown(n)
    ]
    return (
        lambda text, first: (sp if first else later).encode(text),
        tokens,
        sp.normalize("a") == "▁a",
    ), added


def _piece_bytes(piece: str, is_byte: bool) -> bytes:
    # A byte is spelt <0x0A>.
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()


def _unsupported(part: str, got: object, wanted: str) -> TokenizerError:
    return TokenizerError(
        f"tokenizer: got {part} {json.dumps(got)[:200]}, wanted {wanted}: use another checkpoint"
    )


def _patterns(splitters: list[dict]) -> list[str | None]:
    """What each pre_tokenizer splits by; None for a space that is put before the text."""
    patterns: list[str | None] = []
    for node in splitters:
        match node:
            case {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}:
                patterns.append(
                    pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
                )
            case {"type": "Digits", "individual_digits": single}:
                patterns.append(r"\p{N}" if single else r"\p{N}+")
            case {"type": "ByteLevel", "add_prefix_space": space}:
                patterns += [None] * space + [GPT2_PATTERN] * node.get("use_regex", True)
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
    # A byte that the vocabulary lacks becomes its unknown token or, without one, nothing: so the
    # reference does.
    unknown = [vocab[model["unk_token"]]] if model.get("unk_token") in vocab else []
    encode = _bpe(
        {token: id for id, token in tokens.items()},
        [tokens[vocab[token]] for token in merged],
        _patterns(splitters),
        bool(model.get("ignore_merges")),
        lambda token: unknown,
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
        text = text.replace(" ", "▁")
        spaced = scheme == "always" or (scheme == "first" and first)
        return "▁" + text if spaced and not (metaspace and text[0] == "▁") else text

    vocab = model["vocab"]
    byte_ids = [vocab[f"<0x{byte:02X}>"] for byte in range(256)]
    characters = [piece for piece in vocab if len(piece) == 1]
    beginnings = [
        char.encode()[:end] for char in characters for end in range(2, len(char.encode()))
    ]
    id_of = {piece.encode(): vocab[piece] for piece in [*characters, *merged]}
    encode = _bpe(
        id_of,
        beginnings + list(id_of),
        [],
        False,
        lambda token: [byte_ids[byte] for byte in token],
        prepare,
    )
    tokens = {
        id: _piece_bytes(piece, piece.startswith("<0x") and id in byte_ids)
        for piece, id in vocab.items()
    }
    return encode, tokens, scheme != "never"


def _from_json(spec: dict) -> tuple[Coder, list[int]]:
    """tokenizer.json: its model, and the ids that its post_processor puts before a text (BOS)."""

    def nodes(part: str, inner: str) -> list[dict]:
        node = spec.get(part)
        return node[inner] if node and node["type"] == "Sequence" else [node] if node else []

    model = {key: value for key, value in spec["model"].items() if key not in ("vocab", "merges")}
    odd = any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    )
    normalizers, splitters = (
        nodes("normalizer", "normalizers"),
        nodes("pre_tokenizer", "pretokenizers"),
    )
    byte_level = any(node["type"] == "ByteLevel" for node in splitters)
    if odd or model.get("type", "BPE") != "BPE" or not (byte_level or model.get("byte_fallback")):
        raise _unsupported(
            "model",
            model,
            "BPE, byte-level or with byte_fallback, and no dropout, prefix or suffix",
        )
    bos = []
    for node in nodes("post_processor", "processors"):
        match node:
            case {"type": "ByteLevel"}:
                pass  # about offsets only
            case {"type": "TemplateProcessing", "single": [*parts, {"Sequence": _}]}:
                bos += [
                    id
                    for part in parts
                    for id in node["special_tokens"][part["SpecialToken"]["id"]]["ids"]
                ]
            case _:
                raise _unsupported(
                    "post_processor",
                    node,
                    "one that adds BOS before the text, and nothing after it",
                )
    # Str: older.
    pairs = (
        merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"]["merges"]
    )
    build = _byte_level if byte_level else _character_level
    return build(
        spec["model"], normalizers, splitters, [left + right for left, right in pairs]
    ), bos


def render_chat(template: str, variables: dict) -> str:
    """The text of a chat, from its jinja2 template. ValueError when the template fails or exceeds a
    limit.

    A template is a stranger's program. jinja2's sandbox keeps it from Python, not from looping for
    ever or asking for 10 GB ({{ 'x' * 10**10 }}): so it runs in a child process with limits (0.1 s,
    once per turn of a chat).
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TokenizerError(
            f"the chat template has over {MAX_TEMPLATE_CHARS} characters, the limit: replace it"
        )
    job = json.dumps([template, variables]).encode()
    try:
        child = subprocess.run(
            [sys.executable, __file__], input=job, capture_output=True, timeout=CHAT_SECONDS
        )
        text, error = json.loads(child.stdout or '["", "it died; is jinja2 installed?"]')
    except subprocess.TimeoutExpired:
        text, error = "", f"it was not done after {CHAT_SECONDS} s"
    if error:
        raise TokenizerError(
            f"the chat template failed ({error}): check the messages, or use a plain prompt"
        )
    return text


def _render_in_child() -> tuple[str, str]:
    """Text and error of the job that render_chat wrote to stdin."""
    # debug is for when a template fails
    from jinja2 import TemplateError, debug, ext, nodes, sandbox  # noqa: F401

    class Generation(ext.Extension):
        """{% generation %} marks the assistant's words, for those who train on them; it writes what
        is inside.
        """

        tags = {"generation"}

        def parse(self, parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    template, variables = json.load(sys.stdin)
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.add_extension("jinja2.ext.loopcontrols")
    environment.add_extension(Generation)
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, **{"ensure_ascii": False} | options
    )
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": datetime.now().strftime,
    }
    environment.from_string(
        "{{ 'x' }}"
    ).render()  # what jinja2 opens late is opened now: soon no file can be
    if sys.platform != "win32":  # there, only the time is limited
        import resource

        for name, most in {"AS": CHAT_BYTES, "CPU": CHAT_SECONDS, "FSIZE": 0, "NOFILE": 0}.items():
            with suppress(ValueError):  # macOS knows no limit on memory
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    try:
        text = environment.from_string(template).render(variables)
    except Exception as error:  # whatever a stranger's program may raise is reported, in one line
        return "", " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return (text, "") if len(text) <= MAX_CHAT_CHARS else ("", f"it wrote {len(text)} characters")


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
        if not all(type(id) is int and 0 <= id < MAX_TOKEN_ID for id in self._tokens):
            raise TokenizerError(
                f"the tokenizer has ids outside 0..{MAX_TOKEN_ID - 1}: download its files again"
            )
        self.vocab_size = max(self._tokens) + 1
        ids = {kind: added[name]["id"] for kind, name in names.items() if name in added}
        self.bos_id = ids.get("bos_token", before[0] if before else None)
        self.eos_ids = eos_ids or tuple(ids[kind] for kind in ["eos_token"] if kind in ids)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text; with bos, after what the checkpoint puts before every text (nothing for
        Qwen).

        Special tokens written in the text become those tokens, as in the reference. ValueError for
        a lone surrogate.
        """
        if re.search("[\ud800-\udfff]", text):  # Python's picture of a byte that is not UTF-8
            raise TokenizerError(
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
            raise TokenizerError(
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
    id = next(
        (
            id
            for id in range(min(a.vocab_size, b.vocab_size))
            if a.token_bytes(id) != b.token_bytes(id)
        ),
        None,
    )
    return None if id is None else (id, a.token_bytes(id), b.token_bytes(id))


def _load(folder: Path) -> Tokenizer | None:
    """Read the files of a folder, or the metadata of a GGUF file, which says the same in other
    words.
    """
    if folder.is_file():
        files = _read_gguf(folder)
        return files and _build(*files)
    spec, data = _read_json(folder / "tokenizer.json"), _read(folder / "tokenizer.model")
    if not spec and data is None:
        return None
    config = _read_json(folder / "special_tokens_map.json") | _read_json(
        folder / "tokenizer_config.json"
    )
    template = (_read(folder / "chat_template.jinja") or b"").decode() or config.get(
        "chat_template"
    )
    entries = [
        {"id": id, "content": token}
        for token, id in _read_json(folder / "added_tokens.json").items()
    ]
    entries += [
        token | {"id": int(id)} for id, token in config.get("added_tokens_decoder", {}).items()
    ]
    config |= {"chat_template": template}
    return _build(spec, data, config, entries, read_eos_ids(folder))


def _build(
    spec: dict, data: bytes | None, config: dict, entries: list[dict], eos_ids: tuple[int, ...]
) -> Tokenizer:
    """From tokenizer.json or else tokenizer.model, tokenizer_config.json, added tokens named
    elsewhere, and EOS.
    """
    names = {
        key: value["content"]
        if isinstance(value, dict)
        else value  # a token is a text, or an object that has it
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    if spec:
        model, before = _from_json(spec)
        entries += spec.get("added_tokens", [])
    elif re.fullmatch(rb"(?:[A-Za-z0-9+/]+=* \d+\s+)*", data):
        model, found = _from_ranks(data)
        names, entries = (
            {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"} | names,
            found + entries,
        )
    else:
        model, found = _from_pieces(data, config.get("legacy") is not False)
        names, entries = (
            {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | names,
            found + entries,
        )
    added = {}
    for entry in entries:  # of two for one text, the later
        if any(entry.get(flag) for flag in ("single_word", "lstrip", "rstrip")):
            raise _unsupported("added token", entry, "one without single_word, lstrip and rstrip")
        added[entry["content"]] = entry | {
            "special": entry.get("special") or entry["content"] in names.values()
        }
    if not spec:
        before = [
            added[bos]["id"]
            for bos in {names["bos_token"]} & added.keys()
            if config.get("add_bos_token", True)
        ]
    template = config.get("chat_template")
    if isinstance(template, list):  # of named ones
        template = {each["name"]: each["template"] for each in template}.get("default")
    return Tokenizer(model, added, before, names, eos_ids, template)


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder or GGUF file; None where it has none. ValueError: it
    is of no use.
    """
    try:
        return _load(Path(folder))
    except TokenizerError:
        raise
    except (
        Exception
    ) as error:  # a file that is not what it should be fails in many ways, each of them here
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise TokenizerError(
            f"the tokenizer in {folder} is damaged ({what}): download it again"
        ) from error


if __name__ == "__main__":  # the child process of render_chat
    json.dump(_render_in_child(), sys.stdout)
