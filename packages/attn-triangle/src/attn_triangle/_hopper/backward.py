"""Backward pass for Hopper GPUs: a kernel for dK and dV, one for dQ and one for dB.

With P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O) - dlse, in every row:

    dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO,

and dB is the sum of dS over the rows. Nine products: with atomic additions to dB there would be
seven, but those take longer.
"""

import torch

from attn_triangle._hopper import configs, problem
from attn_triangle._hopper.dbias import dbias as dbias_by_owner
from attn_triangle._hopper.dk_dv import dk_dv
from attn_triangle._hopper.dq import dq as fill_dq
from attn_triangle._hopper.rows import add_unseeing, query_rows
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
    dq = new_heads_last(q) if "dq" in wanted else new_unwanted(q)
    dk = new_heads_last(k) if "dk_dv" in wanted else new_unwanted(k)
    dv = new_heads_last(v) if "dk_dv" in wanted else new_unwanted(v)
    dbias = new_unwanted(bias)
    if q.numel() * N == 0:
        if "dbias" in wanted:
            dbias = bias.new_zeros(bias.shape)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias, new_unwanted(q)
    dout = problem.readable(dout)
    readable = problem.readable_bias(bias, M, N)
    keys = problem.key_rows(mask, N, configs.LONGEST_BLOCK, is_mean=False, unread=lse)
    rows = query_rows(out, dout, lse, dlse)
    if "dk_dv" in wanted:
        dk_dv(dk, dv, dout, q, k, v, readable, keys, rows, scale)
        if masked_rows == "mean":
            add_unseeing(dv, dout, lse)
    if "dq" in wanted:
        fill_dq(dq, dout, q, k, v, readable, keys, rows, scale)
    if "dbias" in wanted:
        dbias = dbias_by_owner(dout, q, k, v, bias, readable, keys, rows, scale)
    return dq, dk, dv, dbias, new_unwanted(q)
