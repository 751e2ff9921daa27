"""Tiles of the kernels: rows measured on an H200, and how a problem finds its row.

A row's key is (BLOCK_D, bytes of an element, shape): the shape is "short" up to 1024 tokens, where
many small tiles beat few large ones, else "causal" or "full"; any window counts as causal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from attn_core.device import device_info
from attn_core.tiling import padded_head_dim
from attn_core.tuning import Table, TileConfig, pick
from attn_flash._triton.problem import Size, bias_run
from attn_flash.options import Options

SHORT = 1024  # tokens
SHORT_WINDOW = 512  # tokens
_SHAPES = ("short", "causal", "full")


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


def _rows(*rows: tuple[int, str, TileConfig]) -> dict[tuple[int | str, ...], TileConfig]:
    """Rows of 16-bit elements on an H200: (BLOCK_D, shape or "any", config)."""
    return {
        ("sm_90", block_d, 2, shape): config
        for block_d, wanted, config in rows
        for shape in (_SHAPES if wanted == "any" else (wanted,))
    }


def _table(
    kernel: str,
    *rows: tuple[int, str, TileConfig],
    default: TileConfig,
    candidates: Sequence[TileConfig],
) -> Table:
    return Table(
        f"attn_flash.{kernel}",
        rows={**_LARGE_TILES, **_rows(*rows)},
        default=default,
        candidates=candidates,
        sources=(f"attn_flash._triton.{kernel}",),
    )


def _variant(table: Table, name: str, *rows: tuple[int, str, TileConfig]) -> Table:
    """Tiles of the same kernel for problems that want others."""
    return dataclasses.replace(
        table, name=f"{table.name}_{name}", rows={**table.rows, **_rows(*rows)}
    )


_QUERIES_STAY = [
    TileConfig(block_m, block_n, warps, stages)
    for block_m, warps in ((64, 4), (128, 4), (128, 8))
    for block_n in (32, 64, 128)
    for stages in (1, 2, 3)
]
_KEYS_STAY = [
    TileConfig(block_m, block_n, warps, stages)
    for block_n, warps in ((64, 4), (128, 4), (128, 8))
    for block_m in (32, 64, 128)
    for stages in (1, 2, 3)
]
_NOTHING_STAYS = [
    TileConfig(block_m, block_n, warps, stages)
    for block_m, warps in ((32, 4), (64, 4), (128, 8))
    for block_n in (32, 64)
    for stages in (1, 2)
]

FORWARD = _table(
    "forward",
    (16, "any", TileConfig(64, 64, 4, 3)),
    (32, "any", TileConfig(64, 64, 4, 3)),
    (64, "short", TileConfig(64, 64, 4, 3)),
    (64, "causal", TileConfig(128, 64, 8, 3)),
    (64, "full", TileConfig(128, 64, 8, 3)),
    (128, "short", TileConfig(64, 64, 4, 3)),
    (128, "causal", TileConfig(64, 64, 4, 3)),
    (128, "full", TileConfig(128, 64, 8, 3)),
    (256, "any", TileConfig(128, 64, 8, 2)),
    default=TileConfig(64, 32, 4, 2),
    candidates=_QUERIES_STAY,
)
# Score terms need the registers that smaller tiles leave to a second program, whose arithmetic then
# overlaps the products of the first. A bias and dropout take large ones: with `registers`, these
# leave as many, and read keys and values once for twice the queries.
FORWARD_TERMS = _variant(FORWARD, "terms", (64, "any", TileConfig(64, 64, 4, 3)))
BACKWARD_DQ = _table(
    "backward_dq",
    (16, "any", TileConfig(64, 64, 4, 3)),
    (32, "any", TileConfig(64, 64, 4, 3)),
    (64, "any", TileConfig(64, 64, 4, 3)),
    (128, "any", TileConfig(128, 64, 8, 3)),
    (256, "any", TileConfig(128, 32, 8, 2)),
    default=TileConfig(64, 32, 4, 2),
    candidates=_QUERIES_STAY,
)
# Of a short window, small tiles compute less that is outside.
BACKWARD_DQ_WINDOW = _variant(BACKWARD_DQ, "window", (128, "any", TileConfig(64, 64, 4, 2)))
BACKWARD_DK_DV = _table(
    "backward_dk_dv",
    (16, "any", TileConfig(64, 64, 4, 3)),
    (32, "any", TileConfig(64, 64, 4, 3)),
    (64, "any", TileConfig(64, 64, 4, 3)),
    (128, "short", TileConfig(32, 64, 4, 3)),
    (128, "causal", TileConfig(32, 64, 4, 3)),
    (128, "full", TileConfig(64, 128, 8, 3)),
    (256, "any", TileConfig(64, 64, 8, 2)),
    default=TileConfig(32, 64, 4, 2),
    candidates=_KEYS_STAY,
)
# Positions, a bias and random numbers take registers, which tiles of fewer queries leave.
BACKWARD_DK_DV_TERMS = _variant(BACKWARD_DK_DV, "terms", (128, "any", TileConfig(32, 128, 8, 3)))
# A bias beside narrow heads: with `registers`.
BACKWARD_DK_DV_BIAS = _variant(
    BACKWARD_DK_DV_TERMS,
    "bias",
    (64, "causal", TileConfig(32, 64, 4, 3)),
    (64, "full", TileConfig(32, 64, 4, 3)),
)
# Every operand changes from step to step, so all of them go through the pipeline's shared memory.
BACKWARD_BIAS = _table(
    "backward_bias",
    (16, "any", TileConfig(64, 64, 4, 2)),
    (32, "any", TileConfig(64, 64, 4, 2)),
    (64, "any", TileConfig(64, 64, 4, 2)),
    (128, "any", TileConfig(64, 64, 4, 2)),
    (256, "any", TileConfig(64, 32, 4, 2)),
    default=TileConfig(32, 32, 4, 1),
    candidates=_NOTHING_STAYS,
)


# The most registers a thread may have, by kernel, the only term and tiles, of 16-bit elements and
# head dimensions up to 64 on an H200. ptxas takes more to little use: a program fewer then shares
# the processor. All other kernels need theirs.
_REGISTERS = {
    ("forward", "attn_bias", TileConfig(128, 64, 8, 3)): 128,
    ("forward", "attn_bias", TileConfig(64, 64, 4, 3)): 168,
    ("forward", "dropout_p", TileConfig(128, 64, 8, 3)): 128,
    ("forward", "alibi_slopes", TileConfig(64, 64, 4, 3)): 128,
    ("forward", "key_mask", TileConfig(64, 64, 4, 3)): 168,
    ("backward_dq", "alibi_slopes", TileConfig(64, 64, 4, 3)): 168,
    ("backward_dq", "attn_bias", TileConfig(64, 64, 4, 3)): 168,
    ("backward_dq", "dropout_p", TileConfig(64, 64, 4, 3)): 168,
    ("backward_dq", "key_mask", TileConfig(64, 64, 4, 3)): 168,
    ("backward_dq", "softcap", TileConfig(64, 64, 4, 3)): 168,
    ("backward_dk_dv", "attn_bias", TileConfig(32, 64, 4, 3)): 168,
}
_CAPPED_WIDTH = 64  # padded head dimension
REGISTER_CAPS = sorted({*_REGISTERS.values()})
_TERMS = frozenset({"alibi_slopes", "attn_bias", "key_mask", "softcap", "dropout_p"})
_LARGE_TILE_TERMS = ("attn_bias", "dropout_p")


def _only_term(q: torch.Tensor, options: Options) -> str:
    """Name of what kernels do to scores beside scaling and softmax; "" for nothing, or for more.

    Nor is there a name for a bias that takes more memory or registers than one of q's dtype, which
    is read 16 bytes at a time.
    """
    terms = _TERMS & options.features()
    bias = options.attn_bias
    if bias is not None and (bias.element_size() != q.element_size() or bias_run(bias) == 1):
        return ""
    return next(iter(terms)) if len(terms) == 1 else ""


def registers(
    kernel: str, q: torch.Tensor, size: Size, options: Options, config: TileConfig
) -> int:
    """Return the most registers that a thread of a kernel may have; 0 for any number."""
    cap = _REGISTERS.get((kernel, _only_term(q, options), config), 0)
    if not cap or q.element_size() != 2 or options.block_table is not None:
        return 0
    width = padded_head_dim(max(size.D, size.D_v))
    is_measured = width == _CAPPED_WIDTH and device_info(q.device).arch == "sm_90"
    return cap if is_measured else 0


def forward_table(q: torch.Tensor, options: Options) -> Table:
    """Tiles of the forward pass."""
    if _TERMS.isdisjoint(options.features()) or _only_term(q, options) in _LARGE_TILE_TERMS:
        return FORWARD
    return FORWARD_TERMS


def dk_dv_table(q: torch.Tensor, options: Options) -> Table:
    """Tiles of the kernel for dk and dv."""
    if _only_term(q, options) == "attn_bias":
        return BACKWARD_DK_DV_BIAS
    takes_registers = {"attn_bias", "alibi_slopes", "dropout_p"}
    if takes_registers.isdisjoint(options.features()):
        return BACKWARD_DK_DV
    return BACKWARD_DK_DV_TERMS


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
