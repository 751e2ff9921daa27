"""What runs before and after the backward kernel for sm_90a, in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from attn_core.testing import poison_new_allocations, random_tensor

from . import sums_torch

pytest.importorskip("triton.experimental.gluon")

from attn_flash._hopper import backward_sums

pytestmark = pytest.mark.interpret

B, M, H = 2, 150, 2
PADDED_M = 256


def arguments(D):
    """The gradient of out, that of lse, out and lse, with a row that saw no key."""
    dout, out = (
        random_tensor((B, M, H, D), seed=f"{name}-{D}", dtype=torch.float16)
        for name in ("dout", "out")
    )
    dlse, lse = (random_tensor((B, H, M), seed=f"{name}-{D}") for name in ("dlse", "lse"))
    lse[1, 0, 7] = -math.inf
    return dout, dlse, out, lse


@pytest.mark.parametrize("clears", [False, True], ids=["counters", "sum"])
@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out-and-lse"])
@pytest.mark.parametrize("D, block_d", [(40, 64), (64, 64), (96, 128)])
def test_prepare(D, block_d, with_dlse, clears):
    dout, dlse, out, lse = arguments(D)
    dlse = dlse if with_dlse else None
    block_m = 8192 // block_d
    with poison_new_allocations():
        rows, dq_sum, counters = backward_sums.prepare(
            dout, dlse, out, lse, block_m, block_d, clears
        )
    torch.testing.assert_close(rows, sums_torch.prepare_rows(dout, dlse, out, lse))
    assert dq_sum.numel() == B * H * PADDED_M * block_d
    assert counters.numel() == 1 + B * H * PADDED_M // block_m
    assert not counters.any()
    assert dq_sum.any() != clears


@pytest.mark.parametrize("has_counters", [False, True], ids=["cleared", "counters"])
@pytest.mark.parametrize("D, block_d", [(40, 64), (64, 64), (96, 128)])
def test_finish(D, block_d, has_counters):
    """What nobody has added to is 0."""
    dq_sum = random_tensor((B * H * PADDED_M * block_d // 256, 256), seed=f"sum-{D}")
    counters = None
    if has_counters:
        counters = torch.ones(1 + B * H * PADDED_M // (8192 // block_d), dtype=torch.int32)
        counters[2] = 0
        dq_sum.view(counters.numel() - 1, -1)[1] = math.nan
    dq, expected = (torch.full((B, M, H, D), math.nan, dtype=torch.float16) for _ in range(2))
    backward_sums.finish(dq_sum, counters, dq, 0.5, block_d)
    sums_torch.finish(dq_sum, counters, expected, 0.5, block_d)
    assert torch.equal(dq, expected)


STARTS = (0, 70, 70, 71, 140)  # of ragged sequences; 10 tokens belong to none


def test_prepare_ragged():
    dout, dlse, out, lse = arguments(64)
    starts = torch.tensor(STARTS, dtype=torch.int32)
    with poison_new_allocations():
        rows, *_ = backward_sums.prepare(dout, dlse, out, lse, 128, 64, False, starts)
    torch.testing.assert_close(rows, sums_torch.prepare_rows(dout, dlse, out, lse, starts=starts))


def test_finish_ragged():
    starts = torch.tensor(STARTS, dtype=torch.int32)
    padded_m = backward_sums.padded_blocks(M, starts) * 128
    dq_sum = random_tensor((B * H * padded_m * 64 // 256, 256), seed="ragged")
    dq, expected = (torch.full((B, M, H, 64), math.nan, dtype=torch.float16) for _ in range(2))
    backward_sums.finish(dq_sum, None, dq, 0.5, 64, starts)
    sums_torch.finish(dq_sum, None, expected, 0.5, 64, starts)
    torch.testing.assert_close(dq, expected, rtol=0, atol=0, equal_nan=True)
    assert dq[:, STARTS[-1] :].isnan().all()
