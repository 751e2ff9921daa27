"""The backward kernel for short sequences on a CPU: its protocol of barriers, and its numbers."""

from __future__ import annotations

import pytest

from attn_core.testing import poison_new_allocations
from attn_core.testing.hopper import ProtocolError

from .cases import (
    HALF,
    assert_gradients,
    assert_same_bits,
    check_often,
    exact,
    forget,
    forget_wait,
    short_case,
)

pytest.importorskip("triton.experimental.gluon")

pytestmark = pytest.mark.compile


def gradients(hopper, case, tensors, dout):
    _, out, lse = exact(case, tensors, dout)
    with poison_new_allocations():
        return hopper.backward_short.attention_backward_short(
            dout, *tensors, out.to(case.dtype), lse.float(), case.scale
        )


def check(hopper, case):
    tensors, (dout, _) = case.tensors(), case.gradients()
    same, *_ = exact(case, tensors, dout, dtype=case.dtype)
    expected, *_ = exact(case, tensors, dout)
    assert_gradients(gradients(hopper, case, tensors, dout), same, expected)


CASES = [
    short_case(1, 4, 197),
    short_case(2, 3, 257),
    short_case(1, 5, 64),
    short_case(5, 1, 2),
    short_case(1, 3, 65, 40),
    short_case(1, 3, 190, 64, HALF, -1.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, hopper):
    check(hopper, case)


def test_late_copies(hopper, late):
    check(hopper, short_case(2, 3, 150))


def test_same_bits_every_time(hopper):
    case = short_case(1, 5, 150)
    tensors, (dout, _) = case.tensors(), case.gradients()
    first, again = (gradients(hopper, case, tensors, dout) for _ in range(2))
    assert_same_bits(again, first)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # rows that nobody stores
def test_keys_past_the_end_are_hidden(hopper):
    """Their score is 0: beside scores far below it, the probability would be inf."""
    case = short_case(1, 1, 70)
    (q, k, v), (dout, _) = case.tensors(), case.gradients()
    tensors = (q.abs() + 16, -k.abs() - 16, v)
    *_, lse = exact(case, tensors, dout)
    assert lse.max() < -1000
    for grad in gradients(hopper, case, tensors, dout):
        assert not grad.isnan().any()


# --- the emulator notices what a GPU may not ----------------------------------------------------

SMALL = short_case(1, 5, 130)
ONE_TILE = short_case(1, 9, 50)  # of a head: the loader is heads ahead


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
@pytest.mark.parametrize("name", ["arrive", "wait"])
def test_a_missing_arrival_or_wait(name, hopper, monkeypatch, impatient):
    forget(monkeypatch, hopper.backward_short.mbarrier, name)
    with pytest.raises((ProtocolError, AssertionError)):
        check(hopper, SMALL)


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
@pytest.mark.parametrize(
    "function, barrier",
    [
        ("_load_tile", "tile_empty"),
        ("_load_out", "out_empty"),
        ("_load", "pieces_empty"),
        ("_start_tile", "tile_full"),
        ("_start_tile", "left_full"),
        ("_start_tile", "right_full"),
        ("_delta", "out_full"),
        ("_compute_dk_dv", "rows_full"),
    ],
)
def test_each_wait(function, barrier, hopper, monkeypatch, impatient, late):
    forget_wait(monkeypatch, hopper.backward_short.mbarrier, function, barrier)
    with pytest.raises((ProtocolError, AssertionError)):
        check_often(check, hopper, ONE_TILE if barrier == "pieces_empty" else SMALL)


def test_a_store_that_nobody_waits_for(hopper, monkeypatch):
    forget(monkeypatch, hopper.backward_short.tma, "store_wait")
    with pytest.raises((ProtocolError, AssertionError)):
        check(hopper, SMALL)


def test_a_missing_fence(hopper, monkeypatch):
    forget(monkeypatch, hopper.backward_short, "fence_async_shared")
    with pytest.raises(ProtocolError, match="without a fence"):
        check(hopper, SMALL)
