"""Which queries a tile holds, and which keys they see: what all kernels of attention agree on."""

import triton
import triton.language as tl

from attn_core.tiles.masks import key_blocks
from attn_core.tiles.offsets import load_tile

LANES = tl.constexpr(32)  # of a warp


@triton.jit
def sequence_of(row, cu_seqlens_ptr, stride_cu, B, BLOCK_B: tl.constexpr):
    """Return the sequence of a row of q and its first row; of rows past the last one, B."""
    offs_b = tl.arange(0, BLOCK_B)
    begins = tl.load(cu_seqlens_ptr + offs_b * stride_cu, mask=offs_b <= B, other=2**31 - 1)
    is_before = begins <= row
    b = tl.sum(is_before.to(tl.int32), 0) - 1
    return b, tl.max(tl.where(is_before, begins, 0), 0)


# fmt: off
@triton.jit
def queries_of_tile(
    tile, cu_seqlens_ptr, stride_cu, T, B, least_m, most_m, steps,
    IS_RAGGED: tl.constexpr, ONE_TILE_EACH: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    # fmt: on
    """Return the sequence of a tile, the row of its first query, its rank in the sequence, and M.

    `tile` is a number or a block of them. The tiles of sequence b begin at
    ``cu_seqlens[b] // BLOCK_Q + b``: room for all of them, found without a sum over the sequences
    before. A number is compared with all of these at once where B < BLOCK_B; otherwise they are
    searched in `steps` halvings. Rows past the last sequence make up sequence B. Sequences with
    fewer than `least_m` or more than `most_m` queries are another launch's and count as having
    none.
    """
    if IS_RAGGED:
        b = tile
        start_m = tile * 0
        if not ONE_TILE_EACH and BLOCK_B > 0:
            offs_b = tl.arange(0, BLOCK_B)
            begins = tl.load(cu_seqlens_ptr + offs_b * stride_cu, mask=offs_b <= B, other=0)
            is_before = (offs_b <= B) & (begins // BLOCK_Q + offs_b <= tile)
            b = tl.sum(is_before.to(tl.int32), 0) - 1
        elif not ONE_TILE_EACH:
            b = tile * 0
            high = b + B
            for _ in range(steps):
                middle = (b + high + 1) // 2
                first_tile = tl.load(cu_seqlens_ptr + middle * stride_cu) // BLOCK_Q + middle
                b = tl.where(first_tile <= tile, middle, b)
                high = tl.where(first_tile <= tile, high, middle - 1)
        begin = tl.load(cu_seqlens_ptr + b * stride_cu, mask=b <= B, other=T)
        end = tl.load(cu_seqlens_ptr + (b + 1) * stride_cu, mask=b < B, other=T)
        if not ONE_TILE_EACH:
            start_m = (tile - begin // BLOCK_Q - b) * BLOCK_Q
        M = end - begin
        M = tl.where((least_m <= M) & (most_m >= M), M, 0)
        return b, begin + start_m, start_m, M
    else:  # noqa: RET505 - Triton compiles what follows a return
        return tile, tile, tile * 0, tile * 0 + 1


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


# fmt: off
@triton.jit
def load_queries(
    q_ptrs, stride_qd, mask_m, NEGATE_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TAIL_D: tl.constexpr,
):
    # fmt: on
    """Load rows that begin at q_ptrs [BLOCK_M]: a tile of BLOCK_D columns and one of the others."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = q_ptrs[:, None] + offs_d[None, :] * stride_qd
    q = load_tile(ptrs, mask_m, offs_d < HEAD_DIM, True, HEAD_DIM < BLOCK_D)
    q_tail = q
    if TAIL_D > 0:
        offs_tail = BLOCK_D + tl.arange(0, TAIL_D)
        ptrs = q_ptrs[:, None] + offs_tail[None, :] * stride_qd
        q_tail = load_tile(ptrs, mask_m, offs_tail < HEAD_DIM, True, True)
    if NEGATE_Q:  # a running maximum needs a scale that is not negative
        q = -q
        q_tail = -q_tail
    return q, q_tail


# fmt: off
@triton.jit
def keys_of_tile(
    b, start_m, M, B, lens_ptr, stride_lens, causal_ptr, stride_causal, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """Return N, the right side of the window, and the runs of `key_blocks`."""
    mask = (b < B) & (start_m < M)
    N = tl.load(lens_ptr + b * stride_lens, mask=mask, other=0)
    if causal_ptr is not None:
        is_causal = tl.load(causal_ptr + b * stride_causal, mask=mask, other=0)
        right = tl.where(is_causal != 0, 0, right)
    lo, full_lo, full_hi, hi = key_blocks(
        start_m, M, N, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_Q, BLOCK_N
    )
    return N, right, lo, full_lo, full_hi, tl.maximum(hi, lo)


@triton.jit
def tile_of_unit(unit, ends_ptr, num_tiles):
    """Return the tile that a unit of work belongs to and the first unit of the tile.

    It is the first tile whose end is past the unit. A warp looks at as many ends as it has threads
    in each step: more would have to meet in shared memory, which takes registers.
    """
    low = 0
    stride = 1
    while stride * LANES < num_tiles:
        stride *= LANES
    while stride > 0:
        tiles = low + (tl.arange(0, LANES) + 1) * stride - 1
        ends = tl.load(ends_ptr + tiles, mask=tiles < num_tiles, other=2**31 - 1)
        low += tl.sum((ends <= unit).to(tl.int32), 0) * stride
        stride = stride // LANES
    return low, tl.load(ends_ptr + low - 1, mask=low > 0, other=0)


@triton.jit
def size_of_parts(key_tiles, num_splits, LEAST: tl.constexpr):
    """Tiles of keys of each of up to `num_splits` equal parts, at least LEAST."""
    return tl.maximum(tl.cdiv(key_tiles, num_splits), LEAST)
