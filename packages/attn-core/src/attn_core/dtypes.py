"""Dtypes that the operators of the family agree on."""

from __future__ import annotations

import torch


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and of lse: float32, except for float64 problems."""
    return torch.float64 if dtype == torch.float64 else torch.float32
