"""Tiles of the kernel for KV caches, and into how many parts the keys of a tile are cut.

A row's key is (width, bytes of an element, rows): the width is the larger of the padded head
dimensions; a sequence has "few" rows up to 16 (queries times heads that share a key head, so
decoding), "some" up to 64, else "many".
"""

from __future__ import annotations

import torch

from attn_core.device import device_info
from attn_core.tiling import padded_head_dim
from attn_core.tuning import Table, TileConfig, pick

FEW, SOME = 16, 64  # rows
_WAVES = 4  # of programs that keep all processors busy though sequences are unequal
_LONGEST = 1 << 15  # keys that one program may be left alone with
_MAX_SPLITS = 256
_SHARED_HALF = 100 << 10  # bytes of keys and values that let two programs share a processor
_KEY_TILE_BYTES = 1 << 15  # of keys and values that one stage of the pipeline holds


def _portable(width: int, size: int, rows: str) -> TileConfig:
    """Tiles that fit 64 KB of shared memory."""
    block_n = min(64, max(16, _KEY_TILE_BYTES // (2 * width * size)))
    largest = 64 if width * size <= 256 else 32
    block_m = {"few": 16, "some": 32, "many": largest}[rows]
    return TileConfig(block_m, block_n, 4, 2 if width * size <= 512 else 1)


DECODE = Table(
    "attn_flash.decode",
    rows={
        **{
            ("*", width, size, rows): _portable(width, size, rows)
            for width in (16, 32, 64, 128, 256)
            for size in (2, 4)
            for rows in ("few", "some", "many")
        },
        ("sm", 64, 2, "few"): TileConfig(16, 64, 4, 3),
        ("sm", 128, 2, "few"): TileConfig(16, 64, 4, 3),
        ("sm", 256, 2, "few"): TileConfig(16, 32, 4, 3),
        ("sm_90", 64, 2, "few"): TileConfig(16, 128, 4, 3),
        ("sm_90", 64, 2, "some"): TileConfig(64, 64, 4, 3),
        ("sm_90", 64, 2, "many"): TileConfig(128, 64, 8, 3),
        ("sm_90", 128, 2, "few"): TileConfig(16, 128, 4, 3),
        ("sm_90", 128, 2, "some"): TileConfig(64, 64, 4, 3),
        ("sm_90", 128, 2, "many"): TileConfig(128, 64, 8, 3),
        ("sm_90", 256, 2, "few"): TileConfig(16, 32, 4, 3),
        ("sm_90", 256, 2, "some"): TileConfig(64, 32, 4, 2),
        ("sm_90", 256, 2, "many"): TileConfig(128, 64, 8, 2),
    },
    default=TileConfig(16, 16, 4, 1),
    candidates=[
        TileConfig(block_m, block_n, warps, stages)
        for block_m, warps in ((16, 4), (32, 4), (64, 4), (128, 8))
        for block_n in (16, 32, 64, 128)
        for stages in (1, 2, 3, 4)
    ],
    sources=("attn_flash._triton.decode",),
)


def tiles(q: torch.Tensor, v_cache: torch.Tensor) -> TileConfig:
    """Choose the tiles of one launch."""
    _, len_q, heads, head_dim = q.shape
    heads_kv, head_dim_v = v_cache.shape[2:]
    rows = len_q * (heads // heads_kv)
    word = "few" if rows <= FEW else "some" if rows <= SOME else "many"
    key = (padded_head_dim(max(head_dim, head_dim_v)), q.element_size(), word)
    return pick(DECODE, q.device, key)


def num_splits(
    q: torch.Tensor, v_cache: torch.Tensor, config: TileConfig, num_programs: int, span: int
) -> int:
    """Into how many parts the keys of each tile are cut, from shapes alone.

    One wave of programs is enough where all of them run at once. Where they do not, decoded
    sequences of different lengths finish at different times unless the parts are small; larger
    tiles have too many rows for that, and their parts would cost more than they gain. `span` is the
    number of keys that a tile may see.
    """
    slots = _programs_per_sm(q, v_cache, config) * device_info(q.device).num_sms
    waves = _WAVES if config.block_m <= FEW and num_programs >= slots else 1
    wanted = max(waves * slots // num_programs, -(-span // _LONGEST))
    return max(1, min(wanted, -(-span // config.block_n), _MAX_SPLITS))


def _programs_per_sm(q: torch.Tensor, v_cache: torch.Tensor, config: TileConfig) -> int:
    """How many programs one processor has room for, as far as it pays."""
    width = padded_head_dim(q.shape[3]) + padded_head_dim(v_cache.shape[3])
    held = (config.num_stages - 1) * config.block_n * width * q.element_size()
    return 2 if held <= _SHARED_HALF else 1
