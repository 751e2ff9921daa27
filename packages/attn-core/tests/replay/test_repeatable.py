"""The decorator of public functions, and the test kit's check of what it does."""

import itertools

import pytest
import torch

from attn_core import environment, library
from attn_core.replay import repeatable
from attn_core.testing.repeats import assert_repeats

from .copying import filled, leaves


class TestRepeatable:
    """The decorator of public functions."""

    def test_gradients_are_recorded_anew(self, kernel):
        function = repeatable(lambda x: kernel.compute(x) if not x.requires_grad else x * 2)
        for _ in range(4):
            assert function(filled(1.0).requires_grad_()).requires_grad
            assert not function(filled(1.0)).requires_grad
        assert kernel.computed == 2

    def test_environment_is_part_of_the_key(self, kernel, monkeypatch):
        function = repeatable(kernel.compute)
        for name, value in ((environment.BACKEND, "torch"), (environment.CHECK_VALUES, "1")):
            for _ in range(3):
                function(filled(1.0))
            computed = kernel.computed
            monkeypatch.setenv(name, value)
            function(filled(1.0))
            assert kernel.computed == computed + 1

    def test_names_of_arguments_are_part_of_the_key(self, kernel):
        function = repeatable(lambda x, factor=2.0, other=2.0: kernel.compute(x, factor))
        for _ in range(4):
            assert torch.equal(function(filled(1.0), factor=3.0), filled(3.0))
            assert torch.equal(function(filled(1.0), other=3.0), filled(2.0))
            assert torch.equal(function(x=filled(1.0), factor=5.0), filled(5.0))

    def test_subclasses_and_other_arguments_run_in_full(self, kernel):
        class Subclass(torch.Tensor):
            pass

        function = repeatable(kernel.compute)
        for _ in range(4):
            function(filled(1.0).as_subclass(Subclass))
        assert kernel.computed == 4

    def test_operators_inside_are_part_of_it(self, kernel):
        operator = library.Operator(
            "attn_core_tests::replayed_inside",
            "(Tensor x) -> Tensor",
            kernel.compute,
            lambda x: x.new_empty(x.shape),
        )
        function = repeatable(operator.__call__)
        for value in range(5):
            assert torch.equal(function(filled(value)), filled(2.0 * value))
        assert (kernel.computed, kernel.launched) == (2, 5)

    def test_compiles_into_one_graph(self):
        function = repeatable(lambda x: x * 2)
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert torch.equal(compiled(filled(3.0)), filled(6.0))


class TestAssertRepeats:
    """The test kit's check of functions that are repeated."""

    def test_functions_that_are_repeated_pass(self, kernel):
        assert_repeats(repeatable(kernel.compute), lambda i: [filled(float(i))])

    def test_kinds_and_passes(self, doubled):
        def gradients(x, y):
            out, _ = function(x, y)
            return out, *torch.autograd.grad(out, (x, y), filled(1.0))

        function = repeatable(doubled.__call__)
        assert_repeats(gradients, lambda i: leaves(i, 1.0))
        with pytest.raises(AssertionError, match=r"2 calls were repeated, expected 4"):
            assert_repeats(gradients, lambda i: leaves(i, 1.0), passes=2)

    def test_functions_that_are_not_fail(self, kernel):
        with pytest.raises(AssertionError, match="0 calls were repeated, expected 2"):
            assert_repeats(kernel.compute, lambda i: [filled(1.0)])

    def test_other_bits_fail(self, kernel):
        """What a function remembers on its own is not repeated."""
        calls = itertools.count()
        function = repeatable(lambda x: kernel.compute(x, next(calls)))
        with pytest.raises(AssertionError, match="result 0 of call 0"):
            assert_repeats(function, lambda i: [filled(1.0)])
