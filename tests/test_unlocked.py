"""Scripted functions are the plain ones, which run where TorchScript is missing; a row alone is what the blocks say."""

import inspect

import pytest
import tiny
import torch

import sampling
import unlocked
from cache import KVCache
from runtime import one_thread, pack
from unlocked import all_layers, limits_as_bias

rng = torch.Generator().manual_seed(0)


def words(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(("function", "arguments"), [
    (limits_as_bias, (torch.tensor([[3, 4, 5], [1, 1, 7]]), 9, torch.float64)),
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
    assert unlocked.unlocked(inspect.unwrap(limits_as_bias)) is inspect.unwrap(limits_as_bias)


SHAPES = {
    "llama": {}, "qwen2": {"model_type": "qwen2"}, "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("way", ["float64", "float32", "packed", "plain Python"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_all_layers_are_what_the_blocks_compute(shape, way, B, monkeypatch):
    """Trunk and chain steps, by one call for all layers and block by block: the same logits, the same caches."""
    dtype = torch.float64 if way == "float64" else torch.float32
    model = tiny.transformer(dtype=dtype, **shape)
    for weight in model.parameters():
        if weight.dim() == 1:  # norms and biases that do something
            weight.add_(torch.randn(weight.shape, generator=rng, dtype=dtype), alpha=0.2)
    if way == "packed":
        pack(model)
    if way == "plain Python":
        monkeypatch.setattr("model.all_layers", inspect.unwrap(all_layers))
    model.set_positions(100)
    M, steps = 5, 3
    N = torch.tensor([20, 9, 14])[:B]  # rows of their own length; the last of several has ended
    live = torch.tensor([True, True, B == 1])[:B]
    both = [KVCache(model.config, B, 64, M, steps, device="cpu", dtype=dtype) for _ in range(2)]
    for cache in both:
        cache.k_LBGSD[..., :64, :] = cache.v_LBGSD[..., :64, :] = float("nan")  # slots that nobody has written yet
    tokens = torch.randint(50, (B, 64), generator=rng)
    start, fed = torch.where(live, N, 0), lambda T: torch.where(live, T, 0)
    place = lambda *args: both[0].place(*args, tight=True)  # noqa: E731
    places = [(place(N * 0, N, 20, 20), 20), (place(start, fed(1), 1, 21), 1), (place(start, fed(4), 4, 24), 4)]
    depth = torch.tensor([[0, 1, 3, 3, 2]]).expand(B, -1)
    for step in range(steps):
        chain = both[0].place_chain(start + 1, depth, torch.full((B,), step), live, 24, tight=True, steps=step + 1)
        places.append((chain, M))
    with torch.inference_mode(), one_thread():
        for at, T in places:
            assert at.quick
            logits = [model(tokens[:, :T], here, cache) for here, cache in zip((at, at._replace(quick=False)), both)]
            close = {"rtol": 0, "atol": 1e-11 if dtype == torch.float64 else 2e-5, "equal_nan": True}
            torch.testing.assert_close(*(x[live] for x in logits), **close)
            assert logits[0][live].isfinite().all()
            for ours, theirs in zip(*((cache.k_LBGSD, cache.v_LBGSD) for cache in both)):
                torch.testing.assert_close(ours[..., :-1, :], theirs[..., :-1, :], **close)  # the dead slot is anything


def test_windows_and_long_batches_go_block_by_block(monkeypatch):
    def never(*_):
        raise AssertionError("not for these")

    monkeypatch.setattr("model.all_layers", never)
    tiny.engine(tiny.transformer(model_type="mistral", sliding_window=6)).generate([[1, 2, 3]], max_new_tokens=3)
    monkeypatch.setattr("cache.QUICK_TOKENS", 1)
    plain = tiny.engine(tiny.transformer())
    plain.generate([[1, 2, 3], [4]], max_new_tokens=3)
    with pytest.raises(AssertionError, match="not for these"):
        plain.generate([[1, 2, 3]], max_new_tokens=3)
