"""The Triton kernels compiled ahead of time, with the tiles each architecture is shipped with."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from attn_core.testing.compilation import TARGETS, record_launches

pytest.importorskip("triton")

from attn_triangle._triton import backward, configs, dbias, dk_dv, dq, forward, keys, short

pytestmark = pytest.mark.compile

LAUNCHERS = {
    "visible_keys": keys._launch,
    "forward": forward._launch,
    "dq": dq._launch,
    "dk_dv": dk_dv._launch,
    "dbias": dbias._launch,
    "sum": dbias._launch_sum,
}
SMALL = ("visible_keys", "sum")  # the same whatever the case
TABLES = {
    "forward": configs.FORWARD,
    "dq": configs.BACKWARD_DQ,
    "dk_dv": configs.BACKWARD_DK_DV,
    "dbias": configs.BACKWARD_DBIAS,
}
MAX_SPILLS = 64  # bytes, in 16-bit kernels of sm_90


class Case(NamedTuple):
    dtype: torch.dtype
    D: int
    has_mask: bool = True
    tf32: bool = False
    dlse: bool = False
    additive: bool = False

    def __str__(self):
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        mask = "added" if self.additive else "masked" if self.has_mask else "open"
        words = [f"d{self.D}", dtype, mask]
        return "-".join([*words, "dlse"] if self.dlse else words)


PORTABLE = [
    Case(torch.bfloat16, 32),
    Case(torch.bfloat16, 128),
    Case(torch.float32, 32),
    # With ieee products these take long; their tiles and their memory are the same.
    Case(torch.float32, 128, tf32=True),
]
HOPPER = [
    Case(torch.bfloat16, 32, has_mask=False),
    Case(torch.bfloat16, 64),
    Case(torch.float16, 48, dlse=True),
    Case(torch.bfloat16, 32, additive=True),
]
CASES = {target: [*PORTABLE, *(HOPPER if target == "sm_90" else ())] for target in TARGETS}


def launches(case, monkeypatch):
    """What each launcher would start for a case."""
    if case.tf32:
        monkeypatch.setattr(forward.tiling, "dot_precision", lambda tensor: "tf32")
    recorders = {name: record_launches(LAUNCHERS[name], monkeypatch) for name in LAUNCHERS}
    q = torch.empty(1, 256, 256, 4, case.D, dtype=case.dtype, device="meta").permute(0, 3, 1, 2, 4)
    bias = torch.empty(1, 4, 256, 256, dtype=case.dtype, device="meta")
    kind = case.dtype if case.additive else torch.bool
    mask = torch.empty(1, 256, 256, dtype=kind, device="meta") if case.has_mask else None
    out, lse = forward.attention(q, q, q, bias, mask, 0.1, "mean")
    dlse = lse if case.dlse else None
    wanted = "dq dk_dv dbias" + (" dmask" if case.additive else "")
    backward.attention_backward(out, dlse, q, q, q, bias, mask, out, lse, 0.1, "mean", wanted, True)
    return recorders


RUNS = [
    pytest.param(target, case, name, id=f"{target}-{case}-{name}")
    for target in TARGETS
    for case in CASES[target]
    for name in LAUNCHERS
    if name not in SMALL or case == PORTABLE[0] or case.additive
]


@pytest.mark.parametrize("target, case, name", RUNS)
def test_shipped_tiles_compile_and_fit(target, case, name, use_target, monkeypatch):
    use_target(target)
    launch = launches(case, monkeypatch)[name]
    compiled = launch.compile(target)
    assert compiled.fits, f"{compiled.shared} bytes of shared memory"
    if target == "sm_90" and case.dtype != torch.float32:
        assert compiled.spills <= MAX_SPILLS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "case", [Case(torch.bfloat16, 32), Case(torch.float16, 16, False)], ids=str
)
def test_short_rows_compile_and_fit(case, target, use_target, monkeypatch):
    use_target(target, modules=[short])
    dk_dv = short._launch_dk_dv_hopper if target == "sm_90" else short._launch_dk_dv
    launchers = (short._launch_dq, dk_dv, dbias._launch_sum)
    launches = [record_launches(launcher, monkeypatch) for launcher in launchers]
    q = torch.empty(1, 128, 128, 4, case.D, dtype=case.dtype, device="meta").permute(0, 3, 1, 2, 4)
    bias = torch.empty(1, 4, 128, 128, dtype=case.dtype, device="meta")
    lse = bias.float()
    mask = torch.empty(1, 128, 128, dtype=torch.bool, device="meta") if case.has_mask else None
    short.short_backward(q, lse, q, q, q, bias, mask, q, lse, 0.1, "mean")
    assert all(launch.compile(target).fits for launch in launches)


@pytest.mark.parametrize("name", TABLES)
def test_a_problem_finds_its_row(name, use_target):
    use_target("sm_90")
    q = torch.empty(1, 1, 2, 64, 24, device="meta")
    found = configs.tiles(TABLES[name], q, q, launch=None)
    assert found == TABLES[name].rows["*", 32, 4, 64]
