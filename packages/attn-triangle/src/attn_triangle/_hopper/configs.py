"""Tiles of the Hopper kernels: queries or keys of a CTA, length of a streamed block, its stages.

BLOCK_M counts the rows of both computing warpgroups, BLOCK_N those of a block that streams by.
"""

from attn_core.tuning import TileConfig

_WARPS = 4  # of the first computing warpgroup, the only one that a launch names

FORWARD = {
    16: TileConfig(128, 128, _WARPS, 2),
    32: TileConfig(128, 128, _WARPS, 2),
    64: TileConfig(128, 64, _WARPS, 2),
}
BACKWARD_DK_DV = {
    16: TileConfig(128, 64, _WARPS, 3),
    32: TileConfig(128, 64, _WARPS, 3),
    64: TileConfig(128, 64, _WARPS, 2),
}
ROWS_OF_DK_DV = {16: 2, 32: 2, 64: 1}  # that share a tile of the bias
BACKWARD_DQ = {
    16: TileConfig(128, 64, _WARPS, 3),
    32: TileConfig(128, 64, _WARPS, 3),
    64: TileConfig(128, 32, _WARPS, 3),
}
BACKWARD_DBIAS = {
    16: TileConfig(128, 128, _WARPS, 3),
    32: TileConfig(128, 128, _WARPS, 3),
    64: TileConfig(128, 64, _WARPS, 3),
}
LONGEST_BLOCK = 128  # of keys, among all of these
