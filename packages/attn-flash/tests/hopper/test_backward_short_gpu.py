"""The backward kernel for short sequences on a GPU, and who computes what beside it."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from attn_core.testing import assert_within_budget, embedded, poison_new_allocations, random_tensor
from attn_flash import flash_attn_func, reference

pytest.importorskip("triton.experimental.gluon")

pytestmark = [
    pytest.mark.gpu,
    # The reference's: autograd's thread has no CUDA context when a process begins.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]

OPEN = (-1, -1)
CAUSAL = (-1, 0)
NAMES = ("dq", "dk", "dv")
REPEATS = 250


class Case(NamedTuple):
    B: int
    H: int
    M: int
    D: int = 64
    dtype: torch.dtype = torch.bfloat16
    factor: float = 1.0  # of the scale

    def __str__(self):
        factor = "" if self.factor == 1.0 else f"-scale{self.factor:g}"
        dtype = str(self.dtype).removeprefix("torch.")
        return "b{}-h{}-m{}-d{}".format(*self[:4]) + f"-{dtype}{factor}"

    @property
    def scale(self):
        return self.factor * self.D**-0.5

    def tensors(self, device):
        """The arguments q, k, v and the gradient of out."""
        shape = (self.B, self.M, self.H, self.D)
        return [
            random_tensor(shape, seed=f"{self}-{name}", dtype=self.dtype, device=device)
            for name in ("q", "k", "v", "dout")
        ]


def exact(q, k, v, dout, scale, window=OPEN, dtype=torch.float64):
    """Gradients, out and lse of the reference, computed in another dtype."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention(*inputs, scale, window)
    return torch.autograd.grad(out, inputs, dout.to(dtype)), out.detach(), lse.detach()


def gradients(q, k, v, dout, out, lse, scale):
    from attn_flash._hopper.backward_short import attention_backward_short

    return attention_backward_short(dout, q, k, v, out, lse, scale)


def check(tensors, scale):
    expected, out, lse = exact(*tensors, scale)
    dtype = tensors[0].dtype
    same_dtype, *_ = exact(*tensors, scale, dtype=dtype)
    with poison_new_allocations():
        actual = gradients(*tensors, out.to(dtype), lse.float(), scale)
    for name, value, same, right in zip(NAMES, actual, same_dtype, expected, strict=True):
        assert value.dtype == dtype
        assert_within_budget(value, same, right, name=name)


CASES = [
    *(Case(2, 3, M) for M in (2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 160, 191, 192, 193)),
    *(Case(40, 12, M) for M in (50, 128, 197, 257, 272)),
    *(Case(3, 100, 197, D) for D in (8, 40, 56)),
    Case(30, 16, 257, 64, torch.float16),
    Case(30, 16, 197, factor=-1.0),
    Case(30, 16, 100, factor=0.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, device):
    check(case.tensors(device), case.scale)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 2, 3, 1)], ids=str)
def test_any_strides_and_nothing_beside_the_tensors(order, device):
    case = Case(3, 50, 130)
    check([embedded(x, order=order) for x in case.tensors(device)], case.scale)


@pytest.mark.parametrize("M", [197, 257])
def test_same_bits_every_time(M, device):
    case = Case(40, 12, M)
    tensors = case.tensors(device)
    *_, out, lse = exact(*tensors, case.scale, dtype=torch.float32)
    arguments = (*tensors, out.to(case.dtype), lse, case.scale)
    first = gradients(*arguments)
    for _ in range(REPEATS):
        for name, value, expected in zip(NAMES, gradients(*arguments), first, strict=True):
            assert torch.equal(value, expected), name


def check_both_passes(case, scale, causal, device):
    q, k, v, dout = case.tensors(device)
    window = CAUSAL if causal else OPEN
    expected, *_ = exact(q, k, v, dout, scale, window)
    same_dtype, *_ = exact(q, k, v, dout, scale, window, case.dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, softmax_scale=scale, causal=causal, backend="hopper")
    actual = torch.autograd.grad(out, leaves, dout)
    for name, value, same, right in zip(NAMES, actual, same_dtype, expected, strict=True):
        assert_within_budget(value, same, right, name=name)


@pytest.mark.parametrize("case", [Case(40, 12, 197), Case(2, 3, 197), Case(2, 3, 600)], ids=str)
@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0], ids=lambda factor: f"scale{factor:g}")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_both_passes(case, factor, causal, device):
    """The public function, whichever kernel computes the gradients."""
    check_both_passes(case, factor * case.scale, causal, device)


@pytest.mark.parametrize("D", [64, 128])
def test_scales_that_are_not_positive_in_long_sequences(D, device):
    case = Case(1, 2, 1100, D)
    check_both_passes(case, -case.scale, True, device)
