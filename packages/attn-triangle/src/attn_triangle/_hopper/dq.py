"""Gradients of queries for Hopper GPUs: a warpgroup owns 64 queries of one row i."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core import tiling
from attn_core.device import device_info
from attn_core.gluon_launch import GluonLauncher
from attn_core.tiles.hopper import accumulator_layout, exp2
from attn_core.tiles.softmax import LOG2_E as _LOG2_E
from attn_triangle._hopper import configs, problem
from attn_triangle._hopper.tiles import (
    LOG2_E,
    WG_ROWS,
    closed,
    key_blocks,
    load_lse,
    load_tiles,
    load_wide,
    moved,
    new_query_buffers,
    num_steps,
    place_of,
    rows_of,
    store_rows,
)


# fmt: off
@gluon.jit
def _load_numbers(
    query_rows, sizes, exists, place,
    ROW: gl.constexpr, TILE: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    # fmt: on
    """Begin to load lse and delta of 64 queries of a row, each [64]; unless exists, neither."""
    lse_ptr, M, delta_ptr, columns = query_rows
    H, R, num_tiles, num_groups, total = sizes
    b, h, group, tile = place
    row0, last = rows_of(group, sizes, ROWS)
    offs_m = gl.arange(0, WG_ROWS, layout=gl.SliceLayout(1, LAYOUT))
    offs_m += (tile * TILES + TILE) * WG_ROWS
    mask = offs_m < M * exists
    bh_row = gl.to_tensor(b * H + h).to(gl.int64) * R + gl.minimum(row0 + ROW, last)
    lse = load_lse(lse_ptr + bh_row * M + offs_m, mask)
    delta = gl.load(delta_ptr + bh_row * columns + offs_m, mask=mask, other=0.0)
    return lse, delta


# fmt: off
@gluon.jit
def _differentiate(
    WARPGROUP: gl.constexpr, args,
    HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """A computing warpgroup: 64 queries of one row of each tile."""
    loading, dq_desc, query_rows, scale, scale_log2 = args
    queries, streamed, rings, sizes, N, range_ptr, strides = loading
    query_descs, query_bufs = queries
    descs, bufs = streamed
    q_buf, do_buf = query_bufs
    k_buf, v_buf, bias_buf, mask_buf = bufs
    q_full, q_empty, full, empty = rings
    range_strides, bias_strides, mask_steps = strides
    dtype: gl.constexpr = dq_desc.dtype
    BLOCK_D: gl.constexpr = q_buf.shape[2]
    S_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_N)
    O_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_D)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    ROW: gl.constexpr = WARPGROUP // TILES
    TILE: gl.constexpr = WARPGROUP % TILES
    zero = gl.zeros([WG_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    count = 0
    steps = num_steps(sizes)
    place = place_of(gl.program_id(0), sizes)
    distance = place_of(gl.num_programs(0), sizes)
    next_lse, next_delta = _load_numbers(
        query_rows, sizes, 1, place, ROW, TILE, TILES, ROWS, S_LAYOUT
    )
    for step in range(steps):
        b, h, group, tile = place
        row0, last = rows_of(group, sizes, ROWS)
        lse = gl.expand_dims(closed(next_lse), 1)
        delta = gl.expand_dims(next_delta, 1)
        slot = step & 1
        if step > 0:  # the store of the tile before had time
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(slot ^ 1), count=1)
        mbarrier.wait(q_full.index(slot), (step >> 1) & 1)
        q = q_buf.index(slot * (ROWS * TILES) + WARPGROUP)
        do = do_buf.index(slot * (ROWS * TILES) + WARPGROUP)
        dq = gl.zeros([WG_ROWS, BLOCK_D], gl.float32, O_LAYOUT)
        lo, hi = key_blocks(range_ptr, range_strides, b, row0, last, N, HAS_RANGE, ROWS, BLOCK_N)
        for _ in range(lo, hi):
            i = count % STAGES
            own = i * ROWS + ROW
            mbarrier.wait(full.index(i), (count // STAGES) & 1)
            k = k_buf.index(own)
            v = v_buf.index(own).permute((1, 0))
            s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            dp = warpgroup_mma(do, v, zero, use_acc=False, is_async=True)
            bias = load_wide(bias_buf.index(i * TILES + TILE), S_LAYOUT)
            offset = bias * LOG2_E - lse
            if HAS_MASK:
                offset += mask_buf.index(own).load(S_LAYOUT)
            s = warpgroup_mma_wait(1, deps=(s,))
            p = exp2(s * scale_log2 + offset)
            dp = warpgroup_mma_wait(0, deps=(dp,))
            ds = p * (dp - delta)
            ds_operand = gl.convert_layout(ds.to(dtype), P_LAYOUT, assert_trivial=True)
            dq = warpgroup_mma(ds_operand, k, dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            mbarrier.arrive(empty.index(i), count=1)
            count += 1
        # Of the next tile, beside what ends this one.
        place = moved(place, distance, sizes)
        exists = gl.where(step + 1 < steps, 1, 0)
        next_lse, next_delta = _load_numbers(
            query_rows, sizes, exists, place, ROW, TILE, TILES, ROWS, S_LAYOUT
        )
        row = gl.minimum(row0 + ROW, last)
        start_m = (tile * TILES + TILE) * WG_ROWS
        store_rows(dq * scale, q, dq_desc, b, h, row, start_m)
    tma.store_wait(0)


# fmt: off
@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dq_kernel(
    q_desc, k_desc, v_desc,
    bias_desc, bias_b, bias_h,  # strides of its batches and heads: 1, or 0 where it is broadcast
    mask_desc, mask_b, mask_r,  # rows of the mask between batches and rows; as range, may be unread
    range_ptr, range_b, range_r,  # [B, R, 2]
    do_desc,
    lse_ptr,  # [B, H, R, M], contiguous
    delta_ptr, columns,  # [B, H, R, columns], contiguous
    dq_desc,
    M, N, R, H, num_tiles, num_groups, total,
    scale, scale_log2,
    HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    query_bufs, bufs, rings = new_query_buffers(
        q_desc, bias_desc, mask_desc,
        HAS_MASK, TILES, ROWS, BLOCK_N, BLOCK_D, STAGES, READERS=TILES * ROWS,
    )  # fmt: skip
    queries = ((q_desc, do_desc), query_bufs)
    streamed = ((k_desc, v_desc, bias_desc, mask_desc), bufs)
    sizes = (H, R, num_tiles, num_groups, total)
    strides = ((range_b, range_r), (bias_b, bias_h), (mask_b, mask_r))
    loading = (queries, streamed, rings, sizes, N, range_ptr, strides)
    computing = (loading, dq_desc, (lse_ptr, M, delta_ptr, columns), scale, scale_log2)
    gl.warp_specialize(
        [
            (_differentiate, (0, computing, HAS_MASK, HAS_RANGE, TILES, ROWS, BLOCK_N, STAGES)),
            (_differentiate, (1, computing, HAS_MASK, HAS_RANGE, TILES, ROWS, BLOCK_N, STAGES)),
            (_differentiate, (2, computing, HAS_MASK, HAS_RANGE, TILES, ROWS, BLOCK_N, STAGES)),
            (load_tiles, (loading, HAS_MASK, HAS_RANGE, TILES, ROWS, BLOCK_N, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )


_launch = GluonLauncher(_attention_backward_dq_kernel)


def dq(
    dq: torch.Tensor,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    keys: problem.KeyRows,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
) -> None:
    """Fill dq; `bias` is one of `problem.readable_bias`, `delta` of `rows.deltas`."""
    B, H, R, M, D = q.shape
    N = k.shape[3]
    block_d = tiling.padded_head_dim(D)
    plan = configs.BACKWARD_DQ[block_d].fit(R, bias.dtype)
    block_n = plan.block
    num_tiles, num_groups = tiling.ceil_div(M, 64 * plan.tiles), tiling.ceil_div(R, plan.rows)
    total = num_tiles * num_groups * B * H
    _launch(
        min(total, device_info(q.device).num_sms),
        args=(
            problem.tiles(q, 64, block_d),
            problem.tiles(k, block_n, block_d),
            problem.tiles(v, block_n, block_d),
            problem.bias_tiles(bias, 64, block_n), *problem.broadcast_steps(bias),
            problem.row_pieces(keys.rows, block_n), *keys.steps,
            keys.range, *keys.range_strides,
            problem.tiles(dout, 64, block_d),
            lse,
            delta, delta.shape[1],
            problem.tiles(dq, 64, block_d),
            M, N, R, H, num_tiles, num_groups, total,
            scale, scale * _LOG2_E.value,
        ),
        constants={
            "HAS_MASK": keys.has_mask, "HAS_RANGE": keys.has_range,
            "TILES": plan.tiles, "ROWS": plan.rows,
            "BLOCK_N": block_n, "BLOCK_D": block_d, "STAGES": plan.stages,
        },
        maxnreg=plan.registers,
    )  # fmt: skip
