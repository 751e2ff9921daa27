"""sdpa_triton_fa against torch's own scaled_dot_product_attention."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from attn_core.testing import random_tensor
from attn_flash import sdpa_triton_fa

SHAPES = [(1, 1, 1, 1, 1, 4), (2, 3, 3, 17, 17, 8), (1, 4, 2, 33, 20, 16), (2, 2, 1, 1, 65, 64)]


def show_shape(shape):
    return "b{}-h{}-kv{}-m{}-n{}-d{}".format(*shape)


def make_inputs(shape, dtype, device):
    B, H, H_KV, M, N, D = shape
    q = random_tensor((B, H, M, D), seed="q", dtype=dtype, device=device)
    k = random_tensor((B, H_KV, N, D), seed="k", dtype=dtype, device=device)
    v = random_tensor((B, H_KV, N, D), seed="v", dtype=dtype, device=device)
    return tuple(x.requires_grad_() for x in (q, k, v))


def grads_of(out, inputs):
    return torch.autograd.grad(out, inputs, random_tensor(out.shape, seed="dout", dtype=out.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=show_shape)
def test_outputs_and_gradients(shape, is_causal, dtype):
    if is_causal and shape[3] != shape[4]:
        shape = (*shape[:4], shape[3], shape[5])
    inputs = make_inputs(shape, dtype, "cpu")
    options = {"is_causal": is_causal, "enable_gqa": shape[1] != shape[2]}
    actual = sdpa_triton_fa(*inputs, **options)
    expected = F.scaled_dot_product_attention(*inputs, **options)
    # Older torch repeats the heads and sums their gradients in bfloat16.
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(actual, expected, **tolerance)
    torch.testing.assert_close(grads_of(actual, inputs), grads_of(expected, inputs), **tolerance)


@pytest.mark.parametrize("scale", [None, 0.1, 2.0])
def test_scale(scale, device):
    inputs = make_inputs((2, 3, 3, 17, 5, 8), torch.float32, device)
    actual = sdpa_triton_fa(*inputs, scale=scale, backend="torch")
    expected = F.scaled_dot_product_attention(*inputs, scale=scale)
    torch.testing.assert_close(actual, expected)


def test_positional_order_is_that_of_torch():
    parameters = inspect.signature(sdpa_triton_fa).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    optional = ["attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert positional == ["q", "k", "v", *optional]
