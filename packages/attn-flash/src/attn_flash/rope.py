"""Attention with rotary embedding: the fused rotation, then attention, and both gradients."""

from __future__ import annotations

import torch

from attn_core import backends
from attn_flash.heads_first import flash_attention
from attn_flash.layers.rotary import rotate_heads_first


def flash_attention_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    causal: bool = True,
    scale: float | None = None,
    window_size: int = -1,
    *,
    interleaved: bool = False,
    backend: str = backends.AUTO,
) -> torch.Tensor:
    """Rotate queries and keys to their positions and attend, heads first.

    Parameters
    ----------
    q : Tensor, shape (B, H, M, D)
        Queries. The last query is as far along as the last key: query i is at position
        ``i + N - M``, so M may be at most N.
    k, v : Tensor, shape (B, H_KV, N, D)
        Keys, the first at position 0, and values.
    cos, sin : Tensor, shape (S_rotary, D_rotary / 2)
        Row p rotates position p; dimensions of length 1 may come before. S_rotary is N or more.
    causal, scale, window_size
        As in `flash_attention`.
    interleaved : bool, default False
        As in `attn_flash.layers.rotary.apply_rotary_emb`.
    backend : str, default "auto"
        As in `flash_attn_func`; rotation and attention both run on it.

    Returns
    -------
    Tensor, shape (B, H, M, D)
        Of q's dtype. Gradients go back to q, k and v.

    Raises
    ------
    ValueError
        A shape, dtype, device or number does not fit; the message names it.

    References
    ----------
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import flash_attention_rope
    >>> angles = torch.outer(torch.arange(100.0), 10000 ** (-torch.arange(16) / 16))
    >>> q, k, v = torch.randn(3, 1, 4, 100, 32).unbind(0)
    >>> flash_attention_rope(q, k, v, angles.cos(), angles.sin()).shape
    torch.Size([1, 4, 100, 32])
    """
    q, k = rotate_heads_first(q, k, cos, sin, interleaved=interleaved, backend=backend)
    out: torch.Tensor = flash_attention(
        q, k, v, causal=causal, scale=scale, window_size=window_size, backend=backend
    )
    return out
