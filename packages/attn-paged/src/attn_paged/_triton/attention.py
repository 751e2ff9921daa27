"""Decode, prefill and what lies between, in one kernel.

A tile has BLOCK_Q queries of one sequence, each with GROUP heads that share a key head: one row for
each pair. A program attends with the rows of a tile to the keys they see, or to one of `num_splits`
parts of them; then `merge` puts the parts together.
"""

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_core.tiles.masks import is_visible, key_blocks
from attn_core.tiles.offsets import load_tile
from attn_core.tiles.softmax import (
    LOG2_E,
    finish_softmax,
    online_softmax,
    online_softmax_masked,
)
from attn_paged._triton import configs, merge, problem


@triton.jit
def _queries_of_tile(
    tile, cu_seqlens_ptr, stride_cu, T, B, IS_RAGGED: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Return the sequence of a tile, its first query's row, its rank in the sequence, and M.

    The tiles of sequence b begin at ``cu_seqlens[b] // BLOCK_Q + b``: room for all of them, found
    without a sum over the sequences before. Rows past the last sequence make up sequence B.
    """
    if IS_RAGGED:
        b = 0
        high = B
        while b < high:
            middle = (b + high + 1) // 2
            first_tile = tl.load(cu_seqlens_ptr + middle * stride_cu) // BLOCK_Q + middle
            b = tl.where(first_tile <= tile, middle, b)
            high = tl.where(first_tile <= tile, high, middle - 1)
        begin = tl.load(cu_seqlens_ptr + b * stride_cu)
        end = tl.load(cu_seqlens_ptr + (b + 1) * stride_cu, mask=b < B, other=T)
        start_m = (tile - begin // BLOCK_Q - b) * BLOCK_Q
        return b, begin + start_m, start_m, end - begin
    else:  # noqa: RET505 - Triton compiles what follows a return
        return tile, tile, 0, 1


@triton.jit
def _block_ids(
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
    return tl.load(table_ptr + offs_n // BLOCK_SIZE * stride_tn, mask=mask_n, other=0)


@triton.jit
def _tanh(x):
    """1 - 2 / (exp(2 x) + 1), exact at both infinities, and a series where that would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    far = 1.0 - 2.0 / (tl.math.exp2(x * (2.0 * LOG2_E)) + 1.0)
    return tl.where(square < 0.0625, series, far)


# fmt: off
@triton.jit
def _bend(
    scores, position, offs_n, slopes, scale_log2, softcap_log2,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
):
    # fmt: on
    """Scale scores to units of log2, cap them and add the bias of distance."""
    if HAS_SOFTCAP:
        scores = softcap_log2 * _tanh(scores * (scale_log2 / softcap_log2))
    else:
        scores = scores * scale_log2
    if HAS_ALIBI:
        distance = tl.abs(position[:, None] - offs_n[None, :]).to(tl.float32)
        scores -= slopes[:, None] * distance
    return scores


# fmt: off
@triton.jit
def _attend(
    acc, m_i, l_i, blocks, q, q_tail, position, slopes,
    k_ptr, stride_kb, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vd,
    table_ptr, stride_tn,
    lo, hi, first, stop, N, scale_log2, softcap_log2, left, right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TAIL_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    """Attend to the tiles of keys in [lo, hi), with or without looking at the mask.

    `blocks` are the ids of the tile at lo. They are loaded one tile ahead: keys whose address
    depends on a load of the same iteration would halve the depth of Triton's pipeline.
    """
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_d = offs_d < HEAD_DIM
    mask_dv = offs_dv < HEAD_DIM_V
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = (offs_n >= first) & (offs_n < stop)
        slots = (offs_n % BLOCK_SIZE).to(tl.int64)
        far_blocks = blocks.to(tl.int64)
        k_rows = k_ptr + (far_blocks * stride_kb + slots * stride_kn)[:, None]
        v_rows = v_ptr + (far_blocks * stride_vb + slots * stride_vn)[:, None]
        k_ptrs = k_rows + offs_d[None, :] * stride_kd
        v_ptrs = v_rows + offs_dv[None, :] * stride_vd
        k = load_tile(k_ptrs, mask_n, mask_d, MASKED, HEAD_DIM < BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptrs, mask_n, mask_dv, MASKED, HEAD_DIM_V < BLOCK_DV)  # [.., BLOCK_DV]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if TAIL_D > 0:
            offs_tail = BLOCK_D + tl.arange(0, TAIL_D)
            k_ptrs = k_rows + offs_tail[None, :] * stride_kd
            k = load_tile(k_ptrs, mask_n, offs_tail < HEAD_DIM, MASKED, HEAD_DIM < BLOCK_D + TAIL_D)
            scores = tl.dot(q_tail, tl.trans(k), scores, input_precision=PRECISION)
        blocks = _block_ids(
            table_ptr, stride_tn, start_n + BLOCK_N, first, stop, BLOCK_SIZE, BLOCK_N
        )
        factor = scale_log2
        if HAS_SOFTCAP or HAS_ALIBI:
            scores = _bend(
                scores, position, offs_n, slopes, scale_log2, softcap_log2, HAS_SOFTCAP, HAS_ALIBI
            )
            factor = 1.0
        if MASKED:
            visible = is_visible(
                position[:, None], offs_n[None, :], N, left, right, HAS_LEFT, HAS_RIGHT
            )
            m_i, l_i, alpha, p = online_softmax_masked(m_i, l_i, scores, factor, visible)
        else:
            m_i, l_i, alpha, p = online_softmax(m_i, l_i, scores, factor)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_i, l_i, blocks


# fmt: off
@triton.jit
def _first_state(
    sinks_ptr, stride_sinks, heads, mask_m, HAS_SINKS: tl.constexpr, BLOCK_M: tl.constexpr
):
    # fmt: on
    """Running maximum and sum before the first key: a sink is a key whose value is 0."""
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if HAS_SINKS:
        sinks = tl.load(sinks_ptr + heads * stride_sinks, mask=mask_m, other=-float("inf"))
        m_i = sinks.to(tl.float32) * LOG2_E
    return m_i, tl.where(m_i == -float("inf"), 0.0, 1.0)


@triton.jit
def _keys_of_split(
    lo, full_lo, full_hi, hi, split, num_splits, BLOCK_N: tl.constexpr
):
    """Cut the runs of `key_blocks` down to one of `num_splits` equal parts."""
    key_tiles = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_N)
    size = tl.cdiv(key_tiles, num_splits) * BLOCK_N
    lo += split * size
    hi = tl.maximum(tl.minimum(hi, lo + size), lo)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    full_hi = tl.minimum(tl.maximum(full_hi, full_lo), hi)
    return lo, full_lo, full_hi, hi


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _paged_attention_kernel(
    q_ptr, stride_qt, stride_qh, stride_qd,
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,
    table_ptr, stride_tb, stride_tn,
    lens_ptr, stride_lens,
    cu_seqlens_ptr, stride_cu,
    slopes_ptr, stride_sb, stride_sh,
    sinks_ptr, stride_sinks,
    out_ptr,  # [num_splits, T, H, D_v], contiguous
    lse_ptr,  # [num_splits, H, T], contiguous
    T, B, num_tiles, num_splits,
    scale_log2, softcap_log2, left, right,
    GROUP: tl.constexpr, TILE_GROUP: tl.constexpr, H_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    IS_RAGGED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
    NEGATE_Q: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, TAIL_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    HEAD_TILES: tl.constexpr = H_KV * ((GROUP + TILE_GROUP - 1) // TILE_GROUP)
    # Neighbours read the heads of the same slots. The last queries of a sequence see the most keys,
    # so they go first.
    pid = tl.program_id(0)
    head_tile = pid % HEAD_TILES
    split = pid // HEAD_TILES % num_splits
    tile = num_tiles - 1 - pid // HEAD_TILES // num_splits
    b, first_token, start_m, M = _queries_of_tile(
        tile, cu_seqlens_ptr, stride_cu, T, B, IS_RAGGED, BLOCK_Q
    )
    if start_m >= M:
        return
    N = tl.load(lens_ptr + b * stride_lens, mask=b < B, other=0)

    h_kv = (head_tile % H_KV).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_q = offs_m // TILE_GROUP
    offs_g = head_tile // H_KV * TILE_GROUP + offs_m % TILE_GROUP
    mask_m = (offs_q < BLOCK_Q) & (start_m + offs_q < M) & (offs_g < GROUP)
    heads = h_kv * GROUP + offs_g
    tokens = first_token + offs_q.to(tl.int64)
    position = N - M + start_m + offs_q

    offs_d = tl.arange(0, BLOCK_D)
    q_rows = q_ptr + (tokens * stride_qt + heads * stride_qh)[:, None]
    q_ptrs = q_rows + offs_d[None, :] * stride_qd
    q = load_tile(q_ptrs, mask_m, offs_d < HEAD_DIM, True, HEAD_DIM < BLOCK_D)
    q_tail = q
    if TAIL_D > 0:
        offs_tail = BLOCK_D + tl.arange(0, TAIL_D)
        q_ptrs = q_rows + offs_tail[None, :] * stride_qd
        q_tail = load_tile(q_ptrs, mask_m, offs_tail < HEAD_DIM, True, True)
    if NEGATE_Q:  # a running maximum needs a scale that is not negative
        q = -q
        q_tail = -q_tail
    slopes = scale_log2
    if HAS_ALIBI:
        slopes_ptrs = slopes_ptr + b.to(tl.int64) * stride_sb + heads * stride_sh
        slopes = tl.load(slopes_ptrs, mask=mask_m, other=0.0) * LOG2_E

    lo, full_lo, full_hi, hi = key_blocks(
        start_m, M, N, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_Q, BLOCK_N
    )
    first = tl.maximum(N - M + start_m - left, 0) if HAS_LEFT else 0
    lo, full_lo, full_hi, hi = _keys_of_split(lo, full_lo, full_hi, hi, split, num_splits, BLOCK_N)
    table_ptr += b.to(tl.int64) * stride_tb
    k_ptr += h_kv * stride_kh
    v_ptr += h_kv * stride_vh
    blocks = _block_ids(table_ptr, stride_tn, lo, first, hi, BLOCK_SIZE, BLOCK_N)
    m_i, l_i = _first_state(
        sinks_ptr, stride_sinks, heads, tl.where((b < B) & (split == 0), mask_m, False),
        HAS_SINKS, BLOCK_M,
    )
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # Small tiles are bound by memory: their pipeline should run through, masks cost nothing.
    PEEL: tl.constexpr = BLOCK_M > 32
    if PEEL:
        if HAS_LEFT:
            acc, m_i, l_i, blocks = _attend(
                acc, m_i, l_i, blocks, q, q_tail, position, slopes,
                k_ptr, stride_kb, stride_kn, stride_kd, v_ptr, stride_vb, stride_vn, stride_vd,
                table_ptr, stride_tn,
                lo, full_lo, first, hi, N, scale_log2, softcap_log2, left, right,
                HEAD_DIM, HEAD_DIM_V, BLOCK_SIZE, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI,
                True, PRECISION, BLOCK_N, BLOCK_D, TAIL_D, BLOCK_DV,
            )  # fmt: skip
        acc, m_i, l_i, blocks = _attend(
            acc, m_i, l_i, blocks, q, q_tail, position, slopes,
            k_ptr, stride_kb, stride_kn, stride_kd, v_ptr, stride_vb, stride_vn, stride_vd,
            table_ptr, stride_tn,
            full_lo, full_hi, first, hi, N, scale_log2, softcap_log2, left, right,
            HEAD_DIM, HEAD_DIM_V, BLOCK_SIZE, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI,
            False, PRECISION, BLOCK_N, BLOCK_D, TAIL_D, BLOCK_DV,
        )  # fmt: skip
        lo = full_hi
    acc, m_i, l_i, blocks = _attend(
        acc, m_i, l_i, blocks, q, q_tail, position, slopes,
        k_ptr, stride_kb, stride_kn, stride_kd, v_ptr, stride_vb, stride_vn, stride_vd,
        table_ptr, stride_tn,
        lo, hi, first, hi, N, scale_log2, softcap_log2, left, right,
        HEAD_DIM, HEAD_DIM_V, BLOCK_SIZE, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI,
        True, PRECISION, BLOCK_N, BLOCK_D, TAIL_D, BLOCK_DV,
    )  # fmt: skip

    out, lse = finish_softmax(m_i, l_i, acc)
    part = split.to(tl.int64) * (H_KV * GROUP)
    tl.store(lse_ptr + (part + heads) * T + tokens, lse, mask=mask_m)
    out_rows = (part * T + tokens * (H_KV * GROUP) + heads) * HEAD_DIM_V
    offs_dv = tl.arange(0, BLOCK_DV)
    tl.store(
        out_ptr + out_rows[:, None] + offs_dv[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & (offs_dv < HEAD_DIM_V)[None, :],
    )


_launch = Launcher(_paged_attention_kernel)
_FAR = 2**30 - 1  # no context is longer: a window of more keys would overflow 32 bits


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    window: tuple[int, int],
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (T, H, D) over paged sequences: out (T, H, D_v) and lse (H, T)."""
    (T, H, D), (B, max_blocks) = q.shape, block_tables.shape
    _, block_size, H_KV, D_v = v_cache.shape
    out = q.new_empty((T, H, D_v))
    lse = q.new_empty((H, T), dtype=torch.float32)
    if T * H == 0:
        return out, lse
    left, right = (min(side, _FAR) for side in window)
    is_ragged = cu_seqlens_q is not None
    config = configs.tiles(q, v_cache, B)
    tile_group = min(H // H_KV, config.block_m)
    block_q = config.block_m // tile_group if is_ragged else 1
    num_tiles = T // block_q + B + 1 if is_ragged else T
    head_tiles = H_KV * problem.ceil_div(H // H_KV, tile_group)
    span = max_blocks * block_size
    if left >= 0 and right >= 0:
        span = min(span, left + right + block_q + config.block_n)
    num_splits = configs.num_splits(
        q.device, config, num_tiles * head_tiles, problem.ceil_div(span, config.block_n)
    )
    parts, parts_lse = out, lse
    if num_splits > 1:
        parts = q.new_empty((num_splits, T, H, D_v), dtype=torch.float32)
        parts_lse = q.new_empty((num_splits, H, T), dtype=torch.float32)
    block_d, tail_d = problem.split_head_dim(D)
    slopes_strides = (0, 0) if alibi_slopes is None else alibi_slopes.expand(B, H).stride()
    q_strides, k_strides, v_strides = q.stride(), k_cache.stride(), v_cache.stride()
    table_strides, lens_strides = block_tables.stride(), context_lens.stride()
    cu_strides = (0,) if cu_seqlens_q is None else cu_seqlens_q.stride()
    sinks_strides = (0,) if sinks is None else sinks.stride()
    sinks_dtype = None if sinks is None else sinks.dtype
    _launch(
        num_tiles * num_splits * head_tiles,
        strides=(
            q_strides, k_strides, v_strides, table_strides[1], lens_strides, cu_strides,
            slopes_strides, sinks_strides, sinks_dtype, parts.dtype,
        ),
        args=(
            q, *q_strides,
            k_cache, *k_strides,
            v_cache, *v_strides,
            block_tables, *table_strides,
            context_lens, *lens_strides,
            cu_seqlens_q, *cu_strides,
            alibi_slopes, *slopes_strides,
            sinks, *sinks_strides,
            parts,
            parts_lse,
            T, B, num_tiles, num_splits,
            abs(scale) * problem.LOG2_E, softcap * problem.LOG2_E, left, right,
        ),
        constexprs={
            "GROUP": H // H_KV, "TILE_GROUP": tile_group, "H_KV": H_KV,
            "HEAD_DIM": D, "HEAD_DIM_V": D_v, "BLOCK_SIZE": block_size,
            "IS_RAGGED": is_ragged, "HAS_LEFT": left >= 0,
            # The only query of a sequence is its last token: no key is to its right.
            "HAS_RIGHT": right >= 0 and is_ragged,
            "HAS_SOFTCAP": softcap > 0, "HAS_ALIBI": alibi_slopes is not None,
            "HAS_SINKS": sinks is not None,
            "NEGATE_Q": scale < 0, "PRECISION": problem.dot_precision(q),
            "BLOCK_M": config.block_m, "BLOCK_Q": block_q, "BLOCK_N": config.block_n,
            "BLOCK_D": block_d, "TAIL_D": tail_d, "BLOCK_DV": problem.padded(D_v),
        },
        config=config,
    )  # fmt: skip
    if num_splits > 1:
        merge.merge_splits(parts, parts_lse, out, lse)
    return out, lse
