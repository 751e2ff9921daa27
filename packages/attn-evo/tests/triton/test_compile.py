"""The Triton kernels compiled ahead of time, with the tiles each architecture is shipped with."""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import pytest
import torch

from attn_core.device import triton_version
from attn_core.testing.compilation import TARGETS, record_launches
from attn_evo import EvoWeights

pytest.importorskip("triton")

from attn_evo._hopper import support
from attn_evo._triton import backward, configs, forward, prefix_sum, problem

pytestmark = pytest.mark.compile

FORWARD = ("sums", "stat", "output")
CAUSAL = ("stat", "backward_stat")
FULL = ("backward_total",)
# Bytes of a gradient kernel for Hopper.
MAX_SPILLS = 0 if triton_version() in ((3, 6), (3, 9)) else 64
MAX_SPILLS_FLOAT32 = 0 if triton_version() == (3, 6) else 80
LAUNCHERS = {
    **{name: getattr(forward, f"_launch_{name}") for name in FORWARD},
    **{
        f"backward_{name}": getattr(
            importlib.import_module(f"attn_evo._triton.backward_{name}"), f"_launch_{name}"
        )
        for name in configs.BACKWARD_PASSES
    },
}


class Case(NamedTuple):
    dtype: torch.dtype
    D: int
    causal: bool = True
    options: bool = False

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        words = [f"d{self.D}", dtype, "causal" if self.causal else "full"]
        return "-".join([*words, "mask-state"] if self.options else words)


PORTABLE = [
    Case(torch.bfloat16, 64),
    Case(torch.bfloat16, 128),
    Case(torch.float32, 64),
]
HOPPER = [
    Case(torch.bfloat16, 16),
    Case(torch.bfloat16, 32),
    Case(torch.float32, 16),
    Case(torch.float32, 32),
    Case(torch.bfloat16, 64, causal=False),
    Case(torch.bfloat16, 128, causal=False),
    Case(torch.float32, 64, causal=False),
    Case(torch.float16, 40, options=True),
    Case(torch.bfloat16, 80, options=True),
    Case(torch.float32, 40, options=True),
]
CASES = {target: [*PORTABLE, *(HOPPER if target == "sm_90" else ())] for target in TARGETS}
CASES["sm_86"] = [Case(torch.bfloat16, 128)]  # less shared memory than other GPUs of NVIDIA's


@pytest.fixture
def use_target(use_target):
    return functools.partial(use_target, modules=(problem,), num_sms=132)


def attend(case):
    """Launch every kernel of one forward or backward pass."""
    v = torch.empty(2, 4, 4096, case.D, dtype=case.dtype, device="meta")
    sums = torch.empty(2, 2, 4, case.D, device="meta")
    identity = EvoWeights.identity(case.D, dtype=case.dtype, device="meta")
    call = (v, identity, None, None, None, case.causal, torch.float32, ())
    if case.options:
        mask = torch.empty(2, 4096, dtype=torch.bool, device="meta")
        length = torch.empty((), dtype=torch.int64, device="meta")
        call = (v, identity, mask, sums, length, *call[5:])
    return call, sums


def launch(case, name):
    call, sums = attend(case)
    if name.startswith("backward"):
        backward.attention_backward(call[0], sums if case.options else None, *call)
    else:
        forward.attention(*call)


RUNS = [
    pytest.param(target, case, name, id=f"{target}-{case}-{name}")
    for target, cases in CASES.items()
    for case in cases
    for name in LAUNCHERS
    if name not in (FULL if case.causal else CAUSAL)
]


@pytest.mark.parametrize("target, case, name", RUNS)
def test_shipped_tiles_compile_and_fit(target, case, name, use_target, monkeypatch):
    use_target(target)
    recorders = {key: record_launches(LAUNCHERS[key], monkeypatch) for key in LAUNCHERS}
    launch(case, name)
    compiled = recorders[name].compile(target)
    assert compiled.fits, f"{compiled.shared} bytes of shared memory"
    if target == "sm_90":
        assert compiled.spills == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_hopper_kernel_of_whole_sequences_fits(dtype, use_target, monkeypatch):
    from attn_evo._hopper import forward as hopper
    from attn_evo._hopper import output

    use_target("sm_90")
    monkeypatch.setattr(support, "device_info", problem.device_info)
    monkeypatch.setattr(hopper, "_LEAST_USE", 0.0)
    record_launches(LAUNCHERS["sums"], monkeypatch)
    recorder = record_launches(output._launch_output[128], monkeypatch)
    launch(Case(dtype, 128), "output")
    assert recorder.constexprs["OWNS_SEQUENCE"]
    compiled = recorder.compile("sm_90")
    assert compiled.fits, f"{compiled.shared} bytes of shared memory"
    assert compiled.spills == 0
    if triton_version() == (3, 6):  # for later ones registers are too few
        assert not compiled.serializes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_hopper_kernel_without_causal_fits(dtype, use_target, monkeypatch):
    from attn_evo._hopper import output_full

    use_target("sm_90")
    monkeypatch.setattr(support, "device_info", problem.device_info)
    record_launches(LAUNCHERS["sums"], monkeypatch)
    recorder = record_launches(output_full._launch_output, monkeypatch)
    launch(Case(dtype, 64, causal=False), "output")
    compiled = recorder.compile("sm_90")
    assert compiled.fits, f"{compiled.shared} bytes of shared memory"
    assert compiled.spills == 0
    assert not compiled.serializes


@pytest.mark.parametrize(
    "dtype, dim",
    [(dtype, dim) for dtype, dims in support.HEAD_DIMS.items() for dim in dims],
    ids=str,
)
def test_hopper_kernels_fit(dim, dtype, use_target, monkeypatch):
    from attn_evo._hopper import output, stat, stat_wide  # of Gluon, which the lowest Triton lacks
    from attn_evo._hopper.float32 import output as output_float32
    from attn_evo._hopper.float32 import stat as stat_float32

    use_target("sm_90")
    monkeypatch.setattr(support, "device_info", problem.device_info)
    sums = record_launches(LAUNCHERS["sums"], monkeypatch)
    if dtype == torch.float32:
        launchers = stat_float32._launch_stat, output_float32._launch_output
    else:
        stat_launcher = {64: stat, 128: stat_wide}[dim]._launch_stat
        launchers = stat_launcher, output._launch_output[dim]
    recorders = [record_launches(launcher, monkeypatch) for launcher in launchers]
    launch(Case(dtype, dim), "output")
    for recorder in recorders:
        compiled = recorder.compile("sm_90")
        assert compiled.fits, f"{compiled.shared} bytes of shared memory"
        assert compiled.spills == 0
        if dtype != torch.float32 and (dim == 64 or triton_version() == (3, 6)):
            assert not compiled.serializes
    # Whoever lets the next launch start early is waited for there.
    starts_next = "griddepcontrol.launch_dependents" in sums.compile("sm_90").asm["ptx"]
    assert starts_next == ("griddepcontrol.wait" in recorders[0].compile("sm_90").asm["ptx"])
    assert starts_next == recorders[0].options.get("launch_pdl", False)


def test_hopper_gradient_kernels_of_float32_fit(use_target, monkeypatch):
    from attn_evo._hopper.float32 import backward_gate, backward_norm, backward_stat, stat

    use_target("sm_90")
    monkeypatch.setattr(support, "device_info", problem.device_info)
    for launcher in (*LAUNCHERS.values(), stat._launch_stat):
        record_launches(launcher, monkeypatch)
    measured = backward_norm._launch_norm, backward_gate._launch_gate, backward_stat._launch_stat
    recorders = [record_launches(launcher, monkeypatch) for launcher in measured]
    launch(Case(torch.float32, 64), "backward")
    for recorder in recorders:
        compiled = recorder.compile("sm_90")
        assert compiled.fits, f"{compiled.shared} bytes of shared memory"
        assert compiled.spills <= MAX_SPILLS_FLOAT32


def start_with_descriptors(launcher, num_programs, args, constants, maxnreg):
    """What a `GluonLauncher` does at a problem's first launch, on a GPU."""
    args = [arg.describe() if isinstance(arg, tuple) else arg for arg in args]
    options = {"num_warps": launcher._num_warps, "maxnreg": maxnreg}
    launcher._kernel[(num_programs,)](*args, **constants, **options)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dim", support.HEAD_DIMS[torch.bfloat16])
def test_hopper_gradient_kernels_fit(dim, causal, use_target, monkeypatch):
    from attn_core.gluon_launch import GluonLauncher
    from attn_evo._hopper import backward_gate, backward_norm, backward_stat, stat, stat_wide
    from attn_evo._triton import backward_products, backward_total

    use_target("sm_90")
    monkeypatch.setattr(support, "device_info", problem.device_info)
    monkeypatch.setattr(GluonLauncher, "__call__", start_with_descriptors)
    measured = [backward_norm._launch_norm[dim], backward_gate._launch_gate]
    measured += [backward_stat._launch_stat] if causal else [backward_total._launch_rows]
    measured += [backward_products._launch_final] if dim > support.HELD_DIM else []
    for launcher in (*LAUNCHERS.values(), stat._launch_stat, stat_wide._launch_stat):
        record_launches(launcher, monkeypatch)
    recorders = [record_launches(launcher, monkeypatch) for launcher in measured]
    launch(Case(torch.bfloat16, dim, causal), "backward")
    for recorder in recorders:
        compiled = recorder.compile("sm_90")
        assert compiled.fits, f"{compiled.shared} bytes of shared memory"
        assert compiled.spills <= MAX_SPILLS


def test_hopper_gradient_kernels_of_whole_sequences_fit(use_target, monkeypatch):
    from attn_core.gluon_launch import GluonLauncher
    from attn_evo._hopper import forward as hopper
    from attn_evo._hopper.whole import backward_gate, backward_norm, backward_stat
    from attn_evo._triton import backward_products

    use_target("sm_90")
    monkeypatch.setattr(support, "device_info", problem.device_info)
    monkeypatch.setattr(hopper, "_LEAST_USE", 0.0)
    monkeypatch.setattr(GluonLauncher, "__call__", start_with_descriptors)
    measured = backward_norm._launch_norm, backward_gate._launch_gate, backward_stat._launch_stat
    measured += (backward_products._launch_final_query,)
    for launcher in LAUNCHERS.values():
        record_launches(launcher, monkeypatch)
    recorders = [record_launches(launcher, monkeypatch) for launcher in measured]
    launch(Case(torch.bfloat16, 128), "backward")
    for recorder in recorders:
        compiled = recorder.compile("sm_90")
        assert compiled.fits, f"{compiled.shared} bytes of shared memory"
        assert compiled.spills <= MAX_SPILLS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "dim, columns",
    [(1, 16384), (1, 1000), (1, 16), (2, 16384)],
    ids=["d1-c16384", "d1-c1000", "d1-c16", "d2-c16384"],
)
@pytest.mark.parametrize("exclusive", [False, True], ids=["inclusive", "exclusive"])
@pytest.mark.parametrize("target", TARGETS)
def test_prefix_sum_compiles_and_fits(
    target, exclusive, dim, columns, dtype, use_target, monkeypatch
):
    use_target(target)
    is_one_pass = dim == 1 and columns % 64 == 0 and not target.startswith("gfx")
    names = ("columns",) if is_one_pass else ("chunks", "scan")
    launchers = [getattr(prefix_sum, f"_launch_{name}") for name in names]
    recorders = [record_launches(launcher, monkeypatch) for launcher in launchers]
    prefix_sum.prefix_sum(
        torch.empty(32, 16384, columns, dtype=dtype, device="meta"), dim, exclusive, True
    )
    for recorder in recorders:
        compiled = recorder.compile(target)
        assert compiled.fits, f"{compiled.shared} bytes of shared memory"
        assert compiled.spills == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_hopper_prefix_sum_fits(reverse, dtype, use_target, monkeypatch):
    from attn_evo._hopper import prefix_sum as hopper

    use_target("sm_90")
    monkeypatch.setattr(support, "device_info", problem.device_info)
    recorder = record_launches(hopper.launch_columns, monkeypatch)
    x = torch.empty(32, 16384, 192, dtype=dtype, device="meta")
    prefix_sum.prefix_sum(x, 1, reverse, reverse)
    compiled = recorder.compile("sm_90")
    assert compiled.fits, f"{compiled.shared} bytes of shared memory"
    assert compiled.spills == 0


@pytest.mark.parametrize("table", [configs.FORWARD, configs.BACKWARD], ids=lambda t: t.name)
def test_no_shipped_row_is_left_out(table, use_target):
    cases = {(configs.padded_head_dim(case.D), case.dtype.itemsize) for case in CASES["sm_90"]}
    assert {key[1:3] for key in table.rows} <= cases
