"""Gradients of queries for Hopper GPUs: a warpgroup owns 64 queries of two rows i.

Where the order of a sum does not matter to the caller, the gradient of the bias comes along: dS,
added up over the two rows, goes to memory by atomic additions.
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
from attn_core.launch import Launcher
from attn_core.tiles.softmax import LOG2_E
from attn_triangle._hopper import configs, problem
from attn_triangle._hopper.tiles import (
    CLOSED,
    ROWS,
    WG_ROWS,
    exp2,
    key_blocks,
    load_keys,
    load_rows,
    new_ring,
    num_steps,
    store_rows,
    tile_of,
)


# fmt: off
@gluon.jit
def _load(
    descs, bufs, rings, sizes, N, range_ptr, strides,
    HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr, WARPGROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """The loading warp: queries and dO of a tile, then its blocks of keys, values and bias."""
    q_desc, do_desc, k_desc, v_desc, bias_desc, mask_desc = descs
    q_buf, do_buf, k_buf, v_buf, bias_buf, mask_buf = bufs
    q_full, q_empty, full, empty = rings
    range_strides, bias_strides, mask_steps = strides
    q_bytes: gl.constexpr = 2 * ROWS * WARPGROUPS * q_desc.block_type.nbytes
    count = 0
    for step in range(num_steps(sizes)):
        b, h, row0, row1, tile = tile_of(step, sizes)
        start_m = tile * (WARPGROUPS * WG_ROWS)
        mbarrier.wait(q_empty.index(0), (step & 1) ^ 1)
        mbarrier.expect(q_full.index(0), q_bytes)
        for w in gl.static_range(WARPGROUPS):
            m = start_m + w * WG_ROWS
            load_rows(q_desc, b, h, row0, m, q_full.index(0), q_buf.index(w * ROWS))
            load_rows(q_desc, b, h, row1, m, q_full.index(0), q_buf.index(w * ROWS + 1))
            load_rows(do_desc, b, h, row0, m, q_full.index(0), do_buf.index(w * ROWS))
            load_rows(do_desc, b, h, row1, m, q_full.index(0), do_buf.index(w * ROWS + 1))
        lo, hi = key_blocks(range_ptr, range_strides, b, row0, row1, N, HAS_RANGE, BLOCK_N)
        count = load_keys(
            (k_desc, v_desc, bias_desc, mask_desc), (k_buf, v_buf, bias_buf, mask_buf),
            (full, empty), (bias_strides, mask_steps), count, b, h, row0, row1, start_m, lo, hi,
            HAS_MASK, WARPGROUPS, BLOCK_N, STAGES,
        )  # fmt: skip


# fmt: off
@gluon.jit
def _differentiate(
    descs, bufs, rings, sizes, M, N, range_ptr, strides, lse_ptr, delta_ptr, columns,
    dq_ptr, dq_strides, dbias_ptr, dbias_steps, dbias_blocks, scale, scale_log2,
    WARPGROUP: gl.constexpr, HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr,
    HAS_RANGE: gl.constexpr, HAS_DBIAS: gl.constexpr, WARPGROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """A computing warpgroup: 64 queries of both rows of each tile."""
    q_buf, do_buf, k_buf, v_buf, bias_buf, mask_buf = bufs
    q_full, q_empty, full, empty = rings
    range_strides, bias_strides, mask_steps = strides
    H, R, num_tiles, num_groups, total = sizes
    dbias_b, dbias_h = dbias_steps
    dbias_columns = dbias_blocks * 128
    dtype: gl.constexpr = q_buf.dtype
    BLOCK_D: gl.constexpr = q_buf.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    q0 = q_buf.index(WARPGROUP * ROWS)
    q1 = q_buf.index(WARPGROUP * ROWS + 1)
    do0 = do_buf.index(WARPGROUP * ROWS)
    do1 = do_buf.index(WARPGROUP * ROWS + 1)
    count = 0
    for step in range(num_steps(sizes)):
        b, h, row0, row1, tile = tile_of(step, sizes)
        start_m = (tile * WARPGROUPS + WARPGROUP) * WG_ROWS
        offs_m = start_m + gl.arange(0, WG_ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
        first = gl.to_tensor(b * H + h).to(gl.int64) * R
        at0 = (first + row0) * columns + offs_m
        at1 = (first + row1) * columns + offs_m
        lse0 = gl.expand_dims(gl.load(lse_ptr + at0), 1)
        # A group of one row goes through it twice, the second time without weight.
        lse1 = gl.load(lse_ptr + at1, mask=offs_m < (row1 - row0) * columns, other=CLOSED)
        lse1 = gl.expand_dims(lse1, 1)
        delta0 = gl.expand_dims(gl.load(delta_ptr + at0), 1)
        delta1 = gl.expand_dims(gl.load(delta_ptr + at1), 1)
        mbarrier.wait(q_full.index(0), step & 1)
        dq0 = gl.zeros([WG_ROWS, BLOCK_D], gl.float32, O_LAYOUT)
        dq1 = dq0
        plane = gl.to_tensor(b * dbias_b + h * dbias_h).to(gl.int64) * dbias_columns
        offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
        offs = gl.expand_dims(offs_m * dbias_columns, 1) + gl.expand_dims(offs_n, 0)
        lo, hi = key_blocks(range_ptr, range_strides, b, row0, row1, N, HAS_RANGE, BLOCK_N)
        for block in range(lo, hi):
            i = count % STAGES
            mbarrier.wait(full.index(i), (count // STAGES) & 1)
            k0 = k_buf.index(i * ROWS)
            k1 = k_buf.index(i * ROWS + 1)
            v0 = v_buf.index(i * ROWS)
            v1 = v_buf.index(i * ROWS + 1)
            zero = gl.zeros([WG_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
            bias = bias_buf.index(i * WARPGROUPS + WARPGROUP).load(S_LAYOUT)
            start0 = bias
            start1 = bias
            if HAS_MASK:
                start0 = bias + mask_buf.index(i * ROWS).load(S_LAYOUT)
                start1 = bias + mask_buf.index(i * ROWS + 1).load(S_LAYOUT)
            s0 = warpgroup_mma(q0, k0.permute((1, 0)), start0, is_async=True)
            dp0 = warpgroup_mma(do0, v0.permute((1, 0)), zero, use_acc=False, is_async=True)
            s1 = warpgroup_mma(q1, k1.permute((1, 0)), start1, is_async=True)
            s0 = warpgroup_mma_wait(2, deps=(s0,))
            p0 = exp2(s0 * scale_log2 - lse0)
            dp0 = warpgroup_mma_wait(1, deps=(dp0,))
            ds0 = p0 * (dp0 - delta0)
            ds0_operand = gl.convert_layout(ds0.to(dtype), P_LAYOUT, assert_trivial=True)
            next0 = warpgroup_mma(ds0_operand, k0, dq0, is_async=True)
            dp1 = warpgroup_mma(do1, v1.permute((1, 0)), zero, use_acc=False, is_async=True)
            s1 = warpgroup_mma_wait(2, deps=(s1,))
            p1 = exp2(s1 * scale_log2 - lse1)
            dp1, dq0 = warpgroup_mma_wait(0, deps=(dp1, next0))
            ds1 = p1 * (dp1 - delta1)
            ds1_operand = gl.convert_layout(ds1.to(dtype), P_LAYOUT, assert_trivial=True)
            next1 = warpgroup_mma(ds1_operand, k1, dq1, is_async=True)
            if HAS_DBIAS:
                dbias_ptrs = dbias_ptr + (plane + block * BLOCK_N) + offs
                gl.atomic_add(dbias_ptrs, ds0 + ds1, sem="relaxed")
            # Nothing may be in flight over the edge of the loop: ptxas would put all in sequence.
            dq1 = warpgroup_mma_wait(0, deps=(next1,))
            mbarrier.arrive(empty.index(i), count=1)
            count += 1
        mbarrier.arrive(q_empty.index(0), count=1)
        store_rows(dq0 * scale, b, h, row0, start_m, M, dq_ptr, dq_strides, HEAD_DIM, O_LAYOUT)
        if row1 > row0:
            store_rows(dq1 * scale, b, h, row1, start_m, M, dq_ptr, dq_strides, HEAD_DIM, O_LAYOUT)


# fmt: off
@gluon.jit
def _differentiate_first(
    descs, bufs, rings, sizes, M, N, range_ptr, strides, lse_ptr, delta_ptr, columns,
    dq_ptr, dq_strides, dbias_ptr, dbias_steps, dbias_blocks, scale, scale_log2,
    HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr,
    HAS_DBIAS: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    _differentiate(
        descs, bufs, rings, sizes, M, N, range_ptr, strides, lse_ptr, delta_ptr, columns,
        dq_ptr, dq_strides, dbias_ptr, dbias_steps, dbias_blocks, scale, scale_log2,
        0, HEAD_DIM, HAS_MASK, HAS_RANGE, HAS_DBIAS, WARPGROUPS, BLOCK_N, STAGES,
    )


@gluon.jit
def _differentiate_second(
    descs, bufs, rings, sizes, M, N, range_ptr, strides, lse_ptr, delta_ptr, columns,
    dq_ptr, dq_strides, dbias_ptr, dbias_steps, dbias_blocks, scale, scale_log2,
    HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr,
    HAS_DBIAS: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    _differentiate(
        descs, bufs, rings, sizes, M, N, range_ptr, strides, lse_ptr, delta_ptr, columns,
        dq_ptr, dq_strides, dbias_ptr, dbias_steps, dbias_blocks, scale, scale_log2,
        1, HEAD_DIM, HAS_MASK, HAS_RANGE, HAS_DBIAS, WARPGROUPS, BLOCK_N, STAGES,
    )


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dq_kernel(
    q_desc, k_desc, v_desc,
    bias_desc, bias_b, bias_h,  # strides of its batches and heads: 1, or 0 where it is broadcast
    mask_desc, mask_b, mask_r,  # rows of the mask between batches and rows; as range, may be unread
    range_ptr, range_b, range_r,  # [B, R, 2]
    do_desc,
    lse_ptr, delta_ptr, columns,  # [B, H, R, columns], as of rows.query_rows
    dq_ptr, stride_dqb, stride_dqh, stride_dqr, stride_dqm, stride_dqd,
    dbias_ptr, dbias_b, dbias_h,  # in rows of dbias_blocks * 128 columns; only with HAS_DBIAS
    M, N, R, H, dbias_blocks, num_tiles, num_groups, total,
    scale, scale_log2,
    HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr,
    HAS_DBIAS: gl.constexpr, WARPGROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    dtype: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * BLOCK_D), 16, rank=2)
    BITS: gl.constexpr = bias_desc.dtype.primitive_bitwidth
    BIAS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, BLOCK_N * BITS // 8), BITS, rank=2)
    own: gl.constexpr = [ROWS * WARPGROUPS, WG_ROWS, BLOCK_D]
    streamed: gl.constexpr = [STAGES * ROWS, BLOCK_N, BLOCK_D]
    q_buf = gl.allocate_shared_memory(dtype, own, LAYOUT)
    do_buf = gl.allocate_shared_memory(dtype, own, LAYOUT)
    k_buf = gl.allocate_shared_memory(dtype, streamed, LAYOUT)
    v_buf = gl.allocate_shared_memory(dtype, streamed, LAYOUT)
    bias_buf = gl.allocate_shared_memory(
        bias_desc.dtype, [STAGES * WARPGROUPS, WG_ROWS, BLOCK_N], BIAS_LAYOUT
    )
    mask_buf = k_buf
    if HAS_MASK:
        mask_buf = gl.allocate_shared_memory(
            gl.float32, [STAGES * ROWS, 1, BLOCK_N], mask_desc.layout
        )
    q_full, q_empty = new_ring(1, WARPGROUPS)
    full, empty = new_ring(STAGES, WARPGROUPS)
    gl.thread_barrier()
    descs = (q_desc, do_desc, k_desc, v_desc, bias_desc, mask_desc)
    bufs = (q_buf, do_buf, k_buf, v_buf, bias_buf, mask_buf)
    rings = (q_full, q_empty, full, empty)
    sizes = (H, R, num_tiles, num_groups, total)
    strides = ((range_b, range_r), (bias_b, bias_h), (mask_b, mask_r))
    dq_strides = (stride_dqb, stride_dqh, stride_dqr, stride_dqm, stride_dqd)
    dbias_steps = (dbias_b, dbias_h)
    gl.warp_specialize(
        [
            (_differentiate_first, (
                descs, bufs, rings, sizes, M, N, range_ptr, strides, lse_ptr, delta_ptr, columns,
                dq_ptr, dq_strides, dbias_ptr, dbias_steps, dbias_blocks,
                scale, scale_log2,
                HEAD_DIM, HAS_MASK, HAS_RANGE, HAS_DBIAS, WARPGROUPS, BLOCK_N, STAGES,
            )),
            (_differentiate_second, (
                descs, bufs, rings, sizes, M, N, range_ptr, strides, lse_ptr, delta_ptr, columns,
                dq_ptr, dq_strides, dbias_ptr, dbias_steps, dbias_blocks,
                scale, scale_log2,
                HEAD_DIM, HAS_MASK, HAS_RANGE, HAS_DBIAS, WARPGROUPS, BLOCK_N, STAGES,
            )),
            (_load, (
                descs, bufs, rings, sizes, N, range_ptr, strides,
                HAS_MASK, HAS_RANGE, WARPGROUPS, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# With 168 registers a thread to share out, both computing warpgroups can have 240.
_launch = Launcher(_attention_backward_dq_kernel, maxnreg=168)


def dq(
    dq: torch.Tensor,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scaled_bias: torch.Tensor,
    keys: problem.KeyRows,
    rows: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    needs_dbias: bool,
) -> torch.Tensor | None:
    """Fill dq and, if asked, return the gradient of the bias, whose bits may differ every time.

    `rows` are those of `rows.query_rows`.
    """
    B, H, R, M, D = q.shape
    N = k.shape[3]
    block_d = tiling.padded_head_dim(D)
    config = configs.BACKWARD_DQ[block_d]
    block_n = config.block_n
    num_tiles, num_groups = tiling.ceil_div(M, config.block_m), tiling.ceil_div(R, 2)
    total = num_tiles * num_groups * B * H
    lse_log2, delta = rows
    dbias, steps = delta, (0, 0)
    if needs_dbias:
        planes = (bias.shape[0], bias.shape[1], problem.whole(M, 128), problem.whole(N, 128))
        dbias = delta.new_zeros(planes)
        step_b, step_h = problem.broadcast_steps(bias)
        steps = (step_b * planes[1] * planes[2], step_h * planes[2])
    dq_strides = dq.stride()
    _launch(
        min(total, device_info(q.device).num_sms),
        strides=dq_strides,
        args=(
            problem.tile_descriptor(q, 64, block_d),
            problem.tile_descriptor(k, block_n, block_d),
            problem.tile_descriptor(v, block_n, block_d),
            problem.bias_descriptor(scaled_bias, 64, block_n),
            *problem.broadcast_steps(scaled_bias),
            problem.row_descriptor(keys.rows, block_n), *keys.steps,
            keys.range, *keys.range_strides,
            problem.tile_descriptor(dout, 64, block_d),
            lse_log2, delta, delta.shape[1],
            dq, *dq_strides,
            dbias, *steps,
            M, N, R, H, tiling.ceil_div(N, 128), num_tiles, num_groups, total,
            scale, scale * LOG2_E.value,
        ),
        constexprs={
            "HEAD_DIM": D, "HAS_MASK": keys.has_mask, "HAS_RANGE": keys.has_range,
            "HAS_DBIAS": needs_dbias, "WARPGROUPS": config.block_m // 64,
            "BLOCK_N": block_n, "BLOCK_D": block_d, "STAGES": config.num_stages,
        },
        config=config,
    )  # fmt: skip
    return dbias[..., :M, :N].sum_to_size(bias.shape).to(bias.dtype) if needs_dbias else None
