"""Backend "torch" of rotary embedding: right on every device torch has."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attn_core.dtypes import accumulator_dtype
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
    dtype = accumulator_dtype(x.dtype)
    positions = _positions(x, offsets, offset, cu_seqlens, nowhere=cos.shape[0])
    # One more row turns by nothing: for tokens that belong to no sequence.
    cos = torch.cat([cos, torch.ones_like(cos[:1])])[positions].to(dtype).unsqueeze(-2)
    sin = torch.cat([sin, torch.zeros_like(sin[:1])])[positions].to(dtype).unsqueeze(-2)
    out.copy_(rotate_by(x.to(dtype), cos, -sin if conjugate else sin, interleaved))


def _positions(
    x: torch.Tensor,
    offsets: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
    nowhere: int,
) -> torch.Tensor:
    """Position of each token, (B, S) or (T,); `nowhere` for tokens past the last sequence."""
    if cu_seqlens is None:
        starts = offset if offsets is None else offsets.long()[:, None]
        return (starts + torch.arange(x.shape[1], device=x.device)).clamp(max=nowhere)
    tokens = torch.arange(x.shape[0], device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    starts = torch.full_like(cu_seqlens[:-1], offset) if offsets is None else offsets
    first = F.pad(starts.long() - cu_seqlens[:-1], (0, 1), value=nowhere)
    return (tokens + first[sequence]).clamp(max=nowhere)
