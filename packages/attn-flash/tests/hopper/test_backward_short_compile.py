"""The backward kernel for short sequences compiled ahead of time: shared memory and spills."""

from __future__ import annotations

import pytest
import torch

from .cases import HALF, compiler

pytest.importorskip("triton.experimental.gluon")

from attn_flash._hopper import backward_short
from attn_flash._hopper.schedules import _SHORT_BACKWARD as LONGEST

pytestmark = pytest.mark.compile

MAX_SPILLS = 16  # bytes


@pytest.mark.parametrize(
    "M, dtype",
    [(M, torch.bfloat16) for M in (50, 128, 197, LONGEST)] + [(LONGEST, HALF)],
    ids=str,
)
def test_products_overlap_and_nothing_spills(M, dtype, monkeypatch):
    monkeypatch.setattr(backward_short.host, "num_sms", lambda device: 132)
    launch = compiler(monkeypatch, backward_short)
    x = torch.zeros(1, M, 2, 64, dtype=dtype)
    backward_short.attention_backward_short(x, x, x, x, x, torch.zeros(1, 2, M), 0.1)
    [kernel] = launch.compiled
    assert kernel.fits
    assert not kernel.serializes
    assert kernel.spills <= MAX_SPILLS


@pytest.mark.parametrize("length", range(1, LONGEST + 1, 9))
def test_pieces_cover_all_tokens(length):
    pieces = backward_short.pieces_of(length)
    assert set(pieces[:-1]) <= {64}
    assert pieces[-1] in (16, 32, 64)
    assert length <= sum(pieces) < length + 32
