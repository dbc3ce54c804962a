"""A row: one sequence of the batch, from its prompt to the token that ends it.

Knows: token ids, text, stop strings, limits, n-grams of its own text. Does not know: models, proposals, other rows.
Read next: ssd.py.
"""

from sampling import Params

NGRAM = 4  # the longest suffix that an n-gram proposal matches; a single token says too little


class Row:
    """ids holds prompt and new tokens; the last one is the pending token, which no KV cache holds yet.

    number is the sequence's stable number, which with its seed names its noise. limit is the most ids it may have, by
    max_new_tokens and the context. finish is None, or why it ended: "eos", "stop", "length", "context".
    """

    def __init__(self, number: int, prompt: list[int], max_new: int, context: int, eos: frozenset, detokenizer, stop):
        self.number, self.ids, self.prompt = number, list(prompt), len(prompt)
        self.max_new, self.context, self.eos = max_new, context, eos
        self.limit = min(self.prompt + max_new, context)
        self.detokenizer, self.stop = detokenizer, stop
        self.text, self.told = "", 0  # all text so far, and how many characters of it were handed out
        self.finish: str | None = None
        self.kept = 0  # how many prompt tokens the KV caches hold already, from an earlier turn of a chat
        self.last_seen: dict[tuple[int, ...], int] = {}
        self.indexed = 0

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.prompt :]

    def room(self, k: int) -> int:
        """How many draft tokens the next round can use: the target's own token takes the last place."""
        return max(0, min(k, self.limit - len(self.ids) - 1))

    def push(self, token: int) -> None:
        """Append one emitted token and see whether it ends the row."""
        self.ids.append(token)
        if token in self.eos:
            self.finish = "eos"
        elif len(self.ids) == self.prompt + self.max_new:
            self.finish = "length"
        elif len(self.ids) >= self.context:
            self.finish = "context"
        if self.detokenizer is None:
            return
        before = len(self.text)
        if self.finish != "eos":  # the end-of-text token is a mark, not text
            self.text += self.detokenizer.push(token)
        if self.finish:
            self.text += self.detokenizer.flush()
        if self.stop and len(self.text) > before:
            longest = max(map(len, self.stop))
            found = [at for s in self.stop if (at := self.text.find(s, max(0, before - longest))) >= 0]
            if found:
                self.text, self.finish = self.text[: min(found)], "stop"

    def piece(self) -> str:
        """Text not handed out yet; what could be the beginning of a stop string waits until that is clear."""
        end = len(self.text)
        if not self.finish:
            held = (n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n]))
            end -= max(held, default=0)
        end = max(end, self.told)
        piece, self.told = self.text[self.told : end], end
        return piece

    def guess(self, k: int) -> list[int]:
        """Up to k tokens that followed the last occurrence of the longest suffix (2 to NGRAM tokens) seen before."""
        for end in range(max(self.indexed, 2), len(self.ids)):  # n-grams that end before position `end`
            for n in range(2, min(NGRAM, end) + 1):
                self.last_seen[tuple(self.ids[end - n : end])] = end
        self.indexed = len(self.ids)
        for n in range(min(NGRAM, len(self.ids)), 1, -1):
            at = self.last_seen.get(tuple(self.ids[-n:]))
            if at is not None:
                text = self.ids + [0] * k
                for i in range(k):  # behind the end of the text a repetition goes on repeating
                    text[len(self.ids) + i] = text[at + i]
                return text[len(self.ids) :]
        return []


def make_rows(prompts: list, settings, tokenizer, eos: frozenset, config) -> list[Row]:
    """One Row per prompt, a text or token ids. ValueError with one sentence for a prompt that cannot be completed."""
    if isinstance(prompts, str) or not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValueError(f"got prompts of type {type(prompts).__name__}, wanted a list with at least one prompt")
    if settings.stop and tokenizer is None:
        raise ValueError("stop texts were given, but the checkpoint has no tokenizer files: leave them out")
    seeds_are_own = isinstance(settings.seed, (list, tuple))
    limits = settings.per_row("max_new_tokens", len(prompts))
    rows = []
    for b, (prompt, max_new) in enumerate(zip(prompts, limits)):
        ids = _encode(prompt, b + 1, tokenizer, config.vocab_size)
        if len(ids) >= config.max_positions:
            raise ValueError(
                f"prompt {b + 1} has {len(ids)} tokens, but the context of the target is {config.max_positions} "
                "and must hold at least one more: shorten it"
            )
        detokenizer = tokenizer.stream() if tokenizer is not None else None
        ends = frozenset() if settings.ignore_eos else eos
        number = 0 if seeds_are_own else b
        rows.append(Row(number, ids, max_new, config.max_positions, ends, detokenizer, settings.stop))
    return rows


def _encode(prompt, number: int, tokenizer, vocab_size: int) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"prompt {number} is empty, wanted at least one character: write something to complete")
        if tokenizer is None:
            raise ValueError(
                "the checkpoint has no tokenizer files, wanted some to read text: add them, or give token ids in Python"
            )
        prompt = tokenizer.encode(prompt)
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise ValueError(f"prompt {number} is {prompt!r:.60}, wanted a text or a list of at least one token id")
    wrong = [t for t in prompt if not isinstance(t, int) or isinstance(t, bool) or not 0 <= t < vocab_size]
    if wrong:
        raise ValueError(f"prompt {number} holds {wrong[0]!r:.60}, wanted token ids from 0 to {vocab_size - 1}")
    return list(prompt)


def sampling_params(rows: list[Row], settings, device) -> Params:
    """The rows' sampling parameters as tensors on a device."""
    each = (settings.per_row(name, len(rows)) for name in ("temperature", "top_k", "top_p", "seed"))
    return Params.make(*each, [row.number for row in rows], device)
