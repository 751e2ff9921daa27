"""The kernels behind flash_attn_with_kvcache and apply_rotary_emb in the interpreter."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import assert_within_budget, poison_new_allocations
from attn_core.tuning import TileConfig
from attn_flash import kvcache_ops, rotary_ops
from attn_flash.kvcache_conformance import KVCACHE_CASES, ROTARY_CASES

pytest.importorskip("triton")

from attn_core import backends
from attn_flash._triton import decode_configs

pytestmark = pytest.mark.interpret

BACKEND = "triton"
DTYPES = [torch.float32, torch.float16]
# In float32 both errors are a few roundings, added up in another order: the largest is luck.
FACTORS = {torch.float32: 4.0, torch.float16: 2.0}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Backend "triton" takes tensors on the CPU, in tiles of 16 by 16 and by chance more splits."""
    monkeypatch.setattr("attn_flash._companions.triton_refusal", lambda device: None)
    backends._resolve.cache_clear()
    use_tiles(monkeypatch, TileConfig(16, 16))
    monkeypatch.setattr(decode_configs, "num_splits", lambda *args: 2)
    yield
    backends._resolve.cache_clear()


def use_tiles(monkeypatch, config):
    monkeypatch.setattr(decode_configs, "tiles", lambda q, v_cache: config)


def check(case, dtype):
    inputs = case.inputs(dtype, torch.device("cpu"))
    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    with poison_new_allocations():
        actual = case.call(BACKEND, **inputs)
    same_dtype, exact = case.reference(**inputs), case.reference(**wide)
    if isinstance(actual, torch.Tensor):
        actual, same_dtype, exact = (actual,), (same_dtype,), (exact,)
    for index, (value, *expected) in enumerate(zip(actual, same_dtype, exact, strict=True)):
        assert_within_budget(value, *expected, name=f"output {index}", factor=FACTORS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KVCACHE_CASES, ids=str)
def test_kvcache(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("case", KVCACHE_CASES[4:7], ids=str)
def test_larger_tiles_peel_their_masks(case, monkeypatch):
    use_tiles(monkeypatch, TileConfig(64, 16))
    check(case._replace(M=10, new=min(case.new, 10)), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROTARY_CASES, ids=str)
def test_rotary(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("case", ROTARY_CASES[:4], ids=str)
def test_rotary_in_place_is_out_of_place(case):
    inputs = case.inputs(torch.float32, torch.device("cpu"))
    expected = case.call(BACKEND, **inputs)
    assert not torch.equal(expected, inputs["x"])
    x = inputs["x"]
    offsets = inputs.get("seqlen_offsets")
    tail = (case.S, case.interleaved, False, BACKEND)
    places = (offsets, case._offset(), inputs.get("cu_seqlens"))
    rotary_ops.rotate_(x, inputs["cos"], inputs["sin"], *places, *tail)
    assert torch.equal(x, expected)


def test_lengths_beyond_the_cache_write_nothing_outside_it():
    """On a GPU lengths are not checked: they are cut to what the cache has room for."""
    storage = torch.full((3, 40, 2, 16), 5.0)
    k_cache, v_cache = storage[1:2].clone(), storage[1:2]
    k = torch.randn(1, 4, 2, 16)
    seqlens = torch.tensor([38], dtype=torch.int32)
    cache = (seqlens, 0, None, None, None)
    kvcache_ops.append(k, k, k_cache, v_cache, None, None, True, *cache, BACKEND)
    assert torch.equal(v_cache[0, 38:], k[0, :2])
    assert storage[0].eq(5.0).all()
    assert storage[2].eq(5.0).all()
    q = torch.randn(1, 1, 2, 16)
    args = (None, None, True, *cache, None, 4, 0.25, -1, -1, 0.0, 1)
    out, _ = kvcache_ops.attention(q, k_cache, v_cache, *args, BACKEND)
    full = torch.tensor([36], dtype=torch.int32)
    args = (None, None, True, full, *cache[1:], None, 4, 0.25, -1, -1, 0.0, 1)
    expected, _ = kvcache_ops.attention(q, k_cache, v_cache, *args, BACKEND)
    assert torch.equal(out, expected)
