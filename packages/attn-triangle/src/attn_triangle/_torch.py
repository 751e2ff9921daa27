"""Backend "torch": right on every device torch has.

The plain formula runs over blocks of rows. Rows are independent, so a block needs no more than its
own queries, keys and values, and the scores that live at once stay within a budget: memory grows
with n^2. F.scaled_dot_product_attention does not fit: it differentiates no broadcast bias without
holding the n^3 sum of bias and mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_triangle.layout import accumulator_dtype, new_heads_last, new_lse

# Of one block of scores, though a single row may take more: what a CPU's cache holds, or what keeps
# a GPU busy.
_BLOCK_BYTES_CPU = 1 << 22
_BLOCK_BYTES_GPU = 1 << 27


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    masked_rows: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out like q (B, H, R, M, D) and lse (B, H, R, M), as `reference.attention` defines them."""
    out, lse = new_heads_last(q), new_lse(q)
    if k.shape[3] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    for rows in _row_blocks(q, k):
        scores = _scores(q, k, bias, mask, rows, scale)
        pivot = _finite(scores.amax(dim=-1, keepdim=True))
        weights = scores.sub_(pivot).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        values = _block(v, rows)
        seen = torch.matmul(weights, values) / total  # 0 / 0 where a query sees no key
        unseen = values.mean(dim=-2, keepdim=True) if masked_rows == "mean" else 0.0
        out[:, :, rows] = torch.where(total == 0, unseen, seen)
        lse[:, :, rows] = (pivot + total.log()).squeeze(-1)
    return out, lse


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients dq, dk, dv, dbias, given those of out (dout) and, maybe, of lse (dlse)."""
    dq, dk, dv = new_heads_last(q), new_heads_last(k), new_heads_last(v)
    dbias = bias.new_zeros(bias.shape, dtype=lse.dtype)
    for rows in _row_blocks(q, k):
        sees_none = lse[:, :, rows, :, None] == -torch.inf
        # Equal scores for the keys of such a query: their softmax is the mean.
        scores = _scores(q, k, bias, mask, rows, scale).masked_fill_(sees_none, 0.0)
        probs = torch.softmax(scores, dim=-1)
        douts = _block(dout, rows)
        seen_douts = douts.masked_fill(sees_none, 0.0)
        dprobs = torch.matmul(seen_douts, _block(v, rows).mT)
        dscores = torch.ops.aten._softmax_backward_data(dprobs, probs, -1, probs.dtype)
        if dlse is not None:
            dscores += probs * dlse[:, :, rows, :, None].masked_fill(sees_none, 0.0)
        dv[:, :, rows] = torch.matmul(probs.mT, douts if masked_rows == "mean" else seen_douts)
        dq[:, :, rows] = torch.matmul(dscores, _block(k, rows)) * scale
        dk[:, :, rows] = torch.matmul(dscores.mT, _block(q, rows)) * scale
        dbias += dscores.sum(dim=2).sum_to_size(bias.shape)
    return dq, dk, dv, dbias.to(bias.dtype)


def _row_blocks(q: torch.Tensor, k: torch.Tensor) -> Iterator[slice]:
    batch, heads, rows, len_q, _ = q.shape
    row_bytes = accumulator_dtype(q.dtype).itemsize * batch * heads * len_q * k.shape[3]
    block_bytes = _BLOCK_BYTES_CPU if q.device.type == "cpu" else _BLOCK_BYTES_GPU
    step = max(1, block_bytes // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _block(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some rows of x (B, H, R, S, D), in the accumulator's dtype."""
    return x[:, :, rows].to(accumulator_dtype(x.dtype))


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    rows: slice,
    scale: float,
) -> torch.Tensor:
    """Scores of a block of rows, -inf where masked: (B, H, rows, M, N)."""
    scores = torch.matmul(_block(q, rows) * scale, _block(k, rows).mT)
    scores += bias[:, :, None]
    if mask is not None:
        scores.masked_fill_(mask[:, None, rows, None, :], -torch.inf)
    return scores


def _finite(pivot: torch.Tensor) -> torch.Tensor:
    """A pivot that is a number also where a query sees no key."""
    return pivot.masked_fill(pivot == -torch.inf, 0.0)
