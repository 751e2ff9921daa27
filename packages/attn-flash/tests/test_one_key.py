"""Gradients where there is but one key."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import random_tensor
from attn_flash import flash_attn_func, one_key, reference
from attn_flash.options import Options

from .cases import CAUSAL, OPEN, Case, random_like, show_dtype, show_window

PROBLEM = Case(B=2, H=6, H_KV=2, M=3, N=1, D=64)


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (0, 1)], ids=show_window)
@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out-and-lse"])
@pytest.mark.parametrize("softcap", [0.0, 0.7], ids=["plain", "softcap"])
def test_are_those_of_the_reference(softcap, with_dlse, window):
    q, k, v = (x.requires_grad_() for x in PROBLEM.inputs(torch.float64))
    scale = 0.3
    left, right = window
    options = Options(scale=scale, window_left=left, window_right=right, softcap=softcap)
    out, lse = reference.attention_with(q, k, v, options)
    dout = random_like(out, "dout")
    dlse = random_tensor(lse.shape, seed="dlse").double() if with_dlse else None
    outputs, grads = ([out, lse], [dout, dlse]) if with_dlse else ([out], [dout])
    expected = torch.autograd.grad(outputs, (q, k, v), grads)
    tensors = (x.detach() for x in (q, k, v, lse))
    actual = one_key.gradients(dout, dlse, *tensors, scale, softcap)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"sinks": torch.zeros(6)}, {"dropout_p": 0.5}, {"cu_seqlens_q": torch.tensor([0, 1])}],
    ids=lambda options: next(iter(options)),
)
def test_are_not_asked_for_beside_features(options):
    _, k, _ = PROBLEM.inputs()
    assert one_key.is_one_key(k, Options())
    assert not one_key.is_one_key(k, Options(**options))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1), (3, 1)], ids=["m1", "m3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=show_dtype)
@pytest.mark.parametrize("softcap", [0.0, 15.0], ids=["plain", "softcap"])
def test_of_queries_and_keys_are_0(softcap, dtype, shape, device):
    M, N = shape
    q, k, v = (x.requires_grad_() for x in PROBLEM._replace(M=M, N=N).inputs(dtype, device))
    for backend in ("auto", "triton"):
        out = flash_attn_func(q, k, v, softcap=softcap, backend=backend)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout := random_like(out, "dout"))
        assert not dq.any()
        assert not dk.any()
        expected = dout.float().unflatten(2, (2, 3)).sum((1, 3))[:, None].to(dtype)
        torch.testing.assert_close(dv, expected)
