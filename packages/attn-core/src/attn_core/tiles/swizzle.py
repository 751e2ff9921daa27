"""Which tile a program computes: an order of programs that keeps caches warm and work balanced."""

import triton
import triton.language as tl


@triton.jit
def tile_of_head(pid, num_tiles, num_heads, heads_per_group, LONGEST_LAST: tl.constexpr):
    """Map a program to (tile, head), heads in groups that fit the L2 cache together.

    Within a group the head changes fastest, so programs that run at the same time do work of the
    same length; with LONGEST_LAST the tiles are walked backwards and the longest start first.
    """
    group_size = num_tiles * heads_per_group
    group = pid // group_size
    first_head = group * heads_per_group
    heads = tl.minimum(num_heads - first_head, heads_per_group)
    rank = pid - group * group_size
    tile = rank // heads
    if LONGEST_LAST:
        tile = num_tiles - 1 - tile
    return tile, first_head + rank % heads
