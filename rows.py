"""What a user may ask of one generation, checked, and one sequence: from its prompt to the token
that ends it.

Knows: names, types and ranges of settings; token ids, text, stop strings, limits, the n-grams of a
row's own text. Does not know: models, proposals, other rows. Read next: steps.py.
"""

import math
from dataclasses import dataclass

from figures import MODES

AUTO = "auto"
FALLBACKS = (AUTO, "jit", "fast")
HALVES = ("auto", "on", "off")
# How the two models' randomness is joined. shared: a token is accepted if it is the target's own
# draw. maximal: by the ratio p / q, as often as can be; the draft knows the noise of what follows a
# rejection. independent: the same rule, and the draft does not know that noise (the paper's).
COUPLINGS = ("shared", "maximal", "independent")
PER_ROW = ("temperature", "top_k", "top_p", "seed", "max_new_tokens")
# The longest suffix, in tokens, that a guess matches. One token alone says too little.
LONGEST_NGRAM = 4


@dataclass(frozen=True)
class Settings:
    """What is asked of one generation. ValueError for a value that is not allowed.

    temperature, top_k, top_p, seed and max_new_tokens are one value, or a list with one per prompt.

    * batch: most rows that are decoded at once; the others wait. None: all that memory holds.
    * mode: "ar" is plain decoding; in "sd" draft and target take turns; in "ssd" the draft prepares
      while the target verifies.
    * max_new_tokens: most new tokens of a row, the end-of-text token included.
    * temperature, top_k, top_p: applied in this order. Temperature 0 is greedy; top_k 0 and top_p 1
      are off.
    * seed: with one seed rows draw independently; with a list each row draws as if it were alone.
    * stop: texts that end a row and are not part of its text.
    * k, fan_out: most draft tokens a round (K), and outcomes prepared a round (M). "auto" lets the
      speed model choose.
    * cut: use the chain steps that are ready when the verdict is in, and wait for no more.
    * fallback: after a miss "jit" drafts now, "fast" guesses from the text, and "auto" drafts now
      if no row has hit.
    * batch_halves: "on" has two halves of the batch take turns on the devices of SSD, "auto" does
      so where it is quicker, "off" does not.
    * coupling: how the two models' randomness is joined, "shared", "maximal" or "independent".
    * saguaro_c: with "independent", how far the draft's top tokens are weighed down, 0 < C <= 1.
    """

    mode: str = "ar"
    max_new_tokens: int | list[int] = 128
    temperature: float | list[float] = 0.0
    top_k: int | list[int] = 0
    top_p: float | list[float] = 1.0
    seed: int | list[int] = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    k: int | str = AUTO
    fan_out: int | str = AUTO
    cut: bool = True
    fallback: str = "auto"
    coupling: str = "shared"
    saguaro_c: float = 1.0
    batch: int | None = None
    batch_halves: str = "off"

    def __post_init__(self):
        _one_of("mode", self.mode, MODES)
        _one_of("fallback", self.fallback, FALLBACKS)
        _one_of("batch_halves", self.batch_halves, HALVES)
        _one_of("coupling", self.coupling, COUPLINGS)
        _each(self.max_new_tokens, "max_new_tokens", int, 1, 1 << 24)
        _each(self.temperature, "temperature", float, 0, 100)
        if any(0 < t < 1e-6 for t in self.per_row("temperature", None)):
            raise ValueError(
                f"temperature is {self.temperature}, wanted 0 (greedy) or at least 0.000001"
            )
        _each(self.top_k, "top_k", int, 0, 1 << 24)
        _each(self.top_p, "top_p", float, 0, 1, above=True)
        _each(self.seed, "seed", int, 0, (1 << 64) - 1)
        if self.batch is not None:
            _each(self.batch, "batch", int, 1, 1 << 16, lists=False)
        for name, most in (("k", 64), ("fan_out", 1024)):
            if getattr(self, name) != AUTO:
                _each(
                    getattr(self, name), name, int, 1, most, lists=False, otherwise=f", or {AUTO!r}"
                )
        _each(self.saguaro_c, "saguaro_c", float, 0, 1, above=True, lists=False)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}, wanted texts of at least one character")
        if self.saguaro_c < 1 and self.coupling != "independent":
            raise ValueError(
                f"saguaro_c is {self.saguaro_c} with the coupling {self.coupling}: "
                "use --coupling independent, or leave it at 1"
            )

    def per_row(self, name: str, rows: int | None) -> list:
        """A per-row setting as a list of `rows` values; with None, of as many as were given."""
        value = getattr(self, name)
        if not isinstance(value, (list, tuple)):
            return [value] * (1 if rows is None else rows)
        if rows is not None and len(value) != rows:
            raise ValueError(
                f"{name} has {len(value)} values for {rows} prompts: give one, or one a prompt"
            )
        return list(value)


class Row:
    """One sequence. ids holds prompt and new tokens. The last one is the pending token, which is in
    no KV cache yet.

    number is the sequence's stable number, which with its seed names its noise. limit is the most
    ids it may have, by max_new_tokens and the context. finish is None, or why it ended: "eos",
    "stop", "length", "context"; "refused" if it cannot be decoded, and then `refused` says why.
    """

    def __init__(
        self,
        number: int,
        prompt: list[int],
        max_new: int,
        context: int,
        eos: frozenset,
        detokenizer,
        stop,
        sampling=(0.0, 0, 1.0, 0),
    ):
        """sampling: temperature, top_k, top_p, seed."""
        self.sampling = sampling
        self.number, self.ids, self.prompt = number, list(prompt), len(prompt)
        self.max_new, self.context, self.eos = max_new, context, eos
        self.limit = min(self.prompt + max_new, context)
        self.detokenizer, self.stop = detokenizer, stop
        # All text so far, and how many characters of it were handed out.
        self.text, self.told = "", 0
        self.finish: str | None = None
        self.refused: str | None = None
        # How many tokens of the prompt the target has read, and how many of all ids the draft has,
        # with the proposal in flight. An earlier turn of a chat may have left some.
        self.target_read = self.draft_read = 0
        self.last_seen: dict[tuple[int, ...], int] = {}
        self.indexed = 0

    @property
    def prompt_left(self) -> list[int]:
        """The prompt's tokens that the target has still to read. The last one is pending."""
        return self.ids[self.target_read : self.prompt - 1]

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.prompt :]

    def refuse(self, why: str) -> None:
        self.finish, self.refused = "refused", why

    def room(self, k: int) -> int:
        """How many draft tokens the next round can use. The bonus token takes the last place."""
        return max(0, min(k, self.limit - len(self.ids) - 1))

    def push(self, token: int) -> None:
        """Append one emitted token, and set finish if it ends the row."""
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
            found = [
                at for s in self.stop if (at := self.text.find(s, max(0, before - longest))) >= 0
            ]
            if found:
                self.text, self.finish = self.text[: min(found)], "stop"

    def piece(self) -> str:
        """The text that was not handed out yet. What could begin a stop string waits until that is
        clear.
        """
        end = len(self.text)
        if not self.finish:
            held = (n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n]))
            end -= max(held, default=0)
        end = max(end, self.told)
        piece, self.told = self.text[self.told : end], end
        return piece

    def guess(self, k: int, drafted: list[int] = ()) -> list[int]:
        """Up to k tokens to follow the row and what was drafted for it: those that followed, in the
        row, the last earlier occurrence of the longest suffix (2 to LONGEST_NGRAM tokens).
        """
        # N-grams that end before position `end`.
        for end in range(max(self.indexed, 2), len(self.ids)):
            for n in range(2, min(LONGEST_NGRAM, end) + 1):
                self.last_seen[tuple(self.ids[end - n : end])] = end
        self.indexed = len(self.ids)
        text = [*self.ids, *drafted]
        end = len(text)
        for n in range(min(LONGEST_NGRAM, end), 1, -1):
            at = self.last_seen.get(tuple(text[-n:]))
            if at is not None:
                for i in range(k):  # past the end of the text a repetition goes on repeating
                    text.append(text[at + i])
                return text[end:]
        return []


def make_rows(
    prompts: list, settings, tokenizer, eos: frozenset, config, numbers: list[int] | None = None
) -> list[Row]:
    """One Row per prompt, a text or token ids. ValueError with one sentence for a prompt that
    cannot be completed. One that is too long for the context is refused by itself.
    """
    if not isinstance(prompts, (list, tuple)) or not prompts:
        got = "no prompts" if isinstance(prompts, (list, tuple)) else f"a {type(prompts).__name__}"
        raise ValueError(f"got {got} to complete, wanted a list with at least one prompt")
    if settings.stop and tokenizer is None:
        raise ValueError(
            "stop texts were given, but the checkpoint has no tokenizer files: leave them out"
        )
    seeds_are_own = isinstance(settings.seed, (list, tuple))
    each = [settings.per_row(name, len(prompts)) for name in PER_ROW]
    rows = []
    for b, (prompt, *sampling, max_new) in enumerate(zip(prompts, *each)):
        ids = _encode(prompt, b + 1, tokenizer, config.vocab_size)
        detokenizer = tokenizer.stream() if tokenizer is not None else None
        ends = frozenset() if settings.ignore_eos else eos
        at = b if numbers is None else numbers[b]
        number = 0 if seeds_are_own else at
        most = config.max_positions
        row = Row(number, ids, max_new, most, ends, detokenizer, settings.stop, tuple(sampling))
        if len(ids) >= most:
            row.refuse(
                f"prompt {at + 1} has {len(ids)} tokens, but the context of the target is "
                f"{most} and must hold at least one more: shorten it"
            )
        rows.append(row)
    return rows


def _encode(prompt, number: int, tokenizer, vocab_size: int) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(
                f"prompt {number} is empty, wanted at least one character: write something"
            )
        if tokenizer is None:
            raise ValueError(
                "the checkpoint has no tokenizer files, wanted some to read text: add them or give "
                "token ids in Python"
            )
        prompt = tokenizer.encode(prompt)
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise ValueError(
            f"prompt {number} is {prompt!r:.60}, wanted a text or a list of at least one token id"
        )
    wrong = [
        t
        for t in prompt
        if not isinstance(t, int) or isinstance(t, bool) or not 0 <= t < vocab_size
    ]
    if wrong:
        raise ValueError(
            f"prompt {number} holds {wrong[0]!r:.60}, wanted token ids from 0 to {vocab_size - 1}"
        )
    return list(prompt)


def _one_of(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, wanted one of {', '.join(choices)}")


def _each(value, name: str, kind: type, low, high, above=False, lists=True, otherwise="") -> None:
    for x in value if lists and isinstance(value, (list, tuple)) else [value]:
        allowed = (int, float) if kind is float else int
        number = isinstance(x, allowed) and not isinstance(x, bool) and math.isfinite(x)
        if not number or not low <= x <= high or (above and x <= low):
            what = "a whole number" if kind is int else "a number"
            bounds = f"above {low} and at most {high}" if above else f"from {low} to {high}"
            raise ValueError(f"{name} is {x!r:.60}, wanted {what} {bounds}{otherwise}")
