"""The meaning of the operator, in plain PyTorch.

    out_ij = sum_k p_ijk v_ik,    p_ijk = exp(scale q_ij k_ik + bias_jk - lse_ij),
    lse_ij = log sum_k exp(scale q_ij k_ik + bias_jk),    k not masked in row i

for every head; a mask that is not of bool is added to the scores of its row. This is line 5 and 6
of Algorithms 13 and 14 in the supplement of Jumper et al., "Highly accurate protein structure
prediction with AlphaFold", 2021. A query that sees no key has lse = -inf and out = mean of the
row's values, or 0 with masked_rows "zero"; its gradient reaches nothing but the values.
"""

from __future__ import annotations

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    masked_rows: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triangle attention in the dtype of the arguments; differentiable any number of times.

    q is (B, H, R, M, D), k and v are (B, H, R, N, D), bias broadcasts to (B, H, M, N) and mask,
    True = masked out or added to the scores, to (B, R, N). Returns out like q and lse (B, H, R, M).
    """
    scores = torch.einsum("bhijd,bhikd->bhijk", q, k) * scale + bias[:, :, None]
    if mask is not None:
        hidden = mask[:, None, :, None, :]
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(hidden, -torch.inf) if is_bool else scores + hidden
    sees_none = (scores == -torch.inf).all(dim=-1, keepdim=True)
    # Equal scores for the keys of such a query: their softmax is the mean, without a gradient.
    scores = scores.masked_fill(sees_none, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(sees_none[..., 0], -torch.inf)
    probs = torch.softmax(scores, dim=-1)
    if masked_rows == "zero":
        probs = probs.masked_fill(sees_none, 0.0)
    return torch.einsum("bhijk,bhikd->bhijd", probs.to(v.dtype), v), lse
