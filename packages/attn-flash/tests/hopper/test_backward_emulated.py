"""The backward kernel for sm_90a on a CPU: its protocol of barriers, and its numbers.

The emulator delays whatever the hardware may delay, so that a missing wait shows as a wrong number
and a missing arrival as an error. What runs before and after the kernel is Triton's: plain PyTorch
takes its place here, and test_backward_sums_interpret.py compares the two.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from attn_core.testing import poison_new_allocations
from attn_core.testing.hopper import ProtocolError
from attn_flash._hopper.problem import Sequences

from . import sums_torch
from .cases import (
    CAUSAL,
    HALF,
    OPEN,
    Case,
    assert_gradients,
    assert_same_bits,
    check_often,
    exact,
    forget,
    forget_wait,
)

pytest.importorskip("triton.experimental.gluon")

pytestmark = pytest.mark.compile


@pytest.fixture
def backward(hopper, monkeypatch):
    """The module of the kernel, on the emulator; its roles are modules of `hopper`."""
    for name in ("prepare", "finish", "new_gradient"):
        monkeypatch.setattr(hopper.backward_sums, name, getattr(sums_torch, name))
    monkeypatch.setattr(hopper.backward, "_FEW_TILES", 0)
    return hopper.backward


def gradients(backward, case, deterministic):
    tensors, (dout, dlse) = case.tensors(), case.gradients()
    _, out, lse = exact(case, tensors, dout, dlse)
    with poison_new_allocations():
        return backward.attention_backward(
            dout, dlse, *tensors, out.to(case.dtype), lse.float(),
            case.scale, case.window, deterministic,
        )  # fmt: skip


def check(backward, case, deterministic=False):
    actual = gradients(backward, case, deterministic)
    inputs = case.tensors(), *case.gradients()
    same, *_ = exact(case, *inputs, case.dtype)
    expected, *_ = exact(case, *inputs)
    assert_gradients(actual, same, expected)


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
    Case(1, 2, 1, 64, 1000, 64, (3, 3)),
    Case(1, 1, 1, 100, 900, 64),  # tiles of one step
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, deterministic, backward):
    check(backward, case, deterministic)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("D", [64, 128])
def test_late_copies(D, deterministic, backward, late):
    check(backward, Case(1, 2, 1, 150, 270, D, CAUSAL), deterministic)


@pytest.fixture
def for_many_keys(backward, monkeypatch):
    """The module, which clears sums first and starts a program for every tile."""
    monkeypatch.setattr(backward, "_CLAIMED", dict.fromkeys(backward._CLAIMED, 0))
    monkeypatch.setattr(backward, "_PERSISTENT", 0)
    return backward


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_many_keys(case, deterministic, for_many_keys):
    check(for_many_keys, case, deterministic)


@pytest.fixture
def in_parts(backward, monkeypatch):
    """The module, with two programs for a key head that has an even number of query heads."""
    monkeypatch.setattr(backward, "_FEW_TILES", 1 << 20)
    return backward


SHARED = [Case(1, 4, 2, 150, 300, 128, CAUSAL), Case(1, 4, 1, 130, 140, 64, (100, 20), HALF)]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_two_programs_share_a_key_head(case, deterministic, in_parts):
    check(in_parts, case, deterministic)


def test_a_late_first_part(hopper, in_parts, monkeypatch):
    """Whoever waits for it has not claimed a sum of its next tile that the late one waits for."""
    adder = hopper.backward_adder
    add_tile = adder._add_tile
    next_tile = threading.Event()

    def add_late(tensors, shared, problem, tile, states_ptr):
        if (tile.n, tile.h) == (1, 0):
            next_tile.set()
        if (tile.n, tile.h) == (0, 0):
            next_tile.wait(2.0)
            time.sleep(0.2)
        add_tile(tensors, shared, problem, tile, states_ptr)

    monkeypatch.setattr(adder, "_add_tile", add_late)
    check(in_parts, Case(1, 2, 1, 700, 300, 64))


@pytest.mark.parametrize("D", [64, 128])
def test_same_bits_every_time(D, backward):
    """Programs start in another order each time."""
    case = Case(1, 2, 1, 100, 390, D)
    first, again = (gradients(backward, case, deterministic=True) for _ in range(2))
    assert_same_bits(again, first)


GROUPED = [
    Case(1, 4, 1, 200, 300, 128, CAUSAL),
    Case(2, 4, 2, 300, 130, 64, CAUSAL),
    Case(1, 3, 1, 300, 400, 128, (70, 20), HALF),
    Case(1, 3, 1, 270, 300, 64, (150, 0)),
]


@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_programs_in_lockstep(case, backward):
    check(backward, case, deterministic=True)


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (150, -1), (100, 20), (-1, 300)], ids=str)
@pytest.mark.parametrize("M, N", [(300, 700), (700, 300), (500, 512)])
@pytest.mark.parametrize("in_lockstep", [False, True], ids=["by-heads", "lockstep"])
def test_a_sum_waits_for_lower_tickets_alone(in_lockstep, M, N, window, hopper):
    """So whoever is waited for has begun, and no two programs wait for each other."""
    left, right = window
    block_m, heads, group = 64, 4, 2
    problem = SimpleNamespace(
        M=M, N=N, H=heads, group=group, blocks_n=-(-N // 128), num_heads=2 * heads // group,
        heads_per_group=3, left=left, right=right, HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0,
        IS_RAGGED=False, PARTS=1, DETERMINISTIC=True, IS_LOCKSTEP=in_lockstep,
    )  # fmt: skip
    added = Counter()
    for ticket in range(problem.blocks_n * problem.num_heads):
        tile = hopper.backward_tiles.tile_at(problem, ticket, block_m)
        m, h = hopper.backward_tiles.first_step(problem, tile)
        for _ in range((tile.last - tile.first) * group):
            block = int(tile.b), int(h), int(m)
            assert hopper.backward_adder._turn(problem, tile, m, block_m) == added[block]
            added[block] += 1
            m, h = hopper.backward_tiles.next_step(problem, tile, m, h)
    assert {(b, h) for b, h, _ in added} == {(b, h) for b in range(2) for h in range(heads)}


RAGGED = [
    ((150, 0, 1, 270), (100, 30, 300, 270), Case(1, 2, 1, 430, 710, 64, CAUSAL)),
    ((40, 200), (140, 129), Case(1, 1, 1, 260, 300, 128)),
    ((130, 70), (130, 70), Case(1, 2, 2, 200, 200, 96, (60, 10), HALF)),
    # Tiles of three steps, one and none, one after the other.
    ((300, 1, 0, 64), (130, 300, 30, 270), Case(1, 1, 1, 365, 730, 64, CAUSAL)),
    ((40,), (0,), Case(1, 1, 1, 40, 30, 128)),
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("lengths_q, lengths_k, case", RAGGED, ids=str)
def test_ragged_sequences(lengths_q, lengths_k, case, deterministic, backward):
    """Each is as it is alone; tokens after the last one get zeros."""
    (q, k, v), (dout, dlse) = case.tensors(), case.gradients()
    out, lse = torch.zeros_like(q), torch.full((1, case.H, case.M), -math.inf)
    starts_q, starts_k = (
        torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)
    )
    places = [
        (slice(*place_q), slice(*place_k))
        for place_q, place_k in zip(
            pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True
        )
    ]
    alone = []
    for at_q, at_k in places:
        parts = (q[:, at_q], k[:, at_k], v[:, at_k]), dout[:, at_q], dlse[:, :, at_q]
        same, *_ = exact(case, *parts, case.dtype)
        expected, part_out, part_lse = exact(case, *parts)
        out[:, at_q], lse[:, :, at_q] = part_out.to(case.dtype), part_lse.float()
        alone.append((same, expected))
    with poison_new_allocations():
        dq, dk, dv = backward.attention_backward(
            dout, dlse, q, k, v, out, lse, case.scale, case.window, deterministic,
            Sequences(starts_q, starts_k, None, max(lengths_k)),
        )  # fmt: skip
    for grad, starts in ((dq, starts_q), (dk, starts_k), (dv, starts_k)):
        assert not grad[:, starts[-1] :].any()
    for (at_q, at_k), (same, expected) in zip(places, alone, strict=True):
        assert_gradients((dq[:, at_q], dk[:, at_k], dv[:, at_k]), same, expected)


# --- the emulator notices what a GPU may not ----------------------------------------------------

SMALL = Case(1, 1, 1, 256, 256, 128)


@pytest.mark.parametrize(
    "role, name",
    [
        ("consumer", "meet_at"),
        ("consumer", "arrive_at"),
        ("adder", "meet_at"),
        ("adder", "arrive_at"),
        ("loader", "meet_at"),
    ],
)
def test_a_missing_arrival_at_a_named_barrier(role, name, hopper, backward, monkeypatch, impatient):
    forget(monkeypatch, getattr(hopper, f"backward_{role}"), name)
    with pytest.raises((ProtocolError, AssertionError)):
        check(backward, SMALL)


@pytest.mark.parametrize("name", ["arrive", "wait"])
def test_a_missing_arrival_or_wait_at_an_mbarrier(name, backward, monkeypatch, impatient):
    forget(monkeypatch, backward.mbarrier, name)
    with pytest.raises((ProtocolError, AssertionError)):
        check(backward, SMALL)


@pytest.mark.parametrize(
    "function, barrier, D",
    [
        ("_await_stage", "empty", 64),
        ("_await_stage", "empty", 128),
        ("_announce", "keys_empty", 64),
        ("_await_number", "k_full", 64),
        ("_accumulate_tiles", "k_full", 64),
        ("_accumulate_tile", "k_full", 128),
        ("_accumulate_tiles", "v_full", 64),
        ("_accumulate_tile", "v_full", 128),
        ("_accumulate_tiles", "q_full", 64),
        ("_accumulate_tile", "q_full", 128),
        ("_accumulate_tiles", "do_full", 64),
        ("_accumulate_tile", "do_full", 128),
    ],
)
def test_each_wait(function, barrier, D, backward, monkeypatch, impatient, late):
    forget_wait(monkeypatch, backward.mbarrier, function, barrier)
    with pytest.raises((ProtocolError, AssertionError)):
        check_often(check, backward, SMALL._replace(N=700, D=D))


@pytest.mark.parametrize("role, name", [("consumer", "meet_at"), ("loader", "arrive_at")])
def test_keys_that_are_written_over(role, name, hopper, backward, monkeypatch, impatient):
    """dK and dV of a tile wait where dS of the next one will be."""
    module = getattr(hopper, f"backward_{role}")
    call, written = getattr(module, name), hopper.backward_consumer.KEYS_WRITTEN
    monkeypatch.setattr(module, name, lambda at, threads: at == written or call(at, threads))
    with pytest.raises((ProtocolError, AssertionError)):
        check_often(check, backward, SMALL._replace(N=700, D=64))


def test_a_store_that_nobody_waits_for(backward, monkeypatch):
    forget(monkeypatch, backward.tma, "store_wait")
    with pytest.raises(ProtocolError, match="work in flight"):
        check(backward, SMALL)


def test_a_missing_fence(hopper, backward, monkeypatch):
    forget(monkeypatch, hopper.backward_consumer, "fence_async_shared")
    with pytest.raises(ProtocolError, match="without a fence"):
        check(backward, SMALL)


def test_a_sum_that_nobody_waits_for(hopper, backward, monkeypatch):
    """A second summand before the first one is stored."""
    adder = hopper.backward_adder
    monkeypatch.setattr(adder, "claim", lambda ptr: adder.PUBLISHED)
    with pytest.raises(AssertionError, match="dq"):
        check(backward, SMALL)


def test_a_sum_that_is_not_published(hopper, backward, monkeypatch, impatient):
    forget(monkeypatch, hopper.backward_adder, "publish")
    with pytest.raises(ProtocolError, match="claimed"):
        check(backward, SMALL)


def test_a_part_that_nobody_waits_for(hopper, in_parts, monkeypatch):
    forget(monkeypatch, hopper.backward_consumer, "wait_until_set")
    with pytest.raises(AssertionError, match="d[kv]"):
        check_often(check, in_parts, SMALL._replace(H=2, N=700))


def test_a_sum_that_is_passed_on_before_it_is_written(hopper, backward, monkeypatch):
    forget(monkeypatch, hopper.backward_adder, "wait_for_bulk_writes")
    with pytest.raises(AssertionError, match="dq"):
        check(backward, SMALL._replace(N=700), deterministic=True)
