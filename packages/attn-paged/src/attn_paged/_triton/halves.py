"""Attention to prefixes and to the keys after them, put together."""

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.merge import take_in_parts
from attn_core.tiles.softmax import LOG2_E, finish_softmax
from attn_core.tuning import TileConfig
from attn_paged._triton import problem
from attn_paged._triton.merge import (
    MERGED_ELEMENTS,
    MERGED_ROWS,
    Parts,
    merge_parts,
    merge_slots,
    slots_of_shared_tile,
    store_rows,
)
from attn_paged._triton.queries import sequence_of, size_of_parts

_SEQUENCES = 256  # of which a program looks at once; fewer compile no other kernel


# fmt: off
@triton.jit
def _take_in_whole(
    m_i, l_i, acc, out_ptr, lse_ptr, heads, token, mask_g, T,
    H: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    """Take in what a launch has left of a query in out [T, H, D_v] and lse [H, T]."""
    offs_d = tl.arange(0, BLOCK_DV)
    lse = tl.load(lse_ptr + heads * T + token, mask=mask_g, other=-float("inf"))
    rows = (token * H + heads) * HEAD_DIM_V
    mask = mask_g[:, None] & (offs_d < HEAD_DIM_V)[None, :]
    out = tl.load(out_ptr + rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
    return take_in_parts(m_i, l_i, acc, (lse * LOG2_E)[:, None], out[:, None, :])


@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _merge_halves_kernel(
    prefix_parts_ptr, prefix_parts_lse_ptr, prefix_out_ptr, prefix_lse_ptr,
    bounds_ptr,  # [B + 1], where the queries of each group begin
    ends_ptr,  # [num_tiles + 1], of prefixes
    rest_parts_ptr, rest_parts_lse_ptr, rest_out_ptr, rest_lse_ptr,
    rest_lens_ptr,  # [B], contiguous
    rows_ptr,  # [T], query of each place among the groups
    out_ptr,  # [T, H, D_v], contiguous
    lse_ptr,  # [H, T], contiguous
    T, B, num_tiles, num_splits,
    PREFIX_IS_WHOLE: tl.constexpr, REST_IS_WHOLE: tl.constexpr,
    GROUP: tl.constexpr, H_KV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PREFIX_GROUP: tl.constexpr, PREFIX_BLOCK_M: tl.constexpr, PREFIX_BLOCK_Q: tl.constexpr,
    REST_GROUP: tl.constexpr, REST_BLOCK_M: tl.constexpr, REST_BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Merge what the two launches have left for BLOCK_G heads of a query."""
    RUNS: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    pid = tl.program_id(0)
    h_kv = pid % H_KV
    run = pid // H_KV % RUNS
    place = pid // H_KV // RUNS
    token = tl.load(rows_ptr + place).to(tl.int64)
    offs_g = run * BLOCK_G + tl.arange(0, BLOCK_G)
    mask_g = offs_g < GROUP
    heads = h_kv.to(tl.int64) * GROUP + offs_g
    m_i = tl.full([BLOCK_G], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)

    count = 1
    if not PREFIX_IS_WHOLE:
        b, begin = sequence_of(place, bounds_ptr, 1, B, BLOCK_B)
        tile = begin // PREFIX_BLOCK_Q + b + (place - begin) // PREFIX_BLOCK_Q
        first, step, shift, count = slots_of_shared_tile(
            tl.load(ends_ptr + tile - 1, mask=tile > 0, other=0),
            tl.load(ends_ptr + tile),
            tl.load(ends_ptr + num_tiles),
        )
    rest_count = 1
    if not REST_IS_WHOLE:
        key_tiles = tl.maximum(tl.cdiv(tl.load(rest_lens_ptr + token), REST_BLOCK_N), 1)
        rest_count = tl.cdiv(key_tiles, size_of_parts(key_tiles, num_splits, LEAST))
    if OVERLAPS:  # all of this was there before attention, which may not have ended
        tl.extra.cuda.gdc_wait()
    if count == 1:
        m_i, l_i, acc = _take_in_whole(
            m_i, l_i, acc, prefix_out_ptr, prefix_lse_ptr, heads, token, mask_g, T,
            H_KV * GROUP, HEAD_DIM_V, BLOCK_DV,
        )  # fmt: skip
    elif not PREFIX_IS_WHOLE:
        head_tile = run * BLOCK_G // PREFIX_GROUP
        rank = (place - begin) % PREFIX_BLOCK_Q
        offs_m = rank * PREFIX_GROUP + offs_g - head_tile * PREFIX_GROUP
        m_i, l_i, acc = merge_slots(
            m_i, l_i, acc, prefix_parts_ptr, prefix_parts_lse_ptr, first, step, shift, count,
            head_tile * H_KV + h_kv, offs_m, mask_g,
            H_KV * ((GROUP + PREFIX_GROUP - 1) // PREFIX_GROUP), HEAD_DIM_V, PREFIX_BLOCK_M,
            BLOCK_S, BLOCK_DV,
        )  # fmt: skip
    if rest_count == 1:
        m_i, l_i, acc = _take_in_whole(
            m_i, l_i, acc, rest_out_ptr, rest_lse_ptr, heads, token, mask_g, T,
            H_KV * GROUP, HEAD_DIM_V, BLOCK_DV,
        )  # fmt: skip
    elif not REST_IS_WHOLE:
        head_tile = run * BLOCK_G // REST_GROUP
        m_i, l_i, acc = merge_slots(
            m_i, l_i, acc, rest_parts_ptr, rest_parts_lse_ptr, token.to(tl.int32), T, 0, rest_count,
            head_tile * H_KV + h_kv, offs_g - head_tile * REST_GROUP, mask_g,
            H_KV * ((GROUP + REST_GROUP - 1) // REST_GROUP), HEAD_DIM_V, REST_BLOCK_M,
            BLOCK_S, BLOCK_DV,
        )  # fmt: skip
    out, lse = finish_softmax(m_i, l_i, acc)
    tl.store(lse_ptr + heads * T + token, lse, mask=mask_g)
    store_rows(out_ptr, token * (H_KV * GROUP) + heads, out, mask_g, HEAD_DIM_V, BLOCK_DV)


_launch = Launcher(_merge_halves_kernel)
_launch_next = Launcher(_merge_halves_kernel, launch_pdl=True)


def merge_halves(
    prefix: list[Parts], rest: list[Parts], rows: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Merge attention to prefixes and to the rest into out (T, H, D_v) and lse (H, T).

    `rows` (T,) are the queries in the order in which `prefix` counts them.
    """
    (a, *_), (b, *_) = prefix, rest
    # The parts of one launch of decoding are merged at once, others by themselves before.
    prefix_is_whole, rest_is_whole = a.ends is None, b.least == 0
    for half, is_whole in ((prefix, prefix_is_whole), (rest, rest_is_whole)):
        for left in half if is_whole else ():
            merge_parts(left)
    T, H, D_v = out.shape
    group, heads_kv = b.constexprs["GROUP"], b.constexprs["H_KV"]
    block_dv = tiling.padded_head_dim(D_v)
    block_g = min(MERGED_ROWS, triton.next_power_of_2(group))
    B = b.sizes["B"]
    overlaps = problem.can_overlap(out.device)
    launch = _launch_next if overlaps else _launch
    launch(
        T * heads_kv * tiling.ceil_div(group, block_g),
        strides=(out.dtype, a.ends is None),
        args=(
            a.parts, a.parts_lse, a.out, a.lse, a.cu_seqlens_q, a.ends,
            b.parts, b.parts_lse, b.out, b.lse, b.lens,
            rows, out, lse, T, B, a.sizes["num_tiles"], b.sizes["num_splits"],
        ),
        constexprs={
            "PREFIX_IS_WHOLE": prefix_is_whole, "REST_IS_WHOLE": rest_is_whole,
            "GROUP": group, "H_KV": heads_kv, "HEAD_DIM_V": D_v,
            "PREFIX_GROUP": a.constexprs["TILE_GROUP"],
            "PREFIX_BLOCK_M": a.constexprs["BLOCK_M"], "PREFIX_BLOCK_Q": a.constexprs["BLOCK_Q"],
            "REST_GROUP": b.constexprs["TILE_GROUP"], "REST_BLOCK_M": b.constexprs["BLOCK_M"],
            "REST_BLOCK_N": b.block_n, "LEAST": b.least,
            "BLOCK_B": max(_SEQUENCES, triton.next_power_of_2(B + 1)),
            "BLOCK_G": block_g, "BLOCK_S": max(1, MERGED_ELEMENTS // block_dv // block_g),
            "BLOCK_DV": block_dv, "OVERLAPS": overlaps,
        },
        config=TileConfig(block_g, block_dv, 4, 1),
    )  # fmt: skip
