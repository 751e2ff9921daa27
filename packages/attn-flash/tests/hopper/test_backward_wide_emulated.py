"""The backward kernels for wide heads on a CPU: their protocol of barriers, and their numbers.

The emulator delays whatever the hardware may delay, so that a missing wait shows as a wrong number
and a missing arrival as an error. What runs before the kernels is Triton's: plain PyTorch takes its
place here, and test_backward_sums_interpret.py compares the two.
"""

from __future__ import annotations

import pytest

from attn_core.testing import poison_new_allocations
from attn_core.testing.hopper import ProtocolError

from . import sums_torch
from .cases import (
    CAUSAL,
    HALF,
    Case,
    assert_gradients,
    check_often,
    exact,
    forget,
    forget_wait,
)

pytest.importorskip("triton.experimental.gluon")

pytestmark = pytest.mark.compile


@pytest.fixture
def backward(hopper, monkeypatch):
    """The module of the kernels, on the emulator."""
    monkeypatch.setattr(hopper.backward_sums, "prepare_rows", sums_torch.prepare_rows)
    return hopper.backward_wide


def check(backward, case):
    tensors, (dout, dlse) = case.tensors(), case.gradients()
    expected, out, lse = exact(case, tensors, dout, dlse)
    same, *_ = exact(case, tensors, dout, dlse, case.dtype)
    with poison_new_allocations():
        actual = backward.attention_backward_wide(
            dout, dlse, *tensors, out.to(case.dtype), lse.float(), case.scale, case.window
        )
    assert_gradients(actual, same, expected)


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


def test_late_copies(backward, late):
    check(backward, Case(1, 2, 1, 100, 140, 136, CAUSAL))


# --- the emulator notices what a GPU may not ----------------------------------------------------

SMALL = Case(1, 1, 1, 256, 256, 256)


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


# Not of Q for dK: P is full when Q is. The wait is there for what the copy engine has written.
@pytest.mark.parametrize(
    "function, barrier",
    [
        ("_load_for_keys", "empty"),
        ("_accumulate_dv", "k_full"),
        ("_accumulate_dv", "q_full"),
        ("_accumulate_dv", "do_full"),
        ("_accumulate_dk", "v_full"),
        ("_accumulate_dk", "do_full"),
        ("_load_for_queries", "k_empty"),
        ("_load_for_queries", "v_empty"),
        ("_accumulate_dq", "q_full"),
        ("_accumulate_dq", "k_full"),
        ("_accumulate_dq", "v_full"),
    ],
)
def test_each_wait(function, barrier, backward, monkeypatch, impatient, late):
    forget_wait(monkeypatch, backward.mbarrier, function, barrier)
    with pytest.raises((ProtocolError, AssertionError)):
        check_often(check, backward, SMALL)


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
