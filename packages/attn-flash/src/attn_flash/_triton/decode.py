"""Attention over a KV cache: few queries, many keys, of which programs share the work.

A tile has BLOCK_Q queries of one sequence, each with TILE_GROUP heads that share a key head: one
row for each pair. A program attends with the rows of a tile to one of `num_splits` parts of the
keys; a second kernel puts the parts together. Dao et al., "Flash-Decoding", 2023.
"""

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.masks import is_visible, key_blocks
from attn_core.tiles.offsets import load_tile
from attn_core.tiles.scores import bend
from attn_core.tiles.softmax import (
    LOG2_E,
    finish_softmax,
    online_softmax,
    online_softmax_masked,
)
from attn_core.tiles.splits import keys_of_split
from attn_core.tuning import TileConfig
from attn_flash._triton import decode_configs, problem
from attn_flash._triton.append import cache_row, old_length
from attn_flash._triton.rotary import load_rotated
from attn_flash.kvcache_checks import Cache

NOT_SPECIALIZED = [
    "B",
    "M",
    "new",
    "length",
    "capacity",
    "num_query_tiles",
    "num_splits",
    "table_rows",
    "stride_tb",
    "left",
    "right",
]
_MERGED_ELEMENTS = 4096  # of parts that a merging program holds


@triton.jit
def _pages(
    table_ptr, stride_tn, start_n, first, stop, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Page of each key of a tile, or of all of them where they share it; 0 without pages.

    Table entries of keys outside [first, stop) are not read.
    """
    pages = start_n * 0
    if PAGE_SIZE > 0:
        if PAGE_SIZE % BLOCK_N == 0:
            offs_n = start_n
            mask_n = start_n < stop
        else:
            offs_n = start_n + tl.arange(0, BLOCK_N)
            mask_n = (offs_n >= first) & (offs_n < stop)
        pages = tl.load(table_ptr + offs_n // PAGE_SIZE * stride_tn, mask=mask_n, other=0)
    return pages


# fmt: off
@triton.jit
def _attend(
    acc, m_i, l_i, pages, q, position, slopes,
    k_ptr, stride_kb, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vd,
    table_ptr, stride_tn,
    lo, hi, first, stop, N, scale_log2, softcap_log2, left, right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_LEFTPAD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    """Attend to the tiles of keys in [lo, hi), with or without looking at the mask.

    `pages` are those of the tile at lo. They are loaded one tile ahead: keys whose address depends
    on a load of the same iteration would halve the depth of Triton's pipeline.
    """
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_d = offs_d < HEAD_DIM
    mask_dv = offs_dv < HEAD_DIM_V
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = (offs_n >= first) & (offs_n < stop)
        slots = offs_n.to(tl.int64)
        if PAGE_SIZE > 0:
            slots = slots % PAGE_SIZE
        k_rows = k_ptr + (tl.cast(pages, tl.int64) * stride_kb + slots * stride_kn)[:, None]
        v_rows = v_ptr + (tl.cast(pages, tl.int64) * stride_vb + slots * stride_vn)[:, None]
        k_ptrs = k_rows + offs_d[None, :] * stride_kd
        v_ptrs = v_rows + offs_dv[None, :] * stride_vd
        k = load_tile(k_ptrs, mask_n, mask_d, MASKED, HEAD_DIM < BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptrs, mask_n, mask_dv, MASKED, HEAD_DIM_V < BLOCK_DV)  # [.., BLOCK_DV]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        pages = _pages(table_ptr, stride_tn, start_n + BLOCK_N, first, stop, PAGE_SIZE, BLOCK_N)
        factor = scale_log2
        if HAS_SOFTCAP or HAS_ALIBI:
            scores = bend(
                scores, position, offs_n, slopes, scale_log2, softcap_log2, HAS_SOFTCAP, HAS_ALIBI
            )
            factor = 1.0
        if MASKED:
            visible = is_visible(
                position[:, None], offs_n[None, :], N, left, right, HAS_LEFT, HAS_RIGHT
            )
            if HAS_LEFTPAD:
                visible = visible & (offs_n >= first)[None, :]
            m_i, l_i, alpha, p = online_softmax_masked(m_i, l_i, scores, factor, visible)
        else:
            m_i, l_i, alpha, p = online_softmax(m_i, l_i, scores, factor)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_i, l_i, pages


# fmt: off
@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _kvcache_attention_kernel(
    q_ptr, stride_qb, stride_qm, stride_qh, stride_qd,
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,
    cos_ptr, stride_cos_m, stride_cos_d,
    sin_ptr, stride_sin_m, stride_sin_d,
    seqlens_ptr, stride_lens,
    batch_idx_ptr, stride_idx,
    leftpad_ptr, stride_pad,
    table_ptr, stride_tb, stride_tn,
    slopes_ptr, stride_sb, stride_sh,
    out_ptr,  # [num_splits, B, M, H, D_v], contiguous
    lse_ptr,  # [num_splits, B, H, M], contiguous
    B, M, new, length, capacity, num_query_tiles, num_splits, table_rows,
    scale_log2, softcap_log2, left, right,
    GROUP: tl.constexpr, TILE_GROUP: tl.constexpr, H_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATE_TOGETHER: tl.constexpr,
    HAS_SEQLENS: tl.constexpr, HAS_BATCH_IDX: tl.constexpr, HAS_LEFTPAD: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    NEGATE_Q: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    HEAD_TILES: tl.constexpr = H_KV * ((GROUP + TILE_GROUP - 1) // TILE_GROUP)
    # Neighbours read the heads of the same slots. The last queries see the most keys and go first.
    pid = tl.program_id(0)
    head_tile = pid % HEAD_TILES
    split = pid // HEAD_TILES % num_splits
    tile = pid // HEAD_TILES // num_splits
    b = tile // num_query_tiles
    start_m = (num_query_tiles - 1 - tile % num_query_tiles) * BLOCK_Q
    old = old_length(b, seqlens_ptr, stride_lens, length, HAS_SEQLENS)
    N = tl.minimum(tl.maximum(old + new, 0), capacity)

    h_kv = (head_tile % H_KV).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_q = start_m + offs_m // TILE_GROUP
    offs_g = head_tile // H_KV * TILE_GROUP + offs_m % TILE_GROUP
    mask_m = (offs_m // TILE_GROUP < BLOCK_Q) & (offs_q < M) & (offs_g < GROUP)
    heads = h_kv * GROUP + offs_g
    position = N - M + offs_q

    q_rows = b.to(tl.int64) * stride_qb + offs_q.to(tl.int64) * stride_qm + heads * stride_qh
    if ROTARY_DIM > 0:
        steps = offs_q * 0 if ROTATE_TOGETHER else offs_q
        q = load_rotated(
            q_ptr, q_rows, stride_qd, mask_m, old + steps,
            cos_ptr, stride_cos_m, stride_cos_d, sin_ptr, stride_sin_m, stride_sin_d, table_rows,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_D,
        )  # fmt: skip
    else:
        offs_d = tl.arange(0, BLOCK_D)
        q_ptrs = q_ptr + q_rows[:, None] + offs_d[None, :] * stride_qd
        q = load_tile(q_ptrs, mask_m, offs_d < HEAD_DIM, True, HEAD_DIM < BLOCK_D)
    if NEGATE_Q:  # a running maximum needs a scale that is not negative
        q = -q
    slopes = scale_log2
    if HAS_ALIBI:
        slopes_ptrs = slopes_ptr + b.to(tl.int64) * stride_sb + heads * stride_sh
        slopes = tl.load(slopes_ptrs, mask=mask_m, other=0.0) * LOG2_E

    lo, full_lo, full_hi, hi = key_blocks(
        start_m, M, N, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_Q, BLOCK_N
    )
    first = tl.maximum(N - M + start_m - left, 0) if HAS_LEFT else 0
    if HAS_LEFTPAD:
        pad = tl.load(leftpad_ptr + b * stride_pad)
        first = tl.maximum(first, pad)
        lo = tl.maximum(lo, pad // BLOCK_N * BLOCK_N)
        full_lo = tl.maximum(full_lo, tl.cdiv(pad, BLOCK_N) * BLOCK_N)
    lo, full_lo, full_hi, hi = keys_of_split(lo, full_lo, full_hi, hi, split, num_splits, BLOCK_N)
    cache_b = cache_row(b, batch_idx_ptr, stride_idx, HAS_BATCH_IDX)
    k_ptr += h_kv * stride_kh
    v_ptr += h_kv * stride_vh
    if PAGE_SIZE > 0:
        table_ptr += cache_b * stride_tb
    else:
        k_ptr += cache_b * stride_kb
        v_ptr += cache_b * stride_vb
    pages = _pages(table_ptr, stride_tn, lo, first, hi, PAGE_SIZE, BLOCK_N)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # Small tiles are bound by memory: their pipeline should run through, masks cost nothing.
    PEEL: tl.constexpr = BLOCK_M > 32
    FIRST: tl.constexpr = (0 if HAS_LEFT or HAS_LEFTPAD else 1) if PEEL else 2
    # Keys to the left of those that all rows see, these, and keys to their right.
    for part in tl.static_range(FIRST, 3):
        start, stop = full_lo, full_hi
        if part == 0:
            start, stop = lo, full_lo
        elif part == 2:
            start, stop = full_hi if PEEL else lo, hi
        acc, m_i, l_i, pages = _attend(
            acc, m_i, l_i, pages, q, position, slopes,
            k_ptr, stride_kb, stride_kn, stride_kd, v_ptr, stride_vb, stride_vn, stride_vd,
            table_ptr, stride_tn,
            start, stop, first, hi, N, scale_log2, softcap_log2, left, right,
            HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, HAS_LEFT, HAS_RIGHT, HAS_LEFTPAD, HAS_SOFTCAP,
            HAS_ALIBI, part != 1, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    out, lse = finish_softmax(m_i, l_i, acc)
    part = (split.to(tl.int64) * B + b) * M * (H_KV * GROUP)
    tl.store(lse_ptr + part + heads * M + offs_q, lse, mask=mask_m)
    out_rows = (part + offs_q.to(tl.int64) * (H_KV * GROUP) + heads) * HEAD_DIM_V
    offs_dv = tl.arange(0, BLOCK_DV)
    tl.store(
        out_ptr + out_rows[:, None] + offs_dv[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & (offs_dv < HEAD_DIM_V)[None, :],
    )


_launch = Launcher(_kvcache_attention_kernel)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    cache: Cache,
    alibi_slopes: torch.Tensor | None,
    new: int,
    scale: float,
    window: tuple[int, int],
    softcap: float,
    num_splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with q (B, M, H, D) to the cache: out (B, M, H, D_v) and lse (B, H, M)."""
    B, M, H, D = q.shape
    _, rows, H_KV, D_v = v_cache.shape
    out = q.new_empty((B, M, H, D_v))
    lse = q.new_empty((B, H, M), dtype=torch.float32)
    if B * M * H == 0:
        return out, lse
    table = cache.block_table
    page_size, capacity = (0, rows) if table is None else (rows, rows * table.shape[1])
    left, right = window
    config = decode_configs.tiles(q, v_cache)
    tile_group = min(H // H_KV, config.block_m)
    block_q = config.block_m // tile_group
    num_query_tiles = tiling.ceil_div(M, block_q)
    head_tiles = H_KV * tiling.ceil_div(H // H_KV, tile_group)
    if num_splits == 0:
        span = capacity
        if left >= 0 and right >= 0:
            span = min(span, left + right + block_q + config.block_n)
        num_programs = B * num_query_tiles * head_tiles
        num_splits = decode_configs.num_splits(q, v_cache, config, num_programs, span)
    parts, parts_lse = out, lse
    if num_splits > 1:
        parts = q.new_empty((num_splits, B, M, H, D_v), dtype=torch.float32)
        parts_lse = q.new_empty((num_splits, B, H, M), dtype=torch.float32)
    q_strides, k_strides, v_strides = q.stride(), k_cache.stride(), v_cache.stride()
    rotary = [(0, 0) if x is None else x.stride() for x in (cos, sin)]
    ids = (cache.seqlens, cache.batch_idx, cache.leftpad)
    id_strides = [(0,) if x is None else x.stride() for x in ids]
    table_strides = (0, 0) if table is None else table.stride()
    slopes_strides = (0, 0) if alibi_slopes is None else alibi_slopes.expand(B, H).stride()
    dtypes = [None if x is None else x.dtype for x in (cos, cache.batch_idx)]
    # The only query is the newest token: no key is to its right.
    has_right = right >= 0 and M > 1
    _launch(
        B * num_query_tiles * num_splits * head_tiles,
        strides=(
            q_strides, k_strides, v_strides, *rotary, *id_strides, table_strides[1],
            slopes_strides, *dtypes, parts.dtype,
        ),
        args=(
            q, *q_strides,
            k_cache, *k_strides,
            v_cache, *v_strides,
            cos, *rotary[0],
            sin, *rotary[1],
            cache.seqlens, *id_strides[0],
            cache.batch_idx, *id_strides[1],
            cache.leftpad, *id_strides[2],
            table, *table_strides,
            alibi_slopes, *slopes_strides,
            parts,
            parts_lse,
            B, M, new, cache.length, capacity, num_query_tiles, num_splits,
            0 if cos is None else cos.shape[0],
            abs(scale) * problem.LOG2_E, softcap * problem.LOG2_E, left, right,
        ),
        constexprs={
            "GROUP": H // H_KV, "TILE_GROUP": tile_group, "H_KV": H_KV,
            "HEAD_DIM": D, "HEAD_DIM_V": D_v, "PAGE_SIZE": page_size,
            "ROTARY_DIM": 0 if cos is None else 2 * cos.shape[1], "INTERLEAVED": interleaved,
            "ROTATE_TOGETHER": window == (-1, -1),
            "HAS_SEQLENS": cache.seqlens is not None,
            "HAS_BATCH_IDX": cache.batch_idx is not None,
            "HAS_LEFTPAD": cache.leftpad is not None,
            "HAS_LEFT": left >= 0, "HAS_RIGHT": has_right,
            "HAS_SOFTCAP": softcap > 0, "HAS_ALIBI": alibi_slopes is not None,
            "NEGATE_Q": scale < 0, "PRECISION": tiling.dot_precision(q),
            "BLOCK_M": config.block_m, "BLOCK_Q": block_q, "BLOCK_N": config.block_n,
            "BLOCK_D": tiling.padded_head_dim(D), "BLOCK_DV": tiling.padded_head_dim(D_v),
        },
        config=config,
    )  # fmt: skip
    if num_splits > 1:
        _merge_splits(parts, parts_lse, out, lse)
    return out, lse


@triton.jit(do_not_specialize=["M", "H", "num_rows", "num_splits"])
def _merge_splits_kernel(
    parts_ptr,  # [num_splits, B, M, H, D_v], contiguous
    parts_lse_ptr,  # [num_splits, B, H, M], contiguous
    out_ptr,  # [B, M, H, D_v], contiguous
    lse_ptr,  # [B, H, M], contiguous
    M, H, num_rows, num_splits,
    HEAD_DIM_V: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Merge one row: a split is a key whose score is its lse and whose value is its output."""
    row = tl.program_id(0).to(tl.int64)
    b = row // H // M
    lse_row = (b * H + row % H) * M + row // H % M
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_DV)
    mask_d = (offs_d < HEAD_DIM_V)[None, :]
    m_i = tl.full([1], -float("inf"), tl.float32)
    l_i = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    for start_s in range(0, num_splits, BLOCK_S):
        splits = (start_s + offs_s).to(tl.int64)
        mask_s = splits < num_splits
        lse = tl.load(parts_lse_ptr + splits * num_rows + lse_row, mask=mask_s, other=-float("inf"))
        rows = (splits * num_rows + row) * HEAD_DIM_V
        parts_ptrs = parts_ptr + rows[:, None] + offs_d[None, :]
        parts = tl.load(parts_ptrs, mask=mask_s[:, None] & mask_d, other=0.0)  # [BLOCK_S, BLOCK_DV]
        m_i, l_i, alpha, p = online_softmax_masked(m_i, l_i, lse[None, :], LOG2_E, mask_s[None, :])
        acc = acc * alpha[:, None] + tl.sum(tl.trans(p) * parts, 0)[None, :]

    out, lse = finish_softmax(m_i, l_i, acc)
    tl.store(lse_ptr + lse_row + tl.arange(0, 1), lse)
    out_ptrs = out_ptr + row * HEAD_DIM_V + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_d)


_launch_merge = Launcher(_merge_splits_kernel)


def _merge_splits(
    parts: torch.Tensor, parts_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Merge parts (S, B, M, H, D_v) by parts_lse (S, B, H, M) into out and lse."""
    num_splits, B, M, H, D_v = parts.shape
    block_dv = tiling.padded_head_dim(D_v)
    block_s = min(triton.next_power_of_2(num_splits), max(1, _MERGED_ELEMENTS // block_dv))
    config = TileConfig(block_s, block_dv, 4, 1)
    _launch_merge(
        B * M * H,
        strides=(out.dtype,),
        args=(parts, parts_lse, out, lse, M, H, B * M * H, num_splits),
        constexprs={"HEAD_DIM_V": D_v, "BLOCK_S": config.block_m, "BLOCK_DV": block_dv},
        config=config,
    )
