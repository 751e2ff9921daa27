"""The parts of attention that programs have shared, put together in the order of the keys."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tiles.softmax import LOG2_E, finish_softmax
from attn_core.tuning import TileConfig
from attn_paged._triton import problem
from attn_paged._triton.queries import queries_of_tile, sequence_of, tile_of_unit

_TILE = 4096  # elements of parts that a program holds, of at least two parts
_ROWS = 8  # of a tile in few parts that are merged at once
_SEQUENCES = 256  # of which a program looks at once; fewer compile no other kernel
_TILES = 256  # whose ends a program looks at at once, at most


@triton.jit
def rows_of_tile(
    head_tile, first_token, start_m, M, rows_ptr, offs_m,
    GROUP: tl.constexpr, TILE_GROUP: tl.constexpr, H_KV: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Return the head, the row of q and whether there is one, for rows `offs_m` of a tile."""
    offs_q = offs_m // TILE_GROUP
    offs_g = head_tile // H_KV * TILE_GROUP + offs_m % TILE_GROUP
    mask_m = (offs_q < BLOCK_Q) & (start_m + offs_q < M) & (offs_g < GROUP)
    heads = (head_tile % H_KV).to(tl.int64) * GROUP + offs_g
    tokens = first_token + offs_q.to(tl.int64)
    if rows_ptr is not None:
        tokens = tl.load(rows_ptr + tokens, mask=mask_m, other=0).to(tl.int64)
    return heads, tokens, mask_m


@triton.jit
def share_of_work(total, num_shares):
    """Units of work that each of `num_shares` programs takes."""
    return tl.maximum(tl.cdiv(total, num_shares), 1)


# fmt: off
@triton.jit
def _parts_of_tile(
    tile, begin, end, total, num_tiles, num_splits, IS_SHARED: tl.constexpr,
):
    # fmt: on
    """Return first, step, shift and count: part i of a tile is in slot first + i * step.

    But for the first part of a shared tile, which has units of work from begin to end, of total.
    """
    if IS_SHARED:
        share = share_of_work(total, num_splits)
        program = begin // share
        shift = tl.where(begin == program * share, 0, 1)
        return 2 * program, 2, shift, (end - 1) // share - program + 1
    else:  # noqa: RET505 - Triton compiles what follows a return
        return tile, num_tiles, 0, num_splits


@triton.jit
def _take_in(m_i, l_i, acc, lse, rows):
    """Take parts in, lse [BLOCK_R, BLOCK_S] in units of log2 and rows [BLOCK_R, BLOCK_S, D]."""
    # A part without keys holds anything. Both loads start at once, so it is dropped here.
    rows = tl.where((lse > -float("inf"))[:, :, None], rows, 0.0)
    m_new = tl.maximum(m_i, tl.max(lse, 1))
    pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
    alpha = tl.math.exp2(m_i - pivot)
    p = tl.math.exp2(lse - pivot[:, None])
    acc = acc * alpha[:, None] + tl.sum(p[:, :, None] * rows, 1)
    return m_new, l_i * alpha + tl.sum(p, 1), acc


# fmt: off
@triton.jit
def _merged(
    m_i, l_i, acc, parts_ptr, parts_lse_ptr, first, step, shift, count, head_tile, offs_m, mask_m,
    HEAD_TILES: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    """Take in the parts of a tile, for its rows offs_m."""
    offs_d = tl.arange(0, BLOCK_DV)
    mask_d = offs_d < HEAD_DIM_V
    for start_s in range(0, count, BLOCK_S):
        offs_s = start_s + tl.arange(0, BLOCK_S)
        slots = first + offs_s * step + tl.where(offs_s == 0, shift, 0)
        slots = (slots * HEAD_TILES + head_tile).to(tl.int64)
        rows = offs_m[:, None] + slots[None, :] * BLOCK_M  # [BLOCK_R, BLOCK_S]
        mask = mask_m[:, None] & (offs_s < count)[None, :]
        lse = tl.load(parts_lse_ptr + rows, mask=mask, other=-float("inf"))
        parts_ptrs = parts_ptr + rows[:, :, None] * HEAD_DIM_V + offs_d[None, None, :]
        parts = tl.load(parts_ptrs, mask=mask[:, :, None] & mask_d[None, None, :], other=0.0)
        m_i, l_i, acc = _take_in(m_i, l_i, acc, lse, parts)
    return m_i, l_i, acc


# fmt: off
@triton.jit
def _store_rows(
    m_i, l_i, acc, out_ptr, lse_ptr, heads, tokens, mask_m, T,
    H: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    offs_d = tl.arange(0, BLOCK_DV)
    out, lse = finish_softmax(m_i, l_i, acc)
    tl.store(lse_ptr + heads * T + tokens, lse, mask=mask_m)
    out_rows = (tokens * H + heads) * HEAD_DIM_V
    tl.store(
        out_ptr + out_rows[:, None] + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & (offs_d < HEAD_DIM_V)[None, :],
    )


@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _merge_parts_kernel(
    parts_ptr,  # [slots, BLOCK_M, D_v], contiguous
    parts_lse_ptr,  # [slots, BLOCK_M], in units of log2
    cu_seqlens_ptr, stride_cu,
    rows_ptr,
    ends_ptr,
    out_ptr,  # [T, H, D_v], contiguous
    lse_ptr,  # [H, T], contiguous
    T, B, num_tiles, num_splits, least_m, most_m, steps, num_halvings,
    IS_RAGGED: tl.constexpr, ONE_TILE_EACH: tl.constexpr, IS_SHARED: tl.constexpr,
    GROUP: tl.constexpr, TILE_GROUP: tl.constexpr, H_KV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Merge rows of a tile: a part is a key whose score is its lse and whose value its output.

    Where the work is shared, each program but the first that began in the midst of a tile stands
    for it, so that their number does not grow with that of the tiles.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    HEAD_TILES: tl.constexpr = H_KV * ((GROUP + TILE_GROUP - 1) // TILE_GROUP)
    RUNS: tl.constexpr = (TILE_GROUP * BLOCK_Q + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    head_tile = pid // RUNS % HEAD_TILES
    tile = pid // RUNS // HEAD_TILES
    begin = 0
    end = 0
    total = 0
    if IS_SHARED:
        total = tl.load(ends_ptr + num_tiles - 1)
        share = share_of_work(total, num_splits)
        unit = (tile + 1) * share
        if unit >= total:
            return
        tile, begin = tile_of_unit(unit, ends_ptr, num_tiles, num_halvings, BLOCK_T)
        # It began with the tile, or another one stands for it.
        if (begin == unit) | ((begin // share + 1) * share < unit):
            return
        end = tl.load(ends_ptr + tile)
    first, step, shift, count = _parts_of_tile(
        tile, begin, end, total, num_tiles, num_splits, IS_SHARED
    )
    b, first_token, start_m, M = queries_of_tile(
        tile, cu_seqlens_ptr, stride_cu, T, B, least_m, most_m, steps,
        IS_RAGGED, ONE_TILE_EACH, BLOCK_Q, BLOCK_T,
    )  # fmt: skip
    if start_m >= M:
        return
    offs_m = pid % RUNS * BLOCK_R + tl.arange(0, BLOCK_R)
    heads, tokens, mask_m = rows_of_tile(
        head_tile, first_token, start_m, M, rows_ptr, offs_m, GROUP, TILE_GROUP, H_KV, BLOCK_Q
    )
    m_i = tl.full([BLOCK_R], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    m_i, l_i, acc = _merged(
        m_i, l_i, acc, parts_ptr, parts_lse_ptr, first, step, shift, count,
        head_tile, offs_m, mask_m, HEAD_TILES, HEAD_DIM_V, BLOCK_M, BLOCK_S, BLOCK_DV,
    )  # fmt: skip
    _store_rows(
        m_i, l_i, acc, out_ptr, lse_ptr, heads, tokens, mask_m, T,
        H_KV * GROUP, HEAD_DIM_V, BLOCK_DV,
    )  # fmt: skip


_launch = Launcher(_merge_parts_kernel)
_launch_next = Launcher(_merge_parts_kernel, launch_pdl=True)


class Parts(NamedTuple):
    """What a launch of attention leaves: parts of tiles, and out and lse of the other tiles.

    With `ends` the parts are those of programs that share the work, else of equal splits. `sizes`
    and `constexprs` are the launch's.
    """

    parts: torch.Tensor
    parts_lse: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    rows: torch.Tensor | None
    ends: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor
    sizes: dict[str, int]
    constexprs: dict[str, int]
    head_tiles: int


def merge_parts(left: Parts) -> None:
    """Merge what `left` has in parts into its out (T, H, D_v) and lse (H, T)."""
    sizes, constexprs, ends, out = left.sizes, left.constexprs, left.ends, left.out
    D_v = out.shape[2]
    num_rows = constexprs["TILE_GROUP"] * constexprs["BLOCK_Q"]
    block_dv = tiling.padded_head_dim(D_v)
    rows_at_once = _TILE // block_dv
    block_r = 1
    if ends is not None:
        block_r = min(_ROWS, triton.next_power_of_2(num_rows), rows_at_once // 2)
    strides = problem.strides_of(left.cu_seqlens_q, 1)
    groups = sizes["num_splits"] - 1 if ends is not None else sizes["num_tiles"]
    if sizes["num_splits"] == 1 or groups == 0:
        return
    overlaps = problem.can_overlap(out.device)
    launch = _launch_next if overlaps else _launch
    launch(
        groups * left.head_tiles * tiling.ceil_div(num_rows, block_r),
        strides=(strides, out.dtype, left.rows is None),
        args=(
            left.parts,
            left.parts_lse,
            left.cu_seqlens_q, *strides,
            left.rows,
            ends,
            out,
            left.lse,
            *sizes.values(), sizes["num_tiles"].bit_length(),
        ),
        constexprs={
            **constexprs, "BLOCK_T": _TILES if sizes["num_tiles"] <= _TILES else 0,
            "BLOCK_R": block_r, "BLOCK_S": rows_at_once // block_r, "BLOCK_DV": block_dv,
            "OVERLAPS": overlaps,
        },
        config=TileConfig(rows_at_once // block_r, block_dv, 4, 1),
    )  # fmt: skip


# fmt: off
@triton.jit
def _with_half(
    m_i, l_i, acc, place, token, h_kv, offs_g, mask_g,
    parts_ptr, parts_lse_ptr, cu_seqlens_ptr, stride_cu, ends_ptr, whole_ptr, whole_lse_ptr,
    T, B, num_tiles, num_splits,
    IS_RAGGED: tl.constexpr, IS_SHARED: tl.constexpr, IS_WHOLE: tl.constexpr,
    GROUP: tl.constexpr, TILE_GROUP: tl.constexpr, H_KV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    # fmt: on
    """Take in what one launch of attention left for a query that it counted as number `place`."""
    HEAD_TILES: tl.constexpr = H_KV * ((GROUP + TILE_GROUP - 1) // TILE_GROUP)
    count = 1
    if not IS_WHOLE:
        tile = place
        rank = place * 0
        if IS_RAGGED:
            b, begin = sequence_of(place, cu_seqlens_ptr, stride_cu, B, BLOCK_B)
            tile = begin // BLOCK_Q + b + (place - begin) // BLOCK_Q
            rank = (place - begin) % BLOCK_Q
        begin = 0
        end = 0
        total = 0
        if IS_SHARED:
            total = tl.load(ends_ptr + num_tiles - 1)
            begin = tl.load(ends_ptr + tile - 1, mask=tile > 0, other=0)
            end = tl.load(ends_ptr + tile)
        first, step, shift, count = _parts_of_tile(
            tile, begin, end, total, num_tiles, num_splits, IS_SHARED
        )
    if count == 1:
        offs_d = tl.arange(0, BLOCK_DV)
        heads = h_kv.to(tl.int64) * GROUP + offs_g
        lse = tl.load(whole_lse_ptr + heads * T + token, mask=mask_g, other=-float("inf"))
        rows = (token * (H_KV * GROUP) + heads) * HEAD_DIM_V
        mask = mask_g[:, None] & (offs_d < HEAD_DIM_V)[None, :]
        whole = tl.load(whole_ptr + rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
        m_i, l_i, acc = _take_in(m_i, l_i, acc, (lse * LOG2_E)[:, None], whole[:, None, :])
    elif not IS_WHOLE:
        head_tile = tl.min(offs_g, 0) // TILE_GROUP
        offs_m = rank * TILE_GROUP + offs_g - head_tile * TILE_GROUP
        m_i, l_i, acc = _merged(
            m_i, l_i, acc, parts_ptr, parts_lse_ptr, first, step, shift, count,
            head_tile * H_KV + h_kv, offs_m, mask_g,
            HEAD_TILES, HEAD_DIM_V, BLOCK_M, BLOCK_S, BLOCK_DV,
        )  # fmt: skip
    return m_i, l_i, acc


@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _merge_halves_kernel(
    a_parts_ptr, a_parts_lse_ptr, a_bounds_ptr, a_ends_ptr, a_whole_ptr, a_whole_lse_ptr,
    b_parts_ptr, b_parts_lse_ptr, cu_seqlens_ptr, stride_cu, b_ends_ptr,
    b_whole_ptr, b_whole_lse_ptr,
    rows_ptr,  # [T], query of each place among the groups
    out_ptr,  # [T, H, D_v], contiguous
    lse_ptr,  # [H, T], contiguous
    T, B, a_num_tiles, a_num_splits, b_num_tiles, b_num_splits,
    IS_RAGGED: tl.constexpr, A_IS_SHARED: tl.constexpr, B_IS_SHARED: tl.constexpr,
    A_IS_WHOLE: tl.constexpr, B_IS_WHOLE: tl.constexpr,
    GROUP: tl.constexpr, H_KV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    A_TILE_GROUP: tl.constexpr, B_TILE_GROUP: tl.constexpr,
    A_BLOCK_M: tl.constexpr, B_BLOCK_M: tl.constexpr,
    A_BLOCK_Q: tl.constexpr, B_BLOCK_Q: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Merge what the prefix (a) and the rest (b) left for BLOCK_G heads of a query."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    RUNS: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    pid = tl.program_id(0)
    h_kv = pid % H_KV
    run = pid // H_KV % RUNS
    place = pid // H_KV // RUNS
    token = tl.load(rows_ptr + place).to(tl.int64)
    offs_g = run * BLOCK_G + tl.arange(0, BLOCK_G)
    mask_g = offs_g < GROUP
    m_i = tl.full([BLOCK_G], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    m_i, l_i, acc = _with_half(
        m_i, l_i, acc, place, token, h_kv, offs_g, mask_g,
        a_parts_ptr, a_parts_lse_ptr, a_bounds_ptr, 1, a_ends_ptr, a_whole_ptr, a_whole_lse_ptr,
        T, B, a_num_tiles, a_num_splits, True, A_IS_SHARED, A_IS_WHOLE,
        GROUP, A_TILE_GROUP, H_KV, HEAD_DIM_V, A_BLOCK_M, A_BLOCK_Q, BLOCK_B, BLOCK_S, BLOCK_DV,
    )  # fmt: skip
    m_i, l_i, acc = _with_half(
        m_i, l_i, acc, token.to(tl.int32), token, h_kv, offs_g, mask_g,
        b_parts_ptr, b_parts_lse_ptr, cu_seqlens_ptr, stride_cu, b_ends_ptr,
        b_whole_ptr, b_whole_lse_ptr,
        T, B, b_num_tiles, b_num_splits, IS_RAGGED, B_IS_SHARED, B_IS_WHOLE,
        GROUP, B_TILE_GROUP, H_KV, HEAD_DIM_V, B_BLOCK_M, B_BLOCK_Q, BLOCK_B, BLOCK_S, BLOCK_DV,
    )  # fmt: skip
    heads = h_kv.to(tl.int64) * GROUP + offs_g
    _store_rows(
        m_i, l_i, acc, out_ptr, lse_ptr, heads, token, mask_g, T,
        H_KV * GROUP, HEAD_DIM_V, BLOCK_DV,
    )  # fmt: skip


_launch_halves = Launcher(_merge_halves_kernel)
_launch_halves_next = Launcher(_merge_halves_kernel, launch_pdl=True)


def merge_halves(
    prefix: list[Parts], rest: list[Parts], rows: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Merge attention to prefixes and to the rest into out (T, H, D_v) and lse (H, T).

    `rows` (T,) are the queries in the order in which `prefix` counts them. What one launch alone
    left is merged from its parts at once.
    """
    for half in (prefix, rest):
        if len(half) > 1:
            for left in half:
                merge_parts(left)
    (a, *_), (b, *_) = prefix, rest
    T, H, D_v = out.shape
    group, heads_kv = a.constexprs["GROUP"], a.constexprs["H_KV"]
    block_dv = tiling.padded_head_dim(D_v)
    block_g = min(_ROWS, triton.next_power_of_2(group))
    block_s = max(1, _TILE // block_dv // block_g)
    strides = problem.strides_of(b.cu_seqlens_q, 1)
    B = b.sizes["B"]
    overlaps = problem.can_overlap(out.device)
    launch = _launch_halves_next if overlaps else _launch_halves
    launch(
        T * heads_kv * tiling.ceil_div(group, block_g),
        strides=(strides, out.dtype, a.ends is None, b.ends is None),
        args=(
            a.parts, a.parts_lse, a.cu_seqlens_q, a.ends, a.out, a.lse,
            b.parts, b.parts_lse, b.cu_seqlens_q, *strides, b.ends, b.out, b.lse,
            rows, out, lse, T, B,
            *(left.sizes[name] for left in (a, b) for name in ("num_tiles", "num_splits")),
        ),
        constexprs={
            "IS_RAGGED": b.cu_seqlens_q is not None,
            "A_IS_SHARED": a.ends is not None, "B_IS_SHARED": b.ends is not None,
            "A_IS_WHOLE": len(prefix) > 1, "B_IS_WHOLE": len(rest) > 1,
            "GROUP": group, "H_KV": heads_kv, "HEAD_DIM_V": D_v,
            **{
                f"{half}_{name}": left.constexprs[name]
                for name in ("TILE_GROUP", "BLOCK_M", "BLOCK_Q")
                for half, left in (("A", a), ("B", b))
            },
            "BLOCK_B": max(_SEQUENCES, triton.next_power_of_2(B + 1)),
            "BLOCK_G": block_g, "BLOCK_S": block_s, "BLOCK_DV": block_dv, "OVERLAPS": overlaps,
        },
        config=TileConfig(block_g, block_dv, 4, 1),
    )  # fmt: skip
