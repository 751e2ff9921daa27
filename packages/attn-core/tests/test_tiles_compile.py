"""The device functions compile for every target; most are compiled by the kernels that use them."""

import pytest

from attn_core.testing.compilation import TARGETS, compile_ahead

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from attn_core.tiles.dropout import draw_words, keep_tile  # noqa: E402

pytestmark = pytest.mark.compile


@triton.jit
def drop_kernel(
    out_ptr, seed, threshold,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, IS_NVIDIA: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cells = out_ptr + rows[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    b, h = tl.program_id(1), tl.program_id(2)
    words = draw_words(seed, 0, b, h, rows, 0, BLOCK_M, BLOCK_D, IS_NVIDIA)
    keep = keep_tile(words, threshold, BLOCK_M, BLOCK_D)
    tl.store(cells, tl.where(keep, tl.load(cells), 0.0))


@pytest.mark.parametrize("seed", ["i32", "i64"])
@pytest.mark.parametrize("target", TARGETS)
def test_dropout(target, seed):
    signature = {"out_ptr": "*fp32:16", "seed": seed, "threshold": "i32"}
    sizes = {"BLOCK_M": 64, "BLOCK_D": 64, "IS_NVIDIA": False}
    compiled = compile_ahead(drop_kernel, signature, sizes, target, num_warps=4)
    assert compiled.spills == 0
    assert compiled.fits


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
def test_dropout_multiplies_words_at_once(target):
    signature = {"out_ptr": "*fp32:16", "seed": "i64", "threshold": "i32"}
    sizes = {"BLOCK_M": 64, "BLOCK_D": 64, "IS_NVIDIA": True}
    compiled = compile_ahead(drop_kernel, signature, sizes, target, num_warps=4)
    assert "mul.wide.u32" in compiled.asm["ptx"]
    assert "mul.hi.u32" not in compiled.asm["ptx"]
    assert compiled.spills == 0
