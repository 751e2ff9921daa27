"""How results lie in memory: what operators, their fakes and every backend agree on.

Results shaped (B, H, R, M, D) are stored as (B, R, M, H, D): moving the heads last and flattening
them, which is what the output projection reads, is then a view. The layout depends on shapes alone,
so that a compiler knows it without the strides of the inputs.
"""

from __future__ import annotations

import math

import torch

from attn_core.dtypes import accumulator_dtype


def new_heads_last(like: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor shaped as `like`, (B, H, R, M, D), and stored as (B, R, M, H, D)."""
    _, heads, rows, length, head_dim = like.shape
    token = heads * head_dim
    strides = (rows * length * token, head_dim, length * token, token, 1)
    return like.new_empty_strided(like.shape, strides)


def new_lse(q: torch.Tensor) -> torch.Tensor:
    """An uninitialised lse (B, H, R, M) for queries q (B, H, R, M, D)."""
    return q.new_empty(q.shape[:-1], dtype=accumulator_dtype(q.dtype))


def new_unwanted(like: torch.Tensor) -> torch.Tensor:
    """The empty tensor that stands in for a gradient nobody asked for."""
    return like.new_empty(0)


def scratch(shape: tuple[int, ...], lent: torch.Tensor) -> torch.Tensor:
    """Uninitialised float32 memory: that of `lent`, a new dense tensor, where that is enough."""
    size = math.prod(shape)
    if lent.nbytes < 4 * size:
        return lent.new_empty(shape, dtype=torch.float32)
    flat = lent.as_strided((4 * size // lent.itemsize,), (1,))
    return flat.view(torch.float32).view(shape)


def is_aligned(x: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator of a Hopper GPU can read x.

    The last dimension must be dense, everything else at multiples of 16 bytes, but not at 0.
    """
    step = 16 // x.itemsize
    sizes, strides = x.shape, x.stride()
    return (
        (strides[-1] == 1 or sizes[-1] == 1)
        and x.storage_offset() % step == 0
        and all(strides[i] % step == 0 < strides[i] for i in range(x.dim() - 1) if sizes[i] != 1)
    )
