"""Several ranks print what one process does, and a lost one ends the run with a sentence."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank
import torch
from families import LLAMA
from test_gguf import write
from tiny import transformer

import engine
import linear
import parallel
import ranks
from checkpoint.gguf import Groups
from checkpoint.weights import load_model, pieces_of
from linear import finisher
from model import Transformer
from runtime import Devices, one_thread
from scripts import bench_ranks
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
    asked += [(PROMPTS[:1], {"mode": mode, "coupling": "maximal"}) for mode in ("sd", "ssd")]
    for mode in ("ar", "sd", "ssd"):
        asked += [(PROMPTS, {"mode": mode} | EACH), (PROMPTS, {"mode": mode} | EACH | CUT)]
    for coupling in ("maximal", "independent"):
        asked += [(PROMPTS, {"mode": "ssd", "coupling": coupling} | EACH | CUT)]
        asked += [(PROMPTS, {"mode": "sd", "coupling": coupling} | EACH)]
    # One row after the other: the second takes a place whose noise was the first one's.
    asked += [(PROMPTS[:2], {"mode": "sd", "temperature": [1.3, 1.0], "seed": 3, "batch": 1})]
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


def start(count: int, *args) -> list[subprocess.Popen]:
    """The processes of so many ranks."""
    how = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, args)]
    return [subprocess.Popen(command, env=env, **how) for env in environment(count)]


def ended(processes: list[subprocess.Popen], limit_s: float) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; none is left after limit_s."""
    try:
        said = [process.communicate(timeout=limit_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said)]


def ranks_of(count: int, job: Path, limit_s: float) -> list[tuple[int, str]]:
    """Exit code and what it printed, of each rank that did a job (tests/rank.py)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank"])
    said = [job.with_suffix(f".said{r}") for r in range(count)]
    processes = [
        context.Process(target=rank.forked, args=(env, job, path))
        for env, path in zip(environment(count), said)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + limit_s
    try:
        for process in processes:
            process.join(max(0, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [(process.exitcode, path.read_text()) for process, path in zip(processes, said)]


def texts_of_ranks(count: int, folder: Path, load: dict, asked: list, **more) -> list[dict]:
    job = folder / f"job{count}.json"
    job.write_text(json.dumps({"load": load, "runs": asked} | more))
    for code, said in ranks_of(count, job, 120):
        assert code == 0, said
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


# ---- weights of few bits, and every rank's memory


class Parts(torch.nn.Module):
    """What ranks do with one layer, in one process: its parts' results, summed in order."""

    def __init__(self, parts):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, x):
        pieces = x.split([part.in_features for part in self.parts], -1)
        total = self.parts[0](pieces[0])
        for part, piece in zip(list(self.parts)[1:], pieces[1:]):
            total = total + part(piece)
        return total


def in_parts(name: Path, count: int, bits: str) -> Transformer:
    """One process' model of few bits, but products are rounded where ranks round theirs.

    Codes and scales are those of the whole layer: ranks that chose their own would differ. bits:
    also "stored", of a GGUF file.
    """
    plain = finisher(bits, True)

    def finish(linear, name="", stored=None):
        if not parallel.is_summed(name):
            return plain(linear, name, stored)
        groups = [stored] * count
        if isinstance(stored, Groups):
            groups = [Groups(*each) for each in zip(*(x.chunk(count, 1) for x in stored))]
            linear.weight = torch.nn.Parameter(stored.dense(), requires_grad=False)
        weight, parts = linear.weight.detach(), []
        together = parallel.Group()
        most = weight.abs().amax(1)
        together.largest = lambda x: most if len(x) > 1 else x
        for piece, own in zip(weight.chunk(count, 1), groups):
            part = torch.nn.Linear(piece.shape[1], len(weight), bias=False)
            part.weight = torch.nn.Parameter(piece.contiguous(), requires_grad=False)
            parts.append(finisher(bits, True, together)(part, name, own))
        return Parts(parts)

    with one_thread():
        return load_model(name, "cpu", torch.float32, Transformer, finish=finish, bits=bits)


@pytest.mark.parametrize(
    "count,bits,compiler",
    [(2, "int8", "c++"), (2, "int8", "missing"), (2, "int4", "missing"), (4, "int4", "c++")],
)
def test_ranks_with_few_bits_print_what_one_process_does(
    tmp_path, count, bits, compiler, monkeypatch
):
    """One process that rounds the parts of a sum, as ranks do. Rounding the whole is another. By
    few_bits.cpp, and by PyTorch's operators, of which int8 has one scale for a row of all ranks.
    """
    monkeypatch.setenv("CXX", compiler)
    if compiler == "missing":
        monkeypatch.setattr(linear, "few_bits_problem", lambda: "there is no C++ compiler")
    target = checkpoint(tmp_path / "target")
    draft = checkpoint(tmp_path / "draft", noise=0.05)
    load = {"target": str(target), "draft": str(draft), "dtype": "float32", "quantize": bits}
    load |= {"device": "cpu", "draft_quantize": "none"}
    asked = runs()
    found = texts_of_ranks(count, tmp_path, load, asked)
    model = engine.Model.of(in_parts(target, count, bits), "target", bits=bits)
    parts = [m.parts[0] for m in model.transformer.modules() if hasattr(m, "parts")]
    wanted = [float(part.scale_N.double().sum()) for part in parts if hasattr(part, "scale_N")]
    assert wanted or compiler != "missing" or bits != "int8"
    for number in range(count):
        scales = json.loads((tmp_path / f"job{count}.target{number}").read_text())[2]
        assert scales == wanted
    draft = engine.Model.load(str(draft), torch.device("cpu"), "float32")
    one = engine.Engine(model, draft, Devices("cpu", "cpu"))
    for (prompts, settings), got in zip(asked, found):
        assert got["ids"] == one.generate(prompts, **settings).token_ids, settings


def test_ranks_read_their_own_part_of_a_gguf_file(tmp_path):
    """Its four bits as they are; types of other widths become int8."""
    raw = SHAPE | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    raw |= {"vocab_size": 96}
    model = transformer(0, 96, **{k: v for k, v in raw.items() if k != "vocab_size"})
    model = model.float()
    kinds = {"attn_q.weight": "Q8_0", "ffn_gate.weight": "Q5_0"}
    path = write(tmp_path / "m.gguf", raw, pieces_of(model), lambda name: kinds.get(name, "Q4_0"))
    common = {"max_new_tokens": 8, "ignore_eos": True}
    asked = [([[5, 6, 7]], common), ([[5, 6, 7], [9, 1]], common | {"temperature": [0.9, 0.0]})]
    for bits in ("none", None):
        load = {"target": str(path), "quantize": bits, "device": "cpu"}
        fast = {"float32": 1.0, "int4": 0.5}
        found = texts_of_ranks(2, tmp_path, load, asked, speeds=fast)
        one = engine.load(str(path), device="cpu", quantize="none")
        truth = one
        if bits is None:
            model = engine.Model.of(in_parts(path, 2, "stored"), "target", bits="stored")
            truth = engine.Engine(model, None, Devices("cpu", "cpu"))
        for (prompts, settings), got in zip(asked, found):
            assert got["ids"] == truth.generate(prompts, **settings).token_ids, settings
        weights = [json.loads((tmp_path / f"job2.target{r}").read_text())[0] for r in (0, 1)]
        whole = engine.load(str(path), device="cpu", quantize="none").target.step_bytes
        assert all(w < 1.1 * whole / (2 if bits else 4) for w in weights), (weights, whole)


def test_a_rank_takes_the_memory_of_its_share(tmp_path):
    """Weights at most 1.1 times the share, and while it loads no more than that and one layer."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    target = checkpoint(tmp_path / "target", vocab_size=8192, **sizes)
    whole = (target / "model.safetensors").stat().st_size // 2  # float64 there, float32 here
    load = {"target": str(target), "dtype": "float32", "device": "cpu"}
    texts_of_ranks(2, tmp_path, load, [([[1, 2]], {"max_new_tokens": 2})])
    for number in (0, 1):
        weights, grown, _ = json.loads((tmp_path / f"job2.target{number}").read_text())
        assert weights <= 1.1 * whole / 2, (weights, whole)
        assert grown <= 1.1 * whole / 2 + 24e6, (grown, whole)  # 24 MB for TorchScript


# ---- a rank that is lost


FAULTS = {
    "killed": (signal.SIGKILL, {1}, 1, "error: rank 1 ended or does not answer"),
    "stopped": (signal.SIGSTOP, {1}, 1, "error: rank 1 ended or does not answer"),
    "Ctrl-C": (signal.SIGINT, {0, 1}, 130, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_rank_ends_the_run_with_a_sentence(demo, fault):
    sent, where, code, says = FAULTS[fault]
    flags = ["--ssd", "--target", demo / "target", "--draft", demo / "draft", "--device", "cpu"]
    flags += ["--k", "2", "--fan-out", "4", "--max-new-tokens", "280", "--ignore-eos"]
    processes = start(2, "generate.py", *flags, "--prompt", "def")
    try:
        first = processes[0].stdout.read(3)  # the text has begun
        began = time.monotonic()
        for rank in where:
            processes[rank].send_signal(sent)
        (got, out, error), (other, *_) = ended(processes, 30)
    finally:
        for process in processes:
            process.kill()
    assert got == code and first + out and time.monotonic() - began < 15, (got, error)
    told = [line for line in error.splitlines() if line.startswith("error:")]
    assert (len(told) == 1 and told[0].startswith(says)) if says else not told, error
    assert "Traceback" not in error
    if fault == "Ctrl-C":
        assert other == 130 and "tokens/s" in error


def test_a_rank_without_memory_ends_the_run_with_its_sentence(tmp_path):
    target, job = checkpoint(tmp_path / "target"), tmp_path / "job.json"
    load = {"target": str(target), "device": "cpu", "dtype": "float64"}
    asked = [([[1, 2, 3]] * 500, {"max_new_tokens": 200})]  # 200 MB of KV on each
    job.write_text(json.dumps({"load": load, "runs": asked, "spare": 16 << 20}))
    (code, error), (other, _) = ranks_of(2, job, 30)
    assert code == 1 and other == 1
    assert "rank 1 failed" in error and "memory" in error, error


def test_what_ranks_must_share_is_checked_before_anything_loads(tmp_path):
    few = checkpoint(tmp_path / "few", num_key_value_heads=1)
    one, other = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "other", seed=5)
    cases = [
        (few, few, "2 ranks cannot share 1 key/value heads: each needs its own one: start 1"),
        (one, other, "rank 1 has checkpoint"),
        (one, tmp_path / "nowhere", "rank 1: there is no folder"),
    ]
    for first, second, says in cases:
        job = tmp_path / "job.json"
        loads = [{"load": {"target": str(x), "device": "cpu"}} for x in (first, second)]
        job.write_text(json.dumps({"runs": [], "of_rank": {"0": loads[0], "1": loads[1]}}))
        (code, error), _ = ranks_of(2, job, 30)
        assert code == 1 and f"ValueError: {says}" in error, error
        assert not list(tmp_path.glob("job.target*"))


def test_ranks_compare_all_code_that_their_numbers_hang_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ranks, "fingerprint", lambda paths: seen.append({p.name for p in paths}))
    ranks.about(str(checkpoint(tmp_path / "target")), 2)
    assert {"model.py", "linear.py", "few_bits.cpp", "weights.py"} <= seen[0]
    assert seen[1] == {"config.json", "model.safetensors"}


def test_what_differs_between_ranks_is_named():
    same = {"torch": "2.13", "checkpoint": "a"}
    assert ranks.disagreement([same, dict(same)]) == ""
    assert ranks.disagreement([same, same | {"torch": "2.11"}]).startswith(
        "rank 1 has torch 2.11 and rank 0 2.13, wanted the same"
    )
    assert ranks.disagreement([{"error": "no"}, same]) == "no"


@pytest.mark.smollm2
def test_the_readmes_command_prints_what_one_process_does(tmp_path):
    """By torchrun itself, with the default model, whose three key/value heads are two and one."""
    (command,) = re.findall(r"^torchrun (.* --device cpu)$", (ROOT / "README.md").read_text(), re.M)
    run = [sys.executable, "-m", "torch.distributed.run", *command.split()]
    flags, how = ["--max-new-tokens", "12", "--dtype", "float32"], {"cwd": ROOT, "text": True}
    found = subprocess.run([*run, *flags, "--quantize", "none"], stdout=subprocess.PIPE, **how)
    one = [sys.executable, "generate.py", "--device", "cpu", *flags, "--quantize", "none"]
    assert found.returncode == 0 and "sky" in found.stdout
    assert found.stdout == subprocess.run(one, stdout=subprocess.PIPE, **how).stdout


def test_the_benchmark_of_ranks_runs(demo, tmp_path, capsys):
    """Tiny, once: texts are compared, a profile and the times of sums are there."""
    flags = ["--target", str(demo / "target"), "--runs", "1", "--tokens", "3"]
    assert bench_ranks.main([*flags, "--json", str(tmp_path / "b.json")]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["texts are equal"] and len(found["one process"]) == len(found["2 ranks"]) == 1
    assert set(found["profile"]) == {*bench_ranks.KINDS, "the rest"}
    assert list(map(int, found["sums"])) == list(bench_ranks.MESSAGES)
    assert "tokens/s" in capsys.readouterr().out
