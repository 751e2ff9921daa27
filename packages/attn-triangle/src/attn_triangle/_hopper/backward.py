"""Backward pass for Hopper GPUs: a kernel for dK and dV, and one each for dQ and dB or for both.

With P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O) - dlse, in every row:

    dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO,

and dB is the sum of dS over the rows. Seven products with atomic additions to dB, nine without.
"""

import torch

from attn_core import recording
from attn_core.tiling import padded_head_dim
from attn_triangle._hopper import configs, problem
from attn_triangle._hopper.dbias import dbias as dbias_by_owner
from attn_triangle._hopper.dk_dv import dk_dv
from attn_triangle._hopper.dq import dq as fill_dq
from attn_triangle._hopper.dq_dbias import dq_dbias, new_dbias
from attn_triangle._hopper.rows import add_unseeing, query_rows
from attn_triangle._triton.backward import sum_of_splits
from attn_triangle.layout import new_heads_last, new_unwanted

_LARGE = 2**24  # numbers in q beyond which memory counts and the host's time does not


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
    dq, dk, dv, dbias = (new_unwanted(x) for x in (q, k, v, bias))
    if q.numel() * N == 0:
        return _zeros(q, k, v, bias, wanted)
    tape = recording.current()
    if tape is not None and q.numel() > _LARGE:
        tape.refuse()  # what is repeated holds all memory to its end
    dout = problem.readable(dout)
    readable = problem.readable_bias(bias, M, N)
    keys = problem.key_rows(mask, N, configs.LONGEST_BLOCK, is_mean=False, unread=lse)
    # Results are allocated when their time comes, and what is done with let go: both take as much
    # memory as all else.
    wide = new_dbias(bias, M, N) if _by_atomics(q, wanted, deterministic) else None
    lse_log2, delta = query_rows(out, dout, lse, dlse, zeroed=wide)
    if "dk_dv" in wanted:
        dk, dv = new_heads_last(k), new_heads_last(v)
        dk_dv(dk, dv, dout, q, k, v, readable, keys, lse_log2, delta, scale)
        if masked_rows == "mean":
            add_unseeing(dv, dout, lse)
    del lse_log2
    if wide is not None:
        dq = new_heads_last(q)
        dq_dbias(dq, wide, dout, q, k, v, readable, keys, lse, delta, scale)
        del delta
        return dq, dk, dv, _like_bias(wide[..., :M, :N], bias), new_unwanted(q)
    if "dbias" in wanted:
        dbias = dbias_by_owner(dout, q, k, v, bias, readable, keys, lse, delta, scale)
    if "dq" in wanted:
        dq = new_heads_last(q)
        fill_dq(dq, dout, q, k, v, readable, keys, lse, delta, scale)
    return dq, dk, dv, dbias, new_unwanted(q)


def _by_atomics(q: torch.Tensor, wanted: str, deterministic: bool) -> bool:
    """Whether dq and dbias come from one kernel."""
    is_narrow = padded_head_dim(q.shape[4]) in configs.BACKWARD_DQ_DBIAS
    return is_narrow and not deterministic and "dq" in wanted and "dbias" in wanted


def _like_bias(dbias: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Sum a gradient to the sizes of a bias that was broadcast, in its dtype."""
    if dbias.shape == bias.shape and dbias.is_contiguous():
        return sum_of_splits(dbias[None], bias)
    return dbias.sum_to_size(bias.shape).to(bias.dtype)


def _zeros(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, wanted: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients where there is no query or no key."""
    dq = new_heads_last(q).zero_() if "dq" in wanted else new_unwanted(q)
    dk, dv = (new_heads_last(x).zero_() if "dk_dv" in wanted else new_unwanted(x) for x in (k, v))
    dbias = bias.new_zeros(bias.shape) if "dbias" in wanted else new_unwanted(bias)
    return dq, dk, dv, dbias, new_unwanted(q)
