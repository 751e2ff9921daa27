"""The forward kernels for sm_90a on a CPU: their protocols of barriers, and their numbers.

The emulator delays whatever the hardware may delay, so that a missing wait shows as a wrong number
and a missing arrival as an error.
"""

from __future__ import annotations

import math

import pytest
import torch

from attn_core.testing import poison_new_allocations
from attn_core.testing.hopper import ProtocolError
from attn_flash import reference

from ..cases import assert_nan_where_expected, with_nan
from .cases import CAUSAL, HALF, Case, Ragged, assert_outputs, forget

pytest.importorskip("triton.experimental.gluon")

pytestmark = pytest.mark.compile


def check(hopper, case, schedule=None):
    """Compute a case as `attention` does, or with a schedule of the kernel for any length."""
    q, k, v = case.tensors()
    options = case.options()
    same = reference.attention_with(q.nan_to_num(), k.nan_to_num(), v.nan_to_num(), options)
    exact = reference.attention_with(*(x.nan_to_num().double() for x in (q, k, v)), options)
    if schedule is None:
        with poison_new_allocations():
            out, lse = hopper.attention.attention(q, k, v, options)
    else:
        out, lse = torch.full_like(q, math.nan), torch.full(exact[1].shape, math.nan)
        hopper.forward.forward(q, k, v, out, lse, case.scale, case.window, schedule)
    assert hopper.counter.item() == 0
    assert_outputs((out, lse), same, exact)


CASES = [
    Case(1, 2, 1, 256, 256, 128),
    Case(1, 5, 5, 70, 260, 64, CAUSAL),
    Case(1, 2, 2, 200, 301, 128, CAUSAL),
    Case(2, 2, 1, 300, 140, 64, CAUSAL, HALF),
    Case(1, 2, 1, 270, 270, 64, (40, 0)),
    Case(1, 1, 1, 140, 300, 128, (30, 20)),
    Case(1, 2, 1, 450, 450, 128, (100, 0)),  # consumers leave blocks out at either end
    Case(1, 1, 1, 300, 140, 96, (90, 70)),
    Case(1, 1, 1, 150, 150, 96, CAUSAL, factor=-1.0),
    Case(1, 2, 1, 100, 200, 192, CAUSAL),
    Case(1, 4, 2, 130, 100, 256, (90, -1)),
    Case(1, 2, 1, 140, 130, 256),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_schedule_of_the_problem(case, hopper):
    check(hopper, case)


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("consumers", [2, 3])
def test_every_way_to_share_tiles_out(consumers, is_dynamic, hopper):
    schedule = hopper.schedules.Schedule(consumers, is_dynamic=is_dynamic)
    check(hopper, Case(1, 2, 1, 250, 200, 64, CAUSAL), schedule)


@pytest.mark.parametrize("window", [(100, 0), (50, 80), (200, -1), (-1, 60)], ids=str)
@pytest.mark.parametrize("consumers", [2, 3])
def test_consumers_that_skip_blocks(consumers, window, hopper):
    schedule = hopper.schedules.Schedule(
        consumers, 64, k_stages=3, v_stages=3, takes_turns=False, is_dynamic=True, skips=True
    )
    check(hopper, Case(1, 2, 1, 450, 400, 64, window), schedule)


RAGGED = [
    Ragged((130, 0, 200, 1), (70, 20, 260, 0)),
    Ragged((150, 260), (130, 270), window=CAUSAL),
    Ragged((150, 60, 90), (200, 40, 130), D=128, window=CAUSAL),
    Ragged((140, 70), (140, 90), D=128, window=(30, 10)),
    Ragged((300, 0, 40), (300, 90, 0), D=128, window=(100, 0)),
    Ragged((150, 80), (150, 300), (60, 0), H_KV=2, window=CAUSAL, dtype=HALF),
    Ragged((140, 70), (90, 140), (90, 1), D=256),
    Ragged((3, 1, 2), (40, 0, 9), H=1, window=CAUSAL),
    Ragged((), ()),
]


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_ragged_sequences(case, hopper):
    check(hopper, case)


def test_programs_without_a_tile(hopper, monkeypatch):
    monkeypatch.setattr(hopper.problem, "num_sms", lambda device: 7)
    check(hopper, Ragged((9, 0), (30, 0), H=1))


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 3, 1, 197, 197, 64),
        Case(2, 2, 2, 257, 257, 64),
        Case(1, 10, 10, 64, 130, 64),  # more heads a program than it has room for, as the next
        Case(1, 6, 6, 65, 300, 64, dtype=HALF),
        Case(1, 7, 7, 30, 1, 40),
        Case(1, 4, 2, 130, 90, 64, factor=-1.0),
    ],
    ids=str,
)
def test_short_sequences(case, hopper, monkeypatch):
    monkeypatch.delattr(hopper.attention, "forward")
    check(hopper, case)


def test_pieces_cover_the_keys(hopper):
    for length in range(1, 321):
        pieces = hopper.forward_short.pieces_of(length)
        assert length <= sum(pieces) <= -(-length // 16) * 16 + 16
        assert all(piece in (16, 32, 64, 128) for piece in pieces)


# --- the emulator notices what a GPU may not ----------------------------------------------------

LONG = Case(1, 2, 1, 256, 256, 128)
SHORT = Case(1, 4, 1, 256, 256, 64)


@pytest.mark.parametrize(
    "role, name",
    [
        ("consumer", "meet_at"),
        ("consumer", "arrive_at"),
        ("consumer", "arrive_at_stage"),
        ("producer", "meet_at_stage"),
        ("producer", "_absorb"),
    ],
)
def test_a_missing_arrival_at_a_named_barrier(role, name, hopper, monkeypatch, impatient):
    forget(monkeypatch, getattr(hopper, f"forward_{role}"), name)
    with pytest.raises((ProtocolError, AssertionError)):
        check(hopper, LONG)


@pytest.mark.parametrize("name", ["arrive", "wait"])
@pytest.mark.parametrize("case", [LONG, SHORT], ids=str)
def test_a_missing_arrival_or_wait_at_an_mbarrier(case, name, hopper, monkeypatch, impatient):
    forget(monkeypatch, hopper.forward.mbarrier, name)
    with pytest.raises((ProtocolError, AssertionError)):
        check(hopper, case._replace(H=8))


def test_a_wrong_phase(hopper, monkeypatch, impatient):
    mbarrier = hopper.forward_short.mbarrier
    wait = mbarrier.wait
    monkeypatch.setattr(mbarrier, "wait", lambda barrier, phase: wait(barrier, phase ^ 1))
    with pytest.raises((ProtocolError, AssertionError)):
        check(hopper, SHORT)


def test_products_that_nobody_waits_for(hopper, monkeypatch):
    consumer = hopper.forward_consumer
    monkeypatch.setattr(consumer, "warpgroup_mma_wait", lambda pendings, deps: deps[0])
    with pytest.raises((ProtocolError, AssertionError)):
        check(hopper, LONG)


def test_a_store_that_nobody_waits_for(hopper, monkeypatch):
    forget(monkeypatch, hopper.forward_consumer.tma, "store_wait")
    with pytest.raises(ProtocolError, match="work in flight"):
        check(hopper, LONG)


def test_a_missing_fence(hopper, monkeypatch):
    forget(monkeypatch, hopper.forward_consumer, "fence_async_shared")
    with pytest.raises(ProtocolError, match="without a fence"):
        check(hopper, LONG)


def test_buffers_that_are_filled_too_early(hopper, monkeypatch):
    """Keys of the block after next overwrite those that products are still to read."""
    forget(monkeypatch, hopper.forward_producer, "meet_at_stage")
    forget(monkeypatch, hopper.forward_consumer, "arrive_at_stage")
    with pytest.raises((ProtocolError, AssertionError)):
        check(hopper, LONG._replace(N=1024))


@pytest.mark.parametrize(
    "case",
    [Case(2, 2, 1, 150, 150, 64, CAUSAL), Case(2, 2, 1, 140, 260, 128), Case(2, 2, 2, 70, 70, 64)],
    ids=str,
)
def test_nan_reaches_the_rows_that_see_it(case, hopper):
    q, k, v = case.tensors()
    q, k = with_nan(q, k)
    options = case.options()
    expected = reference.attention_with(*(x.float() for x in (q, k, v)), options)
    assert_nan_where_expected(hopper.attention.attention(q, k, v, options), expected)
