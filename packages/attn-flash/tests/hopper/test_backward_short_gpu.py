"""The backward kernel for short sequences on a GPU, and who computes what beside it."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import embedded, poison_new_allocations
from attn_flash import flash_attn_func

from .cases import (
    CAUSAL,
    HALF,
    OPEN,
    REPEATS,
    assert_gradients,
    assert_same_bits,
    exact,
    short_case,
)

pytest.importorskip("triton.experimental.gluon")

pytestmark = [
    pytest.mark.gpu,
    # The reference's: autograd's thread has no CUDA context when a process begins.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]


def compute(case, tensors, dout, out, lse):
    from attn_flash._hopper.backward_short import attention_backward_short

    return attention_backward_short(dout, *tensors, out.to(case.dtype), lse.float(), case.scale)


def check(case, tensors, dout):
    expected, out, lse = exact(case, tensors, dout)
    same, *_ = exact(case, tensors, dout, dtype=case.dtype)
    with poison_new_allocations():
        actual = compute(case, tensors, dout, out, lse)
    assert_gradients(actual, same, expected)


CASES = [
    *(short_case(2, 3, M) for M in (2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 160, 191, 192, 193)),
    *(short_case(40, 12, M) for M in (50, 128, 197, 257, 272)),
    *(short_case(3, 100, 197, D) for D in (8, 40, 56)),
    short_case(30, 16, 257, 64, HALF),
    short_case(30, 16, 197, factor=-1.0),
    short_case(30, 16, 100, factor=0.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, device):
    dout, _ = case.gradients(device)
    check(case, case.tensors(device), dout)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 2, 3, 1)], ids=str)
def test_any_strides_and_nothing_beside_the_tensors(order, device):
    case = short_case(3, 50, 130)
    dout, _ = case.gradients(device)
    *tensors, dout = (embedded(x, order=order) for x in (*case.tensors(device), dout))
    check(case, tensors, dout)


@pytest.mark.parametrize("M", [197, 257])
def test_same_bits_every_time(M, device):
    case = short_case(40, 12, M)
    tensors, (dout, _) = case.tensors(device), case.gradients(device)
    *_, out, lse = exact(case, tensors, dout, dtype=torch.float32)
    first = compute(case, tensors, dout, out, lse)
    for _ in range(REPEATS):
        assert_same_bits(compute(case, tensors, dout, out, lse), first)


def check_both_passes(case, device):
    """The public function, whichever kernel computes the gradients."""
    tensors, (dout, _) = case.tensors(device), case.gradients(device)
    expected, *_ = exact(case, tensors, dout)
    same, *_ = exact(case, tensors, dout, dtype=case.dtype)
    leaves = [x.requires_grad_() for x in tensors]
    out = flash_attn_func(
        *leaves, softmax_scale=case.scale, window_size=case.window, backend="hopper"
    )
    assert_gradients(torch.autograd.grad(out, leaves, dout), same, expected)


@pytest.mark.parametrize("B, H, M", [(40, 12, 197), (2, 3, 197), (2, 3, 600)])
@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0], ids=lambda factor: f"scale{factor:g}")
@pytest.mark.parametrize("window", [OPEN, CAUSAL], ids=["full", "causal"])
def test_both_passes(B, H, M, factor, window, device):
    check_both_passes(short_case(B, H, M, factor=factor)._replace(window=window), device)


@pytest.mark.parametrize("D", [64, 128])
def test_scales_that_are_not_positive_in_long_sequences(D, device):
    case = short_case(1, 2, 1100, D, factor=-1.0)
    check_both_passes(case._replace(window=CAUSAL), device)
