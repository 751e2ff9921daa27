"""The forward kernels for sm_90a on a CPU: their protocols of barriers, and their numbers.

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
TOLERANCE = 0.02  # P is rounded to 8 bits
MODULES = [
    f"attn_flash._hopper.{name}"
    for name in ("primitives", "softmax", "problem", "descriptors", "launch", "schedules")
]


class Case(NamedTuple):
    B: int
    H: int
    H_KV: int
    M: int
    N: int
    D: int
    window: tuple[int, int] = OPEN
    programs: int = 2
    scale: float = 0.125

    def __str__(self):
        window = {OPEN: "full", CAUSAL: "causal"}.get(
            self.window, "window{}_{}".format(*self.window)
        )
        sizes = "b{}-h{}-kv{}-m{}-n{}-d{}".format(*self[:6])
        return f"{sizes}-{window}-p{self.programs}" + ("-negative" if self.scale < 0 else "")


class Outputs(NamedTuple):
    out: np.ndarray
    lse: np.ndarray


def inputs(case):
    """Arrays q, k, v of (B, H, S, D) in bfloat16."""
    generator = np.random.default_rng(seed_from(str(case)))
    queries, keys = (case.B, case.H, case.M, case.D), (case.B, case.H_KV, case.N, case.D)
    return [round_to(generator.standard_normal(shape), "bf16") for shape in (queries, keys, keys)]


def check(case, q, k, v, outputs):
    q, k, v = (torch.from_numpy(x).double().transpose(1, 2) for x in (q, k, v))
    out, lse = reference.attention(q, k, v, case.scale, case.window)
    assert np.abs(outputs.out - out.transpose(1, 2).numpy()).max() < TOLERANCE * out.abs().max()
    np.testing.assert_allclose(outputs.lse, lse.numpy(), rtol=0, atol=1e-3)


def new_outputs(q):
    return Outputs(np.full_like(q, np.nan), np.full(q.shape[:3], np.nan, np.float32))


@pytest.fixture
def forward():
    """The module of the kernel for any length, on the emulator."""
    with emulation(*MODULES, "attn_flash._hopper.forward") as modules:
        yield modules[-1]


@pytest.fixture
def short():
    """The module of the kernel for short sequences, on the emulator."""
    with emulation(*MODULES, "attn_flash._hopper.forward_short") as modules:
        yield modules[-1]


def run_forward(kernel, case, *, consumers=2, block_n=128, takes_turns=True, is_dynamic=False,
                q_stages=2, k_stages=2, v_stages=2):  # fmt: skip
    q, k, v = inputs(case)
    outputs = new_outputs(q)
    block_d = max(64, 1 << (case.D - 1).bit_length())
    num_tiles = -(-case.M // (64 * consumers))
    counter = np.zeros(1, np.int64)
    left, right = case.window
    run(
        kernel._attention_forward_kernel,
        range(min(case.programs, num_tiles * case.B * case.H)),
        *(Descriptor(x, (1, 1, rows, block_d), "bf16")
          for x, rows in ((q, 64), (k, block_n), (v, block_n), (outputs.out, 64))),
        None, Pointer(outputs.lse), Pointer(counter),
        M=case.M, N=case.N, H=case.H, group=case.H // case.H_KV, num_tiles=num_tiles,
        num_heads=case.B * case.H, heads_per_group=2,
        scale_log2=abs(case.scale) * math.log2(math.e), left=left, right=right,
        HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0, EVEN_N=case.N % block_n == 0,
        NEGATE=case.scale < 0, DYNAMIC=is_dynamic, TAKES_TURNS=takes_turns, STAGES_OUT=True,
        HEAD_DIM=case.D, BLOCK_M=64 * consumers, BLOCK_N=block_n, BLOCK_D=block_d,
        Q_STAGES=q_stages, K_STAGES=k_stages, V_STAGES=v_stages,
    )  # fmt: skip
    assert counter[0] == 0
    check(case, q, k, v, outputs)


def run_short(kernel, case, q_stages=2):
    q, k, v = inputs(case)
    outputs = new_outputs(q)
    run(
        kernel._attention_forward_short_kernel,
        range(min(case.programs, case.B * case.H)),
        *(Descriptor(x, (1, 1, 64, 64), "bf16") for x in (q, k, v, outputs.out)),
        Pointer(outputs.lse),
        M=case.M, N=case.N, H=case.H, group=case.H // case.H_KV, num_heads=case.B * case.H,
        scale_log2=abs(case.scale) * math.log2(math.e), TILES=-(-case.M // 64),
        PIECES=kernel.pieces_of(case.N), NEGATE=case.scale < 0, BLOCK_D=64,
        STAGES=kernel.stages_of(case.M), Q_STAGES=q_stages,
    )  # fmt: skip
    check(case, q, k, v, outputs)


CASES = [
    Case(1, 2, 1, 256, 256, 128),
    Case(1, 2, 2, 200, 301, 128, CAUSAL),
    Case(1, 2, 1, 300, 140, 64, CAUSAL, programs=3),
    Case(1, 2, 1, 270, 270, 64, (40, 0)),
    Case(1, 1, 1, 140, 300, 128, (30, 20)),
    Case(1, 2, 2, 130, 1, 40, programs=1),
    Case(1, 1, 1, 150, 150, 96, CAUSAL, scale=-0.1),
]


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, is_dynamic, forward):
    run_forward(forward, case, is_dynamic=is_dynamic)


@pytest.mark.parametrize(
    "schedule",
    [
        {"consumers": 3},
        {"consumers": 3, "is_dynamic": True, "v_stages": 3},
        {"block_n": 64, "q_stages": 1, "k_stages": 3, "takes_turns": False},
    ],
    ids=str,
)
def test_schedules(schedule, forward):
    run_forward(forward, Case(1, 3, 1, 330, 330, 64, CAUSAL), **schedule)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 3, 1, 197, 197, 64, programs=2),
        Case(2, 2, 2, 257, 257, 64, programs=1),
        Case(1, 3, 3, 64, 130, 64, programs=1),
        Case(1, 4, 4, 65, 300, 64, programs=1),
        Case(1, 5, 5, 30, 1, 40, programs=2),
        Case(1, 2, 2, 130, 90, 64, programs=1, scale=-0.1),
    ],
    ids=str,
)
def test_short(case, short):
    run_short(short, case)


@pytest.mark.parametrize("length", range(1, 321, 3))
def test_pieces_cover_the_keys(length, short):
    pieces = short.pieces_of(length)
    assert length <= sum(pieces) <= -(-length // 16) * 16 + 16
    assert all(piece in (16, 32, 64, 128) for piece in pieces)


# --- the emulator notices what a GPU may not ----------------------------------------------------

SMALL = Case(1, 2, 1, 256, 256, 64, programs=1)


def forget(monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda *args, **options: None)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("attn_core.testing.hopper._PATIENCE", 0.5)


@pytest.mark.parametrize(
    "name", ["meet_at", "arrive_at", "meet_at_stage", "arrive_at_stage", "_absorb"]
)
def test_a_missing_arrival_at_a_named_barrier(name, forward, monkeypatch, impatient):
    forget(monkeypatch, forward, name)
    with pytest.raises((ProtocolError, AssertionError)):
        run_forward(forward, SMALL)


@pytest.mark.parametrize("name", ["arrive", "wait"])
@pytest.mark.parametrize("kernel", ["forward", "short"])
def test_a_missing_arrival_or_wait_at_an_mbarrier(kernel, name, request, monkeypatch, impatient):
    module = request.getfixturevalue(kernel)
    forget(monkeypatch, module.mbarrier, name)
    with pytest.raises((ProtocolError, AssertionError)):
        (run_forward if kernel == "forward" else run_short)(module, SMALL._replace(H=4))


def test_a_wrong_phase(short, monkeypatch, impatient):
    wait = short.mbarrier.wait
    monkeypatch.setattr(short.mbarrier, "wait", lambda barrier, phase: wait(barrier, phase ^ 1))
    with pytest.raises((ProtocolError, AssertionError)):
        run_short(short, SMALL)


def test_products_that_nobody_waits_for(forward, monkeypatch):
    monkeypatch.setattr(forward, "warpgroup_mma_wait", lambda pendings, deps: deps[0])
    with pytest.raises((ProtocolError, AssertionError)):
        run_forward(forward, SMALL)


def test_a_store_that_nobody_waits_for(short, monkeypatch):
    forget(monkeypatch, short.tma, "store_wait")
    with pytest.raises(ProtocolError, match="work in flight"):
        run_short(short, SMALL)
