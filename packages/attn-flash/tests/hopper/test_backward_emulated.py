"""The backward kernel for sm_90a on a CPU: its protocol of barriers, and its numbers.

The emulator delays whatever the hardware may delay, so that a missing wait shows as a wrong number
and a missing arrival as an error. What runs before and after the kernel is Triton's: plain PyTorch
takes its place here, and test_backward_sums_interpret.py compares the two.
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


def prepare(dout, dlse, out, lse, block_m, block_d, deterministic):
    """What `backward_sums.prepare` computes."""
    B, M, H, _ = out.shape
    padded_m = -(-M // 128) * 128
    lse_log2 = torch.full((B, H, padded_m), math.inf)
    delta = torch.zeros(B, H, padded_m)
    lse_log2[:, :, :M] = (lse * math.log2(math.e)).masked_fill(lse == -math.inf, math.inf)
    delta[:, :, :M] = (dout.float() * out.float()).sum(-1).transpose(1, 2) - dlse
    blocks = B * H * padded_m // block_m
    start = math.nan if deterministic else 0.0
    dq_sum = torch.full((blocks * block_m * block_d // 256, 256), start)
    counters = torch.zeros(1 + blocks, dtype=torch.int32)
    return torch.stack([lse_log2, delta]).view(2, B * H, padded_m), dq_sum, counters


def finish(dq_sum, counters, dq, scale, block_d):
    """What `backward_sums.finish` computes."""
    B, M, H, D = dq.shape
    if counters is not None:
        turns = counters[1:]
        rows = dq_sum.view(turns.numel(), -1)
        rows[turns == 0] = 0.0
    units = dq_sum.view(B, H, -1, block_d // 64, 8, 4, 8, 4, 2, 2)
    tiles = units.permute(0, 1, 2, 5, 8, 6, 3, 4, 7, 9).reshape(B, H, -1, block_d)
    dq.copy_((tiles[:, :, :M, :D] * scale).transpose(1, 2))


@pytest.fixture
def backward(hopper, monkeypatch):
    """The module of the kernel, on the emulator."""
    monkeypatch.setattr(hopper.backward_sums, "prepare", prepare)
    monkeypatch.setattr(hopper.backward_sums, "finish", finish)
    return hopper.backward


def exact(case, tensors, dtype=torch.float64):
    """Gradients, out and lse of the reference, computed in another dtype."""
    *inputs, dout, dlse = (x.to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = reference.attention(*leaves, case.D**-0.5, case.window)
    grads = torch.autograd.grad([out, lse], leaves, [dout, dlse.to(lse.dtype)])
    return grads, out.detach(), lse.detach()


def gradients(backward, case, tensors, deterministic):
    _, out, lse = exact(case, tensors)
    q, k, v, dout, dlse = tensors
    with poison_new_allocations():
        return backward.attention_backward(
            dout, dlse, q, k, v, out.to(case.dtype), lse.float(),
            case.D**-0.5, case.window, deterministic,
        )  # fmt: skip


def check(backward, case, deterministic=False):
    tensors = case.tensors()
    actual = gradients(backward, case, tensors, deterministic)
    same, *_ = exact(case, tensors, case.dtype)
    expected, *_ = exact(case, tensors)
    for name, value, alike, right in zip(("dq", "dk", "dv"), actual, same, expected, strict=True):
        assert_within_budget(value, alike, right, name=name)


CASES = [
    Case(1, 2, 1, 256, 256, 128),
    Case(2, 1, 1, 100, 301, 128, CAUSAL),
    Case(1, 2, 2, 300, 140, 64, CAUSAL, HALF),
    Case(1, 2, 1, 150, 270, 64, CAUSAL),
    Case(1, 2, 1, 270, 270, 64, (40, 0)),
    Case(1, 1, 1, 140, 300, 128, (30, 20)),
    Case(1, 1, 1, 40, 500, 96, (3, 3)),
    Case(1, 2, 2, 200, 150, 64),
    Case(1, 2, 2, 130, 1, 40),
    Case(1, 1, 1, 1, 200, 72, CAUSAL),
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, deterministic, backward):
    check(backward, case, deterministic)


@pytest.mark.parametrize("D", [64, 128])
def test_same_bits_every_time(D, backward):
    """Programs start in another order each time."""
    case = Case(1, 2, 1, 100, 390, D)
    tensors = case.tensors()
    first, again = (gradients(backward, case, tensors, deterministic=True) for _ in range(2))
    assert all(map(torch.equal, again, first))


# --- the emulator notices what a GPU may not ----------------------------------------------------

SMALL = Case(1, 1, 1, 256, 256, 128)


def forget(monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda *args, **options: None)


@pytest.mark.parametrize("name", ["meet_at", "arrive_at"])
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
    with pytest.raises(ProtocolError, match="without a fence"):
        check(backward, SMALL)


def test_a_sum_that_is_passed_on_before_it_is_written(backward, monkeypatch):
    forget(monkeypatch, backward, "wait_for_bulk_writes")
    with pytest.raises(AssertionError, match="dq"):
        check(backward, SMALL._replace(N=700), deterministic=True)
