"""Calls that are repeated, on a GPU: both passes have the bits of calls in full."""

from __future__ import annotations

import pytest
import torch

from attn_core.device import device_info
from attn_core.testing import random_tensor
from attn_core.testing.repeats import assert_repeats
from attn_triangle import triangle_attention

pytestmark = pytest.mark.gpu

H, R, D = 2, 8, 32


@pytest.mark.parametrize(
    "backend, residues", [("triton", 128), ("triton", 256), ("hopper", 256), ("hopper", 512)]
)
@pytest.mark.parametrize("deterministic", [True, False], ids=["det", "atomics"])
def test_both_passes(backend, residues, deterministic, device):
    if backend == "hopper" and device_info(device).arch != "sm_90":
        pytest.skip("needs compute capability 9.0")

    def make(i):
        def draw(*shape, n):
            dtype = torch.bfloat16
            return random_tensor(shape, seed=f"{i}-{n}", dtype=dtype, device=device)

        mask = torch.arange(residues, device=device) >= residues - 10 * (i + 1)
        wide = [draw(1, H, R, residues, D, n=n) for n in range(4)]
        return *wide, draw(1, H, residues, residues, n=4), mask.expand(1, R, residues)

    def function(q, k, v, dout, bias, mask):
        inputs = [x.detach().requires_grad_() for x in (q, k, v, bias)]
        out, lse = triangle_attention(
            *inputs, mask, return_lse=True, deterministic=deterministic, backend=backend
        )
        *grads, dbias = torch.autograd.grad(out, inputs, dout)
        if not deterministic:  # sums in any order: alike to a rounding or two, wrong by far more
            return out, lse, (dbias.float() / 8).round()
        return out, lse, *grads, dbias

    assert_repeats(function, make, passes=2)


def test_deterministic_algorithms_that_are_asked_for_later(device):
    """Calls in between leave the order of sums open."""
    q, k, v, dout = (
        random_tensor((1, H, R, 256, D), seed=n, dtype=torch.bfloat16, device=device)
        for n in range(4)
    )
    bias = random_tensor((1, H, 256, 256), seed=4, dtype=torch.bfloat16, device=device)

    def gradients():
        inputs = [x.detach().requires_grad_() for x in (q, k, v, bias)]
        out = triangle_attention(*inputs, deterministic=False)
        return torch.autograd.grad(out, inputs, dout)

    expected = None
    for is_asked in (False, True) * 5:
        torch.use_deterministic_algorithms(is_asked)
        try:
            grads = gradients()
        finally:
            torch.use_deterministic_algorithms(False)
        if not is_asked:
            continue
        expected = expected or grads
        for grad, first in zip(grads, expected, strict=True):
            assert torch.equal(grad, first)
