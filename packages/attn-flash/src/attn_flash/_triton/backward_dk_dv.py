"""The gradients of keys and values: one program owns BLOCK_N keys and walks the queries they meet.

Tiles of scores are transposed: as products of keys and queries they are ready to be summed up.
"""

import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.dropout import draw_words, drop, keep_tile
from attn_core.tiles.masks import is_visible, query_blocks
from attn_core.tiles.offsets import head_offsets, load_head, load_tile, store_head
from attn_core.tiles.swizzle import tile_of_head
from attn_flash._triton import configs, problem, ragged
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


@triton.jit
def _bias_columns(start_n, N, stride_bn, RUN: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of keys along a row of the bias, [1, BLOCK_N / 16, 1, 16].

    Keys past the end read the last ones: that is cheaper than a mask. RUN of them share 16 bytes.
    """
    first = 16 * tl.arange(0, BLOCK_N // 16)[None, :, None, None]
    cols = first + tl.arange(0, 16)[None, None, None, :]
    last_run = (N - 1 - start_n) // RUN * RUN
    cols = tl.minimum(cols // RUN * RUN, last_run) + cols % RUN
    return tl.max_contiguous(tl.multiple_of(cols, (1, 1, 1, RUN)), (1, 1, 1, RUN)) * stride_bn


@triton.jit
def _bias_rows(RUN: tl.constexpr, BLOCK_M: tl.constexpr):
    """Numbers of queries in a tile of the bias, [ROWS, 1, BLOCK_M / ROWS, 1].

    The 16 keys of a piece are those that one warp holds of the transposed products. In this order
    of dimensions it loads them itself, 32 runs at a time, and nothing travels between warps.
    """
    ROWS: tl.constexpr = 2 * RUN if 2 * RUN < BLOCK_M else BLOCK_M  # noqa: FURB136
    first = ROWS * tl.arange(0, BLOCK_M // ROWS)[None, None, :, None]
    return first + tl.arange(0, ROWS)[:, None, None, None]


@triton.jit
def _transposed(bias, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Make [BLOCK_N, BLOCK_M] of the pieces of a bias."""
    return tl.reshape(tl.permute(bias, (1, 3, 2, 0)), (BLOCK_N, BLOCK_M))


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
    BIAS_RUN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    """Add dS^T Q and P^T dO over the query blocks in [lo, hi); tiles of scores are transposed.

    Blocks outside [full_lo, full_hi) look at the mask, in a branch.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_key = start_n + tl.arange(0, BLOCK_N)
    # A bias in registers of its own would make the program spill.
    STARTS_FROM_BIAS: tl.constexpr = HAS_BIAS > 0 and SOFTCAP == 0
    HAS_BIAS_LEFT: tl.constexpr = 0 if STARTS_FROM_BIAS else HAS_BIAS
    IS_BOOLEAN: tl.constexpr = (HAS_BIAS_LEFT == BOOLEAN) | (HAS_KEY_MASK == BOOLEAN)
    q_offs = head_offsets(offs_m, stride_qm, stride_qd, BLOCK_D)
    do_offs = head_offsets(offs_m, stride_dom, stride_dod, BLOCK_DV)
    q_ptr += tl.cast(lo, tl.int64) * stride_qm
    do_ptr += tl.cast(lo, tl.int64) * stride_dom
    bias_rows = offs_m
    if HAS_BIAS > 0:
        bias_rows = _bias_rows(BIAS_RUN, BLOCK_M)
        bias_offs = bias_rows * stride_bm + bias_cols
        bias_ptr += tl.cast(lo, tl.int64) * stride_bm
    distance_f = (N - M) - offs_key.to(tl.float32)
    offs_mf = offs_m.to(tl.float32)
    next_bias = 0.0
    if HAS_BIAS > 0:  # as it lies in memory, and a tile ahead
        next_bias = tl.load(bias_ptr + bias_offs, mask=bias_rows < M - lo, other=0)
    for start_m in range(lo, hi, BLOCK_M):
        mask_m = offs_m < M - start_m
        q = load_head(q_ptr + q_offs, mask_m, IS_TAIL, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
        do = load_head(do_ptr + do_offs, mask_m, IS_TAIL, HEAD_DIM_V)  # [BLOCK_M, BLOCK_DV]
        lse_log2, delta = _load_pairs(row_ptr, start_m + offs_m, mask_m, IS_TAIL, BLOCK_M)
        bias_t = 0.0
        if HAS_BIAS > 0:
            bias_t = as_term(_transposed(next_bias, BLOCK_M, BLOCK_N))
            bias_ptr += BLOCK_M * stride_bm
            mask_next = bias_rows < M - BLOCK_M - start_m
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
    mask_n = offs_n < N - start_n
    k_ptr += b * stride_kb + h_kv * stride_kh + first_key * stride_kn
    k_ptrs = k_ptr + head_offsets(offs_n, stride_kn, stride_kd, BLOCK_D)
    k = load_head(k_ptrs, mask_n, True, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
    v_ptr += b * stride_vb + h_kv * stride_vh + first_key * stride_vn
    v_ptrs = v_ptr + head_offsets(offs_n, stride_vn, stride_vd, BLOCK_DV)
    v = load_head(v_ptrs, mask_n, True, HEAD_DIM_V)  # [BLOCK_N, BLOCK_DV]

    lo, full_lo, full_hi, hi = query_blocks(
        start_n, M, N, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    whole_hi = tl.minimum(tl.cdiv(hi, BLOCK_M), M // BLOCK_M) * BLOCK_M
    tail = tl.maximum(lo, whole_hi)  # from here on a block has queries past the end
    bias_cols = offs_n
    key_mask = 0.0
    if HAS_BIAS > 0:
        bias_cols = _bias_columns(start_n, N, stride_bn, BIAS_RUN, BLOCK_N)
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
        for is_tail in tl.static_range(2):
            first, last = lo, tail
            if is_tail:
                first, last = tail, hi
            if (first < last) | (not is_tail) | (not (HAS_LEFT or HAS_RIGHT)):
                dk, dv = _accumulate_dk_dv(
                    dk, dv, k, v, bias_cols, key_mask, start_n,
                    q_head, stride_qm, stride_qd, do_head, stride_dom, stride_dod, row_ptr,
                    bias_head, stride_bm,
                    first, full_lo, full_hi, last, M, N, b, h,
                    scale_log2, softcap_log2, slope_log2, seed, offset, threshold, keep_scale,
                    left, right,
                    HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT, is_tail,
                    SOFTCAP, HAS_ALIBI, HAS_BIAS, HAS_KEY_MASK, HAS_DROPOUT, PRECISION, BIAS_RUN,
                    TAIL_M if is_tail else BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip

    if HAS_DROPOUT:
        dv *= keep_scale
    dk_ptr += b * stride_dkb + h_kv * stride_dkh + first_key * stride_dkn
    dk_ptrs = dk_ptr + head_offsets(offs_n, stride_dkn, stride_dkd, BLOCK_D)
    store_head(dk_ptrs, dk * scale, mask_n, HEAD_DIM)
    dv_ptr += b * stride_dvb + h_kv * stride_dvh + first_key * stride_dvn
    dv_ptrs = dv_ptr + head_offsets(offs_n, stride_dvn, stride_dvd, BLOCK_DV)
    store_head(dv_ptrs, dv, mask_n, HEAD_DIM_V)


_launch = Launcher(_attention_backward_dk_dv_kernel, check=problem.require_narrow_tiles)
_launch_capped = {
    cap: Launcher(_attention_backward_dk_dv_kernel, check=problem.require_narrow_tiles, maxnreg=cap)
    for cap in configs.REGISTER_CAPS
}


def key_gradients(dout, q, k, v, rows, size, terms, options):
    """Compute dk and dv from the `rows` that `_dq` left."""
    left, right = options.window
    dk, dv = (
        ragged.new_gradient(x, options.cu_seqlens_k, is_partly_used=options.seqused_k is not None)
        for x in (k, v)
    )
    config = configs.tiles(configs.dk_dv_table(q, options), q, size, options.window)
    cap = configs.registers("backward_dk_dv", q, size, options, config)
    num_tiles = tiling.ceil_div(size.N, config.block_n)
    strides = tuple(problem.four_strides(x, options) for x in (q, k, v, dout, dk, dv))
    launch = _launch_capped[cap] if cap else _launch
    launch(
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
