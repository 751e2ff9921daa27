"""Tiles of the kernels, and how a problem finds its row.

A row's key is (BLOCK_D, bytes of an element).
"""

from __future__ import annotations

import torch

from attn_core.tuning import Table, TileConfig, pick
from attn_triangle._triton.problem import padded_head_dim


def _float32(config: TileConfig) -> dict[tuple[int | str, ...], TileConfig]:
    """Rows of 4-byte elements, whose tiles fill registers and shared memory twice as fast."""
    return {("*", block_d, 4): config for block_d in (16, 32, 64, 128)}


_CANDIDATES = [
    TileConfig(block_m, block_n, warps, stages)
    for block_m, block_n, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8))
    for stages in (2, 3)
]
FORWARD = Table(
    "attn_triangle.forward",
    rows={
        **_float32(TileConfig(32, 32, 4, 2)),
        ("gfx", 128, 2): TileConfig(64, 32, 4, 1),
    },
    default=TileConfig(64, 64, 4, 2),
    candidates=_CANDIDATES,
    sources=("attn_triangle._triton.forward", "attn_triangle._triton.tiles"),
)
BACKWARD_DQ = Table(
    "attn_triangle.backward_dq",
    rows={
        **_float32(TileConfig(32, 32, 4, 2)),
        ("gfx", 128, 2): TileConfig(64, 32, 4, 1),
    },
    default=TileConfig(64, 64, 4, 2),
    candidates=_CANDIDATES,
    sources=("attn_triangle._triton.backward", "attn_triangle._triton.tiles"),
)
BACKWARD_DK_DV = Table(
    "attn_triangle.backward_dk_dv",
    rows={
        **_float32(TileConfig(32, 32, 4, 2)),
        ("gfx", 128, 2): TileConfig(32, 64, 4, 1),
        ("sm", 128, 2): TileConfig(32, 64, 4, 2),
    },
    default=TileConfig(64, 64, 4, 2),
    candidates=_CANDIDATES,
    sources=("attn_triangle._triton.backward", "attn_triangle._triton.tiles"),
)
BACKWARD_DBIAS = Table(
    "attn_triangle.backward_dbias",
    rows={
        **_float32(TileConfig(32, 32, 4, 2)),
        ("gfx", 128, 2): TileConfig(64, 32, 4, 1),
    },
    default=TileConfig(64, 64, 4, 2),
    candidates=_CANDIDATES,
    sources=("attn_triangle._triton.backward", "attn_triangle._triton.tiles"),
)


def tiles(table: Table, q: torch.Tensor, k: torch.Tensor) -> TileConfig:
    """Choose the tiles of one launch."""
    return pick(table, q.device, (padded_head_dim(q.shape[4]), q.element_size()))
