"""Backend "torch" of rotary embedding: right on every device torch has."""

from __future__ import annotations

import torch

from attn_flash.rotary_reference import rotate as rotate_by


def rotate(
    out: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Write to `out`, which may be x (B, S, H, D) or (T, H, D), the rotated x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    positions = _positions(x, offsets, offset, cu_seqlens).clamp(max=cos.shape[0] - 1)
    cos, sin = (table[positions].to(dtype).unsqueeze(-2) for table in (cos, sin))
    rotated = rotate_by(x.to(dtype), cos, -sin if conjugate else sin, interleaved)
    out.copy_(rotated)


def _positions(
    x: torch.Tensor, offsets: torch.Tensor | None, offset: int, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """Position of each token, (B, S) or (T,)."""
    starts = offset if offsets is None else offsets.long()
    if cu_seqlens is None:
        steps = torch.arange(x.shape[1], device=x.device)
        return steps + (starts[:, None] if isinstance(starts, torch.Tensor) else starts)
    tokens = torch.arange(x.shape[0], device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    sequence = sequence.clamp(max=max(cu_seqlens.shape[0] - 2, 0))
    steps = tokens - cu_seqlens[sequence]
    return steps + (starts[sequence] if isinstance(starts, torch.Tensor) else starts)
