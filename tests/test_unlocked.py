"""Scripted functions are the plain ones, and the plain ones are what runs where TorchScript is missing."""

import inspect

import pytest
import torch

import sampling
import unlocked
from unlocked import attend_row, row_bias, swiglu

rng = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=rng)


def words(values):
    return torch.tensor(values, dtype=torch.int32)


def attended(norms):
    cache = (random(1, 2, 40, 8), random(1, 2, 40, 8))
    place = torch.tensor([[7, 8, 9]]), *cache, row_bias(torch.tensor([[8, 9, 10]]), 10, 2, torch.float32), 10, 0, 0
    return random(1, 3, 8, 8), random(1, 3, 1, 8), random(1, 3, 1, 8), *place, 0.3, *norms


@pytest.mark.parametrize(("function", "arguments"), [
    (attend_row, attended((None, None, 0.0))),
    (attend_row, attended((random(8), random(8), 1e-5))),
    (row_bias, (torch.tensor([[3, 4, 5]]), 9, 3, torch.float64)),
    (swiglu, (random(2, 3, 10),)),
    (sampling._hash, (words([[3, -7], [2**31 - 1, -(2**31)]]), torch.tensor([[5], [9]]), 1, 0)),
    (sampling._hash, (words([[3, -7]]), torch.tensor([[5, 6, 2**33]]), 3, 100)),
    (sampling._spread, (words([0, 1, 2**31 - 1]), torch.float32)),
    (sampling._double_log, (torch.rand(50, generator=rng),)),
    (sampling.accept_shared, (torch.tensor([[1, 2, 3]]), torch.tensor([[1, 9]]), torch.tensor([2]))),
])  # fmt: skip
def test_a_scripted_function_is_the_plain_one(function, arguments):
    plain = inspect.unwrap(function)
    assert plain is not function, "it was not scripted here"
    copies = [[x.clone() if torch.is_tensor(x) else x for x in arguments] for _ in range(2)]
    scripted, expected = function(*copies[0]), plain(*copies[1])
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (scripted, expected))):
        assert torch.equal(a, b) and a.dtype == b.dtype
    for a, b in zip(*copies):  # what is written in place as well
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_without_torchscript_the_plain_function_runs(monkeypatch):
    def gone(_):
        raise RuntimeError("torch.jit.script is not supported in Python 3.14+")

    monkeypatch.setattr(torch.jit, "script", gone)
    assert unlocked.unlocked(inspect.unwrap(swiglu)) is inspect.unwrap(swiglu)
