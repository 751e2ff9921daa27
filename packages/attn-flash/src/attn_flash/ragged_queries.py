"""Which sequence each token of a ragged batch belongs to, and batches that use a part of each."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from attn_core import checks


class Tokens(NamedTuple):
    """Of each token (T,): its sequence, how many came before, whether it belongs to one at all."""

    sequence: torch.Tensor
    offset: torch.Tensor
    is_real: torch.Tensor


def tokens_of(cu_seqlens: torch.Tensor, count: int) -> Tokens:
    """Find the sequences of `count` tokens; those behind the last one count as its own."""
    t = torch.arange(count, device=cu_seqlens.device)
    sequence = torch.bucketize(t, cu_seqlens[1:], right=True).clamp(max=len(cu_seqlens) - 2)
    return Tokens(sequence, t - cu_seqlens[sequence], t < cu_seqlens[-1])


def unused_last(
    cu_seqlens: torch.Tensor, seqused: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order tokens so that the used ones of every sequence come first, one sequence after another.

    Returns the token of each place (T,), the place of each token (T,), and where the sequences
    begin then (B + 1,). Everything stays on the device.
    """
    sequence, offset, is_real = tokens_of(cu_seqlens, count)
    starts = torch.nn.functional.pad(seqused.cumsum(0, dtype=torch.int32), (1, 0))
    is_used = is_real & (offset < seqused[sequence])
    behind = starts[-1] + (~is_used).cumsum(0) - 1
    place = torch.where(is_used, starts[sequence] + offset, behind)
    token = torch.empty_like(place).scatter_(0, place, torch.arange(count, device=place.device))
    return token, place, starts


def check_starts(name: str, cu_seqlens: torch.Tensor, x_name: str, x: torch.Tensor) -> None:
    """Check where sequences begin in x; values where reading them does not wait."""
    checks.require_rank(name, cu_seqlens, "(B + 1,)")
    checks.require_dtype(name, cu_seqlens, (torch.int32,))
    checks.require_device(name, cu_seqlens, x_name, x)
    if len(cu_seqlens) == 0:
        raise ValueError(f"{name} must have B + 1 elements, at least 1, got 0")
    if not checks.may_read_values(x):
        return
    starts = cu_seqlens.tolist()
    is_growing = all(start <= stop for start, stop in pairwise(starts))
    if starts[0] != 0 or not is_growing or starts[-1] > len(x):
        raise ValueError(
            f"{name} must begin with 0, not decrease and end within the {len(x)} tokens of "
            f"{x_name}, got {starts}"
        )


def check_used(
    name: str, seqused: torch.Tensor, starts_name: str, cu_seqlens: torch.Tensor
) -> None:
    """Check how many tokens of each sequence are used; values where reading them does not wait."""
    checks.require_shape(name, seqused, "(B,)", (cu_seqlens.shape[0] - 1,))
    checks.require_dtype(name, seqused, (torch.int32,))
    checks.require_device(name, seqused, starts_name, cu_seqlens)
    if not checks.may_read_values(seqused):
        return
    for b, (used, length) in enumerate(zip(seqused, cu_seqlens.diff(), strict=True)):
        checks.require_range(f"{name}[{b}]", int(used), 0, int(length))
