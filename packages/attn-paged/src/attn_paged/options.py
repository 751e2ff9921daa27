"""What a call may ask for beyond its queries, keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch

QUANTISED_DTYPES = (torch.float8_e4m3fn, torch.int8)


class AttentionOptions(NamedTuple):
    """The optional tensors and the numbers of one call of attention, checked.

    `window` is (left, right): the query at position p sees keys ``p - left`` to ``p + right``, both
    included; -1 leaves a side open. Causal attention is a window closed on the right, (-1, 0);
    `is_causal` closes it for some sequences only.
    """

    scale: float
    window: tuple[int, int] = (-1, 0)
    softcap: float = 0.0
    cu_seqlens_q: torch.Tensor | None = None  # [B + 1]
    alibi_slopes: torch.Tensor | None = None  # [H] or [B, H]
    sinks: torch.Tensor | None = None  # [H]
    k_scale: torch.Tensor | None = None  # broadcasts to [num_blocks, block_size, H_KV]
    v_scale: torch.Tensor | None = None
    is_causal: torch.Tensor | None = None  # [B]
    tree_mask: torch.Tensor | None = None  # [T, W], or all sequences' [M, M] one after the other
    batch_invariant: bool = False
    shared_prefix: bool = False


class Rotary(NamedTuple):
    """Angles by which keys are turned, and where the keys are.

    A pair is two neighbours where `interleaved`, else one entry of each half.
    """

    cos: torch.Tensor  # [positions, R / 2]
    sin: torch.Tensor
    positions: torch.Tensor  # [T]
    interleaved: bool = False


class AppendOptions(NamedTuple):
    """The optional tensors of one call of append_to_cache, checked."""

    k_scale: torch.Tensor | None = None  # [num_blocks, block_size, H_KV] to write, else to use
    v_scale: torch.Tensor | None = None
    rotary: Rotary | None = None


def largest(dtype: torch.dtype) -> float:
    """Largest magnitude that quantised numbers take: symmetric, so -128 is never used."""
    return float(torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max)
