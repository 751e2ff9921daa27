"""The loader of the backward kernel: a warp that copies what consumers read, and dK and dV back."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from attn_core.tiles.hopper import meet_at
from attn_flash._hopper.backward_consumer import CONSUMERS_AND_LOADER, KEYS_DONE
from attn_flash._hopper.backward_tiles import BLOCK_N, KEYS
from attn_flash._hopper.primitives import (
    load_ragged_rows,
    load_rows,
    store_ragged_rows,
    store_rows,
)


@gluon.jit
def _load_tile(problem, tile, desc, start, length, h, row, barrier, buffer):
    """Start to copy rows of the tile's sequence, which begins at `start` where it is ragged."""
    if problem.IS_RAGGED:
        load_ragged_rows(desc, start, length, h, row, barrier, buffer)
    else:
        load_rows(desc, tile.b, h, row, barrier, buffer)


@gluon.jit
def _load_keys(problem, tile, desc, barrier, buffers):
    sequence = tile.sequence
    mbarrier.expect(barrier, 2 * desc.block_type.nbytes)
    for w in gl.static_range(2):
        row = tile.n * BLOCK_N + w * KEYS
        _load_tile(
            problem, tile, desc, sequence.start_k, sequence.N, tile.h_kv, row,
            barrier, buffers.index(w),
        )  # fmt: skip


@gluon.jit
def _load_queries(problem, tile, desc, row_desc, barrier, buffer, row_buffer, h, m):
    BLOCK_M: gl.constexpr = desc.block_shape[len(desc.block_shape) - 2]
    sequence = tile.sequence
    mbarrier.expect(barrier, desc.block_type.nbytes + row_desc.block_type.nbytes)
    _load_tile(problem, tile, desc, sequence.start_q, sequence.M, h, m * BLOCK_M, barrier, buffer)
    coord = [tile.b * problem.H + h, (sequence.block_q + m) * BLOCK_M]
    tma.async_copy_global_to_shared(row_desc, coord, barrier, row_buffer)


@gluon.jit
def _store_keys(problem, tile, desc, buffers):
    sequence = tile.sequence
    for w in gl.static_range(2):
        row = tile.n * BLOCK_N + w * KEYS
        if problem.IS_RAGGED:
            store_ragged_rows(desc, sequence.start_k, sequence.N, tile.h_kv, row, buffers.index(w))
        else:
            store_rows(desc, tile.b, tile.h_kv, row, buffers.index(w))


@gluon.jit
def load(tensors, shared, problem, tile):
    """Fill the stages of shared memory with what each step needs; write dK and dV at the end."""
    STAGES: gl.constexpr = shared.q.shape[0]
    steps = (tile.last - tile.first) * problem.group
    _load_keys(problem, tile, tensors.k, shared.k_full, shared.k)
    m = tile.first
    h = tile.h
    # The last rounds only wait: the consumers' arrivals must not outlive the program.
    for step in range(steps + STAGES):
        i = step % STAGES
        if step >= STAGES:
            mbarrier.wait(shared.empty.index(i), (step // STAGES + 1) & 1)
        if step < steps:
            _load_queries(
                problem, tile, tensors.q, tensors.lse, shared.q_full.index(i),
                shared.q.index(i), shared.lse.index(i), h, m,
            )  # fmt: skip
            if step == 0:
                _load_keys(problem, tile, tensors.v, shared.v_full, shared.v)
            _load_queries(
                problem, tile, tensors.do, tensors.delta, shared.do_full.index(i),
                shared.do.index(i), shared.delta.index(i), h, m,
            )  # fmt: skip
        m += 1
        if m == tile.last:
            m = tile.first
            h += 1
    if tile.part == problem.PARTS - 1:
        meet_at(KEYS_DONE, CONSUMERS_AND_LOADER)
        _store_keys(problem, tile, tensors.dv, shared.v)
        _store_keys(problem, tile, tensors.dk, shared.k)
        tma.store_wait(0)
