"""The reference against the definition, one query and key at a time."""

from __future__ import annotations

import math

import pytest
import torch

from attn_core.testing import random_tensor
from attn_flash import reference

WINDOWS = [(-1, -1), (-1, 0), (0, 0), (2, 1), (1, -1), (-1, 2), (0, -1)]


def by_definition(q, k, v, scale, window):
    B, M, H, D = q.shape
    N, H_KV = k.shape[1:3]
    out, lse = torch.zeros_like(q), q.new_full((B, H, M), -math.inf)
    for b in range(B):
        for h in range(H):
            for i in range(M):
                position = i + N - M
                weights = {}
                for j in range(N):
                    if window[0] >= 0 and j < position - window[0]:
                        continue
                    if window[1] >= 0 and j > position + window[1]:
                        continue
                    score = sum(q[b, i, h, d] * k[b, j, h * H_KV // H, d] for d in range(D))
                    weights[j] = math.exp(scale * score)
                total = sum(weights.values())
                for j, weight in weights.items():
                    out[b, i, h] += weight / total * v[b, j, h * H_KV // H]
                if weights:
                    lse[b, h, i] = math.log(total)
    return out, lse


@pytest.mark.parametrize("M,N", [(4, 4), (3, 5), (5, 3)], ids=["m4-n4", "m3-n5", "m5-n3"])
@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: f"window{window}")
def test_reference_is_the_definition(M, N, window):
    q = random_tensor((1, M, 4, 3), seed=1, dtype=torch.float64)
    k, v = random_tensor((2, 1, N, 2, 3), seed=2, dtype=torch.float64).unbind(0)
    actual = reference.attention(q, k, v, 0.7, window)
    expected = by_definition(q, k, v, 0.7, window)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_an_open_window_has_no_mask():
    assert reference.visible(3, 5, (-1, -1), torch.device("cpu")) is None


def test_causal_is_aligned_at_the_bottom_right():
    mask = reference.visible(2, 4, (-1, 0), torch.device("cpu"))
    assert mask.tolist() == [[True, True, True, False], [True, True, True, True]]
