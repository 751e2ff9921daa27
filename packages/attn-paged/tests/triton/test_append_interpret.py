"""The kernel that writes to the cache, in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import embedded
from attn_paged import reference
from attn_paged.options import AppendOptions, Rotary

pytest.importorskip("triton")

from attn_paged._triton import append

pytestmark = pytest.mark.interpret

ORDERS = {"nhd": (0, 1, 2, 3), "hnd": (0, 2, 1, 3), "far": (3, 2, 1, 0)}


def check_append(k, v, k_cache, v_cache, slots, scales=(None, None), rotary=None):
    written = [x for x in (k_cache, v_cache, *scales) if x is not None]
    expected = [x.clone() for x in written]
    options = AppendOptions(*(expected[2:] or scales), rotary)
    reference.append_to_cache(k, v, *expected[:2], slots, options)
    append.append_to_cache(k, v, k_cache, v_cache, slots, AppendOptions(*scales, rotary))
    for pair in zip(written, expected, strict=True):
        actual, wanted = (x.float().nan_to_num(7.0) for x in pair)
        torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dims", [(16, 16), (24, 7)], ids=str)
@pytest.mark.parametrize("is_given", [False, True], ids=["own", "given"])
def test_append_quantises(is_given, dims):
    """To int8: Triton 3.6's interpreter errs where rounding to float8 carries to the exponent."""
    rows = [torch.randn(5, 3, dim) for dim in dims]
    rows[1][2, 1] = 0.0
    caches = [torch.zeros(4, 7, 3, dim, dtype=torch.int8) for dim in dims]
    shape = (3,) if is_given else (4, 7, 3)
    scales = [torch.rand(shape) / 100 + 1e-3 for _ in range(2)]
    check_append(*rows, *caches, torch.tensor([27, -1, 0, 9, -5]), scales)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 5, 8])
def test_append_rotates(pairs, interleaved):
    cos, sin = (torch.rand(2 * pairs, 9).t()[:, ::2] for _ in range(2))
    positions = torch.tensor([3, 8, 0, 10**6], dtype=torch.int32)
    rotary = Rotary(cos, sin, positions, interleaved)
    rows, caches = torch.randn(2, 4, 3, 16), torch.full((2, 3, 2, 3, 16), torch.nan)
    check_append(*rows, *caches, torch.tensor([5, 0, 3, -1]), rotary=rotary)


def test_append_rotates_and_quantises():
    cos, sin = torch.rand(2, 9, 8)
    rotary = Rotary(cos, sin, torch.tensor([3, 8, 0]))
    caches = torch.zeros(2, 3, 2, 3, 16, dtype=torch.int8)
    scales = [*torch.zeros(2, 3, 2, 3)]
    check_append(*torch.randn(2, 3, 3, 16), *caches, torch.tensor([5, 0, 3]), scales, rotary)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("layout", ORDERS)
@pytest.mark.parametrize("dims", [(16, 16), (24, 7), (1, 33)], ids=str)
def test_append(dims, layout, index_dtype):
    shapes = [(5, 3, dim) for dim in dims], [(4, 7, 3, dim) for dim in dims]
    rows, caches = ([torch.randn(shape) for shape in group] for group in shapes)
    rows = [embedded(x, order=(2, 0, 1)) for x in rows]
    caches = [embedded(x, order=ORDERS[layout]) for x in caches]
    check_append(*rows, *caches, torch.tensor([27, -1, 0, 9, -5], dtype=index_dtype)[:5])


def test_append_through_packed_views():
    packed = torch.full((3, 4, 2, 16), torch.nan)
    check_append(*torch.randn(2, 3, 2, 8), *packed.split(8, -1), torch.tensor([7, 0, 11]))


def test_append_of_more_heads_than_a_tile_has(monkeypatch):
    monkeypatch.setattr(append, "_TILE", 64)
    check_append(*torch.randn(2, 2, 7, 16), *torch.zeros(2, 3, 5, 7, 16), torch.tensor([14, 2]))


@pytest.mark.parametrize("tokens, heads", [(0, 2), (3, 0)])
def test_append_of_nothing(tokens, heads):
    rows = torch.randn(2, tokens, heads, 8)
    caches = torch.randn(2, 3, 4, heads, 8)
    append.append_to_cache(*rows, *caches.clone(), torch.arange(tokens), AppendOptions())
