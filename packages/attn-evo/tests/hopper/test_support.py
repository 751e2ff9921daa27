"""Which problems the kernels for Hopper take."""

from __future__ import annotations

import pytest
import torch

from attn_core.device import DeviceInfo
from attn_evo._hopper import support

BFLOAT, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
MOST_HEADS = 1 << 22


@pytest.fixture(autouse=True)
def on_an_h200(monkeypatch):
    monkeypatch.setattr(support, "device_info", lambda _: DeviceInfo("cuda", "", "sm_90", 132))
    monkeypatch.setattr(support, "triton_version", lambda: (3, 6))


def values(*shape, dtype=BFLOAT):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype, dim", [(BFLOAT, 64), (HALF, 128), (FLOAT, 64)], ids=str)
def test_takes_typical_values(dtype, dim):
    assert support.takes(values(2, 3, 100, dim, dtype=dtype), False, False)


@pytest.mark.parametrize(
    "v",
    [
        values(2, 3, 100, 32),
        values(2, 3, 100, 128, dtype=FLOAT),
        values(2, 3, 100, 65)[..., 1:],
        values(2, 3, 64, 100).mT,
        values(2, MOST_HEADS, 1, 64),
    ],
    ids=["narrow", "wide-float32", "unaligned", "transposed", "more-heads-than-int32-counts"],
)
def test_refuses(v):
    assert not support.takes(v, False, False)


def test_takes_as_many_heads_as_int32_counts():
    assert support.takes(values(1, MOST_HEADS, 1, 64), False, False)


def test_refuses_masks_states_and_other_versions(monkeypatch):
    v = values(2, 3, 100, 64)
    assert not support.takes(v, True, False)
    assert not support.takes(v, False, True)
    monkeypatch.setattr(support, "triton_version", lambda: None)
    assert not support.takes(v, False, False)


def test_copies_what_cannot_be_addressed():
    x = torch.randn(2, 3, 5, 64)
    assert support.in_units(x) is x
    assert support.in_tiles(x) is x
    scalar = x[0, 0, 0, 0].expand(x.shape)
    assert torch.equal(support.in_units(scalar), scalar)
    assert support.in_units(scalar).is_contiguous()
    shared = x[:1].expand(x.shape)
    assert support.in_units(shared) is shared
    assert torch.equal(support.in_tiles(shared), shared)
    assert all(support.in_tiles(shared).stride())
