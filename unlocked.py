"""A few tokens through all layers of a model on a CPU, as one call that runs without Python's lock.

Knows: TorchScript, and the layers of a model. Does not know: rounds, devices, whose weights these are.
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
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots_BT: torch.Tensor,
    k_BGSD: torch.Tensor, v_BGSD: torch.Tensor, bias: torch.Tensor | None, dead: torch.Tensor | None,
    extent: int, base: int, steps: int,
    q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float,
) -> torch.Tensor:  # fmt: skip
    """Rotate, write to the KV cache, attend: (B, T, H + 2 G, D) -> (B, T, H * D)."""
    B, T, G, D = qkv.shape[0], qkv.shape[1], k_BGSD.shape[1], k_BGSD.shape[3]
    H = qkv.shape[2] - 2 * G
    R = H // G
    rotated = qkv[:, :, : H + G]
    if q_norm is not None and k_norm is not None:
        query, key = F.rms_norm(rotated[:, :, :H], [D], q_norm, eps), F.rms_norm(rotated[:, :, H:], [D], k_norm, eps)
        rotated = torch.cat((query, key), 2)
    rotated = torch.addcmul(rotated * cos, rotated.roll([D // 2], [-1]), sin)
    key_BGTD, value_BGTD = rotated[:, :, H:].transpose(1, 2), qkv[:, :, H + G :].transpose(1, 2)
    if B == 1:
        k_BGSD.index_copy_(2, slots_BT[0], key_BGTD)
        v_BGSD.index_copy_(2, slots_BT[0], value_BGTD)
    else:
        slots_BGTD = slots_BT[:, None, :, None].expand(B, G, T, D)
        k_BGSD.scatter_(2, slots_BGTD, key_BGTD)
        v_BGSD.scatter_(2, slots_BGTD, value_BGTD)
    query_BGQD = rotated[:, :, :H].reshape(B, T, G, R, D).transpose(1, 2).reshape(B, G, T * R, D)
    trunk_k, trunk_v = k_BGSD.narrow(2, 0, extent), v_BGSD.narrow(2, 0, extent)
    if dead is not None:  # NaN - inf and zero times NaN are NaN
        trunk_k, trunk_v = trunk_k.masked_fill(dead, 0.0), trunk_v.masked_fill(dead, 0.0)
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
def all_layers(
    x_BTE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots_BT: torch.Tensor,
    k_L: list[torch.Tensor], v_L: list[torch.Tensor], bias: torch.Tensor | None, dead: torch.Tensor | None,
    extent: int, base: int, steps: int,
    norms: list[list[torch.Tensor | None]], linears: list[list[torch.Tensor]],
    biases: list[list[torch.Tensor | None]], eps: float, packed: bool,
) -> torch.Tensor:  # fmt: skip
    """All layers of model.Transformer: (B, T, E) -> (B, T, E), as its blocks do one after the other, without windows.

    k_L, v_L: a layer's cache (B, G, S, D) each. bias, dead: of limits_as_bias, bias repeated for a group's H / G heads,
    (B, 1, T * H / G, extent); None where all is seen. base, steps: the scratch of a chain step, whose branches
    have `steps` tokens each by now; 0: no chains. norms: attention, MLP, query, key; linears and their biases: qkv,
    out, gate and up, down; by layer.
    """
    E = x_BTE.shape[2]
    for i in range(len(k_L)):
        k, v = k_L[i], v_L[i]
        h = F.rms_norm(x_BTE, [E], norms[0][i], eps)
        qkv = _linear(h, linears[0][i], biases[0][i], packed)
        qkv = qkv.view(x_BTE.shape[0], x_BTE.shape[1], -1, k.shape[3])
        norm = norms[2][i], norms[3][i]
        mixed = _attend(qkv, cos, sin, slots_BT, k, v, bias, dead, extent, base, steps, norm[0], norm[1], eps)
        x_BTE = x_BTE + _linear(mixed, linears[1][i], biases[1][i], packed)
        h = F.rms_norm(x_BTE, [E], norms[1][i], eps)
        gate, up = _linear(h, linears[2][i], biases[2][i], packed).chunk(2, -1)
        x_BTE = x_BTE + _linear(F.silu(gate) * up, linears[3][i], biases[3][i], packed)
    return x_BTE


@unlocked
def limits_as_bias(limit_BT: torch.Tensor, extent: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """For all layers of a pass: 0 for the slots below each query's limit, else -inf, (B, 1, T, extent); and which slots
    no query of a row sees, (B, 1, extent, 1)."""
    dead_BTS = torch.arange(extent) >= limit_BT[:, :, None]
    bias_BTS = torch.zeros(dead_BTS.shape, dtype=dtype).masked_fill_(dead_BTS, float("-inf"))
    return bias_BTS[:, None], dead_BTS.all(1)[:, None, :, None]
