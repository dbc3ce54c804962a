"""What a user may ask of one generation, checked; one sequence, from its prompt to the token that
ends it; and which sequence has which place of the batch.

Knows: names, types and ranges of settings; token ids, text, stop strings, limits, the n-grams of a
row's own text; places. Does not know: models, proposals. Read next: steps.py.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from figures import MODES

AUTO = "auto"
FALLBACKS = (AUTO, "jit", "fast")
HALVES = (AUTO, "on", "off")
# How the two models' randomness is joined. shared: a token is accepted if it is the target's own
# draw. maximal: by the ratio p / q, as often as can be; the draft knows the noise of what follows a
# rejection. independent: the same rule, and the draft does not know that noise (the paper's).
COUPLINGS = ("shared", "maximal", "independent")
PER_ROW = ("temperature", "top_k", "top_p", "seed", "max_new_tokens")
# The longest suffix, in tokens, that a guess matches. One token alone says too little.
LONGEST_NGRAM = 4
# Prompt tokens that are read between two rounds, of rows that join a running batch.
JOIN_CHUNK = 256


class Range(NamedTuple):
    """Which numbers a setting may be. letter is what --help calls them; low itself is not allowed
    if `above`; a list may have one for each prompt if `each`; "auto" is allowed, too, if `auto`.
    """

    letter: str
    kind: type
    low: float
    high: float
    above: bool = False
    each: bool = False
    auto: bool = False

    @property
    def what(self) -> str:
        return "a whole number" if self.kind is int else "a number"

    def check(self, name: str, value) -> None:
        """ValueError for a value that is not allowed."""
        if self.auto and value == AUTO:  # whoever spelt it: the command line, JSON, a caller
            return
        low, high, allowed = self.low, self.high, (int, float) if self.kind is float else int
        for x in value if self.each and isinstance(value, (list, tuple)) else [value]:
            number = isinstance(x, allowed) and not isinstance(x, bool)
            if not number or not low <= x <= high or (self.above and x <= low):
                bounds = (
                    f"above {low} and at most {high}" if self.above else f"from {low} to {high}"
                )
                bounds += f", or {AUTO!r}" if self.auto else ""
                raise ValueError(f"{name} is {x!r:.60}, wanted {self.what} {bounds}")


def setting(default, said: str, wanted: Range | tuple[str, ...] | None = None):
    """A field of Settings: its default, what --help says, and the values that it may have."""
    return field(default=default, metadata={"said": said, "wanted": wanted})


@dataclass(frozen=True)
class Settings:
    """What is asked of one generation. ValueError for a value that is not allowed.

    All but the mode are flags of generate.py, too. Those in PER_ROW are one value, or a list with
    one per prompt. Rows with one seed draw independently; with a list of seeds each row draws as if
    it were alone.
    """

    mode: str = setting("ar", "plain decoding, in turns, or at the same time", MODES)
    max_new_tokens: int | list[int] = setting(
        128,
        "most new tokens of a prompt, the end-of-text token included (128)",
        Range("N", int, 1, 1 << 24, each=True),
    )
    temperature: float | list[float] = setting(
        0.0, "0, the default, is greedy", Range("T", float, 0, 100, each=True)
    )
    top_k: int | list[int] = setting(
        0,
        "keep the N likeliest tokens; 0, the default, is off",
        Range("N", int, 0, 1 << 24, each=True),
    )
    top_p: float | list[float] = setting(
        1.0,
        "then keep the likeliest that sum to P; 1, the default, is off",
        Range("P", float, 0, 1, above=True, each=True),
    )
    seed: int | list[int] = setting(
        0,
        "same seed, same text, in every mode under shared (0)",
        Range("S", int, 0, (1 << 64) - 1, each=True),
    )
    stop: tuple[str, ...] = setting((), "texts that end the output, and are not part of it")
    ignore_eos: bool = setting(False, "go on after the end of the text")
    batch: int | None = setting(
        None,
        "most prompts decoded at once, the others wait (all that memory holds)",
        Range("N", int, 1, 1 << 16),
    )
    batch_halves: str = setting(
        "off",
        "SD, SSD: verify half of the batch while the draft works for the other half; auto: where "
        "that is quicker (off)",
        HALVES,
    )
    k: int | str = setting(
        AUTO, "SD, SSD: most draft tokens a round (auto)", Range("K", int, 1, 64, auto=True)
    )
    fan_out: int | str = setting(
        AUTO,
        "SSD: outcomes prepared for each row in a round (auto)",
        Range("M", int, 1, 1024, auto=True),
    )
    cut: bool = setting(
        True,
        "SSD: begin no step of the chains that would not be half done when the verdict comes "
        "(where K or M is auto, make all K where that is quicker), or always make all K",
    )
    fallback: str = setting(
        AUTO,
        "SSD, on a miss: draft now (jit), guess from the text (fast), or draft if no row that hit "
        "has to wait and, where K or M is auto, if that pays (auto, the default)",
        FALLBACKS,
    )
    coupling: str = setting(
        "shared", "how the two models' randomness is joined (shared)", COUPLINGS
    )
    saguaro_c: float = setting(
        1.0,
        "independent: weigh down the draft's top tokens; 1, the default, is off",
        Range("C", float, 0, 1, above=True),
    )

    def __post_init__(self):
        texts = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(texts, (list, tuple)):
            raise ValueError(f"stop is {texts!r}, wanted a text or a list of them")
        object.__setattr__(self, "stop", tuple(texts))
        for asked in fields(self):
            value, wanted = getattr(self, asked.name), asked.metadata["wanted"]
            if isinstance(asked.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{asked.name} is {value!r}, wanted True or False")
            if value is asked.default or wanted is None:
                continue
            if isinstance(wanted, Range):
                wanted.check(asked.name, value)
            elif value not in wanted:
                raise ValueError(f"{asked.name} is {value!r}, wanted one of {', '.join(wanted)}")
        if any(0 < t < 1e-6 for t in self.per_row("temperature", None)):
            raise ValueError(
                f"temperature is {self.temperature}, wanted 0 (greedy) or at least 0.000001"
            )
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
            return [value] * (rows or 1)
        if rows is not None and len(value) != rows:
            raise ValueError(
                f"{name} has {len(value)} values for {rows} prompts: give one, or one a prompt"
            )
        return list(value)


@dataclass(eq=False)
class Row:
    """One sequence. ids holds prompt and new tokens. The last one is the pending token, which is in
    no KV cache yet.

    number is the sequence's stable number, which with its seed names its noise; sampling is its
    temperature, top-k, top-p and seed. prompt is how many ids the prompt has, limit how many the
    row may have, by max_new and the context. finish is None, or why it ended: "eos", "stop",
    "length", "context"; "refused" if it cannot be decoded, and then `refused` says why.
    """

    number: int
    ids: list[int]
    max_new: int
    context: int
    eos: frozenset
    detokenizer: object
    stop: tuple[str, ...]
    sampling: tuple = (0.0, 0, 1.0, 0)
    finish: str | None = None
    refused: str | None = None
    text: str = ""
    told: int = 0  # how many characters of the text were handed out
    # How many tokens of the prompt the target has read, and how many of all ids the draft has, with
    # the proposal in flight. An earlier turn of a chat may have left some.
    target_read: int = 0
    draft_read: int = 0
    last_seen: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0

    def __post_init__(self):
        self.ids, self.prompt = list(self.ids), len(self.ids)
        self.limit = min(self.prompt + self.max_new, self.context)

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
        if self.stop:
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


class Seats:
    """Which row has which place of the batch: rows[b] is the one in place b. The others wait."""

    def __init__(self, rows: list[Row], places: int):
        """A row that has ended, since it was refused, never begins."""
        self.waiting = deque(row for row in rows if row.finish is None)
        self.rows = [self.waiting.popleft() for _ in range(places)]

    def live(self, places) -> list[int]:
        """Those of the places whose prompt is read and whose row has not ended."""
        return [b for b in places if self.rows[b].finish is None and not self.rows[b].prompt_left]

    def joining(self, places: range) -> Iterator[tuple]:
        """Let rows that wait take the places of rows that ended. Yields what both models do for it:
        a method of Runner and its arguments.

        Of their prompts JOIN_CHUNK tokens are read a round, so that the others do not wait for
        long; more only where nobody else could play.
        """
        left = JOIN_CHUNK
        for b in places:
            if self.rows[b].finish and self.waiting:
                self.rows[b].last_seen.clear()  # it guesses no more
                self.rows[b] = self.waiting.popleft()
                yield "seat", b, self.rows[b].sampling, self.rows[b].number
            row = self.rows[b]
            while (chunk := row.prompt_left[:JOIN_CHUNK]) and (left > 0 or not self.live(places)):
                ids, start = [[]] * len(self.rows), [0] * len(self.rows)
                ids[b], start[b] = chunk, row.target_read
                yield "prefill", ids, start
                left -= len(chunk)
                row.target_read = row.draft_read = row.target_read + len(chunk)


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
    if numbers is None:
        numbers = range(len(prompts))
    rows = []
    for at, prompt, *sampling, max_new in zip(numbers, prompts, *each, strict=True):
        ids = _encode(prompt, at + 1, tokenizer, config.vocab_size)
        detokenizer = tokenizer.stream() if tokenizer is not None else None
        ends = frozenset() if settings.ignore_eos else eos
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
    wrong = [t for t in prompt if type(t) is not int or not 0 <= t < vocab_size]
    if wrong:
        raise ValueError(
            f"prompt {number} holds {wrong[0]!r:.60}, wanted token ids from 0 to {vocab_size - 1}"
        )
    return list(prompt)
