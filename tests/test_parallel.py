"""Several ranks print what one process does, and a lost one ends the run with a sentence."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import LLAMA
from tiny import transformer

import engine
from scripts.save import save_model

ROOT = Path(__file__).resolve().parent.parent
SHAPE = LLAMA | {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 4, "head_dim": 32, "vocab_size": 97}
FAMILIES = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "smollm2": {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 1},
}
# Ragged on purpose.
PROMPTS = [[5, 17, 40, 3, 9, 60, 22, 8, 1], [7], [44, 2, 90], [31, 30, 29, 28, 27]]
EACH = {"temperature": [0.0, 0.8, 1.3, 0.6], "seed": 3}
CUT = {"top_k": [0, 9, 0, 0], "top_p": [1.0, 1.0, 0.8, 1.0]}


def runs() -> list[tuple[list, dict]]:
    """Prompts and settings: modes, couplings, one row and four, greedy, sampled and filtered."""
    asked = [(PROMPTS[:1], {"mode": mode}) for mode in ("ar", "sd", "ssd")]
    asked += [(PROMPTS[:1], {"mode": "ssd", "coupling": "maximal"})]
    for mode in ("ar", "sd", "ssd"):
        asked += [(PROMPTS, {"mode": mode} | EACH), (PROMPTS, {"mode": mode} | EACH | CUT)]
    for coupling in ("maximal", "independent"):
        asked += [(PROMPTS, {"mode": "ssd", "coupling": coupling} | EACH | CUT)]
    asked += [(PROMPTS[:2], {"mode": "sd", "coupling": "maximal", "temperature": 1.0, "batch": 1})]
    common = {"k": 2, "fan_out": 5, "max_new_tokens": 9, "ignore_eos": True, "cut": False}
    common["fallback"] = "jit"
    return [(prompts, common | settings) for prompts, settings in asked]


def checkpoint(folder: Path, seed: int = 0, noise: float = 0.0, **changes) -> Path:
    """A random model on disk, plus noise: with some, it is a draft of the one without."""
    raw = SHAPE | changes
    shape = {key: raw[key] for key in raw.keys() - {"vocab_size"}}
    model = transformer(seed, raw["vocab_size"], **shape)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.add_(torch.randn(weight.shape, dtype=weight.dtype), alpha=0.3)
    if noise:
        model = transformer(seed + 1, base=model, noise=noise)
    save_model(model, raw, folder)
    return folder


def environment(count: int) -> list[dict]:
    """What torchrun would set for each of `count` ranks on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)]


def start(count: int, *args, changes=()) -> list[subprocess.Popen]:
    """The processes of so many ranks. changes: to the environment of each."""
    how = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    places = [env | more for env, more in zip(environment(count), [*changes, *[{}] * count])]
    return [subprocess.Popen([sys.executable, *map(str, args)], env=env, **how) for env in places]


def ended(processes: list[subprocess.Popen], limit_s: float) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; none is left after limit_s."""
    try:
        said = [process.communicate(timeout=limit_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said)]


def texts_of_ranks(count: int, folder: Path, load: dict, asked: list, **more) -> list[dict]:
    job = folder / f"job{count}.json"
    job.write_text(json.dumps({"load": load, "runs": asked} | more))
    for code, _, error in ended(start(count, "tests/rank.py", job), 120):
        assert code == 0, error
    return json.loads(job.with_suffix(".out").read_text())


CASES = [
    *[(2, family, "float64") for family in FAMILIES],
    (4, "llama-biases", "float32"),
    (4, "qwen2", "float64"),
]


@pytest.mark.parametrize("count,family,dtype", CASES)
def test_ranks_print_what_one_process_does(tmp_path, count, family, dtype):
    target = checkpoint(tmp_path / "target", **FAMILIES[family])
    draft = checkpoint(tmp_path / "draft", noise=0.05, **FAMILIES[family])
    load = {"target": str(target), "draft": str(draft), "dtype": dtype, "device": "cpu"}
    asked = runs()
    found, one = texts_of_ranks(count, tmp_path, load, asked), engine.load(**load)
    for (prompts, settings), got in zip(asked, found):
        assert got["ids"] == one.generate(prompts, **settings).token_ids, settings
        sampled = settings.get("temperature", 0.0) != 0.0
        needed = sampled and (settings.get("coupling") or "top_k" in settings)
        assert bool(got["gathers"]) == bool(needed), settings
