"""The operators as torch.compile, torch.export, opcheck and autograd see them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from attn_core.testing import embedded, random_tensor
from attn_flash import (
    FlashAttention,
    UnsupportedProblemError,
    flash_attention,
    flash_attn_func,
    flash_attn_varlen_func,
    ops,
)
from attn_flash.options import Options

from .cases import CAUSAL, OPEN, show_window

WINDOWS = [OPEN, CAUSAL, (2, 1)]
ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0)]
FORWARD = torch.ops.attn_flash.attention.default
BACKWARD = torch.ops.attn_flash.attention_backward.default


def options(window, **others):
    return Options(scale=0.5, window_left=window[0], window_right=window[1], **others)


def make_inputs(B=2, H=4, H_KV=2, M=5, N=7, D=4, dtype=torch.float64, order=(0, 1, 2, 3)):
    shapes = {"q": (B, M, H, D), "k": (B, N, H_KV, D), "v": (B, N, H_KV, D)}
    return tuple(
        embedded(random_tensor(shape, seed=name, dtype=dtype), order=order).requires_grad_()
        for name, shape in shapes.items()
    )


def square_inputs(**changes):
    return make_inputs(H_KV=4, M=7, **changes)


def backward_arguments(inputs, window, *, dlse):
    q, k, v = (x.detach() for x in inputs)
    out, lse = ops.attention(q, k, v, *options(window), "torch")
    douts = random_tensor(out.shape, seed="dout", dtype=out.dtype)
    dlses = random_tensor(lse.shape, seed="dlse", dtype=lse.dtype) if dlse else None
    return douts, dlses, q, k, v, out, lse, False, *options(window), "torch"


@pytest.mark.parametrize("make", [make_inputs, square_inputs], ids=["gqa", "square"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("window", [OPEN, (2, 1)], ids=show_window)
def test_opcheck_forward(window, order, make):
    inputs = make(order=order, dtype=torch.float32)
    torch.library.opcheck(FORWARD, (*inputs, *options(window), "torch"))


@pytest.mark.parametrize("make", [make_inputs, square_inputs], ids=["gqa", "square"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("window", [OPEN, (2, 1)], ids=show_window)
@pytest.mark.parametrize("dlse", [False, True], ids=["dout", "dout-dlse"])
def test_opcheck_backward(window, order, make, dlse):
    arguments = backward_arguments(make(order=order, dtype=torch.float32), window, dlse=dlse)
    torch.library.opcheck(BACKWARD, arguments)


@pytest.mark.parametrize("window", WINDOWS, ids=show_window)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_are_like_the_real_ones(dtype, window):
    inputs = square_inputs(dtype=dtype)
    real = ops.attention(*inputs, *options(window), "torch")
    with FakeTensorMode() as mode:
        fake = ops.attention(*(mode.from_tensor(x) for x in inputs), *options(window), "torch")
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.dtype, x.device, x.stride()) == (y.shape, y.dtype, y.device, y.stride())


def test_a_trace_with_open_sizes_runs_others():
    def attend(q, k, v):
        return flash_attn_func(q, k, v)

    traced = make_fx(attend, tracing_mode="symbolic")(*make_inputs(B=3, M=9, N=11))
    inputs = make_inputs()
    torch.testing.assert_close(traced(*inputs), attend(*inputs), rtol=0, atol=0)


def test_a_ragged_trace_with_open_sizes_runs_others():
    def attend(x, starts):
        return flash_attn_varlen_func(x, x, x, starts, starts, 16, 16, causal=True)

    x = random_tensor((16, 2, 8), seed="x", dtype=torch.float32)
    starts = torch.tensor([0, 5, 16], dtype=torch.int32)
    traced = make_fx(attend, tracing_mode="symbolic")(x, starts)
    x, starts = x[:9], torch.tensor([0, 2, 6, 9], dtype=torch.int32)
    torch.testing.assert_close(traced(x, starts), attend(x, starts), rtol=0, atol=0)


def test_meta_tensors():
    q = torch.empty(2, 7, 4, 8, device="meta", dtype=torch.bfloat16)
    out, lse, _ = flash_attn_func(q, q, q, return_attn_probs=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", q.shape, (2, 4, 7))


@pytest.mark.parametrize("window", WINDOWS, ids=show_window)
@pytest.mark.parametrize("make", [make_inputs, square_inputs], ids=["gqa", "square"])
def test_gradcheck(window, make):
    def attend(q, k, v):
        return flash_attn_func(
            q, k, v, softmax_scale=0.5, window_size=window, return_attn_probs=True
        )[:2]

    assert torch.autograd.gradcheck(attend, make(B=1))


@pytest.mark.parametrize("window", [OPEN, (2, 1)], ids=show_window)
@pytest.mark.parametrize("make", [make_inputs, square_inputs], ids=["gqa", "square"])
def test_gradgradcheck(window, make):
    def attend(q, k, v):
        return flash_attn_func(
            q, k, v, softmax_scale=0.5, window_size=window, return_attn_probs=True
        )[:2]

    assert torch.autograd.gradgradcheck(attend, make(B=1, D=2))


def test_gradgradcheck_with_queries_that_see_no_key():
    def attend(q, k, v):
        return flash_attn_func(q, k, v, causal=True)

    assert torch.autograd.gradgradcheck(attend, make_inputs(B=1, M=5, N=3, D=2))


@pytest.mark.parametrize("needing", ["q", "k", "v"])
def test_second_gradient_where_one_input_needs_it(needing):
    inputs = {name: x.detach() for name, x in zip("qkv", make_inputs(), strict=True)}
    x = inputs[needing].requires_grad_()
    (grad,) = torch.autograd.grad(flash_attn_func(**inputs).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x, materialize_grads=True)
    assert second.isfinite().all()
    assert second.any() == (needing != "v")  # out is linear in v


def attend_and_differentiate(attend, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(*inputs)
    dout = random_tensor(out.shape, seed="dout", dtype=out.dtype)
    return out, *torch.autograd.grad(out, inputs, dout)


@pytest.mark.parametrize("window", [OPEN, (2, 1)], ids=show_window)
def test_compile(window):
    def attend(q, k, v):
        return flash_attn_func(q, k, v, window_size=window) * 2

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ({}, {"M": 9, "N": 11}, {"B": 3, "M": 6, "N": 8}):
        inputs = make_inputs(**sizes)
        actual = attend_and_differentiate(compiled, inputs)
        torch.testing.assert_close(actual, attend_and_differentiate(attend, inputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing inductor
def test_compile_with_inductor():
    torch._dynamo.reset()
    module = FlashAttention()
    compiled = torch.compile(module, fullgraph=True)
    q, k, v = (x.detach() for x in square_inputs(dtype=torch.float32))
    torch.testing.assert_close(compiled(q, k, v, causal=True), module(q, k, v, causal=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_is_told_the_strides_of_heads_first(device):
    torch._dynamo.reset()
    compiled = torch.compile(flash_attention, fullgraph=True)
    inputs = random_tensor((3, 2, 4, 7, 8), seed=0, device=device).unbind(0)
    actual = attend_and_differentiate(compiled, inputs)
    torch.testing.assert_close(actual, attend_and_differentiate(flash_attention, inputs))


def test_compile_reports_wrong_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_func, backend="eager")
    q, k, v = (x.detach() for x in make_inputs())
    with pytest.raises(ValueError, match="v must have shape"):
        compiled(q, k, v[:, :-1])


def test_export():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn_func(q, k, v, causal=True)

    q, k, v = (x.detach() for x in make_inputs())
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {"q": None, "k": {1: length}, "v": {1: length}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Attention(), (q, k, v), dynamic_shapes=shapes)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "attn_flash.attention.default" in names
    for length in (7, 12):
        q, k, v = (x.detach() for x in make_inputs(N=length))
        torch.testing.assert_close(program.module()(q, k, v), Attention()(q, k, v))


def test_checkpointing():
    inputs = make_inputs()

    def checkpointed(q, k, v):
        return torch.utils.checkpoint.checkpoint(flash_attn_func, q, k, v, use_reentrant=False)

    actual = attend_and_differentiate(checkpointed, inputs)
    torch.testing.assert_close(actual, attend_and_differentiate(flash_attn_func, inputs))


def test_no_grad_saves_nothing():
    inputs = make_inputs()
    with torch.no_grad():
        assert not flash_attn_func(*inputs).requires_grad
    with torch.inference_mode():
        assert flash_attn_func(*inputs).is_inference()


def test_changing_an_input_before_backward_is_an_error():
    q, k, v = make_inputs()
    q = q * 1
    out = flash_attn_func(q, k, v)
    q.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_one_call_after_another():
    q, k, v = (random_tensor((3, 2, 5, 4, 8), seed=name) for name in "qkv")
    actual = torch.vmap(flash_attn_func, in_dims=(0, 0, None))(q, k, v[0])
    expected = torch.stack([flash_attn_func(q[i], k[i], v[0]) for i in range(3)])
    torch.testing.assert_close(actual, expected)


def test_functional_gradients_are_refused():
    q, k, v = (x.detach() for x in make_inputs())
    with pytest.raises(UnsupportedProblemError, match="no rule for torch.func.grad"):
        torch.func.grad(lambda q: flash_attn_func(q, k, v).sum())(q)


@pytest.mark.parametrize("backend, reason", [("triton", "it"), ("nonsense", "must be one of")])
def test_a_named_backend_is_refused_before_the_graph_runs(backend, reason, monkeypatch):
    monkeypatch.setattr(ops, "_implementation", lambda *args: pytest.fail("the graph ran"))
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="eager")
    q, k, v = (x.detach() for x in make_inputs())
    with pytest.raises(Exception, match=f"backend.*{reason}"):
        compiled(q, k, v, backend=backend)


@pytest.mark.parametrize("is_asked", [False, True])
def test_torch_may_ask_for_the_same_bits(is_asked, monkeypatch):
    asked = []

    def attention(q, k, v, *rest):
        asked.append(Options(*rest[:-1]).deterministic)
        return FORWARD(q, k, v, *rest)

    monkeypatch.setattr(ops, "attention", attention)
    torch.use_deterministic_algorithms(is_asked)
    try:
        flash_attn_func(*make_inputs())
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [is_asked]
