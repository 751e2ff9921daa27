"""Which tile a program computes: an order of programs that keeps caches warm and work balanced."""

import triton
import triton.language as tl


@triton.jit
def tile_of_head(pid, num_tiles, num_heads, heads_per_group, WORK: tl.constexpr):
    """Map a program to (tile, head); WORK is how the tiles of a head compare.

    Tiles of "even" work go head after head, so neighbours share keys and values. Where the work is
    "growing" or "shrinking" with the tile, heads go in groups that fit the L2 cache together, the
    longest tiles of a group first and its heads fastest: that keeps the last wave short.
    """
    if WORK == "even":
        return pid % num_tiles, pid // num_tiles
    group_size = num_tiles * heads_per_group
    first_head = pid // group_size * heads_per_group
    heads = tl.minimum(num_heads - first_head, heads_per_group)
    rank = pid % group_size
    tile = rank // heads
    if WORK == "growing":
        tile = num_tiles - 1 - tile
    return tile, first_head + rank % heads
