"""One clear sentence for everything that can be wrong with a checkpoint's files, and no memory
spent on it.
"""

import json
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from families import LLAMA, tiny_model
from families import refuses as refuses_to
from safetensors.torch import load_file, save_file

from checkpoint import weights
from checkpoint.weights import load_config
from model import Transformer
from scripts.save import save_model


def load_model(name):
    return weights.load_model(name, "cpu", torch.float32, Transformer)


@pytest.fixture
def folder(tmp_path):
    """A sound checkpoint in one file."""
    save_model(tiny_model(dtype=torch.float32), LLAMA, tmp_path / "good")
    return tmp_path / "good"


def refuses(match: str, folder: Path, load=load_model) -> str:
    return refuses_to(match, folder, load)


def edit_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ---- config.json ----


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "unreadable"),
        ("{", "unreadable"),
        ("[1]", r"holds \[1\], wanted"),
        ("null", "holds None, wanted"),
        ("[" * 200_000, "unreadable"),
        ('{"a":' * 100_000, "unreadable"),
        (" " * (1 << 20) + "{}", "more than 1048576 bytes"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "unreadable"),
        ("\ud800", "unreadable"),
        ('{"model_type": "' + "x" * 100_000 + '"}', "config.json: model_type"),
        ('{"model_type": "\\u001b[31m"}', r"model_type = '\\x1b"),
        ('{"model_type": ' + "[" * 400 + "]" * 400 + "}", "model_type"),
    ],
)
def test_config_that_is_no_config(folder, text, match):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    for load in (load_config, load_model):
        refuses(match, folder, load)


def test_config_json_that_is_a_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refuses("no config.json", folder)


# ---- tensors that do not fit ----


def test_missing_unused_and_wrong_tensors_are_named(folder):
    good = (folder / "model.safetensors").read_bytes()
    cases = [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight',",
        ),
        (
            lambda t: t.clear(),
            "lacks 'lm_head.weight', 'model.embed_tokens.weight', 'model.layers.0.* and 18 more",
        ),
        (lambda t: t.update(extra=torch.ones(1)), "holds 'extra', which no part"),
        (lambda t: t.update({"a\n\x1b[31m" + "b" * 500: torch.ones(1)}), "which no part"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}),
            "q_proj.bias', which no part",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(48, 96)}),
            r"lm_head.weight is \(48, 96\).*\(96, 48\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(48, 1)}),
            r"model.norm.weight is \(48, 1\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(48).int()}),
            "type I32, wanted F64, F32, F16, BF16",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}),
            "type F8_E4M3, wanted",
        ),
    ]
    for change, match in cases:
        (folder / "model.safetensors").write_bytes(good)
        edit_tensors(folder, change)
        refuses(match, folder)


def test_config_and_weights_of_different_models(folder):
    for key, value, match in (
        ("num_hidden_layers", 3, r"lacks 'model\.layers\.2"),
        ("num_hidden_layers", 1, r"holds 'model\.layers\.1.* and 6 more, which no part"),
        ("hidden_size", 1 << 24, r"\(96, 16777216\)"),
        ("vocab_size", 1 << 24, r"\(16777216, 48\)"),
        ("head_dim", 1 << 24, r"q_proj.weight is \(48, 48\)"),
        ("num_hidden_layers", 4096, "lacks .*more, which config.json calls for"),
        (
            "num_key_value_heads",
            4,
            r"k_proj.weight is \(24, 48\), but config.json makes it \(48, 48\)",
        ),
    ):
        good = (folder / "config.json").read_text()
        edit_config(folder, **{key: value})
        refuses(match, folder)
        (folder / "config.json").write_text(good)


def test_nothing_is_allocated_before_headers_agree(folder, monkeypatch):
    """A config of 2^24 x 2^24 must fail on the file's header, whatever the memory."""
    edit_config(
        folder,
        hidden_size=1 << 24,
        intermediate_size=1 << 24,
        vocab_size=1 << 24,
        num_hidden_layers=4096,
    )
    monkeypatch.setattr(weights, "build_model", lambda *args: pytest.fail("allocates"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses("lacks", folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_tied_embeddings_beside_a_head(folder):
    edit_config(folder, tie_word_embeddings=True)
    refuses("lm_head.weight differs from model.embed_tokens.weight", folder)
    edit_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    model = load_model(folder)
    assert model.head.weight is model.embed.weight
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].half()}))
    refuses("lm_head.weight differs", folder)


def test_not_enough_memory_is_said_with_both_sizes(folder, monkeypatch):
    assert weights.available_bytes("cpu") > 1 << 20
    monkeypatch.setattr(weights, "available_bytes", lambda device: 30_000)
    refuses("need 0.00 GB in float32, but cpu has 0.00 GB free", folder)
    monkeypatch.setattr(weights, "available_bytes", lambda device: None)
    load_model(folder)


def test_a_container_may_have_less_memory_than_its_machine(tmp_path, monkeypatch):
    """Files that were read and are not in use do not count as used."""
    monkeypatch.setattr(weights, "CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("700\n")
    for most, free in (("1000", 300), ("500", 0), ("max", None)):
        (tmp_path / "memory.max").write_text(most + "\n")
        assert free is None or weights.available_bytes("cpu") == free
    assert weights.available_bytes("cpu") > 1 << 20
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100\nactive_file 9\n")
    assert weights.available_bytes("cpu") == 400


# ---- files that are not what they say ----


def header(content, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def f32(shape, first, last) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [first, last]}


GOOD_HEAD = 8  # bytes of length before the header
CORRUPT = {
    "empty": lambda good: b"",
    "shorter than a length": lambda good: good[:5],
    "cut in the header": lambda good: good[:200],
    "cut in the data": lambda good: good[:-10],
    "longer than its header says": lambda good: good + b"xxx",
    "header of 2^62 bytes": lambda good: struct.pack("<Q", 1 << 62) + good[8:],
    "header of 2^64-1 bytes": lambda good: b"\xff" * 8 + good[8:],
    "header longer than the file": lambda good: struct.pack("<Q", len(good) + 1) + good[8:],
    "header of 200 MB": lambda good: struct.pack("<Q", 200 << 20) + good[8:],
    "no JSON": lambda good: header(b"\xff\xfe{}"),
    "deeply nested": lambda good: header(b"[" * 100_000),
    "nested in a value": lambda good: header(b'{"a":' * 100_000),
    "a list": lambda good: header([]),
    "overlapping": lambda good: header({"a": f32([2], 0, 8), "b": f32([2], 4, 12)}, bytes(12)),
    "with a hole": lambda good: header({"a": f32([2], 4, 12)}, bytes(12)),
    "offsets outside": lambda good: header({"a": f32([2], 0, 1 << 62)}, bytes(8)),
    "offsets backwards": lambda good: header({"a": f32([2], 8, 0)}, bytes(8)),
    "shape of 2^62": lambda good: header({"a": f32([1 << 62, 4], 0, 8)}, bytes(8)),
    "negative shape": lambda good: header({"a": f32([-2], 0, 8)}, bytes(8)),
    "unknown dtype": lambda good: header(
        {"a": {"dtype": "Q4_K", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)
    ),
    "a pickle": lambda good: b"PK\x03\x04" + bytes(500),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_safetensors_are_refused(folder, kind):
    path = folder / "model.safetensors"
    path.write_bytes(CORRUPT[kind](path.read_bytes()))
    refuses(
        "model.safetensors is not a sound safetensors file .*fetch the checkpoint again", folder
    )


def test_flipped_bytes_in_the_header_load_or_are_refused(folder):
    """Random damage: whatever it does, it ends in a model or in a sentence."""
    path, rng = folder / "model.safetensors", torch.Generator().manual_seed(0)
    good = path.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        for at, value in torch.randint(1 << 20, (2, 2), generator=rng).tolist():
            bad[at % (length + 8)] = value % 256
        path.write_bytes(bad)
        try:
            load_model(folder)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) or not str(error).isascii()
    assert refused > 100


def test_shards_that_are_missing_or_lead_outside(folder, tmp_path):
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (tmp_path / "secret.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    names = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")

    def with_map(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))

    with_map(names)
    load_model(folder)
    outside = [
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "..",
        "",
        ".",
        "x/../a.safetensors",
    ]
    outside += [
        "a.safetensors/",
        "..\\secret.safetensors",
        "a.bin",
        "C:\\a.safetensors",
        "\x1b[31m/x.safetensors",
    ]
    for name in outside:
        with_map(names | {"lm_head.weight": name})
        refuses("has no '.*', wanted safetensors only", folder)
    for name in ("b.safetensors", "\0.safetensors", "x" * 5000 + ".safetensors"):
        with_map(names | {"lm_head.weight": name})
        refuses("has no '.*, wanted safetensors only: fetch", folder)
    for weight_map in ([], None):
        with_map(weight_map)
        refuses("no weight_map", folder)
    for name in (3, ["a.safetensors"]):
        with_map(names | {"lm_head.weight": name})
        refuses("has no ", folder)
    with_map({})
    refuses("lacks", folder)
    shutil.copy(folder / "a.safetensors", folder / "c.safetensors")
    with_map(names | {"lm_head.weight": "c.safetensors"})
    refuses("c.safetensors holds .* a second time", folder)
    index.write_text("[" * 100_000)
    refuses("index.json is unreadable", folder)
    index.write_text(" " * ((1 << 24) + 1))
    refuses("more than 16777216 bytes", folder)


def test_a_shard_that_is_a_folder_or_a_pipe_does_not_hang(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refuses("has no 'model.safetensors', wanted safetensors", folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    os.mkfifo(folder / "b.safetensors")
    refuses("has no 'b.safetensors', wanted safetensors", folder)
