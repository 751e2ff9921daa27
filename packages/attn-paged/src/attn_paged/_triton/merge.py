"""The parts of attention that programs have shared, put together in the order of the keys."""

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.merge import merge_states
from attn_core.tiles.softmax import finish_softmax
from attn_core.tuning import TileConfig
from attn_paged._triton import problem
from attn_paged._triton.queries import queries_of_tile, tile_of_unit

_TILE = 4096  # elements of parts that a program holds
_ROWS = 16  # of a tile whose work is shared: few parts, so that all rows are merged at once


@triton.jit
def rows_of_tile(
    head_tile, first_token, start_m, M, rows_ptr, offs_m,
    GROUP: tl.constexpr, TILE_GROUP: tl.constexpr, H_KV: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Return the head, the row of q and whether there is one, for rows `offs_m` of a tile."""
    offs_q = offs_m // TILE_GROUP
    offs_g = head_tile // H_KV * TILE_GROUP + offs_m % TILE_GROUP
    mask_m = (offs_q < BLOCK_Q) & (start_m + offs_q < M) & (offs_g < GROUP)
    heads = (head_tile % H_KV).to(tl.int64) * GROUP + offs_g
    tokens = first_token + offs_q.to(tl.int64)
    if rows_ptr is not None:
        tokens = tl.load(rows_ptr + tokens, mask=mask_m, other=0).to(tl.int64)
    return heads, tokens, mask_m


@triton.jit
def share_of_work(total, num_shares):
    """Units of work that each of `num_shares` programs takes."""
    return tl.maximum(tl.cdiv(total, num_shares), 1)


@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _merge_parts_kernel(
    parts_ptr,  # [slots, BLOCK_M, D_v], contiguous
    parts_lse_ptr,  # [slots, BLOCK_M], in units of log2
    cu_seqlens_ptr, stride_cu,
    rows_ptr,
    ends_ptr,
    out_ptr,  # [T, H, D_v], contiguous
    lse_ptr,  # [H, T], contiguous
    T, B, num_tiles, num_splits, least_m, most_m, steps, num_halvings,
    IS_RAGGED: tl.constexpr, ONE_TILE_EACH: tl.constexpr, IS_SHARED: tl.constexpr,
    GROUP: tl.constexpr, TILE_GROUP: tl.constexpr, H_KV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Merge rows of a tile: a part is a key whose score is its lse and whose value its output.

    Where the work is shared, each program but the first that began in the midst of a tile stands
    for it, so that their number does not grow with that of the tiles.
    """
    HEAD_TILES: tl.constexpr = H_KV * ((GROUP + TILE_GROUP - 1) // TILE_GROUP)
    RUNS: tl.constexpr = (TILE_GROUP * BLOCK_Q + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    head_tile = pid // RUNS % HEAD_TILES
    tile = pid // RUNS // HEAD_TILES
    # Part i of a tile is in slot first + i * step, but for the first of a shared tile.
    count = num_splits
    first = tile
    step = num_tiles
    shift = 0
    if IS_SHARED:
        total = tl.load(ends_ptr + num_tiles - 1)
        share = share_of_work(total, num_splits)
        unit = (tile + 1) * share
        if unit >= total:
            return
        tile = tile_of_unit(unit, ends_ptr, num_tiles, num_halvings)
        begin = tl.load(ends_ptr + tile - 1, mask=tile > 0, other=0)
        end = tl.load(ends_ptr + tile)
        program = begin // share
        # It began with the tile, or another one stands for it.
        if (begin == unit) | ((program + 1) * share < unit):
            return
        count = (end - 1) // share - program + 1
        first = 2 * program
        step = 2
        shift = tl.where(begin == program * share, 0, 1)
    b, first_token, start_m, M = queries_of_tile(
        tile, cu_seqlens_ptr, stride_cu, T, B, least_m, most_m, steps,
        IS_RAGGED, ONE_TILE_EACH, BLOCK_Q,
    )  # fmt: skip
    if start_m >= M:
        return
    offs_m = pid % RUNS * BLOCK_R + tl.arange(0, BLOCK_R)
    heads, tokens, mask_m = rows_of_tile(
        head_tile, first_token, start_m, M, rows_ptr, offs_m, GROUP, TILE_GROUP, H_KV, BLOCK_Q
    )
    offs_d = tl.arange(0, BLOCK_DV)
    mask_d = offs_d < HEAD_DIM_V
    m_i = tl.full([BLOCK_R], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    for start_s in range(0, count, BLOCK_S):
        offs_s = start_s + tl.arange(0, BLOCK_S)
        slots = first + offs_s * step + tl.where(offs_s == 0, shift, 0)
        slots = (slots * HEAD_TILES + head_tile).to(tl.int64)
        rows = offs_m[:, None] + slots[None, :] * BLOCK_M  # [BLOCK_R, BLOCK_S]
        mask = mask_m[:, None] & (offs_s < count)[None, :]
        lse = tl.load(parts_lse_ptr + rows, mask=mask, other=-float("inf"))
        parts_ptrs = parts_ptr + rows[:, :, None] * HEAD_DIM_V + offs_d[None, None, :]
        parts = tl.load(parts_ptrs, mask=mask[:, :, None] & mask_d[None, None, :], other=0.0)
        # A part without keys holds anything. Both loads start at once, so it is dropped here.
        parts = tl.where((lse > -float("inf"))[:, :, None], parts, 0.0)
        m_new = tl.maximum(m_i, tl.max(lse, 1))
        pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha = tl.math.exp2(m_i - pivot)
        p = tl.math.exp2(lse - pivot[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + tl.sum(p[:, :, None] * parts, 1)
        m_i = m_new

    out, lse = finish_softmax(m_i, l_i, acc)
    tl.store(lse_ptr + heads * T + tokens, lse, mask=mask_m)
    out_rows = (tokens * (H_KV * GROUP) + heads) * HEAD_DIM_V
    tl.store(
        out_ptr + out_rows[:, None] + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_d[None, :],
    )


_launch = Launcher(_merge_parts_kernel)


def merge_parts(
    parts: torch.Tensor,
    parts_lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    rows: torch.Tensor | None,
    ends: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    sizes: dict[str, int],
    constexprs: dict[str, int],
    head_tiles: int,
) -> None:
    """Merge the parts of all tiles into out (T, H, D_v) and lse (H, T).

    With `ends` the parts are those of programs that share the work, else of equal splits.
    """
    D_v = out.shape[2]
    num_rows = constexprs["TILE_GROUP"] * constexprs["BLOCK_Q"]
    block_dv = tiling.padded_head_dim(D_v)
    block_r = 1 if ends is None else min(_ROWS, triton.next_power_of_2(num_rows))
    block_s = max(1, _TILE // block_dv // block_r)
    strides = problem.strides_of(cu_seqlens_q, 1)
    groups = sizes["num_tiles"] if ends is None else sizes["num_splits"] - 1
    if groups == 0:
        return
    _launch(
        groups * head_tiles * tiling.ceil_div(num_rows, block_r),
        strides=(strides, out.dtype, rows is None),
        args=(
            parts,
            parts_lse,
            cu_seqlens_q, *strides,
            rows,
            ends,
            out,
            lse,
            *sizes.values(), sizes["num_tiles"].bit_length(),
        ),
        constexprs={
            **constexprs, "BLOCK_R": block_r, "BLOCK_S": block_s, "BLOCK_DV": block_dv,
        },
        config=TileConfig(block_s, block_dv, 4, 1),
    )  # fmt: skip


@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _merge_halves_kernel(
    halves_ptr,  # [2, T, H, D_v], contiguous
    halves_lse_ptr,  # [2, H, T], contiguous
    out_ptr,  # [T, H, D_v], contiguous
    lse_ptr,  # [H, T], contiguous
    T, H,
    HEAD_DIM_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    num_rows = T.to(tl.int64) * H
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = rows < num_rows
    lse_rows = rows % H * T + rows // H
    offs_d = tl.arange(0, BLOCK_DV)
    mask = mask_r[:, None] & (offs_d < HEAD_DIM_V)[None, :]
    offsets = rows[:, None] * HEAD_DIM_V + offs_d[None, :]
    lse_a = tl.load(halves_lse_ptr + lse_rows, mask=mask_r, other=-float("inf"))
    lse_b = tl.load(halves_lse_ptr + num_rows + lse_rows, mask=mask_r, other=-float("inf"))
    out_a = tl.load(halves_ptr + offsets, mask=mask, other=0.0)
    out_b = tl.load(halves_ptr + num_rows * HEAD_DIM_V + offsets, mask=mask, other=0.0)
    out, lse = merge_states(out_a, lse_a, out_b, lse_b)
    tl.store(lse_ptr + lse_rows, lse, mask=mask_r)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


_launch_halves = Launcher(_merge_halves_kernel)


def merge_halves(
    halves: torch.Tensor, halves_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Merge halves (2, T, H, D_v) by halves_lse (2, H, T) into out (T, H, D_v) and lse (H, T)."""
    T, H, D_v = out.shape
    block_dv = tiling.padded_head_dim(D_v)
    block_r = max(1, _TILE // block_dv)
    _launch_halves(
        tiling.ceil_div(T * H, block_r),
        strides=(out.dtype,),
        args=(halves, halves_lse, out, lse, T, H),
        constexprs={"HEAD_DIM_V": D_v, "BLOCK_R": block_r, "BLOCK_DV": block_dv},
        config=TileConfig(block_r, block_dv, 4, 1),
    )
