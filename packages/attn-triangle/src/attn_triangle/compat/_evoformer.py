"""What the packages have in common that pass an additive mask: DeepSpeed, MegaFold, Protenix."""

from __future__ import annotations

import torch

from attn_triangle import api


def evoformer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_bias: torch.Tensor | None,
    pair_bias: torch.Tensor | None,
    scale: float | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """Attention of q, k and v (*, N, L, H, D) with biases (*, N, 1, 1, L) and (*, 1, H, L, L).

    Both are added to the scores and have gradients. Returns (*, N, L, H, D), contiguous.
    """
    require_rank(q)
    q, k, v = (x.movedim(-2, -4) for x in (q, k, v))  # [*, H, N, L, D]
    mask = None if row_bias is None else _like(row_bias, q)[..., 0, 0, :]
    bias = q.new_zeros((1, 1, 1)) if pair_bias is None else _like(pair_bias, q).squeeze(-4)
    out: torch.Tensor = api.triangle_attention(
        q, k, v, bias, mask, scale=scale, deterministic=deterministic
    )
    return out.movedim(-4, -2)


def require_rank(q: torch.Tensor) -> None:
    """Check that queries have rows, positions, heads and channels."""
    if q.dim() < 4:
        raise ValueError(f"Q must have shape (*, N, L, H, D), got {tuple(q.shape)}")


def _like(bias: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A bias in a dtype that goes with q."""
    return bias if bias.dtype in (q.dtype, torch.float32) else bias.to(q.dtype)
