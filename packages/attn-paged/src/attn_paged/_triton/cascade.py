"""Prefixes that several sequences share, found from their block tables and attended to once.

Sequences whose first block is the same are a group. The blocks that all of a group have in common,
before any of their queries, are its prefix. Attention to prefixes is attention of a batch whose
sequences are the groups; attention to the rest is attention of the sequences with the prefix cut
off. The two are merged by their lse (Juravsky et al., "Hydragen", 2024).
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_core.tuning import TileConfig
from attn_paged._hopper import support
from attn_paged._triton import problem
from attn_paged._triton.halves import merge_halves
from attn_paged._triton.merge import Parts
from attn_paged.options import AttentionOptions

_MIN_SEQUENCES = 256  # of which a program looks at once; fewer compile no other kernel
_ENTRIES = 1024  # of a table that a program compares at once


@triton.jit
def _queries_of(b, cu_seqlens_ptr, stride_cu, mask, IS_RAGGED: tl.constexpr):
    if IS_RAGGED:
        begin = tl.load(cu_seqlens_ptr + b * stride_cu, mask=mask, other=0)
        return begin, tl.load(cu_seqlens_ptr + (b + 1) * stride_cu, mask=mask, other=0) - begin
    else:  # noqa: RET505 - Triton compiles what follows a return
        return b, tl.where(mask, 1, 0)


@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _find_prefixes_kernel(
    table_ptr, stride_tb, stride_tn,
    lens_ptr, stride_lens,
    cu_seqlens_ptr, stride_cu,
    leaders_ptr,  # [B], first sequence with the same first block
    common_ptr,  # [B], leading blocks in common with it
    B, num_blocks,
    IS_RAGGED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Compare a sequence with its leader; only full blocks before its queries count."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.program_id(0)
    _begin, M = _queries_of(b, cu_seqlens_ptr, stride_cu, b < B, IS_RAGGED)
    own_blocks = tl.maximum(tl.load(lens_ptr + b * stride_lens) - M, 0) // BLOCK_SIZE
    offs_b = tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    _begins, Ms = _queries_of(offs_b, cu_seqlens_ptr, stride_cu, mask_b, IS_RAGGED)
    lens = tl.load(lens_ptr + offs_b * stride_lens, mask=mask_b, other=0)
    has_block = mask_b & (lens - Ms >= BLOCK_SIZE) & (Ms > 0)
    far_b = offs_b.to(tl.int64)
    firsts = tl.load(table_ptr + far_b * stride_tb, mask=has_block, other=-1)
    own = table_ptr + b.to(tl.int64) * stride_tb
    is_member = (own_blocks > 0) & (M > 0)
    first = tl.load(own, mask=is_member, other=-1)
    leader = tl.min(tl.where(has_block & (firsts == first), offs_b, BLOCK_B), 0)
    leader = tl.where(is_member, leader, b)
    theirs = table_ptr + leader.to(tl.int64) * stride_tb
    common = tl.where(is_member, own_blocks, 0)
    start = 0
    while start < common:
        offs_e = start + tl.arange(0, BLOCK_E)
        mask_e = offs_e < common
        ours = tl.load(own + offs_e * stride_tn, mask=mask_e, other=0)
        same = ours == tl.load(theirs + offs_e * stride_tn, mask=mask_e, other=0)
        common = tl.minimum(common, tl.min(tl.where(same, num_blocks, offs_e), 0))
        start += BLOCK_E
    tl.store(leaders_ptr + b, leader)
    tl.store(common_ptr + b, common)


@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _divide_sequences_kernel(
    table_ptr, stride_tb, stride_tn,
    lens_ptr, stride_lens,
    cu_seqlens_ptr, stride_cu,
    leaders_ptr, common_ptr,
    prefix_lens_ptr,  # [B], keys of the prefix of the group that sequence b leads
    bounds_ptr,  # [B + 1], where the queries of each group begin
    rows_ptr,  # [T], queries in the order of the groups
    rest_lens_ptr,  # [B]
    rest_table_ptr,  # [B, num_blocks], contiguous
    T, B, num_blocks,
    IS_RAGGED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Lay out one sequence's queries among those of its group, and its keys past the prefix."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    offs_b = tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    leaders = tl.load(leaders_ptr + offs_b, mask=mask_b, other=BLOCK_B)
    common = tl.load(common_ptr + offs_b, mask=mask_b, other=num_blocks)
    _begins, Ms = _queries_of(offs_b, cu_seqlens_ptr, stride_cu, mask_b, IS_RAGGED)
    begin, M = _queries_of(b, cu_seqlens_ptr, stride_cu, b < B, IS_RAGGED)
    leader = tl.load(leaders_ptr + b)
    members = tl.sum((leaders == leader).to(tl.int32), 0)
    prefix = tl.min(tl.where(leaders == leader, common, num_blocks), 0)
    prefix = tl.where(members > 1, prefix, 0)
    own_prefix = tl.where(leader == b, prefix, 0)
    tl.store(prefix_lens_ptr + b, own_prefix * BLOCK_SIZE)
    tl.store(bounds_ptr + b, tl.sum(tl.where(leaders < b, Ms, 0), 0))
    if b == B - 1:
        tl.store(bounds_ptr + B, tl.sum(Ms, 0))
    is_before = (leaders < leader) | ((leaders == leader) & (offs_b < b))
    target = tl.sum(tl.where(is_before, Ms, 0), 0)
    for start in range(0, M, BLOCK_E):
        offs_m = start + tl.arange(0, BLOCK_E)
        tl.store(rows_ptr + target + offs_m, begin + offs_m, mask=offs_m < M)
    if b == B - 1:  # padding stays in its place
        end = tl.sum(Ms, 0)
        for start in range(end, T, BLOCK_E):
            offs_m = start + tl.arange(0, BLOCK_E)
            tl.store(rows_ptr + offs_m, offs_m, mask=offs_m < T)
    N = tl.load(lens_ptr + b * stride_lens)
    tl.store(rest_lens_ptr + b, N - prefix * BLOCK_SIZE)
    far_b = b.to(tl.int64)
    for start in range(0, tl.cdiv(N, BLOCK_SIZE) - prefix, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        mask_e = offs_e + prefix < num_blocks
        ids = tl.load(
            table_ptr + far_b * stride_tb + (offs_e + prefix) * stride_tn, mask=mask_e, other=0
        )
        tl.store(rest_table_ptr + far_b * num_blocks + offs_e, ids, mask=mask_e)


_launch_find = Launcher(_find_prefixes_kernel)
_launch_divide = Launcher(_divide_sequences_kernel)
_launch_divide_next = Launcher(_divide_sequences_kernel, launch_pdl=True)


def attend_in_halves(
    start: Callable[..., list[Parts]],
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: AttentionOptions,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write attention to out and lse, looking at shared prefixes once, by way of `start`."""
    (T, H, D_v), (B, num_blocks) = out.shape, block_tables.shape
    new = context_lens.new_empty
    leaders, common, prefix_lens, rest_lens = new((4, B)).unbind(0)
    bounds, rows, rest_table = new((B + 1,)), new((T,)), new((B, num_blocks))
    table_strides, cu_seqlens_q = block_tables.stride(), options.cu_seqlens_q
    lens_strides, cu_strides = (
        problem.strides_of(vector, 1) for vector in (context_lens, cu_seqlens_q)
    )
    tensors = (
        block_tables, *table_strides, context_lens, *lens_strides, cu_seqlens_q, *cu_strides,
        leaders, common,
    )  # fmt: skip
    overlaps = problem.can_overlap(q.device)
    block_b = max(_MIN_SEQUENCES, 1 << (B - 1).bit_length())
    launch = {
        "strides": (table_strides[1], lens_strides, cu_strides),
        "constexprs": {
            "IS_RAGGED": cu_seqlens_q is not None, "BLOCK_SIZE": k_cache.shape[1],
            "BLOCK_B": block_b, "BLOCK_E": _ENTRIES, "OVERLAPS": overlaps,
        },
        "config": TileConfig(block_b, _ENTRIES, 4, 1),
    }  # fmt: skip
    _launch_find(B, args=(*tensors, B, num_blocks), **launch)
    outputs = (prefix_lens, bounds, rows, rest_lens, rest_table)
    divide = _launch_divide_next if overlaps else _launch_divide
    divide(B, args=(*tensors, *outputs, T, B, num_blocks), **launch)

    halves = q.new_empty((2, T, H, D_v), dtype=torch.float32)
    halves_lse = q.new_empty((2, H, T), dtype=torch.float32)
    prefix = options._replace(
        window=(-1, -1), cu_seqlens_q=bounds, sinks=None, is_causal=None, tree_mask=None
    )
    caches = (q, k_cache, v_cache)
    of_prefix, of_rest = zip(halves, halves_lse, strict=True)
    is_beside = support.takes(*caches, block_tables, options)
    if is_beside:
        groups = (block_tables, prefix_lens, bounds, rows, rest_lens)
        left = _start_on_hopper(*caches, *groups, options.scale, *of_prefix)
    else:
        left = start(*caches, block_tables, prefix_lens, prefix, *of_prefix, rows)
    left_of_rest = start(*caches, rest_table, rest_lens, options, *of_rest, None, is_beside)
    merge_halves(left, left_of_rest, rows, out, lse)


def _start_on_hopper(*arguments: Any) -> list[Parts]:
    """Start attention to prefixes by Gluon, which is imported where it is used."""
    from attn_paged._hopper import prefix

    return [prefix.start(*arguments)]
