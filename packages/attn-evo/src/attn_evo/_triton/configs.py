"""Tiles of the kernels: the largest that stay in registers, and how a problem finds its row.

A row's key is (BLOCK_D, bytes of an element, "causal" or "full"). block_m is the tokens of a tile
in all launches of a pass, block_n those of the largest chunk; warps and stages are those of the
pass's largest kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_core.tuning import Table, TileConfig, pick
from attn_evo._triton.problem import padded_head_dim


def _rows(*rows: tuple[int, int, TileConfig]) -> dict[tuple[int | str, ...], TileConfig]:
    """Rows of every device: (BLOCK_D, bytes of an element, config)."""
    return {
        ("*", block_d, size, shape): config
        for block_d, size, config in rows
        for shape in ("causal", "full")
    }


FORWARD = Table(
    "attn_evo.forward",
    rows=_rows(
        (128, 2, TileConfig(32, 1024, 8, 1)),
        (16, 4, TileConfig(32, 1024, 4, 1)),
        (32, 4, TileConfig(32, 1024, 4, 1)),
        (64, 4, TileConfig(16, 1024, 8, 1)),
    ),
    default=TileConfig(64, 1024, 4, 2),
    sources=("attn_evo._triton.forward", "attn_evo._triton.tiles"),
)
BACKWARD = Table(
    "attn_evo.backward",
    rows=_rows(
        (16, 2, TileConfig(32, 1024, 4, 1)),
        (32, 2, TileConfig(16, 1024, 4, 1)),
        (64, 2, TileConfig(32, 1024, 8, 1)),
        (128, 2, TileConfig(16, 1024, 8, 1)),
        (16, 4, TileConfig(16, 1024, 4, 1)),
        (32, 4, TileConfig(16, 1024, 4, 1)),
        (64, 4, TileConfig(16, 1024, 8, 1)),
    ),
    default=TileConfig(16, 1024, 8, 1),
    sources=("attn_evo._triton.backward", "attn_evo._triton.tiles"),
)
# Of kernels whose block_m is not their pass's, or that have no tiles, only the rest counts.
SUMS = TileConfig(1, 1, 4, 1)
BACKWARD_STAT = TileConfig(1, 1, 8, 1)
BACKWARD_CONTEXT = TileConfig(1, 1, 4, 3)
BACKWARD_WEIGHTS = TileConfig(64, 1, 8, 2)
PREFIX_SUM = TileConfig(32, 64, 4, 2)


def forward_tiles(v: torch.Tensor, causal: bool, hints: Sequence[int]) -> TileConfig:
    """Choose the tiles of the forward pass; `hints` are (block_m, num_warps, num_stages), or none.

    A hint of 0 leaves the choice here.
    """
    config = _pick(FORWARD, v, causal)
    if not hints:
        return config
    block_m, num_warps, num_stages = hints
    return TileConfig(
        block_m or config.block_m,
        config.block_n,
        num_warps or config.num_warps,
        num_stages or config.num_stages,
    )


def backward_tiles(v: torch.Tensor, causal: bool) -> TileConfig:
    """Choose the tiles of the backward pass."""
    return _pick(BACKWARD, v, causal)


def stat_tiles(config: TileConfig) -> TileConfig:
    """Warps and stages of the kernel that gates v, which is small enough for a longer pipeline."""
    return config._replace(num_stages=config.num_stages + 1)


def prefix_sum_tiles(x: torch.Tensor) -> TileConfig:
    """Choose the tiles of prefix sums: block_m elements of block_n sequences."""
    return PREFIX_SUM


def _pick(table: Table, v: torch.Tensor, causal: bool) -> TileConfig:
    key = (padded_head_dim(v.shape[-1]), v.element_size(), "causal" if causal else "full")
    return pick(table, v.device, key)
