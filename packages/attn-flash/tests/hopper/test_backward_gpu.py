"""The backward kernels for sm_90a on a GPU, against the reference in float64."""

from __future__ import annotations

from itertools import pairwise
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


@pytest.fixture(autouse=True)
def unordered(monkeypatch):
    """Short sequences too, where nobody asks for an order."""
    from attn_flash._hopper import backward

    monkeypatch.setattr(backward, "_ORDERED", 0)


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

    def tensors(self, device, *, scale=1.0):
        """The arguments q, k, v and the gradients of out and lse."""
        queries, keys = (self.B, self.M, self.H, self.D), (self.B, self.N, self.H_KV, self.D)
        shapes = {"q": queries, "k": keys, "v": keys, "dout": queries}
        q, k, v, dout = (
            random_tensor(
                shape, seed=f"{self}-{name}", dtype=self.dtype, device=device, scale=scale
            )
            for name, shape in shapes.items()
        )
        dlse = random_tensor((self.B, self.H, self.M), seed=f"{self}-dlse", device=device)
        return q, k, v, dout, dlse

    @property
    def scale(self):
        return self.D**-0.5


def gradients(case, q, k, v, dout, dlse, out, lse, *, deterministic):
    from attn_flash._hopper.backward import attention_backward
    from attn_flash._hopper.backward_wide import attention_backward_wide

    if case.D > 128:
        return attention_backward_wide(dout, dlse, q, k, v, out, lse, case.scale, case.window)
    return attention_backward(dout, dlse, q, k, v, out, lse, case.scale, case.window, deterministic)


def exact(case, q, k, v, dout, dlse, dtype=torch.float64):
    """Gradients, out and lse of the reference, computed in another dtype."""
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention(*inputs, case.scale, case.window)
    outputs, cotangents = [out], [dout.to(dtype)]
    if dlse is not None:
        outputs, cotangents = [out, lse], [*cotangents, dlse.to(lse.dtype)]
    return torch.autograd.grad(outputs, inputs, cotangents), out.detach(), lse.detach()


def check(case, q, k, v, dout, dlse, *, deterministic):
    expected, out, lse = exact(case, q, k, v, dout, dlse)
    same_dtype, _, _ = exact(case, q, k, v, dout, dlse, case.dtype)
    with poison_new_allocations():
        actual = gradients(
            case, q, k, v, dout, dlse, out.to(case.dtype), lse.float(), deterministic=deterministic
        )
    for name, value, same, right in zip(NAMES, actual, same_dtype, expected, strict=True):
        assert value.dtype == case.dtype
        assert_within_budget(value, same, right, name=name)


HALF = torch.float16
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
    *(Case(1, 2, 2, 300, 333, D, CAUSAL) for D in (40, 48, 56, 72, 96, 120)),
    *(Case(1, 4, 2, 200, 260, D, window, HALF) for D in (64, 128) for window in (OPEN, CAUSAL)),
    *(Case(1, 2, 2, 4096, 4096, D, window) for D in (64, 128, 256) for window in (OPEN, CAUSAL)),
    *(Case(2, 4, 2, M, N, 256, window)
      for M, N in ((1, 127), (149, 83), (63, 700), (1000, 1000))
      for window in (OPEN, CAUSAL, (33, 18))),
    *(Case(1, 2, 1, 300, 333, D, CAUSAL, HALF) for D in (136, 192, 256)),
]  # fmt: skip


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, deterministic, device):
    check(case, *case.tensors(device), deterministic=deterministic)


@pytest.mark.parametrize("D", [64, 128])
def test_without_gradient_of_lse(D, device):
    case = Case(2, 4, 4, 130, 140, D, CAUSAL)
    *tensors, _ = case.tensors(device)
    check(case, *tensors, None, deterministic=True)


def test_large_scores(device):
    case = Case(2, 4, 4, 200, 200, 64, CAUSAL)
    check(case, *case.tensors(device, scale=10.0), deterministic=True)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 2, 3, 1)], ids=str)
def test_any_strides_and_nothing_beside_the_tensors(order, device):
    case = Case(2, 4, 2, 200, 150, 64, CAUSAL)
    *tensors, dlse = case.tensors(device)
    tensors = [embedded(x, order=order) for x in tensors]
    check(case, *tensors, dlse, deterministic=True)


def test_broadcast_gradient(device):
    case = Case(1, 2, 2, 200, 150, 128)
    q, k, v, dout, dlse = case.tensors(device)
    dout = torch.ones_like(dout[:1, :1, :1, :1]).expand_as(dout)
    check(case, q, k, v, dout, dlse, deterministic=True)


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (200, 100)], ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_same_bits_every_time(D, window, device):
    case = Case(4, 8, 2, 1100, 1300, D, window)
    tensors = case.tensors(device)
    *_, out, lse = exact(case, *tensors, torch.float32)
    out = out.to(case.dtype)

    def repeat():
        return gradients(case, *tensors, out, lse, deterministic=True)

    first = repeat()
    for _ in range(REPEATS):
        for name, value, expected in zip(NAMES, repeat(), first, strict=True):
            assert torch.equal(value, expected), name


def test_one_batch_element_alone(device):
    case = Case(3, 2, 2, 300, 300, 64)
    tensors = case.tensors(device)
    *_, out, lse = exact(case, *tensors, torch.float32)
    arguments = [*tensors, out.to(case.dtype), lse]
    together = gradients(case, *arguments, deterministic=True)
    alone = gradients(case, *(x[1:2] for x in arguments), deterministic=True)
    for name, value, expected in zip(NAMES, alone, together, strict=True):
        assert torch.equal(value, expected[1:2]), name


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("D", [64, 80, 128, 192, 256])
def test_both_passes(D, deterministic, device):
    """The public function, forward and backward."""
    case = Case(2, 4, 2, 200, 330, D, CAUSAL)
    q, k, v, dout, _ = case.tensors(device)
    expected, *_ = exact(case, q, k, v, dout, None)
    same_dtype, *_ = exact(case, q, k, v, dout, None, case.dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, causal=True, deterministic=deterministic, backend="hopper")
    actual = torch.autograd.grad(out, leaves, dout)
    for name, value, same, right in zip(NAMES, actual, same_dtype, expected, strict=True):
        assert_within_budget(value, same, right, name=name)


RAGGED = [
    ((150, 0, 1, 270), (100, 30, 300, 270), Case(1, 4, 2, 430, 710, 64, CAUSAL)),
    ((150, 0, 1, 270), (100, 30, 300, 270), Case(1, 4, 2, 430, 710, 128, CAUSAL)),
    ((900, 1100), (900, 1100), Case(1, 2, 2, 2000, 2000, 128)),
    ((130, 70), (130, 70), Case(1, 2, 2, 210, 205, 96, (60, 10), HALF)),
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("lengths_q, lengths_k, case", RAGGED, ids=str)
def test_ragged_sequences(lengths_q, lengths_k, case, deterministic, device):
    """Each is as it is alone; tokens after the last one get zeros."""
    from attn_flash._hopper.backward import attention_backward
    from attn_flash._hopper.problem import Sequences

    q, k, v, dout, dlse = case.tensors(device)
    starts_q, starts_k = (
        torch.tensor([0, *lengths], device=device).cumsum(0).int()
        for lengths in (lengths_q, lengths_k)
    )
    out, lse = torch.zeros_like(q), torch.full_like(dlse, float("-inf"))
    alone = []
    for (q0, q1), (k0, k1) in zip(
        pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True
    ):
        parts = q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], dout[:, q0:q1], dlse[:, :, q0:q1]
        same, *_ = exact(case, *parts, case.dtype)
        expected, part_out, part_lse = exact(case, *parts)
        out[:, q0:q1], lse[:, :, q0:q1] = part_out.to(case.dtype), part_lse.float()
        alone.append(((q0, q1), (k0, k1), (k0, k1), same, expected))
    sequences = Sequences(starts_q, starts_k, None, max(lengths_k))
    with poison_new_allocations():
        actual = attention_backward(
            dout, dlse, q, k, v, out, lse, case.scale, case.window, deterministic, sequences
        )
    for value, starts in zip(actual, (starts_q, starts_k, starts_k), strict=True):
        assert not value[:, starts[-1] :].any()
    for *places, same, expected in alone:
        for name, value, place, alike, right in zip(
            NAMES, actual, places, same, expected, strict=True
        ):
            if right.numel():
                assert_within_budget(value[:, slice(*place)], alike, right, name=name)
