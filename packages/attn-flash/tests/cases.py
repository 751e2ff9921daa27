"""Problems that the tests of every backend of dense attention share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from attn_core.testing import random_tensor

OPEN = (-1, -1)
CAUSAL = (-1, 0)


class Case(NamedTuple):
    B: int
    H: int
    H_KV: int
    M: int
    N: int
    D: int

    def __str__(self):
        return f"b{self.B}-h{self.H}-kv{self.H_KV}-m{self.M}-n{self.N}-d{self.D}"

    def inputs(self, dtype=torch.float32, device="cpu", *, seed="", scale=1.0):
        shapes = {
            "q": (self.B, self.M, self.H, self.D),
            "k": (self.B, self.N, self.H_KV, self.D),
            "v": (self.B, self.N, self.H_KV, self.D),
        }
        return tuple(
            random_tensor(
                shape, seed=f"{self}-{name}{seed}", dtype=dtype, device=device, scale=scale
            )
            for name, shape in shapes.items()
        )


def show_dtype(dtype):
    return str(dtype).removeprefix("torch.")


def show_window(window):
    return {OPEN: "full", CAUSAL: "causal"}.get(window, f"window{window[0]},{window[1]}")


def random_like(tensor, seed):
    return random_tensor(tensor.shape, seed=seed, dtype=tensor.dtype, device=tensor.device)


def with_nan(q, k):
    """Make one number of a query NaN in the first batch entry, and of a key in the last."""
    q, k = q.clone(), k.clone()
    q[0, 5, 1, 2] = math.nan
    k[-1, -6, 0, 3] = math.nan
    return q, k


def assert_nan_where_expected(actual, expected):
    """Compare where out and lse are NaN: in rows that see a NaN, all of them, and nowhere else."""
    for name, x, y in zip(("out", "lse"), actual, expected, strict=True):
        assert 0 < y.isnan().sum() < y.numel(), name
        assert x.isnan().equal(y.isnan()), name
