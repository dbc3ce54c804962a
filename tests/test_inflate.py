"""Inflated checkpoints: another shape, the same numbers, the same text, and no word of the new
vocabulary ever.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import LLAMA, LLAMA3_ROPE, greedy, random_text, randomise, refuses, tiny_model, whole

from checkpoint import weights
from checkpoint.config import Config
from checkpoint.inflation import SHAPES, grow_config, parse_shape
from checkpoint.weights import load_config, pieces, resolve
from model import Transformer
from scripts.inflate import inflate, main
from scripts.save import save_model


def load_model(name, device="cpu", dtype=torch.float32):
    return weights.load_model(name, device, dtype, Transformer)


ROOT = Path(__file__).resolve().parent.parent
# The small model: hidden 48, 2 layers, 4 heads over 2 KV heads of 12 dimensions, 80 units, 96
# words.
GROWN = {
    "nothing": "hidden=48",
    "hidden": "hidden=80",
    "layers": "layers=5",
    "units": "ffn=200",
    "heads twice as wide": "head_dim=24",
    "heads four times as wide": "head_dim=48",
    "more KV heads": "heads=10,kv_heads=5",
    "more queries to a KV head": "heads=8",
    "fewer queries to a KV head": "heads=6,kv_heads=6",
    "words": "hidden=64,vocab=500",
    "everything": "hidden=120,layers=4,heads=12,kv_heads=3,head_dim=24,ffn=160,vocab=1000",
}
SOURCES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "window": {"model_type": "mistral", "sliding_window": 6},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    # So large an eps that a wrong one shows.
    "qwen3": {"model_type": "qwen3", "rms_norm_eps": 1e-3},
    "layer types": {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
LARGE = "hidden=112,layers=4,heads=16,kv_heads=8,head_dim=48,ffn=160,vocab=1000"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    save_model(tiny_model(seed=7), LLAMA, folder)
    return folder


def loaded(name, dtype=torch.float64):
    model = load_model(name, "cpu", dtype)
    model.set_positions(128)
    return model


def check_same(source, grown, words: int, text: list[int], tolerance=1e-9):
    """Logits of the old words are equal, those of new words are out of reach at any temperature."""
    wanted, got = whole(source, text), whole(grown, text)
    torch.testing.assert_close(got[:, :words], wanted, rtol=0, atol=tolerance)
    if got.shape[1] > words:
        assert (got[:, words:] < -1000).all() and (got[:, words:] > -60000).all()


@pytest.mark.parametrize("shape", GROWN.values(), ids=GROWN)
def test_grown_llama_computes_the_same(small, shape):
    source, grown, text = loaded(small), loaded(f"inflate:{shape}:{small}"), random_text(40, seed=1)
    assert load_config(f"inflate:{shape}:{small}") == grown.config
    for name, size in parse_shape(shape).items():
        field = {
            "hidden": "hidden_size",
            "ffn": "intermediate_size",
            "vocab": "vocab_size",
            "head_dim": "head_dim",
        }
        assert getattr(grown.config, field.get(name, f"num_{name}")) == size
    check_same(source, grown, 96, text)
    assert greedy(grown, text[:8], 48) == greedy(source, text[:8], 48)
    assert resolve(f"inflate:{shape}:{small}") == Path(small), "the tokenizer is the small model's"


@pytest.mark.parametrize("kind", SOURCES)
def test_every_family_grows(tmp_path, kind):
    raw = LLAMA | SOURCES[kind]
    save_model(tiny_model(seed=3, **SOURCES[kind]), raw, tmp_path)
    source, grown = loaded(tmp_path), loaded(f"inflate:{LARGE}:{tmp_path}")
    assert grown.config.windows[:2] == source.config.windows and len(grown.config.windows) == 4
    check_same(source, grown, 96, random_text(40, seed=1))
    # New words need rows of their own; without them the embedding stays tied.
    if source.config.tied:
        assert not grown.config.tied
        wide = loaded(f"inflate:hidden=100:{tmp_path}")
        assert wide.config.tied and wide.head.weight is wide.embed.weight
        check_same(source, wide, 96, random_text(40, seed=1))


def test_new_parts_cost_what_they_should(small):
    """The rest is random, not zero: each matrix but o_proj and down_proj is dense, and nothing is
    out of scale.
    """
    grown = loaded(f"inflate:{GROWN['everything']}:{small}")
    for piece in pieces(grown.config):
        value = grown.get_parameter(piece.ours)[piece.start : piece.start + piece.shape[0]]
        assert value.isfinite().all() and value.abs().max() < 2000, piece.theirs
        dense = (value != 0).double().mean()
        if piece.theirs.endswith(
            ("q_proj.weight", "gate_proj.weight", "up_proj.weight", "lm_head.weight")
        ):
            assert dense > 0.9, piece.theirs
        if piece.layer >= 2 and piece.theirs.endswith(("o_proj.weight", "down_proj.weight")):
            assert dense == 0, piece.theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_logits_stay_finite_in_every_dtype(tmp_path, dtype, scale):
    """Whatever the size of the small model's hidden states, new words are far below the old and
    above -inf.
    """
    model = tiny_model(seed=5)
    for name, weight in model.named_parameters():
        if "embed" in name or "out" in name or "down" in name:
            weight.mul_(scale)
    save_model(model, LLAMA, tmp_path)
    source, grown = loaded(tmp_path, dtype), loaded(f"inflate:{LARGE}:{tmp_path}", dtype)
    text = random_text(60, seed=2)
    wanted, got = whole(source, text).float(), whole(grown, text).float()
    assert got.isfinite().all()
    assert (got[:, 96:].max(1).values < got[:, :96].min(1).values - 1000).all()
    assert (got[:, :96] - wanted).norm() / wanted.norm() < (1e-4 if dtype == torch.float32 else 0.1)


def test_new_words_are_never_drawn(small):
    """200,000 draws at temperatures up to 50: softmax gives the new words exactly nothing, with or
    without noise.
    """
    grown = loaded(f"inflate:hidden=64,vocab=500:{small}", torch.float32)
    logits = whole(grown, random_text(50, seed=3))
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.1, 1.0, 10.0, 50.0):
        p = torch.softmax(logits / temperature, -1)
        assert (p[:, 96:] == 0).all()
        noisy = logits / temperature - torch.log(
            -torch.log(torch.rand(1000, *logits.shape, generator=generator))
        )
        assert (noisy.argmax(-1) < 96).all()


def test_written_folder_equals_the_model_in_memory(small, tmp_path):
    (small / "tokenizer.model").write_bytes(b"not read here")
    shape, out = GROWN["everything"], tmp_path / "out"
    said = inflate(str(small), shape, out, torch.float32, "cpu", 0, 100_000)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert (
        len(files) > 3
        and f"{len(files)} file(s)" in said
        and (out / "model.safetensors.index.json").exists()
    )
    assert (out / "tokenizer.model").read_bytes() == b"not read here"
    written, memory = load_model(out), load_model(f"inflate:{shape}:{small}")
    assert written.config == memory.config
    for name, value in memory.state_dict().items():
        assert torch.equal(written.state_dict()[name], value), name
    other = tmp_path / "other"
    inflate(str(small), shape, other, torch.float32, "cpu", 1, 1 << 30)
    assert not torch.equal(load_model(other).head.weight, memory.head.weight), (
        "another seed, other noise"
    )
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        inflate(str(small), shape, other, torch.float32, "cpu", 1, 1 << 30)


def test_transformers_agrees_that_nothing_changed(small, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    inflate(str(small), GROWN["everything"], out, torch.float64, "cpu", 0, 1 << 30)
    reference = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    text = random_text(30, seed=1)
    with torch.inference_mode():
        got = reference(torch.tensor([text])).logits[0, :, :96]
    torch.testing.assert_close(got, whole(loaded(small), text), rtol=0, atol=1e-5)


def test_command_line(small, tmp_path, monkeypatch, capsys):
    script, out = ROOT / "scripts/inflate.py", tmp_path / "out"
    options = ["--dtype", "float16", "--shard-gb", "0.0001"]
    command = [sys.executable, script, small, "hidden=80,layers=3", out, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    assert load_model(out).config.num_layers == 3 and len(list(out.glob("*.safetensors"))) > 1
    for wrong in (
        ["--shard-gb", "0"],
        ["--shard-gb", "nan"],
        ["--seed", "-1"],
        ["--seed", str(1 << 64)],
        [],
    ):
        monkeypatch.setattr(
            sys, "argv", ["inflate.py", str(small), "hidden=20", str(tmp_path / "not"), *wrong]
        )
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        assert stopped.value.code == 2 and said.err.startswith(
            f"inflate.py: {wrong[0] if wrong else 'hidden=20'} is "
        )
        assert said.err.count("\n") == 1 and not said.out and not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    "shape, match",
    [
        ("hidden=32", "hidden=32 is less than the checkpoint's 48"),
        ("layers=1", "layers=1 is less than the checkpoint's 2"),
        ("heads=2", "heads=2 is less than the checkpoint's 4"),
        ("kv_heads=1", "kv_heads=1 is less than the checkpoint's 2"),
        ("head_dim=6", "head_dim=6 is less than the checkpoint's 12"),
        ("ffn=79", "ffn=79 is less than the checkpoint's 80"),
        ("vocab=95", "vocab=95 is less than the checkpoint's 96"),
        ("head_dim=18", "head_dim=18 is not a multiple of the checkpoint's: use 24"),
        ("heads=5", "heads=5 is not a multiple of kv_heads=2"),
        ("heads=4,kv_heads=4,hidden=64,vocab=96,layers=2,ffn=80,head_dim=12", None),
        ("heads=5,kv_heads=5", None),
        ("heads=3,kv_heads=3", "heads=3 is less"),
        ("vocab=97", "vocab=97 needs a spare column"),
        ("llama-9", "shape 'llama-9' is unknown: give one of 60m, 200m, llama-3.2-1b"),
        ("hidden", "is unknown"),
        ("hidden=-5", "is unknown"),
        ("hidden=0", "is unknown"),
        ("hidden=1e3", "is unknown"),
        ("hidden=²", "is unknown"),
        ("depth=5", "is unknown"),
        ("hidden=99999999", "hidden_size = 99999999"),
        ("layers=99999", "num_hidden_layers = 99999"),
    ],
)
def test_shapes_that_cannot_be_are_refused_by_the_dimension(small, shape, match):
    if match is None:
        grow_config(LLAMA, parse_shape(shape))
        return
    refuses(match, f"inflate:{shape}:{small}", load_config)


def test_what_cannot_grow_is_refused(tmp_path):
    shape = {"head_dim": 24, "hidden": 64}
    yarn = {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    }
    with pytest.raises(ValueError, match="head_dim cannot grow with yarn"):
        grow_config(LLAMA | yarn, shape)
    with pytest.raises(ValueError, match="rms_norm_eps = 0.0, wanted a number above 0"):
        grow_config(LLAMA | {"rms_norm_eps": 0.0}, {"hidden": 64, "vocab": 99})
    with pytest.raises(
        ValueError, match="no room for the checkpoint's 6 over 2: ask for kv_heads=4 or more heads"
    ):
        grow_config(
            LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 2},
            {"heads": 6, "kv_heads": 3},
        )
    refuses("no config.json", f"inflate:60m:{tmp_path}", load_model)
    refuses("there is no folder", "inflate:60m:/no/where", load_model)


def published(name: str) -> float:
    """Parameters in billions, the embedding counted once where the published model ties it."""
    raw = LLAMA | {
        "hidden_size": 64,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
    }
    raw |= {"vocab_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = Config.from_dict(grow_config(raw, parse_shape(name)))
    return sum(math.prod(piece.shape) for piece in pieces(config)) / 1e9


def test_presets_have_the_published_sizes():
    assert abs(published("llama-3.1-8b") - 8.03) < 0.01
    assert abs(published("llama-3.1-70b") - 70.55) < 0.05
    assert abs(published("llama-3.2-1b") - 0.26268 - 1.236) < 0.001, (
        "untied here: the embedding counts twice"
    )
    assert abs(published("qwen3-8b") - 8.19) < 0.01
    words = 4096  # 60m and 200m keep the vocabulary
    for name, millions in (("60m", 60), ("200m", 200)):
        raw = LLAMA | {
            "hidden_size": 384,
            "head_dim": 64,
            "vocab_size": words,
            "tie_word_embeddings": True,
        }
        config = Config.from_dict(grow_config(raw | {"num_attention_heads": 6}, parse_shape(name)))
        assert abs(sum(math.prod(p.shape) for p in pieces(config)) / 1e6 / millions - 1) < 0.05, (
            name
        )
    assert all(parse_shape(name)["head_dim"] % 64 == 0 for name in SHAPES)


def test_one_file_is_not_written_to_a_folder(tmp_path):
    """Its tokenizer lies within it, and would be missing."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    command = [sys.executable, ROOT / "scripts/inflate.py", "x.gguf", "layers=3", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "x.gguf is one file, whose tokenizer" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_noise_does_not_matter(small):
    """Proof by brute force that the random parts are never read: whatever they hold, the logits
    stay.
    """
    text, grown = random_text(20, seed=1), loaded(f"inflate:{GROWN['everything']}:{small}")
    wanted = whole(loaded(small), text)
    grown.layers[3].attention.qkv.weight.mul_(5)
    grown.layers[2].mlp.gate_up.weight.normal_()
    grown.layers[0].mlp.gate_up.weight[80:160].normal_()  # new units of an old layer
    grown.layers[0].attention.qkv.weight[:, 49:].normal_()  # columns that nothing is in
    torch.testing.assert_close(whole(grown, text)[:, :96], wanted, rtol=0, atol=1e-9)
    randomise(grown, seed=1)
    assert (whole(grown, text)[:, :96] - wanted).abs().max() > 0.1, "this test can fail"
