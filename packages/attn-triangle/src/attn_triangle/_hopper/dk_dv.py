"""Gradients of keys and values for Hopper GPUs: a warpgroup owns 64 keys of one row i.

Tiles of scores are transposed, keys by queries, so that P^T and dS^T are the left operands of their
products straight from registers. The bias is transposed on its way there.
"""

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
from attn_core.tiles.gluon_names import thread_barrier, tma_load
from attn_core.tiles.hopper import accumulator_layout, exp2
from attn_core.tiles.softmax import LOG2_E as _LOG2_E
from attn_triangle._hopper import configs, problem
from attn_triangle._hopper.tiles import (
    LOG2_E,
    WG_ROWS,
    closed,
    load_bias,
    load_lse,
    load_rows,
    load_wide,
    moved,
    new_ring,
    new_tiles,
    num_steps,
    place_of,
    rows_of,
    store_rows,
    visible_keys,
)


@gluon.jit
def _rotated(place, sizes):
    """A place with another tile in every group of rows.

    Tiles of masked keys cost nothing, and without it some CTAs would meet them again and again and
    the others never.
    """
    H, R, num_tiles, num_groups, total = sizes
    b, h, group, tile = place
    return b, h, group, (tile + group) % num_tiles


@gluon.jit
def _num_blocks(
    range_ptr, strides, b, row0, last, start_n, M,
    HAS_RANGE: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Blocks of queries to go through: none for a tile of keys that no row sees."""
    blocks = gl.cdiv(M, BLOCK)
    if HAS_RANGE:
        start, end = visible_keys(range_ptr, strides, b, row0, last, ROWS)
        blocks = gl.where((start_n < end) & (start_n + TILE > start), blocks, 0)
    return blocks


# fmt: off
@gluon.jit
def _load(
    args,
    HAS_RANGE: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    # fmt: on
    """The loading warp: keys and values of a tile, then its blocks of queries and their rows."""
    descs, bufs, rings, sizes, M, lse_ptr, range_ptr, strides = args
    k_desc, v_desc, q_desc, do_desc, bias_desc, delta_desc, dk_desc, dv_desc = descs
    k_buf, v_buf, q_buf, do_buf, bias_buf, lse_buf, delta_buf = bufs
    k_full, k_empty, full, empty = rings
    range_strides, bias_strides = strides
    bias_b, bias_h = bias_strides
    LSE_LAYOUT: gl.constexpr = gl.BlockedLayout([1, BLOCK_M // 32], [1, 32], [1, 1], [1, 0])
    offs_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, LSE_LAYOUT))
    H, R, num_tiles, num_groups, total = sizes
    k_bytes: gl.constexpr = 2 * ROWS * TILES * k_desc.block_type.nbytes
    block_bytes: gl.constexpr = (
        ROWS * (2 * q_desc.block_type.nbytes + delta_desc.block_type.nbytes)
        + TILES * bias_desc.block_type.nbytes
    )
    count = 0
    place = place_of(gl.program_id(0), sizes)
    distance = place_of(gl.num_programs(0), sizes)
    for step in range(num_steps(sizes)):
        b, h, group, tile = _rotated(place, sizes)
        row0, last = rows_of(group, sizes, ROWS)
        start_n = tile * (TILES * WG_ROWS)
        bh_row = gl.to_tensor(b * H + h).to(gl.int64) * R
        slot = step & 1
        bar = k_full.index(slot)
        mbarrier.wait(k_empty.index(slot), ((step >> 1) & 1) ^ 1)
        mbarrier.expect(bar, k_bytes)
        for x in gl.static_range(ROWS):
            row = gl.minimum(row0 + x, last)
            for w in gl.static_range(TILES):
                own = (slot * ROWS + x) * TILES + w
                load_rows(k_desc, b, h, row, start_n + w * WG_ROWS, bar, k_buf.index(own))
                load_rows(v_desc, b, h, row, start_n + w * WG_ROWS, bar, v_buf.index(own))
        blocks = _num_blocks(
            range_ptr, range_strides, b, row0, last, start_n, M,
            HAS_RANGE, ROWS, TILES * WG_ROWS, BLOCK_M,
        )  # fmt: skip
        for block in range(blocks):
            i = count % STAGES
            bar = full.index(i)
            start_m = block * BLOCK_M
            lse = ()
            for x in gl.static_range(ROWS):
                lse_ptrs = lse_ptr + (bh_row + gl.minimum(row0 + x, last)) * M + start_m + offs_m
                lse += (load_lse(lse_ptrs, offs_m < M - start_m),)
            mbarrier.wait(empty.index(i), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, block_bytes)
            for x in gl.static_range(ROWS):
                row = gl.minimum(row0 + x, last)
                own = i * ROWS + x
                load_rows(q_desc, b, h, row, start_m, bar, q_buf.index(own))
                load_rows(do_desc, b, h, row, start_m, bar, do_buf.index(own))
                at = [(b * H + h) * R + row, start_m]
                tma_load(delta_desc, at, bar, delta_buf.index(own))
            for w in gl.static_range(TILES):
                load_bias(
                    bias_desc, b * bias_b, h * bias_h, start_m, start_n + w * WG_ROWS,
                    bar, bias_buf.index(i * TILES + w),
                )  # fmt: skip
            for x in gl.static_range(ROWS):
                lse_buf.index(i * ROWS + x).store(gl.expand_dims(closed(lse[x]), 0))
            mbarrier.arrive(bar, count=1)
            count += 1
        place = moved(place, distance, sizes)


@gluon.jit
def _visible(
    mask_ptr, mask_steps, columns, b, row, start_n, N, LAYOUT: gl.constexpr
):
    """Which of 64 keys the mask leaves visible, [64, 1]."""
    step_b, step_r = mask_steps
    mask_row = gl.to_tensor(b * step_b + row * step_r).to(gl.int64)
    offs = start_n + gl.arange(0, WG_ROWS, layout=gl.SliceLayout(1, LAYOUT))
    shut = gl.load(mask_ptr + mask_row * columns + offs, mask=offs < N, other=0.0)
    return gl.expand_dims(shut == 0.0, 1)


# fmt: off
@gluon.jit
def _differentiate(
    WARPGROUP: gl.constexpr, args,
    HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """A computing warpgroup: 64 keys of one row of each tile."""
    loading, N, mask, scale, scale_log2 = args
    descs, bufs, rings, sizes, M, lse_ptr, range_ptr, strides = loading
    k_desc, v_desc, q_desc, do_desc, bias_desc, delta_desc, dk_desc, dv_desc = descs
    k_buf, v_buf, q_buf, do_buf, bias_buf, lse_buf, delta_buf = bufs
    k_full, k_empty, full, empty = rings
    range_strides, bias_strides = strides
    mask_ptr, mask_steps, columns = mask
    dtype: gl.constexpr = k_desc.dtype
    BLOCK_D: gl.constexpr = k_buf.shape[2]
    S_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_M)
    O_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_D)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    ROW: gl.constexpr = WARPGROUP // TILES
    TILE: gl.constexpr = WARPGROUP % TILES
    zero = gl.zeros([WG_ROWS, BLOCK_M], gl.float32, S_LAYOUT)
    count = 0
    place = place_of(gl.program_id(0), sizes)
    distance = place_of(gl.num_programs(0), sizes)
    for step in range(num_steps(sizes)):
        b, h, group, tile = _rotated(place, sizes)
        row0, last = rows_of(group, sizes, ROWS)
        row = gl.minimum(row0 + ROW, last)
        start_n = (tile * TILES + TILE) * WG_ROWS
        slot = step & 1
        if step > 0:  # the stores of the tile before had time
            tma.store_wait(0)
            mbarrier.arrive(k_empty.index(slot ^ 1), count=1)
        mbarrier.wait(k_full.index(slot), (step >> 1) & 1)
        k = k_buf.index(slot * (ROWS * TILES) + WARPGROUP)
        v = v_buf.index(slot * (ROWS * TILES) + WARPGROUP)
        dk = gl.zeros([WG_ROWS, BLOCK_D], gl.float32, O_LAYOUT)
        dv = dk
        blocks = _num_blocks(
            range_ptr, range_strides, b, row0, last, tile * (TILES * WG_ROWS), M,
            HAS_RANGE, ROWS, TILES * WG_ROWS, BLOCK_M,
        )  # fmt: skip
        for _ in range(blocks):
            i = count % STAGES
            own = i * ROWS + ROW
            mbarrier.wait(full.index(i), (count // STAGES) & 1)
            q = q_buf.index(own)
            do = do_buf.index(own)
            s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
            bias = load_wide(bias_buf.index(i * TILES + TILE).permute((1, 0)), S_LAYOUT)
            offset = bias * LOG2_E - lse_buf.index(own).load(S_LAYOUT)
            s = warpgroup_mma_wait(1, deps=(s,))
            p = exp2(s * scale_log2 + offset)
            p_operand = gl.convert_layout(p.to(dtype), P_LAYOUT, assert_trivial=True)
            next_dv = warpgroup_mma(p_operand, do, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            ds = p * (dp - delta_buf.index(own).load(S_LAYOUT))
            ds_operand = gl.convert_layout(ds.to(dtype), P_LAYOUT, assert_trivial=True)
            next_dk = warpgroup_mma(ds_operand, q, dk, is_async=True)
            # Nothing may be in flight over the edge of the loop: ptxas would put all in sequence.
            dv, dk = warpgroup_mma_wait(0, deps=(next_dv, next_dk))
            mbarrier.arrive(empty.index(i), count=1)
            count += 1
        if HAS_MASK:
            # The loop took every key for visible. Keys do not mix: what a hidden one gathered, NaN
            # if its scores overflowed, ends here.
            visible = _visible(mask_ptr, mask_steps, columns, b, row, start_n, N, O_LAYOUT)
            dk = gl.where(visible, dk, 0.0)
            dv = gl.where(visible, dv, 0.0)
        store_rows(dk * scale, k, dk_desc, b, h, row, start_n)
        store_rows(dv, v, dv_desc, b, h, row, start_n)
        place = moved(place, distance, sizes)
    tma.store_wait(0)


# fmt: off
@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dk_dv_kernel(
    q_desc, k_desc, v_desc,
    bias_desc, bias_b, bias_h,  # strides of its batches and heads: 1, or 0 where it is broadcast
    mask_ptr, mask_b, mask_r, columns,  # [rows, columns], and rows between batches and rows i
    range_ptr, range_b, range_r,  # [B, R, 2]
    do_desc,
    lse_ptr,  # [B, H, R, M], contiguous
    delta_desc,
    dk_desc, dv_desc,
    M, N, R, H, num_tiles, num_groups, total,
    scale, scale_log2,
    HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    dtype: gl.constexpr = q_desc.dtype
    WARPGROUPS: gl.constexpr = TILES * ROWS
    k_buf = new_tiles(dtype, 2 * WARPGROUPS, WG_ROWS, BLOCK_D)
    v_buf = new_tiles(dtype, 2 * WARPGROUPS, WG_ROWS, BLOCK_D)
    q_buf = new_tiles(dtype, STAGES * ROWS, BLOCK_M, BLOCK_D)
    do_buf = new_tiles(dtype, STAGES * ROWS, BLOCK_M, BLOCK_D)
    bias_buf = new_tiles(bias_desc.dtype, STAGES * TILES, BLOCK_M, WG_ROWS)
    numbers: gl.constexpr = [STAGES * ROWS, 1, BLOCK_M]
    lse_buf = gl.allocate_shared_memory(gl.float32, numbers, delta_desc.layout)
    delta_buf = gl.allocate_shared_memory(gl.float32, numbers, delta_desc.layout)
    k_full, k_empty = new_ring(2, WARPGROUPS)
    full, empty = new_ring(STAGES, WARPGROUPS, WRITERS=2)  # the copy engine and the loading warp
    thread_barrier()
    descs = (k_desc, v_desc, q_desc, do_desc, bias_desc, delta_desc, dk_desc, dv_desc)
    bufs = (k_buf, v_buf, q_buf, do_buf, bias_buf, lse_buf, delta_buf)
    rings = (k_full, k_empty, full, empty)
    sizes = (H, R, num_tiles, num_groups, total)
    strides = ((range_b, range_r), (bias_b, bias_h))
    mask = (mask_ptr, (mask_b, mask_r), columns)
    loading = (descs, bufs, rings, sizes, M, lse_ptr, range_ptr, strides)
    computing = (loading, N, mask, scale, scale_log2)
    gl.warp_specialize(
        [
            (_differentiate, (0, computing, HAS_MASK, HAS_RANGE, TILES, ROWS, BLOCK_M, STAGES)),
            (_differentiate, (1, computing, HAS_MASK, HAS_RANGE, TILES, ROWS, BLOCK_M, STAGES)),
            (_differentiate, (2, computing, HAS_MASK, HAS_RANGE, TILES, ROWS, BLOCK_M, STAGES)),
            (_load, (loading, HAS_RANGE, TILES, ROWS, BLOCK_M, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )


_launch = GluonLauncher(_attention_backward_dk_dv_kernel)


def dk_dv(
    dk: torch.Tensor,
    dv: torch.Tensor,
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
    """Fill dk and dv; `bias` is one of `problem.readable_bias`, `delta` of `rows.deltas`."""
    B, H, R, M, D = q.shape
    N = k.shape[3]
    block_d = tiling.padded_head_dim(D)
    plan = configs.BACKWARD_DK_DV[block_d].fit(R, bias.dtype)
    block_m = plan.block
    num_tiles, num_groups = tiling.ceil_div(N, 64 * plan.tiles), tiling.ceil_div(R, plan.rows)
    total = num_tiles * num_groups * B * H
    _launch(
        min(total, device_info(q.device).num_sms),
        args=(
            problem.tiles(q, block_m, block_d),
            problem.tiles(k, 64, block_d),
            problem.tiles(v, 64, block_d),
            problem.bias_tiles(bias, block_m, 64), *problem.broadcast_steps(bias),
            keys.rows, *keys.steps, keys.rows.shape[1],
            keys.range, *keys.range_strides,
            problem.tiles(dout, block_m, block_d),
            lse,
            problem.row_pieces(delta, block_m),
            problem.tiles(dk, 64, block_d),
            problem.tiles(dv, 64, block_d),
            M, N, R, H, num_tiles, num_groups, total,
            scale, scale * _LOG2_E.value,
        ),
        constants={
            "HAS_MASK": keys.has_range, "HAS_RANGE": keys.has_range,
            "TILES": plan.tiles, "ROWS": plan.rows,
            "BLOCK_M": block_m, "BLOCK_D": block_d, "STAGES": plan.stages,
        },
        maxnreg=plan.registers,
    )  # fmt: skip
