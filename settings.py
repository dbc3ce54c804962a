"""What a user may ask of one generation, checked: the flags of the terminal and the keywords of Python are the same.

Knows: names, types and ranges. Does not know: models, devices. Read next: ssd.py, which obeys.
"""

import math
from dataclasses import dataclass

from sampling import COUPLINGS

MODES = ("ar", "sd", "ssd")
AUTO = "auto"
FALLBACKS = (AUTO, "jit", "fast")
PER_ROW = ("temperature", "top_k", "top_p", "seed", "max_new_tokens")


@dataclass(frozen=True)
class Settings:
    """One generation. temperature, top_k, top_p, seed and max_new_tokens are one value, or a list with one per prompt.

    mode            "ar" plain decoding, "sd" draft and target take turns, "ssd" the draft prepares while verifying
    max_new_tokens  most new tokens of a row, EOS included
    temperature     0 is greedy; top_k 0 and top_p 1 are off; order: temperature, top-k, top-p
    seed            one seed: rows draw independently; a list: each row draws as if it were alone with its seed
    stop            texts that end a row (not included in its text)
    k, fan_out      most draft tokens a round (K); outcomes prepared a round (M); "auto" lets the speed model choose
    cut             use the chains that are ready when the verdict is in, instead of waiting for all of them
    fallback        what follows a miss: "jit" drafts now, "fast" guesses from the text, "auto" whichever is faster
    coupling        how the two models' randomness is joined: "shared", "maximal", "independent"
    saguaro_c       with "independent": how far the draft's top tokens are weighed down, 0 < C <= 1
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

    def __post_init__(self):
        _one_of("mode", self.mode, MODES)
        _one_of("fallback", self.fallback, FALLBACKS)
        _one_of("coupling", self.coupling, COUPLINGS)
        _each(self.max_new_tokens, "max_new_tokens", int, 1, 1 << 24)
        _each(self.temperature, "temperature", float, 0, 100)
        if any(0 < t < 1e-6 for t in self.per_row("temperature", None)):
            raise ValueError(f"temperature is {self.temperature}, wanted 0 or at least 0.000001: use 0 for greedy")
        _each(self.top_k, "top_k", int, 0, 1 << 24)
        _each(self.top_p, "top_p", float, 0, 1, above=True)
        _each(self.seed, "seed", int, 0, (1 << 64) - 1)
        for name, most in (("k", 64), ("fan_out", 1024)):
            if getattr(self, name) != AUTO:
                _each(getattr(self, name), name, int, 1, most, lists=False, otherwise=f", or {AUTO!r}")
        _each(self.saguaro_c, "saguaro_c", float, 0, 1, above=True, lists=False)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}, wanted texts of at least one character: leave empty ones out")
        if self.saguaro_c < 1 and self.coupling != "independent":
            raise ValueError(
                f"saguaro_c is {self.saguaro_c} with the coupling {self.coupling}, which it cannot help: "
                "use --coupling independent, or leave it at 1"
            )

    def per_row(self, name: str, rows: int | None) -> list:
        """A per-row setting as a list of `rows` values; with None, of as many as were given."""
        value = getattr(self, name)
        if not isinstance(value, (list, tuple)):
            return [value] * (1 if rows is None else rows)
        if rows is not None and len(value) != rows:
            raise ValueError(f"{name} has {len(value)} values for {rows} prompts: give one value, or one per prompt")
        return list(value)


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
