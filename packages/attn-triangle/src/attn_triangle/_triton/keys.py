"""Which keys a row sees, in the form the attention kernels read it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tuning import TileConfig
from attn_triangle._triton import problem

_CONFIG = TileConfig(1, 1024, 4, 2)
_COLUMNS = 128  # a multiple of every block of keys
# An additive mask often says -1e9 for "masked". A key this far below another has weight 0.
_NEGLIGIBLE = tl.constexpr(1e8)


@triton.jit
def _shut(
    mask_ptr, stride_mn, key, N,
    IS_ADDITIVE: tl.constexpr, HIDDEN: tl.constexpr, ABSENT: tl.constexpr,
):  # fmt: skip
    """Load what the mask adds to the scores of some keys, ABSENT past the end: [BLOCK_N]."""
    ptrs = mask_ptr + key.to(tl.int64) * stride_mn
    if IS_ADDITIVE:
        added = tl.load(ptrs, mask=key < N, other=0.0).to(tl.float32)
    else:
        added = tl.where(tl.load(ptrs, mask=key < N, other=0) != 0, HIDDEN, 0.0)
    return tl.where(key < N, added, ABSENT)


# fmt: off
@triton.jit(do_not_specialize=["N", "R", "num_columns"])
def _visible_keys_kernel(
    mask_ptr, stride_mb, stride_mr, stride_mn,
    shut_ptr,  # [B, R, num_columns], contiguous
    range_ptr,  # [B, R, 2], contiguous
    N, R, num_columns,
    IS_ADDITIVE: tl.constexpr, HIDDEN: tl.constexpr, ABSENT: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    row = tl.program_id(0).to(tl.int64)
    mask_ptr += row // R * stride_mb + row % R * stride_mr
    shut_ptr += row * num_columns
    offs_n = tl.arange(0, BLOCK_N)
    lowest = HIDDEN  # keys to whose score more is added count
    if IS_ADDITIVE:
        highest = tl.full([BLOCK_N], -float("inf"), tl.float32)
        for start_n in range(0, N, BLOCK_N):
            key = start_n + offs_n
            highest = tl.maximum(highest, _shut(mask_ptr, stride_mn, key, N, True, HIDDEN, ABSENT))
        lowest = tl.max(highest) - _NEGLIGIBLE
    first = N
    last = -1
    for start_n in range(0, num_columns, BLOCK_N):
        key = start_n + offs_n
        shut = _shut(mask_ptr, stride_mn, key, N, IS_ADDITIVE, HIDDEN, ABSENT)
        tl.store(shut_ptr + key, shut, mask=key < num_columns)
        first = tl.minimum(first, tl.min(tl.where(shut > lowest, key, N)))
        last = tl.maximum(last, tl.max(tl.where(shut > lowest, key, -1)))
    tl.store(range_ptr + 2 * row, first)
    tl.store(range_ptr + 2 * row + 1, last + 1)


_launch = Launcher(_visible_keys_kernel)


class VisibleKeys(NamedTuple):
    """What a mask says of each row; both tensors repeat along dimensions of size 1.

    `shut` (B, R, N or a few more) is added to scores: 0, or -inf where a key is masked out or there
    is none, or what an additive mask says. The keys of a row that count are within `range`
    (B, R, 2): the first of them, and the one after the last. `strides` are those of the batches and
    rows of `shut`, then of `range`. `kind` is what kernels are compiled for.
    """

    shut: torch.Tensor
    range: torch.Tensor
    strides: tuple[int, ...]
    kind: str


def visible_keys(
    mask: torch.Tensor | None,
    length: int,
    unread: torch.Tensor,
    *,
    hidden: float = -math.inf,
    absent: float = -math.inf,
) -> VisibleKeys:
    """Read a mask (B, R, N), of bool or additive, with 1 in place of any size.

    Kernels compiled for no mask get `unread` in place of both tensors. `hidden` is added to the
    scores of masked keys, `absent` to those past the end.
    """
    if mask is None:
        return VisibleKeys(unread, unread, (0, 0, 0, 0), "none")
    B, R, _ = mask.shape
    num_columns = tiling.ceil_div(length, _COLUMNS) * _COLUMNS
    shut = mask.new_empty((B, R, num_columns), dtype=torch.float32)
    key_range = mask.new_empty((B, R, 2), dtype=torch.int32)
    strides = problem.broadcast_strides(mask)
    is_additive = mask.dtype != torch.bool
    _launch(
        B * R,
        strides=(mask.dtype, strides),
        args=(
            mask if is_additive else mask.view(torch.uint8),
            *strides,
            shut,
            key_range,
            length,
            R,
            num_columns,
        ),
        constexprs={
            "IS_ADDITIVE": is_additive, "HIDDEN": hidden, "ABSENT": absent,
            "BLOCK_N": _CONFIG.block_n,
        },
        config=_CONFIG,
    )
    shut_strides, range_strides = map(problem.broadcast_strides, (shut, key_range))
    kind = "additive" if is_additive else "bool"
    return VisibleKeys(shut, key_range, shut_strides[:2] + range_strides[:2], kind)
