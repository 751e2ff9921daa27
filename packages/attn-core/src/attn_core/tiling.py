"""Sizes of tiles and precision of products: what a launch works out before it starts a kernel."""

from __future__ import annotations

import torch

MIN_DOT = 16
"""The shortest side of a tile that ``tl.dot`` accepts."""
_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", None)  # since torch 2.9


def ceil_div(a: int, b: int) -> int:
    """Return how many blocks of size b cover a.

    Examples
    --------
    >>> from attn_core.tiling import ceil_div
    >>> ceil_div(9, 4)
    3
    """
    return -(-a // b)


def padded_head_dim(head_dim: int) -> int:
    """Return the width of a tile that holds a head dimension: a power of two ``tl.dot`` accepts.

    Examples
    --------
    >>> from attn_core.tiling import padded_head_dim
    >>> padded_head_dim(7), padded_head_dim(80)
    (16, 128)
    """
    return max(MIN_DOT, 1 << (head_dim - 1).bit_length())


def dot_precision(tensor: torch.Tensor) -> str:
    """Return how float32 products are computed: TF32 only where torch's own matmuls may use it.

    Parameters
    ----------
    tensor : Tensor
        An operand; any dtype.

    Returns
    -------
    str
        ``"tf32"`` or ``"ieee"``, the ``input_precision`` of ``tl.dot``.
    """
    return "tf32" if tensor.dtype == torch.float32 and allows_tf32() else "ieee"


def allows_tf32() -> bool:
    """Whether torch's own matmuls may use TF32, by whichever of its two switches was set.

    Returns
    -------
    bool
        ``torch.backends.cuda.matmul.fp32_precision`` is ``"tf32"``, or ``allow_tf32`` is True.
    """
    if _fp32_precision is None:
        return torch._C._get_cublas_allow_tf32()
    return bool(_fp32_precision("cuda", "matmul") == "tf32")
