"""Chunked attention: a query sees the keys of its own chunk alone."""

from __future__ import annotations

import torch


def chunk_mask(
    chunk: int,
    len_q: int | torch.Tensor,
    len_k: int | torch.Tensor,
    size: tuple[int, int],
    device: torch.device,
) -> torch.Tensor:
    """Which keys lie in the chunk of `chunk` positions that a query is in.

    Query i is at position ``len_k - len_q + i``. `size` is (M, N); lengths are numbers, or tensors
    (B, 1, 1). The mask is (M, N) or (B, 1, M, N), True where a key is seen.
    """
    row, key = (torch.arange(count, device=device) for count in size)
    position = row[:, None] + (len_k - len_q)
    first = position - position % chunk
    mask = (first <= key) & (key < first + chunk)
    return mask if mask.dim() == 2 else mask[:, None]
