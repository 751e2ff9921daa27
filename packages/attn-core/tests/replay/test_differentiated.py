"""Public functions of one operator, while gradients are recorded."""

import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attn_core import library, recording
from attn_core.replay import repeatable

from .copying import filled, leaves


class Product(torch.autograd.Function):
    """Says that x y z is what was computed."""

    @staticmethod
    def forward(ctx, compute, *args):
        ctx.save_for_backward(*args)
        return compute(*args)

    @staticmethod
    def backward(ctx, dout):
        _, y, z = ctx.saved_tensors
        return None, dout * y * z, None, None


class TestDifferentiated:
    """Public functions of one operator, while gradients are recorded."""

    @pytest.mark.parametrize("results", [1, 2, 3])
    def test_third_call_only_launches(self, kernel, doubled, results):
        def compute(x, y):
            out, other = doubled(x, y)
            return out if results == 1 else (out, other, x.new_empty(0))[:results]

        function = repeatable(compute)
        for value in range(1, 6):
            x, y = leaves(value, 7.0)
            out = function(x, y) if results == 1 else function(x, y)[0]
            assert torch.equal(out, filled(2.0 * value))
            dx, dy = torch.autograd.grad(out, (x, y), filled(3.0))
            assert torch.equal(dx, filled(6.0))
            assert torch.equal(dy, filled(-3.0))
        assert (kernel.computed, kernel.launched) == (2, 5)

    def test_calls_with_and_without_gradients_take_turns(self, doubled):
        function = repeatable(doubled.__call__)
        x, y = leaves(1.0, 2.0)
        for _ in range(4):
            assert function(x, y)[0].requires_grad
            with torch.no_grad():
                assert not function(x, y)[0].requires_grad
            assert not function(x.detach(), y.detach())[0].requires_grad
            [dy] = torch.autograd.grad(function(x.detach(), y)[0], y, filled(1.0))
            assert torch.equal(dy, filled(-1.0))

    def test_tensors_of_one_memory_keep_their_histories(self, doubled):
        """The same object twice, then two objects: alike to kernels, but not to autograd."""
        function = repeatable(doubled.__call__)
        memory = filled(1.0)
        for _ in range(4):
            [x] = leaves(1.0)
            [dx] = torch.autograd.grad(function(x, x)[0], x, filled(1.0))
            assert torch.equal(dx, filled(1.0))
        for _ in range(4):
            x, y = (memory.detach().requires_grad_() for _ in range(2))
            dx, dy = torch.autograd.grad(function(x, y)[0], (x, y), filled(1.0))
            assert torch.equal(dx, filled(2.0))
            assert torch.equal(dy, filled(-1.0))

    def test_one_tensor_without_a_gradient_serves_twice(self, kernel):
        """As the lengths of queries and keys do."""
        both = library.Operator(
            "attn_core_tests::both",
            "(Tensor x, Tensor y, Tensor z) -> Tensor",
            lambda x, y, z: kernel.compute(x),
            lambda x, y, z: x.new_empty(x.shape),
            autograd=Product.apply,
        )
        function = repeatable(both.__call__)
        for value in range(1, 6):
            [x], y = leaves(1.0), filled(value)
            [dx] = torch.autograd.grad(function(x, y, y), x, filled(1.0))
            assert torch.equal(dx, filled(value**2))
        assert kernel.computed == 2

    def test_random_numbers_are_drawn_each_time(self, kernel):
        """The operator's argument is made within the call, as a state of dropout is."""
        scaled = library.Operator(
            "attn_core_tests::scaled_at_random",
            "(Tensor x, Tensor y, Tensor z) -> Tensor",
            lambda x, y, z: kernel.compute(y),
            lambda x, y, z: x.new_empty(x.shape),
            autograd=Product.apply,
        )

        def function(x, z):
            return scaled(x, recording.each_time(lambda: torch.randn(4, 4)), z)

        repeated = repeatable(function)
        for seed in range(5):
            torch.manual_seed(seed)
            y, state = torch.randn(4, 4), torch.get_rng_state()
            torch.manual_seed(seed)
            [x], z = leaves(1.0), filled(3.0)
            out = repeated(x, z)
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.equal(out, 2.0 * y)
            [dx] = torch.autograd.grad(out, x, filled(1.0))
            assert torch.equal(dx, 3.0 * y)
        assert kernel.computed == 2

    @pytest.mark.parametrize(
        "around",
        [
            lambda op, x, y: op(x.view(16), y.view(16))[0],
            lambda op, x, y: op(x, y.new_empty(4, 4).copy_(y))[0],
            lambda op, x, y: op(x, y)[0].t(),
            lambda op, x, y: op(op(x, y)[0], y)[0],
            lambda op, x, y: op(x, y)[0] * 3.0,
            lambda op, x, y: op(x, y)[0].detach(),
            lambda op, x, y: (op(x, y)[0], y)[1],
        ],
        ids=["view", "copy", "view of result", "twice", "multiplied", "detached", "argument"],
    )
    def test_more_than_the_operator_runs_in_full(self, doubled, around):
        function = repeatable(lambda x, y: around(doubled, x, y))
        found = []
        for _ in range(5):
            x, y = leaves(1.0, 2.0)
            out = function(x, y)
            grads = ()
            if out.requires_grad:
                grads = torch.autograd.grad(
                    out, (x, y), torch.ones_like(out), materialize_grads=True
                )
            found.append((out, *grads))
        for results in found:
            for result, expected in zip(results, found[0], strict=True):
                assert torch.equal(result, expected)

    def test_checkpoints(self, kernel, doubled):
        """Recomputed within the backward pass, which stops it where all is saved."""
        function = repeatable(doubled.__call__)
        for value in range(1, 6):
            x, y = leaves(value, 2.0)
            out, _ = checkpoint(function, x, y, use_reentrant=False)
            dx, dy = torch.autograd.grad(out.square(), (x, y), filled(1.0))
            assert torch.equal(dx, filled(8.0 * value))
            assert torch.equal(dy, filled(-4.0 * value))
        assert kernel.computed == 3  # the second one, recomputed, was stopped

    def test_autocast_stays_outside(self, doubled):
        function = repeatable(doubled.__call__)
        for _ in range(4):
            x, y = leaves(1.0, 2.0)
            with torch.autocast("cpu", torch.bfloat16):
                out, _ = function(x, y)
            assert out.dtype == torch.float32
            assert torch.equal(torch.autograd.grad(out, y, filled(1.0))[0], filled(-1.0))

    def test_hooks_see_what_is_saved(self, doubled):
        function = repeatable(doubled.__call__)
        for _ in range(4):
            saved = []
            x, y = leaves(1.0, 2.0)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, id):  # noqa: B023
                function(x, y)
            assert [t.data_ptr() for t in saved] == [x.data_ptr(), y.data_ptr()]

    def test_graph_is_freed(self, doubled):
        function = repeatable(doubled.__call__)
        for _ in range(4):
            x, y = leaves(1.0, 2.0)
            memory = weakref.ref(x)
            function(x, y)[0].sum().backward()
            del x, y
            assert memory() is None
