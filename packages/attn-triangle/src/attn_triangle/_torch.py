"""Backend "torch": right on every device torch has.

The plain formula runs over blocks of rows. Rows are independent, so a block needs no more than its
own queries, keys and values, and the scores that live at once stay within a budget: memory grows
with n^2. F.scaled_dot_product_attention does not fit: it differentiates no broadcast bias without
holding the n^3 sum of bias and mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_core.dtypes import accumulator_dtype
from attn_triangle.layout import new_heads_last, new_lse, new_unwanted

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
    wanted: str,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients dq, dk, dv, dbias and dmask, given those of out (dout) and, maybe, lse (dlse)."""
    dq = new_heads_last(q) if "dq" in wanted else new_unwanted(q)
    dk = new_heads_last(k) if "dk_dv" in wanted else new_unwanted(k)
    dv = new_heads_last(v) if "dk_dv" in wanted else new_unwanted(v)
    dbias = bias.new_zeros(bias.shape, dtype=lse.dtype) if "dbias" in wanted else new_unwanted(bias)
    dmask = new_unwanted(q)
    if mask is not None and "dmask" in wanted:
        dmask = lse.new_zeros(mask.shape)
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
        if "dq" in wanted:
            dq[:, :, rows] = torch.matmul(dscores, _block(k, rows)) * scale
        if "dk_dv" in wanted:
            dk[:, :, rows] = torch.matmul(dscores.mT, _block(q, rows)) * scale
            dv[:, :, rows] = torch.matmul(probs.mT, douts if masked_rows == "mean" else seen_douts)
        if "dbias" in wanted:
            dbias += dscores.sum(dim=2).sum_to_size(bias.shape)
        if mask is not None and "dmask" in wanted:
            own = _mask_rows(dmask, rows)
            own += dscores.sum(dim=(1, 3)).sum_to_size(own.shape)
    if mask is not None and "dmask" in wanted:
        dmask = dmask.to(mask.dtype)
    return dq, dk, dv, dbias.to(bias.dtype), dmask


def gate(out: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Compute out * sigmoid(logits)."""
    return out * torch.sigmoid(logits)


def gate_backward(
    dgated: torch.Tensor, out: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of out and logits."""
    opening = torch.sigmoid(logits)
    return dgated * opening, dgated * out * opening * (1.0 - opening)


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
    if mask is None:
        return scores
    hidden = _mask_rows(mask, rows)[:, None, :, None, :]
    return scores.masked_fill_(hidden, -torch.inf) if mask.dtype == torch.bool else scores + hidden


def _mask_rows(mask: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some rows of a mask (B, R, N), which may have 1 in place of R."""
    return mask if mask.shape[1] == 1 else mask[:, rows]


def _finite(pivot: torch.Tensor) -> torch.Tensor:
    """A pivot that is a number also where a query sees no key."""
    return pivot.masked_fill(pivot == -torch.inf, 0.0)


def largest_score(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Compute the largest score of each query, (B, H, R, M), -inf where it sees no key."""
    largest = new_lse(q)
    for rows in _row_blocks(q, k):
        largest[:, :, rows] = _scores(q, k, bias, mask, rows, scale).amax(dim=-1)
    return largest
