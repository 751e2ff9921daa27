"""compile_ahead: what it reports and what it refuses."""

import pytest

from attn_core.testing.compilation import TARGETS, compile_ahead

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.compile

SIGNATURE = {"x_ptr": "*fp32:16", "out_ptr": "*fp32:16", "n": "i32"}


@triton.jit
def increment(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) + 1, mask=offs < n)


@triton.jit
def square(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, tl.dot(x, x))


@triton.jit
def outer(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Hold a tile that no warp has registers for."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs).to(tl.float32)
    tile = x[:, None] * x[None, :]
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], tile / tl.sum(tile, 1)[None, :])


@pytest.mark.parametrize("target", TARGETS)
def test_report_of_a_small_kernel(target):
    compiled = compile_ahead(increment, SIGNATURE, {"BLOCK": 1024}, target, num_warps=4)
    assert 0 < compiled.registers <= 64
    assert compiled.spills == 0
    assert compiled.shared == 0
    assert compiled.fits
    assert compiled.asm["ptx" if target.startswith("sm_") else "amdgcn"]


def test_spills_are_seen():
    pointers = {"x_ptr": "*fp16:16", "out_ptr": "*fp32:16"}
    options = {"num_warps": 4, "maxnreg": 32}
    assert compile_ahead(outer, pointers, {"BLOCK": 64}, "sm_80", **options).spills > 0


def test_too_much_shared_memory_is_seen():
    pointers = {"x_ptr": "*fp16:16", "out_ptr": "*fp32:16"}
    compiled = compile_ahead(square, pointers, {"BLOCK": 256}, "gfx942", num_warps=8)
    assert compiled.shared > 65536
    assert not compiled.fits


def test_hints_change_the_code():
    def code(n):
        signature = {**SIGNATURE, "n": n}
        return compile_ahead(increment, signature, {"BLOCK": 1024}, "sm_80").asm["ptx"]

    assert "ld.global.v4" in code("i32:16")
    assert "ld.global.v4" not in code("i32")
    assert "n_param" not in code("i32:1")


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"unknown \['m'\] and missing \['n', 'out_ptr'\]"):
        compile_ahead(increment, {"x_ptr": "*fp32", "m": "i32"}, {"BLOCK": 64}, "sm_80")
    with pytest.raises(ValueError, match="the type of n must end in :1, :16 or neither, got :8"):
        compile_ahead(increment, {**SIGNATURE, "n": "i32:8"}, {"BLOCK": 64}, "sm_80")
    with pytest.raises(ValueError, match="target must start with sm_ or gfx, got 'h200'"):
        compile_ahead(increment, SIGNATURE, {"BLOCK": 64}, "h200")


def test_type_error_of_a_kernel_is_raised():
    from triton.compiler.errors import CompilationError

    with pytest.raises(CompilationError):
        compile_ahead(increment, {**SIGNATURE, "n": "*fp32"}, {"BLOCK": 64}, "sm_80")


def test_active_driver_is_left_alone():
    from triton.runtime import driver

    before = driver._active
    compile_ahead(increment, SIGNATURE, {"BLOCK": 1024}, "sm_80")
    assert driver._active is before
