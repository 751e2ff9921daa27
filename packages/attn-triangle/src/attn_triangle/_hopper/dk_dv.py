"""Gradients of keys and values for Hopper GPUs: a warpgroup owns 64 keys of one or two rows i.

Two rows share a tile of the bias where there are registers for the results of both.

Tiles of scores are transposed, keys by queries, so that P^T and dS^T are the left operands of their
products straight from registers. The bias is needed transposed too.
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
from attn_core.launch import Launcher
from attn_core.tiles.softmax import LOG2_E
from attn_triangle._hopper import configs, problem
from attn_triangle._hopper.tiles import (
    WG_ROWS,
    exp2,
    load_bias,
    load_rows,
    new_ring,
    num_steps,
    scaled_bias,
    store_rows,
    tile_of,
)

_BIAS_FACTOR = gl.constexpr(LOG2_E.value)


@gluon.jit
def _num_blocks(
    range_ptr, strides, b, row0, row1, start_n, M,
    HAS_RANGE: gl.constexpr, TILE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Blocks of queries to go through: none for a tile of keys that neither row sees."""
    blocks = gl.cdiv(M, BLOCK)
    if HAS_RANGE:
        stride_b, stride_r = strides
        ptr0 = range_ptr + b * stride_b + row0 * stride_r
        ptr1 = range_ptr + b * stride_b + row1 * stride_r
        first = gl.minimum(gl.load(ptr0), gl.load(ptr1))
        last = gl.maximum(gl.load(ptr0 + 1), gl.load(ptr1 + 1))
        blocks = gl.where((start_n < last) & (start_n + TILE > first), blocks, 0)
    return blocks


# fmt: off
@gluon.jit
def _load(
    descs, bufs, rings, sizes, M, range_ptr, strides,
    HAS_RANGE: gl.constexpr, ROWS: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    # fmt: on
    """The loading warp: keys and values of a tile, then its blocks of queries and their rows."""
    k_desc, v_desc, q_desc, do_desc, bias_desc, lse_desc, delta_desc = descs
    k_buf, v_buf, q_buf, do_buf, bias_buf, lse_buf, delta_buf = bufs
    k_full, k_empty, full, empty = rings
    range_strides, bias_strides = strides
    bias_b, bias_h = bias_strides
    H, R, num_tiles, num_groups, total = sizes
    k_bytes: gl.constexpr = 2 * ROWS * WARPGROUPS * k_desc.block_type.nbytes
    block_bytes: gl.constexpr = (
        2 * ROWS * (q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
        + WARPGROUPS * bias_desc.block_type.nbytes
    )
    count = 0
    for step in range(num_steps(sizes)):
        b, h, row0, row1, tile = tile_of(step, sizes, ROWS)
        start_n = tile * (WARPGROUPS * WG_ROWS)
        bh_row = (b * H + h) * R
        mbarrier.wait(k_empty.index(0), (step & 1) ^ 1)
        mbarrier.expect(k_full.index(0), k_bytes)
        for w in gl.static_range(WARPGROUPS):
            n = start_n + w * WG_ROWS
            for x in gl.static_range(ROWS):
                row = row0 if x == 0 else row1
                load_rows(k_desc, b, h, row, n, k_full.index(0), k_buf.index(w * ROWS + x))
                load_rows(v_desc, b, h, row, n, k_full.index(0), v_buf.index(w * ROWS + x))
        blocks = _num_blocks(
            range_ptr, range_strides, b, row0, row1, start_n, M,
            HAS_RANGE, WARPGROUPS * WG_ROWS, BLOCK_M,
        )  # fmt: skip
        for block in range(blocks):
            i = count % STAGES
            bar = full.index(i)
            start_m = block * BLOCK_M
            mbarrier.wait(empty.index(i), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, block_bytes)
            for w in gl.static_range(WARPGROUPS):
                load_bias(
                    bias_desc, b * bias_b, h * bias_h, start_n + w * WG_ROWS, start_m,
                    bar, bias_buf.index(i * WARPGROUPS + w),
                )  # fmt: skip
            for x in gl.static_range(ROWS):
                row = row0 if x == 0 else row1
                load_rows(q_desc, b, h, row, start_m, bar, q_buf.index(i * ROWS + x))
                load_rows(do_desc, b, h, row, start_m, bar, do_buf.index(i * ROWS + x))
                at = [bh_row + row, start_m]
                tma.async_copy_global_to_shared(lse_desc, at, bar, lse_buf.index(i * ROWS + x))
                tma.async_copy_global_to_shared(delta_desc, at, bar, delta_buf.index(i * ROWS + x))
            count += 1


# fmt: off
@gluon.jit
def _store(
    dk, dv, b, h, row, start_n, N, mask_ptr, mask_steps, columns,
    dk_ptr, dk_strides, dv_ptr, dv_strides,
    HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr, LAYOUT: gl.constexpr,
):
    # fmt: on
    """Store what 64 keys of one row gathered.

    The loop took every key for visible. Keys do not mix: what a hidden one gathered, NaN if its
    scores overflowed, ends here.
    """
    if HAS_MASK:
        step_b, step_r = mask_steps
        mask_row = gl.to_tensor(b * step_b + row * step_r).to(gl.int64)
        offs = start_n + gl.arange(0, WG_ROWS, layout=gl.SliceLayout(1, LAYOUT))
        shut = gl.load(mask_ptr + mask_row * columns + offs, mask=offs < N, other=0.0)
        visible = gl.expand_dims(shut == 0.0, 1)
        dk = gl.where(visible, dk, 0.0)
        dv = gl.where(visible, dv, 0.0)
    store_rows(dk, b, h, row, start_n, N, dk_ptr, dk_strides, HEAD_DIM, LAYOUT)
    store_rows(dv, b, h, row, start_n, N, dv_ptr, dv_strides, HEAD_DIM, LAYOUT)


# fmt: off
@gluon.jit
def _differentiate(
    descs, bufs, rings, sizes, M, N, range_ptr, strides, mask_ptr, mask_steps, columns,
    dk_ptr, dk_strides, dv_ptr, dv_strides, scale, scale_log2,
    WARPGROUP: gl.constexpr, HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr,
    HAS_RANGE: gl.constexpr, ROWS: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    # fmt: on
    """A computing warpgroup: 64 keys of both rows of each tile."""
    k_buf, v_buf, q_buf, do_buf, bias_buf, lse_buf, delta_buf = bufs
    k_full, k_empty, full, empty = rings
    range_strides, bias_strides = strides
    dtype: gl.constexpr = k_buf.dtype
    BLOCK_D: gl.constexpr = k_buf.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    k0 = k_buf.index(WARPGROUP * ROWS)
    v0 = v_buf.index(WARPGROUP * ROWS)
    k1 = k_buf.index(WARPGROUP * ROWS + ROWS - 1)
    v1 = v_buf.index(WARPGROUP * ROWS + ROWS - 1)
    count = 0
    for step in range(num_steps(sizes)):
        b, h, row0, row1, tile = tile_of(step, sizes, ROWS)
        start_n = (tile * WARPGROUPS + WARPGROUP) * WG_ROWS
        mbarrier.wait(k_full.index(0), step & 1)
        dk0 = gl.zeros([WG_ROWS, BLOCK_D], gl.float32, O_LAYOUT)
        dv0 = dk0
        dk1 = dk0
        dv1 = dk0
        blocks = _num_blocks(
            range_ptr, range_strides, b, row0, row1, tile * (WARPGROUPS * WG_ROWS), M,
            HAS_RANGE, WARPGROUPS * WG_ROWS, BLOCK_M,
        )  # fmt: skip
        for _ in range(blocks):
            i = count % STAGES
            mbarrier.wait(full.index(i), (count // STAGES) & 1)
            bias = scaled_bias(
                bias_buf.index(i * WARPGROUPS + WARPGROUP), _BIAS_FACTOR, S_LAYOUT
            )
            q0 = q_buf.index(i * ROWS)
            do0 = do_buf.index(i * ROWS)
            zero = gl.zeros([WG_ROWS, BLOCK_M], gl.float32, S_LAYOUT)
            s0 = warpgroup_mma(k0, q0.permute((1, 0)), zero, use_acc=False, is_async=True)
            dp0 = warpgroup_mma(v0, do0.permute((1, 0)), zero, use_acc=False, is_async=True)
            offset = bias - lse_buf.index(i * ROWS).load(S_LAYOUT)
            s0 = warpgroup_mma_wait(1, deps=(s0,))
            p0 = exp2(s0 * scale_log2 + offset)
            p0_operand = gl.convert_layout(p0.to(dtype), P_LAYOUT, assert_trivial=True)
            if ROWS == 1:
                next_dv0 = warpgroup_mma(p0_operand, do0, dv0, is_async=True)
                dp0 = warpgroup_mma_wait(1, deps=(dp0,))
                ds0 = p0 * (dp0 - delta_buf.index(i * ROWS).load(S_LAYOUT))
                ds0_operand = gl.convert_layout(ds0.to(dtype), P_LAYOUT, assert_trivial=True)
                next_dk0 = warpgroup_mma(ds0_operand, q0, dk0, is_async=True)
                dv0, dk0 = warpgroup_mma_wait(0, deps=(next_dv0, next_dk0))
            else:
                q1 = q_buf.index(i * ROWS + 1)
                do1 = do_buf.index(i * ROWS + 1)
                s1 = warpgroup_mma(k1, q1.permute((1, 0)), zero, use_acc=False, is_async=True)
                next_dv0 = warpgroup_mma(p0_operand, do0, dv0, is_async=True)
                dp0 = warpgroup_mma_wait(2, deps=(dp0,))
                ds0 = p0 * (dp0 - delta_buf.index(i * ROWS).load(S_LAYOUT))
                ds0_operand = gl.convert_layout(ds0.to(dtype), P_LAYOUT, assert_trivial=True)
                next_dk0 = warpgroup_mma(ds0_operand, q0, dk0, is_async=True)
                dp1 = warpgroup_mma(v1, do1.permute((1, 0)), zero, use_acc=False, is_async=True)
                offset = bias - lse_buf.index(i * ROWS + 1).load(S_LAYOUT)
                s1 = warpgroup_mma_wait(3, deps=(s1,))
                p1 = exp2(s1 * scale_log2 + offset)
                p1_operand = gl.convert_layout(p1.to(dtype), P_LAYOUT, assert_trivial=True)
                next_dv1 = warpgroup_mma(p1_operand, do1, dv1, is_async=True)
                dp1, dv0, dk0 = warpgroup_mma_wait(1, deps=(dp1, next_dv0, next_dk0))
                ds1 = p1 * (dp1 - delta_buf.index(i * ROWS + 1).load(S_LAYOUT))
                ds1_operand = gl.convert_layout(ds1.to(dtype), P_LAYOUT, assert_trivial=True)
                next_dk1 = warpgroup_mma(ds1_operand, q1, dk1, is_async=True)
                # Nothing may be in flight over the edge of the loop, or ptxas would put all
                # products in sequence.
                dv1, dk1 = warpgroup_mma_wait(0, deps=(next_dv1, next_dk1))
            mbarrier.arrive(empty.index(i), count=1)
            count += 1
        mbarrier.arrive(k_empty.index(0), count=1)
        _store(
            dk0 * scale, dv0, b, h, row0, start_n, N, mask_ptr, mask_steps, columns,
            dk_ptr, dk_strides, dv_ptr, dv_strides, HEAD_DIM, HAS_MASK, O_LAYOUT,
        )  # fmt: skip
        if ROWS == 2:
            _store(
                dk1 * scale, dv1, b, h, row1, start_n, N, mask_ptr, mask_steps, columns,
                dk_ptr, dk_strides, dv_ptr, dv_strides, HEAD_DIM, HAS_MASK, O_LAYOUT,
            )  # fmt: skip


# fmt: off
@gluon.jit
def _differentiate_first(
    descs, bufs, rings, sizes, M, N, range_ptr, strides, mask_ptr, mask_steps, columns,
    dk_ptr, dk_strides, dv_ptr, dv_strides, scale, scale_log2,
    HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr,
    ROWS: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):
    _differentiate(
        descs, bufs, rings, sizes, M, N, range_ptr, strides, mask_ptr, mask_steps, columns,
        dk_ptr, dk_strides, dv_ptr, dv_strides, scale, scale_log2,
        0, HEAD_DIM, HAS_MASK, HAS_RANGE, ROWS, WARPGROUPS, BLOCK_M, STAGES,
    )


@gluon.jit
def _differentiate_second(
    descs, bufs, rings, sizes, M, N, range_ptr, strides, mask_ptr, mask_steps, columns,
    dk_ptr, dk_strides, dv_ptr, dv_strides, scale, scale_log2,
    HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr,
    ROWS: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):
    _differentiate(
        descs, bufs, rings, sizes, M, N, range_ptr, strides, mask_ptr, mask_steps, columns,
        dk_ptr, dk_strides, dv_ptr, dv_strides, scale, scale_log2,
        1, HEAD_DIM, HAS_MASK, HAS_RANGE, ROWS, WARPGROUPS, BLOCK_M, STAGES,
    )


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dk_dv_kernel(
    q_desc, k_desc, v_desc,
    bias_desc, bias_b, bias_h,  # transposed; 1, or 0 where it is broadcast along batches, heads
    mask_ptr, mask_b, mask_r, columns,  # [rows, columns], and rows between batches and rows i
    range_ptr, range_b, range_r,  # [B, R, 2]
    do_desc, lse_desc, delta_desc,
    dk_ptr, stride_dkb, stride_dkh, stride_dkr, stride_dkn, stride_dkd,
    dv_ptr, stride_dvb, stride_dvh, stride_dvr, stride_dvn, stride_dvd,
    M, N, R, H, num_tiles, num_groups, total,
    scale, scale_log2,
    HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr,
    ROWS: gl.constexpr, WARPGROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    dtype: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * BLOCK_D), 16, rank=2)
    BITS: gl.constexpr = bias_desc.dtype.primitive_bitwidth
    BIAS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, BLOCK_M * BITS // 8), BITS, rank=2)
    own: gl.constexpr = [ROWS * WARPGROUPS, WG_ROWS, BLOCK_D]
    streamed: gl.constexpr = [STAGES * ROWS, BLOCK_M, BLOCK_D]
    k_buf = gl.allocate_shared_memory(dtype, own, LAYOUT)
    v_buf = gl.allocate_shared_memory(dtype, own, LAYOUT)
    q_buf = gl.allocate_shared_memory(dtype, streamed, LAYOUT)
    do_buf = gl.allocate_shared_memory(dtype, streamed, LAYOUT)
    bias_buf = gl.allocate_shared_memory(
        bias_desc.dtype, [STAGES * WARPGROUPS, WG_ROWS, BLOCK_M], BIAS_LAYOUT
    )
    lse_buf = gl.allocate_shared_memory(gl.float32, [STAGES * ROWS, 1, BLOCK_M], lse_desc.layout)
    delta_buf = gl.allocate_shared_memory(gl.float32, [STAGES * ROWS, 1, BLOCK_M], lse_desc.layout)
    k_full, k_empty = new_ring(1, WARPGROUPS)
    full, empty = new_ring(STAGES, WARPGROUPS)
    gl.thread_barrier()
    descs = (k_desc, v_desc, q_desc, do_desc, bias_desc, lse_desc, delta_desc)
    bufs = (k_buf, v_buf, q_buf, do_buf, bias_buf, lse_buf, delta_buf)
    rings = (k_full, k_empty, full, empty)
    sizes = (H, R, num_tiles, num_groups, total)
    strides = ((range_b, range_r), (bias_b, bias_h))
    mask_steps = (mask_b, mask_r)
    dk_strides = (stride_dkb, stride_dkh, stride_dkr, stride_dkn, stride_dkd)
    dv_strides = (stride_dvb, stride_dvh, stride_dvr, stride_dvn, stride_dvd)
    gl.warp_specialize(
        [
            (_differentiate_first, (
                descs, bufs, rings, sizes, M, N, range_ptr, strides, mask_ptr, mask_steps, columns,
                dk_ptr, dk_strides, dv_ptr, dv_strides, scale, scale_log2,
                HEAD_DIM, HAS_MASK, HAS_RANGE, ROWS, WARPGROUPS, BLOCK_M, STAGES,
            )),
            (_differentiate_second, (
                descs, bufs, rings, sizes, M, N, range_ptr, strides, mask_ptr, mask_steps, columns,
                dk_ptr, dk_strides, dv_ptr, dv_strides, scale, scale_log2,
                HEAD_DIM, HAS_MASK, HAS_RANGE, ROWS, WARPGROUPS, BLOCK_M, STAGES,
            )),
            (_load, (
                descs, bufs, rings, sizes, M, range_ptr, strides,
                HAS_RANGE, ROWS, WARPGROUPS, BLOCK_M, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# With 168 registers a thread to share out, both computing warpgroups can have 240.
_launch = Launcher(_attention_backward_dk_dv_kernel, maxnreg=168)


def dk_dv(
    dk: torch.Tensor,
    dv: torch.Tensor,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    keys: problem.KeyRows,
    rows: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> None:
    """Fill dk and dv; `rows` are those of `rows.query_rows`."""
    B, H, R, M, D = q.shape
    N = k.shape[3]
    block_d = tiling.padded_head_dim(D)
    config = configs.BACKWARD_DK_DV[block_d]
    block_m = config.block_n  # queries stream by
    shared_by = configs.ROWS_OF_DK_DV[block_d]
    # A row alone would pay in full for the conversion of what it reads.
    prepare = problem.readable_bias if shared_by > 1 else problem.scaled_bias
    bias_t = prepare(bias.mT, LOG2_E.value, N, M)
    num_tiles, num_groups = tiling.ceil_div(N, config.block_m), tiling.ceil_div(R, shared_by)
    total = num_tiles * num_groups * B * H
    lse_log2, delta = rows
    strides = (dk.stride(), dv.stride())
    _launch(
        min(total, device_info(q.device).num_sms),
        strides=(bias_t.dtype, strides),
        args=(
            problem.tile_descriptor(q, block_m, block_d),
            problem.tile_descriptor(k, 64, block_d),
            problem.tile_descriptor(v, 64, block_d),
            problem.bias_descriptor(bias_t, 64, block_m), *problem.broadcast_steps(bias_t),
            keys.rows, *keys.steps, keys.rows.shape[1],
            keys.range, *keys.range_strides,
            problem.tile_descriptor(dout, block_m, block_d),
            problem.row_descriptor(lse_log2, block_m),
            problem.row_descriptor(delta, block_m),
            dk, *strides[0],
            dv, *strides[1],
            M, N, R, H, num_tiles, num_groups, total,
            scale, scale * LOG2_E.value,
        ),
        constexprs={
            "HEAD_DIM": D, "HAS_MASK": keys.has_range, "HAS_RANGE": keys.has_range,
            "ROWS": shared_by, "WARPGROUPS": config.block_m // 64,
            "BLOCK_M": block_m, "BLOCK_D": block_d, "STAGES": config.num_stages,
        },
        config=config,
    )  # fmt: skip
