"""The loader of the backward kernel: a warp that copies what consumers read, and dK and dV back."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from attn_core.tiles.gluon_names import tma_load
from attn_core.tiles.hopper import arrive_at, meet_at
from attn_flash._hopper.backward_consumer import (
    CONSUMERS_AND_LOADER,
    KEYS_DONE,
    KEYS_WRITTEN,
    staged_keys,
)
from attn_flash._hopper.backward_tiles import BLOCK_N, KEYS, tile_at
from attn_flash._hopper.primitives import (
    load_ragged_rows,
    load_rows,
    store_ragged_rows,
    store_rows,
)


@gluon.jit
def _load_rows(problem, tile, desc, start, length, h, row, barrier, buffer):
    """Start to copy rows of the tile's sequence, which begins at `start` where it is ragged."""
    if problem.IS_RAGGED:
        load_ragged_rows(desc, start, length, h, row, barrier, buffer)
    else:
        load_rows(desc, tile.b, h, row, barrier, buffer)


@gluon.jit
def _load_keys(problem, tile, desc, barrier, buffers, keys):
    sequence = tile.sequence
    mbarrier.expect(barrier, 2 * desc.block_type.nbytes)
    for w in gl.static_range(2):
        row = tile.n * BLOCK_N + w * KEYS
        _load_rows(
            problem, tile, desc, sequence.start_k, sequence.N, tile.h_kv, row,
            barrier, buffers.index(keys * 2 + w),
        )  # fmt: skip


@gluon.jit
def _load_queries(problem, tile, desc, row_desc, barrier, buffer, row_buffer, h, m):
    BLOCK_M: gl.constexpr = desc.block_shape[len(desc.block_shape) - 2]
    sequence = tile.sequence
    mbarrier.expect(barrier, desc.block_type.nbytes + row_desc.block_type.nbytes)
    _load_rows(problem, tile, desc, sequence.start_q, sequence.M, h, m * BLOCK_M, barrier, buffer)
    coord = [tile.b * problem.H + h, (sequence.block_q + m) * BLOCK_M]
    tma_load(row_desc, coord, barrier, row_buffer)


@gluon.jit
def _store_rows(problem, tile, desc, row, buffer):
    sequence = tile.sequence
    if problem.IS_RAGGED:
        store_ragged_rows(desc, sequence.start_k, sequence.N, tile.h_kv, row, buffer)
    else:
        store_rows(desc, tile.b, tile.h_kv, row, buffer)


@gluon.jit
def _write_keys(tensors, shared, problem, tile, step):
    """Write dK and dV of a tile when consumers have left them; the next step is number `step`."""
    if tile.part == problem.PARTS - 1:
        meet_at(KEYS_DONE, CONSUMERS_AND_LOADER)
        for w in gl.static_range(2):
            dk, dv = staged_keys(shared, problem, step, w)
            row = tile.n * BLOCK_N + w * KEYS
            _store_rows(problem, tile, tensors.dv, row, dv)
            _store_rows(problem, tile, tensors.dk, row, dk)
        tma.store_wait(0)


@gluon.jit
def _load_step(tensors, shared, problem, tile, h, m, step, keys, IS_FIRST):
    """Fill the stage of a step with queries, and after those of the tile's first one copy values.

    The program has begun `step` steps before.
    """
    STAGES: gl.constexpr = shared.q.shape[0]
    i = step % STAGES
    if step >= STAGES:
        mbarrier.wait(shared.empty.index(i), (step // STAGES + 1) & 1)
    _load_queries(
        problem, tile, tensors.q, tensors.lse, shared.q_full.index(i),
        shared.q.index(i), shared.lse.index(i), h, m,
    )  # fmt: skip
    if IS_FIRST:
        _load_keys(problem, tile, tensors.v, shared.v_full.index(keys), shared.v, keys)
    _load_queries(
        problem, tile, tensors.do, tensors.delta, shared.do_full.index(i),
        shared.do.index(i), shared.delta.index(i), h, m,
    )  # fmt: skip


@gluon.jit
def _announce(shared, rank, number):
    """Tell the others which tile is the program's tile `rank`, whose keys come next."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    if rank >= 2:
        mbarrier.wait(shared.keys_empty.index(rank & 1), (rank // 2 + 1) & 1)
    shared.number.index(rank & 1).store(gl.full([1], number, gl.int32, LAYOUT))


@gluon.jit
def _absorb(shared, step):
    """Meet the consumers' last arrivals, which must not outlive the program, after `step` steps."""
    STAGES: gl.constexpr = shared.q.shape[0]
    for last in range(gl.maximum(step, STAGES), step + STAGES):
        mbarrier.wait(shared.empty.index(last % STAGES), (last // STAGES + 1) & 1)


@gluon.jit
def _load_tiles(tensors, shared, problem, number, ticket_ptr):
    """Load tile after tile, from tile `number` on.

    dK and dV of a tile are written when the first queries of the next one are on their way.
    """
    STAGES: gl.constexpr = shared.q.shape[0]
    BLOCK_M: gl.constexpr = shared.q.shape[1]
    rank = 0
    begun = 0  # steps
    before = gl.to_tensor(0)  # not `number`: what is the same value at first is not carried on
    while number < problem.blocks_n * problem.num_heads:
        tile = tile_at(problem, number, BLOCK_M)
        steps = (tile.last - tile.first) * problem.group
        m = tile.first
        h = tile.h
        keys = rank & 1
        _announce(shared, rank, number)
        _load_keys(problem, tile, tensors.k, shared.k_full.index(keys), shared.k, keys)
        if steps == 0:
            mbarrier.arrive(shared.v_full.index(keys), count=1)
        for step in range(gl.maximum(steps, STAGES) + 1):
            if step == STAGES:
                if rank > 0:
                    last_tile = tile_at(problem, before, BLOCK_M)
                    first = begun - gl.minimum(steps, STAGES)
                    _write_keys(tensors, shared, problem, last_tile, first)
                arrive_at(KEYS_WRITTEN, CONSUMERS_AND_LOADER)
            if step < steps:
                _load_step(tensors, shared, problem, tile, h, m, begun, keys, step == 0)
                begun += 1
            m += 1
            if m == tile.last:
                m = tile.first
                h += 1
        before = number
        number = gl.atomic_add(ticket_ptr, 1)
        rank += 1
    _announce(shared, rank, number)
    mbarrier.arrive(shared.k_full.index(rank & 1), count=1)
    _absorb(shared, begun)
    if rank > 0:
        mbarrier.wait(shared.keys_empty.index((rank - 1) & 1), ((rank - 1) // 2) & 1)
        _write_keys(tensors, shared, problem, tile_at(problem, before, BLOCK_M), begun)


@gluon.jit
def _load_tile_alone(tensors, shared, problem, number):
    """Load the program's only tile."""
    tile = tile_at(problem, number, shared.q.shape[1])
    steps = (tile.last - tile.first) * problem.group
    _load_keys(problem, tile, tensors.k, shared.k_full.index(0), shared.k, 0)
    m = tile.first
    h = tile.h
    for step in range(steps):
        _load_step(tensors, shared, problem, tile, h, m, step, 0, step == 0)
        m += 1
        if m == tile.last:
            m = tile.first
            h += 1
    _absorb(shared, steps)
    _write_keys(tensors, shared, problem, tile, steps)


@gluon.jit
def load(tensors, shared, problem, number, ticket_ptr):
    """Fill shared memory with what each step needs, from tile `number` on; write dK and dV."""
    if problem.IS_PERSISTENT:
        _load_tiles(tensors, shared, problem, number, ticket_ptr)
    else:
        _load_tile_alone(tensors, shared, problem, number)
