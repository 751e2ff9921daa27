"""Heads wider than the kernels' registers: PyTorch's matrix products around Triton's scans."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_evo import _torch
from attn_evo._triton.prefix_sum import prefix_sum
from attn_evo.weights import EvoWeights


def _scan(x: torch.Tensor, reverse: bool) -> torch.Tensor:
    return prefix_sum(x, 2, False, reverse)


def attention(
    v: torch.Tensor,
    weights: EvoWeights,
    mask: torch.Tensor | None,
    sums: torch.Tensor | None,
    length: torch.Tensor | None,
    causal: bool,
    accum_dtype: torch.dtype,
    tiles: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `forward.attention`."""
    call = (v, weights, mask, sums, length, causal, accum_dtype, tiles)
    return _torch.attention(*call, scan=_scan)


def attention_backward(
    dout: torch.Tensor,
    dsums_after: torch.Tensor | None,
    v: torch.Tensor,
    weights: EvoWeights,
    mask: torch.Tensor | None,
    sums: torch.Tensor | None,
    length: torch.Tensor | None,
    causal: bool,
    accum_dtype: torch.dtype,
    tiles: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, EvoWeights]:
    """As `backward.attention_backward`."""
    call = (v, weights, mask, sums, length, causal, accum_dtype, tiles)
    return _torch.attention_backward(dout, dsums_after, *call, scan=_scan)
