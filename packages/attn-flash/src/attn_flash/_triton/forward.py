"""Forward pass: one program attends with BLOCK_M queries of one head to all keys they see."""

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.dropout import draw_words, drop, keep_tile
from attn_core.tiles.masks import is_visible, key_blocks
from attn_core.tiles.offsets import head_offsets, load_head, store_head
from attn_core.tiles.scores import first_state
from attn_core.tiles.softmax import finish_softmax, online_softmax
from attn_core.tiles.swizzle import tile_of_head
from attn_flash._triton import configs, problem, ragged
from attn_flash._triton.scores import (
    ADDED,
    FAST_DROPOUT,
    add_columns,
    exp2_bounded,
    finish_softmax_added,
    first_maximum_added,
    is_shown,
    load_slope,
    load_state,
    load_term,
    modify_scores,
    online_softmax_added,
    online_softmax_shown,
    order_heads,
)
from attn_flash._triton.sequences import paged_rows, ragged_bounds
from attn_flash.options import Options


# fmt: off
@triton.jit
def _attend(
    acc, m_i, l_i, q, rows, bias_rows,
    k_ptr, stride_kb, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vd,
    table_ptr, stride_tn,
    bias_ptr, stride_bn,
    key_mask_ptr, stride_mn,
    lo, hi, M, N, b, h, scale_log2, softcap_log2, slope_log2, seed, offset, threshold, left, right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    IS_BOUNDED: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    """Attend to the key blocks in [lo, hi), with or without looking at the mask."""
    IS_FAST: tl.constexpr = HAS_DROPOUT == FAST_DROPOUT
    offs_n = tl.arange(0, BLOCK_N)
    IS_ADDED: tl.constexpr = (HAS_BIAS == ADDED) | (HAS_KEY_MASK == ADDED)
    k_offs = head_offsets(offs_n, stride_kn, stride_kd, BLOCK_D)
    v_offs = head_offsets(offs_n, stride_vn, stride_vd, BLOCK_DV)
    if PAGE_SIZE == 0:
        k_ptr += tl.cast(lo, tl.int64) * stride_kn
        v_ptr += tl.cast(lo, tl.int64) * stride_vn
    if HAS_BIAS > 0:
        bias_offs = bias_rows[:, None] + offs_n[None, :] * stride_bn
        bias_ptr += tl.cast(lo, tl.int64) * stride_bn
    if HAS_KEY_MASK > 0:
        key_mask_ptrs = key_mask_ptr + tl.cast(lo, tl.int64) * stride_mn + offs_n * stride_mn
    position_f = (rows + (N - M)).to(tl.float32)
    offs_nf = offs_n.to(tl.float32)
    # Loaded a tile ahead: Triton's pipeline takes no loads of single bytes.
    next_key_mask = 0.0
    if HAS_KEY_MASK > 0:
        next_key_mask = load_term(key_mask_ptrs, offs_n < N - lo, True)
    # The products of the next tile run beside the softmax of this one. At the end there is no next.
    IS_AHEAD: tl.constexpr = AHEAD and not MASKED
    next_products = 0.0
    if IS_AHEAD:
        k = load_head(k_ptr + k_offs, offs_n < N - lo, True, HEAD_DIM)
        next_products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        k_ptr += tl.where(lo + BLOCK_N < hi, BLOCK_N, 0) * stride_kn
    for start_n in range(lo, hi, BLOCK_N):
        mask_n = offs_n < N - start_n
        if PAGE_SIZE > 0:
            k_rows, v_rows = paged_rows(
                table_ptr, stride_tn, start_n + offs_n, mask_n,
                stride_kb, stride_kn, stride_vb, stride_vn, PAGE_SIZE,
            )  # fmt: skip
            k_ptrs = k_ptr + (k_rows[:, None] + tl.arange(0, BLOCK_D)[None, :] * stride_kd)
            v_ptrs = v_ptr + (v_rows[:, None] + tl.arange(0, BLOCK_DV)[None, :] * stride_vd)
        else:
            k_ptrs, v_ptrs = k_ptr + k_offs, v_ptr + v_offs
        k = load_head(k_ptrs, mask_n, MASKED, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
        v = load_head(v_ptrs, mask_n, MASKED, HEAD_DIM_V)  # [BLOCK_N, BLOCK_DV]
        bias, key_mask = 0.0, 0.0
        if HAS_BIAS > 0:
            bias = load_term(bias_ptr + bias_offs, mask_n[None, :], MASKED, SHIFTS=True)
            bias_ptr += BLOCK_N * stride_bn
        if HAS_KEY_MASK > 0:
            key_mask = next_key_mask[None, :]
            key_mask_ptrs += tl.where(start_n + BLOCK_N < hi, BLOCK_N, 0) * stride_mn
            next_key_mask = load_term(key_mask_ptrs, offs_n < N - start_n - BLOCK_N, MASKED)
        products = next_products  # [BLOCK_M, BLOCK_N]
        if IS_AHEAD:
            next_products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        distance = (position_f - start_n)[:, None] - offs_nf[None, :]
        scores, factor, _ = modify_scores(
            products, distance, bias, key_mask, scale_log2, softcap_log2, slope_log2,
            SOFTCAP, HAS_ALIBI, HAS_BIAS, HAS_KEY_MASK,
        )  # fmt: skip
        visible = tl.full([1, 1], True, tl.int1)
        if MASKED:
            visible = is_visible(
                rows[:, None] + (N - M), start_n + offs_n[None, :], N, left, right,
                HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
        visible = is_shown(visible, bias, key_mask, HAS_BIAS, HAS_KEY_MASK)
        alpha = 1.0
        if IS_BOUNDED:
            p = tl.where(visible, exp2_bounded(scores, factor), 0.0)
            l_i = add_columns(l_i, p, BLOCK_M, BLOCK_N)
        elif IS_ADDED:
            m_i, l_i, alpha, p = online_softmax_added(m_i, l_i, scores, visible)
        elif MASKED or HAS_BIAS > 0 or HAS_KEY_MASK > 0:
            m_i, l_i, alpha, p = online_softmax_shown(m_i, l_i, scores, factor, visible)
        else:
            m_i, l_i, alpha, p = online_softmax(m_i, l_i, scores, factor)
        if HAS_DROPOUT:
            words = draw_words(seed, offset, b, h, rows, start_n, BLOCK_M, BLOCK_N, IS_FAST)
            p = drop(p, keep_tile(words, threshold, BLOCK_M, BLOCK_N), threshold)
        if not IS_BOUNDED:
            acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        if PAGE_SIZE == 0:
            if IS_AHEAD:
                k_ptr += tl.where(start_n + 2 * BLOCK_N < hi, BLOCK_N, 0) * stride_kn
            else:
                k_ptr += BLOCK_N * stride_kn
            v_ptr += BLOCK_N * stride_vn
    return acc, m_i, l_i


# fmt: off
@triton.jit
def _attend_rows(
    q_ptr, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vd,
    table_ptr, stride_tn,
    bias_ptr, stride_bm, stride_bn,
    key_mask_ptr, stride_mn,
    sink_ptr,
    out_ptr, stride_om, stride_od,
    lse_ptr,
    start_m, M, N, b, h,
    scale_log2, softcap_log2, slope_log2, seed, offset, threshold, keep_scale, left, right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_SINKS: tl.constexpr,
    NEGATE_Q: tl.constexpr, IS_BOUNDED: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    """Compute BLOCK_M rows of one head; the pointers are those of the head."""
    offs_m = tl.arange(0, BLOCK_M)
    rows = start_m + offs_m
    mask_m = offs_m < M - start_m
    first_row = start_m.to(tl.int64)
    q_ptr += first_row * stride_qm
    q_ptrs = q_ptr + head_offsets(offs_m, stride_qm, stride_qd, BLOCK_D)
    q = load_head(q_ptrs, mask_m, True, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    if NEGATE_Q:  # a running maximum needs a scale that is not negative
        q = -q

    lo, full_lo, full_hi, hi = key_blocks(
        start_m, M, N, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    bias_rows = offs_m
    if HAS_BIAS > 0:  # rows past the end read the last one: that is cheaper than a mask
        bias_rows = tl.minimum(offs_m, M - 1 - start_m) * stride_bm
        bias_ptr += first_row * stride_bm
    if HAS_SINKS:
        sink_ptr += offs_m * 0
    IS_ADDED: tl.constexpr = (HAS_BIAS == ADDED) | (HAS_KEY_MASK == ADDED)
    m_i, l_i = first_state(sink_ptr, mask_m, HAS_SINKS, BLOCK_M)
    if IS_ADDED:
        m_i = first_maximum_added(m_i)
    if IS_BOUNDED:  # 0 instead of a maximum
        m_i = tl.zeros([BLOCK_M], tl.float32)
        l_i = tl.zeros([BLOCK_M, 4], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # Keys to the left of those that all rows see, these, and keys to their right.
    for part in tl.static_range(0 if HAS_LEFT else 1, 3):
        first, last = full_lo, full_hi
        if part == 0:
            first, last = lo, full_lo
        elif part == 2:
            first, last = full_hi, hi
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q, rows, bias_rows,
            k_ptr, stride_kb, stride_kn, stride_kd, v_ptr, stride_vb, stride_vn, stride_vd,
            table_ptr, stride_tn, bias_ptr, stride_bn, key_mask_ptr, stride_mn,
            first, last, M, N, b, h,
            scale_log2, softcap_log2, slope_log2, seed, offset, threshold, left, right,
            HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, HAS_LEFT, HAS_RIGHT, part != 1,
            SOFTCAP, HAS_ALIBI, HAS_BIAS, HAS_KEY_MASK, HAS_DROPOUT, IS_BOUNDED, AHEAD, PRECISION,
            BLOCK_M, TAIL_N if part == 2 else BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    if IS_BOUNDED:
        l_i = tl.sum(l_i, 1)
    if HAS_DROPOUT:
        acc *= keep_scale
    if IS_ADDED:
        out, lse = finish_softmax_added(m_i, l_i, acc)
    else:
        out, lse = finish_softmax(m_i, l_i, acc)
    tl.store(lse_ptr + rows, lse, mask=mask_m)
    out_ptr += first_row * stride_om
    out_ptrs = out_ptr + head_offsets(offs_m, stride_om, stride_od, BLOCK_DV)
    store_head(out_ptrs, out, mask_m, HEAD_DIM_V)


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_forward_kernel(
    q_ptr, stride_qb, stride_qm, stride_qh, stride_qd,
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,
    starts_q_ptr, starts_k_ptr, used_ptr,  # [B + 1], [B + 1] and [B], with IS_VARLEN
    table_ptr, stride_tb, stride_tn,
    slopes_ptr, stride_sb, stride_sh,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn,
    key_mask_ptr, stride_mb, stride_mn,
    rng_ptr,  # [2]
    sinks_ptr,  # [H], contiguous
    out_ptr, stride_ob, stride_om, stride_oh, stride_od,
    lse_ptr,  # [B, H, M] or [H, M], contiguous
    M, N, H, num_tiles, num_heads, heads_per_group,
    scale_log2, softcap_log2, threshold, keep_scale, left, right,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr, IS_VARLEN: tl.constexpr, HAS_USED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_SINKS: tl.constexpr,
    NEGATE_Q: tl.constexpr, IS_BOUNDED: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
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
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += h_kv * stride_kh
    v_ptr += h_kv * stride_vh
    out_ptr += b * stride_ob + h * stride_oh
    if IS_VARLEN:
        lse_ptr += h * M
        first_q, first_k, M, N = ragged_bounds(b, starts_q_ptr, starts_k_ptr, used_ptr, HAS_USED)
        if pid_m * BLOCK_M >= M:
            return
        q_ptr += first_q * stride_qm
        out_ptr += first_q * stride_om
        lse_ptr += first_q
        if PAGE_SIZE > 0:
            table_ptr += b * stride_tb
        else:
            k_ptr += first_k * stride_kn
            v_ptr += first_k * stride_vn
    else:
        k_ptr += b * stride_kb
        v_ptr += b * stride_vb
        lse_ptr += pid_bh.to(tl.int64) * M
    if HAS_SINKS:
        sinks_ptr += h
    if HAS_BIAS > 0:
        bias_ptr += b * stride_bb + h * stride_bh
    if HAS_KEY_MASK > 0:
        key_mask_ptr += b * stride_mb
    slope_log2 = load_slope(slopes_ptr, stride_sb, stride_sh, b, h, HAS_ALIBI)
    seed, offset = load_state(rng_ptr, HAS_DROPOUT)
    if TAIL_M < BLOCK_M and pid_m == num_tiles - 1:
        _attend_rows(
            q_ptr, stride_qm, stride_qd, k_ptr, stride_kb, stride_kn, stride_kd,
            v_ptr, stride_vb, stride_vn, stride_vd, table_ptr, stride_tn,
            bias_ptr, stride_bm, stride_bn, key_mask_ptr, stride_mn, sinks_ptr,
            out_ptr, stride_om, stride_od, lse_ptr, pid_m * BLOCK_M, M, N, b, h,
            scale_log2, softcap_log2, slope_log2, seed, offset, threshold, keep_scale, left, right,
            HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, HAS_LEFT, HAS_RIGHT,
            SOFTCAP, HAS_ALIBI, HAS_BIAS, HAS_KEY_MASK, HAS_DROPOUT, HAS_SINKS,
            NEGATE_Q, IS_BOUNDED, AHEAD, PRECISION, TAIL_M, BLOCK_N, TAIL_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    else:
        _attend_rows(
            q_ptr, stride_qm, stride_qd, k_ptr, stride_kb, stride_kn, stride_kd,
            v_ptr, stride_vb, stride_vn, stride_vd, table_ptr, stride_tn,
            bias_ptr, stride_bm, stride_bn, key_mask_ptr, stride_mn, sinks_ptr,
            out_ptr, stride_om, stride_od, lse_ptr, pid_m * BLOCK_M, M, N, b, h,
            scale_log2, softcap_log2, slope_log2, seed, offset, threshold, keep_scale, left, right,
            HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, HAS_LEFT, HAS_RIGHT,
            SOFTCAP, HAS_ALIBI, HAS_BIAS, HAS_KEY_MASK, HAS_DROPOUT, HAS_SINKS,
            NEGATE_Q, IS_BOUNDED, AHEAD, PRECISION, BLOCK_M, BLOCK_N, TAIL_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip


_launch = Launcher(_attention_forward_kernel, check=problem.require_narrow_tiles)
_launch_capped = {
    cap: Launcher(_attention_forward_kernel, check=problem.require_narrow_tiles, maxnreg=cap)
    for cap in configs.REGISTER_CAPS
}


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (B, M, H, D) over k, v (B, N, H_KV, D): out (B, M, H, D_v), lse (B, H, M)."""
    size = problem.size(q, k, v, options)
    out, lse = ragged.new_outputs(q, size, options.cu_seqlens_q)
    if size.B * size.M * size.H == 0:
        return out, lse
    options = problem.with_added_bias(q, size, problem.with_narrow_bias(options))
    left, right = options.window
    config = configs.tiles(configs.forward_table(q, options), q, size, options.window)
    cap = configs.registers("forward", q, size, options, config)
    num_tiles = tiling.ceil_div(size.M, config.block_m)
    strides = tuple(problem.four_strides(x, options) for x in (q, k, v, out))
    if options.block_table is not None:
        strides = (strides[0], k.stride(), v.stride(), strides[3])
    table = options.block_table
    table_strides = (0, 0) if table is None else table.stride()
    sinks = options.sinks
    terms = problem.score_terms(q, size, options)
    launch = _launch_capped[cap] if cap else _launch
    launch(
        num_tiles * size.B * size.H,
        strides=(*strides, table_strides, terms.key, None if sinks is None else sinks.dtype),
        args=(
            q, *strides[0],
            k, *strides[1],
            v, *strides[2],
            *problem.starts(options),
            table, *table_strides,
            *terms.args,
            None if sinks is None else sinks.contiguous(),
            out, *strides[3],
            lse,
            size.rows, size.N, size.H, num_tiles, size.B * size.H,
            problem.heads_per_group(k, size.N),
            abs(problem.log2_scale(options)), *terms.scalars, left, right,
        ),
        constexprs={
            "GROUP": size.H // size.H_KV, "HEAD_DIM": size.D, "HEAD_DIM_V": size.D_v,
            "PAGE_SIZE": 0 if table is None else k.shape[1],
            "IS_VARLEN": options.is_varlen, "HAS_USED": options.seqused_k is not None,
            "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0, **terms.flags,
            "HAS_SINKS": sinks is not None,
            "NEGATE_Q": options.scale < 0, "IS_BOUNDED": problem.is_bounded(q, size, options),
            "AHEAD": _runs_ahead(size, options, config),
            "PRECISION": tiling.dot_precision(q),
            "BLOCK_M": config.block_m,
            "TAIL_M": problem.tail_block(size.M, config.block_m, options),
            "BLOCK_N": config.block_n,
            "TAIL_N": problem.tail_block(size.N, config.block_n, options),
            "BLOCK_D": tiling.padded_head_dim(size.D),
            "BLOCK_DV": tiling.padded_head_dim(size.D_v),
        },
        config=config,
    )  # fmt: skip
    return out, lse


def _runs_ahead(size, options, config):
    """Whether to start products a tile ahead: for masks that wait between products and softmax.

    It costs each program a product, and those that see few keys more than they gain; and shared
    memory, of which there is enough where the tiles have three stages.
    """
    waits = options.key_mask is not None
    sees_much = options.window == (-1, -1) and size.N > configs.SHORT
    return waits and sees_much and options.block_table is None and config.num_stages > 2
