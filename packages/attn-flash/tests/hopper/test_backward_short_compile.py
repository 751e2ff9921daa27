"""The backward kernel for short sequences compiled ahead of time: shared memory and spills."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing.compilation import compile_ahead

pytest.importorskip("triton.experimental.gluon")

from attn_flash._hopper import backward_short
from attn_flash._hopper.descriptors import rows_descriptor
from attn_flash._hopper.schedules import _SHORT_BACKWARD as LONGEST

pytestmark = pytest.mark.compile

MAX_SPILLS = 16  # bytes


def type_of(value):
    if isinstance(value, backward_short.Rows):
        tile = rows_descriptor(*value)
        dtype = {torch.float16: "fp16", torch.bfloat16: "bf16"}[tile.base.dtype]
        return f"tensordesc<{dtype}{tile.block_shape},{tile.layout!r}>"
    if isinstance(value, torch.Tensor):
        return "*fp32:16"
    return "fp32" if isinstance(value, float) else "i32"


@pytest.mark.parametrize(
    "M, dtype",
    [(M, torch.bfloat16) for M in (50, 128, 197, LONGEST)] + [(LONGEST, torch.float16)],
    ids=str,
)
def test_products_overlap_and_nothing_spills(M, dtype, monkeypatch):
    compiled = []

    def launch(num_programs, args, constants, maxnreg):
        kernel = original._kernel
        names = kernel.arg_names
        signature = {name: type_of(x) for name, x in zip(names, args, strict=False)}
        options = {"num_warps": 4, "maxnreg": maxnreg}
        compiled.append(compile_ahead(kernel, signature, constants, "sm_90", **options))

    original = backward_short._launch
    monkeypatch.setattr(backward_short, "_launch", launch)
    monkeypatch.setattr(backward_short.host, "num_sms", lambda device: 132)
    x = torch.zeros(1, M, 2, 64, dtype=dtype)
    backward_short.attention_backward_short(x, x, x, x, x, torch.zeros(1, 2, M), 0.1)
    (kernel,) = compiled
    assert kernel.fits
    assert not kernel.serializes
    assert kernel.spills <= MAX_SPILLS


@pytest.mark.parametrize("length", range(1, LONGEST + 1, 9))
def test_pieces_cover_all_tokens(length):
    pieces = backward_short.pieces_of(length)
    assert set(pieces[:-1]) <= {64}
    assert pieces[-1] in (16, 32, 64)
    assert length <= sum(pieces) < length + 32
