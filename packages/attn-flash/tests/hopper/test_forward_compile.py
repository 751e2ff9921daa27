"""The forward kernels for sm_90a compiled ahead of time, with the schedules they are run with."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from .cases import CAUSAL, HALF, OPEN, Case, Ragged, compiler

pytest.importorskip("triton.experimental.gluon")

from attn_flash._hopper import attention, forward, forward_short, problem

pytestmark = pytest.mark.compile

# Bytes, outside the loop: 256 columns of output take half of the registers.
MAX_SPILLS = {64: 4, 128: 16, 256: 64}


@functools.cache
def compile_forward(case):
    """Compile what `attention` starts on an H200: the module's name, and the kernel."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return _compile_forward(case, monkeypatch)


def _compile_forward(case, monkeypatch):
    monkeypatch.setattr(problem, "num_sms", lambda device: 132)
    monkeypatch.setattr(problem, "tile_counter", lambda device: torch.zeros(1, dtype=torch.int32))
    launches = {module: compiler(monkeypatch, module) for module in (forward, forward_short)}
    attention.attention(*case.tensors(), case.options())
    [(module, launch)] = ((m, launch) for m, launch in launches.items() if launch.compiled)
    return module.__name__.rpartition(".")[2], launch.compiled[0]


CASES = [
    Case(1, 12, 4, 1000, 1000, 64),
    Case(1, 12, 4, 8192, 8192, 64, CAUSAL),
    *(Case(1, 12, 4, 1024, 1024, 128, window) for window in (OPEN, CAUSAL)),
    Case(1, 12, 4, 1024, 1024, 256, CAUSAL),
    Case(1, 12, 4, 1000, 1000, 128, (300, 0)),
    Case(1, 12, 4, 1024, 1024, 128, (700, 0)),
    Case(1, 12, 4, 1024, 1024, 96, CAUSAL, HALF, -1.0),
    *(Ragged((S,), (S,), H=12, H_KV=4, D=D, window=window)
      for S, D, window in ((8192, 64, CAUSAL), (1024, 128, CAUSAL), (1024, 256, OPEN))),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_overlap_and_accumulators_stay_in_registers(case):
    name, compiled = compile_forward(case)
    assert name == "forward"
    assert compiled.fits
    assert not compiled.serializes
    assert compiled.spills <= MAX_SPILLS[max(64, 1 << (case.D - 1).bit_length())]


@pytest.mark.parametrize("N", [50, 197, 320])
def test_short_sequences(N):
    name, compiled = compile_forward(Case(64, 12, 4, N, N, 64))
    assert name == "forward_short"
    assert compiled.fits
    assert not compiled.serializes
    assert compiled.spills == 0


LN_2 = "0f3F317218"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_are_stored_by_the_same_code_wherever_they_come(case):
    """Copies of it could be rounded differently, and which tile is a program's last is chance."""
    ptx = compile_forward(case)[1].asm["ptx"]
    products = re.findall(rf"mul\.f32\s+%\w+, %\w+, {LN_2};", ptx)
    assert len(products) in (4, 6)  # two rows of a thread, two or three consumers
