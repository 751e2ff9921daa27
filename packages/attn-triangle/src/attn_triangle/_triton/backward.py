"""Backward pass in three kernels and without atomics, so that its bits never change.

With P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O) - dlse, in every row:

    dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO,

and dB is the sum of dS over the rows. The first kernel owns BLOCK_M queries of one or two rows,
computes their delta and dQ; the second owns BLOCK_N keys of a row and computes dK and dV; the third
owns a tile of the bias and goes through the rows. Nine products instead of the five that atomics
would allow.
"""

import torch

from attn_triangle._triton import short
from attn_triangle._triton.dbias import dbias as dbias_of
from attn_triangle._triton.dk_dv import dk_dv as fill_dk_dv
from attn_triangle._triton.dq import dq as fill_dq
from attn_triangle._triton.keys import visible_keys
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

    What is not `wanted` is an empty tensor. All are deterministic, asked or not.
    """
    is_empty = q.numel() * k.shape[3] == 0
    if not is_empty and short.takes(q, k, mask, wanted):
        return short.short_backward(dout, dlse, q, k, v, bias, mask, out, lse, scale, masked_rows)
    needs_dmask = mask is not None and "dmask" in wanted
    needs_dk_dv = "dk_dv" in wanted or needs_dmask
    dq = new_heads_last(q) if "dq" in wanted else new_unwanted(q)
    dk, dv = (new_heads_last(x) if needs_dk_dv else new_unwanted(x) for x in (k, v))
    if is_empty:
        dbias = bias.new_zeros(bias.shape) if "dbias" in wanted else new_unwanted(bias)
        dmask = mask.new_zeros(mask.shape) if needs_dmask else new_unwanted(q)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias, dmask
    keys = visible_keys(mask, k.shape[3], unread=lse)
    rows = lse.new_empty((*lse.shape, 2))
    fill_dq(dq if "dq" in wanted else None, rows, dout, dlse, q, k, v, bias, keys, out, lse, scale)
    if needs_dk_dv:
        dshut = fill_dk_dv(
            dk, dv, dout, q, k, v, bias, keys, lse, rows, scale, masked_rows == "mean"
        )
    dmask = dshut.sum(1).sum_to_size(mask.shape).to(mask.dtype) if needs_dmask else new_unwanted(q)
    if "dbias" not in wanted:
        return dq, dk, dv, new_unwanted(bias), dmask
    return dq, dk, dv, dbias_of(dout, q, k, v, bias, keys, rows, scale), dmask
