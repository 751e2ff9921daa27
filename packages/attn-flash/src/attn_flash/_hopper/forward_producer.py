"""The producer of the forward kernel: a warp that copies what consumers read.

It waits for a buffer to be empty, starts the copy, and the copy engine itself reports its bytes to
the buffer's `full` barrier.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from attn_core.tiles.hopper import meet_at_stage
from attn_flash._hopper.forward_tiles import (
    TILE_WORDS,
    find,
    next_number,
    reset_counter,
    sequence_at,
    tile_at,
)
from attn_flash._hopper.primitives import load_ragged_rows, load_rows
from attn_flash._hopper.softmax import ROWS


@gluon.jit
def _write(buffer, number):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    buffer.store(gl.full([1], number, gl.int32, LAYOUT))


@gluon.jit
def _write_tile(shared, problem, tile, rank, i):
    """Say beside the queries in buffer i what their tile is, or that there is none."""
    first = i * TILE_WORDS
    _write(shared.tile.index(first), tile.row)
    _write(shared.tile.index(first + 1), tile.b)
    _write(shared.tile.index(first + 2), tile.h)
    _write(shared.tile.index(first + 3), gl.where(rank >= 0, tile.first, 0))
    _write(shared.tile.index(first + 4), gl.where(rank >= 0, tile.last, 0))
    if problem.IS_RAGGED:
        _write(shared.tile.index(first + 5), tile.sequence.number)


@gluon.jit
def _load_queries(tensors, shared, problem, tile, rank, visit):
    CONSUMERS: gl.constexpr = problem.BLOCK_M // ROWS
    STAGES: gl.constexpr = shared.q.shape[0] // CONSUMERS
    sequence = tile.sequence
    for w in gl.static_range(CONSUMERS):
        i = visit % STAGES * CONSUMERS + w
        full = shared.q_full.index(i)
        mbarrier.wait(shared.q_empty.index(i), (visit // STAGES + 1) & 1)
        _write_tile(shared, problem, tile, rank, i)
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
def _load_block(desc, ring, problem, tile, block, count):
    """Copy a block of the tile's keys or values, the program's number `count`."""
    STAGES: gl.constexpr = ring.buffers.shape[0]
    i = count % STAGES
    if count >= STAGES:
        meet_at_stage(ring.EMPTY, i, ring.THREADS)
    full = ring.full.index(i)
    mbarrier.expect(full, desc.block_type.nbytes)
    h = tile.h // problem.group
    row = block * problem.BLOCK_N
    if problem.IS_RAGGED:
        sequence = tile.sequence
        load_ragged_rows(desc, sequence.start_k, sequence.N, h, row, full, ring.buffers.index(i))
    else:
        load_rows(desc, tile.b, h, row, full, ring.buffers.index(i))


@gluon.jit
def _absorb(ring, count):
    """Meet the consumers' last arrivals, which must not outlive the program."""
    STAGES: gl.constexpr = ring.buffers.shape[0]
    for j in range(gl.maximum(count - STAGES, 0), count):
        meet_at_stage(ring.EMPTY, j % STAGES, ring.THREADS)


@gluon.jit
def load(tensors, shared, problem):
    """Copy queries, keys and values in the order in which the consumers use them."""
    HAS_ONE_BUFFER: gl.constexpr = shared.q.shape[0] * ROWS == problem.BLOCK_M  # of queries
    number = gl.program_id(0)
    zero = gl.to_tensor(0)
    sequence, first, _ = find(problem, sequence_at(problem, zero), zero, number)
    rank = number - first
    tile = tile_at(problem, sequence, rank)
    visit = 0
    count = 0  # blocks of values so far
    _load_queries(tensors, shared, problem, tile, rank, visit)
    _load_block(tensors.k, shared.k, problem, tile, tile.last - 1, count)
    while rank >= 0:
        number = next_number(problem, number)  # early, as the answer takes its time
        for block in range(tile.last - 1, tile.first, -1):
            _load_block(tensors.k, shared.k, problem, tile, block - 1, count + 1)
            _load_block(tensors.v, shared.v, problem, tile, block, count)
            count += 1
        if HAS_ONE_BUFFER:  # which is only free when the last values are all that is missing
            _load_block(tensors.v, shared.v, problem, tile, tile.first, count)
        sequence, first, stop = find(problem, tile.sequence, first, number)
        reset_counter(problem, number, stop)
        rank = gl.where(number < stop, number - first, -1)
        following = tile_at(problem, sequence, rank)
        visit += 1
        _load_queries(tensors, shared, problem, following, rank, visit)
        if rank >= 0:
            _load_block(tensors.k, shared.k, problem, following, following.last - 1, count + 1)
        if not HAS_ONE_BUFFER:
            _load_block(tensors.v, shared.v, problem, tile, tile.first, count)
        count += 1
        tile = following
    _absorb(shared.k, count)
    _absorb(shared.v, count)
