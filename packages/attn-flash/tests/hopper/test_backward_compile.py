"""The backward kernels for sm_90a compiled ahead of time: shared memory and spills."""

from __future__ import annotations

import itertools

import pytest
import torch

from attn_core.testing.compilation import compile_ahead

pytest.importorskip("triton.experimental.gluon")

from attn_flash._hopper import backward, backward_sums

pytestmark = pytest.mark.compile

WINDOWS = {"full": (-1, -1), "causal": (-1, 0), "window": (100, 0)}
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
}
# Bytes: numbers that stay the same through the loop, most of them for the branch that masks. An
# accumulator that does not fit takes thousands.
MAX_SPILLS = {64: 288, 128: 128}


class Recorder:
    """A kernel that writes down how it is launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps, maxnreg=None, **constexprs):
        self.args, self.constexprs = args, constexprs
        self.options = {"num_warps": num_warps, **({"maxnreg": maxnreg} if maxnreg else {})}

    def compile(self):
        signature, constants = {}, dict(self.constexprs)
        for name, value in zip(self.kernel.arg_names, self.args, strict=False):
            if value is None:
                constants[name] = None
            else:
                signature[name] = type_of(value)
        return compile_ahead(self.kernel, signature, constants, "sm_90", **self.options)


def type_of(value):
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}:16"
    if hasattr(value, "block_shape"):
        return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
    return "fp32" if isinstance(value, float) else "i32"


def record(monkeypatch, D, window, *, deterministic=True, dtype=torch.bfloat16, with_dlse=False):
    """What the launcher starts, by the name of the kernel."""
    recorders = {}
    for module, name in (
        (backward, "_attention_backward_kernel"),
        (backward_sums, "_prepare_kernel"),
        (backward_sums, "_finish_kernel"),
    ):
        recorders[name] = Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, recorders[name])
    q = torch.zeros(1, 256, 2, D, dtype=dtype)
    k = torch.zeros(1, 256, 1, D, dtype=dtype)
    lse = torch.zeros(1, 2, 256)
    dlse = lse if with_dlse else None
    backward.attention_backward(q, dlse, q, k, k, q, lse, 0.1, window, deterministic)
    return recorders


VARIANTS = [
    pytest.param(D, WINDOWS[name], deterministic, id=f"d{D}-{name}-{word}")
    for D, name, (word, deterministic) in itertools.product(
        (64, 128), ("full", "causal"), (("fast", False), ("deterministic", True))
    )
] + [pytest.param(D, WINDOWS["window"], True, id=f"d{D}-window") for D in (64, 128)]


@pytest.mark.parametrize("D, window, deterministic", VARIANTS)
def test_products_overlap_and_accumulators_stay_in_registers(D, window, deterministic, monkeypatch):
    kernel = record(monkeypatch, D, window, deterministic=deterministic)[
        "_attention_backward_kernel"
    ]
    compiled = kernel.compile()
    assert compiled.fits
    assert not compiled.serializes
    assert compiled.spills <= MAX_SPILLS[D]


def test_padded_heads_in_float16(monkeypatch):
    for recorder in record(monkeypatch, 96, (-1, 0), dtype=torch.float16).values():
        assert recorder.compile().fits


@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out-and-lse"])
@pytest.mark.parametrize("D", [64, 128])
def test_kernels_around(D, with_dlse, monkeypatch):
    recorders = record(monkeypatch, D, (-1, -1), with_dlse=with_dlse)
    for name in ("_prepare_kernel", "_finish_kernel"):
        assert recorders[name].compile().spills == 0
