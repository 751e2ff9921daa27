"""The output of causal attention on Hopper, in place of the Triton kernel of the forward pass.

A warpgroup holds 64 columns of a tile of 64 tokens. Where it is alone (D = 64) three programs share
an SM, and while one waits for a product the others compute. Two warpgroups exchange what they
multiply through shared memory. The next tile of v is copied while this one is computed.

Of many sequences a program owns a whole one and carries its sums from tile to tile, so that no
launch before has to add them up. Of few it owns a chunk.

Of wide heads the context of the next tile is summed up while the norm of this one is computed.
Narrow ones have no registers for that, where three programs share an SM.

A running sum is the product of a triangle of ones and a tile, whose accumulators begin with the sum
of the tokens before it. The triangle holds 1/2 in place of 1: the context is halved, and what
sigmoid(x) gates comes doubled, as tanh(x / 2) v + v.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core.launch import Launcher
from attn_core.tiles.hopper import reciprocal
from attn_evo._hopper.support import BLOCK_M
from attn_evo._hopper.tiles import (
    FLAT,
    STAGES,
    accumulators,
    add_column_sums,
    add_magnitudes,
    begin_with,
    column_accumulators,
    column_sums,
    copied,
    half_triangle,
    has_values,
    left_operand,
    start_copy,
    start_linear,
    store_columns_of_ones,
    store_gated_values,
    sum_rows,
    twice_inverse,
)
from attn_evo._triton import configs, problem
from attn_evo._triton.tiles import (
    BIAS_ROWS,
    EPSILON,
    NORM_BIAS,
    NORM_EPSILON,
    NORM_WEIGHT,
    W_F,
    W_G,
    W_L,
    W_Q,
    chunk_of_program,
    rounded,
    twice_gated,
)

_REGISTERS = 168  # of a thread: three programs of 128 threads share the 64 K of an SM


@gluon.jit
def _start_context(v, row, half, ones, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """Start the running sums of a tile and, where there are `ones`, the sums of its columns."""
    context = begin_with(row, BLOCK_M, D)
    context = warpgroup_mma(half, v, context, is_async=True)
    sums = gl.zeros([D, 16], gl.float32, column_accumulators(D))
    if ones is not None:
        sums = add_column_sums(sums, v, ones, 0, BLOCK_M)
    return context, sums


@gluon.jit
def _wait_for_context(context, sums, context_i, HAS_SUMS: gl.constexpr, D: gl.constexpr):
    """The running sums, and with the tile's sums those before the next one."""
    if HAS_SUMS:
        context, sums = warpgroup_mma_wait(0, deps=(context, sums))
        context_i += column_sums(sums, 0, D)
    else:
        context = warpgroup_mma_wait(0, deps=(context,))
    return context, context_i


@gluon.jit
def silu_times(half_x, v, IN_PAIRS: gl.constexpr):
    """silu(x) v in the dtype of v; in bfloat16 in pairs, if there are registers for that."""
    if v.dtype == gl.bfloat16 and IN_PAIRS:
        return gl.inline_asm_elementwise(
            """{
            .reg .f32 x, y;
            .reg .b32 silu;
            tanh.approx.f32 x, $1;
            tanh.approx.f32 y, $2;
            fma.rn.f32 x, x, $1, $1;
            fma.rn.f32 y, y, $2, $2;
            cvt.rn.bf16x2.f32 silu, y, x;
            mul.rn.bf16x2 $0, silu, $3;
            }""", "=r,f,f,r", [half_x, v],
            dtype=gl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:  # noqa: RET505 - decided while compiling
        gate = twice_gated(half_x * v.to(gl.float32), half_x, v.dtype == gl.bfloat16)
        return rounded(gate, v.dtype)


@gluon.jit
def normalised(x, alive, vectors_ptr, D: gl.constexpr):
    """LayerNorm of each row of x; the norm's bias where a row is not alive."""
    x -= gl.expand_dims(gl.sum(x, 1) * (1.0 / D), 1)
    scale = gl.rsqrt(gl.sum(x * x, 1) * (1.0 / D) + NORM_EPSILON)
    scale = gl.where(alive, scale, 0.0)
    offs_d = gl.arange(0, D, gl.SliceLayout(0, accumulators(D)))
    weight = gl.load(vectors_ptr + NORM_WEIGHT * D + offs_d)
    bias = gl.load(vectors_ptr + NORM_BIAS * D + offs_d)
    return x * gl.expand_dims(scale, 1) * gl.expand_dims(weight, 0) + gl.expand_dims(bias, 0)


@gluon.jit
def store_tile(ptr, x, tile, num_rows, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """Store the first `num_rows` rows, contiguous in memory, by way of shared memory."""
    LAYOUT: gl.constexpr = copied(D)
    tile.store(x)
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    mask = (offs_m < num_rows)[:, None] & (offs_d < D)[None, :]
    gl.store(ptr + (offs_m[:, None] * D + offs_d[None, :]), tile.load(LAYOUT), mask=mask)


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_output_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl,
    matrices_ptr, biases_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, D]: the context before each tile
    out_ptr,  # [B, H, L, D], contiguous
    sums_after_ptr,  # [2, B, H, D], contiguous
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    OWNS_SEQUENCE: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = v_ptr.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    AHEAD: gl.constexpr = D > 64  # start the context of the next tile before this one ends
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 16], dtype)
    if OWNS_SEQUENCE:
        ROW: gl.constexpr = gl.SliceLayout(1, column_accumulators(D))
    else:
        ROW: gl.constexpr = gl.BlockedLayout([1], [32], [D // 16], [0])
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    stat_head = (num_heads + pid_bh).to(gl.int64)  # of tables [4, B * H, rows, D]
    v_ptr += b * stride_vb + h * stride_vh
    v_ptr += (first * BLOCK_M).to(gl.int64) * stride_vl
    out_ptr += (pid_bh.to(gl.int64) * L + first * BLOCK_M) * D
    contexts_ptr += (pid_bh.to(gl.int64) * num_tiles + first) * D
    tile_sums_ptr += (stat_head * num_tiles + first) * D
    chunk_sums_ptr += stat_head * num_chunks * D

    weights = gl.allocate_shared_memory(dtype, [4, D, D], TILE)
    biases = gl.allocate_shared_memory(dtype, [4, BIAS_ROWS, D], TILE)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], TILE)
    high = gl.allocate_shared_memory(dtype, [BLOCK_M, D], TILE)
    low = gl.allocate_shared_memory(dtype, [BLOCK_M, D], TILE)
    context_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    stat_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    start_copy(v_tiles.index(0), v_ptr, stride_vl, L - first * BLOCK_M, BLOCK_M, D)
    for which in gl.static_range(4):
        start_copy(weights.index(which), matrices_ptr + which * D * D, D, D, D, D)
        ptr = biases_ptr + which * BIAS_ROWS * D
        start_copy(biases.index(which), ptr, D, BIAS_ROWS, BIAS_ROWS, D)
    async_copy.commit_group()

    offs_d = gl.arange(0, D, ROW)
    ones = None
    if OWNS_SEQUENCE:
        ones = gl.allocate_shared_memory(dtype, [1, 16, 16], ONES)
        store_columns_of_ones(ones, 1, D)
        stat_i = gl.zeros([D], gl.float32, ROW)
        context_i = gl.zeros([D], gl.float32, ROW)
    else:
        stat_i = sum_rows(chunk_sums_ptr, pid_c, D, ROW)
        context_i = gl.load(contexts_ptr + offs_d)
    half = half_triangle(BLOCK_M, dtype, D)
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, accumulators(D)))
    if AHEAD:
        context_row.store(context_i * 0.5)
        stat_row.store(stat_i)
        async_copy.wait_group(0)
        context, sums = _start_context(v_tiles.index(0), context_row, half, ones, BLOCK_M, D)
        context, context_i = _wait_for_context(context, sums, context_i, OWNS_SEQUENCE, D)
    for tile in range(first, last):
        start = tile * BLOCK_M
        stage = (tile - first) % STAGES
        if not AHEAD:
            context_row.store(context_i * 0.5)
            stat_row.store(stat_i)
            async_copy.wait_group(0)
        # The next tile, and its sums before they are needed.
        num_rows = gl.where(tile + 1 < last, L - start - BLOCK_M, 0)
        v_ptr += BLOCK_M * stride_vl
        start_copy(v_tiles.index(1 - stage), v_ptr, stride_vl, num_rows, BLOCK_M, D)
        async_copy.commit_group()
        if not OWNS_SEQUENCE:
            stat_i += gl.load(tile_sums_ptr + offs_d)
            tile_sums_ptr += D
            contexts_ptr += gl.where(tile + 1 < last, D, 0)
            context_i = gl.load(contexts_ptr + offs_d)

        v = v_tiles.index(stage)
        if not AHEAD:
            context, sums = _start_context(v, context_row, half, ones, BLOCK_M, D)
            context, context_i = _wait_for_context(context, sums, context_i, OWNS_SEQUENCE, D)
        mean = left_operand((context * twice_inverse(start + 1 + offs_m)).to(dtype), low, D)
        logit = start_linear(mean, weights.index(W_G), biases.index(W_G), BLOCK_M, D)
        logit = warpgroup_mma_wait(0, deps=(logit,))
        store_gated_values(v, logit, high, low, dtype, D)

        stat = begin_with(stat_row, BLOCK_M, D)
        stat = warpgroup_mma(half, high, stat, is_async=True)
        stat = warpgroup_mma(half, low, stat, is_async=True)
        if OWNS_SEQUENCE:
            sums = gl.zeros([D, 16], gl.float32, column_accumulators(D))
            sums = add_column_sums(sums, high, ones, 0, BLOCK_M)
            sums = add_column_sums(sums, low, ones, 0, BLOCK_M)
            stat, sums = warpgroup_mma_wait(0, deps=(stat, sums))
            stat_i += 0.5 * column_sums(sums, 0, D)  # the gated values were doubled
        else:
            stat = warpgroup_mma_wait(0, deps=(stat,))
        # One after the other, since four tiles of results do not fit into the registers.
        local = start_linear(v, weights.index(W_L), biases.index(W_L), BLOCK_M, D)
        local = warpgroup_mma_wait(0, deps=(local,))
        denominator = add_magnitudes(stat, local) + EPSILON
        query = start_linear(v, weights.index(W_Q), biases.index(W_Q), BLOCK_M, D)
        half_ratio = reciprocal(denominator)
        half_ratio *= warpgroup_mma_wait(0, deps=(query,))
        values = v.load(accumulators(D))
        if AHEAD:
            alive = has_values(values)
        gate = left_operand(silu_times(half_ratio, values, D > 64), low, D)
        final = start_linear(gate, weights.index(W_F), biases.index(W_F), BLOCK_M, D)
        final = warpgroup_mma_wait(0, deps=(final,))
        x = twice_gated(context, final, dtype == gl.bfloat16)

        if AHEAD:
            context_row.store(context_i * 0.5)
            stat_row.store(stat_i)
            async_copy.wait_group(0)
            v_next = v_tiles.index(1 - stage)
            context, sums = _start_context(v_next, context_row, half, ones, BLOCK_M, D)
        else:
            alive = has_values(v.load(accumulators(D)))
        out = normalised(x, alive, vectors_ptr, D)
        store_tile(out_ptr, out.to(dtype), high, L - start, BLOCK_M, D)
        out_ptr += BLOCK_M * D
        if AHEAD:
            context, context_i = _wait_for_context(context, sums, context_i, OWNS_SEQUENCE, D)

    if pid_c == num_chunks - 1:
        gl.store(sums_after_ptr + (num_heads + pid_bh) * D + offs_d, stat_i)
        if OWNS_SEQUENCE:
            gl.store(sums_after_ptr + pid_bh * D + offs_d, context_i)


_launch_output = {
    64: Launcher(_attention_output_kernel, maxnreg=_REGISTERS),
    128: Launcher(_attention_output_kernel),
}


def attention_output(
    call: problem.Call,
    scratch: problem.Scratch,
    out: torch.Tensor,
    sums_after: torch.Tensor,
    own_sequences: bool,
) -> None:
    """Write the output of a call, and its stat after all tokens, from the sums before its tiles.

    Programs that own a sequence need no sums and write the context after all tokens too.
    """
    v = call.v[0]
    D = v.shape[-1]
    args: tuple[Any, ...] = (
        v, *v.stride()[:3], scratch.matrices, scratch.biases, scratch.vectors,
        scratch.tile_sums, scratch.chunk_sums, scratch.contexts, out, sums_after, *call.sizes,
    )  # fmt: skip
    _launch_output[D](
        call.num_programs,
        strides=v.stride(),
        args=args,
        constexprs={"OWNS_SEQUENCE": own_sequences, "D": D, "BLOCK_M": BLOCK_M},
        config=configs.hopper_kernel(v, call.config),
    )
