"""A single row through all layers of a model on a CPU, as one call that runs without Python's lock.

Knows: TorchScript, and the layers of a model for a single row. Does not know: rounds, devices, whose weights these are.
Read next: model.py, whose blocks say the same for every other case; tests/test_unlocked.py holds the two together.

Two lanes are two threads, and every torch call takes Python's lock twice. A verification by the demo target was 470
calls beside a draft that makes as many, and a quarter of its time went into waiting for the lock. A scripted function
is one call. Each is ordinary Python too, which is what runs where TorchScript is missing (Python 3.14) and what
torch.compile sees.
"""

import functools
import warnings

import torch
import torch.nn.functional as F


def unlocked(function):
    """The function as TorchScript for tensors on the CPU, if this torch still has it. Its first argument is a tensor.

    torch.compile and GPUs, where TorchScript would compile kernels of its own, get the function as it is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            scripted = torch.jit.script(function)
    except Exception:  # whatever a later version makes of it
        return function

    @functools.wraps(function)
    def call(*args):
        return (function if torch.compiler.is_compiling() or args[0].is_cuda else scripted)(*args)

    return call


def _attend(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots_T: torch.Tensor,
    k_BGSD: torch.Tensor, v_BGSD: torch.Tensor, bias: torch.Tensor | None, extent: int, base: int, steps: int,
    q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float,
) -> torch.Tensor:  # fmt: skip
    """Rotate, write to the KV cache, attend: (1, T, H + 2 G, D) -> (1, T, H * D)."""
    B, T, G, D = qkv.shape[0], qkv.shape[1], k_BGSD.shape[1], k_BGSD.shape[3]
    H = qkv.shape[2] - 2 * G
    R = H // G
    rotated = qkv[:, :, : H + G]
    if q_norm is not None and k_norm is not None:
        query, key = F.rms_norm(rotated[:, :, :H], [D], q_norm, eps), F.rms_norm(rotated[:, :, H:], [D], k_norm, eps)
        rotated = torch.cat((query, key), 2)
    rotated = torch.addcmul(rotated * cos, rotated.roll([D // 2], [-1]), sin)
    k_BGSD.index_copy_(2, slots_T, rotated[:, :, H:].transpose(1, 2))
    v_BGSD.index_copy_(2, slots_T, qkv[:, :, H + G :].transpose(1, 2))
    query_BGQD = rotated[:, :, :H].reshape(B, T, G, R, D).transpose(1, 2).reshape(B, G, T * R, D)
    trunk_k, trunk_v = k_BGSD.narrow(2, 0, extent), v_BGSD.narrow(2, 0, extent)
    if steps == 0:
        mixed_BGQD = F.scaled_dot_product_attention(query_BGQD, trunk_k, trunk_v, bias)
    else:
        scale = float(D) ** -0.5
        scores_BGQS = torch.matmul(query_BGQD, trunk_k.transpose(2, 3)).mul_(scale)
        if bias is not None:
            scores_BGQS.add_(bias)
        own_k = k_BGSD.narrow(2, base, steps * T).view(B, G, steps, T, D).transpose(2, 3)
        own_v = v_BGSD.narrow(2, base, steps * T).view(B, G, steps, T, D).transpose(2, 3)
        own = torch.matmul(query_BGQD.view(B, G, T, R, D), own_k.transpose(3, 4)).mul_(scale)
        weights = torch.softmax(torch.cat((scores_BGQS, own.flatten(2, 3)), -1), -1)
        mixed_BGQD = torch.matmul(weights[..., :extent], trunk_v)
        mixed_BGQD += torch.matmul(weights[..., extent:].view(B, G, T, R, steps), own_v).flatten(2, 3)
    return mixed_BGQD.view(B, G, T, R, D).transpose(1, 2).reshape(B, T, H * D)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, packed: bool) -> torch.Tensor:
    if packed:  # runtime.PackedLinear
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@unlocked
def layers_of_a_row(
    x_BTE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots_BT: torch.Tensor,
    k_L: list[torch.Tensor], v_L: list[torch.Tensor], bias: torch.Tensor | None,
    extent: int, base: int, steps: int,
    norms: list[list[torch.Tensor | None]], linears: list[list[torch.Tensor]],
    biases: list[list[torch.Tensor | None]], eps: float, packed: bool,
) -> torch.Tensor:  # fmt: skip
    """All layers of model.Transformer for one row: (1, T, E) -> (1, T, E), as its blocks do one after the other.

    k_L, v_L: a layer's cache (1, G, S, D) each. bias: row_bias for each of a group's H / G heads, (T * H / G, extent);
    None where all is seen. base, steps: the scratch of a chain step, whose branches have `steps` tokens each by now;
    0: no chains. norms: attention, MLP, query, key; linears and their biases: qkv, out, gate and up, down; by layer.
    """
    E, slots_T = x_BTE.shape[2], slots_BT[0]
    for i in range(len(k_L)):
        k, v = k_L[i], v_L[i]
        h = F.rms_norm(x_BTE, [E], norms[0][i], eps)
        qkv = _linear(h, linears[0][i], biases[0][i], packed)
        qkv = qkv.view(x_BTE.shape[0], x_BTE.shape[1], -1, k.shape[3])
        mixed = _attend(qkv, cos, sin, slots_T, k, v, bias, extent, base, steps, norms[2][i], norms[3][i], eps)
        x_BTE = x_BTE + _linear(mixed, linears[1][i], biases[1][i], packed)
        h = F.rms_norm(x_BTE, [E], norms[1][i], eps)
        gate, up = _linear(h, linears[2][i], biases[2][i], packed).chunk(2, -1)
        x_BTE = x_BTE + _linear(F.silu(gate) * up, linears[3][i], biases[3][i], packed)
    return x_BTE


@unlocked
def row_bias(limit_BT: torch.Tensor, extent: int, dtype: torch.dtype) -> torch.Tensor:
    """0 for the slots below each query's limit, else -inf: (T, extent), which serves all layers of a pass."""
    dead_TS = torch.arange(extent) >= limit_BT[0, :, None]
    return torch.zeros(dead_TS.shape, dtype=dtype).masked_fill_(dead_TS, float("-inf"))
