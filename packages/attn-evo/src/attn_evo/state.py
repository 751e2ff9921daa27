"""What a stream carries from one call to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch


class EvoState(NamedTuple):
    """Everything `evo_attention_step` needs to know about the tokens before.

    Its size depends neither on their number nor on that of the tokens of one call.

    Attributes
    ----------
    sums : Tensor, shape (2, B, H, D)
        Running sums, in float32 or float64: first of v (`context`), then of gated v (`stat`).
    length : Tensor, shape (), int64
        Number of tokens seen.
    """

    sums: torch.Tensor
    length: torch.Tensor

    @property
    def context(self) -> torch.Tensor:
        """Sum of v over the tokens seen, (B, H, D)."""
        return self.sums[0]

    @property
    def stat(self) -> torch.Tensor:
        """Sum of gated v over the tokens seen, (B, H, D)."""
        return self.sums[1]
