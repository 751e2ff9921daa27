"""The backward kernel for sm_90a on a CPU: its protocol of barriers, and its numbers.

The emulator delays whatever the hardware may delay, so that a missing wait shows as a wrong number
and a missing arrival as an error.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from attn_core.testing import seed_from
from attn_core.testing.hopper import Descriptor, Pointer, ProtocolError, emulation, round_to, run
from attn_flash import reference

pytest.importorskip("triton.experimental.gluon")

pytestmark = pytest.mark.compile

OPEN = (-1, -1)
CAUSAL = (-1, 0)
# Of the largest number in a gradient: P and dS are rounded to 8 bits, and added up.
TOLERANCE = 0.02
MODULES = [
    f"attn_flash._hopper.{name}"
    for name in ("primitives", "problem", "backward_sums", "descriptors", "backward")
]


class Case(NamedTuple):
    B: int
    H: int
    H_KV: int
    M: int
    N: int
    D: int
    window: tuple[int, int] = OPEN
    deterministic: bool = False

    def __str__(self):
        window = {OPEN: "full", CAUSAL: "causal"}.get(
            self.window, "window{}_{}".format(*self.window)
        )
        sizes = "b{}-h{}-kv{}-m{}-n{}-d{}".format(*self[:6])
        return f"{sizes}-{window}" + ("-deterministic" if self.deterministic else "")


@pytest.fixture
def kernel():
    """The module of the kernel, on the emulator."""
    with emulation(*MODULES) as modules:
        yield modules[-1]


def inputs(case):
    """Arrays q, k, v, dout of (B, H, S, D) in bfloat16, and dlse."""
    generator = np.random.default_rng(seed_from(str(case)))
    queries, keys = (case.B, case.H, case.M, case.D), (case.B, case.H_KV, case.N, case.D)
    tensors = (generator.standard_normal(shape) for shape in (queries, keys, keys, queries))
    dlse = generator.standard_normal(queries[:3])
    return *(round_to(tensor, "bf16") for tensor in tensors), dlse


def expected_results(case, q, k, v, dout, dlse):
    """Gradients dq, dk, dv of the reference in float64, and its out and lse."""
    q, k, v, dout = (torch.from_numpy(x).double().transpose(1, 2) for x in (q, k, v, dout))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention(*leaves, case.D**-0.5, case.window)
    grads = torch.autograd.grad([out, lse], leaves, [dout, torch.from_numpy(dlse)])
    out, *grads = (x.detach().transpose(1, 2).numpy() for x in (out, *grads))
    return grads, out, lse.detach().numpy()


def rows(case, dout, dlse, out, lse, padded_m):
    """What `backward_sums.prepare` computes."""
    shape = case.B * case.H, padded_m
    lse_log2, delta = np.full(shape, np.inf, np.float32), np.zeros(shape, np.float32)
    delta[:, : case.M] = ((dout * out).sum(-1) - dlse).reshape(-1, case.M)
    lse_log2[:, : case.M] = np.where(np.isneginf(lse), np.inf, lse * math.log2(math.e)).reshape(
        -1, case.M
    )
    return lse_log2, delta


def finish(case, dq_sum, block_d):
    """What `backward_sums.finish` computes."""
    units = dq_sum.reshape(case.B, case.H, -1, block_d // 64, 8, 4, 8, 4, 2, 2)
    tiles = units.transpose(0, 1, 2, 5, 8, 6, 3, 4, 7, 9)
    return tiles.reshape(case.B, case.H, -1, block_d)[:, :, : case.M, : case.D] * case.D**-0.5


def compute(kernel, case, q, k, v, dout, dlse, out, lse):
    """Gradients of the emulated kernel; its programs start in a random order."""
    block_d = 64 if case.D <= 64 else 128
    block_m, block_n = 8192 // block_d, 128
    padded_m = -(-case.M // 128) * 128
    blocks_m, blocks_n = padded_m // block_m, -(-case.N // block_n)
    lse_log2, delta = rows(case, dout, dlse, out, lse, padded_m)
    dq_sum = np.zeros((case.B * case.H * padded_m * block_d // 256, 256), np.float32)
    dk, dv = np.full_like(k, np.nan), np.full_like(v, np.nan)
    counters = np.zeros(1 + case.B * case.H * blocks_m, np.int64)
    programs = np.arange(blocks_n * case.B * case.H_KV)
    if case.deterministic:  # which then go by their tickets
        np.random.default_rng(0).shuffle(programs)
    run(
        kernel._attention_backward_kernel,
        programs,
        *(Descriptor(x, (1, 1, block_m, block_d), "bf16") for x in (q, dout)),
        *(Descriptor(x, (1, 1, 64, block_d), "bf16") for x in (k, v, dk, dv)),
        *(Descriptor(x, (1, block_m), "fp32") for x in (lse_log2, delta)),
        Descriptor(dq_sum, (16, 256), "fp32"),
        Pointer(counters),
        Pointer(counters, 1),
        M=case.M,
        N=case.N,
        H=case.H,
        group=case.H // case.H_KV,
        blocks_m=blocks_m,
        blocks_n=blocks_n,
        num_heads=case.B * case.H_KV,
        heads_per_group=2,
        scale=case.D**-0.5,
        scale_log2=case.D**-0.5 * math.log2(math.e),
        left=case.window[0],
        right=case.window[1],
        HAS_LEFT=case.window[0] >= 0,
        HAS_RIGHT=case.window[1] >= 0,
        DETERMINISTIC=case.deterministic,
    )
    return finish(case, dq_sum, block_d), dk, dv


def check(kernel, case):
    tensors = inputs(case)
    grads, out, lse = expected_results(case, *tensors)
    actual = compute(kernel, case, *tensors, out, lse)
    for name, value, right in zip(("dq", "dk", "dv"), actual, grads, strict=True):
        error = np.abs(value - right).max() / max(np.abs(right).max(), 1e-3)
        assert error < TOLERANCE, f"{name} is off by {error:.2g} of its largest number"


CASES = [
    Case(1, 2, 1, 256, 256, 128),
    Case(1, 2, 2, 200, 301, 128, CAUSAL),
    Case(1, 1, 1, 300, 140, 64, CAUSAL),
    Case(1, 2, 1, 270, 270, 64, (40, 0)),
    Case(1, 1, 1, 140, 300, 128, (30, 20)),
    Case(1, 1, 1, 40, 500, 96, (3, 3)),
    Case(1, 1, 1, 130, 1, 40),
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, deterministic, kernel):
    check(kernel, case._replace(deterministic=deterministic))


# --- the emulator notices what a GPU may not ----------------------------------------------------

SMALL = Case(1, 1, 1, 256, 256, 128)


def forget(monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda *args, **options: None)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("attn_core.testing.hopper._PATIENCE", 0.5)


@pytest.mark.parametrize("name", ["meet_at", "arrive_at"])
def test_a_missing_arrival_at_a_named_barrier(name, kernel, monkeypatch, impatient):
    forget(monkeypatch, kernel, name)
    with pytest.raises((ProtocolError, AssertionError)):
        check(kernel, SMALL)


@pytest.mark.parametrize("name", ["arrive", "wait"])
def test_a_missing_arrival_or_wait_at_an_mbarrier(name, kernel, monkeypatch, impatient):
    forget(monkeypatch, kernel.mbarrier, name)
    with pytest.raises((ProtocolError, AssertionError)):
        check(kernel, SMALL)


def test_a_store_that_nobody_waits_for(kernel, monkeypatch):
    forget(monkeypatch, kernel.tma, "store_wait")
    with pytest.raises(ProtocolError, match="work in flight"):
        check(kernel, SMALL)
