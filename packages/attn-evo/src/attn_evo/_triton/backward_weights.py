"""Gradients of the weights: the shares of all programs, added up in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_evo._triton import configs, problem
from attn_evo._triton.backward_work import Work
from attn_evo._triton.tiles import (
    NORM_BIAS,
    NORM_WEIGHT,
    W_F,
    W_G,
    W_L,
    W_Q,
    sum_rows,
)
from attn_evo.weights import EvoWeights

_ROWS = tl.constexpr(128)  # of the programs whose shares a step adds up


# fmt: off
@triton.jit
def _store_row(
    dw_ptr, db_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_programs,
    WHICH: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """Row `row` of a matrix's gradient; the bias's counts as the last of them."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    if row < HEAD_DIM:
        rows = partial_matrices_ptr + (WHICH * BLOCK_D + row) * BLOCK_D
        stride = 4 * BLOCK_D * BLOCK_D
        total = sum_rows(rows, 0, num_programs, stride, BLOCK_D, BLOCK_D, _ROWS) * SCALE
        tl.store(dw_ptr + row * HEAD_DIM + offs_d, total.to(dw_ptr.dtype.element_ty), mask=mask_d)
    else:
        _store_vector(db_ptr, partial_vectors_ptr, num_programs, WHICH, SCALE, HEAD_DIM, BLOCK_D)


# fmt: off
@triton.jit
def _store_vector(
    ptr, partial_vectors_ptr, num_programs,
    WHICH: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    offs_d = tl.arange(0, BLOCK_D)
    rows = partial_vectors_ptr + WHICH * BLOCK_D
    total = sum_rows(rows, 0, num_programs, 6 * BLOCK_D, BLOCK_D, BLOCK_D, _ROWS) * SCALE
    tl.store(ptr + offs_d, total.to(ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_weights_kernel(
    partial_matrices_ptr,  # [programs, 4, BLOCK_D, BLOCK_D]
    partial_vectors_ptr,  # [programs, 6, BLOCK_D]
    dw_q_ptr, db_q_ptr, dw_l_ptr, db_l_ptr, dw_g_ptr, db_g_ptr, dw_f_ptr, db_f_ptr,
    dnorm_weight_ptr, dnorm_bias_ptr,
    num_programs,
    num_gate_programs,  # of those that have a share of W_g's gradient
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    which = tl.program_id(0) // (HEAD_DIM + 1)
    row = tl.program_id(0) % (HEAD_DIM + 1)
    if which == W_Q:
        _store_row(
            dw_q_ptr, db_q_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_programs,
            W_Q, 0.5, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif which == W_L:
        _store_row(
            dw_l_ptr, db_l_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_programs,
            W_L, 1.0, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif which == W_F:
        _store_row(
            dw_f_ptr, db_f_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_programs,
            W_F, 0.5, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif which == W_G:
        _store_row(
            dw_g_ptr, db_g_ptr, partial_matrices_ptr, partial_vectors_ptr, row, num_gate_programs,
            W_G, 0.5, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif row == 0:
        _store_vector(
            dnorm_weight_ptr, partial_vectors_ptr, num_programs, NORM_WEIGHT, 1.0, HEAD_DIM, BLOCK_D
        )
    elif row == 1:
        _store_vector(
            dnorm_bias_ptr, partial_vectors_ptr, num_programs, NORM_BIAS, 1.0, HEAD_DIM, BLOCK_D
        )


_launch_weights = Launcher(_attention_backward_weights_kernel)


def backward_weights(work: Work, weights: EvoWeights) -> EvoWeights:
    call = work.call
    dim, block_d = call.flags["HEAD_DIM"], call.blocks["BLOCK_D"]
    num_gate_programs = call.num_programs if work.causal else call.sizes[2]
    dweights = EvoWeights(*(weight.new_empty(weight.shape) for weight in weights))
    _launch_weights(
        5 * (dim + 1),
        strides=weights.w_q.dtype,
        args=(*work.partials, *dweights, call.num_programs, num_gate_programs),
        constexprs={"HEAD_DIM": dim, "BLOCK_D": block_d},
        config=configs.SUMS,
    )
    return dweights
