"""The backward kernels for sm_90a compiled ahead of time: shared memory and spills."""

from __future__ import annotations

import itertools

import pytest
import torch

from attn_core.testing.compilation import record_launches

from .cases import CAUSAL, HALF, OPEN, compiler

pytest.importorskip("triton.experimental.gluon")

from attn_flash._hopper import backward, backward_sums, problem

pytestmark = pytest.mark.compile

WINDOWS = {"full": OPEN, "causal": CAUSAL, "window": (100, 0)}
# Bytes: numbers that stay the same through the loop, most of them for the branch that masks, and
# for narrow heads those of the tile and the program, which compute many tiles. An
# accumulator that does not fit takes thousands.
MAX_SPILLS = {64: 272, 128: 160}


def run(D, window, *, group=1, deterministic=True, dtype=torch.bfloat16, with_dlse=False):
    q = torch.zeros(1, 256, 4, D, dtype=dtype)
    k = torch.zeros(1, 1024, 4 // group, D, dtype=dtype)
    lse = torch.zeros(1, 4, 256)
    dlse = lse if with_dlse else None
    backward.attention_backward(q, dlse, q, k, k, q, lse, 0.1, window, deterministic)


def compile_kernel(monkeypatch, *args, **options):
    """Compile the kernel of the products as the launcher starts it."""
    record_around(monkeypatch)
    launch = compiler(monkeypatch, backward)
    run(*args, **options)
    [compiled] = launch.compiled
    return compiled


def record_around(monkeypatch):
    """Recorders of the kernels before and after the products."""
    launchers = backward_sums._launch_prepare, backward_sums._launch_finish
    return [record_launches(launcher, monkeypatch) for launcher in launchers]


VARIANTS = [
    pytest.param(D, WINDOWS[name], deterministic, id=f"d{D}-{name}-{word}")
    for D, name, (word, deterministic) in itertools.product(
        (64, 128), ("full", "causal"), (("fast", False), ("deterministic", True))
    )
] + [pytest.param(D, WINDOWS["window"], True, id=f"d{D}-window") for D in (64, 128)]


@pytest.mark.parametrize("D, window, deterministic", VARIANTS)
def test_products_overlap_and_accumulators_stay_in_registers(D, window, deterministic, monkeypatch):
    compiled = compile_kernel(monkeypatch, D, window, deterministic=deterministic)
    assert compiled.fits
    assert not compiled.serializes
    assert compiled.spills <= MAX_SPILLS[D]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("D", [64, 128])
def test_many_keys(D, deterministic, monkeypatch):
    """Sums are cleared first, and every tile has a program."""
    monkeypatch.setattr(backward, "_CLAIMED", dict.fromkeys(backward._CLAIMED, 0))
    monkeypatch.setattr(backward, "_PERSISTENT", 0)
    compiled = compile_kernel(monkeypatch, D, CAUSAL, deterministic=deterministic)
    assert not compiled.serializes
    assert compiled.spills <= MAX_SPILLS[D]


@pytest.mark.parametrize(
    "group, deterministic",
    [(2, False), (2, True), (4, True)],
    ids=["fast", "deterministic", "lockstep"],
)
@pytest.mark.parametrize("D", [64, 128])
def test_two_programs_for_a_key_head(D, group, deterministic, monkeypatch):
    monkeypatch.setattr(problem, "num_sms", lambda device: 132)
    compiled = compile_kernel(monkeypatch, D, CAUSAL, group=group, deterministic=deterministic)
    assert not compiled.serializes
    assert compiled.spills <= MAX_SPILLS[D]


@pytest.mark.parametrize("window", ["causal", "window"])
@pytest.mark.parametrize("D", [64, 128])
def test_programs_in_lockstep(D, window, monkeypatch):
    compiled = compile_kernel(monkeypatch, D, WINDOWS[window], group=2)
    assert not compiled.serializes
    assert compiled.spills <= MAX_SPILLS[D]


def test_padded_heads_in_float16(monkeypatch):
    assert compile_kernel(monkeypatch, 96, CAUSAL, dtype=HALF).fits


@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out-and-lse"])
@pytest.mark.parametrize("D", [64, 128])
def test_kernels_around(D, with_dlse, monkeypatch):
    monkeypatch.setattr(backward, "_launch", lambda *args, **options: None)
    recorders = record_around(monkeypatch)
    run(D, OPEN, with_dlse=with_dlse)
    for recorder in recorders:
        assert recorder.compile("sm_90").spills == 0
