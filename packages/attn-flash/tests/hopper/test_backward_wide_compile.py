"""The backward kernels for wide heads compiled ahead of time: shared memory and spills."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing.compilation import compile_ahead, record_launches

pytest.importorskip("triton.experimental.gluon")

from attn_flash._hopper import backward_sums, backward_wide

pytestmark = pytest.mark.compile

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Bytes: numbers that stay the same through the loops. An accumulator that does not fit takes
# thousands, and half of a consumer's registers hold 256 columns of a gradient.
MAX_SPILLS = 640


def type_of(value):
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}:16"
    if isinstance(value, tuple):
        tile = value.describe()
        return f"tensordesc<{TYPES[value.tensor.dtype]}{tile.block_shape},{tile.layout!r}>"
    return "fp32" if isinstance(value, float) else "i32"


@pytest.fixture
def launches(monkeypatch):
    """The kernels that the launcher has started, compiled."""
    compiled = []

    def compiler(kernel):
        def launch(num_programs, args, constants, maxnreg):
            names = kernel.arg_names
            signature = {name: type_of(x) for name, x in zip(names, args, strict=False)}
            options = {"num_warps": 4, "maxnreg": maxnreg}
            compiled.append(compile_ahead(kernel, signature, constants, "sm_90", **options))

        return launch

    for name in ("_launch_dk_dv", "_launch_dq"):
        kernel = getattr(backward_wide, name)._kernel
        monkeypatch.setattr(backward_wide, name, compiler(kernel))
    return compiled


def run(D, window, dtype):
    q = torch.zeros(1, 256, 2, D, dtype=dtype)
    k = torch.zeros(1, 256, 1, D, dtype=dtype)
    lse = torch.zeros(1, 2, 256)
    backward_wide.attention_backward_wide(q, lse, q, k, k, q, lse, 0.1, window)


@pytest.mark.parametrize(
    "D, window, dtype",
    [
        pytest.param(256, (-1, -1), torch.bfloat16, id="d256-full-bfloat16"),
        pytest.param(192, (-1, 0), torch.float16, id="d192-causal-float16"),
        pytest.param(256, (100, 20), torch.bfloat16, id="d256-window-bfloat16"),
    ],
)
def test_accumulators_stay_in_registers(D, window, dtype, launches, monkeypatch):
    prepare = record_launches(backward_sums._launch_prepare, monkeypatch)
    run(D, window, dtype)
    assert prepare.compile("sm_90").spills == 0
    assert len(launches) == 2
    for kernel in launches:
        assert kernel.fits
        assert not kernel.serializes
        assert kernel.spills <= MAX_SPILLS
