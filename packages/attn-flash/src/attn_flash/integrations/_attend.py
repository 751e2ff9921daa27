"""The one call that every hook makes."""

from __future__ import annotations

import torch

from attn_core import backends
from attn_flash.api import flash_attn_func


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    backend: str = backends.AUTO,
) -> torch.Tensor:
    """Attend with q (B, M, H, D) to k, v (B, N, H_KV, D).

    `mask` and `bias` have four dimensions that broadcast to (B, H, M, N). The mask is boolean, True
    where a key is seen, or added to the scores like the bias.
    """
    key_mask = None
    if mask is not None and _is_of_keys(mask):
        key_mask, mask = mask[:, 0, 0].expand(q.shape[0], k.shape[1]), None
    if mask is not None:
        bias = mask if bias is None else bias + _added(mask, bias.dtype)
    out: torch.Tensor = flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        scale,
        window_size=window,
        softcap=softcap,
        attn_bias=bias,
        key_mask=key_mask,
        sinks=sinks,
        backend=backend,
    )
    return out


def _is_of_keys(mask: torch.Tensor) -> bool:
    """Whether the mask says the same to every head and query, and nobody asks for its gradient."""
    return mask.shape[1:3] == (1, 1) and not (mask.requires_grad and torch.is_grad_enabled())


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a mask adds to the scores: -inf where a boolean one is False."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
