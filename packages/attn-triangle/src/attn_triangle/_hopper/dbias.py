"""Gradient of the bias for Hopper GPUs, without atomics: a warpgroup owns 64 queries by some keys.

It goes through the rows i and adds up dS in its registers. Several parts of the rows are computed
side by side to fill the GPU; another kernel sums the parts.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core import tiling
from attn_core.device import device_info
from attn_core.gluon_launch import GluonLauncher
from attn_core.tiles.gluon_names import thread_barrier
from attn_core.tiles.hopper import accumulator_layout, exp2
from attn_core.tiles.softmax import LOG2_E as _LOG2_E
from attn_triangle._hopper import configs, problem
from attn_triangle._hopper.tiles import (
    LOG2_E,
    WG_ROWS,
    closed,
    load_bias,
    load_lse,
    load_mask,
    load_rows,
    load_wide,
    new_mask_rows,
    new_ring,
    new_tiles,
    num_steps,
)
from attn_triangle._triton.dbias import sum_of_splits
from attn_triangle.layout import scratch

_TILES_PER_SM = 4  # about: enough that the last ones to run do not matter
_FEWEST_ROWS = 8  # of a part: less work would be less than adding it up


@gluon.jit
def _tile_of(step, sizes):
    """Tile `step` of this CTA: batch, head, tile of queries and of keys, and its rows i."""
    H, R, num_tiles_m, num_tiles_n, num_heads, rows_per_split, total = sizes
    t = gl.program_id(0) + step * gl.num_programs(0)
    plane = t // num_tiles_n
    tile_n = t - plane * num_tiles_n
    tile_m = plane % num_tiles_m
    part = plane // num_tiles_m
    split = part // num_heads
    bh = part - split * num_heads
    b = bh // H
    first = split * rows_per_split
    return b, bh - b * H, tile_m, tile_n, split, first, gl.minimum(first + rows_per_split, R)


# fmt: off
@gluon.jit
def _load(
    args,
    HAS_MASK: gl.constexpr, TILES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """The loading warp: the bias of a tile, then what each row adds to its gradient."""
    descs, bufs, rings, sizes, strides = args
    q_desc, do_desc, k_desc, v_desc, bias_desc, mask_desc = descs
    q_buf, do_buf, k_buf, v_buf, bias_buf, mask_buf = bufs
    bias_full, bias_empty, full, empty = rings
    bias_strides, mask_steps = strides
    bias_b, bias_h = bias_strides
    mask_bytes: gl.constexpr = mask_desc.block_type.nbytes if HAS_MASK else 0
    row_bytes: gl.constexpr = 2 * q_desc.block_type.nbytes + TILES * (
        2 * k_desc.block_type.nbytes + mask_bytes
    )
    bias_bytes: gl.constexpr = TILES * bias_desc.block_type.nbytes
    count = 0
    for step in range(num_steps(sizes)):
        b, h, tile_m, tile_n, split, first, last = _tile_of(step, sizes)
        start_m = tile_m * WG_ROWS
        start_n = tile_n * (TILES * BLOCK_N)
        mbarrier.wait(bias_empty.index(0), (step & 1) ^ 1)
        mbarrier.expect(bias_full.index(0), bias_bytes)
        for w in gl.static_range(TILES):
            load_bias(
                bias_desc, b * bias_b, h * bias_h, start_m, start_n + w * BLOCK_N,
                bias_full.index(0), bias_buf.index(w),
            )  # fmt: skip
        for row in range(first, last):
            i = count % STAGES
            bar = full.index(i)
            mbarrier.wait(empty.index(i), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, row_bytes)
            load_rows(q_desc, b, h, row, start_m, bar, q_buf.index(i))
            load_rows(do_desc, b, h, row, start_m, bar, do_buf.index(i))
            for w in gl.static_range(TILES):
                n = start_n + w * BLOCK_N
                own = i * TILES + w
                load_rows(k_desc, b, h, row, n, bar, k_buf.index(own))
                load_rows(v_desc, b, h, row, n, bar, v_buf.index(own))
                if HAS_MASK:
                    load_mask(mask_desc, mask_steps, b, row, n, bar, mask_buf.index(own))
            count += 1


# fmt: off
@gluon.jit
def _sum(
    WARPGROUP: gl.constexpr, args,
    HAS_MASK: gl.constexpr, TILES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """A computing warpgroup: 64 queries by BLOCK_N keys of each tile."""
    bufs, rings, sizes, M, N, query_rows, parts_ptr, scale_log2 = args
    q_buf, do_buf, k_buf, v_buf, bias_buf, mask_buf = bufs
    bias_full, bias_empty, full, empty = rings
    lse_ptr, delta_ptr, columns = query_rows
    H, R, num_tiles_m, num_tiles_n, num_heads, rows_per_split, total = sizes
    S_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_N)
    zero = gl.zeros([WG_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    count = 0
    for step in range(num_steps(sizes)):
        b, h, tile_m, tile_n, split, first, last = _tile_of(step, sizes)
        start_m = tile_m * WG_ROWS
        start_n = (tile_n * TILES + WARPGROUP) * BLOCK_N
        offs_m = start_m + gl.arange(0, WG_ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
        bh_row = gl.to_tensor(b * H + h).to(gl.int64) * R + first
        lse_ptrs = lse_ptr + bh_row * M + offs_m
        delta_ptrs = delta_ptr + bh_row * columns + offs_m
        lse = load_lse(lse_ptrs, offs_m < M)
        delta = gl.load(delta_ptrs, mask=offs_m < M, other=0.0)
        dbias = zero
        mbarrier.wait(bias_full.index(0), step & 1)
        for row in range(first, last):
            i = count % STAGES
            own = i * TILES + WARPGROUP
            # Those of the next row, before anything waits, and used by nothing in this turn. Behind
            # the last row stands another one.
            lse_ptrs += M
            delta_ptrs += columns
            exists = offs_m < gl.minimum(M, (last - 1 - row) * columns)
            next_lse = load_lse(lse_ptrs, exists)
            next_delta = gl.load(delta_ptrs, mask=exists, other=0.0)
            mbarrier.wait(full.index(i), (count // STAGES) & 1)
            k = k_buf.index(own).permute((1, 0))
            v = v_buf.index(own).permute((1, 0))
            s = warpgroup_mma(q_buf.index(i), k, zero, use_acc=False, is_async=True)
            dp = warpgroup_mma(do_buf.index(i), v, zero, use_acc=False, is_async=True)
            bias = load_wide(bias_buf.index(WARPGROUP), S_LAYOUT)
            offset = bias * LOG2_E - gl.expand_dims(closed(lse), 1)
            if HAS_MASK:
                offset += mask_buf.index(own).load(S_LAYOUT)
            s = warpgroup_mma_wait(1, deps=(s,))
            p = exp2(s * scale_log2 + offset)
            dp = warpgroup_mma_wait(0, deps=(dp,))
            mbarrier.arrive(empty.index(i), count=1)
            dbias += p * (dp - gl.expand_dims(delta, 1))
            lse = next_lse
            delta = next_delta
            count += 1
        mbarrier.arrive(bias_empty.index(0), count=1)
        part = gl.to_tensor(split * num_heads + b * H + h).to(gl.int64) * M
        offs_n = start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
        offs = gl.expand_dims(part + offs_m, 1) * N + gl.expand_dims(offs_n, 0)
        mask = (gl.expand_dims(offs_m, 1) < M) & (gl.expand_dims(offs_n, 0) < N)
        gl.store(parts_ptr + offs, dbias, mask=mask)


# fmt: off
@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dbias_kernel(
    q_desc, k_desc, v_desc,
    bias_desc, bias_b, bias_h,  # strides of its batches and heads: 1, or 0 where it is broadcast
    mask_desc, mask_b, mask_r,  # rows of the mask between batches and rows; may be unread
    do_desc,
    lse_ptr,  # [B, H, R, M], contiguous
    delta_ptr, columns,  # [B, H, R, columns], contiguous
    parts_ptr,  # [splits, B, H, M, N], contiguous
    M, N, R, H, num_tiles, num_tiles_n, num_heads, rows_per_split, total,
    scale_log2,
    HAS_MASK: gl.constexpr, TILES: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    dtype: gl.constexpr = q_desc.dtype
    q_buf = new_tiles(dtype, STAGES, WG_ROWS, BLOCK_D)
    do_buf = new_tiles(dtype, STAGES, WG_ROWS, BLOCK_D)
    k_buf = new_tiles(dtype, STAGES * TILES, BLOCK_N, BLOCK_D)
    v_buf = new_tiles(dtype, STAGES * TILES, BLOCK_N, BLOCK_D)
    bias_buf = new_tiles(bias_desc.dtype, TILES, WG_ROWS, BLOCK_N)
    mask_buf = new_mask_rows(mask_desc, k_buf, HAS_MASK, STAGES * TILES, BLOCK_N)
    bias_full, bias_empty = new_ring(1, TILES)
    full, empty = new_ring(STAGES, TILES)
    thread_barrier()
    descs = (q_desc, do_desc, k_desc, v_desc, bias_desc, mask_desc)
    bufs = (q_buf, do_buf, k_buf, v_buf, bias_buf, mask_buf)
    rings = (bias_full, bias_empty, full, empty)
    sizes = (H, R, num_tiles, num_tiles_n, num_heads, rows_per_split, total)
    strides = ((bias_b, bias_h), (mask_b, mask_r))
    loading = (descs, bufs, rings, sizes, strides)
    query_rows = (lse_ptr, delta_ptr, columns)
    summing = (bufs, rings, sizes, M, N, query_rows, parts_ptr, scale_log2)
    gl.warp_specialize(
        [
            (_sum, (0, summing, HAS_MASK, TILES, BLOCK_N, STAGES)),
            (_sum, (1, summing, HAS_MASK, TILES, BLOCK_N, STAGES)),
            (_sum, (2, summing, HAS_MASK, TILES, BLOCK_N, STAGES)),
            (_load, (loading, HAS_MASK, TILES, BLOCK_N, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )


_launch = GluonLauncher(_attention_backward_dbias_kernel)


def dbias(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    readable: torch.Tensor,
    keys: problem.KeyRows,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    lent: torch.Tensor,
) -> torch.Tensor:
    """Return the gradient of the bias.

    `readable` is one of `problem.readable_bias`, `delta` of `rows.deltas`. The memory of `lent`, a
    result that is written later, may be used.
    """
    B, H, R, M, D = q.shape
    N = k.shape[3]
    block_d = tiling.padded_head_dim(D)
    plan = configs.BACKWARD_DBIAS[block_d].fit(R, bias.dtype)
    block_n = plan.block
    num_sms = device_info(q.device).num_sms
    num_tiles_m = tiling.ceil_div(M, 64)
    num_tiles_n = tiling.ceil_div(N, plan.tiles * block_n)
    tiles = num_tiles_m * num_tiles_n * B * H
    rows_per_split = tiling.ceil_div(R, tiling.ceil_div(_TILES_PER_SM * num_sms, tiles))
    rows_per_split = max(rows_per_split, _FEWEST_ROWS)
    splits = tiling.ceil_div(R, rows_per_split)
    parts = scratch((splits, B, H, M, N), lent)
    _launch(
        min(tiles * splits, num_sms),
        args=(
            problem.tiles(q, 64, block_d),
            problem.tiles(k, block_n, block_d),
            problem.tiles(v, block_n, block_d),
            problem.bias_tiles(readable, 64, block_n), *problem.broadcast_steps(readable),
            problem.row_pieces(keys.rows, block_n), *keys.steps,
            problem.tiles(dout, 64, block_d),
            lse,
            delta, delta.shape[1],
            parts,
            M, N, R, H, num_tiles_m, num_tiles_n, B * H, rows_per_split, tiles * splits,
            scale * _LOG2_E.value,
        ),
        constants={
            "HAS_MASK": keys.has_mask, "TILES": plan.tiles,
            "BLOCK_N": block_n, "BLOCK_D": block_d, "STAGES": plan.stages,
        },
        maxnreg=plan.registers,
    )  # fmt: skip
    return sum_of_splits(parts, bias)
