"""Every option of attn-flash's operators, against its reference."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import assert_within_budget, poisoned, random_tensor

pytest.importorskip("attn_flash")

from attn_flash import reference
from attn_flash.ops import attention, attention_backward
from attn_flash.options import Options
from attn_vulkan import _torch

pytestmark = [pytest.mark.vulkan, pytest.mark.usefixtures("real_device")]

B, M, N, H, H_KV, D = 2, 21, 35, 4, 2, 24


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def drawn(*shape, name):
    return random_tensor(shape, seed=name)


DENSE = {
    "alibi": {"alibi_slopes": drawn(H, name="slopes").abs()},
    "alibi-of-batches": {"alibi_slopes": drawn(B, H, name="slopes").abs()},
    "bias": {"attn_bias": drawn(B, H, M, N, name="bias")},
    "bias-of-heads": {"attn_bias": drawn(1, H, 1, N, name="bias")},
    "boolean-bias": {"attn_bias": drawn(1, 1, M, N, name="bias") > 0},
    "key-mask": {"key_mask": drawn(B, N, name="mask") > -1},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": drawn(H, name="sinks")},
    "negative-scale": {"scale": -0.3},
    "everything": {
        "alibi_slopes": drawn(H, name="slopes").abs(),
        "attn_bias": drawn(B, 1, M, N, name="bias"),
        "key_mask": drawn(B, N, name="mask") > -1,
        "sinks": drawn(H, name="sinks"),
        "softcap": 3.0,
        "window_left": 9,
        "window_right": 2,
    },
}
RAGGED = {
    "ragged": {},
    "ragged-causal": {"window_right": 0},
    "ragged-shorter-keys": {"seqused_k": ints(3, 0, 14)},
    "ragged-everything": {
        "alibi_slopes": drawn(3, H, name="slopes").abs(),
        "sinks": drawn(H, name="sinks"),
        "softcap": 2.0,
        "window_left": 5,
        "window_right": 0,
    },
}


def options(**values):
    return Options(**{"scale": D**-0.5, **values})


def make(lead_q, lead_k):
    return [
        poisoned((*lead, heads, D), seed=name)
        for name, lead, heads in (("q", lead_q, H), ("k", lead_k, H_KV), ("v", lead_k, H_KV))
    ]


def check(q, k, v, opts, has_grads=True):
    out, lse = attention(q, k, v, *opts, "vulkan")
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    narrow = [x.clone().requires_grad_() for x in (q, k, v)]
    (want, want_lse), (near, near_lse) = (
        reference.attention_with(*x, opts) for x in (wide, narrow)
    )
    assert_within_budget(out, near, want, name="out", factor=3)
    assert_within_budget(lse, near_lse, want_lse, name="lse", factor=3)
    if not has_grads:
        return
    dout, dlse = drawn(*out.shape, name="dout"), drawn(*lse.shape, name="dlse")
    dlse = dlse.masked_fill(lse.isinf(), 0.0)
    for douts in ([dout, dlse], [dout, None]):
        grads = attention_backward(*douts, q, k, v, out, lse, False, *opts, "vulkan")
        expected, nearby = (
            gradients(outputs, inputs, douts)
            for outputs, inputs in (((want, want_lse), wide), ((near, near_lse), narrow))
        )
        for name, grad, near_grad, grad_want in zip("qkv", grads, nearby, expected, strict=False):
            assert_within_budget(grad, near_grad, grad_want, name=f"d{name}", factor=4)


def gradients(outputs, inputs, douts):
    given = [(x, dx.to(x)) for x, dx in zip(outputs, douts, strict=True) if dx is not None]
    outputs, douts = zip(*given, strict=True)
    return torch.autograd.grad(outputs, inputs, douts, retain_graph=True)


@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    check(*make((B, M), (B, N)), options(**DENSE[name]))


@pytest.mark.parametrize("name", ["softcap", "everything"])
def test_by_way_of_the_host(monkeypatch, name):
    moved = []
    real = torch.Tensor.cpu

    def spy(tensor):
        moved.append(tuple(tensor.shape))
        return real(tensor)

    q, k, v = make((B, M), (B, N))
    opts = options(**DENSE[name])
    expected = attention(q, k, v, *opts, "vulkan")
    monkeypatch.setattr(_torch, "_needs_the_host", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "cpu", spy)
    found = attention(q, k, v, *opts, "vulkan")
    tensors = [x for x in (q, k, v, *opts) if isinstance(x, torch.Tensor)]
    assert {tuple(x.shape) for x in tensors} <= set(moved)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", RAGGED)
def test_ragged(name):
    cu_q, cu_k = ints(0, 5, 5, 18), ints(0, 9, 12, 29)
    opts = options(
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=13, max_seqlen_k=17, **RAGGED[name]
    )
    check(*make((20,), (33,)), opts)


def test_pages():
    q, _, _ = make((18,), (1,))
    k, v = (poisoned((7, 8, H_KV, D), seed=name) for name in "kv")
    opts = options(
        cu_seqlens_q=ints(0, 5, 5, 18),
        cu_seqlens_k=ints(0, 9, 12, 29),
        seqused_k=ints(9, 3, 17),
        block_table=ints(6, 1, 0, 2, 0, 0, 3, 5, 4).reshape(3, 3),
        max_seqlen_q=13,
        max_seqlen_k=24,
        window_right=0,
    )
    check(q, k, v, opts, has_grads=False)


def test_the_gradient_of_sinks():
    q, k, v = make((B, M), (B, N))
    sinks = drawn(H, name="sinks")
    wide = sinks.double().requires_grad_()
    opts = options(sinks=sinks, window_right=0)
    out, lse = attention(q, k, v, *opts, "vulkan")
    dout, dlse = drawn(*out.shape, name="dout"), drawn(*lse.shape, name="dlse")
    dsinks = attention_backward(dout, dlse, q, k, v, out, lse, False, *opts, "vulkan")[4]
    outputs = reference.attention_with(*(x.double() for x in (q, k, v)), opts._replace(sinks=wide))
    (want,) = torch.autograd.grad(outputs, wide, [dout.double(), dlse.double()])
    torch.testing.assert_close(dsinks.double(), want, atol=1e-5, rtol=1e-5)
