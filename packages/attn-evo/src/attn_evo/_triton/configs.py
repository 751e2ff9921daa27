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
        (128, 2, TileConfig(32, 2048, 8, 3)),
        (16, 4, TileConfig(32, 2048, 4, 1)),
        (32, 4, TileConfig(32, 2048, 4, 1)),
        (64, 4, TileConfig(16, 2048, 4, 2)),
    ),
    default=TileConfig(64, 2048, 4, 2),
    sources=("attn_evo._triton.forward", "attn_evo._triton.tiles"),
)
BACKWARD = Table(
    "attn_evo.backward",
    rows=_rows(
        (128, 2, TileConfig(32, 2048, 8, 1)),
        (16, 4, TileConfig(16, 2048, 4, 1)),
        (32, 4, TileConfig(16, 2048, 4, 1)),
        (64, 4, TileConfig(16, 2048, 4, 2)),
    ),
    default=TileConfig(64, 2048, 4, 3),
    sources=("attn_evo._triton.backward", "attn_evo._triton.tiles"),
)
# Of kernels whose block_m is not their pass's, or that have no tiles, only the rest counts.
SUMS = TileConfig(1, 1, 4, 1)
# Of launches of the backward pass whose tiles are smaller or whose pipeline is longer than its own.
BACKWARD_GATE_BLOCK_M = 32
BACKWARD_STAGES = {"products": 3, "context": 3}
PREFIX_SUM = TileConfig(32, 64, 4, 2)
PREFIX_SUM_RUNS = TileConfig(32, 64, 4, 4)


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


def backward_kernel(name: str, config: TileConfig) -> TileConfig:
    """Tiles of one launch of the backward pass, whose tiles are `config`."""
    block_m = min(config.block_m, BACKWARD_GATE_BLOCK_M) if name == "gate" else config.block_m
    num_stages = BACKWARD_STAGES.get(name, config.num_stages)
    return config._replace(block_m=block_m, num_stages=num_stages)


def prefix_sum_tiles(num_columns: int | None) -> TileConfig:
    """Choose the tiles of prefix sums: block_m elements, or runs, of block_n sequences.

    `num_columns` is the number of sequences that are neighbours in memory, None where there are
    none.
    """
    if num_columns is None:
        return PREFIX_SUM
    block_c = min(PREFIX_SUM_RUNS.block_n, 1 << (num_columns - 1).bit_length())
    block_n = PREFIX_SUM_RUNS.block_m * PREFIX_SUM_RUNS.block_n // block_c
    return PREFIX_SUM_RUNS._replace(block_m=block_n, block_n=block_c)


def _pick(table: Table, v: torch.Tensor, causal: bool) -> TileConfig:
    key = (padded_head_dim(v.shape[-1]), v.element_size(), "causal" if causal else "full")
    return pick(table, v.device, key)
