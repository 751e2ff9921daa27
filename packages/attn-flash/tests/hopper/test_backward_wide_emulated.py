"""The backward kernels for wide heads on a CPU: their protocol of barriers, and their numbers.

The emulator delays whatever the hardware may delay, so that a missing wait shows as a wrong number
and a missing arrival as an error. What runs before the kernels is Triton's: plain PyTorch takes its
place here, and test_backward_sums_interpret.py compares the two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from attn_core.testing import assert_within_budget, poison_new_allocations, random_tensor
from attn_core.testing.hopper import ProtocolError
from attn_flash import reference

pytest.importorskip("triton.experimental.gluon")

pytestmark = pytest.mark.compile

OPEN = (-1, -1)
CAUSAL = (-1, 0)
HALF = torch.float16


class Case(NamedTuple):
    B: int
    H: int
    H_KV: int
    M: int
    N: int
    D: int
    window: tuple[int, int] = OPEN
    dtype: torch.dtype = torch.bfloat16

    def __str__(self):
        left, right = self.window
        window = {OPEN: "full", CAUSAL: "causal"}.get(self.window, f"window{left}_{right}")
        sizes = "b{}-h{}-kv{}-m{}-n{}-d{}".format(*self[:6])
        return f"{sizes}-{window}-{str(self.dtype).removeprefix('torch.')}"

    def tensors(self):
        """q, k, v and the gradients of out and lse."""
        queries, keys = (self.B, self.M, self.H, self.D), (self.B, self.N, self.H_KV, self.D)
        shapes = {"q": queries, "k": keys, "v": keys, "dout": queries}
        tensors = [
            random_tensor(shape, seed=f"{self}-{name}", dtype=self.dtype)
            for name, shape in shapes.items()
        ]
        return *tensors, random_tensor((self.B, self.H, self.M), seed=f"{self}-dlse")


def prepare_rows(dout, dlse, out, lse, block_d):
    """What `backward_sums.prepare_rows` computes."""
    B, M, H, _ = out.shape
    padded_m = -(-M // 128) * 128
    lse_log2 = torch.full((B, H, padded_m), math.inf)
    delta = torch.zeros(B, H, padded_m)
    lse_log2[:, :, :M] = (lse * math.log2(math.e)).masked_fill(lse == -math.inf, math.inf)
    delta[:, :, :M] = (dout.float() * out.float()).sum(-1).transpose(1, 2) - dlse
    return torch.stack([lse_log2, delta]).view(2, B * H, padded_m)


@pytest.fixture
def backward(hopper, monkeypatch):
    """The module of the kernels, on the emulator."""
    monkeypatch.setattr(hopper.backward_sums, "prepare_rows", prepare_rows)
    return hopper.backward_wide


def exact(case, tensors, dtype=torch.float64):
    """Gradients, out and lse of the reference, computed in another dtype."""
    *inputs, dout, dlse = (x.detach().to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = reference.attention(*leaves, case.D**-0.5, case.window)
    grads = torch.autograd.grad([out, lse], leaves, [dout, dlse.to(lse.dtype)])
    return grads, out.detach(), lse.detach()


def check(backward, case):
    tensors = case.tensors()
    expected, out, lse = exact(case, tensors)
    same, *_ = exact(case, tensors, case.dtype)
    q, k, v, dout, dlse = tensors
    with poison_new_allocations():
        actual = backward.attention_backward_wide(
            dout, dlse, q, k, v, out.to(case.dtype), lse.float(), case.D**-0.5, case.window
        )
    for name, value, alike, right in zip(("dq", "dk", "dv"), actual, same, expected, strict=True):
        assert_within_budget(value, alike, right, name=name)


CASES = [
    Case(1, 2, 1, 256, 256, 256),
    Case(2, 1, 1, 100, 201, 256, CAUSAL),
    Case(1, 2, 2, 200, 140, 192, CAUSAL, HALF),
    Case(1, 4, 2, 150, 270, 256, CAUSAL),
    Case(1, 2, 1, 190, 190, 136, (40, 0)),
    Case(1, 1, 1, 40, 300, 256, (3, 3)),
    Case(1, 2, 2, 130, 1, 160),
    Case(1, 1, 1, 1, 200, 256, CAUSAL),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, backward):
    check(backward, case)


# --- the emulator notices what a GPU may not ----------------------------------------------------

SMALL = Case(1, 1, 1, 256, 256, 256)


def forget(monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda *args, **options: None)


@pytest.mark.parametrize("name", ["meet_at_stage", "arrive_at_stage"])
def test_a_missing_arrival_at_a_named_barrier(name, backward, monkeypatch, impatient):
    forget(monkeypatch, backward, name)
    with pytest.raises((ProtocolError, AssertionError)):
        check(backward, SMALL)


@pytest.mark.parametrize("name", ["arrive", "wait"])
def test_a_missing_arrival_or_wait_at_an_mbarrier(name, backward, monkeypatch, impatient):
    forget(monkeypatch, backward.mbarrier, name)
    with pytest.raises((ProtocolError, AssertionError)):
        check(backward, SMALL)


def test_a_store_that_nobody_waits_for(backward, monkeypatch):
    forget(monkeypatch, backward.tma, "store_wait")
    with pytest.raises(ProtocolError, match="work in flight"):
        check(backward, SMALL)


def test_a_missing_fence(backward, monkeypatch):
    forget(monkeypatch, backward, "fence_async_shared")
    with pytest.raises((ProtocolError, AssertionError)):
        check(backward, SMALL)


def test_a_missing_wait_for_products(backward, monkeypatch):
    monkeypatch.setattr(backward, "warpgroup_mma_wait", lambda count, deps: deps[0])
    with pytest.raises((ProtocolError, AssertionError)):
        check(backward, SMALL)
