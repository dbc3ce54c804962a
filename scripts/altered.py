"""Ablations: parts of the engine taken out, put back as others have them, or slowed down, for one generation.

Knows: which pieces of a Decoding can be swapped from outside, so that the engine needs no flag for it. Does not know:
what is compared, or how it is timed. Read next: ablate.py.
"""

import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fanout import FanOut  # noqa: E402
from ssd import Decoding  # noqa: E402

SLOWER = 3  # times that "slow draft" takes


class Uniform(FanOut):
    """The same fan-out for every outcome, what is left over for the first ones."""

    def lists(self, kind: int, length: int) -> list[int]:
        each, more = divmod(self.budget, length + 1)
        return [each + (j < more) for j in range(length + 1)]


class Fixed(FanOut):
    """Optimal for the prior, which nothing revises."""

    def observe(self, *_, **__) -> None:
        return None


def slowed(work):
    """The lane sleeps as much longer as makes `work` SLOWER times as slow: no core and no lock is taken meanwhile."""

    def slow(*args, **how):
        begin = time.perf_counter()
        value = work(*args, **how)
        time.sleep((SLOWER - 1) * (time.perf_counter() - begin))
        return value

    return slow


def lists(decoding: Decoding) -> None:
    """Lists by P and m also under `shared`, where outcomes are otherwise forked by their own scores."""
    decoding.fan_out = FanOut(decoding.settings.k, decoding.settings.fan_out)


def uniform_lists(decoding: Decoding) -> None:
    decoding.fan_out = Uniform(decoding.settings.k, decoding.settings.fan_out)


def fixed_lists(decoding: Decoding) -> None:
    decoding.fan_out = Fixed(decoding.settings.k, decoding.settings.fan_out)


def whole_batch(decoding: Decoding) -> None:
    """One row's miss drafts anew for all rows, as published: chains of rows that hit are thrown away."""
    decoding.fall_back = lambda proposal, missed: Decoding.fall_back(decoding, decoding.nothing(), decoding.live())


def slow_draft(decoding: Decoding) -> None:
    decoding.tuner.measured = decoding.tuner.measured.setdefault("slow draft", {})  # its times are none of the others'
    for step in ("extend", "fork", "chain_step", "decode"):
        setattr(decoding.draft, step, slowed(getattr(decoding.draft, step)))


ALTERED = {
    "lists": lists,
    "uniform lists": uniform_lists,
    "fixed lists": fixed_lists,
    "whole batch": whole_batch,
    "slow draft": slow_draft,
}


@contextmanager
def altered(decoding: Decoding, names):
    """Alter a generation that has not begun; a runner may serve the next one too, so it is set right in the end."""
    for name in names:
        ALTERED[name](decoding)
    try:
        yield
    finally:
        for step in ("extend", "fork", "chain_step", "decode") if decoding.draft else ():
            decoding.draft.__dict__.pop(step, None)
