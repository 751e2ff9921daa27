"""The kernels for KV caches and rotation compiled ahead of time, with the tiles they ship with."""

from __future__ import annotations

import functools

import pytest
import torch

from attn_core.testing.compilation import TARGETS, record_launches
from attn_flash.kvcache_conformance import KVCacheCase, RotaryCase

pytest.importorskip("triton")

from attn_flash._triton import append, decode, decode_configs, rotary
from attn_flash.kvcache_checks import Cache

pytestmark = pytest.mark.compile

LENS = (9, 20)
CACHES = [
    KVCacheCase(LENS, H=8, D=64, D_v=64, causal=True),
    KVCacheCase(LENS, H=64, H_KV=8, D=128, D_v=128, new=1, rotary=128, causal=True, leftpad=True),
    KVCacheCase(LENS, H=8, D=256, D_v=256, page=16, batch_idx=True),
    KVCacheCase(LENS, M=12, H=8, D=64, D_v=64, causal=True, alibi=True),
    KVCacheCase(LENS, M=12, H=8, D=128, D_v=128, new=12, rotary=64, softcap=20.0, window=(9, 0)),
    KVCacheCase(LENS, M=12, H=8, D=256, D_v=256, causal=True),
    KVCacheCase(LENS, M=90, H=8, D=64, D_v=64, page=256, causal=True),
    KVCacheCase(LENS, M=90, H=8, D=128, D_v=128, causal=True),
    KVCacheCase(LENS, M=90, H=8, D=256, D_v=256, causal=True),
]
ROTATIONS = [
    RotaryCase(2, 100, 4, 64, 64),
    RotaryCase(2, 100, 4, 96, 32, interleaved=True, offsets="tensor", lens=(100, 3)),
]
# Bytes that 16-bit kernels of sm_90 may spill, by BLOCK_M and BLOCK_DV.
MAX_SPILLS = {(64, 256): 256, (128, 256): 512, (128, 128): 64}


@pytest.fixture
def use_target(use_target):
    return functools.partial(use_target, modules=(decode_configs,), num_sms=100)


def on_meta(tensors):
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def launch_attention(case, dtype):
    inputs = on_meta(case.inputs(dtype, torch.device("cpu")))
    names = ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table")
    seqlens, *places = map(inputs.get, names)
    rotation = (inputs.get("rotary_cos"), inputs.get("rotary_sin"), case.interleaved)
    caches = (inputs["k_cache"], inputs["v_cache"], *rotation, Cache(seqlens, 0, *places))
    if case.new:
        append.append(inputs["k"], inputs["v"], *caches)
    left, right = case.window
    window = (left, 0 if case.causal else right)
    tail = (inputs.get("alibi_slopes"), case.new, 0.1, window, case.softcap, 3)
    decode.attention(inputs["q"], *caches, *tail)


def launch_rotation(case, dtype):
    inputs = on_meta(case.inputs(dtype, torch.device("cpu")))
    x, cos, sin = (inputs[name] for name in ("x", "cos", "sin"))
    places = (inputs.get("seqlen_offsets"), 0, inputs.get("cu_seqlens"), case.S)
    rotary.rotate(torch.empty_like(x), x, cos, sin, *places, case.interleaved, False)


def compiled_kernels(launch, launchers, monkeypatch, target):
    """Compile what `launch` starts."""
    recorders = [record_launches(launcher, monkeypatch) for launcher in launchers]
    launch()
    for recorder in recorders:
        if hasattr(recorder, "args"):
            yield recorder.constexprs, recorder.compile(target)


@pytest.mark.parametrize("case", CACHES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_kvcache_kernels_compile_and_fit(target, case, use_target, monkeypatch):
    use_target(target)
    launchers = (append._launch, decode._launch, decode._launch_merge)
    run = compiled_kernels(
        lambda: launch_attention(case, torch.bfloat16), launchers, monkeypatch, target
    )
    for constants, compiled in run:
        assert compiled.fits, f"{compiled.shared} bytes of shared memory"
        if target == "sm_90":
            size = constants.get("BLOCK_M"), constants.get("BLOCK_DV")
            assert compiled.spills <= MAX_SPILLS.get(size, 0)


@pytest.mark.parametrize("case", ROTATIONS, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_rotary_kernels_compile(target, case, use_target, monkeypatch):
    use_target(target)
    run = compiled_kernels(
        lambda: launch_rotation(case, torch.bfloat16), (rotary._launch,), monkeypatch, target
    )
    [(_, compiled)] = run
    assert compiled.spills == 0


@pytest.mark.parametrize(
    "launcher",
    [append._launch, decode._launch, decode._launch_merge, rotary._launch],
    ids=["append", "attention", "merge", "rotate"],
)
def test_no_kernel_is_compiled_for_a_size_that_its_launcher_forgets(launcher):
    """A launcher remembers kernels by strides and constants: sizes must not go into the code."""
    sizes = [
        parameter.name
        for parameter in launcher._kernel.params
        if not parameter.is_constexpr
        and not parameter.name.endswith(("_ptr", "_log2"))
        and not parameter.name.startswith("stride_")
    ]
    assert len(sizes) > 3
    assert [name for name in sizes if name not in launcher._kernel.do_not_specialize] == []
