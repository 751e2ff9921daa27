"""The test kit itself: budget, inputs and strategies."""

import pytest
import torch

from attn_core.testing import (
    assert_within_budget,
    embedded,
    poison_new_allocations,
    poisoned,
    random_tensor,
    seed_from,
)


@pytest.fixture
def exact():
    return torch.randn(64, 64, dtype=torch.float64)


def with_error(reference, size, dtype=torch.float16):
    """The reference, rounded, with an error of this size in one place."""
    result = reference.to(dtype)
    result[3, 5] += size
    return result


class TestBudget:
    def test_pytorch_itself_is_within(self, exact):
        assert_within_budget(exact.half(), exact.half(), exact)
        assert_within_budget(exact.float(), exact.float(), exact)

    @pytest.mark.parametrize("size, ok", [(0.19, True), (0.21, False)])
    def test_twice_the_error_of_pytorch_is_allowed(self, exact, size, ok):
        exact[3, 5] = 1.0
        same_dtype = with_error(exact, 0.1)
        if ok:
            assert_within_budget(with_error(exact, size), same_dtype, exact)
            return
        with pytest.raises(AssertionError, match="dq: largest error 2.1.*is over the budget"):
            assert_within_budget(with_error(exact, size), same_dtype, exact, name="dq")

    def test_error_everywhere_is_caught_by_the_rms(self, exact):
        same_dtype = with_error(exact, 0.1)
        spread = (exact + 0.05).half()
        with pytest.raises(AssertionError, match="result: rms error"):
            assert_within_budget(spread, same_dtype, exact)

    def test_rounding_of_the_reference_is_free(self):
        exact = torch.full((8,), 1 + 2.0**-11, dtype=torch.float64)
        assert_within_budget(torch.ones(8).half(), exact, exact)

    def test_nan_never_passes(self, exact):
        with pytest.raises(AssertionError, match="result: 1 of 4096 are NaN"):
            assert_within_budget(with_error(exact, torch.nan), exact.half(), exact)

    def test_infinities_have_their_places(self, exact):
        exact[0] = -torch.inf
        assert_within_budget(exact.half(), exact.half(), exact)
        for wrong in (exact.half().abs(), with_error(exact, torch.inf)):
            with pytest.raises(AssertionError, match="infinities differ"):
                assert_within_budget(wrong, exact.half(), exact)

    def test_nothing_but_infinities_and_nothing_at_all(self):
        for exact in (torch.full((3,), -torch.inf).double(), torch.empty(0, 3).double()):
            assert_within_budget(exact.half(), exact.half(), exact)

    def test_what_cannot_be_compared_is_refused(self, exact):
        with pytest.raises(ValueError, match="reference must have dtype float64, got torch.float3"):
            assert_within_budget(exact.half(), exact.half(), exact.float())
        with pytest.raises(ValueError, match=r"same shape, got \(64, 1\), \(64, 64\)"):
            assert_within_budget(exact[:, :1], exact, exact)
        with pytest.raises(ValueError, match="same_dtype must hold no NaN"):
            assert_within_budget(exact.half(), with_error(exact, torch.nan), exact)


class TestInputs:
    def test_values_depend_on_the_name_alone(self):
        torch.manual_seed(1)
        first = random_tensor((2, 3), seed="b2-m3")
        torch.manual_seed(2)
        assert torch.equal(first, random_tensor((2, 3), seed="b2-m3"))
        assert torch.equal(first, random_tensor((2, 3), seed=seed_from("b2-m3")))
        assert not torch.equal(first, random_tensor((2, 3), seed="b2-m4"))

    def test_dtypes_hold_the_same_numbers(self):
        wide = random_tensor((5,), seed=0, dtype=torch.float64, scale=3.0)
        assert torch.equal(wide.half(), random_tensor((5,), seed=0, dtype=torch.half, scale=3.0))

    @pytest.mark.parametrize("order", [None, (1, 0, 2), (2, 1, 0), (2, 0, 1)])
    def test_embedded_equals_its_values_and_lies_in_nan(self, order):
        values = torch.randn(2, 3, 4)
        inside = embedded(values, order=order, padding=1)
        assert torch.equal(inside, values)
        slowest_first = sorted(range(3), key=lambda dim: -inside.stride(dim))
        assert tuple(slowest_first) == (order or (0, 1, 2))
        storage = torch.empty(0).set_(inside.untyped_storage())
        assert storage.isnan().sum() == storage.numel() - values.numel()
        assert storage[0].isnan()
        assert storage[-1].isnan()

    def test_integers_lie_among_the_largest(self):
        inside = embedded(torch.arange(3, dtype=torch.int32), padding=1)
        around = inside.as_strided((5,), (1,), 0)
        assert around.tolist() == [2**31 - 1, 0, 1, 2, 2**31 - 1]

    def test_poisoned_is_a_leaf_with_the_values_of_its_seed(self):
        x = poisoned((2, 5, 8), seed="x", dtype=torch.float16, order=(1, 0, 2)).requires_grad_()
        assert x.is_leaf
        assert torch.equal(x, random_tensor((2, 5, 8), seed="x", dtype=torch.float16))

    @pytest.mark.parametrize(
        "allocate",
        [
            lambda: torch.empty(2, 3),
            lambda: torch.empty_like(torch.ones(2)),
            lambda: torch.ones(2).new_empty((3,)),
            lambda: torch.empty_strided((2, 3), (1, 2)),
            lambda: torch.ones(2).new_empty_strided((2,), (2,)),
        ],
        ids=["empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"],
    )
    def test_new_allocations_are_poisoned(self, allocate):
        with poison_new_allocations():
            assert allocate().isnan().all()

    def test_poison_of_integers_and_other_operations(self):
        with poison_new_allocations():
            assert torch.empty(2, dtype=torch.int16).eq(2**15 - 1).all()
            assert torch.zeros(2).eq(0).all()

    def test_poison_reaches_the_backward_pass(self):
        class Lazy(torch.autograd.Function):
            @staticmethod
            def forward(_ctx, x):
                return x.clone()

            @staticmethod
            def backward(_ctx, dout):
                return torch.empty_like(dout)

        x = torch.ones(3, requires_grad=True)
        with poison_new_allocations():
            Lazy.apply(x).sum().backward()
        assert x.grad.isnan().all()


class TestStrategies:
    @pytest.fixture(autouse=True)
    def hypothesis(self):
        return pytest.importorskip("hypothesis")

    def drawn(self, strategy, count=200):
        """Every example of a strategy that a short run sees."""
        from hypothesis import given, settings

        seen = []

        @settings(max_examples=count, database=None, derandomize=True, deadline=None)
        @given(strategy)
        def draw(value):
            seen.append(value)

        draw()
        return seen

    def test_lengths_hit_the_edges_of_tiles(self):
        from attn_core.testing.strategies import lengths

        seen = set(self.drawn(lengths(tile=16, largest=40)))
        assert {0, 1, 15, 16, 17, 33} <= seen <= set(range(41))
        assert 0 not in self.drawn(lengths(allow_empty=False))

    def test_attention_shapes(self):
        from attn_core.testing.strategies import AttentionShape, attention_shapes

        shapes = self.drawn(attention_shapes(largest=40, head_dims=(8, 64)))
        assert all(shape.heads % shape.heads_kv == 0 for shape in shapes)
        assert {shape.head_dim for shape in shapes} == {8, 64}
        assert any(shape.len_q != shape.len_k for shape in shapes)
        assert AttentionShape(1, 63, 129, 4, 2, 64).id == "b1-h4-hkv2-m63-n129-d64"

    def test_orders_keep_the_last_dimension_innermost(self):
        from attn_core.testing.strategies import orders

        assert set(self.drawn(orders(3))) == {(0, 1, 2), (1, 0, 2)}

    def test_windows(self):
        from attn_core.testing.strategies import windows

        seen = self.drawn(windows(5))
        assert {(-1, -1), (-1, 0)} <= set(seen)
        assert all(-1 <= side <= 5 for window in seen for side in window)
