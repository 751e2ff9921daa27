"""The adder of the backward kernel: a warp that sends dQ to its sum in memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from attn_core.tiles.gluon_names import thread_barrier, tma_store
from attn_core.tiles.hopper import arrive_at, meet_at
from attn_flash._hopper.backward_consumer import (
    CONSUMER_AND_ADDER,
    DQ_EMPTY,
    DQ_FULL,
)
from attn_flash._hopper.backward_tiles import BLOCK_N, first_step, next_step, tile_at
from attn_flash._hopper.primitives import (
    PUBLISHED,
    claim,
    publish,
    reduce_add,
    wait_for_bulk_writes,
)


@gluon.jit
def _turn(problem, tile, m, BLOCK_M: gl.constexpr):
    """How many programs add to dQ of query block m before this one.

    Those with later keys do, or with earlier ones where programs go in lockstep.
    """
    sequence = tile.sequence
    shift = sequence.N - sequence.M
    if problem.IS_LOCKSTEP:
        first_n = gl.to_tensor(0)
        if problem.HAS_LEFT:
            first_n = gl.maximum(m * BLOCK_M + shift - problem.left, 0) // BLOCK_N
        return tile.n - first_n
    else:  # noqa: RET505 - decided while compiling
        last_n = gl.cdiv(sequence.N, BLOCK_N) - 1
        if problem.HAS_RIGHT:
            end_key = (m + 1) * BLOCK_M + shift + problem.right
            last_n = gl.minimum(last_n, (end_key - 1) // BLOCK_N)
        return last_n - tile.n


@gluon.jit
def _wait_to_add(problem, tile, m, state, state_ptr, BLOCK_M: gl.constexpr):
    """Wait until this program may add to dQ of query block m. Return whether nobody has.

    `state` is what was at `state_ptr` some time ago.
    """
    if problem.DETERMINISTIC:
        turn = _turn(problem, tile, m, BLOCK_M)
        while state != turn:
            state = gl.load(state_ptr, volatile=True)
        return turn == 0
    else:  # noqa: RET505 - decided while compiling
        if state != PUBLISHED:
            state = claim(state_ptr)
        return state == 0


@gluon.jit
def _let_others_add(problem, is_first, state_ptr):
    """Let those go on who wait for what this program has added."""
    if problem.DETERMINISTIC:
        wait_for_bulk_writes()
        thread_barrier()
        gl.atomic_add(state_ptr, 1, sem="release")
    elif is_first:
        publish(state_ptr)


@gluon.jit
def _block(problem, tile, m, h):
    """Return the number of query block m of head h among all blocks of queries."""
    return (tile.b * problem.H + h) * problem.blocks_m + tile.sequence.block_q + m


@gluon.jit
def _add_tile(tensors, shared, problem, tile, states_ptr):
    """Add dQ of each step of a tile to its sum in memory, whose first summand is stored."""
    BLOCK_M: gl.constexpr = shared.q.shape[1]
    UNITS: gl.constexpr = 2  # of 64 x 64: BLOCK_M * BLOCK_D is 8192
    m, h = first_step(problem, tile)
    steps = (tile.last - tile.first) * problem.group
    block = _block(problem, tile, m, h)
    state = 0
    is_first = False
    if steps > 0:
        arrive_at(DQ_EMPTY + 1, CONSUMER_AND_ADDER)
        if not problem.IS_CLEARED:
            state = gl.load(states_ptr + block, volatile=True)
    for step in range(steps):
        if not problem.IS_CLEARED:
            is_first = _wait_to_add(problem, tile, m, state, states_ptr + block, BLOCK_M)
        this_block = block
        m, h = next_step(problem, tile, m, h)
        block = _block(problem, tile, m, h)
        is_last = step + 1 == steps
        if not problem.IS_CLEARED:
            # Looked up a step ahead, as its way from memory is long.
            state = gl.load(states_ptr + block, mask=not is_last, other=0, volatile=True)
        for w in gl.static_range(1, -1, -1):  # the first consumer's half comes later
            meet_at(DQ_FULL + w, CONSUMER_AND_ADDER)
            coord = [(this_block * UNITS + w) * 16, 0]
            if is_first:
                tma_store(tensors.dq_sum, coord, shared.dq.index(w))
            else:
                reduce_add(tensors.dq_sum, coord, shared.dq.index(w))
            tma.store_wait(1)  # the copy before this one has read the other half
            if (w == 1) | (not is_last):
                arrive_at(DQ_EMPTY + 1 - w, CONSUMER_AND_ADDER)
        if not problem.IS_CLEARED:
            _let_others_add(problem, is_first, states_ptr + this_block)


@gluon.jit
def _await_number(shared, rank):
    """Wait for the keys of the program's tile `rank`; return its number among all tiles."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(shared.k_full.index(rank & 1), (rank // 2) & 1)
    return gl.max(shared.number.index(rank & 1).load(LAYOUT), axis=0)


@gluon.jit
def add_dq(tensors, shared, problem, number, states_ptr):
    """Add dQ to its sum in memory, tile after tile, the first of which is tile `number`."""
    BLOCK_M: gl.constexpr = shared.q.shape[1]
    if problem.IS_PERSISTENT:
        rank = 0
        number = _await_number(shared, rank)
        while number < problem.blocks_n * problem.num_heads:
            mbarrier.arrive(shared.keys_empty.index(rank & 1), count=1)
            _add_tile(tensors, shared, problem, tile_at(problem, number, BLOCK_M), states_ptr)
            rank += 1
            number = _await_number(shared, rank)
    else:
        _add_tile(tensors, shared, problem, tile_at(problem, number, BLOCK_M), states_ptr)
    tma.store_wait(0)
