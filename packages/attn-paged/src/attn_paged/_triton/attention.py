"""Decode, prefill and what lies between, in one kernel.

A tile has BLOCK_Q queries of one sequence, each with GROUP heads that share a key head: one row for
each pair. A program attends with the rows of a tile to one of `num_splits` parts of the keys they
see; or, where the work is shared, to its share of the keys of all tiles, one tile after the other
(Osama et al., "Stream-K", 2023). Then `merge` puts the parts together. `configs` chooses.
"""

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.device import device_info
from attn_core.launch import Launcher
from attn_core.tiles.softmax import LOG2_E, finish_softmax
from attn_paged._triton import cascade, configs, merge, problem, worklist
from attn_paged._triton.keys import attend, block_ids, keys_of_part, trees_of_rows, with_sink
from attn_paged._triton.merge import Parts, store_rows
from attn_paged._triton.quantised import queries_in_float16
from attn_paged._triton.queries import (
    keys_of_tile,
    load_queries,
    queries_of_tile,
    rows_of_tile,
    size_of_parts,
    tile_of_unit,
)
from attn_paged.options import AttentionOptions


# fmt: off
@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _paged_attention_kernel(
    q_ptr, stride_qt, stride_qh, stride_qd,
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,
    k_scale_ptr, stride_ksb, stride_ksn, stride_ksh,
    v_scale_ptr, stride_vsb, stride_vsn, stride_vsh,
    table_ptr, stride_tb, stride_tn,
    lens_ptr, stride_lens,
    cu_seqlens_ptr, stride_cu,
    causal_ptr, stride_causal,
    slopes_ptr, stride_sb, stride_sh,
    sinks_ptr, stride_sinks,
    tree_ptr, stride_mask, stride_mn,
    tree_starts_ptr,  # [B], where a flat tree begins for each sequence
    ends_ptr,  # [num_tiles + 1], from `worklist`
    rows_ptr,  # [T], the row of q of each query
    out_ptr,  # [T, H, D_v], contiguous
    lse_ptr,  # [H, T], contiguous
    parts_ptr,  # [slots, BLOCK_M, D_v], contiguous
    parts_lse_ptr,  # [slots, BLOCK_M], in units of log2
    T, B, num_tiles, num_splits, least_m, most_m, steps,
    chunk, tree_width, left, right,
    scale_log2, softcap_log2,
    IS_RAGGED: tl.constexpr, ONE_TILE_EACH: tl.constexpr, IS_SHARED: tl.constexpr,
    GROUP: tl.constexpr, TILE_GROUP: tl.constexpr, H_KV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_TREE: tl.constexpr, IS_QUANTISED: tl.constexpr, SAME_SLOTS: tl.constexpr,
    VALUES_IN_KEYS: tl.constexpr, HAS_PTX: tl.constexpr,
    NEGATE_Q: tl.constexpr, OVERLAPS: tl.constexpr,
    IS_BESIDE: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TAIL_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    HEAD_TILES: tl.constexpr = H_KV * ((GROUP + TILE_GROUP - 1) // TILE_GROUP)
    # Neighbours read the heads of the same slots.
    pid = tl.program_id(0)
    head_tile = pid % HEAD_TILES
    group = pid // HEAD_TILES
    h_kv = (head_tile % H_KV).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    k_ptr += h_kv * stride_kh
    v_ptr += h_kv * stride_vh
    if IS_QUANTISED:
        k_scale_ptr += h_kv * stride_ksh
        v_scale_ptr += h_kv * stride_vsh

    unit = group
    stop = group + 1
    if OVERLAPS:
        if IS_SHARED:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if IS_SHARED:
        share = tl.load(ends_ptr + num_tiles)
        unit = group * share
        stop = tl.minimum(unit + share, tl.load(ends_ptr + num_tiles - 1))
    tile = 0
    split = 0
    if not IS_SHARED:
        # The last queries of a sequence see the most keys, so equal parts of theirs go first.
        tile = num_tiles - 1 - unit // num_splits
        split = unit % num_splits
        if IS_BESIDE:  # parts that there may not be go last
            tile = unit % num_tiles
            split = unit // num_tiles
        if LEAST > 0:
            key_tiles = tl.cdiv(tl.load(lens_ptr + tile * stride_lens), BLOCK_N)
            is_part = split * size_of_parts(key_tiles, num_splits, LEAST) < tl.maximum(key_tiles, 1)
            stop = tl.where(is_part, stop, unit)
    start = unit
    while unit < stop:
        if IS_SHARED:
            tile, begin = tile_of_unit(unit, ends_ptr, num_tiles)
        b, first_token, start_m, M = queries_of_tile(
            tile, cu_seqlens_ptr, stride_cu, T, B, least_m, most_m, steps,
            IS_RAGGED, ONE_TILE_EACH, BLOCK_Q, 0,
        )  # fmt: skip
        N, right_b, lo, full_lo, full_hi, hi = keys_of_tile(
            b, start_m, M, B, lens_ptr, stride_lens, causal_ptr, stride_causal, left, right,
            HAS_LEFT, HAS_RIGHT, BLOCK_Q, BLOCK_N,
        )  # fmt: skip
        key_tiles = tl.cdiv(hi - lo, BLOCK_N)
        if IS_SHARED:
            first_part = unit - begin
            last_part = tl.minimum(tl.maximum(key_tiles, 1), stop - begin)
            is_whole = (first_part == 0) & (last_part >= key_tiles)
            has_first = first_part == 0
            slot = 2 * group + tl.where(unit == start, 0, 1)
            unit = begin + last_part
        else:
            size = size_of_parts(key_tiles, num_splits, LEAST)
            is_whole = size >= key_tiles if LEAST > 0 else num_splits == 1
            first_part = split * size
            if chunk > 0:  # parts of the same keys whatever the batch
                size = chunk
                first_part = split * size - lo // BLOCK_N
            last_part = tl.maximum(first_part + size, 0)
            first_part = tl.maximum(first_part, 0)
            has_first = split == 0
            slot = split * num_tiles + tile
            unit = stop

        heads, tokens, mask_m = rows_of_tile(
            head_tile, first_token, start_m, M, rows_ptr, offs_m, GROUP, TILE_GROUP, H_KV, BLOCK_Q
        )
        position = N - M + start_m + offs_m // TILE_GROUP
        q, q_tail = load_queries(
            q_ptr + tokens * stride_qt + heads * stride_qh, stride_qd, mask_m,
            NEGATE_Q, HEAD_DIM, BLOCK_D, TAIL_D,
        )  # fmt: skip
        q_scale = tl.full([BLOCK_M], 1.0, tl.float32)
        code: tl.constexpr = k_ptr.dtype.element_ty
        if q.dtype == tl.bfloat16 and (code.is_fp8() or (IS_QUANTISED and HAS_PTX)):
            # Keys are converted to float16 in fewest steps, so queries are made to fit it.
            q, q_tail, q_scale = queries_in_float16(q, q_tail, TAIL_D)
        slopes = scale_log2
        if HAS_ALIBI:
            slopes_ptrs = slopes_ptr + b.to(tl.int64) * stride_sb + heads * stride_sh
            slopes = tl.load(slopes_ptrs, mask=mask_m, other=0.0) * LOG2_E
        sinks_ptrs = sinks_ptr
        if HAS_SINKS:
            sinks_ptrs += heads * stride_sinks
        tree_ptrs = tree_ptr
        tree_start = N
        width = tree_width
        if HAS_TREE:
            tree_ptrs, width = trees_of_rows(
                tree_ptr, stride_mask, stride_mn, tree_starts_ptr, tree_width,
                b, tokens, start_m, offs_m // TILE_GROUP, M,
            )  # fmt: skip
            tree_start = N - width
            full_hi = tl.minimum(full_hi, tl.maximum(tree_start, 0) // BLOCK_N * BLOCK_N)
            full_hi = tl.maximum(full_hi, full_lo)

        first = tl.maximum(N - M + start_m - left, 0) if HAS_LEFT else 0
        lo, full_lo, full_hi, hi = keys_of_part(
            lo, full_lo, full_hi, hi, first_part, last_part, BLOCK_N
        )
        table = table_ptr + b.to(tl.int64) * stride_tb
        blocks = block_ids(table, stride_tn, lo, first, hi, BLOCK_SIZE, BLOCK_N)
        # Runs: keys left of those that all rows see, these, and the rest. Small tiles are bound by
        # memory and have but one: their pipeline should run through, masks cost nothing.
        IS_LARGE: tl.constexpr = BLOCK_M > 32
        m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M, 1 if IS_LARGE else BLOCK_N], tl.float32)
        PAIR: tl.constexpr = 2 if v_ptr.dtype.element_ty == tl.int16 else 1
        acc = tl.zeros([BLOCK_M, BLOCK_DV // PAIR], tl.float32)
        acc_odd = acc
        FIRST_RUN: tl.constexpr = 2 if not IS_LARGE else 0 if HAS_LEFT else 1
        start_n = lo if FIRST_RUN != 1 else full_lo
        for run in tl.static_range(FIRST_RUN, 3):
            end_n = full_lo if run == 0 else full_hi if run == 1 else hi
            acc, acc_odd, m_i, l_i, blocks = attend(
                acc, acc_odd, m_i, l_i, blocks, q, q_tail, q_scale, position, slopes,
                k_ptr, stride_kb, stride_kn, stride_kd,
                v_ptr, stride_vb, stride_vn, stride_vd,
                k_scale_ptr, stride_ksb, stride_ksn, v_scale_ptr, stride_vsb, stride_vsn,
                table, stride_tn, tree_ptrs, stride_mn, mask_m, tree_start, width,
                start_n, end_n, first, hi, N, scale_log2, softcap_log2, left, right_b,
                HEAD_DIM, HEAD_DIM_V, BLOCK_SIZE, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI,
                HAS_TREE, IS_QUANTISED, SAME_SLOTS, VALUES_IN_KEYS, HAS_PTX, run != 1, PRECISION,
                BLOCK_N, BLOCK_D, TAIL_D, BLOCK_DV,
            )  # fmt: skip
            start_n = end_n

        l_i = tl.sum(l_i, 1)
        if PAIR == 2:
            acc = tl.interleave(acc, acc_odd)
        if HAS_SINKS:
            has_sink = tl.where((b < B) & has_first, mask_m, False)
            m_i, l_i, alpha = with_sink(m_i, l_i, sinks_ptrs, has_sink, BLOCK_M)
            acc *= alpha[:, None]
        out, lse = finish_softmax(m_i, l_i, acc)
        if is_whole:
            tl.store(lse_ptr + heads * T + tokens, lse, mask=mask_m)
            store_rows(out_ptr, tokens * (H_KV * GROUP) + heads, out, mask_m, HEAD_DIM_V, BLOCK_DV)
        else:
            rows = (slot * HEAD_TILES + head_tile).to(tl.int64) * BLOCK_M + offs_m
            lse_log2 = m_i + tl.math.log2(l_i)
            tl.store(parts_lse_ptr + rows, lse_log2, mask=mask_m)
            has_keys = mask_m & (lse_log2 > -float("inf"))
            store_rows(parts_ptr, rows, out, has_keys, HEAD_DIM_V, BLOCK_DV)
    if IS_BESIDE:  # noqa: SIM102 - decided while compiling
        # What comes next waits for this kernel alone, so one program waits for the one before.
        if pid == tl.num_programs(0) - 1:
            tl.extra.cuda.gdc_wait()


_launch = Launcher(_paged_attention_kernel)
_launch_next = Launcher(_paged_attention_kernel, launch_pdl=True)
_FAR = 2**30 - 1  # no context is longer: a window of more keys would overflow 32 bits


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (T, H, D) over paged sequences: out (T, H, D_v) and lse (H, T)."""
    (T, H, _), D_v = q.shape, v_cache.shape[3]
    out = q.new_empty((T, H, D_v))
    lse = q.new_empty((H, T), dtype=torch.float32)
    if T * H == 0:
        return out, lse
    arguments = (q, k_cache, v_cache, block_tables, context_lens, options)
    if options.shared_prefix and len(context_lens) > 1:
        cascade.attend_in_halves(start, *arguments, out, lse)
    else:
        for parts in start(*arguments, out, lse):
            merge.merge_parts(parts)
    return out, lse


def start(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: AttentionOptions,
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor | None = None,
    is_beside: bool = False,
) -> list[Parts]:
    """Start writing attention to out (T, H, D_v) and lse (H, T); return what is to be merged.

    `rows` (T,) are the rows of q, out and lse that cu_seqlens_q counts, where they are not in
    order: those of shared prefixes. `is_beside` says that the kernel right before it attends to
    prefixes and leaves room for this one.
    """
    is_ragged = options.cu_seqlens_q is not None
    are_long = rows is not None  # queries of many sequences one after the other
    plans = configs.plans(
        q, k_cache, v_cache, block_tables, is_ragged, are_long, is_beside, options
    )
    arguments = (q, k_cache, v_cache, block_tables, context_lens, options, out, lse, rows)
    return [_start_by(plan, *arguments) for plan in plans]


def _start_by(
    plan: configs.Plan,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: AttentionOptions,
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor | None,
) -> Parts:
    (T, H, D), B = q.shape, len(block_tables)
    _, block_size, H_KV, D_v = v_cache.shape
    config = plan.config
    cu_seqlens_q, is_causal, tree = options.cu_seqlens_q, options.is_causal, options.tree_mask
    is_ragged = cu_seqlens_q is not None
    left, right = (min(side, _FAR) for side in options.window)
    if is_causal is not None and right < 0:
        right = _FAR
    # The only query of a sequence is its last token: no key is to its right.
    sides = {"HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0 and is_ragged}
    schedule = {"IS_RAGGED": is_ragged, "ONE_TILE_EACH": plan.one_tile_each}
    limits = {"least_m": plan.least_m, "most_m": plan.most_m, "steps": B.bit_length()}
    ends = None
    overlaps = problem.can_overlap(q.device)
    if plan.is_shared:
        ends = worklist.count_work(
            context_lens, cu_seqlens_q, is_causal,
            {**schedule, **sides, "BLOCK_Q": plan.block_q, "BLOCK_N": config.block_n},
            T=T, B=B, num_tiles=plan.num_tiles, num_shares=plan.num_splits,
            **limits, left=left, right=right,
        )  # fmt: skip
    parts, parts_lse = out, lse
    if plan.slots:
        parts = q.new_empty((plan.slots, config.block_m, D_v), dtype=torch.float32)
        parts_lse = q.new_empty((plan.slots, config.block_m), dtype=torch.float32)
    tree_strides, tree_width, tree_starts = _tree_layout(tree, cu_seqlens_q, B)
    k_scale, v_scale = (
        None if scale is None else scale.expand(k_cache.shape[:3])
        for scale in (options.k_scale, options.v_scale)
    )
    slopes = None if options.alibi_slopes is None else options.alibi_slopes.expand(B, H)
    sinks = options.sinks
    v = _in_pairs(v_cache)
    q_strides, k_strides, v_strides = q.stride(), k_cache.stride(), v.stride()
    ks_strides, vs_strides = (problem.strides_of(scale, 3) for scale in (k_scale, v_scale))
    table_strides, slopes_strides = block_tables.stride(), problem.strides_of(slopes, 2)
    lens_strides, cu_strides, causal_strides, sinks_strides = (
        problem.strides_of(vector, 1) for vector in (context_lens, cu_seqlens_q, is_causal, sinks)
    )
    sizes = {"T": T, "B": B, "num_tiles": plan.num_tiles, "num_splits": plan.num_splits, **limits}
    shape = {
        **schedule, "IS_SHARED": plan.is_shared,
        "GROUP": H // H_KV, "TILE_GROUP": plan.tile_group, "H_KV": H_KV, "HEAD_DIM_V": D_v,
        "BLOCK_M": config.block_m, "BLOCK_Q": plan.block_q,
    }  # fmt: skip
    block_d, tail_d = problem.split_head_dim(D)
    launch = _launch
    # Beside another launch it reads nothing that the kernel right before it writes.
    if overlaps and (plan.is_shared or (plan.is_beside and tree_starts is None)):
        launch = _launch_next
    launch(
        plan.num_programs,
        strides=(
            q_strides, k_strides, v_strides, ks_strides, vs_strides, table_strides[1],
            lens_strides, cu_strides, causal_strides, slopes_strides, sinks_strides,
            tree_strides[1], k_cache.dtype, v.dtype, out.dtype, parts.dtype,
            None if sinks is None else sinks.dtype,
            is_causal is None, tree_starts is None, rows is None,
        ),
        args=(
            q, *q_strides,
            k_cache, *k_strides,
            v, *v_strides,
            k_scale, *ks_strides,
            v_scale, *vs_strides,
            block_tables, *table_strides,
            context_lens, *lens_strides,
            cu_seqlens_q, *cu_strides,
            is_causal, *causal_strides,
            slopes, *slopes_strides,
            sinks, *sinks_strides,
            tree, *tree_strides,
            tree_starts,
            ends,
            rows,
            out,
            lse,
            parts,
            parts_lse,
            *sizes.values(), plan.chunk, tree_width, left, right,
            abs(options.scale) * problem.LOG2_E, options.softcap * problem.LOG2_E,
        ),
        constexprs={
            **shape, "HEAD_DIM": D, "BLOCK_SIZE": block_size, **sides,
            "HAS_SOFTCAP": options.softcap > 0, "HAS_ALIBI": slopes is not None,
            "HAS_SINKS": sinks is not None, "HAS_TREE": tree is not None,
            "IS_QUANTISED": k_scale is not None,
            "SAME_SLOTS": (k_strides[:2], ks_strides) == (v_cache.stride()[:2], vs_strides),
            "VALUES_IN_KEYS": problem.are_values_in_keys(k_cache, v_cache),
            "HAS_PTX": device_info(q.device).capability >= 89,  # float8 to float16
            "NEGATE_Q": options.scale < 0, "OVERLAPS": overlaps,
            "IS_BESIDE": plan.is_beside, "LEAST": plan.least,
            "PRECISION": tiling.dot_precision(q),
            "BLOCK_N": config.block_n, "BLOCK_D": block_d, "TAIL_D": tail_d,
            "BLOCK_DV": tiling.padded_head_dim(D_v),
        },
        config=config,
    )  # fmt: skip
    return Parts(
        *(parts, parts_lse, cu_seqlens_q, rows, ends, out, lse, sizes, shape),
        plan.head_tiles,
        context_lens,
        config.block_n,
        plan.least,
    )


def _in_pairs(v_cache: torch.Tensor) -> torch.Tensor:
    """Values of one byte as pairs of neighbours, where strides and alignment allow it.

    Tensor cores take the values of a column key by key, and GPUs transpose only 16 bits at a time.
    """
    is_wide = tiling.padded_head_dim(v_cache.shape[3]) >= 2 * tiling.MIN_DOT
    if v_cache.itemsize != 1 or v_cache.stride(3) != 1 or not is_wide:
        return v_cache
    places = (*v_cache.stride()[:3], v_cache.storage_offset(), v_cache.data_ptr())
    is_even = all(number % 2 == 0 for number in (v_cache.shape[3], *places))
    return v_cache.view(torch.int16) if is_even else v_cache


def _tree_layout(
    tree: torch.Tensor | None, cu_seqlens_q: torch.Tensor | None, sequences: int
) -> tuple[tuple[int, int], int, torch.Tensor | None]:
    """Strides and width of a tree mask, and where that of each sequence begins if it is flat."""
    if tree is None:
        return (0, 0), 0, None
    if tree.ndim == 2:
        return (tree.stride(0), tree.stride(1)), tree.shape[1], None
    if cu_seqlens_q is None:
        return (0, tree.stride(0)), 0, torch.arange(sequences, device=tree.device)
    areas = cu_seqlens_q.diff().long() ** 2
    return (0, tree.stride(0)), 0, areas.cumsum(0) - areas
