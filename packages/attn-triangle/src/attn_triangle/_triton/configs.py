"""Tiles of the kernels, and how a problem finds its row.

A row's key is (BLOCK_D, bytes of an element, bucket of the longer of queries and keys).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from attn_core.tiling import padded_head_dim
from attn_core.tuning import Key, Table, TileConfig, pick, time_launch

BUCKETS = (64, 128, 256, 512, 1024)
_SHORTEST, _LONGEST = BUCKETS[0], BUCKETS[-1]
Launch = Callable[[TileConfig], object]
Rows = dict[Key, TileConfig]


def bucket(length: int) -> int:
    """The length up to which tiles are tuned together: a power of two, the last one open."""
    return min(max(_SHORTEST, 1 << (length - 1).bit_length()), _LONGEST)


def _any_length(scope: str, block_d: int, itemsize: int, config: TileConfig) -> Rows:
    return {(scope, block_d, itemsize, length): config for length in BUCKETS}


def _float32(config: TileConfig) -> Rows:
    """Rows of 4-byte elements, whose tiles fill registers and shared memory twice as fast."""
    return {
        key: row
        for block_d in (16, 32, 64, 128)
        for key, row in _any_length("*", block_d, 4, config).items()
    }


_CANDIDATES = [
    TileConfig(block_m, block_n, warps, stages)
    for block_m, block_n, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8))
    for stages in (2, 3)
]
FORWARD = Table(
    "attn_triangle.forward",
    rows={
        **_float32(TileConfig(32, 32, 4, 2)),
        **_any_length("gfx", 128, 2, TileConfig(64, 32, 4, 1)),
    },
    default=TileConfig(64, 64, 4, 2),
    candidates=_CANDIDATES,
    sources=("attn_triangle._triton.forward", "attn_triangle._triton.tiles"),
)
BACKWARD_DQ = Table(
    "attn_triangle.backward_dq",
    rows={
        **_float32(TileConfig(32, 32, 4, 2)),
        **_any_length("gfx", 128, 2, TileConfig(64, 32, 4, 1)),
    },
    default=TileConfig(64, 64, 4, 2),
    candidates=_CANDIDATES,
    sources=("attn_triangle._triton.dq", "attn_triangle._triton.tiles"),
)
BACKWARD_DK_DV = Table(
    "attn_triangle.backward_dk_dv",
    rows={
        **_float32(TileConfig(32, 32, 4, 2)),
        **_any_length("gfx", 128, 2, TileConfig(32, 64, 4, 1)),
        **_any_length("sm", 128, 2, TileConfig(32, 64, 4, 2)),
    },
    default=TileConfig(64, 64, 4, 2),
    candidates=_CANDIDATES,
    sources=("attn_triangle._triton.dk_dv", "attn_triangle._triton.tiles"),
)
BACKWARD_DBIAS = Table(
    "attn_triangle.backward_dbias",
    rows={
        **_float32(TileConfig(32, 32, 4, 2)),
        **_any_length("gfx", 128, 2, TileConfig(64, 32, 4, 1)),
    },
    default=TileConfig(64, 64, 4, 2),
    candidates=_CANDIDATES,
    sources=("attn_triangle._triton.dbias", "attn_triangle._triton.tiles"),
)
TABLES = (FORWARD, BACKWARD_DQ, BACKWARD_DK_DV, BACKWARD_DBIAS)


def key_of(q: torch.Tensor, k: torch.Tensor) -> Key:
    """The key of a problem in every table."""
    return padded_head_dim(q.shape[4]), q.element_size(), bucket(max(q.shape[3], k.shape[3]))


def tiles(table: Table, q: torch.Tensor, k: torch.Tensor, launch: Launch) -> TileConfig:
    """Choose the tiles of one launch, which `launch` can make for a trial."""
    return pick(table, q.device, key_of(q, k), functools.partial(time_launch, launch))
