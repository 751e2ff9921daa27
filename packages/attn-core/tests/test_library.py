"""Operator: what the dispatcher, torch.compile and autograd see of it."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from attn_core.eager import is_plain_eager, needs_grad
from attn_core.errors import UnsupportedProblemError
from attn_core.library import Operator

calls = []


def scaled(x, factor):
    calls.append("forward")
    return x * factor


def scaled_fake(x, factor):
    return x.new_empty(x.shape)


def scaled_backward(dout, factor):
    calls.append("backward")
    return dout * factor


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, x, factor):
        ctx.factor = factor
        return compute(x, factor)

    @staticmethod
    def backward(ctx, dout):
        return None, operator_backward(dout, ctx.factor), None


NAME = "attn_core_tests::scaled"
SCHEMA = "(Tensor x, float factor) -> Tensor"
operator = Operator(NAME, SCHEMA, scaled, scaled_fake, autograd=Scaled.apply)
operator_backward = Operator(
    f"{NAME}_backward",
    SCHEMA.replace("x", "dout"),
    scaled_backward,
    scaled_fake,
    autograd=lambda _, dout, factor: dout * factor,
)
without_gradient = Operator("attn_core_tests::constant", SCHEMA, scaled, scaled_fake)


@pytest.fixture(autouse=True)
def forget_calls():
    calls.clear()


@pytest.fixture
def x():
    return torch.randn(3, 4, requires_grad=True)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("tested", [operator, operator_backward], ids=["forward", "backward"])
def test_opcheck(tested, requires_grad):
    torch.library.opcheck(tested.overload, (torch.randn(3, 4, requires_grad=requires_grad), 2.0))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(x, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: operator(x, 3.0).sin(), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    out = compiled(x)
    torch.testing.assert_close(out, (3 * x).sin())
    grad, expected = (torch.autograd.grad(result.sum(), x)[0] for result in (out, (3 * x).sin()))
    torch.testing.assert_close(grad, expected)
    assert calls == ["forward", "backward"]


def test_eager_path_gives_what_the_dispatcher_gives(x):
    for call in (operator, operator.overload):
        calls.clear()
        out = call(x, 2.0)
        assert torch.equal(out, 2 * x)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full_like(x, 2.0))
        assert calls == ["forward", "backward"]
        assert not call(x.detach(), 2.0).requires_grad


def test_eager_path_does_not_enter_the_dispatcher(x, monkeypatch):
    def refuse(*args):
        raise AssertionError("dispatched")

    monkeypatch.setattr(operator, "overload", refuse)
    operator(x, 2.0).sum().backward()
    with torch.no_grad():
        operator(x, 2.0)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_records_the_operator(requires_grad):
    x = torch.randn(3, 4, requires_grad=requires_grad)
    traced = torch.jit.trace(lambda x: operator(x, 2.0), x)
    assert [node.kind() for node in traced.graph.findAllNodes(NAME)] == [NAME]
    other = torch.randn(5, 6)
    assert torch.equal(traced(other), 2 * other)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batches_of_gradients_are_computed_one_by_one(x):
    out = operator(x, 2.0)
    (dx,) = torch.autograd.grad(out, x, torch.ones(5, *out.shape), is_grads_batched=True)
    assert torch.equal(dx, torch.full((5, *x.shape), 2.0))
    assert calls == ["forward", *["backward"] * 5]


def test_no_gradient_is_recorded_without_need(x):
    with torch.no_grad():
        assert not operator(x, 2.0).requires_grad
    assert operator(x, 2.0).requires_grad
    assert not without_gradient(x.detach(), 2.0).requires_grad


def test_second_derivative(x):
    wide = x.detach().double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: operator(x.sin(), 2.0), wide)


def test_fake_tensors_compute_nothing(x):
    with FakeTensorMode() as mode:
        out = operator(mode.from_tensor(torch.empty(2, 5)), 2.0)
    assert out.shape == (2, 5)
    assert calls == []


def test_transforms_are_not_plain_eager():
    seen = []
    torch.func.vmap(lambda x: seen.append(is_plain_eager((x,))) or x)(torch.randn(3))
    assert seen == [False]


class Wrapped(torch.Tensor):
    """A subclass that dispatches like a plain tensor."""


@pytest.mark.parametrize(
    "argument, plain",
    [
        (torch.ones(1), True),
        (torch.nn.Parameter(torch.ones(1)), True),
        (1.5, True),
        (None, True),
        (torch.float32, True),
        ([1, 2], True),
        ([torch.ones(1)], False),
        (torch.ones(1).as_subclass(Wrapped), False),
        (torch.ones(1, dtype=torch.complex64).conj().imag, False),
    ],
    ids=[
        *("tensor", "parameter", "number", "none", "dtype", "numbers"),
        *("tensors", "subclass", "negated"),
    ],
)
def test_is_plain_eager(argument, plain):
    assert is_plain_eager((argument,)) is plain


def test_modes_are_not_plain_eager():
    with FakeTensorMode():
        assert not is_plain_eager(())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_view_that_is_negated_by_a_mark_is_negated(requires_grad):
    seen = []

    def watch(x, factor):
        seen.append(x.is_neg())
        return x * factor

    name = f"attn_core_tests::watched_{requires_grad}".lower()
    watched = Operator(name, SCHEMA, watch, scaled_fake, autograd=Scaled.apply)
    x = torch.randn(5, dtype=torch.complex64).conj().imag.requires_grad_(requires_grad)
    assert x.is_neg()
    torch.testing.assert_close(watched(x, 2.0), 2.0 * x.resolve_neg())
    assert seen == [False]


def test_autocast_stays_outside(x):
    def product(x, factor):
        return factor * x @ x.mT

    name, fake = "attn_core_tests::product", lambda x, factor: x.new_empty(len(x), len(x))
    products = Operator(name, SCHEMA, product, fake, autograd=Scaled.apply)
    for tensor in (x, x.detach()):
        with torch.autocast("cpu", torch.bfloat16):
            assert (tensor @ tensor.mT).dtype == torch.bfloat16
            out, dispatched = products(tensor, 2.0), products.overload(tensor, 2.0)
        assert torch.equal(out, 2.0 * x @ x.mT)
        assert torch.equal(dispatched, out)


def test_needs_grad(x):
    assert needs_grad((1, None, x))
    assert not needs_grad((1, None, x.detach()))
    with torch.no_grad():
        assert not needs_grad((x,))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.func.jvp
def test_forward_mode_is_refused(x):
    """torch would go on with tangents of zeros."""
    x = x.detach()
    with pytest.raises(UnsupportedProblemError, match="scaled has no forward-mode gradient"):
        torch.func.jvp(lambda x: operator(x, 3.0), (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(UnsupportedProblemError, match="scaled has no forward-mode gradient"):
            operator(forward_ad.make_dual(x, x), 3.0)
        assert torch.equal(operator(x, 3.0), 3 * x)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev], ids=["grad", "jacrev"])
def test_gradients_of_functorch_are_refused(x, transform):
    with pytest.raises(UnsupportedProblemError, match=r"scaled has no rule for torch\.func\.grad"):
        transform(lambda x: operator(x, 3.0).sum())(x.detach())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_runs_one_slice_after_another(x):
    out = torch.vmap(lambda x: operator(x, 3.0))(x)
    torch.testing.assert_close(out, 3 * x)
    assert torch.autograd.grad(out.sum(), x)[0].eq(3.0).all()
