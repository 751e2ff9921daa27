"""The gradient of queries: one program owns BLOCK_M queries and walks the keys they see.

It computes delta of its rows on the way, which the kernels for other gradients read.
"""

import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.dropout import draw_words, drop, keep_tile
from attn_core.tiles.masks import is_visible, key_blocks
from attn_core.tiles.offsets import head_offsets, load_head, store_head
from attn_core.tiles.softmax import LOG2_E
from attn_core.tiles.swizzle import tile_of_head
from attn_flash._triton import configs, problem, ragged
from attn_flash._triton.scores import (
    BOOLEAN,
    is_shown,
    load_slope,
    load_state,
    load_term,
    modify_scores,
    order_heads,
)
from attn_flash._triton.sequences import ragged_bounds


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
    IS_BOOLEAN: tl.constexpr = (HAS_BIAS == BOOLEAN) | (HAS_KEY_MASK == BOOLEAN)
    k_offs = head_offsets(offs_n, stride_kn, stride_kd, BLOCK_D)
    v_offs = head_offsets(offs_n, stride_vn, stride_vd, BLOCK_DV)
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
        k = load_head(k_ptr + k_offs, mask_n, MASKED, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
        v = load_head(v_ptr + v_offs, mask_n, MASKED, HEAD_DIM_V)  # [BLOCK_N, BLOCK_DV]
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
    mask_m = offs_m < M - start_m
    q_ptr += b * stride_qb + h * stride_qh + first_row * stride_qm
    q_ptrs = q_ptr + head_offsets(offs_m, stride_qm, stride_qd, BLOCK_D)
    q = load_head(q_ptrs, mask_m, True, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    do_ptr += b * stride_dob + h * stride_doh + first_row * stride_dom
    do_ptrs = do_ptr + head_offsets(offs_m, stride_dom, stride_dod, BLOCK_DV)
    do = load_head(do_ptrs, mask_m, True, HEAD_DIM_V)  # [BLOCK_M, BLOCK_DV]
    out_ptr += b * stride_ob + h * stride_oh + first_row * stride_om
    out_ptrs = out_ptr + head_offsets(offs_m, stride_om, stride_od, BLOCK_DV)
    out = load_head(out_ptrs, mask_m, True, HEAD_DIM_V)  # [BLOCK_M, BLOCK_DV]

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
    # Keys to the left of those that all rows see, these, and keys to their right.
    for part in tl.static_range(0 if HAS_LEFT else 1, 3):
        first, last = full_lo, full_hi
        if part == 0:
            first, last = lo, full_lo
        elif part == 2:
            first, last = full_hi, hi
        # Without this branch ptxas cannot overlap the products where the loops also store (C7515).
        if (first < last) | (part < 2) | (not STORES_DBIAS):
            dq = _accumulate_dq(
                dq, q, do, lse_log2, delta, start_m + offs_m, bias_rows,
                k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
                bias_ptr, stride_bn, key_mask_ptr, stride_mn,
                dbias_ptr, dbias_rows, mask_m, first, last, M, N, b, h,
                scale_log2, softcap_log2, slope_log2, seed, offset, threshold, keep_scale,
                left, right,
                HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT, part != 1,
                SOFTCAP, HAS_ALIBI, HAS_BIAS, HAS_KEY_MASK, HAS_DROPOUT, STORES_DBIAS, PRECISION,
                BLOCK_M, TAIL_N if part == 2 else BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    dq_ptr += b * stride_dqb + h * stride_dqh + first_row * stride_dqm
    dq_ptrs = dq_ptr + head_offsets(offs_m, stride_dqm, stride_dqd, BLOCK_D)
    store_head(dq_ptrs, dq * scale, mask_m, HEAD_DIM)


_launch = Launcher(_attention_backward_dq_kernel, check=problem.require_narrow_tiles)
_launch_capped = {
    cap: Launcher(_attention_backward_dq_kernel, check=problem.require_narrow_tiles, maxnreg=cap)
    for cap in configs.REGISTER_CAPS
}


def query_gradient(dout, dlse, q, k, v, out, lse, rows, dbias, size, terms, options):
    """Compute dq, and fill `rows` for the other kernels and `dbias` (B, H, M, N) if it is there."""
    left, right = options.window
    dq = ragged.new_gradient(q, options.cu_seqlens_q)
    is_short = configs.is_short_window(options)
    table = configs.BACKWARD_DQ_WINDOW if is_short else configs.BACKWARD_DQ
    config = configs.tiles(table, q, size, options.window)
    # With the gradient of a bias there is no memory for a program more.
    cap = configs.registers("backward_dq", q, size, options, config) if dbias is None else 0
    num_tiles = tiling.ceil_div(size.M, config.block_m)
    strides = tuple(problem.four_strides(x, options) for x in (q, k, v, out, dout, dq))
    dbias_strides = (0, 0, 0) if dbias is None else dbias.stride()[:3]
    launch = _launch_capped[cap] if cap else _launch
    launch(
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
