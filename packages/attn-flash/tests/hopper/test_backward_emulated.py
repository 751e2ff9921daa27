"""The backward kernel for sm_90a on a CPU: its protocol of barriers, and its numbers.

The emulator delays whatever the hardware may delay, so that a missing wait shows as a wrong number
and a missing arrival as an error. What runs before and after the kernel is Triton's: plain PyTorch
takes its place here, and test_backward_sums_interpret.py compares the two.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from attn_core.testing import assert_within_budget, poison_new_allocations, random_tensor
from attn_core.testing.hopper import ProtocolError
from attn_flash import reference
from attn_flash._hopper.problem import Sequences

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


def padded(M, starts):
    """How many rows M queries are padded to, and where queries are: (first row, first, last)."""
    if starts is None:
        return -(-M // 128) * 128, [(0, 0, M)]
    starts = starts.tolist()
    places = [
        ((first // 128 + i) * 128, first, last) for i, (first, last) in enumerate(pairwise(starts))
    ]
    return (M // 128 + len(places)) * 128, places


def prepare(dout, dlse, out, lse, block_m, block_d, deterministic, starts=None):
    """What `backward_sums.prepare` computes."""
    B, M, H, _ = out.shape
    padded_m, places = padded(M, starts)
    lse_log2 = torch.full((B, H, padded_m), math.inf)
    delta = torch.zeros(B, H, padded_m)
    all_lse = (lse * math.log2(math.e)).masked_fill(lse == -math.inf, math.inf)
    all_delta = (dout.float() * out.float()).sum(-1).transpose(1, 2) - dlse
    for row, first, last in places:
        lse_log2[:, :, row : row + last - first] = all_lse[:, :, first:last]
        delta[:, :, row : row + last - first] = all_delta[:, :, first:last]
    blocks = B * H * padded_m // block_m
    start = math.nan if deterministic else 0.0
    dq_sum = torch.full((blocks * block_m * block_d // 256, 256), start)
    counters = torch.zeros(1 + blocks, dtype=torch.int32)
    return torch.stack([lse_log2, delta]).view(2, B * H, padded_m), dq_sum, counters


def finish(dq_sum, counters, dq, scale, block_d, starts=None):
    """What `backward_sums.finish` computes."""
    B, M, H, D = dq.shape
    if counters is not None:
        turns = counters[1:]
        rows = dq_sum.view(turns.numel(), -1)
        rows[turns == 0] = 0.0
    units = dq_sum.view(B, H, -1, block_d // 64, 8, 4, 8, 4, 2, 2)
    tiles = units.permute(0, 1, 2, 5, 8, 6, 3, 4, 7, 9).reshape(B, H, -1, block_d)
    for row, first, last in padded(M, starts)[1]:
        dq[:, first:last] = (tiles[:, :, row : row + last - first, :D] * scale).transpose(1, 2)


def new_gradient(x, starts):
    """What `backward_sums.new_gradient` returns."""
    grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    if starts is not None:
        grad[:, starts[-1] :] = 0.0
    return grad


@pytest.fixture
def backward(hopper, monkeypatch):
    """The module of the kernel, on the emulator."""
    monkeypatch.setattr(hopper.backward_sums, "prepare", prepare)
    monkeypatch.setattr(hopper.backward_sums, "finish", finish)
    monkeypatch.setattr(hopper.backward_sums, "new_gradient", new_gradient)
    monkeypatch.setattr(hopper.backward, "_ORDERED", 0)
    return hopper.backward


def exact(case, tensors, dtype=torch.float64):
    """Gradients, out and lse of the reference, computed in another dtype."""
    *inputs, dout, dlse = (x.detach().to(dtype) for x in tensors)
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


RAGGED = [
    ((150, 0, 1, 270), (100, 30, 300, 270), Case(1, 2, 1, 430, 710, 64, CAUSAL)),
    ((40, 200), (140, 129), Case(1, 1, 1, 260, 300, 128)),
    ((130, 70), (130, 70), Case(1, 2, 2, 200, 200, 96, (60, 10), HALF)),
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("lengths_q, lengths_k, case", RAGGED, ids=str)
def test_ragged_sequences(lengths_q, lengths_k, case, deterministic, backward):
    """Each is as it is alone; tokens after the last one get zeros."""
    q, k, v, dout, dlse = case.tensors()
    out, lse = torch.zeros_like(q), torch.full((1, case.H, case.M), -math.inf)
    starts_q, starts_k = (
        torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)
    )
    places = list(zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True))
    alone = []
    for (q0, q1), (k0, k1) in places:
        parts = q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], dout[:, q0:q1], dlse[:, :, q0:q1]
        same, *_ = exact(case, parts, case.dtype)
        expected, part_out, part_lse = exact(case, parts)
        out[:, q0:q1], lse[:, :, q0:q1] = part_out.to(case.dtype), part_lse.float()
        alone.append((same, expected))
    with poison_new_allocations():
        actual = backward.attention_backward(
            dout, dlse, q, k, v, out, lse, case.D**-0.5, case.window, deterministic,
            Sequences(starts_q, starts_k, None, max(lengths_k)),
        )  # fmt: skip
    for x, starts in zip(actual, (starts_q, starts_k, starts_k), strict=True):
        assert not x[:, starts[-1] :].any()
    for ((q0, q1), (k0, k1)), (same, expected) in zip(places, alone, strict=True):
        values = actual[0][:, q0:q1], actual[1][:, k0:k1], actual[2][:, k0:k1]
        for name, value, alike, right in zip(
            ("dq", "dk", "dv"), values, same, expected, strict=True
        ):
            if value.numel():
                assert_within_budget(value, alike, right, name=name)


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
