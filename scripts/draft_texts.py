"""Texts that a target writes, or is given, with what it expected at every token of them.

Knows: how many rows are sampled together, files of texts. Does not know: where prompts come from
(draft_prompts.py), what is learnt. Read next: train_draft.py.

Shape letters: B rows, T tokens per row, N positions that are learnt, K most probable tokens,
V vocabulary.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from draft_prompts import Prompt, around_question
from tqdm import tqdm

from cache import KVCache
from checkpoint.config import Config

ASKED, QUESTION = 256, 64  # questions in a file of them; tokens of one, at most
BEGINNINGS = (*["from typing import List\n\n\ndef "] * 3, "def ", "class ", "The", "In", "A")
TOP = 32  # of the target's probabilities, so many are kept at each position
HEATS = (0.0, 1.0, 0.0, 0.7)  # temperatures of the texts, in turn
PIECE = 256  # tokens of a piece of given text


@dataclass
class Text:
    """A prompt and its continuation: for tokens[first:], what the target expected there.

    tokens (T,) int32; ids_NK int32 and logp_NK float16, most probable first; heat: the temperature.
    """

    tokens: torch.Tensor
    first: int
    heat: float
    kind: str
    ids_NK: torch.Tensor
    logp_NK: torch.Tensor


def sample(target, prompts: list[Prompt], heats: list[float], new: int, eos, rng) -> list[Text]:
    """Every prompt continued by up to `new` tokens, all together."""
    config, device, B = target.config, target.norm.weight.device, len(prompts)
    tokens = [list(prompt.ids) for prompt in prompts]
    kept = [[] for _ in prompts]  # of each text, the target's most probable tokens, step by step
    room = max(map(len, tokens)) + new
    cache = KVCache(config, B, room, device=device, dtype=target.norm.weight.dtype)
    for row in range(B):
        prefill(target, cache, row, tokens)
    # Which text a row of the cache belongs to; whether it goes on.
    rows, live = (list(range(B)), [True] * B)
    for _ in range(new):
        start_B = torch.tensor([len(tokens[row]) - 1 for row in rows], device=device)
        last_B1 = torch.tensor([tokens[row][-1:] for row in rows], device=device)
        heat_B1 = torch.tensor([heats[row] for row in rows], device=device)[:, None]
        count_B = torch.tensor(live, device=device).long()
        where = cache.locate(start_B, count_B, 1, int(start_B.max()) + 1, True)
        logits_BV = target(last_B1, where, cache)[:, -1].float()
        logp_BK, ids_BK = logits_BV.log_softmax(-1).topk(min(TOP, target.config.vocab_size))
        next_B1 = torch.where(heat_B1 > 0, draw(logits_BV, heat_B1, rng), ids_BK[:, :1])
        next_B, logp_BK, ids_BK = next_B1[:, 0].tolist(), logp_BK.cpu(), ids_BK.cpu()
        for n, row in enumerate(rows):
            if live[n]:
                tokens[row].append(next_B[n])
                kept[row] += [(ids_BK[n].int(), logp_BK[n].half())]
                live[n] = next_B[n] not in eos
        if not any(live):
            break
        if sum(live) < 0.8 * len(live):  # copying the cache is dear: not for each row that ends
            keep = [n for n in range(len(live)) if live[n]]
            rows, live, cache = (
                [rows[n] for n in keep],
                [True] * len(keep),
                shrunk(cache, config, keep),
            )
    texts = []
    for prompt, heat, ids, pairs in zip(prompts, heats, tokens, kept):
        top = (torch.stack(column) for column in zip(*pairs))
        texts.append(Text(torch.tensor(ids).int(), len(prompt.ids), heat, prompt.kind, *top))
    return texts


def prefill(target, cache: KVCache, row: int, prompts: list[list[int]]) -> None:
    """Read a prompt into its row of the cache, all but the last token, which the first step reads.
    What it has in common with an earlier row is copied: chats begin alike.
    """
    ids, device = prompts[row][:-1], cache.k_LBGSD.device
    alike = [len(os.path.commonprefix((ids, other[:-1]))) for other in prompts[:row]]
    shared = max(alike, default=0)
    if shared:
        for kv in (cache.k_LBGSD, cache.v_LBGSD):
            kv[:, row, :, :shared] = kv[:, alike.index(shared), :, :shared]
    if rest := len(ids) - shared:
        start_B = torch.tensor([shared], device=device)
        where = cache.locate(start_B, start_B + rest, rest, len(ids), True)
        tokens_1T = torch.tensor([ids[shared:]], device=device)
        target(tokens_1T, where, cache.narrow(range(row, row + 1)), logits=False)


def shrunk(cache: KVCache, config: Config, keep: list[int]) -> KVCache:
    """A cache of only those rows."""
    k, v = cache.k_LBGSD, cache.v_LBGSD
    less = KVCache(config, len(keep), cache.trunk, device=k.device, dtype=k.dtype)
    for n, row in enumerate(keep):  # row by row: an index would first copy them all
        less.k_LBGSD[:, n], less.v_LBGSD[:, n] = k[:, row], v[:, row]
    return less


def draw(logits_BV, heat_B1, rng: torch.Generator) -> torch.Tensor:
    """A token of each row at its temperature, (B, 1); of a row at temperature 0, any."""
    cdf_BV = (logits_BV / heat_B1.clamp(min=1e-3)).softmax(-1).cumsum(-1)
    at_B1 = torch.rand(len(cdf_BV), 1, generator=rng).to(cdf_BV.device) * cdf_BV[:, -1:]
    return torch.searchsorted(cdf_BV, at_B1).clamp(max=cdf_BV.shape[1] - 1)


@torch.inference_mode()
def ask(target, tokenizer, eos, args) -> list[Prompt]:
    """--asked prompts that the target makes up: two of three are what it takes a user to say, the
    others begin to program or to tell. Those in a file depend on (seed, number) alone.
    """
    folder = args.work_dir / "asked"
    folder.mkdir(parents=True, exist_ok=True)
    head, tail = around_question(tokenizer)
    begun = [tokenizer.encode(text) for text in BEGINNINGS]
    starts = [begun[n // 3 % len(begun)] if n % 3 == 0 or not tail else head for n in range(ASKED)]
    number, found = 0, []
    with tqdm(total=args.asked, desc="questions", unit="prompt") as bar:
        while len(found) < args.asked:
            path = folder / f"{number:05d}.pt"
            if not path.exists():
                rng = torch.Generator().manual_seed(args.seed * 10**6 + number + 1)
                some = [Prompt(ids, "asked") for ids in starts]
                texts = sample(target, some, [0.8] * ASKED, QUESTION, eos, rng)
                store(path, [ids for text in texts if (ids := closed(text, head, tail, eos))])
            some = torch.load(path, weights_only=True)
            found += [Prompt(ids, "asked") for ids in some]
            number += 1
            bar.update(len(some))
    return found[: args.asked]


def closed(text: Text, head: list[int], tail: list[int], eos) -> list[int] | None:
    """The ids of a prompt from what the target began to write: a whole question and what the
    template puts after it, None if it did not end; of another text the first tokens, without an
    end.
    """
    ids = text.tokens.tolist()
    ended = ids[-1] in eos
    if not tail or ids[: text.first] != head:
        return ids[: len(ids) - ended][: text.first + QUESTION // 4]
    return ids[:-1] + tail if ended and len(ids) > text.first + 1 else None


@torch.inference_mode()
def write_texts(target, tokenizer, learn: list[Prompt], held: list[Prompt], eos, args) -> None:
    """Files of texts in the work folder: held-out ones, what --tokens asks for, given ones."""
    folder, rows = args.work_dir / "texts", args.rows
    folder.mkdir(parents=True, exist_ok=True)
    if held and not (args.work_dir / "held.pt").exists():
        rng = torch.Generator().manual_seed(args.seed)
        heats = [0.0] * len(held) + [1.0] * len(held)
        store(args.work_dir / "held.pt", sample(target, held * 2, heats, args.new_tokens, eos, rng))
    done, number = 0, 0
    with tqdm(total=args.tokens, desc="texts", unit="token", unit_scale=True) as bar:
        while done < args.tokens:
            path = folder / f"{number:05d}.pt"
            if not path.exists():
                some, heats = jobs(learn, number, rows)
                rng = torch.Generator().manual_seed(args.seed * 10**6 + number + 1)
                store(path, sample(target, some, heats, args.new_tokens, eos, rng))
            count = sum(len(text.ids_NK) for text in fetch(path))
            done, number = done + count, number + 1
            bar.update(count)
    for path in args.text:
        where = folder / f"text-{path.stem}.pt"
        if not where.exists():
            store(where, list(given(target, tokenizer, path)))


def jobs(prompts: list[Prompt], number: int, rows: int) -> tuple[list[Prompt], list[float]]:
    """Prompts and temperatures of one shard. Prompts come round again at another temperature.

    Blocks of 8 shards are sorted by length: what is sampled together is about equally long.
    """
    first, count = number // 8 * 8 * rows, len(prompts)
    turn = range(first, first + 8 * rows)
    block = [(n % count, HEATS[(n + n // count) % len(HEATS)]) for n in turn]
    block.sort(key=lambda job: len(prompts[job[0]].ids))
    some = block[number % 8 * rows :][:rows]
    return [prompts[n] for n, _ in some], [heat for _, heat in some]


def given(target, tokenizer, path: Path) -> Iterator[Text]:
    """A text file in pieces, with what the target expects at each token of it."""
    ids = tokenizer.encode(path.read_text(encoding="utf-8"))
    for first in tqdm(range(0, len(ids) - 1, PIECE), path.name, unit_scale=PIECE, unit="token"):
        piece = torch.tensor(ids[first : first + PIECE + 1])
        if len(piece) > 1:
            logits_NV = target(piece[None, :-1].to(target.embed.weight.device))[0].float()
            logp_NK, ids_NK = logits_NV.log_softmax(-1).topk(min(TOP, logits_NV.shape[1]))
            yield Text(piece.int(), 1, 1.0, path.stem, ids_NK.int().cpu(), logp_NK.half().cpu())


def store(path: Path, value) -> None:
    """Whole or not at all: a run killed while writing keeps what it had."""
    if isinstance(value, list):
        value = [asdict(each) if isinstance(each, Text) else each for each in value]
    torch.save(value, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def fetch(path: Path) -> list[Text]:
    return [Text(**fields) for fields in torch.load(path, weights_only=True, mmap=True)]


def all_texts(folder: Path) -> list[Text]:
    return [text for path in sorted(folder.glob("*.pt")) for text in fetch(path)]
