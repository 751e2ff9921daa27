"""Backward pass in two kernels and without atomics, so that its bits never change.

With P = exp(S - lse), Z the factors of dropout, dP = Z * (dO V^T), delta = rowsum(dO * O) - dlse
and C the damping of softcapping, 1 without it:

    dS = P * (dP - delta),   dQ = scale (C * dS) K,   dK = scale (C * dS)^T Q,   dV = (Z * P)^T dO.

The first kernel owns BLOCK_M queries, computes their delta and dQ; the second owns BLOCK_N keys,
reads delta and computes dK and dV. S and dP are computed twice: seven products for the five of a
single pass with atomics. Dao, "FlashAttention-2", 2023, algorithm 2. The gradient of a bias is dS
without C: the first kernel writes it where there is memory for all of it, else `backward_bias`
computes it again. That of a sink is -sum of exp(sink - lse) delta.
"""

import math

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.dropout import draw_words, drop, keep_tile
from attn_core.tiles.masks import is_visible, key_blocks, query_blocks
from attn_core.tiles.offsets import load_tile, tile_offsets
from attn_core.tiles.softmax import LOG2_E
from attn_core.tiles.swizzle import tile_of_head
from attn_flash._triton import configs, problem, ragged
from attn_flash._triton.backward_bias import bias_gradient
from attn_flash._triton.scores import (
    BOOLEAN,
    as_term,
    first_products,
    is_shown,
    load_slope,
    load_state,
    load_term,
    modify_scores,
    order_heads,
)
from attn_flash._triton.sequences import ragged_bounds
from attn_flash.options import Options

# What the gradient of a bias may take before it is summed: in copies of the bias, or in elements.
_MOST_COPIES = 8
_MOST_EXPANDED = 1 << 29
_WIDEST_HEAD = 256  # bytes, of those that are summed so


# fmt: off
@triton.jit
def _accumulate_dq(
    dq, q, do, lse_log2, delta, rows, bias_rows,
    k_ptr, stride_kn, stride_kd,
    v_ptr, stride_vn, stride_vd,
    bias_ptr, stride_bn,
    key_mask_ptr, stride_mn,
    dbias_ptr, dbias_rows, mask_m,
    lo, hi, M, N, b, h,
    scale_log2, softcap_log2, slope_log2, seed, offset, threshold, keep_scale, left, right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    STORES_DBIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    """Add dS K over the key blocks in [lo, hi)."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_d = offs_d < HEAD_DIM
    mask_dv = offs_dv < HEAD_DIM_V
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    PAD_DV: tl.constexpr = HEAD_DIM_V != BLOCK_DV
    IS_BOOLEAN: tl.constexpr = (HAS_BIAS == BOOLEAN) | (HAS_KEY_MASK == BOOLEAN)
    k_offs = tile_offsets(offs_n, stride_kn, offs_d, stride_kd)
    v_offs = tile_offsets(offs_n, stride_vn, offs_dv, stride_vd)
    k_ptr += tl.cast(lo, tl.int64) * stride_kn
    v_ptr += tl.cast(lo, tl.int64) * stride_vn
    if HAS_BIAS > 0:
        bias_offs = bias_rows[:, None] + offs_n[None, :] * stride_bn
        bias_ptr += tl.cast(lo, tl.int64) * stride_bn
    if HAS_KEY_MASK > 0:
        key_mask_ptrs = key_mask_ptr + tl.cast(lo, tl.int64) * stride_mn + offs_n * stride_mn
    position_f = (rows + (N - M)).to(tl.float32)
    offs_nf = offs_n.to(tl.float32)
    # What the next tile needs beside keys and values is made while products of this one run.
    next_key_mask = 0.0
    if HAS_KEY_MASK > 0:
        next_key_mask = load_term(key_mask_ptrs, offs_n < N - lo, True)
    words = 0
    if HAS_DROPOUT:
        words = draw_words(seed, offset, b, h, rows, lo, BLOCK_M, BLOCK_N)
    for start_n in range(lo, hi, BLOCK_N):
        mask_n = offs_n < N - start_n
        k = load_tile(k_ptr + k_offs, mask_n, mask_d, MASKED, PAD_D)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptr + v_offs, mask_n, mask_dv, MASKED, PAD_DV)  # [BLOCK_N, BLOCK_DV]
        bias, key_mask = 0.0, 0.0
        if HAS_BIAS > 0:
            bias = load_term(bias_ptr + bias_offs, mask_n[None, :], MASKED)
            bias_ptr += BLOCK_N * stride_bn
        if HAS_KEY_MASK > 0:
            key_mask = next_key_mask[None, :]
            key_mask_ptrs += tl.where(start_n + BLOCK_N < hi, BLOCK_N, 0) * stride_mn
            next_key_mask = load_term(key_mask_ptrs, offs_n < N - start_n - BLOCK_N, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        distance = (position_f - start_n)[:, None] - offs_nf[None, :]
        scores, factor, damping = modify_scores(
            products, distance, bias, key_mask, scale_log2, softcap_log2, slope_log2,
            SOFTCAP, HAS_ALIBI, HAS_BIAS, HAS_KEY_MASK,
        )  # fmt: skip
        p = tl.math.exp2(scores * factor - lse_log2[:, None])
        visible = tl.full([1, 1], True, tl.int1)
        if MASKED:
            visible = is_visible(
                rows[:, None] + (N - M), start_n + offs_n[None, :], N, left, right,
                HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
        if MASKED or IS_BOOLEAN:
            p = tl.where(is_shown(visible, bias, key_mask, HAS_BIAS, HAS_KEY_MASK), p, 0.0)
        if HAS_DROPOUT:
            dp = keep_scale * drop(dp, keep_tile(words, threshold, BLOCK_M, BLOCK_N), threshold)
        ds = p * (dp - delta[:, None])
        if STORES_DBIAS:
            dbias_ptrs = dbias_ptr + dbias_rows[:, None] + (start_n + offs_n)[None, :]
            mask = mask_m[:, None]
            if MASKED:
                mask = mask & mask_n[None, :]
            tl.store(dbias_ptrs, ds.to(dbias_ptr.dtype.element_ty), mask=mask)
        if SOFTCAP > 0:
            ds *= damping
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn
        if HAS_DROPOUT:
            words = draw_words(seed, offset, b, h, rows, start_n + BLOCK_N, BLOCK_M, BLOCK_N)
    return dq


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dq_kernel(
    q_ptr, stride_qb, stride_qm, stride_qh, stride_qd,
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,
    out_ptr, stride_ob, stride_om, stride_oh, stride_od,
    do_ptr, stride_dob, stride_dom, stride_doh, stride_dod,
    lse_ptr,  # [B, H, M] or [H, M], contiguous
    dlse_ptr,  # the same, with HAS_DLSE
    starts_q_ptr, starts_k_ptr, used_ptr,  # [B + 1], [B + 1] and [B], with IS_VARLEN
    slopes_ptr, stride_sb, stride_sh,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn,
    key_mask_ptr, stride_mb, stride_mn,
    rng_ptr,  # [2]
    dq_ptr, stride_dqb, stride_dqm, stride_dqh, stride_dqd,
    rows_ptr,  # lse's shape and 2, contiguous: lse in units of log2, and delta
    dbias_ptr, stride_dbb, stride_dbh, stride_dbm,  # [B, H, M, N], with STORES_DBIAS
    M, N, H, num_tiles, num_heads, heads_per_group,
    scale, scale_log2, softcap_log2, threshold, keep_scale, left, right,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    IS_VARLEN: tl.constexpr, HAS_USED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_DLSE: tl.constexpr, STORES_DBIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    pid_m, pid_bh = tile_of_head(
        tl.program_id(0), num_tiles, num_heads, heads_per_group, "growing" if HAS_RIGHT else "even"
    )
    pid_bh = order_heads(pid_bh, num_heads, H, stride_bb, HAS_BIAS)
    b = (pid_bh // H).to(tl.int64)
    h = (pid_bh % H).to(tl.int64)
    h_kv = h // GROUP
    start_m = pid_m * BLOCK_M
    first_row = start_m.to(tl.int64)
    head_row = pid_bh.to(tl.int64) * M  # of lse
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    if IS_VARLEN:
        head_row = h * M
        first_q, first_k, M, N = ragged_bounds(b, starts_q_ptr, starts_k_ptr, used_ptr, HAS_USED)
        if start_m >= M:
            return
        first_row += first_q
        head_row += first_q
        k_ptr += first_k * stride_kn
        v_ptr += first_k * stride_vn

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_m = offs_m < M - start_m
    mask_d = offs_d < HEAD_DIM
    mask_dv = offs_dv < HEAD_DIM_V
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    PAD_DV: tl.constexpr = HEAD_DIM_V != BLOCK_DV
    q_ptr += b * stride_qb + h * stride_qh + first_row * stride_qm
    q_ptrs = q_ptr + tile_offsets(offs_m, stride_qm, offs_d, stride_qd)
    q = load_tile(q_ptrs, mask_m, mask_d, True, PAD_D)  # [BLOCK_M, BLOCK_D]
    do_ptr += b * stride_dob + h * stride_doh + first_row * stride_dom
    do_ptrs = do_ptr + tile_offsets(offs_m, stride_dom, offs_dv, stride_dod)
    do = load_tile(do_ptrs, mask_m, mask_dv, True, PAD_DV)  # [BLOCK_M, BLOCK_DV]
    out_ptr += b * stride_ob + h * stride_oh + first_row * stride_om
    out_ptrs = out_ptr + tile_offsets(offs_m, stride_om, offs_dv, stride_od)
    out = load_tile(out_ptrs, mask_m, mask_dv, True, PAD_DV)  # [BLOCK_M, BLOCK_DV]

    row = head_row + start_m + offs_m
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row, mask=mask_m, other=0.0)
    lse_log2 = tl.load(lse_ptr + row, mask=mask_m, other=float("inf")) * LOG2_E
    # A row without keys has lse -inf; +inf makes its probabilities 0 instead of NaN.
    lse_log2 = tl.where(lse_log2 == -float("inf"), float("inf"), lse_log2)
    tl.store(rows_ptr + 2 * row, lse_log2, mask=mask_m)
    tl.store(rows_ptr + 2 * row + 1, delta, mask=mask_m)

    if HAS_BIAS > 0:
        bias_ptr += b * stride_bb + h * stride_bh
    if HAS_KEY_MASK > 0:
        key_mask_ptr += b * stride_mb
    slope_log2 = load_slope(slopes_ptr, stride_sb, stride_sh, b, h, HAS_ALIBI)
    seed, offset = load_state(rng_ptr, HAS_DROPOUT)
    bias_rows = offs_m
    if HAS_BIAS > 0:  # rows past the end read the last one: that is cheaper than a mask
        bias_rows = tl.minimum(offs_m, M - 1 - start_m) * stride_bm
        bias_ptr += start_m.to(tl.int64) * stride_bm
    lo, full_lo, full_hi, hi = key_blocks(
        start_m, M, N, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    dbias_rows = offs_m
    if STORES_DBIAS:
        dbias_rows = offs_m * stride_dbm
        dbias_ptr += b * stride_dbb + h * stride_dbh + start_m.to(tl.int64) * stride_dbm
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_LEFT:
        dq = _accumulate_dq(
            dq, q, do, lse_log2, delta, start_m + offs_m, bias_rows,
            k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
            bias_ptr, stride_bn, key_mask_ptr, stride_mn,
            dbias_ptr, dbias_rows, mask_m, lo, full_lo, M, N, b, h,
            scale_log2, softcap_log2, slope_log2, seed, offset, threshold, keep_scale, left, right,
            HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT, True,
            SOFTCAP, HAS_ALIBI, HAS_BIAS, HAS_KEY_MASK, HAS_DROPOUT, STORES_DBIAS, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, do, lse_log2, delta, start_m + offs_m, bias_rows,
        k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
        bias_ptr, stride_bn, key_mask_ptr, stride_mn,
        dbias_ptr, dbias_rows, mask_m, full_lo, full_hi, M, N, b, h,
        scale_log2, softcap_log2, slope_log2, seed, offset, threshold, keep_scale, left, right,
        HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT, False,
        SOFTCAP, HAS_ALIBI, HAS_BIAS, HAS_KEY_MASK, HAS_DROPOUT, STORES_DBIAS, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    # Without this branch ptxas cannot overlap the products where the loops also store (C7515).
    if (full_hi < hi) | (not STORES_DBIAS):
        dq = _accumulate_dq(
            dq, q, do, lse_log2, delta, start_m + offs_m, bias_rows,
            k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
            bias_ptr, stride_bn, key_mask_ptr, stride_mn,
            dbias_ptr, dbias_rows, mask_m, full_hi, hi, M, N, b, h,
            scale_log2, softcap_log2, slope_log2, seed, offset, threshold, keep_scale, left, right,
            HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT, True,
            SOFTCAP, HAS_ALIBI, HAS_BIAS, HAS_KEY_MASK, HAS_DROPOUT, STORES_DBIAS, PRECISION,
            BLOCK_M, TAIL_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    dq_ptr += b * stride_dqb + h * stride_dqh + first_row * stride_dqm
    dq_ptrs = dq_ptr + tile_offsets(offs_m, stride_dqm, offs_d, stride_dqd)
    mask = mask_m[:, None] & mask_d[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_pairs(pairs_ptr, offs_m, mask_m, IS_MASKED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Load a pair of numbers for each row; return two [BLOCK_M].

    Each pair is asked for four times: a load of fewer elements than threads would be made by every
    thread, and its addresses were an eighth of the instructions of the loop.
    """
    ptrs = pairs_ptr + 2 * offs_m[:, None] + tl.arange(0, 8)[None, :] % 2
    pairs = load_tile(ptrs, mask_m, mask_m, IS_MASKED, False)  # [BLOCK_M, 8]
    first, second = tl.split(tl.reshape(pairs, [BLOCK_M, 2, 2, 2]))
    return _first_of_four(first), _first_of_four(second)


@triton.jit
def _first_of_four(x):
    x, _ = tl.split(x)
    x, _ = tl.split(x)
    return x


# fmt: off
@triton.jit
def _accumulate_dk_dv(
    dk, dv, k, v, bias_cols, key_mask, start_n,
    q_ptr, stride_qm, stride_qd,
    do_ptr, stride_dom, stride_dod,
    row_ptr,
    bias_ptr, stride_bm,
    lo, full_lo, full_hi, hi, M, N, b, h,
    scale_log2, softcap_log2, slope_log2, seed, offset, threshold, keep_scale, left, right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, IS_TAIL: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    """Add dS^T Q and P^T dO over the query blocks in [lo, hi); tiles of scores are transposed.

    Blocks outside [full_lo, full_hi) look at the mask, in a branch.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_key = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_d = offs_d < HEAD_DIM
    mask_dv = offs_dv < HEAD_DIM_V
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    PAD_DV: tl.constexpr = HEAD_DIM_V != BLOCK_DV
    # A bias in registers of its own would make the program spill.
    STARTS_FROM_BIAS: tl.constexpr = HAS_BIAS > 0 and SOFTCAP == 0
    HAS_BIAS_LEFT: tl.constexpr = 0 if STARTS_FROM_BIAS else HAS_BIAS
    IS_BOOLEAN: tl.constexpr = (HAS_BIAS_LEFT == BOOLEAN) | (HAS_KEY_MASK == BOOLEAN)
    q_offs = tile_offsets(offs_m, stride_qm, offs_d, stride_qd)
    do_offs = tile_offsets(offs_m, stride_dom, offs_dv, stride_dod)
    q_ptr += tl.cast(lo, tl.int64) * stride_qm
    do_ptr += tl.cast(lo, tl.int64) * stride_dom
    if HAS_BIAS > 0:
        bias_offs = offs_m[:, None] * stride_bm + bias_cols[None, :]
        bias_ptr += tl.cast(lo, tl.int64) * stride_bm
    distance_f = (N - M) - offs_key.to(tl.float32)
    offs_mf = offs_m.to(tl.float32)
    next_bias = 0.0
    if HAS_BIAS > 0:  # as it lies in memory, rows of adjacent elements, and a tile ahead
        next_bias = tl.load(bias_ptr + bias_offs, mask=(offs_m < M - lo)[:, None], other=0)
    for start_m in range(lo, hi, BLOCK_M):
        mask_m = offs_m < M - start_m
        q = load_tile(q_ptr + q_offs, mask_m, mask_d, IS_TAIL, PAD_D)  # [BLOCK_M, BLOCK_D]
        do = load_tile(do_ptr + do_offs, mask_m, mask_dv, IS_TAIL, PAD_DV)  # [BLOCK_M, BLOCK_DV]
        lse_log2, delta = _load_pairs(row_ptr, start_m + offs_m, mask_m, IS_TAIL, BLOCK_M)
        bias_t = 0.0
        if HAS_BIAS > 0:
            bias_t = tl.trans(as_term(next_bias))
            bias_ptr += BLOCK_M * stride_bm
            mask_next = (offs_m < M - BLOCK_M - start_m)[:, None]
            next_bias = tl.load(bias_ptr + bias_offs, mask=mask_next, other=0)
        if STARTS_FROM_BIAS:
            first_t = first_products(bias_t, scale_log2, HAS_BIAS)  # [BLOCK_N, BLOCK_M]
            products_t = tl.dot(k, tl.trans(q), first_t, input_precision=PRECISION)
        else:
            products_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        distance_t = (distance_f + start_m)[:, None] + offs_mf[None, :]
        scores_t, factor, damping = modify_scores(
            products_t, distance_t, bias_t, key_mask, scale_log2, softcap_log2, slope_log2,
            SOFTCAP, HAS_ALIBI, HAS_BIAS_LEFT, HAS_KEY_MASK,
        )  # fmt: skip
        p_t = tl.math.exp2(scores_t * factor - lse_log2[None, :])
        if IS_BOOLEAN:
            anything = tl.full([1, 1], True, tl.int1)
            shown = is_shown(anything, bias_t, key_mask, HAS_BIAS_LEFT, HAS_KEY_MASK)
            p_t = tl.where(shown, p_t, 0.0)
        position = start_m + offs_m + (N - M)
        if IS_TAIL:
            visible = is_visible(
                position[None, :], offs_key[:, None], N, left, right, HAS_LEFT, HAS_RIGHT
            )
            p_t = tl.where(visible & mask_m[None, :], p_t, 0.0)
        elif HAS_LEFT or HAS_RIGHT:  # noqa: SIM102 - the outer one at compile time
            if (start_m < full_lo) | (start_m >= full_hi):
                visible = is_visible(
                    position[None, :], offs_key[:, None], N, left, right, HAS_LEFT, HAS_RIGHT
                )
                p_t = tl.where(visible, p_t, 0.0)
        kept_t = p_t
        if HAS_DROPOUT:
            rows = start_m + offs_m
            words = draw_words(seed, offset, b, h, rows, start_n, BLOCK_M, BLOCK_N)
            keep_t = keep_tile(words, threshold, BLOCK_M, BLOCK_N, TRANSPOSED=True)
            kept_t = drop(p_t, keep_t, threshold)
            dp_t = keep_scale * drop(dp_t, keep_t, threshold)
        dv = tl.dot(kept_t.to(do.dtype), do, dv, input_precision=PRECISION)
        ds_t = p_t * (dp_t - delta[None, :])
        if SOFTCAP > 0:
            ds_t *= damping
        dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
        q_ptr += BLOCK_M * stride_qm
        do_ptr += BLOCK_M * stride_dom
    return dk, dv


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_backward_dk_dv_kernel(
    q_ptr, stride_qb, stride_qm, stride_qh, stride_qd,
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,
    do_ptr, stride_dob, stride_dom, stride_doh, stride_dod,
    rows_ptr,  # [B, H, M, 2] or [H, M, 2], contiguous: lse in units of log2, and delta
    starts_q_ptr, starts_k_ptr, used_ptr,  # [B + 1], [B + 1] and [B], with IS_VARLEN
    slopes_ptr, stride_sb, stride_sh,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn,
    key_mask_ptr, stride_mb, stride_mn,
    rng_ptr,  # [2]
    dk_ptr, stride_dkb, stride_dkn, stride_dkh, stride_dkd,
    dv_ptr, stride_dvb, stride_dvn, stride_dvh, stride_dvd,
    M, N, H_KV, num_tiles, num_heads, heads_per_group,
    scale, scale_log2, softcap_log2, threshold, keep_scale, left, right,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    IS_VARLEN: tl.constexpr, HAS_USED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BIAS_RUN: tl.constexpr,
    BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    pid_n, pid_bh = tile_of_head(
        tl.program_id(0),
        num_tiles,
        num_heads,
        heads_per_group,
        "shrinking" if HAS_RIGHT else "even",
    )
    pid_bh = order_heads(pid_bh, num_heads, H_KV, stride_bb, HAS_BIAS)
    b = (pid_bh // H_KV).to(tl.int64)
    h_kv = (pid_bh % H_KV).to(tl.int64)
    start_n = pid_n * BLOCK_N
    first_key = start_n.to(tl.int64)
    first_q = first_key * 0
    head_rows = M
    group_row = pid_bh.to(tl.int64) * GROUP * M  # of rows_ptr
    if IS_VARLEN:
        group_row = h_kv * GROUP * M
        first_q, first_k, M, N = ragged_bounds(b, starts_q_ptr, starts_k_ptr, used_ptr, HAS_USED)
        if start_n >= N:
            return
        first_key += first_k

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_n = offs_n < N - start_n
    mask_d = offs_d < HEAD_DIM
    mask_dv = offs_dv < HEAD_DIM_V
    k_ptr += b * stride_kb + h_kv * stride_kh + first_key * stride_kn
    k_ptrs = k_ptr + tile_offsets(offs_n, stride_kn, offs_d, stride_kd)
    k = load_tile(k_ptrs, mask_n, mask_d, True, HEAD_DIM != BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v_ptr += b * stride_vb + h_kv * stride_vh + first_key * stride_vn
    v_ptrs = v_ptr + tile_offsets(offs_n, stride_vn, offs_dv, stride_vd)
    v = load_tile(v_ptrs, mask_n, mask_dv, True, HEAD_DIM_V != BLOCK_DV)  # [BLOCK_N, BLOCK_DV]

    lo, full_lo, full_hi, hi = query_blocks(
        start_n, M, N, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    whole_hi = tl.minimum(tl.cdiv(hi, BLOCK_M), M // BLOCK_M) * BLOCK_M
    tail = tl.maximum(lo, whole_hi)  # from here on a block has queries past the end
    bias_cols = offs_n
    key_mask = 0.0
    # Keys past the end read the last ones: that is cheaper than a mask.
    if HAS_BIAS > 0:
        last_run = (N - 1 - start_n) // BIAS_RUN * BIAS_RUN
        bias_cols = tl.minimum(offs_n // BIAS_RUN * BIAS_RUN, last_run) + offs_n % BIAS_RUN
        bias_cols = tl.max_contiguous(tl.multiple_of(bias_cols, BIAS_RUN), BIAS_RUN) * stride_bn
    if HAS_KEY_MASK > 0:
        key_mask_ptr += b * stride_mb + start_n.to(tl.int64) * stride_mn
        key_mask_ptrs = key_mask_ptr + offs_n * stride_mn
        key_mask = load_term(key_mask_ptrs, mask_n, True)[:, None]
    seed, offset = load_state(rng_ptr, HAS_DROPOUT)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # One loop for all but the tail and, with a window, a branch around the tail's: otherwise ptxas
    # cannot overlap the products of either loop (its remark C7515).
    for g in range(GROUP):
        h = h_kv * GROUP + g
        q_head = q_ptr + b * stride_qb + h * stride_qh + first_q * stride_qm
        do_head = do_ptr + b * stride_dob + h * stride_doh + first_q * stride_dom
        row_ptr = rows_ptr + 2 * (group_row + tl.cast(g, tl.int64) * head_rows + first_q)
        slope_log2 = load_slope(slopes_ptr, stride_sb, stride_sh, b, h, HAS_ALIBI)
        bias_head = bias_ptr
        if HAS_BIAS > 0:
            bias_head = bias_ptr + b * stride_bb + h * stride_bh
            bias_head += start_n.to(tl.int64) * stride_bn
        dk, dv = _accumulate_dk_dv(
            dk, dv, k, v, bias_cols, key_mask, start_n,
            q_head, stride_qm, stride_qd, do_head, stride_dom, stride_dod, row_ptr,
            bias_head, stride_bm,
            lo, full_lo, full_hi, tail, M, N, b, h,
            scale_log2, softcap_log2, slope_log2, seed, offset, threshold, keep_scale, left, right,
            HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT, False,
            SOFTCAP, HAS_ALIBI, HAS_BIAS, HAS_KEY_MASK, HAS_DROPOUT, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        if (tail < hi) | (not (HAS_LEFT or HAS_RIGHT)):
            dk, dv = _accumulate_dk_dv(
                dk, dv, k, v, bias_cols, key_mask, start_n,
                q_head, stride_qm, stride_qd, do_head, stride_dom, stride_dod, row_ptr,
                bias_head, stride_bm,
                tail, full_lo, full_hi, hi, M, N, b, h,
                scale_log2, softcap_log2, slope_log2, seed, offset, threshold, keep_scale,
                left, right,
                HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT, True,
                SOFTCAP, HAS_ALIBI, HAS_BIAS, HAS_KEY_MASK, HAS_DROPOUT, PRECISION,
                TAIL_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    if HAS_DROPOUT:
        dv *= keep_scale
    mask = mask_n[:, None] & mask_d[None, :]
    dk_ptr += b * stride_dkb + h_kv * stride_dkh + first_key * stride_dkn
    dk_ptrs = dk_ptr + tile_offsets(offs_n, stride_dkn, offs_d, stride_dkd)
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    mask = mask_n[:, None] & mask_dv[None, :]
    dv_ptr += b * stride_dvb + h_kv * stride_dvh + first_key * stride_dvn
    dv_ptrs = dv_ptr + tile_offsets(offs_n, stride_dvn, offs_dv, stride_dvd)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask)


_launch_dq = Launcher(_attention_backward_dq_kernel, check=problem.require_narrow_tiles)
_launch_dk_dv = Launcher(_attention_backward_dk_dv_kernel, check=problem.require_narrow_tiles)


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs_dbias: bool,
    options: Options,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v, attn_bias and sinks, given those of out and, maybe, lse."""
    size = problem.size(q, k, v, options)
    bias, sinks = options.attn_bias if needs_dbias else None, options.sinks
    if size.B * size.M * size.H * size.N == 0:
        return _empty_gradients(dlse, q, k, v, bias, sinks)
    rows = torch.empty((*lse.shape, 2), dtype=torch.float32, device=q.device)
    if options.is_varlen and sinks is not None:
        rows.zero_()  # of tokens that are in no sequence
    terms = problem.score_terms(q, size, options)
    dbias = None if bias is None else _expanded_dbias(bias, q, size, options)
    dq = _dq(dout, dlse, q, k, v, out, lse, rows, dbias, size, terms, options)
    dk, dv = _dk_dv(dout, q, k, v, rows, size, terms, options)
    if dbias is not None:
        dbias = dbias.sum_to_size(bias.shape)
    elif bias is not None:
        dbias = bias_gradient(dout, q, k, v, rows, size, terms, options)
    return dq, dk, dv, dbias, None if sinks is None else _dsinks(sinks, rows)


def _empty_gradients(dlse, q, k, v, bias, sinks):
    """Gradients where no query has a key: a sink alone is what its lse is."""
    grads = [None if x is None else x.new_zeros(x.shape) for x in (q, k, v, bias, sinks)]
    if sinks is not None and dlse is not None:
        grads[4] = dlse.sum(-1).sum_to_size(sinks.shape).to(sinks.dtype)
    return tuple(grads)


def _dsinks(sinks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Gradient of sinks (H,), summed over the queries of `rows` (..., H, M, 2)."""
    lse_log2, delta = rows.unbind(-1)
    share = torch.exp2(sinks.float()[:, None] * problem.LOG2_E - lse_log2)
    grad = -(share * delta).sum(-1)
    return (grad.sum(0) if grad.dim() == 2 else grad).to(sinks.dtype)


def _expanded_dbias(bias, q, size, options):
    """Memory for the gradient of a bias (B, H, M, N) before it is summed, or None for too much.

    Triton stores tiles through shared memory, of which wide heads and biases leave too little.
    """
    whole = (size.B, size.H, size.M, size.N)
    limit = max(_MOST_COPIES * bias.numel(), _MOST_EXPANDED)
    if bias.shape[2:] != whole[2:] or math.prod(whole) > limit:
        return None
    head_bytes = tiling.padded_head_dim(max(size.D, size.D_v)) * q.element_size()
    if bias.element_size() != q.element_size() or head_bytes > _WIDEST_HEAD:
        return None
    is_all_written = options.window == (-1, -1) and not options.is_varlen
    return bias.new_empty(whole) if is_all_written else bias.new_zeros(whole)


def _dq(dout, dlse, q, k, v, out, lse, rows, dbias, size, terms, options):
    """Compute dq, and fill `rows` for the other kernels and `dbias` (B, H, M, N) if it is there."""
    left, right = options.window
    dq = ragged.new_gradient(q, options.cu_seqlens_q)
    config = configs.tiles(configs.BACKWARD_DQ, q, size, options.window)
    num_tiles = tiling.ceil_div(size.M, config.block_m)
    strides = tuple(problem.four_strides(x, options) for x in (q, k, v, out, dout, dq))
    dbias_strides = (0, 0, 0) if dbias is None else dbias.stride()[:3]
    _launch_dq(
        num_tiles * size.B * size.H,
        strides=(*strides, terms.key, dbias_strides),
        args=(
            q, *strides[0],
            k, *strides[1],
            v, *strides[2],
            out, *strides[3],
            dout, *strides[4],
            lse,
            None if dlse is None else dlse.contiguous(),
            *problem.starts(options),
            *terms.args,
            dq, *strides[5],
            rows,
            dbias, *dbias_strides,
            size.rows, size.N, size.H, num_tiles, size.B * size.H,
            problem.heads_per_group(k, size.N),
            options.scale, problem.log2_scale(options), *terms.scalars, left, right,
        ),
        constexprs={
            "GROUP": size.H // size.H_KV, "HEAD_DIM": size.D, "HEAD_DIM_V": size.D_v,
            "IS_VARLEN": options.is_varlen, "HAS_USED": options.seqused_k is not None,
            "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0, **terms.flags,
            "HAS_DLSE": dlse is not None, "STORES_DBIAS": dbias is not None,
            "PRECISION": tiling.dot_precision(q),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
            "TAIL_N": problem.tail_block(size.N, config.block_n, options),
            "BLOCK_D": tiling.padded_head_dim(size.D),
            "BLOCK_DV": tiling.padded_head_dim(size.D_v),
        },
        config=config,
    )  # fmt: skip
    return dq


def _dk_dv_table(options):
    if options.attn_bias is not None:
        return configs.BACKWARD_DK_DV_BIAS
    if options.alibi_slopes is not None:
        return configs.BACKWARD_DK_DV_TERMS
    return configs.BACKWARD_DK_DV


def _dk_dv(dout, q, k, v, rows, size, terms, options):
    """Compute dk and dv from the `rows` that `_dq` left."""
    left, right = options.window
    dk, dv = (
        ragged.new_gradient(x, options.cu_seqlens_k, is_partly_used=options.seqused_k is not None)
        for x in (k, v)
    )
    config = configs.tiles(_dk_dv_table(options), q, size, options.window)
    num_tiles = tiling.ceil_div(size.N, config.block_n)
    strides = tuple(problem.four_strides(x, options) for x in (q, k, v, dout, dk, dv))
    _launch_dk_dv(
        num_tiles * size.B * size.H_KV,
        strides=(*strides, terms.key),
        args=(
            q, *strides[0],
            k, *strides[1],
            v, *strides[2],
            dout, *strides[3],
            rows,
            *problem.starts(options),
            *terms.args,
            dk, *strides[4],
            dv, *strides[5],
            size.rows, size.N, size.H_KV, num_tiles, size.B * size.H_KV,
            problem.heads_per_group(q, size.M),
            options.scale, problem.log2_scale(options), *terms.scalars, left, right,
        ),
        constexprs={
            "GROUP": size.H // size.H_KV, "HEAD_DIM": size.D, "HEAD_DIM_V": size.D_v,
            "IS_VARLEN": options.is_varlen, "HAS_USED": options.seqused_k is not None,
            "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0, **terms.flags,
            "PRECISION": tiling.dot_precision(q),
            "BIAS_RUN": problem.bias_run(options.attn_bias), "BLOCK_M": config.block_m,
            "TAIL_M": problem.tail_block(size.M, config.block_m, options),
            "BLOCK_N": config.block_n, "BLOCK_D": tiling.padded_head_dim(size.D),
            "BLOCK_DV": tiling.padded_head_dim(size.D_v),
        },
        config=config,
    )  # fmt: skip
    return dk, dv
