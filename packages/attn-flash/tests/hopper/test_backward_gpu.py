"""The backward kernels for sm_90a on a GPU, against the reference in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from attn_core.testing import embedded, poison_new_allocations
from attn_flash import flash_attn_func

from .cases import (
    CAUSAL,
    HALF,
    OPEN,
    REPEATS,
    Case,
    assert_gradients,
    assert_same_bits,
    exact,
)

pytest.importorskip("triton.experimental.gluon")

pytestmark = [
    pytest.mark.gpu,
    # The reference's: autograd's thread has no CUDA context when a process begins.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]


# How programs agree on the sum of dq: whether in order, and whether as for many keys.
ADDITIONS = {
    "claimed": (False, False),
    "cleared": (False, True),
    "deterministic": (True, False),
    "deterministic-long": (True, True),
}


@pytest.fixture(params=ADDITIONS)
def deterministic(request, monkeypatch):
    from attn_flash._hopper import backward

    is_ordered, are_many = ADDITIONS[request.param]
    limit = 0 if are_many else 1 << 20
    monkeypatch.setattr(backward, "_CLAIMED", dict.fromkeys(backward._CLAIMED, limit))
    monkeypatch.setattr(backward, "_PERSISTENT", limit)
    return is_ordered


def compute(case, tensors, dout, dlse, out, lse, *, deterministic):
    from attn_flash._hopper.backward import attention_backward
    from attn_flash._hopper.backward_wide import attention_backward_wide

    arguments = dout, dlse, *tensors, out.to(case.dtype), lse.float(), case.scale, case.window
    if case.D > 128:
        return attention_backward_wide(*arguments)
    return attention_backward(*arguments, deterministic)


def check(case, tensors, dout, dlse, *, deterministic):
    expected, out, lse = exact(case, tensors, dout, dlse)
    same, *_ = exact(case, tensors, dout, dlse, case.dtype)
    with poison_new_allocations():
        actual = compute(case, tensors, dout, dlse, out, lse, deterministic=deterministic)
    assert_gradients(actual, same, expected)


CASES = [
    *(Case(2, 3, 3, S, S, 64) for S in (63, 64, 65, 127, 129, 197, 257, 577, 1000)),
    *(Case(2, 3, 3, S, S, 128, CAUSAL) for S in (2, 64, 127, 129, 1000, 1025)),
    *(Case(1, 2, 1, M, N, 64, CAUSAL) for M, N in ((1, 127), (149, 83), (63, 700), (1023, 7))),
    *(Case(1, 2, 1, M, N, 128) for M, N in ((1, 127), (149, 83), (63, 700), (1023, 7))),
    *(Case(1, 2, 2, *lengths, 64, window)
      for lengths in ((190, 300), (300, 190), (1400, 1400))
      for window in ((33, 18), (128, 0), (20, -1), (-1, 70))),
    *(Case(1, 2, 2, 700, 900, 128, window) for window in ((33, 18), (300, 0), (20, -1))),
    *(Case(2, 8, heads_kv, 300, 400, D, CAUSAL) for heads_kv in (1, 2) for D in (64, 128)),
    *(Case(2, 6, 2, 300, 400, D, CAUSAL) for D in (64, 128)),
    *(Case(1, 2, 2, 300, 333, D, CAUSAL) for D in (40, 48, 56, 72, 96, 120)),
    *(Case(1, 4, 2, 200, 260, D, window, HALF) for D in (64, 128) for window in (OPEN, CAUSAL)),
    *(Case(1, 2, 2, 4096, 4096, D, window) for D in (64, 128, 256) for window in (OPEN, CAUSAL)),
    *(Case(2, 4, 2, M, N, 256, window)
      for M, N in ((1, 127), (149, 83), (63, 700), (1000, 1000))
      for window in (OPEN, CAUSAL, (33, 18))),
    *(Case(1, 2, 1, 300, 333, D, CAUSAL, HALF) for D in (136, 192, 256)),
    # More tiles than multiprocessors, so that programs compute several, but for 24 heads of keys:
    # two programs share each of those.
    *(Case(3, 48, heads_kv, 700, 700, 64, window)
      for heads_kv in (48, 24, 16) for window in (OPEN, CAUSAL, (100, 0))),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, deterministic, device):
    check(case, case.tensors(device), *case.gradients(device), deterministic=deterministic)


@pytest.mark.parametrize("D", [64, 128])
def test_without_gradient_of_lse(D, device):
    case = Case(2, 4, 4, 130, 140, D, CAUSAL)
    dout, _ = case.gradients(device)
    check(case, case.tensors(device), dout, None, deterministic=True)


def test_large_scores(device):
    case = Case(2, 4, 4, 200, 200, 64, CAUSAL)
    tensors, gradients = (make(device, scale=10.0) for make in (case.tensors, case.gradients))
    check(case, tensors, *gradients, deterministic=True)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 2, 3, 1)], ids=str)
def test_any_strides_and_nothing_beside_the_tensors(order, device):
    case = Case(2, 4, 2, 200, 150, 64, CAUSAL)
    dout, dlse = case.gradients(device)
    *tensors, dout = (embedded(x, order=order) for x in (*case.tensors(device), dout))
    check(case, tensors, dout, dlse, deterministic=True)


def test_broadcast_gradient(device):
    case = Case(1, 2, 2, 200, 150, 128)
    dout, dlse = case.gradients(device)
    dout = torch.ones_like(dout[:1, :1, :1, :1]).expand_as(dout)
    check(case, case.tensors(device), dout, dlse, deterministic=True)


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (200, 100)], ids=str)
@pytest.mark.parametrize("D, H_KV", [(64, 8), (64, 16), (128, 4), (128, 8), (256, 8)])
def test_same_bits_every_time(D, H_KV, window, device):
    case = Case(4, 16, H_KV, 1100, 1300, D, window)
    tensors, (dout, dlse) = case.tensors(device), case.gradients(device)
    *_, out, lse = exact(case, tensors, dout, dlse, torch.float32)

    def repeat():
        return compute(case, tensors, dout, dlse, out, lse, deterministic=True)

    first = repeat()
    for _ in range(REPEATS):
        assert_same_bits(repeat(), first)


def test_one_batch_element_alone(device):
    case = Case(3, 2, 2, 300, 300, 64)
    tensors, (dout, dlse) = case.tensors(device), case.gradients(device)
    *_, out, lse = exact(case, tensors, dout, dlse, torch.float32)
    together = compute(case, tensors, dout, dlse, out, lse, deterministic=True)
    *tensors, dout, dlse, out, lse = (x[1:2] for x in (*tensors, dout, dlse, out, lse))
    alone = compute(case, tensors, dout, dlse, out, lse, deterministic=True)
    assert_same_bits(alone, [x[1:2] for x in together])


@pytest.mark.parametrize("D", [64, 80, 128, 192, 256])
def test_both_passes(D, deterministic, device):
    """The public function, forward and backward."""
    case = Case(2, 4, 2, 200, 330, D, CAUSAL)
    tensors, (dout, _) = case.tensors(device), case.gradients(device)
    expected, *_ = exact(case, tensors, dout)
    same, *_ = exact(case, tensors, dout, dtype=case.dtype)
    leaves = [x.requires_grad_() for x in tensors]
    out = flash_attn_func(*leaves, causal=True, deterministic=deterministic, backend="hopper")
    assert_gradients(torch.autograd.grad(out, leaves, dout), same, expected)


RAGGED = [
    ((150, 0, 1, 270), (100, 30, 300, 270), Case(1, 4, 2, 430, 710, 64, CAUSAL)),
    ((150, 0, 1, 270), (100, 30, 300, 270), Case(1, 4, 2, 430, 710, 128, CAUSAL)),
    ((900, 1100), (900, 1100), Case(1, 2, 2, 2000, 2000, 128)),
    ((130, 70), (130, 70), Case(1, 2, 2, 210, 205, 96, (60, 10), HALF)),
]


@pytest.mark.parametrize("lengths_q, lengths_k, case", RAGGED, ids=str)
def test_ragged_sequences(lengths_q, lengths_k, case, deterministic, device):
    """Each is as it is alone; tokens after the last one get zeros."""
    from attn_flash._hopper.backward import attention_backward
    from attn_flash._hopper.problem import Sequences

    (q, k, v), (dout, dlse) = case.tensors(device), case.gradients(device)
    starts_q, starts_k = (
        torch.tensor([0, *lengths], device=device).cumsum(0).int()
        for lengths in (lengths_q, lengths_k)
    )
    places = [
        (slice(*place_q), slice(*place_k))
        for place_q, place_k in zip(
            pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True
        )
    ]
    out, lse = torch.zeros_like(q), torch.full_like(dlse, float("-inf"))
    alone = []
    for at_q, at_k in places:
        parts = (q[:, at_q], k[:, at_k], v[:, at_k]), dout[:, at_q], dlse[:, :, at_q]
        same, *_ = exact(case, *parts, case.dtype)
        expected, part_out, part_lse = exact(case, *parts)
        out[:, at_q], lse[:, :, at_q] = part_out.to(case.dtype), part_lse.float()
        alone.append((same, expected))
    sequences = Sequences(starts_q, starts_k, None, max(lengths_k))
    with poison_new_allocations():
        dq, dk, dv = attention_backward(
            dout, dlse, q, k, v, out, lse, case.scale, case.window, deterministic, sequences
        )
    for grad, starts in ((dq, starts_q), (dk, starts_k), (dv, starts_k)):
        assert not grad[:, starts[-1] :].any()
    for (at_q, at_k), (same, expected) in zip(places, alone, strict=True):
        assert_gradients((dq[:, at_q], dk[:, at_k], dv[:, at_k]), same, expected)
