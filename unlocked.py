"""What a CPU lane does between two linear layers, as calls that run without Python's lock.

Knows: TorchScript, and the three places where a pass spends most of its small operations: attention of a single row,
the gate of the MLP, the noise. Does not know: models, rounds, devices. Read next: kernels.py, which says what the
attention computes and serves every other case.

Two lanes are two threads, and every torch call takes Python's lock twice. A verification by the demo target was 300
calls beside a draft that makes as many: measured, a quarter of its time went into waiting for the lock. A scripted
function is one call. Each is ordinary Python too, which is what runs where TorchScript is missing (Python 3.14) and
what torch.compile sees.
"""

import functools
import warnings
from typing import Optional

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


@unlocked
def attend_row(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots_BT: torch.Tensor,
    k_BGSD: torch.Tensor, v_BGSD: torch.Tensor, bias: Optional[torch.Tensor],  # noqa: UP045
    extent: int, base: int, steps: int, scale: float,
    q_norm: Optional[torch.Tensor], k_norm: Optional[torch.Tensor], eps: float,  # noqa: UP045
) -> torch.Tensor:  # fmt: skip
    """Rotate, write to the KV cache, attend: (1, T, H + 2 G, D) -> (1, T, H * D), as kernels.tree_attention if tight.

    bias (T * H / G, extent): 0 below a query's limit, else -inf; None where all is seen. base, steps: the scratch of a
    chain step, whose branches have `steps` tokens each by now; 0: no chains.
    """
    B, T, G, D = qkv.shape[0], qkv.shape[1], k_BGSD.shape[1], k_BGSD.shape[3]
    H = qkv.shape[2] - 2 * G
    R = H // G
    rotated = qkv[:, :, : H + G]
    if q_norm is not None and k_norm is not None:
        query, key = F.rms_norm(rotated[:, :, :H], [D], q_norm, eps), F.rms_norm(rotated[:, :, H:], [D], k_norm, eps)
        rotated = torch.cat((query, key), 2)
    rotated = torch.addcmul(rotated * cos, rotated.roll([D // 2], [-1]), sin)
    slots_T = slots_BT[0]
    k_BGSD.index_copy_(2, slots_T, rotated[:, :, H:].transpose(1, 2))
    v_BGSD.index_copy_(2, slots_T, qkv[:, :, H + G :].transpose(1, 2))
    query_BGQD = rotated[:, :, :H].reshape(B, T, G, R, D).transpose(1, 2).reshape(B, G, T * R, D)
    trunk_k, trunk_v = k_BGSD.narrow(2, 0, extent), v_BGSD.narrow(2, 0, extent)
    if steps == 0:
        mixed_BGQD = F.scaled_dot_product_attention(query_BGQD, trunk_k, trunk_v, bias, scale=scale)
    else:
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


@unlocked
def row_bias(limit_BT: torch.Tensor, extent: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """attend_row's bias, (T * group, extent), which serves all layers of a pass."""
    dead_TS = torch.arange(extent) >= limit_BT[0, :, None]
    return torch.zeros(dead_TS.shape, dtype=dtype).masked_fill_(dead_TS, float("-inf")).repeat_interleave(group, 0)


@unlocked
def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """(..., 2 F) -> (..., F): the gate's SiLU times the other half."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
