"""The work of a batch, counted on the device so that programs can share it equally.

A unit of work is one tile of keys for one tile of queries. The list holds, for each tile of
queries, the units up to its end, and after the last one the units of each program's share. A kernel
before attention counts it: done by attention itself it would take registers, which cost more.
"""

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_core.tuning import TileConfig
from attn_paged._triton import problem
from attn_paged._triton.queries import keys_of_tile, queries_of_tile

_TILES = 1024  # that are counted at once
# A launch beside this one is bound by memory: what time a tile of its keys takes a processor of an
# H200, as a part of that of a unit of shared prefixes, chosen by trial.
_BESIDE = tl.constexpr(1 / 3)


# fmt: off
@triton.jit
def units_of_tiles(
    tiles, lens_ptr, stride_lens, cu_seqlens_ptr, stride_cu, causal_ptr, stride_causal,
    T, B, num_tiles, least_m, most_m, steps, left, right,
    IS_RAGGED: tl.constexpr, ONE_TILE_EACH: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """Return the units of work of a block of tiles; of those past the last one, 0."""
    b, _token, start_m, M = queries_of_tile(
        tiles, cu_seqlens_ptr, stride_cu, T, B, least_m, most_m, steps,
        IS_RAGGED, ONE_TILE_EACH, BLOCK_Q, 0,
    )  # fmt: skip
    has_queries = (tiles < num_tiles) & (b <= B) & (start_m < M)
    M = tl.where(has_queries, M, 0)
    _N, _right, lo, _full_lo, _full_hi, hi = keys_of_tile(
        b, start_m, M, B, lens_ptr, stride_lens, causal_ptr, stride_causal, left, right,
        HAS_LEFT, HAS_RIGHT, BLOCK_Q, BLOCK_N,
    )  # fmt: skip
    # Queries without keys are work too: their rows have to be written.
    return tl.where(has_queries, tl.maximum(tl.cdiv(hi - lo, BLOCK_N), 1), 0)


@triton.jit(do_not_specialize=problem.NOT_SPECIALIZED)
def _count_work_kernel(
    lens_ptr, stride_lens,
    cu_seqlens_ptr, stride_cu,
    causal_ptr, stride_causal,
    beside_ptr,  # [B], keys of each sequence that a launch beside this one attends to
    ends_ptr,  # [num_tiles + 1]
    T, B, num_tiles, least_m, most_m, steps, left, right, num_shares,
    IS_RAGGED: tl.constexpr, ONE_TILE_EACH: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = 0
    share = 0
    if beside_ptr is not None:  # fewer programs have work, and leave processors to that launch
        b = tl.arange(0, BLOCK_T)
        keys = tl.load(beside_ptr + b, mask=b < B, other=0)
        beside = (tl.sum(tl.cdiv(keys, BLOCK_N), 0) * _BESIDE).to(tl.int32)
    for start in range(0, num_tiles, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        units = units_of_tiles(
            tiles, lens_ptr, stride_lens, cu_seqlens_ptr, stride_cu, causal_ptr, stride_causal,
            T, B, num_tiles, least_m, most_m, steps, left, right,
            IS_RAGGED, ONE_TILE_EACH, HAS_LEFT, HAS_RIGHT, BLOCK_Q, BLOCK_N,
        )  # fmt: skip
        if beside_ptr is not None:
            share = tl.maximum(tl.cdiv(tl.sum(units, 0) + beside, num_shares), 1)
            # Rounded up, each tile begins with a program, which has then no bit of another one.
            parts = tl.cdiv(units, share)
            units = tl.where(tl.sum(parts, 0) <= num_shares, parts * share, units)
        tl.store(ends_ptr + tiles, total + tl.cumsum(units, 0), mask=tiles < num_tiles)
        total += tl.sum(units, 0)
    if beside_ptr is None:
        share = tl.maximum(tl.cdiv(total, num_shares), 1)
    tl.store(ends_ptr + num_tiles, share)


_launch = Launcher(_count_work_kernel)
_launch_next = Launcher(_count_work_kernel, launch_pdl=True)


def count_work(
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    is_causal: torch.Tensor | None,
    constexprs: dict[str, bool | int],
    *,
    num_shares: int,
    beside: torch.Tensor | None = None,
    **sizes: int,
) -> torch.Tensor:
    """Return the units of work up to the end of each tile, then those of a share.

    `beside` (B,) are keys of each sequence that a launch beside this one attends to. The kernel
    right before is then one of this package.
    """
    ends = context_lens.new_empty((sizes["num_tiles"] + 1,))
    block_t = min(_TILES, max(128, 1 << (sizes["num_tiles"] - 1).bit_length()))
    strides = [problem.strides_of(x, 1) for x in (context_lens, cu_seqlens_q, is_causal)]
    overlaps = problem.can_overlap(ends.device)
    launch = _launch_next if beside is not None and overlaps else _launch
    launch(
        1,
        strides=(*strides, is_causal is None, beside is None),
        args=(
            context_lens, *strides[0],
            cu_seqlens_q, *strides[1],
            is_causal, *strides[2],
            beside,
            ends, *sizes.values(), num_shares,
        ),
        constexprs={**constexprs, "BLOCK_T": block_t, "OVERLAPS": overlaps},
        config=TileConfig(block_t, 1, 4, 1),
    )  # fmt: skip
    return ends
