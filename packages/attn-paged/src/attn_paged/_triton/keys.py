"""A tile of queries and the keys it sees, tile by tile: the recurrence of FlashAttention."""

import triton
import triton.language as tl

from attn_core.tiles.masks import is_visible
from attn_core.tiles.offsets import load_tile
from attn_core.tiles.scores import bend, first_state
from attn_core.tiles.softmax import online_softmax, online_softmax_masked
from attn_paged._triton.quantised import dequantised, dequantised_pairs, scaled_softmax


@triton.jit
def keys_of_part(lo, full_lo, full_hi, hi, first_part, last_part, BLOCK_N: tl.constexpr):
    """Cut the runs of `key_blocks` down to some of their tiles, counted from lo."""
    hi = tl.maximum(tl.minimum(hi, lo + last_part * BLOCK_N), lo)
    lo = tl.minimum(lo + first_part * BLOCK_N, hi)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    full_hi = tl.minimum(tl.maximum(full_hi, full_lo), hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def block_ids(
    table_ptr, stride_tn, start_n, first, stop, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Physical block of each key of a tile, or of all of them where they share it.

    Table entries of keys outside [first, stop) are not read.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        offs_n = start_n
        mask_n = start_n < stop
    else:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = (offs_n >= first) & (offs_n < stop)
    entries = offs_n.to(tl.uint32) // BLOCK_SIZE
    return tl.load(table_ptr + entries.to(tl.int64) * stride_tn, mask=mask_n, other=0)


# fmt: off
@triton.jit
def trees_of_rows(
    tree_ptr, stride_mask, stride_mn, tree_starts_ptr, tree_width, b, tokens, start_m, offs_q, M,
):
    # fmt: on
    """Return where the entries of each row begin in a tree mask, and how many keys they are about.

    A flat mask has the M by M matrices of the sequences one after the other.
    """
    if tree_starts_ptr is None:
        return tree_ptr + tokens * stride_mask, tree_width
    else:  # noqa: RET505 - Triton compiles what follows a return
        begin = tl.load(tree_starts_ptr + b, mask=start_m < M, other=0)
        rank = (start_m + offs_q).to(tl.int64)
        return tree_ptr + (begin + rank * M) * stride_mn, M


# fmt: off
@triton.jit
def attend(
    acc, acc_odd, m_i, l_i, blocks, q, q_tail, q_scale, position, slopes,
    k_ptr, stride_kb, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vd,
    k_scale_ptr, stride_ksb, stride_ksn,
    v_scale_ptr, stride_vsb, stride_vsn,
    table_ptr, stride_tn,
    tree_ptrs, stride_mn, mask_m, tree_start, tree_width,
    lo, hi, first, stop, N, scale_log2, softcap_log2, left, right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_TREE: tl.constexpr, IS_QUANTISED: tl.constexpr,
    SAME_SLOTS: tl.constexpr, VALUES_IN_KEYS: tl.constexpr, HAS_PTX: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TAIL_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    """Attend to the tiles of keys in [lo, hi), with or without looking at the mask.

    l_i has the sums of rows, or of small tiles those of each column: warps would have to exchange
    what they add up for every tile of keys. `blocks` are the ids of the tile at lo. They are loaded
    one tile ahead: keys whose address depends on a load of the same iteration would halve the depth
    of Triton's pipeline. Where elements of v are pairs, acc has their even columns and acc_odd the
    odd ones.
    """
    PAIR: tl.constexpr = 2 if v_ptr.dtype.element_ty == tl.int16 else 1
    ADD_LATER: tl.constexpr = l_i.shape[1] > 1
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV // PAIR)
    mask_d = offs_d < HEAD_DIM
    mask_dv = offs_dv < HEAD_DIM_V // PAIR
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = (offs_n >= first) & (offs_n < stop)
        # Never negative: unsigned, they are divided and widened in fewer instructions.
        slots = (offs_n.to(tl.uint32) % BLOCK_SIZE).to(tl.int64)
        far_blocks = blocks.to(tl.uint32).to(tl.int64)
        k_offsets = far_blocks * stride_kb + slots * stride_kn
        v_offsets = k_offsets // PAIR if SAME_SLOTS else far_blocks * stride_vb + slots * stride_vn
        k_rows = k_ptr + k_offsets[:, None]
        v_rows = v_ptr + v_offsets[:, None]
        k_ptrs = k_rows + offs_d[None, :] * stride_kd
        v_ptrs = v_rows + offs_dv[None, :] * stride_vd
        k = load_tile(k_ptrs, mask_n, mask_d, MASKED, HEAD_DIM < BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = k
        if not VALUES_IN_KEYS:
            v = load_tile(v_ptrs, mask_n, mask_dv, MASKED, HEAD_DIM_V < BLOCK_DV)  # [.., BLOCK_DV]
        k = dequantised(k, q.dtype, HAS_PTX)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if TAIL_D > 0:
            offs_tail = BLOCK_D + tl.arange(0, TAIL_D)
            k_ptrs = k_rows + offs_tail[None, :] * stride_kd
            k = load_tile(k_ptrs, mask_n, offs_tail < HEAD_DIM, MASKED, HEAD_DIM < BLOCK_D + TAIL_D)
            k = dequantised(k, q.dtype, HAS_PTX)
            scores = tl.dot(q_tail, tl.trans(k), scores, input_precision=PRECISION)
        if IS_QUANTISED:
            k_offsets = far_blocks * stride_ksb + slots * stride_ksn
            v_offsets = k_offsets if SAME_SLOTS else far_blocks * stride_vsb + slots * stride_vsn
            k_scales = tl.load(k_scale_ptr + k_offsets, mask=mask_n, other=0.0)
            v_scales = tl.load(v_scale_ptr + v_offsets, mask=mask_n, other=0.0)
            scores *= k_scales[None, :] * q_scale[:, None]
        blocks = block_ids(
            table_ptr, stride_tn, start_n + BLOCK_N, first, stop, BLOCK_SIZE, BLOCK_N
        )
        factor = scale_log2
        if HAS_SOFTCAP or HAS_ALIBI:
            scores = bend(
                scores, position, offs_n, slopes, scale_log2, softcap_log2, HAS_SOFTCAP, HAS_ALIBI
            )
            factor = 1.0
        visible = True
        if MASKED:
            visible = is_visible(
                position[:, None], offs_n[None, :], N, left, right, HAS_LEFT, HAS_RIGHT
            )
            if HAS_TREE:
                column = offs_n - tree_start
                is_about = mask_m[:, None] & ((column >= 0) & (column < tree_width))[None, :]
                entries = tree_ptrs[:, None] + (column * stride_mn)[None, :]
                visible = visible & (tl.load(entries, mask=is_about, other=1) != 0)
        if IS_QUANTISED:
            m_i, alpha, p = scaled_softmax(m_i, scores, factor, v_scales, visible, MASKED)
        elif MASKED:
            m_i, _sum, alpha, p = online_softmax_masked(m_i, 0.0, scores, factor, visible)
        else:
            m_i, _sum, alpha, p = online_softmax(m_i, 0.0, scores, factor)
        l_i = l_i * alpha[:, None] + (p if ADD_LATER else tl.sum(p, 1)[:, None])
        if IS_QUANTISED:
            p *= v_scales[None, :]
        p = p.to(q.dtype)
        if PAIR == 2:
            v, v_odd = dequantised_pairs(v, k_ptr.dtype.element_ty, q.dtype, HAS_PTX)
        else:
            v = dequantised(v, q.dtype, HAS_PTX)
        acc = tl.dot(p, v, acc * alpha[:, None], input_precision=PRECISION)
        if PAIR == 2:
            acc_odd = tl.dot(p, v_odd, acc_odd * alpha[:, None], input_precision=PRECISION)
    return acc, acc_odd, m_i, l_i, blocks


@triton.jit
def with_sink(m_i, l_i, sinks_ptrs, has_sink, BLOCK_M: tl.constexpr):
    """Take in the sink, a key whose value is 0; return m_i, l_i and the factor for acc."""
    m_sink, l_sink = first_state(sinks_ptrs, has_sink, True, BLOCK_M)
    m_new = tl.maximum(m_i, m_sink)
    pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
    alpha = tl.math.exp2(m_i - pivot)
    return m_new, l_i * alpha + l_sink * tl.math.exp2(m_sink - pivot), alpha
