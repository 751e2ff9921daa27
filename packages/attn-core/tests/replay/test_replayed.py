"""Calls that are like earlier ones, or seem to be."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from attn_core import checks, recording, replay, tuning
from attn_core.replay import Replayed, repeatable

from .copying import Kernel, filled


def test_third_call_only_launches(kernel):
    function = Replayed(kernel.compute)
    for value in range(1, 6):
        assert torch.equal(function(filled(value), 2.0), filled(2.0 * value))
    assert (kernel.computed, kernel.launched) == (2, 5)


def test_results_are_new_every_time(kernel):
    function = Replayed(kernel.compute)
    x = filled(1.0)
    results = [function(x, 2.0) for _ in range(4)]
    assert len({result.data_ptr() for result in results}) == 4


def test_unaligned_tensors_are_not_repeated(kernel):
    function = Replayed(kernel.compute)
    x = torch.ones(17)[1:].view(4, 4)
    for _ in range(4):
        function(x, 2.0)
    assert kernel.computed == 4


def test_tensors_without_an_address_are_left_to_the_function():
    function = Replayed(lambda x, y: checks.require_tensor("y", y))
    for _ in range(4):
        with pytest.raises(ValueError, match="y must be a strided tensor"):
            function(filled(1.0), filled(1.0).to_sparse())


def test_views_of_arguments_are_found_again(kernel):
    def second_half(x):
        kernel.computed += 1
        out = x.new_empty(2, 4)
        kernel.launch(x[2:], out, 1.0)
        return out.view(8)[4:], out

    function = Replayed(second_half)
    for step in range(4):
        x = torch.arange(16.0).view(4, 4) + step
        tail, out = function(x)
        assert torch.equal(out, x[2:])
        assert torch.equal(tail, x[3])
        assert tail.data_ptr() == out.data_ptr() + 16
    assert kernel.computed == 2


def test_views_of_memory_that_arguments_share_are_not_guessed(kernel):
    def second_rows(x, y):
        kernel.computed += 1
        outs = x.new_empty(4), x.new_empty(4)
        for tensor, out in zip((x, y), outs, strict=True):
            kernel.launch(tensor[1], out, 1.0)
        return outs

    function = Replayed(second_rows)
    for _ in range(4):
        x, y = torch.randn(2, 4, 4)
        for result, expected in zip(function(x, y), (x[1], y[1]), strict=True):
            assert torch.equal(result, expected)
    assert kernel.computed == 4


def test_arguments_that_are_one_tensor_are_told_from_two(kernel):
    def second(x, y):
        out = x.new_empty(x.shape)
        kernel.launch(y, out, 1.0)
        return out

    function = Replayed(second)
    x, y = filled(1.0), filled(2.0)
    for args in ((x, x),) * 3 + ((x, y),) * 3 + ((y, x), (y, y)):
        assert torch.equal(function(*args), args[1])


def test_arguments_elsewhere_are_not_repeated(kernel):
    function = Replayed(lambda x, y: kernel.compute(x))
    for _ in range(4):
        function(filled(1.0), torch.empty(2, device="meta"))
    assert kernel.computed == 4


def test_failure_is_raised_every_time():
    def refuse(x):
        raise ValueError("no")

    function = Replayed(refuse)
    for _ in range(4):
        with pytest.raises(ValueError, match="no"):
            function(filled(1.0))
    assert recording.current() is None


def test_function_without_results(kernel):
    def double(x):
        kernel.computed += 1
        kernel.launch(x, x, 2.0)

    function = Replayed(double)
    x = filled(1.0)
    for _ in range(4):
        assert function(x) is None
    assert torch.equal(x, filled(16.0))
    assert kernel.computed == 2


def test_what_is_remembered_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(replay, "_MAX_REMEMBERED", 3)
    function = Replayed(kernel.compute)
    for step in range(10):
        function(filled(1.0), float(step))
        assert len(function._known) <= 3


@pytest.mark.parametrize("forget", [replay.forget, tuning.forget], ids=["replay", "tuning"])
def test_forgetting(kernel, forget):
    function = Replayed(kernel.compute)
    for _ in range(3):
        function(filled(1.0), 2.0)
    forget()
    function(filled(1.0), 2.0)
    assert kernel.computed == 3


class TestSurroundings:
    """Calls that are like earlier ones, except in what surrounds them."""

    @pytest.fixture
    def function(self, kernel):
        function = repeatable(kernel.compute)
        for _ in range(3):
            function(filled(1.0))
        assert kernel.computed == 2
        return function

    def test_fake_tensors(self, kernel, function, monkeypatch):
        monkeypatch.setattr(kernel, "launch", lambda *args: None)
        with FakeTensorMode() as mode:
            out = function(mode.from_tensor(filled(1.0)))
        assert isinstance(out, FakeTensor)
        assert kernel.launched == 3

    def test_vmap(self):
        seen = []
        doubled = repeatable(lambda x: seen.append(type(x)) or x * 2)
        for _ in range(4):
            out = torch.vmap(doubled)(filled(1.0, (3, 4)))
        assert torch.equal(out, filled(2.0, (3, 4)))
        assert len(seen) == 4

    def test_modes_see_what_happens(self, kernel, function):
        class Counting(TorchDispatchMode):
            seen = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                self.seen += 1
                return func(*args, **(kwargs or {}))

        with Counting() as mode:
            function(filled(1.0))
        assert mode.seen
        assert kernel.computed == 3

    def test_inference_mode(self, function):
        for _ in range(2):
            with torch.inference_mode():
                assert function(filled(1.0)).is_inference()
            assert not function(filled(1.0)).is_inference()

    def test_threads(self, kernel, function):
        def work(value):
            return all(
                torch.equal(function(filled(value)), filled(2.0 * value)) for _ in range(200)
            )

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, (1.0, 2.0, 3.0, 4.0)))
        assert kernel.computed == 2

    def test_a_thread_records_its_own_calls(self, kernel):
        """While one thread records, others launch what is not part of it."""
        inner = Kernel()
        recorded, launched = threading.Event(), threading.Event()

        def compute(x):
            if recording.current() is not None:
                recorded.set()
                assert launched.wait(10)
            return kernel.compute(x)

        def beside():
            assert recorded.wait(10)
            inner.compute(filled(1.0))
            launched.set()

        function = Replayed(compute)
        function(filled(1.0))
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(beside)
            function(filled(1.0))
            other.result()
        for _ in range(2):
            assert torch.equal(function(filled(5.0)), filled(10.0))
        assert (kernel.computed, inner.launched) == (2, 1)
