"""The backward kernel for short sequences on a CPU: its protocol of barriers, and its numbers."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from attn_core.testing import assert_within_budget, poison_new_allocations, random_tensor
from attn_core.testing.hopper import ProtocolError
from attn_flash import reference

pytest.importorskip("triton.experimental.gluon")

pytestmark = pytest.mark.compile

OPEN = (-1, -1)
NAMES = ("dq", "dk", "dv")


class Case(NamedTuple):
    B: int
    H: int
    M: int
    D: int = 64
    dtype: torch.dtype = torch.bfloat16
    sign: int = 1  # of the scale

    def __str__(self):
        sign = "" if self.sign == 1 else "-negative"
        return "b{}-h{}-m{}-d{}-{}".format(*self[:4], str(self.dtype).removeprefix("torch.")) + sign

    @property
    def scale(self):
        return self.sign * self.D**-0.5

    def tensors(self):
        """q, k, v and the gradient of out."""
        shape = (self.B, self.M, self.H, self.D)
        return [
            random_tensor(shape, seed=f"{self}-{name}", dtype=self.dtype)
            for name in ("q", "k", "v", "dout")
        ]


def exact(case, tensors, dtype=torch.float64):
    """Gradients, out and lse of the reference, computed in another dtype."""
    *inputs, dout = (x.to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = reference.attention(*leaves, case.scale, OPEN)
    return torch.autograd.grad(out, leaves, dout), out.detach(), lse.detach()


def gradients(kernel, case, tensors):
    q, k, v, dout = tensors
    _, out, lse = exact(case, tensors)
    with poison_new_allocations():
        return kernel(dout, q, k, v, out.to(case.dtype), lse.float(), case.scale)


def check(hopper, case):
    tensors = case.tensors()
    actual = gradients(hopper.backward_short.attention_backward_short, case, tensors)
    same, *_ = exact(case, tensors, case.dtype)
    expected, *_ = exact(case, tensors)
    for name, value, alike, right in zip(NAMES, actual, same, expected, strict=True):
        assert_within_budget(value, alike, right, name=name)


CASES = [
    Case(1, 4, 197),
    Case(2, 3, 257),
    Case(1, 5, 64),
    Case(5, 1, 2),
    Case(1, 3, 65, 40),
    Case(1, 3, 190, 64, torch.float16, -1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, hopper):
    check(hopper, case)


def test_same_bits_every_time(hopper):
    case = Case(1, 5, 150)
    tensors = case.tensors()
    kernel = hopper.backward_short.attention_backward_short
    first, again = (gradients(kernel, case, tensors) for _ in range(2))
    assert all(map(torch.equal, again, first))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # rows that nobody stores
def test_keys_past_the_end_are_hidden(hopper):
    """Their score is 0: beside scores far below it, the probability would be inf."""
    case = Case(1, 1, 70)
    q, k, v, dout = case.tensors()
    tensors = (q.abs() + 16, -k.abs() - 16, v, dout)
    *_, lse = exact(case, tensors)
    assert lse.max() < -1000
    kernel = hopper.backward_short.attention_backward_short
    for grad in gradients(kernel, case, tensors):
        assert not grad.isnan().any()


# --- the emulator notices what a GPU may not ----------------------------------------------------

SMALL = Case(1, 5, 130)


def forget(monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda *args, **options: None)


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
@pytest.mark.parametrize("name", ["arrive", "wait"])
def test_a_missing_arrival_or_wait(name, hopper, monkeypatch, impatient):
    forget(monkeypatch, hopper.backward_short.mbarrier, name)
    with pytest.raises((ProtocolError, AssertionError)):
        check(hopper, SMALL)


def test_a_store_that_nobody_waits_for(hopper, monkeypatch):
    forget(monkeypatch, hopper.backward_short.tma, "store_wait")
    with pytest.raises((ProtocolError, AssertionError)):
        check(hopper, SMALL)


def test_a_missing_fence(hopper, monkeypatch):
    forget(monkeypatch, hopper.backward_short, "fence_async_shared")
    with pytest.raises(ProtocolError, match="without a fence"):
        check(hopper, SMALL)
