"""The Hopper kernels compiled ahead of time, with the tiles they are shipped with."""

from __future__ import annotations

import importlib
import re
import subprocess
from typing import NamedTuple

import pytest
import torch

from attn_core.testing.compilation import compile_ahead

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attn_triangle._hopper import backward, forward, problem, redo, rows
from attn_triangle._triton import backward as portable
from attn_triangle._triton import keys

pytestmark = pytest.mark.compile

dk_dv, dq, dbias = (
    importlib.import_module(f"attn_triangle._hopper.{name}") for name in ("dk_dv", "dq", "dbias")
)
GLUON = {
    "forward": (forward, forward._attention_forward_kernel),
    "dk_dv": (dk_dv, dk_dv._attention_backward_dk_dv_kernel),
    "dq": (dq, dq._attention_backward_dq_kernel),
    "dbias": (dbias, dbias._attention_backward_dbias_kernel),
}
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int32: "i32",
}
REGISTERS = 168  # a thread, shared out among the warpgroups at run time


class Case(NamedTuple):
    D: int
    dtype: torch.dtype = torch.bfloat16
    bias_dtype: torch.dtype = torch.bfloat16
    has_mask: bool = True
    deterministic: bool = True

    def __str__(self):
        names = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.bias_dtype)]
        words = ["masked" if self.has_mask else "open", "det" if self.deterministic else "atomics"]
        return "-".join([f"d{self.D}", *names, *words])


CASES = [
    Case(32),
    Case(32, has_mask=False, deterministic=False),
    Case(64, deterministic=False),
    Case(24, torch.float16, torch.float32),
]


class Recorder:
    """A launcher that writes down what it is to start."""

    def __call__(self, _num_programs, *, args, constexprs, config, **_):
        self.args, self.constexprs, self.config = args, constexprs, config


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
            "dq dk_dv dbias", case.deterministic,
        )  # fmt: skip
        return {name: recorder for name, recorder in recorders.items() if hasattr(recorder, "args")}

    return record


def type_of(value, *, hinted):
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
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
        pytest.skip("the gradient of the bias comes with that of the queries")
    kernel, launch = GLUON[name][1], found[name]
    signature = {
        parameter.name: type_of(value, hinted=not parameter.do_not_specialize)
        for parameter, value in zip(kernel.params, launch.args, strict=False)
    }
    compiled = compile_ahead(
        kernel, signature, launch.constexprs, "sm_90",
        num_warps=launch.config.num_warps, maxnreg=REGISTERS,
    )  # fmt: skip
    assert compiled.fits, f"{compiled.shared} bytes of shared memory"
    assert compiled.registers == REGISTERS
    assert not re.search(r"C75\d\d", remarks(compiled, tmp_path))


def test_bias_is_scaled_in_float32():
    bias = torch.linspace(-9.0, 9.0, 2 * 3 * 5).bfloat16().view(1, 2, 3, 5)
    scaled = problem.scaled_bias(bias, 7.3, 3, 5)
    assert scaled.dtype == torch.float32
    assert torch.equal(scaled, bias.float() * 7.3)
