"""Backend "torch" through the public functions, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch

from attn_core.testing import assert_within_budget, embedded, random_tensor
from attn_flash import (
    _torch,
    flash_attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    reference,
)
from attn_flash.options import Options

from .cases import (
    CAUSAL,
    OPEN,
    Case,
    assert_nan_where_expected,
    random_like,
    show_dtype,
    show_window,
    with_nan,
)

# In float32 both errors are a few roundings, added up in another order: the largest is luck.
_FACTOR_FLOAT32 = 4.0
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


CASES = [
    Case(1, 1, 1, 1, 1, 1),
    Case(1, 2, 2, 63, 63, 64),
    Case(2, 4, 4, 64, 64, 32),
    Case(1, 4, 2, 65, 65, 64),
    Case(1, 2, 1, 97, 31, 40),
    Case(2, 3, 3, 31, 97, 80),
    Case(1, 8, 2, 1, 127, 128),
    Case(1, 3, 1, 66, 64, 7),
    Case(1, 2, 2, 17, 40, 256),
    Case(0, 2, 2, 3, 5, 8),
    Case(2, 2, 2, 0, 5, 8),
    Case(2, 2, 1, 5, 0, 8),
]
SMALL = Case(2, 4, 2, 13, 17, 8)
SQUARE = Case(2, 4, 4, 17, 17, 8)
WINDOWS = [OPEN, CAUSAL, (1, 0), (7, 3), (5, -1)]


def with_grad(*tensors):
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def plain(q, k, v, scale, window, douts):
    """Outputs and gradients of the reference; `douts` holds that of out and, maybe, of lse."""
    q, k, v = with_grad(q, k, v)
    outputs = reference.attention(q, k, v, scale, window)
    douts = [dout.to(output.dtype) for dout, output in zip(douts, outputs, strict=False)]
    grads = torch.autograd.grad(outputs[: len(douts)], (q, k, v), douts)
    return [*outputs, *grads]


def check(q, k, v, window=OPEN, *, scale=None, dlse=False, attend=flash_attn_func):
    """Compare out, lse and every gradient with the reference, within the error budget."""
    scale_used = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse, _ = attend(
        q, k, v, 0.0, scale, window_size=window, return_attn_probs=True, backend="torch"
    )
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    outputs = (out, lse) if dlse else (out,)
    douts = [random_like(output, seed) for seed, output in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, (q, k, v), douts)

    exact = plain(q.double(), k.double(), v.double(), scale_used, window, douts)
    same_dtype = plain(q, k, v, scale_used, window, douts)
    names = ("out", "lse", "dq", "dk", "dv")
    factor = _FACTOR_FLOAT32 if q.dtype == torch.float32 else 2.0
    for name, actual, same, expected in zip(
        names, (out, lse, *grads), same_dtype, exact, strict=True
    ):
        assert_within_budget(actual, same, expected, name=name, factor=factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=show_dtype)
@pytest.mark.parametrize("window", WINDOWS, ids=show_window)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, window, dtype, device):
    check(*with_grad(*case.inputs(dtype, device)), window)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=show_dtype)
@pytest.mark.parametrize("window", WINDOWS, ids=show_window)
@pytest.mark.parametrize("case", [SMALL, SQUARE, Case(1, 2, 1, 9, 4, 5)], ids=str)
def test_gradients_through_lse(case, window, dtype, device):
    check(*with_grad(*case.inputs(dtype, device)), window, dlse=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=show_dtype)
@pytest.mark.parametrize("window", [OPEN, CAUSAL, (7, 3)], ids=show_window)
def test_large_scores(window, dtype, device):
    check(*with_grad(*Case(1, 2, 2, 33, 33, 16).inputs(dtype, device, scale=10.0)), window)


@pytest.mark.parametrize("scale", [10.0, 0.1, 0.0, -1.0])
@pytest.mark.parametrize("window", [OPEN, (7, 3)], ids=show_window)
def test_softmax_scale(window, scale, device):
    check(*with_grad(*SMALL.inputs(torch.float64, device)), window, scale=scale)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3), (0, 3, 2, 1)])
@pytest.mark.parametrize("window", [OPEN, CAUSAL, (7, 3)], ids=show_window)
def test_any_strides_and_nothing_beside_the_tensor(order, window, device):
    q, k, v = (embedded(x, order=order) for x in SQUARE.inputs(device=device))
    check(*with_grad(q, k, v), window)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("window", [OPEN, (7, 3)], ids=show_window)
def test_broadcast_inputs(dim, window, device):
    narrow = [x.narrow(dim, 0, 1) for x in SQUARE.inputs(device=device)]
    q, k, v = with_grad(*(x.expand(SQUARE.B, SQUARE.M, SQUARE.H, SQUARE.D) for x in narrow))
    out = flash_attn_func(q, k, v, window_size=window, backend="torch")
    dout = random_like(out, 5)
    expected, _, *grads = plain(q, k, v, 8**-0.5, window, [dout])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(list(torch.autograd.grad(out, (q, k, v), dout)), grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=show_dtype)
def test_a_single_visible_key(dtype, device):
    q, k, v = with_grad(*SQUARE.inputs(dtype, device))
    out = flash_attn_func(q, k, v, window_size=(0, 0), backend="torch")
    torch.testing.assert_close(out, v)
    dout = random_like(out, 5)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    torch.testing.assert_close(dv, dout)
    rounding = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close((dq, dk), (torch.zeros_like(q),) * 2, atol=rounding, rtol=0)


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (0, 0)], ids=show_window)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=show_dtype
)
def test_a_single_key_has_no_gradient(dtype, window, device):
    q, k, v = with_grad(*Case(B=2, H=6, H_KV=2, M=3, N=1, D=192).inputs(dtype, device))
    out = flash_attn_func(q, k, v, window_size=window, backend="torch")
    dq, dk = torch.autograd.grad(out, (q, k), random_like(out, 5))
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (7, 3)], ids=show_window)
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (3, 0, 1, 2)], ids=["bhsd", "d-slowest"])
def test_gradients_of_any_strides(order, window, device):
    inputs = with_grad(*SQUARE.inputs(device=device))
    out = flash_attn_func(*inputs, window_size=window, backend="torch")
    dout = random_like(out, 5)
    expected = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    actual = torch.autograd.grad(out, inputs, embedded(dout, order=order))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("window", [OPEN, (7, 3)], ids=show_window)
def test_the_gradient_of_a_sum(window, device):
    q, k, v = with_grad(*SQUARE.inputs(device=device))
    flash_attn_func(q, k, v, window_size=window, backend="torch").sum().backward()
    dv = plain(q, k, v, 8**-0.5, window, [torch.ones_like(q)])[4]
    torch.testing.assert_close(v.grad, dv)


@pytest.mark.parametrize("heads", [4, 1], ids=["h4-hkv4", "h4-hkv1"])
@pytest.mark.parametrize("window", [OPEN, CAUSAL], ids=show_window)
def test_gradients_of_many_queries_are_rounded_once(window, heads):
    shapes = ((1, 512, 4, 32), (1, 512, heads, 32), (1, 512, heads, 32))
    q, k, v = (random_tensor(x, seed=i, dtype=torch.bfloat16) for i, x in enumerate(shapes))
    v.requires_grad_()
    out = flash_attn_func(q, k, v, window_size=window, backend="torch")
    dout = random_like(out, 5)
    [dv] = torch.autograd.grad(out, v, dout)
    expected = plain(q.double(), k.double(), v.double(), 32**-0.5, window, [dout])[4]
    torch.testing.assert_close(dv.double(), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("needing", ["q", "k", "v", "qk", "kv"])
@pytest.mark.parametrize("window", [OPEN, (7, 3)], ids=show_window)
def test_gradients_of_some_inputs(needing, window, device):
    inputs = dict(zip("qkv", SQUARE.inputs(torch.float64, device), strict=True))
    for name in needing:
        inputs[name].requires_grad_()
    out = flash_attn_func(**inputs, window_size=window, backend="torch")
    dout = random_like(out, 5)
    actual = torch.autograd.grad(out, [inputs[name] for name in needing], dout)
    grads = dict(zip("qkv", plain(*inputs.values(), 8**-0.5, window, [dout])[2:], strict=True))
    torch.testing.assert_close(list(actual), [grads[name] for name in needing])


def test_a_gradient_of_lse_alone(device):
    q, k, v = with_grad(*SMALL.inputs(torch.float64, device))
    _, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, backend="torch")
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    _, expected = reference.attention(q, k, v, 8**-0.5, OPEN)
    torch.testing.assert_close((dq, dk), torch.autograd.grad(expected.sum(), (q, k)))
    assert not dv.any()


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (7, 3)], ids=show_window)
def test_blocks_of_queries_change_nothing(monkeypatch, window):
    monkeypatch.setattr(_torch, "_BLOCK_BYTES", 8 * SMALL.B * SMALL.H * SMALL.N * 5)
    check(*with_grad(*SMALL.inputs()), window, dlse=True)


def test_return_attn_probs():
    q, k, v = SMALL.inputs()
    out, lse, probs = flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.shape == q.shape
    assert lse.shape == (2, 4, 13)
    assert probs.shape == (0,)
    assert isinstance(flash_attn_func(q, k, v), torch.Tensor)


def test_causal_closes_the_right_side_of_the_window(device):
    q, k, v = SMALL.inputs(device=device)
    actual = flash_attn_func(q, k, v, causal=True, window_size=(4, 9), backend="torch")
    expected, _ = reference.attention(q, k, v, 8**-0.5, (4, 0))
    torch.testing.assert_close(actual, expected)


def test_any_negative_side_is_open(device):
    q, k, v = SMALL.inputs(device=device)
    actual = flash_attn_func(q, k, v, window_size=(-7, -2), backend="torch")
    torch.testing.assert_close(actual, flash_attn_func(q, k, v, backend="torch"))


def test_window_size_may_be_a_list_or_a_tensor():
    q, k, v = SMALL.inputs()
    expected = flash_attn_func(q, k, v, window_size=(3, 2))
    for window in ([3, 2], torch.tensor([3, 2])):
        assert torch.equal(flash_attn_func(q, k, v, window_size=window), expected)


def test_qkvpacked(device):
    qkv = random_tensor((2, 13, 3, 4, 8), seed=7, device=device).requires_grad_()
    actual = flash_attn_qkvpacked_func(qkv, 0.0, 0.3, True, (5, -1), backend="torch")
    expected, _ = reference.attention(*qkv.unbind(2), 0.3, (5, 0))
    torch.testing.assert_close(actual, expected)
    dout = random_like(actual, 8)
    torch.testing.assert_close(
        torch.autograd.grad(actual, qkv, dout), torch.autograd.grad(expected, qkv, dout)
    )


def test_kvpacked(device):
    q = random_tensor((2, 5, 4, 8), seed=7, device=device).requires_grad_()
    kv = random_tensor((2, 13, 2, 2, 8), seed=8, device=device).requires_grad_()
    actual = flash_attn_kvpacked_func(q, kv, 0.0, 0.3, True, (5, -1), backend="torch")
    expected, _ = reference.attention(q, *kv.unbind(2), 0.3, (5, 0))
    torch.testing.assert_close(actual, expected)
    dout = random_like(actual, 9)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (q, kv), dout), torch.autograd.grad(expected, (q, kv), dout)
    )


@pytest.mark.parametrize("attend", [flash_attn_qkvpacked_func, flash_attn_kvpacked_func])
def test_packed_functions_return_lse(attend):
    q, k, v = SQUARE.inputs()
    packed = {
        flash_attn_qkvpacked_func: (torch.stack([q, k, v], 2),),
        flash_attn_kvpacked_func: (q, torch.stack([k, v], 2)),
    }
    actual = attend(*packed[attend], return_attn_probs=True)
    expected = flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "options,window",
    [
        ({}, CAUSAL),
        ({"causal": False}, OPEN),
        ({"window_size": 1}, (0, 0)),
        ({"window_size": 4}, (3, 0)),
        ({"causal": False, "window_size": 4}, (3, 3)),
        ({"window_size": -5}, CAUSAL),
        ({"window_size": 1000}, CAUSAL),
    ],
)
def test_flash_attention_has_heads_first(options, window, device):
    q, k, v = SMALL.inputs(device=device)
    q_heads, k_heads, v_heads = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    actual = flash_attention(q_heads, k_heads, v_heads, **options, scale=0.4, backend="torch")
    expected, _ = reference.attention(q, k, v, 0.4, window)
    torch.testing.assert_close(actual, expected.transpose(1, 2))


@pytest.mark.parametrize("window", [CAUSAL, (2, 0), (0, 0)], ids=show_window)
@pytest.mark.parametrize("dtype", DTYPES, ids=show_dtype)
def test_a_query_without_keys(window, dtype, device):
    q, k, v = with_grad(*Case(1, 2, 1, 9, 4, 8).inputs(dtype, device))
    out, lse, _ = flash_attn_func(
        q, k, v, window_size=window, return_attn_probs=True, backend="torch"
    )
    assert not out[:, :5].any()
    assert torch.all(lse[:, :, :5] == -math.inf)
    assert lse[:, :, 5:].isfinite().all()
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert not grads[0][:, :5].any()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("window", WINDOWS, ids=show_window)
@pytest.mark.parametrize("case", [SMALL, SQUARE], ids=str)
def test_nan_reaches_the_rows_that_see_it(case, window, device):
    q, k, v = case.inputs(device=device)
    q, k = with_nan(q, k)
    out, lse, _ = flash_attn_func(
        q, k, v, window_size=window, return_attn_probs=True, backend="torch"
    )
    scale = q.shape[-1] ** -0.5
    assert_nan_where_expected((out, lse), reference.attention(q, k, v, scale, window))


def test_no_keys_at_all(device):
    q, k, v = with_grad(*Case(2, 2, 1, 5, 0, 8).inputs(device=device))
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, backend="torch")
    assert not out.any()
    assert torch.all(lse == -math.inf)


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (7, 3)], ids=show_window)
def test_grouped_heads_are_repeated_heads(window, device):
    q, k, v = SMALL.inputs(torch.float64, device)
    expected = flash_attn_func(
        q, *(x.repeat_interleave(2, dim=2) for x in (k, v)), window_size=window, backend="torch"
    )
    actual = flash_attn_func(q, k, v, window_size=window, backend="torch")
    torch.testing.assert_close(actual, expected)


def test_old_cpu_kernels_get_no_grouped_heads(monkeypatch):
    monkeypatch.setattr(_torch, "_CPU_KERNEL_TAKES_GQA", False)
    q, k, _ = SMALL.inputs()
    assert not _torch._fits_cpu_kernel(q, k, k, Options())
    assert _torch._fits_cpu_kernel(q, q, q, Options())
    check(*with_grad(*SMALL.inputs()))


def test_the_order_of_keys_does_not_matter(device):
    q, k, v = SMALL.inputs(torch.float64, device)
    order = torch.randperm(SMALL.N, device=device)
    actual = flash_attn_func(q, k[:, order], v[:, order], backend="torch")
    torch.testing.assert_close(actual, flash_attn_func(q, k, v, backend="torch"))


@pytest.mark.parametrize("cut", [1, 8, 16])
def test_parts_merged_by_lse_are_the_whole(cut, device):
    q, k, v = SMALL.inputs(torch.float64, device)
    whole, whole_lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, backend="torch")
    parts = [
        flash_attn_func(q, k[:, keys], v[:, keys], return_attn_probs=True, backend="torch")
        for keys in (slice(None, cut), slice(cut, None))
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [torch.exp(part[1] - lse).transpose(1, 2)[..., None] for part in parts]
    torch.testing.assert_close(lse, whole_lse)
    merged = weights[0] * parts[0][0] + weights[1] * parts[1][0]
    torch.testing.assert_close(merged, whole)


@pytest.mark.parametrize("case", [SMALL, SQUARE], ids=str)
@pytest.mark.parametrize("window", [CAUSAL, (4, 0), (4, 2)], ids=show_window)
def test_keys_outside_the_window_change_nothing(case, window, device):
    q, k, v = case.inputs(device=device)
    query = 3
    last = query + case.N - case.M + window[1]
    expected = flash_attn_func(q, k, v, window_size=window, backend="torch")[:, : query + 1]
    k[:, last + 1 :], v[:, last + 1 :] = 1e4, -1e4
    actual = flash_attn_func(q, k, v, window_size=window, backend="torch")[:, : query + 1]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (7, 3)], ids=show_window)
def test_one_batch_element_alone_is_the_same(window, device):
    q, k, v = SMALL.inputs(torch.float64, device)
    whole = flash_attn_func(q, k, v, window_size=window, backend="torch")
    alone = flash_attn_func(q[1:], k[1:], v[1:], window_size=window, backend="torch")
    torch.testing.assert_close(whole[1:], alone)


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (7, 3)], ids=show_window)
def test_the_same_bits_every_time(window, device):
    def run():
        q, k, v = with_grad(*SMALL.inputs(device=device))
        out = flash_attn_func(q, k, v, window_size=window, backend="torch")
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_inputs_are_left_alone(device):
    inputs = with_grad(*SMALL.inputs(device=device))
    before = [x.detach().clone() for x in inputs]
    flash_attn_func(*inputs, window_size=(3, 3), backend="torch").sum().backward()
    for x, copy in zip(inputs, before, strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize("side", [2**31 - 1, 2**40], ids=str)
def test_a_side_wider_than_the_keys_is_open(side):
    q, k, v = torch.randn(3, 1, 9, 2, 8).unbind(0)
    causal = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn_func(q, k, v, window_size=(side, 0)), causal)
    assert torch.equal(flash_attn_func(q, k, v, window_size=(side, side)), flash_attn_func(q, k, v))


@pytest.mark.parametrize("scale", [0.0, -0.3], ids=str)
def test_causal_with_a_scale_that_is_not_positive(scale):
    q, k, v = torch.randn(3, 1, 9, 2, 8, dtype=torch.float64).unbind(0)
    expected, _ = reference.attention(q, k, v, scale, (-1, 0))
    torch.testing.assert_close(flash_attn_func(q, k, v, softmax_scale=scale, causal=True), expected)
