"""What the packages have in common that pass an additive mask: DeepSpeed, MegaFold, Protenix."""

from __future__ import annotations

import torch

from attn_core.checks import require_tensor
from attn_triangle import api


def evoformer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_bias: torch.Tensor | None,
    pair_bias: torch.Tensor | None,
    names: tuple[str, str],
    scale: float | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """Attention of q, k and v (*, N, L, H, D) with biases (*, N, 1, 1, L) and (*, 1, H, L, L).

    Both are added to the scores and have gradients; `names` is what the caller calls them. Returns
    (*, N, L, H, D), contiguous.
    """
    require_rank(q, k, v)
    q, k, v = (x.movedim(-2, -4) for x in (q, k, v))  # [*, H, N, L, D]
    mask, bias = None, q.new_zeros((1, 1, 1))
    if row_bias is not None:
        _require_bias(names[0], row_bias, "(*, N, 1, 1, L)", (-3, -2))
        mask = _like(row_bias, q)[..., 0, 0, :]
    if pair_bias is not None:
        _require_bias(names[1], pair_bias, "(*, 1, H, L, L)", (-4,))
        bias = _like(pair_bias, q).squeeze(-4)
    out: torch.Tensor = api.triangle_attention(
        q, k, v, bias, mask, scale=scale, deterministic=deterministic
    )
    return out.movedim(-4, -2)


def require_rank(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Check that queries, keys and values have rows, positions, heads and channels."""
    for name, tensor in (("Q", q), ("K", k), ("V", v)):
        require_tensor(name, tensor)
        if tensor.dim() < 4:
            raise ValueError(f"{name} must have shape (*, N, L, H, D), got {tuple(tensor.shape)}")


def _require_bias(name: str, bias: torch.Tensor, symbols: str, ones: tuple[int, ...]) -> None:
    """Check that a bias can be added to scores, and has size 1 in the dimensions `ones`."""
    require_tensor(name, bias)
    if not bias.is_floating_point():
        kind = str(bias.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be added to scores, of dtype float, got {kind}")
    if bias.dim() < 4 or any(bias.shape[dim] != 1 for dim in ones):
        raise ValueError(f"{name} must have shape {symbols}, got {tuple(bias.shape)}")


def _like(bias: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A bias in a dtype that goes with q."""
    return bias if bias.dtype in (q.dtype, torch.float32) else bias.to(q.dtype)
