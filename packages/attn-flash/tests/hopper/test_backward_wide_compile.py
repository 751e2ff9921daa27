"""The backward kernels for wide heads compiled ahead of time: shared memory and spills."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing.compilation import record_launches

from .cases import CAUSAL, HALF, OPEN, compiler

pytest.importorskip("triton.experimental.gluon")

from attn_flash._hopper import backward_sums, backward_wide

pytestmark = pytest.mark.compile

# Bytes: numbers that stay the same through the loops. An accumulator that does not fit takes
# thousands, and half of a consumer's registers hold 256 columns of a gradient.
MAX_SPILLS = 640


@pytest.mark.parametrize(
    "D, window, dtype",
    [
        pytest.param(256, OPEN, torch.bfloat16, id="d256-full-bfloat16"),
        pytest.param(192, CAUSAL, HALF, id="d192-causal-float16"),
        pytest.param(256, (100, 20), torch.bfloat16, id="d256-window-bfloat16"),
    ],
)
def test_accumulators_stay_in_registers(D, window, dtype, monkeypatch):
    prepare = record_launches(backward_sums._launch_prepare, monkeypatch)
    launches = [
        compiler(monkeypatch, backward_wide, name) for name in ("_launch_dk_dv", "_launch_dq")
    ]
    q = torch.zeros(1, 256, 2, D, dtype=dtype)
    k = torch.zeros(1, 256, 1, D, dtype=dtype)
    lse = torch.zeros(1, 2, 256)
    backward_wide.attention_backward_wide(q, lse, q, k, k, q, lse, 0.1, window)
    assert prepare.compile("sm_90").spills == 0
    for launch in launches:
        [kernel] = launch.compiled
        assert kernel.fits
        assert not kernel.serializes
        assert kernel.spills <= MAX_SPILLS
