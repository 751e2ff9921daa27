"""The meaning of the operator, in plain PyTorch.

    out_i = sum_j p_ij v_j,    p_ij = exp(scale q_i k_j - lse_i),
    lse_i = log sum_j exp(scale q_i k_j),    j in window(i)

A query whose window holds no key has out = 0 and lse = -inf. Vaswani et al., "Attention Is All You
Need", 2017; the windows are those of FlashAttention-2 (Dao, 2023).
"""

from __future__ import annotations

import torch


def visible(
    len_q: int, len_k: int, window: tuple[int, int], device: torch.device
) -> torch.Tensor | None:
    """Which key each query sees: (M, N) bool, aligned at the bottom right; None for all."""
    left, right = window
    if left < 0 and right < 0:
        return None
    i = torch.arange(len_q, device=device)[:, None] + (len_k - len_q)
    j = torch.arange(len_k, device=device)
    mask = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= j >= i - left
    if right >= 0:
        mask &= j <= i + right
    return mask


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (B, M, H, D) over k, v (B, N, H_KV, D): out like q and lse (B, H, M)."""
    group = q.shape[2] // max(k.shape[2], 1)
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    mask = visible(q.shape[1], k.shape[1], window, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    pivot = lse.masked_fill(lse == -torch.inf, 0.0)
    out = torch.einsum("bhij,bjhd->bihd", torch.exp(scores - pivot[..., None]), v)
    return out, lse
