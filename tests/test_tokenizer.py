"""tokenizer.py against its references: transformers, tokenizers and sentencepiece, on tokenizers
trained here.

Every tokenizer is tiny but of a real kind: Llama 3's and Qwen's patterns, SmolLM2's digits, Llama
2's sentencepiece. Tokenizers differ on odd text, so the texts are source code, many scripts, emoji
and odd white space.
"""

import base64
import json
import random
import time
import unicodedata
from pathlib import Path

import pytest

from checkpoint import chat
from checkpoint import tokenizer as engine
from checkpoint.chat import render_chat
from checkpoint.tokenizer import (
    LLAMA3_PATTERN,
    LLAMA3_SPECIAL,
    load_tokenizer,
    read_eos_ids,
    vocabulary_difference,
)

transformers = pytest.importorskip(
    "transformers", reason="transformers, the reference, is not installed"
)
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers, the reference, is not installed")
sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")

SCRIPTS = [
    "Съешь же ещё этих мягких французских булок, да выпей чаю: 25 рублей.",
    "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία· ὁ καιρὸς γὰρ ἐγγύς.",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。我今年25岁了！",
    "いろはにほへと ちりぬるを。コンピューターで１２３を計算します。",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ١٢٣٤",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश १२३।",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; l'été, où ça?",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
]
ODD = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n\n",
    "\r\n",
    " \r\n \r\n",
    "\t",
    "\t\t if x:\t# tab",
    "a\u00a0b \u00a0 c",
    "trailing  ",
    "  two  spaces  ",
    "a\u2003b\u3000c\u200bd",
    "\x00\x01\x1b[0m\x7f",
    "\u2028\u2029\x85",
    "x\n \n  \n   y",
    "▁x ▁ y▁",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🏳️‍🌈 ☕️",
    "e\u0301 A\u030a o\u0308\u0304 \u1100\u1161\u11a8 ﬁ Ⅷ ½ ²",
    "1 12 123 1234 12345",
    "I'LL we'Ve don'T 'S 'ſ l'été",
    "1.000,5 3e-10 0xFF ٣٤٥ १२३ ⅫⅣ",
    "a" * 24,
    "=" * 70,
    "!?!?...——“”",
    "<0x0A>",
    "a" + " " * 100 + "b",
    "\U0001f9a4\U00010348\u0dc6",
    "\ufeffBOM",
    "def f(x):\n\treturn  x+1\n\n\n\n# end  \n",
    "हि\u200dन्दी",
    "مَرْحَبًا",
]


@pytest.fixture(scope="module")
def source() -> list[str]:
    """A few modules of the standard library."""
    return [
        (Path(json.__file__).parent.parent / name).read_text()
        for name in ("textwrap.py", "bisect.py", "heapq.py")
    ]


@pytest.fixture(scope="module")
def corpus(source) -> list[str]:
    """What tokenizers are trained on: not quite what they are tested on, so that bytes and rare
    characters occur.
    """
    return [*source[0].split("\n"), *source[2].split("\n"), *(SCRIPTS[:5] * 5)]


@pytest.fixture(scope="module")
def texts(source) -> list[str]:
    """A few thousand lines of text: alone, and as blocks of twenty lines."""
    lines = [line for text in source for line in text.split("\n")]
    blocks = ["\n".join(lines[start : start + 20]) for start in range(0, len(lines), 20)]
    every = (
        lines
        + blocks
        + SCRIPTS
        + ODD
        + [" " + text for text in SCRIPTS]
        + [" ".join(SCRIPTS), "\r\n".join(ODD)]
    )
    rng = random.Random(0)
    letters = [*"".join(SCRIPTS + ODD), *"  \n\n\r\t '0129abcß"]
    return every + ["".join(rng.choices(letters, k=30)) for _ in range(1000)]


def with_special(texts, tokens):
    """Some of the texts with special tokens in and around them."""
    for place, text in enumerate(texts[::7]):
        a, b = tokens[place % len(tokens)], tokens[(place // 3) % len(tokens)]
        yield from (
            a + text,
            text + a,
            f"x {a} {text}{b}{a}",
            text[: len(text) // 2] + a + text[len(text) // 2 :],
        )


def agree(ours, reference, texts, **options):
    """Equal ids for every text; and the reference's text from the ids, whole and streamed."""
    for text in texts:
        ids = ours.encode(text, **options)
        assert ids == reference(text), f"{text!r}: {reference(text)} wanted"
        stream = ours.stream(continuing=False)
        assert "".join([*map(stream.push, ids), stream.flush()]) == ours.decode(ids)


def decodes(ours, reference, texts):
    for text in texts:
        ids = reference.encode(text)
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True), (
            f"{text!r}: {ids}"
        )


# ---- byte-level BPE in tokenizer.json


def train(
    corpus, pre, special, size=1000, normalizer=None, add_prefix_space=False, use_regex=False
):
    pre_tokenizers = tokenizers.pre_tokenizers
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space, use_regex=use_regex)
    made.pre_tokenizer = pre_tokenizers.Sequence([*pre, last])
    made.decoder = tokenizers.decoders.ByteLevel()
    options = {
        "vocab_size": size,
        "special_tokens": special,
        "initial_alphabet": last.alphabet(),
        "show_progress": False,
    }
    made.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(**options))
    return made


def split(pattern):
    return tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def save(made, folder, edit=lambda spec: None, **names):
    """A Hugging Face folder with this tokenizer; `edit` changes its tokenizer.json."""
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    edit(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


LLAMA3_NAMES = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


@pytest.fixture(scope="module")
def llama3(corpus, tmp_path_factory):
    """Llama 3's pattern and BOS template, special tokens behind the vocabulary, a word that no
    merge reaches.
    """
    made = train(corpus, [split(LLAMA3_PATTERN)], [])
    made.add_special_tokens(LLAMA3_NAMES)
    bos = made.token_to_id(LLAMA3_NAMES[0])
    made.post_processor = tokenizers.processors.Sequence([
        tokenizers.processors.ByteLevel(trim_offsets=False),
        tokenizers.processors.TemplateProcessing(
            single="<|begin_of_text|> $A", pair="$A $B", special_tokens=[("<|begin_of_text|>", bos)]
        ),
    ])  # fmt: skip

    def edit(spec):
        model = spec["model"]
        model["ignore_merges"], model["merges"] = True, model["merges"][:-2]
        ids = {token: id for token, id in model["vocab"].items() if id < 998}
        model["vocab"] = ids | {"Ġunreachable": 998, "Ã©tÃ©": 999}

    folder = tmp_path_factory.mktemp("llama3")
    return *save(made, folder, edit, bos_token=LLAMA3_NAMES[0], eos_token="<|end_of_text|>"), folder


QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN_NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def qwen(corpus, tmp_path_factory):
    """Qwen's pattern and NFC; no BOS; added tokens that are not special, one the beginning of
    another.
    """
    made = train(corpus, [split(QWEN_PATTERN)], [], normalizer=tokenizers.normalizers.NFC())
    made.add_special_tokens(QWEN_NAMES)
    made.add_tokens(
        [
            tokenizers.AddedToken(name, normalized=False, special=False)
            for name in ("<think", "<think>")
        ]
    )
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    folder = tmp_path_factory.mktemp("qwen")
    return *save(made, folder, eos_token="<|im_end|>", pad_token="<|endoftext|>"), folder


def test_llama3(llama3, texts):
    ours, reference, _ = llama3
    agree(ours, reference.encode, texts)
    agree(ours, reference.encode, with_special(texts, LLAMA3_NAMES))
    decodes(ours, reference, [*texts, *with_special(texts, LLAMA3_NAMES)])
    assert ours.encode("hi", bos=False) == reference.encode("hi", add_special_tokens=False)
    assert (ours.bos_id, ours.eos_ids) == (reference.bos_token_id, (reference.eos_token_id,))
    assert ours.vocab_size == 1005


def test_words_of_the_vocabulary_are_kept_whole_only_where_merges_are_ignored(llama3, tmp_path):
    ours, reference, folder = llama3
    assert ours.encode(" unreachable", bos=False) == [998] and ours.encode("été", bos=False) == [
        999
    ]
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (" unreachable", "été", "a été unreachable."):
        assert load_tokenizer(tmp_path).encode(text) == reference.encode(text).ids
        assert not {998, 999} & set(reference.encode(text).ids)


def test_qwen(qwen, texts):
    ours, reference, _ = qwen
    agree(ours, reference.encode, texts)
    agree(ours, reference.encode, with_special(texts, [*QWEN_NAMES, "<think", "<think>"]))
    decodes(ours, reference, [*texts, *with_special(texts, [*QWEN_NAMES, "<think", "<think>"])])
    assert ours.bos_id is None and ours.encode("") == []
    assert ours.decode(ours.encode("e\u0301")) == "é", "NFC composes"
    assert ours.decode(ours.encode("<|im_start|>a<think>b<|im_end|>")) == "a<think>b"


def test_a_token_that_the_configuration_names_is_special(qwen, texts, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((qwen[2] / "tokenizer.json").read_bytes())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"content": "<think>", "__type": "AddedToken"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, reference = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    decodes(ours, reference, with_special(texts[:100], ["<think>"]))
    assert (
        ours.eos_ids == (reference.eos_token_id,) and ours.decode(ours.encode("a<think>b")) == "ab"
    )


@pytest.mark.parametrize("individual", [True, False])
@pytest.mark.parametrize("prefix_space", [True, False])
def test_digits_and_gpt2_pattern(corpus, texts, tmp_path, individual, prefix_space):
    """SmolLM2's and GPT-2's kind: special tokens come first, so no id is a rank."""
    pre = [tokenizers.pre_tokenizers.Digits(individual)]
    special = ["<|endoftext|>", "<|im_start|>"]
    made = train(corpus, pre, special, size=600, add_prefix_space=prefix_space, use_regex=True)
    ours, reference = save(made, tmp_path, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    agree(ours, reference.encode, [*texts[::2], *with_special(texts, special)])
    decodes(ours, reference, texts[::2])
    assert ours.bos_id == ours.eos_ids[0] == 0 and ours.encode("x")[0] != 0, (
        "named, but put before no text"
    )


def test_ids_in_any_order_merges_as_text_and_missing_bytes(corpus, texts, tmp_path):
    made = train(corpus, [split(QWEN_PATTERN)], ["<s>"], size=700)

    def shuffle(spec):
        model = spec["model"]
        lost = {"ð": 0, "Ł": 0}  # bytes f0 and 9f, which no emoji can do without
        tokens = [token for token in model["vocab"] if not set(token) & set(lost)]
        model["merges"] = [
            " ".join(pair) for pair in model["merges"] if not set("".join(pair)) & set(lost)
        ]
        ids = list(range(1, len(tokens)))
        random.Random(1).shuffle(ids)
        model["vocab"] = dict(zip(tokens, [0, *ids], strict=True))

    ours, reference = save(made, tmp_path, shuffle)
    agree(ours, reference.encode, texts[::2])
    assert ours.encode("a👍b") == reference.encode("a👍b")


# ---- Llama 3's tokenizer.model


def write_ranks(folder, ours):
    """Llama 3's file with the tokens of another byte-level tokenizer, in its order of ids."""
    tokens = [ours.token_bytes(id) for id in range(1000)]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


def test_llama3_ranks(llama3, texts, tmp_path):
    write_ranks(tmp_path, llama3[0])
    ours, special = load_tokenizer(tmp_path), [f"<|{name}|>" for name in LLAMA3_SPECIAL]
    from transformers.convert_slow_tokenizer import TikTokenConverter

    model = str(tmp_path / "tokenizer.model")
    reference = TikTokenConverter(model, extra_special_tokens=special).converted()
    agree(ours, lambda text: reference.encode(text).ids, texts, bos=False)
    agree(
        ours, lambda text: reference.encode(text).ids, with_special(texts, special[:12]), bos=False
    )
    assert len(special) == len(set(special)) == 256 and ours.vocab_size == 1256
    assert (ours.bos_id, ours.eos_ids) == (1000, (1001,)) and ours.encode("a")[0] == 1000
    assert [ours.token_bytes(id) for id in (1006, 1009, 1255)] == [
        b"<|start_header_id|>", b"<|eot_id|>", b"<|reserved_special_token_247|>"]  # fmt: skip


# ---- sentencepiece


@pytest.fixture(scope="module")
def pieces(corpus, tmp_path_factory):
    """A folder with a sentencepiece model like Llama 2's: BPE, bytes for unknown characters, text
    left as it is.
    """
    folder = tmp_path_factory.mktemp("pieces")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=800,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.995,
        num_threads=1,
        minloglevel=2,
    )
    return folder


def hugging_face(folder, **options):
    """The reference's LlamaTokenizer made from a sentencepiece model."""
    from transformers.tokenization_utils_base import generate_merges

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {model.id_to_piece(id): id for id in range(len(model))}
    return transformers.LlamaTokenizer(
        vocab=vocab, merges=generate_merges(vocab), add_bos_token=True, **options
    )


def test_sentencepiece_model(pieces, texts):
    ours = load_tokenizer(pieces)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    agree(ours, lambda text: [1, *reference.encode(text)], texts)
    for text in texts:
        assert (
            ours.decode(ours.encode(text))
            == reference.decode(reference.encode(text))
            == text.replace("▁", " ")
        )
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, (2,), 800)


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_model_with_special_tokens(pieces, texts, tmp_path, legacy):
    """Against LlamaTokenizer, which drops one of the spaces that open a text: so only where none
    does.
    """
    (tmp_path / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    added = {
        "800": {"content": "<pad>", "special": True},
        "801": {"content": "<user>", "special": False},
    }
    config = {
        "legacy": legacy,
        "add_bos_token": True,
        "added_tokens_decoder": added,
        "bos_token": {"content": "<s>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, reference = load_tokenizer(tmp_path), hugging_face(pieces, legacy=legacy)
    reference.add_tokens([tokenizers.AddedToken("<pad>", normalized=False, special=True)])
    reference.add_tokens([tokenizers.AddedToken("<user>", normalized=False, special=False)])
    plain = [text for text in texts if text[:1] not in (" ", "▁")]
    agree(ours, reference.encode, plain)
    inside = [
        text
        for text in with_special(plain, ["<s>", "</s>", "<pad>", "<user>"])
        if text[0] not in " ▁"
    ]
    agree(
        ours, reference.encode, [text for text in inside if "> " not in text] if legacy else inside
    )
    decodes(ours, reference, plain + inside)
    assert ours.vocab_size == 802


@pytest.mark.parametrize("legacy", [True, False])
def test_tokenizer_json_made_from_sentencepiece(pieces, texts, tmp_path, legacy):
    made = hugging_face(pieces, legacy=legacy)
    made.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy})
    )
    ours, reference = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    special = list(with_special(texts, ["<s>", "</s>", "<unk>"]))
    agree(ours, reference.encode, texts + special)
    decodes(ours, reference, texts + special)
    assert ours.encode("a")[0] == ours.bos_id == 1


def test_tokenizer_json_of_llama2(pieces, texts, tmp_path):
    """As transformers 4 wrote it: "▁" by a normalizer, put before every text between special
    tokens.
    """
    hugging_face(pieces).save_pretrained(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spec["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace],
    }
    spec["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer.model").write_bytes(b"not read: tokenizer.json wins")
    ours, reference = (
        load_tokenizer(tmp_path),
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
    )
    every = [*texts, *with_special(texts, ["<s>", "</s>"])]
    agree(ours, lambda text: reference.encode(text).ids, every)
    for text in every:
        ids = ours.encode(text)
        assert ours.decode(ids) == reference.decode(ids)


# ---- streaming


@pytest.fixture(params=["llama3", "qwen", "pieces"])
def each(request):
    made = request.getfixturevalue(request.param)
    return load_tokenizer(made if request.param == "pieces" else made[2])


def test_streams_whole_characters_that_continue_the_prompt(each, texts):
    for prompt in ("def f(x):", "日本語", "x "):
        for text in texts[::3] + ODD + SCRIPTS:
            text = unicodedata.normalize("NFC", text)
            ids = each.encode(prompt + text)
            cut = next(
                (n for n in range(len(ids)) if len(each.decode(ids[:n])) >= len(prompt)), len(ids)
            )
            # The prompt's last token ends inside of a character.
            if "\ufffd" in each.decode(ids[:cut]):
                continue
            stream = each.stream()
            shown = [stream.push(id) for id in ids[cut:]]
            assert "\ufffd" not in "".join(shown) and stream.flush() == ""
            assert each.decode(ids[:cut]) + "".join(shown) == each.decode(ids)
            assert "".join(shown) == each.decode(ids[cut:], continuing=True)


def test_streams_what_is_not_utf8(each):
    # A character that no tokenizer here was trained on: three bytes.
    eacute = each.encode("\u0dc6", bos=False)[-3:]
    stream = each.stream()
    assert [stream.push(eacute[0]), stream.push(eacute[1]), stream.flush()] == ["", "", "\ufffd"]
    stream = each.stream()
    assert (
        stream.push(eacute[0]) == ""
        and stream.push(each.encode("a", bos=False)[-1]).strip("\ufffd ") == "a"
    )
    assert each.decode([10**9]) == "" and each.token_bytes(10**9) == b"", (
        "padding of the embedding has no text"
    )
    rng = random.Random(2)
    for _ in range(200):
        ids, stream = rng.choices(range(each.vocab_size), k=30), each.stream(continuing=False)
        assert "".join([*map(stream.push, ids), stream.flush()]) == each.decode(ids)


# ---- EOS, vocabularies


@pytest.mark.parametrize("generation, config, wanted", [
    ({"eos_token_id": [7, 9, 7]}, {"eos_token_id": 3}, (7, 9)),
    ({"eos_token_id": 8}, {}, (8,)),
    ({}, {"eos_token_id": [3, 4]}, (3, 4)),
    ({"eos_token_id": None}, {"eos_token_id": 0}, (0,)),
    (None, None, ()),
])  # fmt: skip
def test_eos_ids(qwen, tmp_path, generation, config, wanted):
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    assert read_eos_ids(tmp_path) == wanted
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((qwen[2] / name).read_bytes())
    assert load_tokenizer(tmp_path).eos_ids == (wanted or (qwen[1].eos_token_id,)), (
        "else tokenizer_config.json's"
    )


@pytest.mark.parametrize("value", ["2", True, [1, "2"], -1, 2**62, 1.5, {"a": 1}])
def test_bad_eos_ids(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        ValueError, match="config.json in .* has eos_token_id .* wanted a token id or a list"
    ):
        read_eos_ids(tmp_path)


def test_vocabulary_difference(llama3, qwen, pieces, tmp_path):
    a, b = llama3[0], qwen[0]
    assert vocabulary_difference(a, load_tokenizer(llama3[2])) is None
    spec = json.loads((llama3[2] / "tokenizer.json").read_text())
    token, id = next((token, id) for token, id in spec["model"]["vocab"].items() if id == 700)
    spec["model"]["vocab"] |= {"added": 5000}  # more tokens on top are no difference
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert vocabulary_difference(load_tokenizer(tmp_path), a) is None
    spec["added_tokens"].append({"id": 700, "content": "<other>", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert vocabulary_difference(a, load_tokenizer(tmp_path)) == (
        700,
        a.token_bytes(700),
        b"<other>",
    )
    id, ours, theirs = vocabulary_difference(a, b)
    assert (
        all(a.token_bytes(n) == b.token_bytes(n) for n in range(id))
        and a.token_bytes(id) == ours != theirs
    )
    assert vocabulary_difference(a, load_tokenizer(pieces))[0] == 0


# ---- chat

LLAMA3_CHAT = """{{- bos_token }}
{%- if strftime_now is defined %}{%- set date = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception("This template knows user and assistant, got " + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """{%- set ns = namespace(asked=0) %}
{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}
<|im_start|>system
You are helpful.<|im_end|>
{% endif %}
    {% if message.role == 'user' %}
    {% set ns.asked = ns.asked + 1 %}
    {% endif %}
{%- if message.content is not string %}{% continue %}{% endif %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% if message.extra is defined %}
  {{ message.extra | tojson }} {{ message.extra | tojson(indent=2) }}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant ({{ ns.asked }})
<think>
{% endif %}
"""
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Wer bist Du? 👩‍👧\n\n  x"},
    ],
    [
        {"role": role, "content": text}
        for role, text in (("user", "a <b> & 'c'"), ("assistant", "ok\n"), ("user", "日本"))
    ],
    [{"role": "user", "content": "x", "extra": {"ü": ["<a>", 1, None]}, "name": None}],
]


@pytest.mark.parametrize("where", ["file", "text", "named"])
@pytest.mark.parametrize("kind, template", [("llama3", LLAMA3_CHAT), ("qwen", CHATML)])
def test_chat(request, tmp_path, kind, template, where):
    folder = request.getfixturevalue(kind)[2]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
        config["chat_template"] = "not this one"
    else:
        named = [
            {"name": "tool_use", "template": "not this one"},
            {"name": "default", "template": template},
        ]
        config["chat_template"] = template if where == "text" else named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, reference = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in CHATS if where == "file" else CHATS[:1]:
        wanted = reference.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert ours.encode_chat(messages) == wanted, reference.decode(wanted)
        assert wanted.count(ours.bos_id) == (kind == "llama3"), "one BOS, not two"


GENERATION = """{%- for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}{% set said = message.content %}
{{ said | trim }}<|im_end|>{% endgeneration %}
{%- else %}<|im_start|>{{ message.role }} {{ loop.index }}
{{ message.content }}{% endif %}
{%- endfor %}{{ said is defined }}
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
"""


def test_generation_blocks_system_and_thinking(qwen, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((qwen[2] / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(GENERATION)
    ours, reference = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for thinking in (None, True, False):
        told = {} if thinking is None else {"enable_thinking": thinking}
        wanted = reference.apply_chat_template(
            [{"role": "system", "content": "Be brief."}, *CHATS[2]],
            add_generation_prompt=True,
            return_dict=False,
            **told,
        )
        assert ours.encode_chat(CHATS[2], system="Be brief.", thinking=thinking) == wanted
    shown = ours.decode(wanted)
    assert "ok" in shown and "Be brief." in shown and shown.endswith("<think></think>")


def test_chat_that_its_template_rejects(llama3, tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        llama3[0].encode_chat(CHATS[0])
    (tmp_path / "tokenizer.json").write_bytes((llama3[2] / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(LLAMA3_CHAT)
    with pytest.raises(ValueError, match="This template knows user and assistant, got tool"):
        load_tokenizer(tmp_path).encode_chat([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}",
    "{{ raise_exception.__globals__['json'].decoder }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{{ 'x' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ range(10**9) | list }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor "
    "%}{{ ns.x }}",
    "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{" + "(" * 9999,
    "{% if %}",
    "x" * 300_000,
    "{{ nothing.at.all }}",
])  # fmt: skip
def test_templates_of_strangers(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="chat template") as error:
        render_chat(template, {"messages": []})
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert time.perf_counter() - start < 2 * chat.CHAT_SECONDS and not list(tmp_path.iterdir())


def test_template_without_end(monkeypatch):
    monkeypatch.setattr(chat, "CHAT_SECONDS", 1)
    with pytest.raises(ValueError, match="not done after 1 s"):
        render_chat(
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {}
        )


# ---- bad files


def test_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(str(tmp_path)) is None


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("tokenizer.json", b"{", "tokenizer.json is unreadable .*wanted a JSON object"),
        ("tokenizer.json", b"\xff\xfe{}", "unreadable .*wanted a JSON object"),
        ("tokenizer.json", b"", "unreadable .*wanted a JSON object"),
        ("tokenizer.json", b"[" * 200_000, "unreadable .*wanted a JSON object"),
        ("tokenizer.json", b"[]", r"holds \[\], wanted a JSON object"),
        (
            "tokenizer.json",
            b'{"model": {"type": "BPE"}}',
            "wanted BPE, byte-level or with byte_fallback",
        ),
        ("tokenizer.json", b'{"model": 3}', "damaged"),
        ("tokenizer.model", b"", "damaged"),
        ("tokenizer.model", b"\x0a\x05hello", "damaged"),
        ("tokenizer.model", b"aGk= 1\naGk 2\n", "damaged"),
        ("tokenizer_config.json", b"nope", "tokenizer_config.json is unreadable .*wanted a JSON"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": 6}}', "damaged"),
        ("added_tokens.json", b'{"<x>": "5"}', "ids outside"),
        ("added_tokens.json", b'{"<x>": 4611686018427387904}', "ids outside"),
        ("special_tokens_map.json", b"7", "holds 7, wanted a JSON object"),
        ("chat_template.jinja", b"\xff", "damaged"),
        ("generation_config.json", b"{}}", "generation_config.json is unreadable .*wanted a JSON"),
    ],
)
def test_damaged_files(llama3, tmp_path, name, data, says):
    if name != "tokenizer.model":
        (tmp_path / "tokenizer.json").write_bytes((llama3[2] / "tokenizer.json").read_bytes())
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=says) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "tokenizer.json").write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(ValueError, match="tokenizer.json has more than 1048576 bytes: fetch"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "part, value, says",
    [
        ("normalizer", {"type": "NFKC"}, "normalizer .*NFKC.* wanted NFC or none"),
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
            "Lowercase",
        ),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "ByteLevel"}]},
            "Whites",
        ),
        (
            "pre_tokenizer",
            {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": "a"},
                        "behavior": "MergedWithNext",
                        "invert": False,
                    },
                    {"type": "ByteLevel", "add_prefix_space": False},
                ],
            },
            "MergedWithNext",
        ),
        (
            "pre_tokenizer",
            {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": "("},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ],
            },
            "damaged .error: missing",
        ),
        (
            "pre_tokenizer",
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
            "with byte_fallback",
        ),
        (
            "post_processor",
            {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]},
            "BertProcessing",
        ),
        (
            "post_processor",
            {
                "type": "TemplateProcessing",
                "special_tokens": {},
                "single": [
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "</s>", "type_id": 0}},
                ],
            },
            "nothing after it",
        ),
        ("model", {"type": "Unigram", "vocab": [["a", 0.0]]}, "Unigram"),
        ("model", {"type": "WordPiece", "vocab": {"a": 0}}, "WordPiece"),
        ("model", {"type": "BPE", "dropout": 0.1, "vocab": {"a": 0}, "merges": []}, "dropout"),
        (
            "model",
            {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {"a": 0}, "merges": []},
            "</w>",
        ),
        (
            "model",
            {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},
            "KeyError: 'ab'",
        ),
        ("model", {"type": "BPE", "vocab": {"a": 1 << 62}, "merges": []}, "ids outside"),
        ("model", {"type": "BPE", "vocab": {}, "merges": []}, "damaged"),
        ("added_tokens", [{"id": 9, "content": "x", "single_word": True}], "single_word"),
        ("added_tokens", [{"id": 9, "content": "x", "rstrip": True}], "rstrip"),
        ("added_tokens", [{"id": "9", "content": "x"}], "ids outside"),
    ],
)
def test_what_is_not_supported_is_named(llama3, tmp_path, part, value, says):
    spec = json.loads((llama3[2] / "tokenizer.json").read_text())
    spec |= {part: value} | ({} if part == "added_tokens" else {"added_tokens": []})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=says) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def split_by(llama3, folder, pattern):
    """A tokenizer that splits by a pattern of its own."""
    spec = json.loads((llama3[2] / "tokenizer.json").read_text())
    node = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [node, level]}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    "pattern", ["a{1000000}", "(?:(?:a{99}){0,99}){1,99}", "a{0}(?:b{,99999})", "a|" * 9999 + "b"]
)
def test_a_pattern_that_would_take_all_memory_is_refused(llama3, tmp_path, pattern):
    with pytest.raises(ValueError, match="wanted one with few repetitions"):
        split_by(llama3, tmp_path, pattern)


def test_a_pattern_that_does_not_end(llama3, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SPLIT_SECONDS", 0.2)
    tokenizer = split_by(llama3, tmp_path, "(?:a|aa)+$")
    assert tokenizer.decode(tokenizer.encode("aaa")) == "aaa"
    with pytest.raises(ValueError, match="splits a text in"):
        tokenizer.encode("a" * 60 + "b")


def test_an_empty_pattern_puts_no_space_before_the_text(llama3, tmp_path):
    tokenizer = split_by(llama3, tmp_path, "")
    assert tokenizer.decode(tokenizer.encode("a b\n")) == "a b\n"


def test_text_that_is_not_utf8(qwen):
    with pytest.raises(ValueError, match="not UTF-8"):
        qwen[0].encode(b"abc\xff".decode("utf-8", "surrogateescape"))


def test_a_number_for_true_or_false_repeats_nothing():
    node = {"type": "ByteLevel", "add_prefix_space": 10**9, "use_regex": 10**9}
    assert engine._patterns([node]) == [None, engine.GPT2_PATTERN]
