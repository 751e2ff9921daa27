"""Forward pass: a chunked scan over the whole GPU, in three launches.

A program owns a chunk, some tiles of BLOCK_M tokens of one head. The first launch sums up v over
tiles and chunks. The second adds the sums of the chunks before its own, in a fixed order, gates v
by the running mean and sums up gated v. The third computes everything else. No atomics: its bits
never change. Without `causal` all tokens share one gate, and the second launch has nothing to do.

On Hopper kernels of `_hopper` take the place of the second and the third. Where a program of theirs
owns a whole sequence, the first launch only packs the weights.

The formula is in `attn_evo.reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_core.tiles.offsets import load_tile, tile_offsets
from attn_core.tiling import ceil_div
from attn_core.tuning import TileConfig
from attn_evo._backends import most_head_dim
from attn_evo._hopper import support
from attn_evo._triton import configs, problem, wide
from attn_evo._triton.tiles import (
    BIAS_ROWS,
    CONTEXT,
    MOST_STAYING_BIASES,
    NORM_BIAS,
    NORM_WEIGHT,
    STAT,
    SUM_COLUMNS,
    W_F,
    W_G,
    W_L,
    W_Q,
    add_column_sums,
    bias_rows,
    chunk_of_program,
    gated_values,
    inverse_counts,
    inverse_denominator,
    linear,
    load_state,
    load_tokens,
    load_vector,
    matrix,
    no_column_sums,
    norm_statistics,
    rounded,
    running_stat,
    scan,
    sigmoid_of_double,
    stat_before,
    store_state,
    sum_rows,
    table_row,
    total_sums,
    triangle,
    twice_gated,
)
from attn_evo.weights import EvoWeights

try:
    from triton.language.extra.cuda import gdc_launch_dependents
except ImportError:  # of a Triton without kernels for Hopper, where no launch starts early
    gdc_launch_dependents = None

_PACKED_ROWS = tl.constexpr(16)  # of a matrix, which one program packs


# fmt: off
@triton.jit
def _pack_linear(
    w_ptr, stride_wo, stride_wi, b_ptr, stride_b, matrices_ptr, biases_ptr, vectors_ptr, piece,
    WHICH: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Pack some rows of a matrix and, with the first of them, its bias."""
    offs_row = piece * _PACKED_ROWS + tl.arange(0, _PACKED_ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    w_ptrs = w_ptr + tile_offsets(offs_row, stride_wo, offs_d, stride_wi)
    w = load_tile(w_ptrs, offs_row < HEAD_DIM, mask_d, True, True).to(tl.float32) * SCALE
    out_ptrs = matrices_ptr + WHICH * BLOCK_D * BLOCK_D
    out_ptrs += tile_offsets(offs_row, BLOCK_D, offs_d, 1)
    inside = (offs_row < BLOCK_D)[:, None]
    tl.store(out_ptrs, rounded(w, matrices_ptr.dtype.element_ty), mask=inside)
    if piece == 0:
        _pack_vector(b_ptr, stride_b, vectors_ptr, WHICH, SCALE, HEAD_DIM, BLOCK_D)
        rest = tl.load(b_ptr + offs_d * stride_b, mask=mask_d, other=0.0).to(tl.float32) * SCALE
        for row in range(BIAS_ROWS):  # the first three hold the bits of a float32
            part = rounded(rest, biases_ptr.dtype.element_ty)
            tl.store(biases_ptr + (WHICH * BIAS_ROWS + row) * BLOCK_D + offs_d, part)
            rest -= part.to(tl.float32)


# fmt: off
@triton.jit
def _pack_vector(
    ptr, stride, vectors_ptr,
    WHICH: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    offs_d = tl.arange(0, BLOCK_D)
    vector = tl.load(ptr + offs_d * stride, mask=offs_d < HEAD_DIM, other=0.0).to(tl.float32)
    tl.store(vectors_ptr + WHICH * BLOCK_D + offs_d, vector * SCALE)


# fmt: off
@triton.jit
def _sum_chunk(
    v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, tile_sums_ptr, chunk_sums_ptr,
    pid_bh, pid_c, L, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    offs_d = tl.arange(0, BLOCK_D)
    offs_tile = tl.arange(0, SUM_COLUMNS)
    total = tl.zeros([BLOCK_D], tl.float32)
    first = pid_c * tiles_per_chunk
    last = tl.minimum(first + tiles_per_chunk, num_tiles)
    for group in range(first, last, SUM_COLUMNS):  # a column of sums for each tile of the group
        sums = no_column_sums(BLOCK_D)
        for tile in tl.range(group, tl.minimum(group + SUM_COLUMNS, last), num_stages=3):
            v = load_tokens(
                v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, tile * BLOCK_M, L,
                HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            sums = add_column_sums(sums, v, tile - group, PRECISION)
        row = table_row(tile_sums_ptr, CONTEXT, num_heads, pid_bh, num_tiles, group, BLOCK_D)
        ptrs = row + tile_offsets(offs_d, 1, offs_tile, BLOCK_D)
        tl.store(ptrs, sums, mask=(offs_tile < last - group)[None, :])
        total += tl.sum(sums, 1)
    row = table_row(chunk_sums_ptr, CONTEXT, num_heads, pid_bh, num_chunks, pid_c, BLOCK_D)
    tl.store(row + offs_d, total)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_sums_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    w_q_ptr, stride_qo, stride_qi, b_q_ptr, stride_bq,
    w_l_ptr, stride_lo, stride_li, b_l_ptr, stride_bl,
    w_g_ptr, stride_go, stride_gi, b_g_ptr, stride_bg,
    w_f_ptr, stride_fo, stride_fi, b_f_ptr, stride_bf,
    norm_weight_ptr, stride_nw,
    norm_bias_ptr, stride_nb,
    matrices_ptr, biases_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    STARTS_NEXT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    if STARTS_NEXT:  # the next launch may begin, which waits for what it needs of this one
        gdc_launch_dependents()
    pid_bh = tl.program_id(0) // num_chunks
    pid_c = tl.program_id(0) % num_chunks
    num_pieces = tl.cdiv(BLOCK_D, _PACKED_ROWS)
    place = tl.program_id(0) - num_heads * num_chunks  # the last programs pack the weights
    which = tl.where(place < 0, -1, place // num_pieces)
    piece = place % num_pieces
    if which == W_Q:
        _pack_linear(
            w_q_ptr, stride_qo, stride_qi, b_q_ptr, stride_bq, matrices_ptr,
            biases_ptr, vectors_ptr, piece, W_Q, 0.5, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif which == W_L:
        _pack_linear(
            w_l_ptr, stride_lo, stride_li, b_l_ptr, stride_bl, matrices_ptr,
            biases_ptr, vectors_ptr, piece, W_L, 1.0, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif which == W_F:
        _pack_linear(
            w_f_ptr, stride_fo, stride_fi, b_f_ptr, stride_bf, matrices_ptr,
            biases_ptr, vectors_ptr, piece, W_F, 0.5, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif which == W_G:
        _pack_linear(
            w_g_ptr, stride_go, stride_gi, b_g_ptr, stride_bg, matrices_ptr,
            biases_ptr, vectors_ptr, piece, W_G, 0.5, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif which == NORM_WEIGHT:
        _pack_vector(norm_weight_ptr, stride_nw, vectors_ptr, NORM_WEIGHT, 1.0, HEAD_DIM, BLOCK_D)
        _pack_vector(norm_bias_ptr, stride_nb, vectors_ptr, NORM_BIAS, 1.0, HEAD_DIM, BLOCK_D)
    else:
        b = (pid_bh // H).to(tl.int64)
        h = (pid_bh % H).to(tl.int64)
        _sum_chunk(
            v_ptr + b * stride_vb + h * stride_vh, stride_vl, stride_vd,
            mask_ptr + b * stride_mb, stride_ml, tile_sums_ptr, chunk_sums_ptr,
            pid_bh, pid_c, L, num_heads, num_tiles, num_chunks, tiles_per_chunk,
            HEAD_DIM, HAS_MASK, PRECISION, BLOCK_M, BLOCK_D,
        )  # fmt: skip


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_stat_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    length_ptr,
    matrices_ptr, biases_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, BLOCK_D]: the context before each tile
    sums_after_ptr,  # [2, B, H, D], contiguous
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, HAS_STATE: tl.constexpr,
    PRECISION: tl.constexpr, IS_NVIDIA: tl.constexpr,
    WEIGHTS_STAY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh
    mask_ptr += b * stride_mb

    offs_d = tl.arange(0, BLOCK_D)
    w_g = matrix(matrices_ptr, W_G, WEIGHTS_STAY, BLOCK_D)
    b_g = bias_rows(biases_ptr, W_G, WEIGHTS_STAY, BLOCK_D)
    ones = triangle(BLOCK_M, v_ptr.dtype.element_ty, False)
    chunk_sums = table_row(chunk_sums_ptr, CONTEXT, num_heads, pid_bh, num_chunks, 0, BLOCK_D)
    context_i = sum_rows(chunk_sums, 0, pid_c, BLOCK_D, BLOCK_D, BLOCK_D)
    if HAS_STATE:
        context_i += load_state(
            sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd, b, h, CONTEXT, HEAD_DIM, BLOCK_D
        )
    acc = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(first, last):
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        # Loaded before it is needed: memory takes longer than the products.
        row = table_row(tile_sums_ptr, CONTEXT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
        tile_sum = tl.load(row + offs_d)
        context = scan(ones, v, PRECISION) + context_i[None, :]  # [BLOCK_M, BLOCK_D]
        mean = context * inverse_counts(length_ptr, start, HAS_STATE, BLOCK_M)
        gated = gated_values(v, mean, w_g, b_g, PRECISION, IS_NVIDIA, BLOCK_D)
        total = tl.sum(gated, 0)

        row = table_row(tile_sums_ptr, STAT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
        tl.store(row + offs_d, total)
        row = table_row(contexts_ptr, CONTEXT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
        tl.store(row + offs_d, context_i)
        context_i += tile_sum
        acc += total
    row = table_row(chunk_sums_ptr, STAT, num_heads, pid_bh, num_chunks, pid_c, BLOCK_D)
    tl.store(row + offs_d, acc)
    if pid_c == num_chunks - 1:
        store_state(sums_after_ptr, num_heads, pid_bh, context_i, CONTEXT, HEAD_DIM, BLOCK_D)


# fmt: off
@triton.jit
def _reloaded(
    v, ptr, stride_l, stride_d, mask_ptr, stride_ml, start, L, RELOADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """v, loaded once more where the registers do not hold it from one use to the next."""
    if RELOADS:
        v = load_tokens(
            ptr, stride_l, stride_d, mask_ptr, stride_ml, start, L,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D, True,
        )  # fmt: skip
    return v


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_output_kernel(
    v_ptr, stride_vb, stride_vh, stride_vl, stride_vd,
    mask_ptr, stride_mb, stride_ml,
    sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
    length_ptr,
    matrices_ptr, biases_ptr, vectors_ptr, tile_sums_ptr, chunk_sums_ptr,
    contexts_ptr,  # [B * H, tiles, BLOCK_D]: the context before each tile
    out_ptr,  # [B, H, L, D], contiguous
    sums_after_ptr,  # [2, B, H, D], contiguous
    L, H, num_heads, num_tiles, num_chunks, tiles_per_chunk,
    IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_STATE: tl.constexpr, PRECISION: tl.constexpr, IS_NVIDIA: tl.constexpr,
    WEIGHTS_STAY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    pid_bh, pid_c, b, h, first, last = chunk_of_program(H, num_tiles, num_chunks, tiles_per_chunk)
    v_ptr += b * stride_vb + h * stride_vh
    mask_ptr += b * stride_mb
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    IS_BFLOAT16: tl.constexpr = dtype == tl.bfloat16

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    BIASES_STAY: tl.constexpr = WEIGHTS_STAY and BLOCK_D <= MOST_STAYING_BIASES
    RELOADS: tl.constexpr = PRECISION == "bf16x6"
    # In float32 one weight that stays is what it takes to fit into the registers.
    w_q = matrix(matrices_ptr, W_Q, WEIGHTS_STAY or dtype == tl.float32, BLOCK_D)
    b_q = bias_rows(biases_ptr, W_Q, BIASES_STAY, BLOCK_D)
    w_l = matrix(matrices_ptr, W_L, WEIGHTS_STAY, BLOCK_D)
    b_l = bias_rows(biases_ptr, W_L, BIASES_STAY, BLOCK_D)
    w_f = matrix(matrices_ptr, W_F, WEIGHTS_STAY, BLOCK_D)
    b_f = bias_rows(biases_ptr, W_F, BIASES_STAY, BLOCK_D)
    if IS_CAUSAL:
        w_g = matrix(matrices_ptr, W_G, WEIGHTS_STAY, BLOCK_D)
        b_g = bias_rows(biases_ptr, W_G, BIASES_STAY, BLOCK_D)
        ones = triangle(BLOCK_M, dtype, False)
        stat_i = stat_before(
            chunk_sums_ptr, sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd,
            b, h, pid_bh, pid_c, num_heads, num_chunks, HEAD_DIM, HAS_STATE, BLOCK_D,
        )  # fmt: skip
    else:
        context_i, stat_i = total_sums(
            chunk_sums_ptr, sums_ptr, stride_sk, stride_sb, stride_sh, stride_sd, length_ptr,
            matrices_ptr, vectors_ptr, b, h, pid_bh, L, num_heads, num_chunks,
            HEAD_DIM, HAS_STATE, IS_NVIDIA, BLOCK_D,
        )  # fmt: skip

    for tile in range(first, last):
        start = tile * BLOCK_M
        v = load_tokens(
            v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        if IS_CAUSAL:
            row = table_row(contexts_ptr, CONTEXT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
            context, stat = running_stat(
                v, ones, tl.load(row + offs_d), stat_i,
                inverse_counts(length_ptr, start, HAS_STATE, BLOCK_M), w_g, b_g,
                PRECISION, IS_NVIDIA, BLOCK_D,
            )  # fmt: skip
            row = table_row(tile_sums_ptr, STAT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
            stat_i += tl.load(row + offs_d)
        else:
            context = context_i[None, :]
            stat = stat_i[None, :]

        v = _reloaded(
            v, v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L, RELOADS,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        local = linear(v, w_l, b_l, PRECISION, BLOCK_D)
        half_ratio = linear(v, w_q, b_q, PRECISION, BLOCK_D)
        half_ratio *= inverse_denominator(stat, local, IS_NVIDIA)
        v = _reloaded(
            v, v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L, RELOADS,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        gate = twice_gated(half_ratio * v.to(tl.float32), half_ratio, IS_BFLOAT16, IS_NVIDIA)
        final = linear(rounded(gate, dtype), w_f, b_f, PRECISION, BLOCK_D)
        v = _reloaded(
            v, v_ptr, stride_vl, stride_vd, mask_ptr, stride_ml, start, L, RELOADS,
            HEAD_DIM, HAS_MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        if RELOADS and IS_CAUSAL:  # nor do they hold the context
            row = table_row(contexts_ptr, CONTEXT, num_heads, pid_bh, num_tiles, tile, BLOCK_D)
            context = scan(ones, v, PRECISION) + tl.load(row + offs_d)[None, :]
        x = sigmoid_of_double(final, IS_BFLOAT16, IS_NVIDIA) * context
        mean, scale = norm_statistics(x, v, HEAD_DIM, BLOCK_D)
        out = (x - mean) * scale * load_vector(vectors_ptr, NORM_WEIGHT, BLOCK_D)
        out += load_vector(vectors_ptr, NORM_BIAS, BLOCK_D)

        out_ptrs = out_ptr + (pid_bh.to(tl.int64) * L + start) * HEAD_DIM
        out_ptrs += tile_offsets(offs_m, HEAD_DIM, offs_d, 1)
        mask = (offs_m < L - start)[:, None] & (offs_d < HEAD_DIM)[None, :]
        tl.store(out_ptrs, out.to(dtype), mask=mask)

    if pid_c == num_chunks - 1:
        store_state(sums_after_ptr, num_heads, pid_bh, stat_i, STAT, HEAD_DIM, BLOCK_D)
        if not IS_CAUSAL:
            store_state(sums_after_ptr, num_heads, pid_bh, context_i, CONTEXT, HEAD_DIM, BLOCK_D)


# Started when all before has ended: the launch that it starts early reads v at once.
_launch_sums = Launcher(_attention_sums_kernel)
_launch_stat = Launcher(_attention_stat_kernel)
_launch_output = Launcher(_attention_output_kernel)


def attention(
    v: torch.Tensor,
    weights: EvoWeights,
    mask: torch.Tensor | None,
    sums: torch.Tensor | None,
    length: torch.Tensor | None,
    causal: bool,
    accum_dtype: torch.dtype,
    tiles: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """EvoAttention of v (B, H, L, D): out like v, and the sums (2, B, H, D) up to its end."""
    B, H, _, D = v.shape
    if most_head_dim(v.dtype) < D:
        return wide.attention(v, weights, mask, sums, length, causal, accum_dtype, tiles)
    if v.numel() == 0:
        sums_after = v.new_empty((2, B, H, D), dtype=torch.float32)
        out = v.new_empty(v.shape)
        return out, sums_after.zero_() if sums is None else sums_after.copy_(sums)
    if causal and not tiles and support.takes(v, mask is not None, sums is not None):
        from attn_evo._hopper import forward

        return forward.attention(v, weights)
    if not causal and not tiles and support.takes_full(v, mask is not None, sums is not None):
        from attn_evo._hopper import forward

        return forward.full_attention(v, weights)
    launch = functools.partial(_attention, v, weights, mask, sums, length, causal)
    return launch(configs.forward_tiles(v, causal, tiles, launch))


def _attention(
    v: torch.Tensor,
    weights: EvoWeights,
    mask: torch.Tensor | None,
    sums: torch.Tensor | None,
    length: torch.Tensor | None,
    causal: bool,
    config: TileConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, _, D = v.shape
    out = v.new_empty(v.shape)
    sums_after = v.new_empty((2, B, H, D), dtype=torch.float32)
    call = problem.call(v, mask, sums, length, config)
    if configs.multiplies_parts(v):
        call = call.in_parts
    scratch = running_sums(call, weights, causal, sums_after)
    _launch_output(
        call.num_programs,
        strides=call.strides,
        args=(*call.inputs, *scratch, out, sums_after, *call.sizes),
        constexprs={"IS_CAUSAL": causal, **call.flags, **call.numerics, **call.blocks},
        config=call.config,
    )
    return out, sums_after


def running_sums(
    call: problem.Call, weights: EvoWeights, causal: bool, sums_after: torch.Tensor
) -> problem.Scratch:
    """Pack the weights and sum up v and, with `causal`, gated v over tiles and chunks."""
    scratch = sums_of_values(call, weights)
    if causal:
        _launch_stat(
            call.num_programs,
            strides=call.strides,
            args=(*call.inputs, *scratch, sums_after, *call.sizes),
            constexprs={**call.flags, **call.numerics_of_one_weight, **call.blocks},
            config=configs.gated_kernel(call.v[0], call.config),
        )
    return scratch


def sums_of_values(
    call: problem.Call, weights: EvoWeights, only_packs: bool = False, starts_next: bool = False
) -> problem.Scratch:
    """Pack the weights and, unless that is all, sum up v over tiles and chunks."""
    scratch = problem.scratch(call)
    L, H, num_heads, *cut = call.sizes
    num_programs = call.num_programs
    if only_packs:
        num_programs = num_heads = 0
    args = [*call.v, *call.mask]
    weight_strides = tuple(weight.stride() for weight in weights)
    for weight, strides in zip(weights, weight_strides, strict=True):
        args += [weight, *strides]
    _launch_sums(
        num_programs + _num_packing_programs(call.blocks["BLOCK_D"]),
        strides=(call.strides, weight_strides, weights.w_q.dtype),
        args=(*args, *scratch[:-1], L, H, num_heads, *cut),
        constexprs={
            "HEAD_DIM": call.flags["HEAD_DIM"], "HAS_MASK": call.flags["HAS_MASK"],
            "PRECISION": call.numerics["PRECISION"], "STARTS_NEXT": starts_next, **call.blocks,
        },
        config=configs.SUMS,
    )  # fmt: skip
    return scratch


def _num_packing_programs(block_d: int) -> int:
    """Number of programs that pack the weights: for pieces of four matrices, and for the norm."""
    return 4 * ceil_div(block_d, _PACKED_ROWS.value) + 1
