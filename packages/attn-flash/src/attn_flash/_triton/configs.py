"""Tiles of the kernels: rows measured on an H200, and how a problem finds its row.

A row's key is (BLOCK_D, bytes of an element, shape): the shape is "short" up to 1024 tokens, where
many small tiles beat few large ones, else "causal" or "full"; any window counts as causal.
"""

from __future__ import annotations

import torch

from attn_core.tiling import padded_head_dim
from attn_core.tuning import Table, TileConfig, pick
from attn_flash._triton.problem import Size
from attn_flash.options import Options

SHORT = 1024  # tokens
SHORT_WINDOW = 512  # tokens
_SHAPES = ("short", "causal", "full")


def _rows(
    scope: str, *rows: tuple[int, str, TileConfig]
) -> dict[tuple[int | str, ...], TileConfig]:
    """Rows of 16-bit elements: (BLOCK_D, shape or "any", config)."""
    return {
        (scope, block_d, 2, shape): config
        for block_d, wanted, config in rows
        for shape in (_SHAPES if wanted == "any" else (wanted,))
    }


# Tiles that fit the shared memory of any device, where the default's would not.
_LARGE_TILES: dict[tuple[int | str, ...], TileConfig] = {
    (scope, block_d, size, shape): config
    for scope, block_d, size, config in (
        ("*", 256, 2, TileConfig(32, 32, 4, 1)),
        ("*", 128, 4, TileConfig(32, 32, 4, 1)),
        ("*", 256, 4, TileConfig(32, 32, 4, 1)),
        ("sm", 128, 4, TileConfig(32, 32, 8, 2)),
        ("sm", 256, 4, TileConfig(16, 16, 8, 1)),
        ("sm_90", 256, 4, TileConfig(32, 32, 8, 2)),
    )
    for shape in _SHAPES
}

FORWARD = Table(
    "attn_flash.forward",
    rows={
        **_LARGE_TILES,
        **_rows(
            "sm_90",
            (16, "any", TileConfig(64, 64, 4, 3)),
            (32, "any", TileConfig(64, 64, 4, 3)),
            (64, "short", TileConfig(64, 64, 4, 3)),
            (64, "causal", TileConfig(128, 64, 8, 3)),
            (64, "full", TileConfig(128, 64, 8, 3)),
            (128, "short", TileConfig(64, 64, 4, 3)),
            (128, "causal", TileConfig(64, 64, 4, 3)),
            (128, "full", TileConfig(128, 64, 8, 3)),
            (256, "any", TileConfig(128, 64, 8, 2)),
        ),
    },
    default=TileConfig(64, 32, 4, 2),
    candidates=[
        TileConfig(block_m, block_n, warps, stages)
        for block_m, warps in ((64, 4), (128, 4), (128, 8))
        for block_n in (32, 64, 128)
        for stages in (1, 2, 3)
    ],
    sources=("attn_flash._triton.forward",),
)
# Score terms and dropout need the registers that smaller tiles leave to a second program, whose
# arithmetic then overlaps the products of the first.
FORWARD_TERMS = Table(
    "attn_flash.forward_terms",
    rows={**FORWARD.rows, **_rows("sm_90", (64, "any", TileConfig(64, 64, 4, 3)))},
    default=FORWARD.default,
    candidates=FORWARD.candidates,
    sources=FORWARD.sources,
)
BACKWARD_DQ = Table(
    "attn_flash.backward_dq",
    rows={
        **_LARGE_TILES,
        **_rows(
            "sm_90",
            (16, "any", TileConfig(64, 64, 4, 3)),
            (32, "any", TileConfig(64, 64, 4, 3)),
            (64, "any", TileConfig(64, 64, 4, 3)),
            (128, "any", TileConfig(128, 64, 8, 3)),
            (256, "any", TileConfig(128, 32, 8, 2)),
        ),
    },
    default=TileConfig(64, 32, 4, 2),
    candidates=FORWARD.candidates,
    sources=("attn_flash._triton.backward_dq",),
)
# Of a short window, small tiles compute less that is outside.
BACKWARD_DQ_WINDOW = Table(
    "attn_flash.backward_dq_window",
    rows={**BACKWARD_DQ.rows, **_rows("sm_90", (128, "any", TileConfig(64, 64, 4, 2)))},
    default=BACKWARD_DQ.default,
    candidates=BACKWARD_DQ.candidates,
    sources=BACKWARD_DQ.sources,
)
BACKWARD_DK_DV = Table(
    "attn_flash.backward_dk_dv",
    rows={
        **_LARGE_TILES,
        **_rows(
            "sm_90",
            (16, "any", TileConfig(64, 64, 4, 3)),
            (32, "any", TileConfig(64, 64, 4, 3)),
            (64, "any", TileConfig(64, 64, 4, 3)),
            (128, "short", TileConfig(32, 64, 4, 3)),
            (128, "causal", TileConfig(32, 64, 4, 3)),
            (128, "full", TileConfig(64, 128, 8, 3)),
            (256, "any", TileConfig(64, 64, 8, 2)),
        ),
    },
    default=TileConfig(32, 64, 4, 2),
    candidates=[
        TileConfig(block_m, block_n, warps, stages)
        for block_n, warps in ((64, 4), (128, 4), (128, 8))
        for block_m in (32, 64, 128)
        for stages in (1, 2, 3)
    ],
    sources=("attn_flash._triton.backward_dk_dv",),
)
# Positions, a bias and random numbers take registers, which tiles of fewer queries leave.
BACKWARD_DK_DV_TERMS = Table(
    "attn_flash.backward_dk_dv_terms",
    rows={**BACKWARD_DK_DV.rows, **_rows("sm_90", (128, "any", TileConfig(32, 128, 8, 3)))},
    default=BACKWARD_DK_DV.default,
    candidates=BACKWARD_DK_DV.candidates,
    sources=BACKWARD_DK_DV.sources,
)
# Every operand changes from step to step, so all of them go through the pipeline's shared memory.
BACKWARD_BIAS = Table(
    "attn_flash.backward_bias",
    rows={
        **_LARGE_TILES,
        **_rows(
            "sm_90",
            (16, "any", TileConfig(64, 64, 4, 2)),
            (32, "any", TileConfig(64, 64, 4, 2)),
            (64, "any", TileConfig(64, 64, 4, 2)),
            (128, "any", TileConfig(64, 64, 4, 2)),
            (256, "any", TileConfig(64, 32, 4, 2)),
        ),
    },
    default=TileConfig(32, 32, 4, 1),
    candidates=[
        TileConfig(block_m, block_n, warps, stages)
        for block_m, warps in ((32, 4), (64, 4), (128, 8))
        for block_n in (32, 64)
        for stages in (1, 2)
    ],
    sources=("attn_flash._triton.backward_bias",),
)


def modifies_scores(options: Options) -> bool:
    """Whether kernels do more to scores than scaling and softmax: tables of terms are for these."""
    modifiers = {"alibi_slopes", "attn_bias", "key_mask", "softcap", "dropout_p"}
    return not modifiers.isdisjoint(options.features())


def is_short_window(options: Options) -> bool:
    """Whether queries see so few keys that it matters how many a tile adds to them."""
    left, right = options.window
    return left >= 0 and right >= 0 and left + right < SHORT_WINDOW


def tiles(table: Table, q: torch.Tensor, size: Size, window: tuple[int, int]) -> TileConfig:
    """Choose the tiles of one launch."""
    if max(size.M, size.N) <= SHORT:
        shape = "short"
    else:
        shape = "full" if window == (-1, -1) else "causal"
    block_d = padded_head_dim(max(size.D, size.D_v))
    return pick(table, q.device, (block_d, q.element_size(), shape))
