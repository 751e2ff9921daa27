"""Forward pass for Hopper GPUs: TMA, asynchronous wgmma, one loading and two computing warpgroups.

A CTA computes 128 queries of two rows i. Both rows read the same tile of the bias, which is most of
what has to come from the L2 cache, and while one row's scores go through the softmax the products
of the other are under way.

The softmax does not follow the maximum of the scores: it subtracts the largest score of the first
tile of keys. That saves the maximum, the rescaling of the output and a chain of dependences in
every other tile. Weights above 1 are harmless up to the limits of their type; where a sum leaves
them, the tile is marked and `redo` computes it again, exactly.
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
from attn_triangle._hopper.redo import redo
from attn_triangle._hopper.tiles import (
    ROWS,
    SEES_NONE,
    WG_ROWS,
    exp2,
    key_blocks,
    load_keys,
    load_rows,
    new_ring,
    num_steps,
    scaled_bias,
    store_rows,
    thread_sums,
    tile_of,
)
from attn_triangle.layout import new_heads_last, new_lse


# fmt: off
@gluon.jit
def _load(
    descs, bufs, rings, sizes, N, range_ptr, strides,
    HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr, WARPGROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """The loading warp: queries of a tile, then its blocks of keys, values, bias and mask."""
    q_desc, k_desc, v_desc, bias_desc, mask_desc = descs
    q_buf, k_buf, v_buf, bias_buf, mask_buf = bufs
    q_full, q_empty, full, empty = rings
    range_strides, bias_strides, mask_steps = strides
    q_bytes: gl.constexpr = ROWS * WARPGROUPS * q_desc.block_type.nbytes
    count = 0
    for step in range(num_steps(sizes)):
        b, h, row0, row1, tile = tile_of(step, sizes)
        start_m = tile * (WARPGROUPS * WG_ROWS)
        slot = step & 1
        mbarrier.wait(q_empty.index(slot), ((step >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), q_bytes)
        for w in gl.static_range(WARPGROUPS):
            first = (slot * WARPGROUPS + w) * ROWS
            m = start_m + w * WG_ROWS
            load_rows(q_desc, b, h, row0, m, q_full.index(slot), q_buf.index(first))
            load_rows(q_desc, b, h, row1, m, q_full.index(slot), q_buf.index(first + 1))
        lo, hi = key_blocks(range_ptr, range_strides, b, row0, row1, N, HAS_RANGE, BLOCK_N)
        count = load_keys(
            (k_desc, v_desc, bias_desc, mask_desc), (k_buf, v_buf, bias_buf, mask_buf),
            (full, empty), (bias_strides, mask_steps), count, b, h, row0, row1, start_m, lo, hi,
            HAS_MASK, WARPGROUPS, BLOCK_N, STAGES,
        )  # fmt: skip


# fmt: off
@gluon.jit
def _store(
    acc, m_i, sums, b, h, row, start_m, sizes, M,
    out_ptr, out_strides, lse_ptr, redo_ptr, limit,
    HEAD_DIM: gl.constexpr, IS_ZERO: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):
    # fmt: on
    """Normalise and store 64 queries of one row, or mark them for `redo`."""
    H, R, num_tiles, num_groups, total = sizes
    l_i = gl.convert_layout(gl.sum(sums, axis=1), gl.SliceLayout(1, S_LAYOUT))
    sees_none = m_i < SEES_NONE
    offs_m = start_m + gl.arange(0, WG_ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    bh_row = gl.to_tensor(b * H + h).to(gl.int64) * R + row
    # No block at all leaves 0. NaN is out of the limits too.
    is_exact = ((l_i > 1.0 / limit) & (l_i < limit)) | (sees_none & (l_i == 0.0))
    columns = gl.cdiv(M, WG_ROWS) * WG_ROWS
    is_wrong = gl.where(is_exact | (offs_m >= M), 0, 1).to(gl.int8)
    gl.store(redo_ptr + bh_row * columns + offs_m, is_wrong, mask=offs_m < columns)

    lse = gl.where(sees_none, -float("inf"), (m_i + gl.log2(l_i)) * 0.6931471805599453)
    gl.store(lse_ptr + bh_row * M + offs_m, lse, mask=offs_m < M)
    factor = 1.0 / gl.where(l_i == 0.0, 1.0, l_i)
    if IS_ZERO:
        factor = gl.where(sees_none, 0.0, factor)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)
    acc = acc * gl.expand_dims(factor, 1)
    store_rows(acc, b, h, row, start_m, M, out_ptr, out_strides, HEAD_DIM, O_LAYOUT)


# fmt: off
@gluon.jit
def _attend(
    descs, bufs, rings, sizes, M, N, range_ptr, strides,
    out_ptr, out_strides, lse_ptr, redo_ptr, scale_log2, unscale, limit,
    WARPGROUP: gl.constexpr, HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr,
    HAS_RANGE: gl.constexpr, IS_ZERO: gl.constexpr, WARPGROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """A computing warpgroup: 64 queries of both rows of each tile."""
    q_desc, k_desc, v_desc, bias_desc, mask_desc = descs
    q_buf, k_buf, v_buf, bias_buf, mask_buf = bufs
    q_full, q_empty, full, empty = rings
    range_strides, bias_strides, mask_steps = strides
    dtype: gl.constexpr = q_desc.dtype
    BLOCK_D: gl.constexpr = q_buf.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    count = 0
    for step in range(num_steps(sizes)):
        b, h, row0, row1, tile = tile_of(step, sizes)
        start_m = (tile * WARPGROUPS + WARPGROUP) * WG_ROWS
        slot = step & 1
        mbarrier.wait(q_full.index(slot), (step >> 1) & 1)
        q0 = q_buf.index((slot * WARPGROUPS + WARPGROUP) * ROWS)
        q1 = q_buf.index((slot * WARPGROUPS + WARPGROUP) * ROWS + 1)
        m0 = gl.full([WG_ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        m1 = m0
        sums0 = thread_sums(gl.zeros([WG_ROWS, BLOCK_N], gl.float32, S_LAYOUT))
        sums1 = sums0
        acc0 = gl.zeros([WG_ROWS, BLOCK_D], gl.float32, O_LAYOUT)
        acc1 = acc0
        lo, hi = key_blocks(range_ptr, range_strides, b, row0, row1, N, HAS_RANGE, BLOCK_N)
        for block in range(lo, hi):
            i = count % STAGES
            mbarrier.wait(full.index(i), (count // STAGES) & 1)
            # Scores start from the bias over the scale: their product takes it in for nothing.
            bias = scaled_bias(bias_buf.index(i * WARPGROUPS + WARPGROUP), unscale, S_LAYOUT)
            start0 = bias
            start1 = bias
            if HAS_MASK:
                start0 = bias + mask_buf.index(i * ROWS).load(S_LAYOUT)
                start1 = bias + mask_buf.index(i * ROWS + 1).load(S_LAYOUT)
            k0 = k_buf.index(i * ROWS).permute((1, 0))
            k1 = k_buf.index(i * ROWS + 1).permute((1, 0))
            s0 = warpgroup_mma(q0, k0, start0, is_async=True)
            s1 = warpgroup_mma(q1, k1, start1, is_async=True)
            s0 = warpgroup_mma_wait(1, deps=(s0,))
            if block == lo:
                m0 = gl.max(s0, axis=1) * scale_log2
            p = exp2(s0 * scale_log2 - gl.expand_dims(m0, 1))
            sums0 = sums0 + thread_sums(p)
            p0 = gl.convert_layout(p.to(dtype), P_LAYOUT, assert_trivial=True)
            next0 = warpgroup_mma(p0, v_buf.index(i * ROWS), acc0, is_async=True)
            s1 = warpgroup_mma_wait(1, deps=(s1,))
            if block == lo:
                m1 = gl.max(s1, axis=1) * scale_log2
            p = exp2(s1 * scale_log2 - gl.expand_dims(m1, 1))
            sums1 = sums1 + thread_sums(p)
            p1 = gl.convert_layout(p.to(dtype), P_LAYOUT, assert_trivial=True)
            next1 = warpgroup_mma(p1, v_buf.index(i * ROWS + 1), acc1, is_async=True)
            # Nothing may be in flight over the edge of the loop: ptxas would put all in sequence.
            acc0, acc1 = warpgroup_mma_wait(0, deps=(next0, next1))
            mbarrier.arrive(empty.index(i), count=1)
            count += 1
        mbarrier.arrive(q_empty.index(slot), count=1)
        _store(
            acc0, m0, sums0, b, h, row0, start_m, sizes, M,
            out_ptr, out_strides, lse_ptr, redo_ptr, limit,
            HEAD_DIM, IS_ZERO, S_LAYOUT, O_LAYOUT,
        )  # fmt: skip
        _store(
            acc1, m1, sums1, b, h, row1, start_m, sizes, M,
            out_ptr, out_strides, lse_ptr, redo_ptr, limit,
            HEAD_DIM, IS_ZERO, S_LAYOUT, O_LAYOUT,
        )  # fmt: skip


# fmt: off
@gluon.jit
def _attend_first(
    descs, bufs, rings, sizes, M, N, range_ptr, strides,
    out_ptr, out_strides, lse_ptr, redo_ptr, scale_log2, unscale, limit,
    HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr,
    IS_ZERO: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    _attend(
        descs, bufs, rings, sizes, M, N, range_ptr, strides,
        out_ptr, out_strides, lse_ptr, redo_ptr, scale_log2, unscale, limit,
        0, HEAD_DIM, HAS_MASK, HAS_RANGE, IS_ZERO, WARPGROUPS, BLOCK_N, STAGES,
    )


@gluon.jit
def _attend_second(
    descs, bufs, rings, sizes, M, N, range_ptr, strides,
    out_ptr, out_strides, lse_ptr, redo_ptr, scale_log2, unscale, limit,
    HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr,
    IS_ZERO: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    _attend(
        descs, bufs, rings, sizes, M, N, range_ptr, strides,
        out_ptr, out_strides, lse_ptr, redo_ptr, scale_log2, unscale, limit,
        1, HEAD_DIM, HAS_MASK, HAS_RANGE, IS_ZERO, WARPGROUPS, BLOCK_N, STAGES,
    )


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_forward_kernel(
    q_desc, k_desc, v_desc,
    bias_desc, bias_b, bias_h,  # strides of its batches and heads: 1, or 0 where it is broadcast
    mask_desc, mask_b, mask_r,  # rows of the mask between batches and rows; as range, may be unread
    range_ptr, range_b, range_r,  # [B, R, 2]
    out_ptr, stride_ob, stride_oh, stride_or, stride_om, stride_od,
    lse_ptr,  # [B, H, R, M], contiguous
    redo_ptr,  # [B, H, R, M in whole tiles of 64], contiguous
    M, N, R, H, num_tiles, num_groups, total,
    scale_log2, unscale, limit,
    HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr, HAS_RANGE: gl.constexpr,
    IS_ZERO: gl.constexpr, WARPGROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    dtype: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * BLOCK_D), 16, rank=2)
    BITS: gl.constexpr = bias_desc.dtype.primitive_bitwidth
    BIAS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, BLOCK_N * BITS // 8), BITS, rank=2)
    q_buf = gl.allocate_shared_memory(dtype, [2 * ROWS * WARPGROUPS, WG_ROWS, BLOCK_D], LAYOUT)
    k_buf = gl.allocate_shared_memory(dtype, [STAGES * ROWS, BLOCK_N, BLOCK_D], LAYOUT)
    v_buf = gl.allocate_shared_memory(dtype, [STAGES * ROWS, BLOCK_N, BLOCK_D], LAYOUT)
    bias_buf = gl.allocate_shared_memory(
        bias_desc.dtype, [STAGES * WARPGROUPS, WG_ROWS, BLOCK_N], BIAS_LAYOUT
    )
    mask_buf = k_buf
    if HAS_MASK:
        mask_buf = gl.allocate_shared_memory(
            gl.float32, [STAGES * ROWS, 1, BLOCK_N], mask_desc.layout
        )
    q_full, q_empty = new_ring(2, WARPGROUPS)
    full, empty = new_ring(STAGES, WARPGROUPS)
    gl.thread_barrier()
    descs = (q_desc, k_desc, v_desc, bias_desc, mask_desc)
    bufs = (q_buf, k_buf, v_buf, bias_buf, mask_buf)
    rings = (q_full, q_empty, full, empty)
    sizes = (H, R, num_tiles, num_groups, total)
    strides = ((range_b, range_r), (bias_b, bias_h), (mask_b, mask_r))
    out_strides = (stride_ob, stride_oh, stride_or, stride_om, stride_od)
    gl.warp_specialize(
        [
            (_attend_first, (
                descs, bufs, rings, sizes, M, N, range_ptr, strides,
                out_ptr, out_strides, lse_ptr, redo_ptr, scale_log2, unscale, limit,
                HEAD_DIM, HAS_MASK, HAS_RANGE, IS_ZERO, WARPGROUPS, BLOCK_N, STAGES,
            )),
            (_attend_second, (
                descs, bufs, rings, sizes, M, N, range_ptr, strides,
                out_ptr, out_strides, lse_ptr, redo_ptr, scale_log2, unscale, limit,
                HEAD_DIM, HAS_MASK, HAS_RANGE, IS_ZERO, WARPGROUPS, BLOCK_N, STAGES,
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
_launch = Launcher(_attention_forward_kernel, maxnreg=168)
# Sums of weights beyond these may come from weights that their type does not hold.
_LIMITS = {torch.bfloat16: 2.0**100, torch.float16: 2.0**15}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    masked_rows: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out like q (B, H, R, M, D) and lse (B, H, R, M), as `reference.attention` defines them."""
    B, H, R, M, D = q.shape
    N = k.shape[3]
    out, lse = new_heads_last(q), new_lse(q)
    if q.numel() * N == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    block_d = tiling.padded_head_dim(D)
    config = configs.FORWARD[block_d]
    block_n = config.block_n
    readable = problem.readable_bias(bias, 1.0 / scale, M, N)
    keys = problem.key_rows(mask, N, block_n, masked_rows == "mean", unread=lse)
    marks = q.new_empty((B, H, R, problem.whole(M, 64)), dtype=torch.int8)
    num_tiles, num_groups = tiling.ceil_div(M, config.block_m), tiling.ceil_div(R, 2)
    total = num_tiles * num_groups * B * H
    out_strides = out.stride()
    _launch(
        min(total, device_info(q.device).num_sms),
        strides=(readable.dtype, out_strides),
        args=(
            problem.tile_descriptor(q, 64, block_d),
            problem.tile_descriptor(k, block_n, block_d),
            problem.tile_descriptor(v, block_n, block_d),
            problem.bias_descriptor(readable, 64, block_n), *problem.broadcast_steps(readable),
            problem.row_descriptor(keys.rows, block_n), *keys.steps,
            keys.range, *keys.range_strides,
            out, *out_strides,
            lse,
            marks,
            M, N, R, H, num_tiles, num_groups, total,
            scale * LOG2_E.value, 1.0 / scale, _LIMITS[q.dtype],
        ),
        constexprs={
            "HEAD_DIM": D, "HAS_MASK": keys.has_mask, "HAS_RANGE": keys.has_range,
            "IS_ZERO": masked_rows == "zero", "WARPGROUPS": config.block_m // 64,
            "BLOCK_N": block_n, "BLOCK_D": block_d, "STAGES": config.num_stages,
        },
        config=config,
    )  # fmt: skip
    redo(q, k, v, bias, mask, out, lse, marks, scale, masked_rows)
    return out, lse
