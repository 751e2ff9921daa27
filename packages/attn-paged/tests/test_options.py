"""What a call may ask for: quantised caches, rotation, trees, causal by sequence, sharing."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from attn_core.testing import assert_within_budget, random_tensor
from attn_paged import append_to_cache, paged_attention, reference
from attn_paged.options import AppendOptions, AttentionOptions

FLOAT8 = torch.float8_e4m3fn
LENS_K, LENS_Q = (40, 0, 5, 33, 12), (1, 0, 5, 20, 3)
BLOCK = 8


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def make(lens_k=LENS_K, lens_q=LENS_Q, *, heads=4, heads_kv=2, dim=16, dtype=torch.float32):
    """Arguments of paged_attention over caches without unused blocks."""
    counts = [-(-n // BLOCK) for n in lens_k]
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    ids = iter(torch.randperm(sum(counts)).tolist())
    for row, count in enumerate(counts):
        tables[row, :count] = int32([next(ids) for _ in range(count)])
    slots = (sum(counts), BLOCK, heads_kv, dim)
    return {
        "q": random_tensor((sum(lens_q), heads, dim), seed="q", dtype=dtype),
        "k_cache": random_tensor(slots, seed="k", dtype=dtype),
        "v_cache": random_tensor(slots, seed="v", dtype=dtype),
        "block_tables": tables,
        "context_lens": int32(lens_k),
        "cu_seqlens_q": int32([*accumulate(lens_q, initial=0)]),
    }


def expected(inputs, **options):
    """What the reference gives, in float64 but for quantised numbers."""
    required = ("q", "k_cache", "v_cache", "block_tables", "context_lens")
    tensors = {
        name: x.double() if x.dtype in (torch.float32, torch.float16) else x
        for name, x in inputs.items()
    }
    options = {"scale": inputs["q"].shape[2] ** -0.5, **options}
    options["cu_seqlens_q"] = inputs["cu_seqlens_q"]
    return reference.attention(*(tensors[x] for x in required), AttentionOptions(**options))


def check(inputs, arguments, **options):
    actual = paged_attention(**inputs, **arguments, return_lse=True)
    for x, y in zip(actual, expected(inputs, **options), strict=True):
        torch.testing.assert_close(x.double(), y, atol=2e-5, rtol=1e-4)
    return actual


# --- trees and causal by sequence -----------------------------------------------------------------


def tree_of(count):
    """Each token follows an earlier one, and sees itself and its ancestors."""
    mask = torch.eye(count, dtype=torch.bool)
    for i in range(1, count):
        mask[i] |= mask[int(torch.randint(i, ()))]
    return mask


@pytest.mark.parametrize("causal", [True, False])
def test_flat_trees(causal):
    trees = torch.cat([tree_of(count).flatten() for count in LENS_Q])
    window = (-1, 0 if causal else -1)
    check(make(), {"tree_mask": trees, "causal": causal}, tree_mask=trees, window=window)


@pytest.mark.parametrize("width", [1, 7, 40, 64])
def test_trees_with_rows(width):
    mask = torch.rand(sum(LENS_Q), width) < 0.5
    arguments = {"tree_mask": mask, "causal": False}
    check(make(), arguments, tree_mask=mask, window=(-1, -1))


def test_a_flat_tree_is_the_same_tree_with_rows():
    inputs = make((40, 30), (4, 4))
    trees = torch.stack([tree_of(4), tree_of(4)])
    flat = paged_attention(**inputs, tree_mask=trees.flatten())
    assert torch.equal(flat, paged_attention(**inputs, tree_mask=trees.flatten(0, 1)))


def test_a_tree_goes_with_everything_else():
    trees = torch.cat([tree_of(count).flatten() for count in LENS_Q])
    sinks, slopes = torch.randn(4), torch.rand(4)
    same = {"tree_mask": trees, "sinks": sinks, "alibi_slopes": slopes, "softcap": 3.0}
    check(make(), {**same, "window_size": (9, 0)}, **same, window=(9, 0))


def test_causal_by_sequence():
    is_causal = torch.tensor([True, False, False, True, False])
    arguments = {"causal": is_causal, "window_size": (17, 4)}
    check(make(), arguments, is_causal=is_causal, window=(17, 4))


# --- quantised caches -----------------------------------------------------------------------------


def quantised(inputs, dtype, shape):
    """The inputs with caches of `dtype`, and scales of a shape."""
    limit = 448.0 if dtype == FLOAT8 else 127.0
    slots = inputs["k_cache"].shape[:3]
    scales = {}
    for name in ("k", "v"):
        scale = torch.rand({"slots": slots, "heads": slots[2:], "one": ()}[shape]) / limit + 1e-3
        numbers = inputs[f"{name}_cache"] / scale.expand(slots)[..., None]
        numbers = numbers.clamp(-limit, limit)
        inputs[f"{name}_cache"] = (numbers if dtype == FLOAT8 else numbers.round()).to(dtype)
        scales[f"{name}_scale"] = scale
    return inputs, scales


@pytest.mark.parametrize("shape", ["slots", "heads", "one"])
@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8], ids=str)
def test_attention_over_quantised_caches(dtype, shape):
    inputs, scales = quantised(make(), dtype, shape)
    check(inputs, scales, **scales)


@pytest.mark.parametrize("dtype, bound", [(FLOAT8, 0.04), (torch.int8, 0.01)], ids=str)
def test_what_is_appended_is_attended_to(dtype, bound):
    inputs = make((40,), (1,))
    k, v = (inputs[name][inputs["block_tables"][0].long()].flatten(0, 1) for name in CACHES)
    caches = {name: torch.zeros_like(inputs[name], dtype=dtype) for name in CACHES}
    scales = {f"{x}_scale": torch.full(caches["k_cache"].shape[:3], torch.nan) for x in "kv"}
    slots = (inputs["block_tables"][0].long()[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    append_to_cache(k, v, *caches.values(), slots, **scales)
    actual = paged_attention(**{**inputs, **caches}, **scales)
    exact = paged_attention(**inputs)
    assert (actual - exact).norm() < bound * exact.norm()


CACHES = ("k_cache", "v_cache")


@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8], ids=str)
@pytest.mark.parametrize("is_given", [False, True], ids=["own", "given"])
def test_append_quantises_as_the_reference(dtype, is_given):
    k, v = torch.randn(5, 2, 8), 1e-3 * torch.randn(5, 2, 24)
    v[3, 1] = 0.0
    caches = [torch.zeros(4, 3, 2, dim, dtype=dtype) for dim in (8, 24)]
    scales = [torch.rand(2) / 100 if is_given else torch.full((4, 3, 2), -1.0) for _ in range(2)]
    copies = [x.clone() for x in (*caches, *scales)]
    slots = torch.tensor([11, -1, 0, 5, 7])
    reference.append_to_cache(k, v, *copies[:2], slots, AppendOptions(*copies[2:]))
    append_to_cache(k, v, *caches, slots, k_scale=scales[0], v_scale=scales[1])
    for actual, wanted in zip((*caches, *scales), copies, strict=True):
        torch.testing.assert_close(actual.float(), wanted.float(), rtol=0, atol=0)


# --- rotation -------------------------------------------------------------------------------------


def angles(positions, pairs):
    frequencies = 1e4 ** -(torch.arange(pairs) / pairs)
    phases = torch.arange(positions)[:, None] * frequencies
    return phases.cos(), phases.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 8, 16])
def test_append_rotates_as_complex_numbers(rotary_dim, interleaved):
    k, v = torch.randn(2, 5, 2, 16)
    caches = torch.zeros(2, 2, 4, 2, 16)
    cos, sin = angles(50, rotary_dim // 2)
    positions, slots = torch.tensor([0, 7, 49, 3, 10**6]), torch.tensor([0, 1, 2, 3, -1])
    append_to_cache(
        k, v, *caches, slots,
        rotary_cos=cos, rotary_sin=sin, positions=positions, rotary_interleaved=interleaved,
    )  # fmt: skip
    turned = k[:4, :, :rotary_dim]
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).mT
    numbers = torch.view_as_complex(pairs.contiguous())
    numbers = numbers * torch.complex(cos, sin)[positions[:4]][:, None]
    parts = torch.view_as_real(numbers)
    wanted = (parts if interleaved else parts.mT).flatten(-2)
    torch.testing.assert_close(caches[0, 0, :, :, :rotary_dim], wanted)
    assert torch.equal(caches[0, 0, :, :, rotary_dim:], k[:4, :, rotary_dim:])
    assert torch.equal(caches[1, 0], v[:4])
    assert not caches[:, 1].any()


# --- sharing and invariance -----------------------------------------------------------------------


def test_shared_prefixes_change_nothing():
    inputs = make((40, 33, 24, 40), (1, 5, 2, 1))
    inputs["block_tables"][1:, :2] = inputs["block_tables"][0, :2]
    shared = paged_attention(**inputs, shared_prefix=True, return_lse=True)
    for x, y in zip(shared, paged_attention(**inputs, return_lse=True), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "settings",
    [lambda: torch.device("meta"), lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["default-device", "autocast"],
)
@pytest.mark.parametrize("option", ["plain", "decode", "batch_invariant", "shared_prefix"])
def test_settings_of_torch_change_nothing(option, settings):
    inputs = make(lens_q=(1,) * 5 if option == "decode" else LENS_Q)
    if option in ("batch_invariant", "shared_prefix"):
        inputs[option] = True
    if option == "decode":
        del inputs["cu_seqlens_q"]
    wanted = paged_attention(**inputs, return_lse=True, backend="torch")
    with settings():
        results = paged_attention(**inputs, return_lse=True, backend="torch")
    for x, y in zip(results, wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("lens_q", [LENS_Q, (1,) * 5], ids=["mixed", "decode"])
def test_a_sequence_has_the_same_bits_in_every_batch(lens_q):
    inputs = make(lens_q=lens_q, dtype=torch.float16)
    out, lse = paged_attention(**inputs, batch_invariant=True, return_lse=True)
    bounds = inputs["cu_seqlens_q"].tolist()
    for b in (0, 3):
        rows, row = slice(bounds[b], bounds[b + 1]), slice(b, b + 1)
        alone = {name: inputs[name][row] for name in ("block_tables", "context_lens")}
        alone["cu_seqlens_q"] = int32([0, lens_q[b]])
        alone["q"] = inputs["q"][rows]
        result = paged_attention(**{**inputs, **alone}, batch_invariant=True, return_lse=True)
        assert torch.equal(result[0], out[rows])
        assert torch.equal(result[1], lse[:, rows])
    exact = expected(inputs)[0]
    assert_within_budget(out, exact.half(), exact, name="out", factor=4.0)
