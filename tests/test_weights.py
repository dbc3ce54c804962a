"""weights.py: reading and writing checkpoints, and one clear sentence for everything that can be
wrong with them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import LLAMA, random_text, refuses, tiny_model, whole
from safetensors.torch import load_file, save_file

from checkpoint import weights
from checkpoint.config import Config
from checkpoint.weights import (
    load_config,
    open_tensors,
    pieces,
    resolve,
    split_inflate,
)
from model import Transformer
from scripts.save import save_model, weight_bytes


def load_model(name, device="cpu", dtype=torch.float32):
    return weights.load_model(name, device, dtype, Transformer)


KINDS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 20},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    """A sound checkpoint in one file."""
    save_model(tiny_model(dtype=torch.float32), LLAMA, tmp_path / "good")
    return tmp_path / "good"


# ---- sound checkpoints ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000, 1])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, kind, shard_bytes):
    raw, model = LLAMA | KINDS[kind], tiny_model(**KINDS[kind])
    files = save_model(model, raw, tmp_path, shard_bytes=shard_bytes)
    again = load_model(tmp_path, "cpu", torch.float64)
    assert again.config == model.config == load_config(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert not any(weight.requires_grad or weight.is_meta for weight in again.parameters())
    assert (again.head.weight is again.embed.weight) == model.config.tied
    tensors = len(list(pieces(model.config)))
    assert (
        len(files)
        == (1 if shard_bytes == 1 << 30 else tensors if shard_bytes == 1 else len(files))
        > 0
    )
    assert sum(path.stat().st_size for path in files) >= weight_bytes(model.config, torch.float64)
    if shard_bytes == 20_000:
        assert 1 < len(files) < tensors
        biggest = max(torch.empty(p.shape).numel() * 8 for p in pieces(model.config))
        assert all(path.stat().st_size < max(20_000, biggest) + 5000 for path in files)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_floating_type_is_converted_to_the_one_asked_for(tmp_path, stored):
    model = tiny_model()
    save_model(model, LLAMA, tmp_path, dtype=stored)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(stored)[6:]
    for wanted in (torch.float32, torch.bfloat16):
        again = load_model(str(tmp_path), "cpu", wanted)
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value.to(stored).to(wanted)), name


def test_a_function_writes_without_a_model_and_holds_one_shard(tmp_path):
    alive, most = [], 0

    def fill(piece, out):
        nonlocal most
        import weakref

        alive.append(weakref.ref(out))
        most = max(most, sum(ref() is not None for ref in alive))
        out.fill_(len(piece.theirs))

    files = save_model(fill, LLAMA, tmp_path, torch.float32, shard_bytes=20_000)
    again = load_model(tmp_path)
    assert (again.embed.weight == len("model.embed_tokens.weight")).all()
    assert (
        again.layers[1].attention.qkv.weight == len("model.layers.1.self_attn.q_proj.weight")
    ).all()
    assert most < len(alive) / 2 and len(files) > 3


def test_writing_again_in_the_other_form_replaces(tmp_path):
    for seed, size in ((1, 1 << 30), (2, 20_000), (3, 1 << 30)):
        model = tiny_model(seed=seed)
        save_model(model, LLAMA, tmp_path, shard_bytes=size)
        assert torch.equal(
            load_model(tmp_path, "cpu", torch.float64).head.weight, model.head.weight
        )
    assert not list(tmp_path.glob("*.tmp"))


def test_the_hub_layout_of_links_to_blobs_loads(folder, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.move(folder, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert load_model(snapshot).config == Config.from_dict(LLAMA)


def test_old_rope_frequencies_in_the_file_are_not_needed(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)},
        folder / "model.safetensors",
    )
    load_model(folder)


def test_weights_land_once_without_a_second_copy_in_memory(tmp_path):
    """In a process of its own: the peak of anonymous memory is that of the model and a small rest,
    not twice.
    """
    raw = LLAMA | {
        "hidden_size": 1024,
        "intermediate_size": 8192,
        "vocab_size": 16384,
        "head_dim": 256,
    }
    save_model(lambda piece, out: out.fill_(0.01), raw, tmp_path, torch.float32)
    code = (
        "import re, sys, torch\n"
        "from checkpoint import weights\n"
        "from model import Transformer\n"
        "torch.set_num_threads(1)\n"
        "def anonymous():\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) * "
        "1024\n"
        "before, most, build = anonymous(), 0, weights.build_model\n"
        "def watched(config, fill, *rest, **more):\n"
        "    def step(piece, out):\n"
        "        global most\n"
        "        fill(piece, out)\n"
        "        most = max(most, anonymous())\n"
        "    return build(config, step, *rest, **more)\n"
        "weights.build_model = watched\n"
        "model = weights.load_model(sys.argv[1], 'cpu', torch.float32, Transformer)\n"
        "size = sum(w.nbytes for w in model.parameters())\n"
        "print(size, most - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(weights.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    size, used = map(int, done.stdout.split())
    assert size > 200e6 and used < size + 25e6, "the largest tensor has 67 MB"


def test_threads_that_make_few_bits_are_bounded_by_memory(tmp_path, monkeypatch):
    """Each holds a weight in floats: on many cores that was more than all that it becomes."""
    save_model(tiny_model(seed=3), LLAMA, tmp_path)
    found, build = [], weights.build_model
    noted = lambda *given: found.append(given[-1]) or build(*given)  # noqa: E731
    monkeypatch.setattr(weights, "build_model", noted)
    monkeypatch.setattr(weights, "available_cores", lambda: range(8))
    for bits, scratch in (("int8", 1 << 28), ("int8", 1), ("none", 1)):
        monkeypatch.setattr(weights, "SCRATCH_BYTES", scratch)
        weights.load_model(tmp_path, "cpu", torch.float32, Transformer, bits=bits)
    assert found == [8, 1, 8]


# ---- names ----


def test_names_of_folders(folder, tmp_path, monkeypatch):
    assert resolve(folder) == resolve(str(folder)) == resolve(f"{folder}/") == folder
    assert resolve(f"inflate:60m:{folder}") == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("good") == Path("good")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name") == Path("owner/name"), "a folder that exists wins over the hub"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/good") == folder


@pytest.mark.parametrize(
    "name", ["", " ", "/no/where", "./x", "../x", "~/x", "~nobody/x", "a/b/c", "a/", "gpt2", "a\\b"]
)
def test_a_missing_folder_is_not_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuses("there is no folder .*hub id", name, resolve)


@pytest.mark.parametrize("name", ["x" * 5000, "/" + "x" * 5000, "a\0b", "\x1b[31m"])
def test_absurd_names_are_refused(name):
    refuses("there is no folder", name, resolve)


def test_hub_ids_are_fetched_without_pickles_and_failures_are_one_sentence(folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetch(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert load_model("owner/name").config == Config.from_dict(LLAMA)
    assert asked["name"] == "owner/name" and "config.json" in asked["patterns"]
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["patterns"])

    def fail(name, allow_patterns):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for said in (
        OSError("401 Unauthorized\nmore\nlines"),
        RuntimeError(""),
        ConnectionError("no route to host."),
    ):
        error = said
        message = refuses("owner/name.*Hugging Face hub failed", "owner/name", resolve)
        assert "hf auth login" in message and "more" not in message


def test_hub_ids_offline_use_the_cache_or_say_so(folder, tmp_path):
    """The real client in a process of its own, offline: first with an empty cache, then with one
    that has the files.
    """
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    code = (
        "import pathlib, shutil, sys\n"
        "from checkpoint import weights\n"
        "try: weights.resolve('owner/name')\n"
        "except ValueError as error: print(error)\n"
        "good, snapshot = sys.argv[1:]\n"
        "refs = pathlib.Path(snapshot).parents[1] / 'refs'\n"
        "refs.mkdir(parents=True)\n"
        "(refs / 'main').write_text('0' * 40)\n"
        "shutil.copytree(good, snapshot)\n"
        "print(weights.resolve('owner/name'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(weights.__file__).parents[1])}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-c", code, folder, snapshot]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert re.search("owner/name.*hub failed", lines[0]) and lines[1:] == [str(snapshot)], done


@pytest.mark.parametrize(
    "name", ["inflate:", "inflate:60m", "inflate:60m:", "inflate::x", "inflate:60m:inflate:60m:x"]
)
def test_half_an_inflated_name_is_refused(name):
    refuses("inflate:SHAPE:FOLDER", name, split_inflate)


def test_files_instead_of_folders(folder):
    refuses(
        "is a file but not a GGUF file, wanted one, or a folder",
        folder / "model.safetensors",
        load_model,
    )
    refuses("has no config.json", folder.parent, load_model)
    (folder / "model.safetensors").unlink()
    refuses("has no 'model.safetensors', wanted safetensors only: fetch", folder, load_model)
    for pickle in ("pytorch_model.bin", "consolidated.00.pth"):
        (folder / pickle).write_bytes(b"\x80\x02cos\nsystem\n")
        refuses(f"wanted safetensors only, not {pickle}, which can run code", folder, load_model)
        (folder / pickle).unlink()


def test_the_loaded_model_computes(folder):
    model = load_model(folder, "cpu", torch.float64)
    model.set_positions(20)
    text = random_text(20, seed=1)
    source = tiny_model(dtype=torch.float32).double()  # the file holds float32
    source.set_positions(20)
    assert torch.equal(whole(model, text), whole(source, text))
    assert set(open_tensors(folder)) == {piece.theirs for piece in pieces(model.config)}
