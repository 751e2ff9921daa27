"""What the launchers of this package derive from a problem before they start a kernel."""

from __future__ import annotations

import torch

from attn_core.device import device_info, triton_version
from attn_core.tiling import MIN_DOT, padded_head_dim

# Integers that change from call to call: compiled for any value.
NOT_SPECIALIZED = [
    *("T", "B", "num_tiles", "num_splits", "num_shares", "chunk", "least_m", "most_m", "steps"),
    *("num_blocks", "stride_tb", "stride_mask", "tree_width", "left", "right"),
]
LOG2_E = 1.4426950408889634


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Widths of the one or two tiles that hold a query or key: 576 is 512 + 64, not 1024 + 0."""
    whole = padded_head_dim(head_dim)
    if head_dim in (whole, 1) or whole == MIN_DOT:
        return whole, 0
    half = whole // 2
    tail = padded_head_dim(head_dim - half)
    return (half, tail) if half + tail < whole else (whole, 0)


def strides_of(tensor: torch.Tensor | None, ndim: int) -> tuple[int, ...]:
    """Strides of a tensor of `ndim` dimensions that may be absent."""
    return (0,) * ndim if tensor is None else tensor.stride()


def are_values_in_keys(k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    """Whether values are the first entries of keys, as in DeepSeek's latent attention.

    Then the tile of keys is that of values too. Quantised, they would have scales of their own.
    """
    return (
        k_cache.itemsize > 1
        and k_cache.shape[3] > v_cache.shape[3]
        and k_cache.data_ptr() == v_cache.data_ptr()
        and k_cache.stride() == v_cache.stride()
        and split_head_dim(k_cache.shape[3])[0] == padded_head_dim(v_cache.shape[3])
    )


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends, and wait for its results by itself.

    Programmatic dependent launch, CUDA C++ Programming Guide, from compute capability 9.0 on.
    """
    return device_info(device).capability >= 90 and (triton_version() or (0, 0)) >= (3, 6)
