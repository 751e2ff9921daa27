"""`backward_sums` in plain PyTorch: the emulator's stand-in, and what Triton's is compared with."""

from __future__ import annotations

import math
from itertools import pairwise

import torch


def padded(M, starts):
    """How many rows M queries are padded to, and where queries are: (first row, first, last)."""
    if starts is None:
        return -(-M // 128) * 128, [(0, 0, M)]
    starts = starts.tolist()
    places = [
        ((first // 128 + i) * 128, first, last) for i, (first, last) in enumerate(pairwise(starts))
    ]
    return (M // 128 + len(places)) * 128, places


def prepare_rows(dout, dlse, out, lse, _block_d=None, starts=None):
    B, M, H, _ = out.shape
    padded_m, places = padded(M, starts)
    lse_log2 = torch.full((B, H, padded_m), math.inf)
    delta = torch.zeros(B, H, padded_m)
    all_lse = (lse * math.log2(math.e)).masked_fill(lse == -math.inf, math.inf)
    all_delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    if dlse is not None:
        all_delta = all_delta - dlse
    for row, first, last in places:
        lse_log2[:, :, row : row + last - first] = all_lse[:, :, first:last]
        delta[:, :, row : row + last - first] = all_delta[:, :, first:last]
    return torch.stack([lse_log2, delta]).view(2, B * H, padded_m)


def prepare(dout, dlse, out, lse, block_m, block_d, clears, starts=None):
    rows = prepare_rows(dout, dlse, out, lse, block_d, starts)
    blocks = rows[0].numel() // block_m
    start = 0.0 if clears else math.nan
    dq_sum = torch.full((blocks * block_m * block_d // 256, 256), start)
    return rows, dq_sum, torch.zeros(1 + blocks, dtype=torch.int32)


def finish(dq_sum, counters, dq, scale, block_d, starts=None):
    B, M, H, D = dq.shape
    if counters is not None:
        turns = counters[1:]
        dq_sum.view(turns.numel(), -1)[turns == 0] = 0.0
    # 64 rows are 4 warps, 2 halves and 8 lanes; 64 columns are 8 pairs of 4 lanes, and 2 of those.
    units = dq_sum.view(B, H, -1, block_d // 64, 8, 4, 8, 4, 2, 2)
    tiles = units.permute(0, 1, 2, 5, 8, 6, 3, 4, 7, 9).reshape(B, H, -1, block_d)
    for row, first, last in padded(M, starts)[1]:
        dq[:, first:last] = (tiles[:, :, row : row + last - first, :D] * scale).transpose(1, 2)


def new_gradient(x, starts):
    grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    if starts is not None:
        grad[:, starts[-1] :] = 0.0
    return grad
