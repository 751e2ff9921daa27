"""Tiles of strided matrices: where elements are, and loads that mask only what can overrun."""

import triton
import triton.language as tl


@triton.jit
def tile_offsets(offs_row, stride_row, offs_col, stride_col):
    """Offsets within a tile: 32-bit, so it must span less than 2**31 elements."""
    return offs_row[:, None] * stride_row + offs_col[None, :] * stride_col


@triton.jit
def load_tile(ptrs, mask_row, mask_col, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Load a tile; rows and columns outside the masks read as zero, unmasked sides cost nothing."""
    if MASK_ROWS and MASK_COLS:
        return tl.load(ptrs, mask=mask_row[:, None] & mask_col[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(ptrs, mask=mask_row[:, None], other=0.0)
    if MASK_COLS:
        return tl.load(ptrs, mask=mask_col[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def head_offsets(offs_row, stride_row, stride_col, BLOCK_D: tl.constexpr):
    """Offsets within a tile of vectors of up to BLOCK_D elements."""
    return tile_offsets(offs_row, stride_row, tl.arange(0, BLOCK_D), stride_col)


@triton.jit
def load_head(ptrs, mask_row, MASK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Load a tile of vectors of HEAD_DIM elements; padding of rows and columns reads as zero."""
    mask_col = tl.arange(0, ptrs.shape[1]) < HEAD_DIM
    return load_tile(ptrs, mask_row, mask_col, MASK_ROWS, ptrs.shape[1] != HEAD_DIM)


@triton.jit
def store_head(ptrs, tile, mask_row, HEAD_DIM: tl.constexpr):
    """Store a tile of vectors of HEAD_DIM elements without its padding, in the dtype of `ptrs`."""
    mask_col = tl.arange(0, ptrs.shape[1]) < HEAD_DIM
    tl.store(ptrs, tile.to(ptrs.dtype.element_ty), mask=mask_row[:, None] & mask_col[None, :])
