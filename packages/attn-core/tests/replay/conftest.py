import pytest
import torch

from attn_core import environment, library, replay

from .copying import Kernel


@pytest.fixture(autouse=True)
def cpu_launches(monkeypatch):
    monkeypatch.setattr(replay, "_launches_here", lambda tensor: isinstance(tensor, torch.Tensor))
    monkeypatch.delenv(environment.BACKEND, raising=False)
    monkeypatch.delenv(environment.CHECK_VALUES, raising=False)


@pytest.fixture
def kernel():
    return Kernel()


class Doubled(torch.autograd.Function):
    """Says that 2 x - y is what was computed."""

    @staticmethod
    def forward(ctx, compute, x, y):
        ctx.save_for_backward(x, y)
        return compute(x, y)

    @staticmethod
    def backward(ctx, dout, _):
        assert len(ctx.saved_tensors) == 2
        return None, 2.0 * dout, -dout


@pytest.fixture
def doubled(kernel):
    """An operator of x and y: 2 x, and another result, both launched."""

    def compute(x, y):
        out = kernel.compute(x)
        other = x.new_zeros(3)
        kernel.touch(other)
        return out, other

    Doubled.count = getattr(Doubled, "count", 0) + 1
    return library.Operator(
        f"attn_core_tests::doubled_{Doubled.count}",
        "(Tensor x, Tensor y) -> (Tensor, Tensor)",
        compute,
        lambda x, y: (x.new_empty(x.shape), x.new_empty(3)),
        autograd=Doubled.apply,
    )
