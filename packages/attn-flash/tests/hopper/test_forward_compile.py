"""The forward kernels for sm_90a compiled ahead of time, with the schedules they are run with."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import pytest
import torch

from attn_core.testing.compilation import compile_ahead

pytest.importorskip("triton.experimental.gluon")
gl = pytest.importorskip("triton.experimental.gluon.language")

pytestmark = pytest.mark.compile

OPEN = (-1, -1)
CAUSAL = (-1, 0)
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
# Bytes, outside the loop: 256 columns of output take half of the registers.
MAX_SPILLS = {64: 0, 128: 16, 256: 64}


class Case(NamedTuple):
    B: int
    N: int
    D: int
    window: tuple[int, int] = OPEN
    dtype: torch.dtype = torch.bfloat16
    scale: float = 0.1
    is_ragged: bool = False

    def __str__(self):
        window = {OPEN: "full", CAUSAL: "causal"}.get(self.window, "window")
        sign = "-negative" if self.scale < 0 else ""
        ragged = "-ragged" if self.is_ragged else ""
        return f"b{self.B}-n{self.N}-d{self.D}-{window}-{TYPES[self.dtype]}{sign}{ragged}"


class Launches:
    """Takes the place of a launcher and compiles what it would start."""

    def __init__(self, launcher):
        self.kernel = launcher._kernel
        self.compiled = []

    def __call__(self, _num_programs, args, constants, maxnreg):
        signature = dict(zip(self.kernel.arg_names, map(type_of, args), strict=False))
        options = {"num_warps": 4, "maxnreg": maxnreg}
        self.compiled.append(compile_ahead(self.kernel, signature, constants, "sm_90", **options))


def type_of(value):
    if isinstance(value, torch.Tensor):
        return {torch.float32: "*fp32:16", torch.int32: "*i32:16"}.get(
            value.dtype, f"*{TYPES.get(value.dtype)}:16"
        )
    if isinstance(value, tuple):
        block = [*([1, 1, 1] if value.is_ragged else [1, 1]), value.rows, value.block_d]
        layout = gl.NVMMASharedLayout(128, 16, rank=len(block))
        return f"tensordesc<{TYPES[value.tensor.dtype]}{block},{layout!r}>"
    return "fp32" if isinstance(value, float) else "i32"


@functools.cache
def compile_forward(case):
    """Compile what `attention` starts on an H200: the module's name, and the kernel."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return _compile_forward(case, monkeypatch)


def _compile_forward(case, monkeypatch):
    from attn_flash._hopper import attention, forward, forward_short, problem
    from attn_flash.options import Options

    monkeypatch.setattr(problem, "num_sms", lambda device: 132)
    monkeypatch.setattr(problem, "tile_counter", lambda device: torch.zeros(1, dtype=torch.int32))
    launches = {}
    for module in (forward, forward_short):
        launches[module] = Launches(module._launch)
        monkeypatch.setattr(module, "_launch", launches[module])
    q = torch.zeros(case.B, case.N, 12, case.D, dtype=case.dtype)
    k = q[:, :, :4]
    options = Options(scale=case.scale, window_left=case.window[0], window_right=case.window[1])
    if case.is_ragged:
        starts = torch.tensor([0, case.N], dtype=torch.int32)
        options = options._replace(
            cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=case.N, max_seqlen_k=case.N
        )
        q, k = q[0], k[0]
    attention.attention(q, k, k, options)
    (module,) = (module for module, launch in launches.items() if launch.compiled)
    return module.__name__.rpartition(".")[2], launches[module].compiled[0]


CASES = [
    Case(1, 1000, 64),
    Case(1, 8192, 64, CAUSAL),
    *(Case(1, 1024, 128, window) for window in (OPEN, CAUSAL)),
    Case(1, 1024, 256, CAUSAL),
    Case(1, 1000, 128, (300, 0)),
    Case(1, 1024, 96, CAUSAL, torch.float16, scale=-0.1),
    Case(1, 8192, 64, CAUSAL, is_ragged=True),
    Case(1, 1024, 128, CAUSAL, is_ragged=True),
    Case(1, 1024, 256, is_ragged=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_overlap_and_accumulators_stay_in_registers(case):
    name, compiled = compile_forward(case)
    assert name == "forward"
    assert compiled.fits
    assert not compiled.serializes
    assert compiled.spills <= MAX_SPILLS[max(64, 1 << (case.D - 1).bit_length())]


@pytest.mark.parametrize("N", [50, 197, 320])
def test_short_sequences(N):
    name, compiled = compile_forward(Case(64, N, 64))
    assert name == "forward_short"
    assert compiled.fits
    assert not compiled.serializes
    assert compiled.spills == 0


LN_2 = "0f3F317218"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lse_is_rounded_alike_wherever_a_tile_is_stored(case):
    """Which tile is a program's last is up to chance, and the last one is stored elsewhere."""
    ptx = compile_forward(case)[1].asm["ptx"]
    products = re.findall(rf"mul\.f32\s+%\w+, (%\w+), {LN_2};", ptx)
    assert len(products) >= 8  # two rows of a thread, two consumers, two places
    for register in products:
        assert re.search(rf"(\S+)\s+{register}, ", ptx)[1] == "fma.rn.f32"
