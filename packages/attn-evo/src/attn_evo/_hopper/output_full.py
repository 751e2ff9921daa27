"""The output of attention without `causal` on Hopper, of heads that a warpgroup holds (D = 64).

All tokens share context and stat, so that four programs fit on an SM, and while one waits for a
product or for memory the others compute. The next tile of v is copied while this one is computed.
As in `output` the context is halved, and what sigmoid(x) gates comes doubled.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    warpgroup_mma_wait,
)

from attn_core.launch import Launcher
from attn_core.tiles.hopper import reciprocal
from attn_evo._hopper.output import normalised, silu_times, store_tile
from attn_evo._hopper.support import BLOCK_M
from attn_evo._hopper.tiles import (
    FLAT,
    STAGES,
    accumulators,
    add_magnitudes,
    begin_with,
    copied,
    has_values,
    left_operand,
    magnitude,
    start_copy,
    start_linear,
    sum_rows,
)
from attn_evo._triton import configs, problem
from attn_evo._triton.tiles import (
    BIAS_ROWS,
    EPSILON,
    W_F,
    W_G,
    W_L,
    W_Q,
    chunk_of_program,
    sigmoid_of_double,
    twice_gated,
)

_REGISTERS = 128  # of a thread: four programs of 128 threads share the 64 K of an SM


@gluon.jit
def _gate_of_mean(mean, matrix_ptr, bias_ptr, D: gl.constexpr):
    """sigmoid(W_g mean + b_g) [D] of one mean [D]."""
    LAYOUT: gl.constexpr = copied(D)
    rows = gl.arange(0, D, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    weight = gl.load(matrix_ptr + (rows[:, None] * D + columns[None, :])).to(gl.float32)
    mean = gl.convert_layout(mean, gl.SliceLayout(0, LAYOUT))
    return sigmoid_of_double(gl.sum(weight * mean[None, :], 1) + gl.load(bias_ptr + rows), False)


@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_output_full_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl,
    matrices_ptr, biases_ptr, vectors_ptr, chunk_sums_ptr,
    out_ptr,  # [B, H, L, D], contiguous
    sums_after_ptr,  # [2, B, H, D], contiguous
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    D: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = v_ptr.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [D // 16], [0])
    LINEARS: gl.constexpr = 3  # W_q, W_l and W_f, which come first
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh
    v_ptr += (first * BLOCK_M).to(gl.int64) * stride_vl
    out_ptr += (pid_bh.to(gl.int64) * L + first * BLOCK_M) * D

    weights = gl.allocate_shared_memory(dtype, [LINEARS, D, D], TILE)
    biases = gl.allocate_shared_memory(dtype, [LINEARS, BIAS_ROWS, D], TILE)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], TILE)
    work = gl.allocate_shared_memory(dtype, [BLOCK_M, D], TILE)
    context_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    stat_row = gl.allocate_shared_memory(gl.float32, [D], FLAT)
    start_copy(v_tiles.index(0), v_ptr, stride_vl, L - first * BLOCK_M, BLOCK_M, D)
    for which in gl.static_range(LINEARS):
        start_copy(weights.index(which), matrices_ptr + which * D * D, D, D, D, D)
        ptr = biases_ptr + which * BIAS_ROWS * D
        start_copy(biases.index(which), ptr, D, BIAS_ROWS, BIAS_ROWS, D)
    async_copy.commit_group()

    offs_d = gl.arange(0, D, ROW)
    chunk_sums_ptr += pid_bh.to(gl.int64) * num_chunks * D
    context_i = sum_rows(chunk_sums_ptr, num_chunks, D, ROW)
    mean = context_i * (1.0 / L.to(gl.float32))
    shared_gate = _gate_of_mean(mean, matrices_ptr + W_G * D * D, vectors_ptr + W_G * D, D)
    stat_i = gl.convert_layout(shared_gate, ROW) * context_i
    context_row.store(context_i * 0.5)
    stat_row.store(magnitude(stat_i) + EPSILON)
    for tile in range(first, last):
        start = tile * BLOCK_M
        stage = (tile - first) % STAGES
        async_copy.wait_group(0)
        num_rows = gl.where(tile + 1 < last, L - start - BLOCK_M, 0)
        v_ptr += BLOCK_M * stride_vl
        start_copy(v_tiles.index(1 - stage), v_ptr, stride_vl, num_rows, BLOCK_M, D)
        async_copy.commit_group()

        v = v_tiles.index(stage)
        local = start_linear(v, weights.index(W_L), biases.index(W_L), BLOCK_M, D)
        query = start_linear(v, weights.index(W_Q), biases.index(W_Q), BLOCK_M, D)
        local = warpgroup_mma_wait(2, deps=(local,))
        half_ratio = reciprocal(add_magnitudes(begin_with(stat_row, BLOCK_M, D), local))
        half_ratio *= warpgroup_mma_wait(0, deps=(query,))
        values = v.load(accumulators(D))
        gate = left_operand(silu_times(half_ratio, values, True), work, D)
        final = start_linear(gate, weights.index(W_F), biases.index(W_F), BLOCK_M, D)
        alive = has_values(values)
        final = warpgroup_mma_wait(0, deps=(final,))
        x = twice_gated(begin_with(context_row, BLOCK_M, D), final, dtype == gl.bfloat16)
        out = normalised(x, alive, vectors_ptr, D)
        store_tile(out_ptr, out.to(dtype), work, L - start, BLOCK_M, D)
        out_ptr += BLOCK_M * D

    if pid_c == num_chunks - 1:
        gl.store(sums_after_ptr + (num_heads + pid_bh) * D + offs_d, stat_i)
        gl.store(sums_after_ptr + pid_bh * D + offs_d, context_i)


_launch_output = Launcher(_attention_output_full_kernel, maxnreg=_REGISTERS)


def attention_output(
    call: problem.Call, scratch: problem.Scratch, out: torch.Tensor, sums_after: torch.Tensor
) -> None:
    """Write the output of a call, and context and stat after all tokens, from sums of chunks."""
    v = call.v[0]
    _launch_output(
        call.num_programs,
        strides=v.stride(),
        args=(
            v, *v.stride()[:3], scratch.matrices, scratch.biases, scratch.vectors,
            scratch.chunk_sums, out, sums_after, *call.sizes,
        ),
        constexprs={"D": v.shape[-1], "BLOCK_M": BLOCK_M},
        config=configs.hopper_kernel(v, call.config),
    )  # fmt: skip
