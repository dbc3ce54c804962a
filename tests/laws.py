"""Slow truths about sampling for the tests: laws by naive loops, and what counts of draws say about
them.
"""

import numpy as np
import pytest
import scipy.stats
import torch

from sampling import Params

MANY = 200_000
INF = float("inf")
WAYS = {  # temperature, top_k, top_p
    "plain": (1.0, 0, 1.0),
    "cool": (0.4, 0, 1.0),
    "hot": (3.0, 0, 1.0),
    "top-k": (1.0, 3, 1.0),
    "top-p": (0.8, 0, 0.7),
    "both": (1.3, 4, 0.85),
    "greedy": (0.0, 0, 1.0),
    "greedy, filtered": (0.0, 2, 0.5),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Short operators on a busy machine are 50 times slower on two threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(rows=1, temperature=1.0, top_k=0, top_p=1.0, seed=11, row=None) -> Params:
    each = [x if isinstance(x, list) else [x] * rows for x in (temperature, top_k, top_p, seed)]
    return Params.make(*each, list(range(rows)) if row is None else row, "cpu")


def pick(params: Params, rows) -> Params:
    """The parameters of some of the rows."""
    return Params(*(x[rows] for x in params[:6]), params.greedy, params.filtered)


def chi_square(counts, law) -> float:
    """The p-value of counts under a law, 0 if the impossible happened; cells expected less than 5
    times are one.
    """
    counts, law = np.asarray(counts, float).ravel(), np.asarray(law, float).ravel()
    if counts[law == 0].any():
        return 0.0
    expected = law / law.sum() * counts.sum()
    rare = (expected < 5) & (law > 0)
    groups = [
        np.append(x[expected >= 5], x[rare].sum() if rare.any() else []) for x in (counts, expected)
    ]
    return scipy.stats.chisquare(*groups).pvalue


def naive_warp(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Temperature, then top-k, then top-p, token by token, in 64 bits."""
    if temperature == 0:
        return list(logits)
    x = [value / temperature for value in logits]
    if top_k:
        last = sorted(x, reverse=True)[min(top_k, len(x)) - 1]
        x = [value if value >= last else -INF for value in x]
    if top_p < 1:
        weight = [np.exp(value - max(x)) for value in x]
        mass, last = 0.0, INF
        for value, w in sorted(zip(x, weight), reverse=True):
            if mass / sum(weight) >= top_p and last < INF:
                break
            mass, last = mass + w, value
        x = [value if value >= last else -INF for value in x]
    return x


def law_of(logits, way) -> torch.Tensor:
    """The distribution of a draw, in 64 bits."""
    x = torch.tensor(naive_warp(logits.tolist(), *way), dtype=torch.float64)
    return (
        torch.nn.functional.one_hot(x.argmax(), len(x)).double() if way[0] == 0 else x.softmax(-1)
    )
