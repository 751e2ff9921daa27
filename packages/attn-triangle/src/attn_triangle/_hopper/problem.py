"""What the Hopper launchers derive from a problem: tiles, readable biases, rows of masks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from attn_core.tiling import ceil_div
from attn_triangle._hopper.descriptors import Tiles
from attn_triangle._triton.keys import visible_keys
from attn_triangle._triton.problem import broadcast_strides
from attn_triangle.layout import is_aligned

# Integers that change from call to call: compiled for any value.
NOT_SPECIALIZED = [
    "bias_b",
    "bias_h",
    "mask_b",
    "mask_r",
    "mask_n",
    "words_b",
    "words_r",
    "words_n",
    "range_b",
    "range_r",
    "M",
    "N",
    "R",
    "H",
    "num_tiles",
    "num_groups",
    "total",
    "columns",
    "num_parts",
    "groups",
    "dbias_p",
    "dbias_bh",
    "dbias_blocks",
    "num_tiles_n",
    "num_heads",
    "rows_per_split",
]
_HIDDEN, _ABSENT = -(2.0**100), -(2.0**101)  # as in `tiles`
_COLUMNS = 128  # a multiple of every block of keys


def whole(length: int, block: int) -> int:
    """The length in whole blocks."""
    return ceil_div(length, block) * block


def tiles(x: torch.Tensor, rows: int, block_d: int) -> Tiles:
    """x, (B, H, R, N, D) of any aligned strides, in tiles of some rows."""
    return Tiles(x, (1, 1, 1, rows, block_d))


def bias_tiles(bias: torch.Tensor, block_m: int, block_n: int) -> Tiles:
    """A bias (B, H, M, N) in tiles."""
    return Tiles(bias, (1, 1, block_m, block_n))


def row_pieces(x: torch.Tensor, block: int) -> Tiles:
    """Numbers of float32 (rows, length), contiguous, in pieces of a row."""
    return Tiles(x, (1, block), is_swizzled=False)


def readable(x: torch.Tensor) -> torch.Tensor:
    """A gradient as TMA can read it: a copy where it is expanded or odd, as of a plain sum."""
    if is_aligned(x) and x.data_ptr() % 16 == 0:
        return x
    batch, heads, rows, length, head_dim = x.shape
    stored = x.new_empty((batch, rows, length, heads, whole(head_dim, 8)))
    copy = stored[..., :head_dim].permute(0, 3, 1, 2, 4)
    return copy.copy_(x)


def readable_bias(bias: torch.Tensor, M: int, N: int) -> torch.Tensor:
    """The bias (., ., M, N) as TMA can read it: a copy where it is broadcast or odd."""
    is_whole = bias.shape[2:] == (M, N)
    if is_whole and is_aligned(bias) and bias.data_ptr() % 16 == 0:
        return bias
    packed = bias.new_empty((*bias.shape[:2], M, whole(N, 8)))[..., :N]
    return packed.copy_(bias)


def broadcast_steps(x: torch.Tensor) -> tuple[int, int]:
    """1 for the batches and heads of a bias, or 0 where it is broadcast along them."""
    return int(x.shape[0] != 1), int(x.shape[1] != 1)


class MaskBytes(NamedTuple):
    """A mask as it lies in memory: a byte for a key, and `words` of four of them or of one."""

    keys: torch.Tensor
    strides: tuple[int, ...]
    words: torch.Tensor
    words_strides: tuple[int, ...]


def mask_bytes(mask: torch.Tensor | None, N: int, unread: torch.Tensor) -> MaskBytes:
    """View a mask of bool (B, R, N) with 1 in place of any size; `unread` stands for none."""
    if mask is None:
        return MaskBytes(unread, (0, 0, 0), unread, (0, 0, 0))
    keys = words = mask.view(torch.uint8)
    # A view of other elements looks at all strides, those of dimensions of size 1 too.
    is_whole = mask.shape[2] == N and not any(x % 4 for x in (N, *mask.stride()[:2]))
    if is_whole and is_aligned(mask) and mask.data_ptr() % 16 == 0:
        words = mask.view(torch.int32)
    return MaskBytes(keys, broadcast_strides(keys), words, broadcast_strides(words))


class KeyRows(NamedTuple):
    """What is added to the scores of each row, and between which keys the visible ones lie.

    `rows` (rows, columns) is 0, `tiles.HIDDEN` where the mask hides a key, `tiles.ABSENT` past the
    last key. `steps` are how far apart in it batches and rows i are. `has_mask` is False where
    nothing needs to be added, `has_range` where all keys are visible: nothing is read then.
    """

    rows: torch.Tensor
    steps: tuple[int, int]
    range: torch.Tensor
    range_strides: tuple[int, ...]
    has_mask: bool
    has_range: bool


def key_rows(mask: torch.Tensor | None, N: int, block_n: int, unread: torch.Tensor) -> KeyRows:
    """Read a mask of bool (B, R, N), True = masked out, with 1 in place of any size."""
    if mask is not None:
        found = visible_keys(mask, N, unread, hidden=_HIDDEN, absent=_ABSENT)
        B, R, columns = found.shut.shape
        steps = (0 if B == 1 else R, 0 if R == 1 else 1)
        rows = found.shut.view(B * R, columns)
        return KeyRows(rows, steps, found.range, found.strides[2:], True, True)
    if N % block_n == 0:
        return KeyRows(unread.view(-1, unread.shape[-1])[:1], (0, 0), unread, (0, 0), False, False)
    rows = unread.new_zeros((1, whole(N, _COLUMNS)))
    rows[:, N:] = _ABSENT
    return KeyRows(rows, (0, 0), unread, (0, 0), True, False)
