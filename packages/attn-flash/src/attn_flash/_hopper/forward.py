"""Forward pass for sm_90a: one warp copies, two or three warpgroups compute 64 queries each.

Scores, softmax and output follow FlashAttention's recurrence over blocks of keys, from the last
block that a tile of queries sees to the first:

    S = Q K^T,   m' = max(m, rowmax S),   P = exp(scale (S - m')),
    l = exp(scale (m - m')) l + rowsum P,   O = exp(scale (m - m')) O + P V,

but m, which only has to keep P in range, stays as it is until scores pass it by 8 powers of two.

A warpgroup keeps S, P and O in registers. It starts S of a block together with P V of the block
before, and does its softmax while another warpgroup's products run. The first S of the next tile
starts with the last P V of this one, so nothing drains between tiles. docs/attn-flash-hopper.md
draws the protocol of the barriers.

Ragged sequences lie one after the other in a batch of one. The copy engine ends each where it ends:
rows past it arrive as zeros and are not written.

Shah et al., "FlashAttention-3", 2024.
"""

import functools
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_core.gluon_launch import GluonLauncher
from attn_core.tiles.hopper import (
    accumulator_layout,
    arrive_at,
    arrive_at_stage,
    exp2,
    meet_at,
    meet_at_stage,
    record,
    scale_rows,
)
from attn_flash._hopper import problem
from attn_flash._hopper.descriptors import Rows
from attn_flash._hopper.primitives import load_ragged_rows, load_rows, store_ragged_rows, store_rows
from attn_flash._hopper.schedules import Schedule
from attn_flash._hopper.softmax import ROWS, fold, no_pivots, raise_pivots, rescale_rows, store_lse

# Named barriers; those below 6 are the compiler's.
_K_EMPTY = gl.constexpr(6)  # and the next two
_V_EMPTY = gl.constexpr(9)  # and the next two
_TURN = gl.constexpr(12)  # one for each consumer


@record
class _Tensors:
    """What the copy engine reads and writes, as [B, H or H_KV, M or N, D]."""

    q: tma.tensor_descriptor  # in tiles of ROWS, as out
    k: tma.tensor_descriptor  # in tiles of BLOCK_N, as v
    v: tma.tensor_descriptor
    out: tma.tensor_descriptor
    out_ptr: gl.tensor  # [B, M, H, HEAD_DIM], contiguous


@record
class _Shared:
    """Shared memory of a program, and the barriers that say what is in it."""

    q: gl.shared_memory_descriptor  # [Q_STAGES * CONSUMERS, ROWS, BLOCK_D]
    k: gl.shared_memory_descriptor  # [K_STAGES, BLOCK_N, BLOCK_D]
    v: gl.shared_memory_descriptor  # [V_STAGES, BLOCK_N, BLOCK_D]
    out: gl.shared_memory_descriptor  # [CONSUMERS, ROWS, BLOCK_D], with STAGES_OUT
    rank: gl.shared_memory_descriptor  # [Q_STAGES * CONSUMERS, 1]: that of q's tile
    sequence: gl.shared_memory_descriptor  # and the number of its sequence
    q_full: gl.shared_memory_descriptor  # of each buffer of q, as q_empty
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor


@record
class _Problem:
    """Sizes and window of the call, and the order of its tiles."""

    starts_q_ptr: gl.tensor  # [B + 1] of ragged sequences, as starts_k_ptr
    starts_k_ptr: gl.tensor
    used_ptr: gl.tensor  # [B], with HAS_USED: how many keys of a sequence count
    B: gl.tensor  # ragged sequences
    M: gl.tensor  # queries of a batch entry; of all ragged sequences, as N
    N: gl.tensor
    H: gl.tensor
    group: gl.tensor  # query heads of a key head
    num_tiles: gl.tensor  # of a head of a batch entry
    num_heads: gl.tensor  # of all batch entries; of a ragged sequence
    heads_per_group: gl.tensor
    left: gl.tensor
    right: gl.tensor
    scale_log2: gl.tensor
    next_ptr: gl.tensor  # counts the tiles that programs have taken beyond their first
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    IS_RAGGED: gl.constexpr
    HAS_USED: gl.constexpr
    HAS_LEFT: gl.constexpr
    HAS_RIGHT: gl.constexpr
    EVEN_N: gl.constexpr
    NEGATE: gl.constexpr
    DYNAMIC: gl.constexpr
    TAKES_TURNS: gl.constexpr
    STAGES_OUT: gl.constexpr
    HEAD_DIM: gl.constexpr


@record
class _Sequence:
    """A ragged sequence. The entries of a batch are alike, and one for all of them."""

    number: gl.tensor
    start_q: gl.tensor  # where its queries begin
    start_k: gl.tensor
    M: gl.tensor
    N: gl.tensor
    num_tiles: gl.tensor  # of a head


@record
class _Tile:
    """Queries of one head, and the key blocks [first, last) that they see."""

    sequence: _Sequence
    row: gl.tensor  # the first query
    b: gl.tensor
    h: gl.tensor
    first: gl.tensor
    last: gl.tensor


@gluon.jit
def _sequence(problem, number):
    """Return sequence `number`; after the last come the tokens of none, which see no keys."""
    if problem.IS_RAGGED:
        following = gl.minimum(number + 1, problem.B)
        start_q = gl.load(problem.starts_q_ptr + number)
        start_k = gl.load(problem.starts_k_ptr + number)
        M = gl.load(problem.starts_q_ptr + following) - start_q
        N = gl.load(problem.starts_k_ptr + following) - start_k
        if problem.HAS_USED:
            N = gl.load(problem.used_ptr + number, mask=number < problem.B, other=0)
        M = gl.where(number < problem.B, M, problem.M - start_q)
        return _Sequence(number, start_q, start_k, M, N, gl.cdiv(M, problem.BLOCK_M))
    else:  # noqa: RET505 - decided while compiling
        zero = gl.to_tensor(0)
        return _Sequence(zero, zero, zero, problem.M, problem.N, problem.num_tiles)


@gluon.jit
def _find(problem, sequence, first, number):
    """Find the sequence of tile `number`, from one whose tiles begin with number `first`.

    Return it, its first tile's number, and that of the tile after its last one.
    """
    stop = first + sequence.num_tiles * problem.num_heads
    if problem.IS_RAGGED:
        while (number >= stop) & (sequence.number < problem.B):
            first = stop
            sequence = _sequence(problem, sequence.number + 1)
            stop = first + sequence.num_tiles * problem.num_heads
    return sequence, first, stop


@gluon.jit
def _tile(problem, sequence, rank):
    """Return the sequence's tile `rank`: with a closed window by groups of heads, longest first."""
    num_tiles = gl.maximum(sequence.num_tiles, 1)
    if problem.HAS_RIGHT:
        tiles_per_group = num_tiles * problem.heads_per_group
        group = rank // tiles_per_group
        first_head = group * problem.heads_per_group
        heads = gl.maximum(problem.num_heads - first_head, 1)  # past the last tile there are none
        width = gl.minimum(problem.heads_per_group, heads)
        place = rank - group * tiles_per_group
        head = first_head + place % width
        m = num_tiles - 1 - place // width
    else:
        head = rank // num_tiles
        m = rank - head * num_tiles
    first = gl.to_tensor(0)
    last = gl.cdiv(sequence.N, problem.BLOCK_N)
    if problem.IS_RAGGED:
        last = gl.maximum(last, 1)  # a block of hidden keys where there are none
        is_past = rank >= sequence.num_tiles * problem.num_heads
        m = gl.where(is_past, num_tiles, m)  # a program without a tile computes no rows
    row = m * problem.BLOCK_M
    if problem.HAS_RIGHT and not problem.IS_RAGGED:
        # Consumers without queries belong to the tile that sees the fewest keys.
        row -= (num_tiles * problem.BLOCK_M - sequence.M) // ROWS * ROWS
    start = row + sequence.N - sequence.M  # position of the first query
    if problem.HAS_RIGHT:
        end_key = gl.maximum(start + problem.BLOCK_M + problem.right, 1)
        last = gl.minimum(last, gl.cdiv(end_key, problem.BLOCK_N))
    if problem.HAS_LEFT:
        first_key = gl.maximum(start - problem.left, 0)
        first = gl.minimum(first_key // problem.BLOCK_N, last - 1)
    b = head // problem.H
    return _Tile(sequence, row, b, head - b * problem.H, first, last)


@gluon.jit
def _next_number(problem, number):
    """Return the number of the program's next tile; past the last one there is none."""
    if problem.DYNAMIC:
        number = gl.atomic_add(problem.next_ptr, 1, sem="relaxed")
    return number + gl.num_programs(0)


@gluon.jit
def _reset_counter(problem, number, stop):
    """Leave the counter as it was, in the last of all programs.

    Each of them takes numbers until there is no tile left, those without a first tile too.
    """
    if problem.DYNAMIC:
        programs = gl.num_programs(0)
        if number == gl.maximum(stop, programs) + programs - 1:
            gl.store(problem.next_ptr, 0)


@gluon.jit
def _write(buffer, number):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    buffer.store(gl.full([1], number, gl.int32, LAYOUT))


@gluon.jit
def _load_queries(tensors, shared, problem, tile, rank, visit):
    CONSUMERS: gl.constexpr = problem.BLOCK_M // ROWS
    STAGES: gl.constexpr = shared.q.shape[0] // CONSUMERS
    sequence = tile.sequence
    for w in gl.static_range(CONSUMERS):
        i = visit % STAGES * CONSUMERS + w
        full = shared.q_full.index(i)
        mbarrier.wait(shared.q_empty.index(i), (visit // STAGES + 1) & 1)
        if problem.DYNAMIC:
            _write(shared.rank.index(i), rank)
        if problem.IS_RAGGED:
            _write(shared.sequence.index(i), sequence.number)
        if rank >= 0:
            row = tile.row + w * ROWS
            mbarrier.expect(full, tensors.q.block_type.nbytes)
            if problem.IS_RAGGED:
                load_ragged_rows(
                    tensors.q, sequence.start_q, sequence.M, tile.h, row, full, shared.q.index(i)
                )
            else:
                load_rows(tensors.q, tile.b, tile.h, row, full, shared.q.index(i))
        else:
            mbarrier.arrive(full, count=1)


@gluon.jit
def _load_block(desc, buffers, fulls, EMPTY: gl.constexpr, problem, tile, block, count):
    """Copy a block of keys or values of the tile, the program's number `count`."""
    STAGES: gl.constexpr = buffers.shape[0]
    THREADS: gl.constexpr = problem.BLOCK_M * 2 + 32
    i = count % STAGES
    if count >= STAGES:
        meet_at_stage(EMPTY, i, THREADS)
    full = fulls.index(i)
    mbarrier.expect(full, desc.block_type.nbytes)
    h = tile.h // problem.group
    row = block * problem.BLOCK_N
    if problem.IS_RAGGED:
        sequence = tile.sequence
        load_ragged_rows(desc, sequence.start_k, sequence.N, h, row, full, buffers.index(i))
    else:
        load_rows(desc, tile.b, h, row, full, buffers.index(i))


@gluon.jit
def _absorb(buffers, EMPTY: gl.constexpr, problem, count):
    """Meet the consumers' last arrivals, which must not outlive the program."""
    STAGES: gl.constexpr = buffers.shape[0]
    THREADS: gl.constexpr = problem.BLOCK_M * 2 + 32
    for j in range(gl.maximum(count - STAGES, 0), count):
        meet_at_stage(EMPTY, j % STAGES, THREADS)


@gluon.jit
def _load(tensors, shared, problem):
    """Copy queries, keys and values in the order in which the consumers use them."""
    HAS_ONE_BUFFER: gl.constexpr = shared.q.shape[0] * ROWS == problem.BLOCK_M  # of queries
    number = gl.program_id(0)
    zero = gl.to_tensor(0)
    sequence, first, _ = _find(problem, _sequence(problem, zero), zero, number)
    rank = number - first
    tile = _tile(problem, sequence, rank)
    visit = 0
    count = 0  # blocks of values so far
    _load_queries(tensors, shared, problem, tile, rank, visit)
    _load_block(tensors.k, shared.k, shared.k_full, _K_EMPTY, problem, tile, tile.last - 1, count)
    while rank >= 0:
        for block in range(tile.last - 1, tile.first, -1):
            _load_block(
                tensors.k, shared.k, shared.k_full, _K_EMPTY, problem, tile, block - 1, count + 1
            )
            _load_block(tensors.v, shared.v, shared.v_full, _V_EMPTY, problem, tile, block, count)
            count += 1
        if HAS_ONE_BUFFER:  # which is only free when the last values are all that is missing
            _load_block(
                tensors.v, shared.v, shared.v_full, _V_EMPTY, problem, tile, tile.first, count
            )
        number = _next_number(problem, number)
        sequence, first, stop = _find(problem, tile.sequence, first, number)
        _reset_counter(problem, number, stop)
        rank = gl.where(number < stop, number - first, -1)
        following = _tile(problem, sequence, rank)
        visit += 1
        if problem.DYNAMIC or rank >= 0:
            _load_queries(tensors, shared, problem, following, rank, visit)
        if rank >= 0:
            _load_block(
                tensors.k, shared.k, shared.k_full, _K_EMPTY,
                problem, following, following.last - 1, count + 1,
            )  # fmt: skip
        if not HAS_ONE_BUFFER:
            _load_block(
                tensors.v, shared.v, shared.v_full, _V_EMPTY, problem, tile, tile.first, count
            )
        count += 1
        tile = following
    _absorb(shared.k, _K_EMPTY, problem, count)
    _absorb(shared.v, _V_EMPTY, problem, count)


@gluon.jit
def _mask(s, problem, sequence, row, key):
    """Hide what the window and the end of the keys hide of scores that start at (row, key)."""
    LAYOUT: gl.constexpr = s.type.layout
    rows = gl.expand_dims(gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, LAYOUT)), 1)
    keys = gl.expand_dims(gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, LAYOUT)), 0)
    # Bits 1 and 2 of a column come from the lane. On the other side of the comparison they leave an
    # immediate on this one; otherwise every column's number takes a register through the loop.
    fixed = keys & (s.shape[1] - 7)
    lane = keys & 6
    ahead = rows - lane + (row + sequence.N - sequence.M - key)
    if problem.HAS_RIGHT:
        s = gl.where(fixed <= ahead + problem.right, s, float("-inf"))
    if problem.HAS_LEFT:
        s = gl.where(fixed >= ahead - problem.left, s, float("-inf"))
    if not problem.EVEN_N:
        s = gl.where(fixed < sequence.N - key - lane, s, float("-inf"))
    return s


@gluon.jit
def _crosses_edge(problem, sequence, row, key):
    """Whether the window hides any of BLOCK_N keys from `key` for ROWS queries from `row`."""
    position = row + sequence.N - sequence.M
    crosses = key < 0
    if problem.HAS_RIGHT:
        crosses = key + problem.BLOCK_N - 1 > position + problem.right
    if problem.HAS_LEFT:
        crosses = crosses | (key < position + ROWS - 1 - problem.left)
    return crosses


@gluon.jit
def _softmax(s, pivot, problem):
    """Return P, the new pivots in powers of two, and the factors of sums that used the old ones."""
    pivot, alpha = raise_pivots(pivot, gl.max(s, axis=1) * problem.scale_log2)
    finite = pivot
    if problem.HAS_LEFT or problem.HAS_RIGHT or problem.IS_RAGGED:
        finite = gl.where(pivot == float("-inf"), 0.0, pivot)
    p = exp2(s * problem.scale_log2 - gl.expand_dims(finite, 1))
    return p, pivot, alpha


@gluon.jit
def _store_registers(tensors, problem, tile, row, out):
    """Write rows of out straight from registers."""
    LAYOUT: gl.constexpr = out.type.layout
    stride_m = problem.H * problem.HEAD_DIM
    token = gl.cast(tile.b, gl.int64) * problem.M + tile.sequence.start_q + row
    first = token * stride_m + tile.h * problem.HEAD_DIM
    rows = gl.arange(0, out.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    mask_m = (row + rows >= 0) & (row + rows < tile.sequence.M)
    mask = gl.expand_dims(mask_m, 1) & gl.expand_dims(offs_d < problem.HEAD_DIM, 0)
    offs = gl.expand_dims(rows * stride_m, 1) + gl.expand_dims(offs_d, 0)
    gl.store(tensors.out_ptr + first + offs, out, mask=mask)


@gluon.jit
def _store(tensors, shared, problem, tile, lse_ptr, acc, pivot, sums, W: gl.constexpr):
    """Normalise a tile's output, and write it and lse."""
    pivot = gl.max(pivot, axis=1)
    l_i = gl.sum(sums, axis=1)
    row = tile.row + W * ROWS
    sequence = tile.sequence
    head = gl.cast(tile.b * problem.H + tile.h, gl.int64) * problem.M + sequence.start_q
    store_lse(lse_ptr + head, pivot + gl.log2(l_i), l_i, row, sequence.M)
    out = scale_rows(acc, gl.where(l_i > 0.0, 1.0 / l_i, 0.0)).to(tensors.q.dtype)
    if problem.STAGES_OUT:
        tma.store_wait(0)  # the last tile has left the buffer
        shared.out.index(W).store(out)
        fence_async_shared()
        if problem.IS_RAGGED:
            store_ragged_rows(
                tensors.out, sequence.start_q, sequence.M, tile.h, row, shared.out.index(W)
            )
        elif row >= 0:  # the copy engine writes from the first row of a tensor on
            store_rows(tensors.out, tile.b, tile.h, row, shared.out.index(W))
    else:
        _store_registers(tensors, problem, tile, row, out)


@gluon.jit
def _start_scores(shared, problem, q, count, W: gl.constexpr):
    """Start S of the program's block `count`, in this consumer's turn."""
    STAGES: gl.constexpr = shared.k.shape[0]
    LAYOUT: gl.constexpr = accumulator_layout(problem.BLOCK_N)
    i = count % STAGES
    mbarrier.wait(shared.k_full.index(i), (count // STAGES) & 1)
    if problem.TAKES_TURNS:
        meet_at(_TURN + W, 256)
    zeros = gl.zeros([ROWS, problem.BLOCK_N], gl.float32, LAYOUT)
    return warpgroup_mma(q, shared.k.index(i).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _await_scores(problem, s, PENDING: gl.constexpr):
    s = warpgroup_mma_wait(PENDING, deps=(s,))
    if problem.NEGATE:  # a running maximum needs a scale that is not negative
        s = -s
    return s


@gluon.jit
def _pass_turn(problem, W: gl.constexpr):
    CONSUMERS: gl.constexpr = problem.BLOCK_M // ROWS
    if problem.TAKES_TURNS:
        arrive_at(_TURN + (W + 1) % CONSUMERS, 256)


@gluon.jit
def _operand(p, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """P as the operand of P V."""
    p = gl.reshape(p.to(DTYPE), [ROWS, p.shape[1] * 8])
    return gl.convert_layout(p, LAYOUT, assert_trivial=True)


@gluon.jit
def _start_output(shared, p, acc, count):
    """Start O + P V of the program's block `count`."""
    STAGES: gl.constexpr = shared.v.shape[0]
    i = count % STAGES
    mbarrier.wait(shared.v_full.index(i), (count // STAGES) & 1)
    return warpgroup_mma(p, shared.v.index(i), acc, is_async=True)


@gluon.jit
def _release(buffers, EMPTY: gl.constexpr, problem, count):
    arrive_at_stage(EMPTY, count % buffers.shape[0], problem.BLOCK_M * 2 + 32)


@gluon.jit
def _release_queries(shared, problem, visit, W: gl.constexpr):
    CONSUMERS: gl.constexpr = problem.BLOCK_M // ROWS
    STAGES: gl.constexpr = shared.q.shape[0] // CONSUMERS
    mbarrier.arrive(shared.q_empty.index(visit % STAGES * CONSUMERS + W), count=1)


@gluon.jit
def _read(buffer):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(buffer.load(LAYOUT), axis=0)


@gluon.jit
def _tile_at(shared, problem, number, i):
    """Return the rank and the tile of the queries in buffer i; without DYNAMIC, those of number."""
    if problem.DYNAMIC:
        rank = _read(shared.rank.index(i))
    else:
        rank = gl.where(number < problem.num_tiles * problem.num_heads, number, -1)
    sequence = gl.to_tensor(0)
    if problem.IS_RAGGED:
        sequence = _read(shared.sequence.index(i))
    return rank, _tile(problem, _sequence(problem, sequence), rank)


@gluon.jit
def _attend(tensors, shared, problem, lse_ptr, W: gl.constexpr):
    """Compute rows [64 W, 64 W + 64) of each of the program's tiles."""
    CONSUMERS: gl.constexpr = problem.BLOCK_M // ROWS
    Q_STAGES: gl.constexpr = shared.q.shape[0] // CONSUMERS
    BLOCK_N: gl.constexpr = problem.BLOCK_N
    BLOCK_D: gl.constexpr = shared.q.shape[2]
    DTYPE: gl.constexpr = tensors.q.dtype
    O_LAYOUT: gl.constexpr = accumulator_layout(BLOCK_D)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, k_width=2)
    IS_MASKED: gl.constexpr = problem.HAS_LEFT or problem.HAS_RIGHT or not problem.EVEN_N
    if problem.TAKES_TURNS and W == CONSUMERS - 1:
        arrive_at(_TURN, 256)

    number = gl.program_id(0)
    visit = 0
    count = 0  # blocks of keys so far
    q = shared.q.index(W)
    mbarrier.wait(shared.q_full.index(W), 0)
    rank, tile = _tile_at(shared, problem, number, W)
    s = _start_scores(shared, problem, q, count, W)
    _pass_turn(problem, W)
    s = _await_scores(problem, s, 0)
    _release(shared.k, _K_EMPTY, problem, count)
    row = tile.row + W * ROWS
    if IS_MASKED:
        s = _mask(s, problem, tile.sequence, row, (tile.last - 1) * BLOCK_N)
    none = no_pivots(fold(s))
    p, pivot, _ = _softmax(fold(s), none, problem)
    sums = gl.sum(p, axis=1)
    p_operand = _operand(p, DTYPE, P_LAYOUT)
    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, O_LAYOUT)
    while rank >= 0:
        for block in range(tile.last - 2, tile.first - 1, -1):
            s = _start_scores(shared, problem, q, count + 1, W)
            acc = _start_output(shared, p_operand, acc, count)
            _pass_turn(problem, W)
            s = _await_scores(problem, s, 1)
            _release(shared.k, _K_EMPTY, problem, count + 1)
            if Q_STAGES == 1:  # noqa: SIM102 - known to the compiler
                if block == tile.first:
                    _release_queries(shared, problem, visit, W)
            if problem.HAS_LEFT or problem.HAS_RIGHT:  # noqa: SIM102 - known to the compiler
                if _crosses_edge(problem, tile.sequence, row, block * BLOCK_N):
                    s = _mask(s, problem, tile.sequence, row, block * BLOCK_N)
            p, pivot, alpha = _softmax(fold(s), pivot, problem)
            sums = sums * alpha + gl.sum(p, axis=1)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            _release(shared.v, _V_EMPTY, problem, count)
            acc = rescale_rows(acc, alpha)
            p_operand = _operand(p, DTYPE, P_LAYOUT)
            count += 1
        # Between two tiles: the last output of this one under the first scores of the next.
        if Q_STAGES > 1 or tile.last - tile.first == 1:
            _release_queries(shared, problem, visit, W)
        visit += 1
        i = visit % Q_STAGES * CONSUMERS + W
        number += gl.num_programs(0)
        if problem.DYNAMIC:
            mbarrier.wait(shared.q_full.index(i), (visit // Q_STAGES) & 1)
        rank, following = _tile_at(shared, problem, number, i)
        if rank >= 0:
            if not problem.DYNAMIC:
                mbarrier.wait(shared.q_full.index(i), (visit // Q_STAGES) & 1)
            q = shared.q.index(i)
            s = _start_scores(shared, problem, q, count + 1, W)
            acc = _start_output(shared, p_operand, acc, count)
            _pass_turn(problem, W)
            s = _await_scores(problem, s, 1)
            _release(shared.k, _K_EMPTY, problem, count + 1)
            row = following.row + W * ROWS
            if IS_MASKED:
                s = _mask(s, problem, following.sequence, row, (following.last - 1) * BLOCK_N)
            p, next_pivot, _ = _softmax(fold(s), none, problem)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            _release(shared.v, _V_EMPTY, problem, count)
            _store(tensors, shared, problem, tile, lse_ptr, acc, pivot, sums, W)
            pivot = next_pivot
            sums = gl.sum(p, axis=1)
            acc = gl.zeros([ROWS, BLOCK_D], gl.float32, O_LAYOUT)
            p_operand = _operand(p, DTYPE, P_LAYOUT)
            count += 1
            tile = following
    acc = _start_output(shared, p_operand, acc, count)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _release(shared.v, _V_EMPTY, problem, count)
    _store(tensors, shared, problem, tile, lse_ptr, acc, pivot, sums, W)
    tma.store_wait(0)
    if problem.TAKES_TURNS and W == 0:  # the turn that the last consumer passed on
        meet_at(_TURN, 256)


@gluon.jit
def _attend_first(tensors, shared, problem, lse_ptr):
    _attend(tensors, shared, problem, lse_ptr, 0)


@gluon.jit
def _attend_second(tensors, shared, problem, lse_ptr):
    _attend(tensors, shared, problem, lse_ptr, 1)


@gluon.jit
def _attend_third(tensors, shared, problem, lse_ptr):
    _attend(tensors, shared, problem, lse_ptr, 2)


# fmt: off
@gluon.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _attention_forward_kernel(
    q_desc, k_desc, v_desc, out_desc,  # [B, H or H_KV, M or N, D]
    out_ptr,  # [B, M, H, HEAD_DIM], contiguous
    lse_ptr,  # [B, H, M], contiguous
    starts_q_ptr, starts_k_ptr, used_ptr, next_ptr,
    B, M, N, H, group, num_tiles, num_heads, heads_per_group,
    scale_log2, left, right,
    IS_RAGGED: gl.constexpr, HAS_USED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, EVEN_N: gl.constexpr, NEGATE: gl.constexpr,
    DYNAMIC: gl.constexpr, TAKES_TURNS: gl.constexpr, STAGES_OUT: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):
    # fmt: on
    CONSUMERS: gl.constexpr = BLOCK_M // ROWS
    DTYPE: gl.constexpr = q_desc.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shared = _Shared(
        gl.allocate_shared_memory(DTYPE, [Q_STAGES * CONSUMERS, ROWS, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [K_STAGES, BLOCK_N, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(DTYPE, [V_STAGES, BLOCK_N, BLOCK_D], SWIZZLED),
        gl.allocate_shared_memory(
            DTYPE, [CONSUMERS if STAGES_OUT else 1, ROWS, BLOCK_D if STAGES_OUT else 64], SWIZZLED
        ),
        gl.allocate_shared_memory(gl.int32, [Q_STAGES * CONSUMERS, 1], FLAT),
        gl.allocate_shared_memory(gl.int32, [Q_STAGES * CONSUMERS, 1], FLAT),
        gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER),
    )
    for i in gl.static_range(Q_STAGES * CONSUMERS):
        mbarrier.init(shared.q_full.index(i), count=1)
        mbarrier.init(shared.q_empty.index(i), count=1)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(shared.k_full.index(i), count=1)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(shared.v_full.index(i), count=1)
    tensors = _Tensors(q_desc, k_desc, v_desc, out_desc, out_ptr)
    problem = _Problem(
        starts_q_ptr, starts_k_ptr, used_ptr, B, M, N, H, group, num_tiles, num_heads,
        heads_per_group, left, right, scale_log2, next_ptr,
        BLOCK_M, BLOCK_N, IS_RAGGED, HAS_USED, HAS_LEFT, HAS_RIGHT, EVEN_N, NEGATE, DYNAMIC,
        TAKES_TURNS, STAGES_OUT, HEAD_DIM,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_attend_first, (tensors, shared, problem, lse_ptr)),
                (_attend_second, (tensors, shared, problem, lse_ptr)),
                (_load, (tensors, shared, problem)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_attend_first, (tensors, shared, problem, lse_ptr)),
                (_attend_second, (tensors, shared, problem, lse_ptr)),
                (_attend_third, (tensors, shared, problem, lse_ptr)),
                (_load, (tensors, shared, problem)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )


_launch = GluonLauncher(_attention_forward_kernel)
_MAX_REGISTERS = {2: 168, 3: 128}  # of a thread at the start; warp_specialize shares them out


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window: tuple[int, int],
    schedule: Schedule,
    sequences: problem.Sequences | None = None,
) -> None:
    """Compute out (B, M, H, D) and lse (B, H, M) of q (B, M, H, D) and k, v (B, N, H_KV, D).

    Ragged `sequences` need a dynamic schedule; B is then 1.
    """
    is_ragged = sequences is not None
    count, tensors = (0, (lse, lse, lse)) if sequences is None else sequences.arguments()
    longest_k = k.shape[1] if sequences is None else sequences.longest_k
    num_programs, sizes, constants = _plan(
        q.shape, k.shape, q.device, scale, window, schedule,
        count, longest_k, is_ragged, is_ragged and sequences.used_k is not None,
    )  # fmt: skip
    block_n, block_d = schedule.block_n, constants["BLOCK_D"]
    _launch(
        num_programs,
        args=(
            Rows(q, ROWS.value, block_d, is_ragged), Rows(k, block_n, block_d, is_ragged),
            Rows(v, block_n, block_d, is_ragged), Rows(out, ROWS.value, block_d, is_ragged),
            out, lse, *tensors, problem.tile_counter(q.device) if schedule.is_dynamic else lse,
            *sizes,
        ),
        constants=constants,
        maxnreg=_MAX_REGISTERS[schedule.consumers],
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _plan(
    shape_q: tuple[int, ...],
    shape_k: tuple[int, ...],
    device: torch.device,
    scale: float,
    window: tuple[int, int],
    schedule: Schedule,
    count: int,
    longest_k: int,
    is_ragged: bool,
    has_used: bool,
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """Return how many programs to start, and the kernel's numbers and constants."""
    B, M, H, D = shape_q
    _, N, H_KV, _ = shape_k
    left, right = window
    block_m, block_n = ROWS.value * schedule.consumers, schedule.block_n
    num_tiles = -(-M // block_m)
    # The last tile of each ragged sequence may be cut short, and that of the tokens of none.
    most_tiles = num_tiles * B + (count + 1 if is_ragged else 0)
    num_programs = min(most_tiles * H, problem.num_sms(device))
    sizes = (
        count, M, N, H, H // H_KV, num_tiles, B * H, problem.heads_per_group(longest_k, D),
        problem.scale_log2(scale), left, right,
    )  # fmt: skip
    constants = {
        "IS_RAGGED": is_ragged, "HAS_USED": has_used,
        "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
        "EVEN_N": not is_ragged and N % block_n == 0, "NEGATE": scale < 0,
        "DYNAMIC": schedule.is_dynamic, "TAKES_TURNS": schedule.takes_turns,
        "STAGES_OUT": schedule.stages_out, "HEAD_DIM": D,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": problem.padded_head_dim(D),
        "Q_STAGES": schedule.q_stages, "K_STAGES": schedule.k_stages,
        "V_STAGES": schedule.v_stages,
    }  # fmt: skip
    return num_programs, sizes, constants
