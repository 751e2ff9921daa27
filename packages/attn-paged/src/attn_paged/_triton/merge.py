"""The parts of attention that one launch has left, put together in the order of the keys."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.merge import take_in_parts
from attn_core.tiles.softmax import finish_softmax
from attn_core.tuning import TileConfig
from attn_paged._triton import problem
from attn_paged._triton.queries import queries_of_tile, rows_of_tile, tile_of_unit

MERGED_ELEMENTS = 4096  # of parts that a program holds, of at least two parts
MERGED_ROWS = 8  # of a tile in few parts that are merged at once
_TILES = 256  # whose ends a program looks at at once, at most


@triton.jit
def slots_of_shared_tile(begin, end, share):
    """Return first, step, shift and count: part i of a tile is in slot first + i * step.

    But for the first part. The tile has units of work from begin to end.
    """
    program = begin // share
    shift = tl.where(begin == program * share, 0, 1)
    return 2 * program, 2, shift, (end - 1) // share - program + 1


# fmt: off
@triton.jit
def merge_slots(
    m_i, l_i, acc, parts_ptr, parts_lse_ptr, first, step, shift, count, head_tile, offs_m, mask_m,
    HEAD_TILES: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    """Take in the parts of a tile, for its rows offs_m."""
    offs_d = tl.arange(0, BLOCK_DV)
    mask_d = offs_d < HEAD_DIM_V
    for start_s in range(0, count, BLOCK_S):
        offs_s = start_s + tl.arange(0, BLOCK_S)
        slots = first + offs_s * step + tl.where(offs_s == 0, shift, 0)
        slots = (slots * HEAD_TILES + head_tile).to(tl.int64)
        rows = offs_m[:, None] + slots[None, :] * BLOCK_M  # [BLOCK_R, BLOCK_S]
        mask = mask_m[:, None] & (offs_s < count)[None, :]
        parts_lse = tl.load(parts_lse_ptr + rows, mask=mask, other=-float("inf"))
        parts_ptrs = parts_ptr + rows[:, :, None] * HEAD_DIM_V + offs_d[None, None, :]
        parts = tl.load(parts_ptrs, mask=mask[:, :, None] & mask_d[None, None, :], other=0.0)
        m_i, l_i, acc = take_in_parts(m_i, l_i, acc, parts_lse, parts)
    return m_i, l_i, acc


@triton.jit
def store_rows(
    out_ptr, rows, tile, mask_m, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """Write a tile to some rows of a contiguous matrix of HEAD_DIM_V columns."""
    offs_d = tl.arange(0, BLOCK_DV)
    tl.store(
        out_ptr + (rows * HEAD_DIM_V)[:, None] + offs_d[None, :],
        tile.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & (offs_d < HEAD_DIM_V)[None, :],
    )


@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _merge_parts_kernel(
    parts_ptr,  # [slots, BLOCK_M, D_v], contiguous
    parts_lse_ptr,  # [slots, BLOCK_M], in units of log2
    cu_seqlens_ptr, stride_cu,
    rows_ptr,
    ends_ptr,
    out_ptr,  # [T, H, D_v], contiguous
    lse_ptr,  # [H, T], contiguous
    T, B, num_tiles, num_splits, least_m, most_m, steps,
    IS_RAGGED: tl.constexpr, ONE_TILE_EACH: tl.constexpr, IS_SHARED: tl.constexpr,
    GROUP: tl.constexpr, TILE_GROUP: tl.constexpr, H_KV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Merge rows of a tile.

    Where the work is shared, each program but the first that began in the midst of a tile stands
    for it, so that their number does not grow with that of the tiles.
    """
    HEAD_TILES: tl.constexpr = H_KV * ((GROUP + TILE_GROUP - 1) // TILE_GROUP)
    RUNS: tl.constexpr = (TILE_GROUP * BLOCK_Q + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    head_tile = pid // RUNS % HEAD_TILES
    tile = pid // RUNS // HEAD_TILES
    if IS_SHARED:
        share = tl.load(ends_ptr + num_tiles)
        total = tl.load(ends_ptr + num_tiles - 1)
        unit = (tile + 1) * share
        tile, begin = tile_of_unit(
            tl.minimum(unit, total - 1), ends_ptr, num_tiles
        )
        # Else it began with the tile, or another one stands for it.
        is_cut = (unit < total) & (begin < unit) & ((begin // share + 1) * share >= unit)
        first, step, shift, count = slots_of_shared_tile(begin, tl.load(ends_ptr + tile), share)
    else:
        is_cut = True
        first, step, shift, count = tile, num_tiles, 0, num_splits
    _b, first_token, start_m, M = queries_of_tile(
        tile, cu_seqlens_ptr, stride_cu, T, B, least_m, most_m, steps,
        IS_RAGGED, ONE_TILE_EACH, BLOCK_Q, BLOCK_T,
    )  # fmt: skip
    offs_m = pid % RUNS * BLOCK_R + tl.arange(0, BLOCK_R)
    heads, tokens, mask_m = rows_of_tile(
        head_tile, first_token, start_m, M, rows_ptr, offs_m, GROUP, TILE_GROUP, H_KV, BLOCK_Q
    )
    if OVERLAPS:  # all of this was there before attention, which may not have ended
        tl.extra.cuda.gdc_wait()
    if not (is_cut & (start_m < M)):
        return
    m_i = tl.full([BLOCK_R], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    m_i, l_i, acc = merge_slots(
        m_i, l_i, acc, parts_ptr, parts_lse_ptr, first, step, shift, count,
        head_tile, offs_m, mask_m, HEAD_TILES, HEAD_DIM_V, BLOCK_M, BLOCK_S, BLOCK_DV,
    )  # fmt: skip
    out, lse = finish_softmax(m_i, l_i, acc)
    tl.store(lse_ptr + heads * T + tokens, lse, mask=mask_m)
    store_rows(out_ptr, tokens * (H_KV * GROUP) + heads, out, mask_m, HEAD_DIM_V, BLOCK_DV)


_launch = Launcher(_merge_parts_kernel)
_launch_next = Launcher(_merge_parts_kernel, launch_pdl=True)


class Parts(NamedTuple):
    """What a launch of attention leaves: parts of tiles, and out and lse of the other tiles.

    With `ends` the parts are those of programs that share the work, else of equal splits; with
    `least` of fewer where they would have less than so many tiles of the `lens` keys, BLOCK_N
    each. `sizes` and `constexprs` are the launch's.
    """

    parts: torch.Tensor
    parts_lse: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    rows: torch.Tensor | None
    ends: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor
    sizes: dict[str, int]
    constexprs: dict[str, int]
    head_tiles: int
    lens: torch.Tensor | None = None
    block_n: int = 0
    least: int = 0


def merge_parts(left: Parts) -> None:
    """Merge what `left` has in parts into its out (T, H, D_v) and lse (H, T)."""
    sizes, constexprs, ends, out = left.sizes, left.constexprs, left.ends, left.out
    D_v = out.shape[2]
    num_rows = constexprs["TILE_GROUP"] * constexprs["BLOCK_Q"]
    block_dv = tiling.padded_head_dim(D_v)
    rows_at_once = MERGED_ELEMENTS // block_dv
    block_r = 1
    if ends is not None:
        block_r = min(MERGED_ROWS, triton.next_power_of_2(num_rows), rows_at_once // 2)
    strides = problem.strides_of(left.cu_seqlens_q, 1)
    groups = sizes["num_splits"] - 1 if ends is not None else sizes["num_tiles"]
    if sizes["num_splits"] == 1 or groups == 0:
        return
    overlaps = problem.can_overlap(out.device)
    launch = _launch_next if overlaps else _launch
    launch(
        groups * left.head_tiles * tiling.ceil_div(num_rows, block_r),
        strides=(strides, out.dtype, left.rows is None),
        args=(
            left.parts,
            left.parts_lse,
            left.cu_seqlens_q, *strides,
            left.rows,
            ends,
            out,
            left.lse,
            *sizes.values(),
        ),
        constexprs={
            **constexprs, "BLOCK_T": _TILES if sizes["num_tiles"] <= _TILES else 0,
            "BLOCK_R": block_r, "BLOCK_S": rows_at_once // block_r, "BLOCK_DV": block_dv,
            "OVERLAPS": overlaps,
        },
        config=TileConfig(rows_at_once // block_r, block_dv, 4, 1),
    )  # fmt: skip
