"""What runs before and after the backward kernel for sm_90a, in Triton's interpreter."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from attn_core.testing import poison_new_allocations, random_tensor

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


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out-and-lse"])
@pytest.mark.parametrize("D, block_d", [(40, 64), (64, 64), (96, 128)])
def test_prepare(D, block_d, with_dlse, deterministic):
    dout, dlse, out, lse = arguments(D)
    dlse = dlse if with_dlse else None
    block_m = 8192 // block_d
    with poison_new_allocations():
        rows, dq_sum, counters = backward_sums.prepare(
            dout, dlse, out, lse, block_m, block_d, deterministic
        )
    rows = rows.view(2, B, H, PADDED_M)
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2) - (dlse if with_dlse else 0.0)
    lse_log2 = (lse * math.log2(math.e)).masked_fill(lse == -math.inf, math.inf)
    torch.testing.assert_close(rows[0, :, :, :M], lse_log2)
    torch.testing.assert_close(rows[1, :, :, :M], delta)
    assert (rows[0, :, :, M:] == math.inf).all()
    assert not rows[1, :, :, M:].isnan().any()
    assert dq_sum.numel() == B * H * PADDED_M * block_d
    assert counters.numel() == 1 + B * H * PADDED_M // block_m
    assert not (counters if deterministic else dq_sum).any()


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("D, block_d", [(40, 64), (64, 64), (96, 128)])
def test_finish(D, block_d, deterministic):
    """The sum in the order of registers; what nobody has added to is 0."""
    tiles = random_tensor((B, H, PADDED_M, block_d), seed=f"sum-{D}")
    # 64 rows are 4 warps, 2 halves and 8 lanes; 64 columns are 8 pairs of 4 lanes, and 2 of those.
    parts = tiles.view(B, H, -1, 4, 2, 8, block_d // 64, 8, 4, 2)
    units = parts.permute(0, 1, 2, 6, 7, 3, 5, 8, 4, 9)
    dq_sum = units.reshape(-1, 256).clone()
    counters, scaled = None, tiles * 0.5
    if deterministic:
        block_m = 8192 // block_d
        counters = torch.ones(1 + B * H * PADDED_M // block_m, dtype=torch.int32)
        counters[2] = 0
        scaled[0, 0, block_m : 2 * block_m] = 0.0
        dq_sum.view(counters.numel() - 1, -1)[1] = math.nan
    dq = torch.full((B, M, H, D), math.nan, dtype=torch.float16)
    backward_sums.finish(dq_sum, counters, dq, 0.5, block_d)
    assert torch.equal(dq, scaled[:, :, :M, :D].transpose(1, 2).half())


STARTS = (0, 70, 70, 71, 140)  # of ragged sequences; 10 tokens belong to none


def rows_of_ragged():
    """The rows of padded memory that hold the tokens of sequences, and those tokens."""
    rows, tokens = [], []
    for i, (first, last) in enumerate(pairwise(STARTS)):
        tokens += range(first, last)
        rows += range((first // 128 + i) * 128, (first // 128 + i) * 128 + last - first)
    return rows, tokens


def test_prepare_ragged():
    dout, dlse, out, lse = arguments(64)
    starts = torch.tensor(STARTS, dtype=torch.int32)
    with poison_new_allocations():
        rows, *_ = backward_sums.prepare(dout, dlse, out, lse, 128, 64, False, starts)
    rows = rows.view(2, B, H, -1)
    places, tokens = rows_of_ragged()
    lse_log2 = (lse * math.log2(math.e)).masked_fill(lse == -math.inf, math.inf)
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2) - dlse
    torch.testing.assert_close(rows[0][:, :, places], lse_log2[:, :, tokens])
    torch.testing.assert_close(rows[1][:, :, places], delta[:, :, tokens])
    between = sorted(set(range(rows.shape[3])) - set(places))
    assert (rows[0][:, :, between] == math.inf).all()
    assert not rows[1][:, :, between].isnan().any()


def test_finish_ragged():
    starts = torch.tensor(STARTS, dtype=torch.int32)
    places, tokens = rows_of_ragged()
    padded_m = backward_sums.padded_blocks(M, starts) * 128
    tiles = random_tensor((B, H, padded_m, 64), seed="ragged")
    parts = tiles.view(B, H, -1, 4, 2, 8, 1, 8, 4, 2)
    dq_sum = parts.permute(0, 1, 2, 6, 7, 3, 5, 8, 4, 9).reshape(-1, 256).clone()
    dq = torch.full((B, M, H, 64), math.nan, dtype=torch.float16)
    backward_sums.finish(dq_sum, None, dq, 0.5, 64, starts)
    assert torch.equal(dq[:, tokens], (tiles[:, :, places] * 0.5).transpose(1, 2).half())
    assert dq[:, STARTS[-1] :].isnan().all()
