"""Which shared prefixes the Hopper kernel takes. Imports neither Triton nor Gluon."""

from __future__ import annotations

import torch

from attn_core.device import GLUON_VERSIONS, device_info, triton_version
from attn_paged.options import AttentionOptions

BLOCK_N = 64  # keys of a tile
_MAX_HEAD_DIM = 128
_MAX_QUERIES = 768  # of a decoding batch: every program looks at all sequences and tiles at once
_LEAST_BOX = 8  # slots of a block that the copy engine lays out as tensor cores read them
_UNIT = 8  # 16-bit numbers of 16 bytes, in which it counts


def takes(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    options: AttentionOptions,
) -> bool:
    """Whether the kernel computes attention to the prefixes of a problem."""
    block_size = k_cache.shape[1]
    fills_tiles = block_size % BLOCK_N == 0 or (
        BLOCK_N % block_size == 0 and block_size >= _LEAST_BOX
    )
    return (
        device_info(q.device).arch == "sm_90"
        and triton_version() in GLUON_VERSIONS
        and q.dtype == k_cache.dtype
        and q.itemsize == 2
        and max(q.shape[2], v_cache.shape[3]) <= _MAX_HEAD_DIM
        and fills_tiles
        and len(q) + len(block_tables) <= _MAX_QUERIES
        and options.softcap == 0
        and all(_is_addressable(tensor) for tensor in (q, k_cache, v_cache))
    )


def _is_addressable(tensor: torch.Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes."""
    *outer, innermost = tensor.stride()
    is_aligned = tensor.data_ptr() % 16 == 0
    return is_aligned and innermost == 1 and all(x > 0 and x % _UNIT == 0 for x in outer)
