"""Backward pass for Hopper GPUs: kernels for dQ and dB, together or apart, and one for dK and dV.

With P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O) - dlse, in every row:

    dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO,

and dB is the sum of dS over the rows. Seven products where one kernel computes dQ and dB, which
narrow heads allow, nine otherwise.
"""

import torch

from attn_core.tiling import padded_head_dim
from attn_triangle._hopper import configs, problem
from attn_triangle._hopper.dbias import dbias as dbias_by_owner
from attn_triangle._hopper.dk_dv import dk_dv
from attn_triangle._hopper.dq import dq as fill_dq
from attn_triangle._hopper.dq_dbias import dq_dbias, new_sums
from attn_triangle._hopper.rows import add_unseeing, deltas
from attn_triangle._triton import backward as portable
from attn_triangle._triton import short
from attn_triangle._triton.dbias import sum_of_splits
from attn_triangle.layout import new_heads_last, new_unwanted


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    masked_rows: str,
    wanted: str,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients dq, dk, dv, dbias and dmask, given those of out (dout) and, maybe, lse (dlse).

    What is not `wanted` is an empty tensor.
    """
    M, N = q.shape[3], k.shape[3]
    if q.numel() * N == 0:
        return portable.attention_backward(
            dout, dlse, q, k, v, bias, mask, out, lse, scale, masked_rows, wanted, deterministic
        )
    if short.takes(q, k, mask, wanted):
        return short.short_backward(dout, dlse, q, k, v, bias, mask, out, lse, scale, masked_rows)
    dout = problem.readable(dout)
    readable = problem.readable_bias(bias, M, N)
    keys = problem.key_rows(mask, N, configs.LONGEST_BLOCK, unread=lse)
    dq = new_heads_last(q) if "dq" in wanted else new_unwanted(q)
    dk, dv = (new_heads_last(x) if "dk_dv" in wanted else new_unwanted(x) for x in (k, v))
    # Sums for dbias lie where dk will be: they are added up before the last kernel writes it.
    sums = new_sums(q, N, deterministic, lent=dk) if _in_one_kernel(q, wanted) else None
    delta = deltas(out, dout, dlse, zeroed=sums)
    if sums is not None:
        dq_dbias(dq, sums, dout, q, k, v, readable, keys, lse, delta, scale, deterministic)
        dbias = sum_of_splits(sums[..., :M, :N], bias)
    else:
        if "dq" in wanted:
            fill_dq(dq, dout, q, k, v, readable, keys, lse, delta, scale)
        dbias = new_unwanted(bias)
        if "dbias" in wanted:
            dbias = dbias_by_owner(dout, q, k, v, bias, readable, keys, lse, delta, scale, lent=dk)
    if "dk_dv" in wanted:
        dk_dv(dk, dv, dout, q, k, v, readable, keys, lse, delta, scale)
        if masked_rows == "mean":
            add_unseeing(dv, dout, lse)
    return dq, dk, dv, dbias, new_unwanted(q)


def _in_one_kernel(q: torch.Tensor, wanted: str) -> bool:
    """Whether dq and dbias come from one kernel."""
    is_narrow = padded_head_dim(q.shape[4]) in configs.BACKWARD_DQ_DBIAS
    return is_narrow and "dq" in wanted and "dbias" in wanted
