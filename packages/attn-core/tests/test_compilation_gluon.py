"""compile_ahead on a Gluon kernel."""

import pytest

from attn_core.testing.compilation import compile_ahead

gluon = pytest.importorskip("triton.experimental.gluon")
gl = pytest.importorskip("triton.experimental.gluon.language")
pytestmark = pytest.mark.compile


@gluon.jit
def increment(x_ptr, out_ptr, n, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offs = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, layout=layout)
    gl.store(out_ptr + offs, gl.load(x_ptr + offs, mask=offs < n) + 1, mask=offs < n)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_report_of_a_small_kernel(target):
    signature = {"x_ptr": "*fp32:16", "out_ptr": "*fp32:16", "n": "i32"}
    compiled = compile_ahead(increment, signature, {"BLOCK": 128}, target, num_warps=4)
    assert 0 < compiled.registers <= 64
    assert compiled.spills == 0
