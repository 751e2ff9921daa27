"""The Hopper kernels compiled ahead of time, with the tiles they are shipped with."""

from __future__ import annotations

import importlib
import re
import subprocess
from typing import NamedTuple

import pytest
import torch

from attn_core.testing.compilation import compile_ahead, record_launches

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from triton.backends.nvidia.compiler import get_ptxas

from attn_triangle._hopper import backward, forward, redo, rows
from attn_triangle._hopper.descriptors import Tiles
from attn_triangle._triton import dbias as portable
from attn_triangle._triton import keys

pytestmark = pytest.mark.compile

dk_dv, dq, dq_dbias, dbias = (
    importlib.import_module(f"attn_triangle._hopper.{name}")
    for name in ("dk_dv", "dq", "dq_dbias", "dbias")
)
GLUON = {
    "forward": (forward, forward._attention_forward_kernel),
    "dk_dv": (dk_dv, dk_dv._attention_backward_dk_dv_kernel),
    "dq": (dq, dq._attention_backward_dq_kernel),
    "dq_dbias": (dq_dbias, dq_dbias._attention_backward_dq_dbias_kernel),
    "dbias": (dbias, dbias._attention_backward_dbias_kernel),
}
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.uint8: "u8",
}


class Case(NamedTuple):
    D: int
    dtype: torch.dtype = torch.bfloat16
    bias_dtype: torch.dtype = torch.bfloat16
    has_mask: bool = True
    wanted: str = "dq dbias dk_dv"

    def __str__(self):
        names = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.bias_dtype)]
        words = ["masked" if self.has_mask else "open", *self.wanted.split()]
        return "-".join([f"d{self.D}", *names, *words])


CASES = [
    Case(32),
    Case(32, has_mask=False),
    Case(64),
    Case(24, torch.float16, torch.float32),
    Case(24, torch.float16, torch.float32, wanted="dbias"),
    Case(24, torch.float16, torch.float32, wanted="dq"),
]


class Recorder:
    """A launcher that writes down what it is to start."""

    def __call__(self, _num_programs, *, args, constants=None, maxnreg=None, **_):
        self.args, self.constants, self.maxnreg = args, constants, maxnreg


@pytest.fixture
def launches(monkeypatch):
    """A function that returns what both passes of a case would start, by kernel."""

    class Device:
        num_sms = 132

    recorders = {name: Recorder() for name in GLUON}
    for name, (module, _) in GLUON.items():
        monkeypatch.setattr(module, "_launch", recorders[name])
        monkeypatch.setattr(module, "device_info", lambda device: Device)
    for module, name in (
        (redo, "_launch"),
        (rows, "_launch"),
        (rows, "_launch_unseeing"),
        (keys, "_launch"),
        (portable, "_launch_sum"),
    ):
        monkeypatch.setattr(module, name, Recorder())

    def record(case):
        q = torch.empty(1, 384, 384, 4, case.D, dtype=case.dtype).permute(0, 3, 1, 2, 4)
        bias = torch.empty(1, 4, 384, 384, dtype=case.bias_dtype)
        mask = torch.zeros(1, 384, 384, dtype=torch.bool) if case.has_mask else None
        out, lse = forward.attention(q, q, q, bias, mask, 0.1, "mean")
        backward.attention_backward(
            out, None, q, q, q, bias, mask, out, lse, 0.1, "mean",
            case.wanted, True,
        )  # fmt: skip
        return {name: recorder for name, recorder in recorders.items() if hasattr(recorder, "args")}

    return record


def type_of(value, *, hinted):
    if isinstance(value, Tiles):
        layout = value.describe().layout
        return f"tensordesc<{TYPES[value.tensor.dtype]}{list(value.block)},{layout!r}>"
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}:16"
    if isinstance(value, float):
        return "fp32"
    return "i32:16" if hinted and value % 16 == 0 else "i32:1" if hinted and value == 1 else "i32"


def remarks(compiled, tmp_path):
    """What ptxas has to say of a kernel: C75xx where products do not overlap."""
    source = tmp_path / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    arch = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    command = [get_ptxas(90).path, "-v", f"-arch={arch}", source, "-o", f"{source}.cubin"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize("name", GLUON)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_fit_and_overlap_their_products(case, name, launches, tmp_path):
    found = launches(case)
    if name not in found:
        pytest.skip("not for these gradients")
    kernel, launch = GLUON[name][1], found[name]
    given = list(zip(kernel.params, launch.args, strict=False))
    assert all(parameter.do_not_specialize for parameter, value in given if type(value) is int)
    signature = {
        parameter.name: type_of(value, hinted=not parameter.do_not_specialize)
        for parameter, value in given
    }
    compiled = compile_ahead(
        kernel, signature, launch.constants, "sm_90", num_warps=4, maxnreg=launch.maxnreg
    )
    assert compiled.fits, f"{compiled.shared} bytes of shared memory"
    assert compiled.registers == launch.maxnreg
    assert not re.search(r"C75\d\d", remarks(compiled, tmp_path))


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_small_kernels_compile(case, monkeypatch):
    launchers = (redo._launch, rows._launch, rows._launch_unseeing)
    recorders = [record_launches(launcher, monkeypatch) for launcher in launchers]
    q = torch.empty(1, 4, 384, 384, case.D, dtype=case.dtype, device="meta")
    bias = torch.empty(1, 4, 384, 384, dtype=case.bias_dtype, device="meta")
    mask = torch.empty(1, 384, 384, dtype=torch.bool, device="meta")
    lse = torch.empty(q.shape[:-1], device="meta")
    redo.redo(q, q, q, bias, mask, q, lse, 0.1, "mean")
    rows.deltas(q, q, lse, zeroed=lse)
    rows.add_unseeing(q, q, lse)
    for recorder in recorders:
        compiled = recorder.compile("sm_90")
        assert compiled.fits
        assert compiled.spills == 0
