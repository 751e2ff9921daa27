"""Gradients of problems with one key, whose probability is 1 whatever its score.

Kernels subtract two sums that are equal but for their rounding; here the gradients of queries and
keys are exactly 0, or what the gradient of lse leaves of them.
"""

from __future__ import annotations

import torch

from attn_flash.options import Options


def is_one_key(k: torch.Tensor, options: Options) -> bool:
    """Whether the only key of each sequence has no sink, mask, bias or dropout beside it."""
    return k.shape[1] == 1 and options.features() <= {"softcap"}


def gradients(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q (B, M, H, D), k and v (B, 1, H_KV, D), given those of out and, maybe, lse."""
    sees = (lse != -torch.inf).transpose(1, 2)[..., None]  # [B, M, H, 1]
    dv = _sum_to_key(torch.where(sees, dout, 0.0), v)
    if dlse is None:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), dv
    if softcap:  # lse is the capped score
        dlse = dlse * (1.0 - (lse / softcap).square())
    dscores = torch.where(sees, dlse.transpose(1, 2)[..., None] * scale, 0.0)
    key = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return (dscores * key).to(q.dtype), _sum_to_key(dscores * q, k), dv


def _sum_to_key(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum (B, M, H, D) over the queries and heads of a key: (B, 1, H_KV, D)."""
    grouped: torch.Tensor = x.unflatten(2, (like.shape[2], -1))
    return grouped.sum((1, 3), dtype=torch.float32)[:, None].to(like.dtype)
