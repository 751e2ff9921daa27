"""The loader of the backward kernel: a warp that copies what consumers read, and dK and dV back."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from attn_core.tiles.gluon_names import reinterpret, tma_load
from attn_core.tiles.hopper import arrive_at, meet_at
from attn_flash._hopper.backward_consumer import (
    CONSUMERS_AND_LOADER,
    KEYS_DONE,
    KEYS_WRITTEN,
    staged_keys,
)
from attn_flash._hopper.backward_tiles import (
    BLOCK_N,
    KEYS,
    first_step,
    next_step,
    tile_at,
)
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
def _await_stage(shared, step):
    """Wait until consumers have read what the stage of a step held before; return the stage."""
    STAGES: gl.constexpr = shared.q.shape[0]
    i = step % STAGES
    if step >= STAGES:
        mbarrier.wait(shared.empty.index(i), (step // STAGES + 1) & 1)
    return i


@gluon.jit
def _load_step(tensors, shared, problem, tile, h, m, i, keys, IS_FIRST):
    """Fill stage i with queries, and after those of the tile's first step copy values."""
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
def _write(buffer, number):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    buffer.store(gl.full([1], number, gl.int32, LAYOUT))


@gluon.jit
def _say_where(shared, i, begins, count, ahead):
    """Say to consumers where the queries of stage i are.

    They begin a tile (1) or not (0), or there are none (-1). `count` keys are left in the sequence
    from the tile on, whose first one is at the position of the query `ahead` rows after the first.
    """
    _write(shared.begins.index(i), begins)
    _write(shared.count.index(i), count)
    _write(shared.ahead.index(i), ahead)


@gluon.jit
def _announce(shared, rank, number):
    """Tell the adder which tile is the program's tile `rank`, whose keys come next."""
    if rank >= 2:
        mbarrier.wait(shared.keys_empty.index(rank & 1), (rank // 2 + 1) & 1)
    _write(shared.number.index(rank & 1), number)


@gluon.jit
def _absorb(shared, step):
    """Meet the consumers' last arrivals, which must not outlive the program, after `step` steps."""
    STAGES: gl.constexpr = shared.q.shape[0]
    for last in range(gl.maximum(step, STAGES), step + STAGES):
        mbarrier.wait(shared.empty.index(last % STAGES), (last // STAGES + 1) & 1)


@gluon.jit
def _clear_keys(tensors, shared, problem, tile, i):
    """Write zeros to dK and dV of a tile that no query sees, from stage i, which is free."""
    BLOCK_D: gl.constexpr = shared.q.shape[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    PIECES: gl.constexpr = shared.q.shape[1] // KEYS  # of a stage
    pieces = reinterpret(
        shared.q, shared.q.dtype, [shared.q.shape[0] * PIECES, KEYS, BLOCK_D], shared.q.layout
    )
    zeros = pieces.index(i * PIECES)
    zeros.store(gl.zeros([KEYS, BLOCK_D], shared.q.dtype, LAYOUT))
    fence_async_shared()
    for w in gl.static_range(2):
        row = tile.n * BLOCK_N + w * KEYS
        _store_rows(problem, tile, tensors.dv, row, zeros)
        _store_rows(problem, tile, tensors.dk, row, zeros)
    tma.store_wait(0)


@gluon.jit
def _load_tile(tensors, shared, problem, tile, number, rank, begun, before):
    """Load the program's tile `rank`, after `begun` steps; return how many those are then.

    dK and dV of the tile before, number `before`, are written when the first queries of this one
    are on their way.
    """
    STAGES: gl.constexpr = shared.q.shape[0]
    BLOCK_M: gl.constexpr = shared.q.shape[1]
    steps = (tile.last - tile.first) * problem.group
    count = tile.sequence.N - tile.n * BLOCK_N
    row = tile.sequence.M - count  # of the query at the first key's position
    first = begun
    m, h = first_step(problem, tile)
    keys = rank & 1
    _announce(shared, rank, number)
    _load_keys(problem, tile, tensors.k, shared.k_full.index(keys), shared.k, keys)
    for step in range(gl.maximum(steps, STAGES) + 1):
        if (step == STAGES) & (rank > 0):
            _write_keys(tensors, shared, problem, tile_at(problem, before, BLOCK_M), first)
            arrive_at(KEYS_WRITTEN, CONSUMERS_AND_LOADER)
        if step < steps:
            i = _await_stage(shared, begun)
            _say_where(shared, i, gl.where(step == 0, 1, 0), count, row - m * BLOCK_M)
            _load_step(tensors, shared, problem, tile, h, m, i, keys, step == 0)
            begun += 1
        m, h = next_step(problem, tile, m, h)
    return begun


@gluon.jit
def _load_tiles(tensors, shared, problem, number, ticket_ptr):
    """Load tile after tile, from tile `number` on."""
    BLOCK_M: gl.constexpr = shared.q.shape[1]
    rank = 0
    begun = 0  # steps
    before = gl.to_tensor(0)  # not `number`: what is the same value at first is not carried on
    while number < problem.blocks_n * problem.num_heads:
        tile = tile_at(problem, number, BLOCK_M)
        if tile.first == tile.last:
            _clear_keys(tensors, shared, problem, tile, _await_stage(shared, begun))
        else:
            begun = _load_tile(tensors, shared, problem, tile, number, rank, begun, before)
            before = number
            rank += 1
        number = gl.atomic_add(ticket_ptr, 1)
    i = _await_stage(shared, begun)
    _say_where(shared, i, -1, 0, 0)
    mbarrier.arrive(shared.q_full.index(i), count=1)
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
    m, h = first_step(problem, tile)
    for step in range(steps):
        _load_step(tensors, shared, problem, tile, h, m, _await_stage(shared, step), 0, step == 0)
        m, h = next_step(problem, tile, m, h)
    _absorb(shared, steps)
    _write_keys(tensors, shared, problem, tile, steps)


@gluon.jit
def load(tensors, shared, problem, number, ticket_ptr):
    """Fill shared memory with what each step needs, from tile `number` on; write dK and dV."""
    if problem.IS_PERSISTENT:
        _load_tiles(tensors, shared, problem, number, ticket_ptr)
    else:
        _load_tile_alone(tensors, shared, problem, number)
