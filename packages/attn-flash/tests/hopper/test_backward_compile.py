"""The backward kernels for sm_90a compiled ahead of time: shared memory and spills."""

from __future__ import annotations

import itertools

import pytest
import torch

from attn_core.testing.compilation import compile_ahead, record_launches

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


def type_of(value):
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}:16"
    if isinstance(value, tuple):
        tile = value.describe()
        return f"tensordesc<{TYPES[value.tensor.dtype]}{tile.block_shape},{tile.layout!r}>"
    return "fp32" if isinstance(value, float) else "i32"


def run(D, window, *, deterministic=True, dtype=torch.bfloat16, with_dlse=False):
    q = torch.zeros(1, 256, 2, D, dtype=dtype)
    k = torch.zeros(1, 1024, 1, D, dtype=dtype)
    lse = torch.zeros(1, 2, 256)
    dlse = lse if with_dlse else None
    backward.attention_backward(q, dlse, q, k, k, q, lse, 0.1, window, deterministic)


def compile_kernel(monkeypatch, *args, **options):
    """Compile the kernel of the products as the launcher starts it."""
    compiled = []

    def launch(num_programs, args, constants, maxnreg):
        names = kernel.arg_names
        signature = {name: type_of(x) for name, x in zip(names, args, strict=False)}
        launched = {"num_warps": 4, "maxnreg": maxnreg}
        compiled.append(compile_ahead(kernel, signature, constants, "sm_90", **launched))

    kernel = backward._launch._kernel
    record_around(monkeypatch)
    monkeypatch.setattr(backward, "_launch", launch)
    run(*args, **options)
    return compiled[0]


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


def test_padded_heads_in_float16(monkeypatch):
    assert compile_kernel(monkeypatch, 96, (-1, 0), dtype=torch.float16).fits


@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out-and-lse"])
@pytest.mark.parametrize("D", [64, 128])
def test_kernels_around(D, with_dlse, monkeypatch):
    monkeypatch.setattr(backward, "_launch", lambda *args, **options: None)
    recorders = record_around(monkeypatch)
    run(D, (-1, -1), with_dlse=with_dlse)
    for recorder in recorders:
        assert recorder.compile("sm_90").spills == 0
