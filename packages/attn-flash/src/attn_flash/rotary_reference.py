"""What rotary embedding means, in plain PyTorch.

Pairs of dimensions turn by an angle that grows with the position t of the token:

    x'_a = x_a cos(t w) - x_b sin(t w),    x'_b = x_b cos(t w) + x_a sin(t w),

with (a, b) = (2 i, 2 i + 1) where `interleaved`, else (i, i + D_rotary / 2); dimensions from
D_rotary on stay. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

import torch


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate x (..., D) by cos and sin (..., D_rotary / 2), which broadcast against it."""
    rotary_dim = 2 * cos.shape[-1]
    turned, kept = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, kept), -1)
