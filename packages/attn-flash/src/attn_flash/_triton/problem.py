"""What the launchers of this package derive from a problem before they start a kernel."""

from __future__ import annotations

import torch

from attn_core.errors import UnsupportedProblemError

# Integers that change from call to call: compiled for any value.
NOT_SPECIALIZED = [
    "M",
    "N",
    "H",
    "H_KV",
    "num_tiles",
    "num_heads",
    "heads_per_group",
    "left",
    "right",
]
LOG2_E = 1.4426950408889634
_L2_SHARE = 32 << 20  # bytes of keys and values that running programs may touch at once
_TAIL_MATTERS = 1024  # tokens
_LARGEST_TILE = (128, 256)  # rows and columns


def ceil_div(a: int, b: int) -> int:
    """Blocks of size b that cover a."""
    return -(-a // b)


def padded_head_dim(head_dim: int) -> int:
    """Width of a tile that holds the head dimension: a power of two that tl.dot accepts."""
    return max(16, 1 << (head_dim - 1).bit_length())


def dot_precision(tensor: torch.Tensor) -> str:
    """How float32 products are computed: TF32 only where torch's own matmuls may use it."""
    if tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


def tail_block(length: int, block: int, window: tuple[int, int]) -> int:
    """Size of the last block along a sequence: small where the full blocks leave little for it.

    197 tokens in blocks of 64 leave 5: a tail of 16 saves a fifth of the work. Long sequences gain
    nothing, and windows end elsewhere; neither is worth another compilation.
    """
    rest = length % block
    if length > _TAIL_MATTERS or window != (-1, -1) or rest == 0:
        return block
    return max(16, 1 << (rest - 1).bit_length())


def heads_per_group(k: torch.Tensor) -> int:
    """How many heads' keys and values fit the share of the L2 cache that programs work in."""
    head_bytes = 2 * k.shape[1] * k.shape[3] * k.element_size()
    return max(1, _L2_SHARE // max(head_bytes, 1))


def require_narrow_tiles(strides: tuple[tuple[int, ...], ...]) -> None:
    """Check that offsets within a tile fit 32 bits, given the strides of (B, S, H, D) tensors."""
    rows, columns = _LARGEST_TILE
    for _, row_stride, _, column_stride in strides:
        if (rows - 1) * row_stride + (columns - 1) * column_stride >= 2**31:
            raise UnsupportedProblemError(
                "triton: a tile must span less than 2**31 elements, got strides "
                f"{row_stride} along the sequence and {column_stride} along the head dimension"
            )
