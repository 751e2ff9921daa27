from __future__ import annotations

import pytest
import torch

from attn_core.testing import random_tensor
from attn_evo import EvoWeights


@pytest.fixture(autouse=True)
def no_backend_from_outside(monkeypatch):
    for name in ("ATTN_BACKEND", "ATTN_TUNE", "EVO_BACKEND", "EVO_AUTOTUNE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make_weights():
    """Random weights of the size a trained layer has; `name` seeds them."""

    def make(name, dim, dtype=torch.float32, device="cpu"):
        shapes = [(dim, dim), (dim,)] * 4 + [(dim,)] * 2
        scales = [dim**-0.5, 0.5] * 4 + [1.0, 0.5]
        return EvoWeights(
            *(
                random_tensor(shape, seed=f"{name}-{field}", dtype=dtype, device=device, scale=s)
                for field, shape, s in zip(EvoWeights._fields, shapes, scales, strict=True)
            )
        )

    return make
