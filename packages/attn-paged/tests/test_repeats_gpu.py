"""Calls that are repeated, on a GPU: the bits of calls in full, whatever tables hold."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import random_tensor
from attn_core.testing.repeats import assert_repeats
from attn_paged import append_to_cache, paged_attention

pytestmark = pytest.mark.gpu

B, H, H_KV, D = 3, 8, 2, 64
NUM_BLOCKS, BLOCK_SIZE = 96, 16


def draw(i, *shape, device, n):
    return random_tensor(shape, seed=f"{i}-{n}", dtype=torch.bfloat16, device=device)


def make_cache(i, device):
    """Caches and a table of blocks that no two calls order alike."""
    caches = [draw(i, NUM_BLOCKS, BLOCK_SIZE, H_KV, D, device=device, n=n) for n in range(2)]
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(i))
    return *caches, order.view(B, -1).int().to(device)


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def test_decode(device):
    assert_repeats(
        lambda *args: paged_attention(*args, return_lse=True, backend="triton"),
        lambda i: (
            draw(i, B, H, D, device=device, n=2),
            *make_cache(i, device),
            int32([1 + 100 * i, 512 - 99 * i, 0], device),
        ),
    )


def test_mixed_batch(device):
    def make(i):
        lens_q = [0, 1, 2 + 20 * i, 80]
        return (
            draw(i, 80, H, D, device=device, n=2),
            *make_cache(i, device),
            int32([200, 300 - i, 100 + i], device),
            int32(lens_q, device),
        )

    assert_repeats(
        lambda *args: paged_attention(
            *args[:-1], cu_seqlens_q=args[-1], return_lse=True, backend="triton"
        ),
        make,
    )


def test_append(device):
    def make(i):
        k_cache, v_cache, _ = make_cache(i, device)
        k, v = (draw(i, 5, H_KV, D, device=device, n=n) for n in (2, 3))
        slots = torch.tensor([7 * i, -1, 300 + i, 5, 99], device=device)
        return k, v, k_cache, v_cache, slots

    def function(k, v, k_cache, v_cache, slots):
        append_to_cache(k, v, k_cache, v_cache, slots, backend="triton")
        return k_cache, v_cache

    assert_repeats(function, make)
