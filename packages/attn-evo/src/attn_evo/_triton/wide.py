"""Heads wider than the kernels' registers: PyTorch's matrix products around Triton's scans."""

from __future__ import annotations

import functools

import torch

from attn_evo import _torch
from attn_evo._triton.prefix_sum import prefix_sum


def _scan(x: torch.Tensor, reverse: bool) -> torch.Tensor:
    return prefix_sum(x, 2, False, reverse)


attention = functools.partial(_torch.attention, scan=_scan)
attention_backward = functools.partial(_torch.attention_backward, scan=_scan)
