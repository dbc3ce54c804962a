"""What train_demo.py reads, writes and reports: the corpus, its tokenizer, Hugging Face's layout, the figures.

Knows: which files are the corpus, how they are split and pinned, tensor names on disk, how a pair is judged. Does not
know: training. Read next: train_demo.py.

The corpus is this Python's own standard library: on every machine, so no download. Which Python it was, and the
SHA-256 of all of it, go into manifest.json next to the pair.
"""

import hashlib
import json
import math
import platform
import random
import re
import shutil
import string
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from cache import KVCache

UNK, BOS, EOS = 0, 1, 2
# Character tables (encodings) and one huge literal (pydoc_data) are not code to learn from.
LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data")
TESTS = {"test", "tests", "idle_test"}  # more text than all the rest; drawn less often than its size
HELD_OUT = 0.05
PROMPTS = [
    "def fibonacci(n):", "class Stack:\n", "import os\n\ndef ", "def read_config(path):\n    ",
    "import unittest\n\nclass Test", "for line in lines:\n    ", "def __init__(self, name, ",
    'if __name__ == "__main__":\n    ',
]  # fmt: skip


@dataclass(frozen=True)
class File:
    path: str  # relative to the standard library, with /
    text: str
    tests: bool
    held_out: bool


def read_corpus(limit: int = 0) -> list[File]:
    """Every UTF-8 Python file of the standard library in order of path; `limit` > 0 stops after so many bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files, size = [], 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if any(part in LEFT_OUT for part in name.split("/")):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if "\u2581" in text or "\0" in text or not text.strip():  # sentencepiece's own sign for a space
            continue
        # By the path and not by the contents: the split stays the same when a file changes between Pythons.
        draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
        files.append(File(name, text, bool(TESTS & set(name.split("/"))), draw < HELD_OUT))
        size += len(text.encode())
        if limit and size >= limit:
            break
    if size < 100_000:
        raise ValueError(f"{root} holds {size} bytes of Python source, wanted the standard library: install it in full")
    return files


def fingerprint(files: list[File]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.text}\0".encode())
    return digest.hexdigest()


def train_tokenizer(files: list[File], path: Path, vocab: int) -> None:
    """Byte-pair encoding that gives back every text exactly: no normalising, runs of spaces are pieces, else bytes."""

    def chunks():  # one thread and no sampling of sentences, so the same corpus gives the same pieces
        for file in files:
            if file.held_out or file.tests:
                continue
            lines = file.text.replace("\t", "        ").split("\n")  # the trainer reserves tabs; they become bytes
            for first in range(0, len(lines), 20):
                yield "\n".join(lines[first : first + 20])

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=chunks(), model_prefix=str(path.with_suffix("")), vocab_size=vocab, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_digits=True, max_sentence_length=20000, num_threads=1,
        character_coverage=0.9995, required_chars=string.digits + string.ascii_letters + string.punctuation + "\n",
        unk_id=UNK, bos_id=BOS, eos_id=EOS, pad_id=-1, minloglevel=2,
    )  # fmt: skip


def parts(file: File) -> list[str]:
    """The text cut where a user may stop typing: before 6% of the newlines, after 1.5% of the spaces.

    Pieces reach across these places ("):\\n" is one token, " name" too), and a prompt that ends in "):" or "def " would
    otherwise be a text such as the model has never seen. Held-out files stay whole.
    """
    rng, cuts = random.Random(file.path), [0]
    if not file.held_out:
        for match in re.finditer(r"\n| (?=\S)", file.text):
            newline = match.group() == "\n"
            if rng.random() < (0.06 if newline else 0.015):
                cuts.append(match.start() if newline else match.end())
    return [file.text[a:b] for a, b in zip(cuts, [*cuts[1:], len(file.text)])]


class Stream:
    """Files of one kind as one row of tokens, <s> text </s> <s> text ..., and the places where a line begins."""

    def __init__(self, files: list[File], tokenizer, newline_ends: torch.Tensor):
        ids = [[BOS, *(i for part in tokenizer.encode(parts(file)) for i in part), EOS] for file in files]
        self.tokens = torch.tensor([i for row in ids for i in row], dtype=torch.int32)
        self.starts = torch.where(newline_ends[self.tokens[:-1].long()])[0] + 1
        self.bytes = sum(len(file.text.encode()) for file in files)

    def rows(self, count: int, length: int, rng: torch.Generator) -> torch.Tensor:
        """(count, 1 + length) tokens: <s>, then text from the beginning of a random line on, across file borders.

        The prompt of a user is text after <s> too, so the first token of the row is it even amid a file.
        """
        usable = self.starts[self.starts < len(self.tokens) - length]
        start = usable[torch.randint(len(usable), (count,), generator=rng)]
        rows = self.tokens[start[:, None] + torch.arange(length)].long()
        return torch.cat((torch.full((count, 1), BOS), rows), 1)


class Corpus:
    def __init__(self, work: Path, vocab: int, limit: int):
        files = read_corpus(limit)
        self.sha256, model = fingerprint(files), work / "tokenizer.model"
        if not model.exists():
            train_tokenizer(files, model, vocab)
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
        cache = work / f"tokens-{self.sha256[:12]}-{hashlib.sha256(model.read_bytes()).hexdigest()[:12]}.pt"
        if not cache.exists():
            pieces = [self.tokenizer.id_to_piece(i) for i in range(vocab)]
            newline = torch.tensor([piece.endswith("\n") or piece == "<0x0A>" for piece in pieces])
            kinds = {
                "library": [f for f in files if not f.tests and not f.held_out],
                "tests": [f for f in files if f.tests and not f.held_out] or files,
                "held_out": [f for f in files if f.held_out and not f.tests] or files[-1:],
            }
            streams = {kind: vars(Stream(chosen, self.tokenizer, newline)) for kind, chosen in kinds.items()}
            torch.save(streams, cache.with_suffix(".tmp"))
            cache.with_suffix(".tmp").rename(cache)
        for kind, content in torch.load(cache, weights_only=True).items():
            stream = Stream.__new__(Stream)
            vars(stream).update(content)
            setattr(self, kind, stream)
        self.manifest = {
            "python": platform.python_version(), "sha256": self.sha256, "files": len(files), "vocab": vocab,
            "held_out_files": [f.path for f in files if f.held_out],
            "tokens": {kind: len(getattr(self, kind).tokens) for kind in ("library", "tests", "held_out")},
            "bytes": {kind: getattr(self, kind).bytes for kind in ("library", "tests", "held_out")},
        }  # fmt: skip

    def rows(self, count: int, length: int, rng: torch.Generator, tests_share: float) -> torch.Tensor:
        tests = int(tests_share * count + torch.rand((), generator=rng).item())
        return torch.cat((self.library.rows(count - tests, length, rng), self.tests.rows(tests, length, rng)))


def to_hugging_face(weights: dict, config) -> dict:
    """Our names and fused matrices -> theirs, in bfloat16."""
    H, G, D = config.num_heads, config.num_kv_heads, config.head_dim
    out = {"model.embed_tokens.weight": weights["embed.weight"], "model.norm.weight": weights["norm.weight"]}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        q, k, v = weights[ours + "attention.qkv.weight"].split((H * D, G * D, G * D))
        gate, up = weights[ours + "mlp.gate_up.weight"].chunk(2)
        out |= {theirs + f"self_attn.{name}_proj.weight": x for name, x in (("q", q), ("k", k), ("v", v))}
        out |= {theirs + f"mlp.{name}_proj.weight": x for name, x in (("gate", gate), ("up", up))}
        out[theirs + "self_attn.o_proj.weight"] = weights[ours + "attention.out.weight"]
        out[theirs + "mlp.down_proj.weight"] = weights[ours + "mlp.down.weight"]
        out[theirs + "input_layernorm.weight"] = weights[ours + "attention_norm.weight"]
        out[theirs + "post_attention_layernorm.weight"] = weights[ours + "mlp_norm.weight"]
    return {name: x.detach().to("cpu", torch.bfloat16).contiguous() for name, x in out.items()}


def from_hugging_face(folder: Path, config) -> dict:
    """The inverse, in float32: what `--report` measures is what lies on the disk."""
    theirs = load_file(folder / "model.safetensors")
    out = {"embed.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    for i in range(config.num_layers):
        name = f"model.layers.{i}."
        qkv = [theirs[f"{name}self_attn.{x}_proj.weight"] for x in "qkv"]
        gate_up = [theirs[f"{name}mlp.{x}_proj.weight"] for x in ("gate", "up")]
        out[f"layers.{i}.attention.qkv.weight"] = torch.cat(qkv)
        out[f"layers.{i}.mlp.gate_up.weight"] = torch.cat(gate_up)
        out[f"layers.{i}.attention.out.weight"] = theirs[name + "self_attn.o_proj.weight"]
        out[f"layers.{i}.mlp.down.weight"] = theirs[name + "mlp.down_proj.weight"]
        out[f"layers.{i}.attention_norm.weight"] = theirs[name + "input_layernorm.weight"]
        out[f"layers.{i}.mlp_norm.weight"] = theirs[name + "post_attention_layernorm.weight"]
    out["head.weight"] = out["embed.weight"]
    return {name: x.float() for name, x in out.items()}


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def write_pair(out: Path, work: Path, models: dict, configs: dict, manifest: dict) -> None:
    """out/target and out/draft. Both are complete before either old one is replaced: readers never meet half a pair."""
    out.mkdir(parents=True, exist_ok=True)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name, model in models.items():
        folder = out / f".{name}.new"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_file(to_hugging_face(model.state_dict(), model.config), folder / "model.safetensors", {"format": "pt"})
        write_json(folder / "config.json", configs[name])
        write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
        tokenizer = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **tokens}
        tokenizer |= {"legacy": False, "add_prefix_space": False, "clean_up_tokenization_spaces": False}
        write_json(folder / "tokenizer_config.json", tokenizer | {"model_max_length": model.config.max_positions})
        shutil.copyfile(work / "tokenizer.model", folder / "tokenizer.model")
    for name in models:
        old, new = out / name, out / f".{name}.new"
        if old.exists():
            old.rename(out / f".{name}.old")
        new.rename(old)
        shutil.rmtree(out / f".{name}.old", ignore_errors=True)
    write_json(out / "manifest.json", manifest)


@torch.inference_mode()
def sample(model, prompt_BT, count: int, heat_B, rng) -> torch.Tensor:
    """`count` more tokens for each row, at each row's temperature (0 is greedy). float32, with the engine's cache."""
    device = model.embed.weight.device
    B, T = prompt_BT.shape
    cache = KVCache(model.config, B, T + count, device=device, dtype=model.embed.weight.dtype)
    ones, fed, rows = torch.ones(B, dtype=torch.long, device=device), prompt_BT.to(device), [prompt_BT]
    for at in [0, *range(T, T + count - 1)]:
        size = fed.shape[1]
        place = cache.place(ones * at, ones * size, size, at + size, tight=True)
        logits_BV = model(fed, place, cache)[:, -1].float().cpu()
        hot = (logits_BV / heat_B.clamp(min=1e-3)[:, None]).softmax(-1)
        fed = torch.where(heat_B > 0, torch.multinomial(hot, 1, generator=rng)[:, 0], logits_BV.argmax(-1))[:, None]
        rows.append(fed)
        fed = fed.to(device)
    return torch.cat(rows, 1)


@torch.inference_mode()
def compare(models: dict, rows_BT, batch: int = 4) -> dict:
    """Teacher-forced over whole rows: losses in nats per token, how often the top tokens agree, sum of min(p, q)."""
    totals, tokens = {"target": 0.0, "draft": 0.0, "agree": 0.0, "overlap": 0.0}, 0
    for block in rows_BT.split(batch):
        x_BT, y_BT = block[:, :-1], block[:, 1:]
        log = {name: model(x_BT).float().log_softmax(-1) for name, model in models.items()}
        for name in models:
            totals[name] -= log[name].gather(-1, y_BT[..., None]).sum().item()
        totals["agree"] += (log["target"].argmax(-1) == log["draft"].argmax(-1)).sum().item()
        totals["overlap"] += torch.minimum(log["target"].exp(), log["draft"].exp()).sum().item()
        tokens += y_BT.numel()
    return {name: total / tokens for name, total in totals.items()}


def measure(models: dict, corpus: Corpus, positions: int) -> dict:
    """All figures of report.json: on held-out code, and on what the target writes itself after PROMPTS."""
    held, length = corpus.held_out, positions - 1
    rows = held.tokens[: len(held.tokens) // length * length].long().view(-1, length)
    rows = torch.cat((torch.full((len(rows), 1), BOS), rows), 1)
    code = compare(models, rows)
    bits = {name: code[name] / math.log(2) * len(held.tokens) / held.bytes for name in models}
    figures = {
        "held_out": {
            "tokens": rows[:, 1:].numel(),
            "nats_per_token": {name: round(code[name], 4) for name in models},
            "bits_per_byte": {name: round(bits[name], 4) for name in models},
            "top1_agreement": round(code["agree"], 4), "overlap": round(code["overlap"], 4),
        },
        "own_text": {}, "texts": {},
    }  # fmt: skip
    new = min(128, positions // 2)
    for label, heat in (("greedy", 0.0), ("T=0.8", 0.8), ("T=1.0", 1.0)):
        rng, texts, shares, both = torch.Generator().manual_seed(7), {}, [], []
        for prompt in PROMPTS:
            ids = torch.tensor([[BOS, *corpus.tokenizer.encode(prompt)]])
            row = sample(models["target"], ids, new, torch.tensor([heat]), rng)
            written = row[0, ids.shape[1] :].tolist()
            grams = [tuple(written[i : i + 4]) for i in range(len(written) - 3)]
            shares.append(len(set(grams)) / len(grams))
            texts[prompt] = corpus.tokenizer.decode(written)
            both.append(compare(models, row))
        figures["own_text"][label] = {
            "distinct_4grams": round(sum(shares) / len(shares), 4),
            "lowest_distinct_4grams": round(min(shares), 4),
            "top1_agreement": round(sum(one["agree"] for one in both) / len(both), 4),
            "overlap": round(sum(one["overlap"] for one in both) / len(both), 4),
        }
        figures["texts"][label] = texts
    return figures
