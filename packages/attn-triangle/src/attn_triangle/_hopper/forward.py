"""Forward pass for Hopper GPUs: TMA, asynchronous wgmma, one loading warp, computing warpgroups.

A warpgroup computes 64 queries of one row i, and the warpgroups of a CTA share tiles of keys and
values with those of the same row, tiles of the bias with those of the same queries.

The softmax does not follow the maximum of the scores: it subtracts the largest score of the first
tile of keys. That saves the maximum, the rescaling of the output and a chain of dependences in
every other tile. Weights above 1 are harmless up to the limits of their type; where a sum leaves
them, the lse is NaN and `redo` computes the tile again, exactly.
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
from attn_core.tiles.gluon_names import thread_barrier
from attn_core.tiles.hopper import accumulator_layout, exp2, log2, reciprocal, thread_sums
from attn_core.tiles.softmax import LOG2_E as _LOG2_E
from attn_triangle._hopper import configs, problem
from attn_triangle._hopper.mask import load_hidden, load_pair, seen_blocks, store_pair, store_shut
from attn_triangle._hopper.redo import redo
from attn_triangle._hopper.tiles import (
    LOG2_E,
    SEES_NONE,
    WG_ROWS,
    load_bias,
    load_queries,
    load_rows,
    load_wide,
    moved,
    new_ring,
    new_tiles,
    num_steps,
    place_of,
    rows_of,
    store_rows,
)
from attn_triangle._triton import forward as portable
from attn_triangle.layout import new_heads_last, new_lse


# fmt: off
@gluon.jit
def _store(
    acc, m_i, sums, b, h, row, start_m, sizes, M,
    out_desc, out_buf, lse_ptr, limit,
    IS_ZERO: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):
    # fmt: on
    """Normalise and store 64 queries of one row; NaN in place of an lse asks for `redo`."""
    H, R, num_tiles, num_groups, total = sizes
    l_i = gl.convert_layout(gl.sum(sums, axis=1), gl.SliceLayout(1, S_LAYOUT))
    sees_none = m_i < SEES_NONE
    offs_m = start_m + gl.arange(0, WG_ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    bh_row = gl.to_tensor(b * H + h).to(gl.int64) * R + row
    # No block at all leaves 0. NaN is out of the limits too.
    is_exact = ((l_i > 1.0 / limit) & (l_i < limit)) | (sees_none & (l_i == 0.0))
    lse = gl.where(sees_none, -float("inf"), (m_i + log2(l_i)) * 0.6931471805599453)
    lse = gl.where(is_exact, lse, float("nan"))
    factor = reciprocal(gl.where(l_i == 0.0, 1.0, l_i))
    if IS_ZERO:
        factor = gl.where(sees_none, 0.0, factor)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)
    tma.store_wait(0)  # until the tile before has left the buffer
    store_rows(acc * gl.expand_dims(factor, 1), out_buf, out_desc, b, h, row, start_m)
    # Last: the fence before a copy waits for all stores.
    gl.store(lse_ptr + bh_row * M + offs_m, lse, mask=offs_m < M)


@gluon.jit
def _start_scores(q, k, shut, HAS_SHUT: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Begin the product of queries and keys, on top of what the mask adds, [64, BLOCK_N]."""
    zero = gl.zeros([WG_ROWS, BLOCK_N], gl.float32, LAYOUT)
    if HAS_SHUT:
        scores = warpgroup_mma(q, k.permute((1, 0)), zero + shut.load(LAYOUT), is_async=True)
    else:
        scores = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    return scores


# fmt: off
@gluon.jit
def _load(
    args,
    HAS_MASK: gl.constexpr, EVEN_N: gl.constexpr, IS_ZERO: gl.constexpr,
    TILES: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """The loading warp: queries of a tile, then its blocks of keys, values, bias and mask."""
    descs, bufs, rings, sizes, N, mask, bias_steps = args
    mask_ptr, mask_strides, words_ptr, words_strides = mask
    q_desc, k_desc, v_desc, bias_desc = descs
    q_buf, k_buf, v_buf, bias_buf, shut_buf, blocks_buf = bufs
    q_full, q_empty, full, empty = rings
    bias_b, bias_h = bias_steps
    block_bytes: gl.constexpr = (
        ROWS * (k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        + TILES * bias_desc.block_type.nbytes
    )
    count = 0
    place = place_of(gl.program_id(0), sizes)
    distance = place_of(gl.num_programs(0), sizes)
    for step in range(num_steps(sizes)):
        b, h, group, tile = place
        row0, last = rows_of(group, sizes, ROWS)
        start_m = tile * (TILES * WG_ROWS)
        slot = step & 1
        load_queries(
            ((q_desc,), (q_buf,)), (q_full, q_empty), step, b, h, row0, last, start_m, TILES, ROWS
        )
        lo = 0
        hi = gl.cdiv(N, BLOCK_N)
        if HAS_MASK:
            lo, hi = seen_blocks(
                words_ptr, words_strides, b, row0, last, N, IS_ZERO, ROWS, BLOCK_N
            )
            store_pair(lo, hi, blocks_buf.index(slot))
            mbarrier.arrive(q_full.index(slot), count=1)
        hidden = ()
        if HAS_MASK or not EVEN_N:
            hidden = load_hidden(
                mask_ptr, mask_strides, b, row0, last, lo * BLOCK_N, N, HAS_MASK, ROWS, BLOCK_N
            )
        for block in range(lo, hi):
            i = count % STAGES
            bar = full.index(i)
            start_n = block * BLOCK_N
            mbarrier.wait(empty.index(i), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, block_bytes)
            for x in gl.static_range(ROWS):
                row = gl.minimum(row0 + x, last)
                load_rows(k_desc, b, h, row, start_n, bar, k_buf.index(i * ROWS + x))
                load_rows(v_desc, b, h, row, start_n, bar, v_buf.index(i * ROWS + x))
            for w in gl.static_range(TILES):
                load_bias(
                    bias_desc, b * bias_b, h * bias_h, start_m + w * WG_ROWS, start_n,
                    bar, bias_buf.index(i * TILES + w),
                )  # fmt: skip
            if HAS_MASK or not EVEN_N:
                for x in gl.static_range(ROWS):
                    store_shut(hidden[x], start_n, N, shut_buf.index(i * ROWS + x), BLOCK_N)
                mbarrier.arrive(bar, count=1)
                # While the copies run: before them, they would wait for it.
                hidden = load_hidden(
                    mask_ptr, mask_strides, b, row0, last, start_n + BLOCK_N, N,
                    HAS_MASK, ROWS, BLOCK_N,
                )  # fmt: skip
            count += 1
        place = moved(place, distance, sizes)


# fmt: off
@gluon.jit
def _attend(
    WARPGROUP: gl.constexpr, args,
    HAS_MASK: gl.constexpr, EVEN_N: gl.constexpr, IS_ZERO: gl.constexpr,
    TILES: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """A computing warpgroup: 64 queries of one row of each tile."""
    loading, out, M, lse_ptr, scale_log2, limit = args
    descs, bufs, rings, sizes, N, mask, bias_steps = loading
    out_desc, out_buf = out
    q_buf, k_buf, v_buf, bias_buf, shut_buf, blocks_buf = bufs
    q_full, q_empty, full, empty = rings
    dtype: gl.constexpr = out_desc.dtype
    BLOCK_D: gl.constexpr = q_buf.shape[2]
    S_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_N)
    O_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_D)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    ROW: gl.constexpr = WARPGROUP // TILES
    TILE: gl.constexpr = WARPGROUP % TILES
    zero = gl.zeros([WG_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    # gl.fma, here and below: of * and + ptxas would share parts with the maximum, three for two.
    to_log2 = zero + scale_log2
    log2_e = gl.full([WG_ROWS, BLOCK_N], LOG2_E, gl.float32, S_LAYOUT)
    count = 0
    place = place_of(gl.program_id(0), sizes)
    distance = place_of(gl.num_programs(0), sizes)
    for step in range(num_steps(sizes)):
        b, h, group, tile = place
        row0, last = rows_of(group, sizes, ROWS)
        start_m = (tile * TILES + TILE) * WG_ROWS
        slot = step & 1
        mbarrier.wait(q_full.index(slot), (step >> 1) & 1)
        q = q_buf.index(slot * (ROWS * TILES) + WARPGROUP)
        m_i = gl.full([WG_ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        sums = thread_sums(zero)
        acc = gl.zeros([WG_ROWS, BLOCK_D], gl.float32, O_LAYOUT)
        lo = 0
        hi = gl.cdiv(N, BLOCK_N)
        if HAS_MASK:
            lo, hi = load_pair(blocks_buf.index(slot))
        for block in range(lo, hi):
            i = count % STAGES
            own = i * ROWS + ROW
            mbarrier.wait(full.index(i), (count // STAGES) & 1)
            scores = _start_scores(
                q, k_buf.index(own), shut_buf.index(own), HAS_MASK or not EVEN_N, BLOCK_N, S_LAYOUT
            )
            bias = load_wide(bias_buf.index(i * TILES + TILE), S_LAYOUT)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            if block == lo:
                m_i = gl.max(gl.fma(scores, to_log2, bias * LOG2_E), axis=1)
            offset = gl.fma(bias, log2_e, zero - gl.expand_dims(m_i, 1))
            p = exp2(gl.fma(scores, to_log2, offset))
            sums += thread_sums(p)
            p_operand = gl.convert_layout(p.to(dtype), P_LAYOUT, assert_trivial=True)
            acc = warpgroup_mma(p_operand, v_buf.index(own), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(i), count=1)
            count += 1
        mbarrier.arrive(q_empty.index(slot), count=1)
        place = moved(place, distance, sizes)
        _store(
            acc, m_i, sums, b, h, gl.minimum(row0 + ROW, last), start_m, sizes, M,
            out_desc, out_buf.index(WARPGROUP), lse_ptr, limit,
            IS_ZERO, S_LAYOUT, O_LAYOUT,
        )  # fmt: skip
    tma.store_wait(0)


# fmt: off
@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_forward_kernel(
    q_desc, k_desc, v_desc,
    bias_desc, bias_b, bias_h,  # strides of its batches and heads: 1, or 0 where it is broadcast
    mask_ptr, mask_b, mask_r, mask_n,  # [B, R, N], read only with HAS_MASK
    words_ptr, words_b, words_r, words_n,  # the same in words of one key or of four
    out_desc,
    lse_ptr,  # [B, H, R, M], contiguous
    M, N, R, H, num_tiles, num_groups, total,
    scale_log2, limit,
    HAS_MASK: gl.constexpr, EVEN_N: gl.constexpr, IS_ZERO: gl.constexpr,
    TILES: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    dtype: gl.constexpr = q_desc.dtype
    WARPGROUPS: gl.constexpr = TILES * ROWS
    q_buf = new_tiles(dtype, 2 * WARPGROUPS, WG_ROWS, BLOCK_D)
    k_buf = new_tiles(dtype, STAGES * ROWS, BLOCK_N, BLOCK_D)
    v_buf = new_tiles(dtype, STAGES * ROWS, BLOCK_N, BLOCK_D)
    out_buf = new_tiles(dtype, WARPGROUPS, WG_ROWS, BLOCK_D)
    bias_buf = new_tiles(bias_desc.dtype, STAGES * TILES, WG_ROWS, BLOCK_N)
    HAS_SHUT: gl.constexpr = HAS_MASK or not EVEN_N
    NUMBERS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    shut_buf = k_buf
    if HAS_SHUT:
        shut_buf = gl.allocate_shared_memory(gl.float32, [STAGES * ROWS, 1, BLOCK_N], NUMBERS)
    PAIR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    blocks_buf = gl.allocate_shared_memory(gl.int32, [2, 2], PAIR)
    # Written by the copy engine and, as for the mask, by the loading warp.
    q_full, q_empty = new_ring(2, WARPGROUPS, WRITERS=2 if HAS_MASK else 1)
    full, empty = new_ring(STAGES, WARPGROUPS, WRITERS=2 if HAS_SHUT else 1)
    thread_barrier()
    descs = (q_desc, k_desc, v_desc, bias_desc)
    bufs = (q_buf, k_buf, v_buf, bias_buf, shut_buf, blocks_buf)
    rings = (q_full, q_empty, full, empty)
    sizes = (H, R, num_tiles, num_groups, total)
    mask = (mask_ptr, (mask_b, mask_r, mask_n), words_ptr, (words_b, words_r, words_n))
    loading = (descs, bufs, rings, sizes, N, mask, (bias_b, bias_h))
    computing = (loading, (out_desc, out_buf), M, lse_ptr, scale_log2, limit)
    gl.warp_specialize(
        [
            (_attend, (0, computing, HAS_MASK, EVEN_N, IS_ZERO, TILES, ROWS, BLOCK_N, STAGES)),
            (_attend, (1, computing, HAS_MASK, EVEN_N, IS_ZERO, TILES, ROWS, BLOCK_N, STAGES)),
            (_attend, (2, computing, HAS_MASK, EVEN_N, IS_ZERO, TILES, ROWS, BLOCK_N, STAGES)),
            (_attend, (3, computing, HAS_MASK, EVEN_N, IS_ZERO, TILES, ROWS, BLOCK_N, STAGES)),
            (_load, (loading, HAS_MASK, EVEN_N, IS_ZERO, TILES, ROWS, BLOCK_N, STAGES)),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 32],
    )


_launch = GluonLauncher(_attention_forward_kernel)
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
    if B * H * R * M * N <= configs.FEW_SCORES:
        return portable.attention(q, k, v, bias, mask, scale, masked_rows)
    out, lse = new_heads_last(q), new_lse(q)
    block_d = tiling.padded_head_dim(D)
    plan = configs.FORWARD[block_d].fit(R, bias.dtype)
    block_n = plan.block
    readable = problem.readable_bias(bias, M, N)
    read = problem.mask_bytes(mask, N, unread=lse)
    num_tiles, num_groups = tiling.ceil_div(M, 64 * plan.tiles), tiling.ceil_div(R, plan.rows)
    total = num_tiles * num_groups * B * H
    _launch(
        min(total, device_info(q.device).num_sms),
        args=(
            problem.tiles(q, 64, block_d),
            problem.tiles(k, block_n, block_d),
            problem.tiles(v, block_n, block_d),
            problem.bias_tiles(readable, 64, block_n), *problem.broadcast_steps(readable),
            read.keys, *read.strides,
            read.words, *read.words_strides,
            problem.tiles(out, 64, block_d),
            lse,
            M, N, R, H, num_tiles, num_groups, total,
            scale * _LOG2_E.value, _LIMITS[q.dtype],
        ),
        constants={
            "HAS_MASK": mask is not None, "EVEN_N": N % block_n == 0,
            "IS_ZERO": masked_rows == "zero", "TILES": plan.tiles, "ROWS": plan.rows,
            "BLOCK_N": block_n, "BLOCK_D": block_d, "STAGES": plan.stages,
        },
        maxnreg=plan.registers,
    )  # fmt: skip
    redo(q, k, v, bias, mask, out, lse, scale, masked_rows)
    return out, lse
