"""What a call may do and still be repeated."""

import weakref

import pytest
import torch

from attn_core import recording
from attn_core.replay import Replayed

from .copying import filled


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + 1,
        lambda x: x,
        lambda x: x.t(),
        lambda x: torch.full_like(x, x.sum().item()),
        lambda x: torch.full_like(x, float(x[0, 0])),
        lambda x: x.new_empty(x.shape).zero_(),
        lambda x: torch.empty(3, device="meta"),
        torch.rand_like,
    ],
    ids=["add", "identity", "view", "item", "float", "zero_", "elsewhere", "random"],
)
def test_operations_of_torch_run_every_time(compute):
    computed = []

    def function(x):
        computed.append(x)
        return compute(x)

    replayed = Replayed(function)
    for _ in range(4):
        replayed(torch.randn(4, 4))
    assert len(computed) == 4


def test_foreign_memory_is_not_repeated(kernel):
    workspace = filled(3.0)

    def function(x):
        kernel.computed += 1
        out = x.new_empty(x.shape)
        kernel.launch(workspace, out, 1.0)
        return out

    replayed = Replayed(function)
    for _ in range(4):
        replayed(filled(1.0))
    assert kernel.computed == 4


@pytest.mark.parametrize(
    "allocate, value",
    [
        (torch.zeros_like, 0.0),
        (lambda x: x.new_zeros(3, 5, dtype=torch.float16), 0.0),
        (lambda x: torch.full((2, 3), 7.0), 7.0),
        (lambda x: torch.full_like(x.t(), 7.0), 7.0),
        (lambda x: x.new_full((3,), -torch.inf, dtype=torch.float64), -torch.inf),
        (lambda x: torch.empty_strided((2, 3), (1, 4)), None),
    ],
    ids=["zeros_like", "new_zeros", "full", "full_like", "new_full", "empty_strided"],
)
def test_memory_is_filled_as_it_was(kernel, allocate, value):
    computed = []

    def function(x):
        computed.append(allocate(x))
        kernel.touch(computed[-1])
        return computed[-1]

    replayed = Replayed(function)
    for _ in range(4):
        result = replayed(torch.ones(4, 8))
        expected = allocate(torch.ones(4, 8))
        assert (result.shape, result.stride()) == (expected.shape, expected.stride())
        assert result.dtype == expected.dtype
        if value is not None:
            assert torch.equal(result, expected)
            result.fill_(1.0)
    assert len(computed) == 2


def test_copies_between_views(kernel):
    def padded(x, y):
        kernel.computed += 1
        wide = x.new_zeros(4, 8, dtype=torch.float64)
        wide[:, 1:4] = x.t()[:, 1:]
        wide[:, 4:8].copy_(y)
        return wide[1:], wide

    function = Replayed(padded)
    for _ in range(4):
        x, y = torch.randn(4, 4), torch.randn(4, 4)
        rest, wide = function(x, y)
        assert torch.equal(wide.float(), torch.cat([x.new_zeros(4, 1), x.t()[:, 1:], y], 1))
        assert rest.data_ptr() == wide[1:].data_ptr()
        assert (rest.shape, rest.stride(), wide.dtype) == ((3, 8), (8, 1), torch.float64)
    assert kernel.computed == 2


def test_copies_from_elsewhere_are_not_repeated(kernel):
    workspace = filled(3.0)

    def function(x):
        kernel.computed += 1
        return x.new_empty(x.shape).copy_(workspace)

    replayed = Replayed(function)
    for _ in range(4):
        replayed(filled(1.0))
    assert kernel.computed == 4


@pytest.mark.parametrize("results", [1, 2, 0])
def test_what_is_written_unseen_is_not_repeated(kernel, results):
    """A backend that starts its kernels without a `Launcher`."""

    def function(x):
        kernel.computed += 1
        seen, unseen = x.new_empty(x.shape), x.new_empty(x.shape)
        if results == 2:
            kernel.launch(x, seen, 1.0)
        return (seen, unseen)[-results:] if results else None

    replayed = Replayed(function)
    for _ in range(4):
        replayed(filled(1.0))
    assert kernel.computed == 4


def test_what_is_written_unseen_is_not_copied(kernel):
    def function(x):
        kernel.computed += 1
        unseen = x.new_empty(x.shape)
        unseen.numpy()[...] = x.numpy()
        return x.new_empty(x.shape).copy_(unseen)

    replayed = Replayed(function)
    for value in range(4):
        assert torch.equal(replayed(filled(float(value))), filled(float(value)))
    assert kernel.computed == 4


def test_what_changes_arguments_unseen_is_not_repeated(kernel):
    def function(x):
        kernel.computed += 1
        x.new_empty(x.shape).copy_(x)
        x.numpy()[...] *= 2.0

    replayed = Replayed(function)
    x = filled(1.0)
    for _ in range(4):
        replayed(x)
    assert torch.equal(x, filled(16.0))


def test_memory_that_is_made_each_time(kernel):
    current = filled(3.0)

    def make():
        torch.zeros(3)  # a replay calls the whole function, so it may do anything
        return current

    def function(x):
        kernel.computed += 1
        out = x.new_empty(x.shape)
        kernel.launch(recording.each_time(make), out, 1.0)
        return out

    replayed = Replayed(function)
    for value in range(5):
        current = filled(float(value))
        assert torch.equal(replayed(filled(7.0)), current)
    assert kernel.computed == 2


def test_large_memory_is_not_held_to_the_end(kernel, monkeypatch):
    monkeypatch.setattr(recording, "_MAX_FREED", 2 * 64)
    alive = []

    def function(x, pieces):
        kernel.computed += 1
        memory = []
        for _ in range(pieces):
            scratch = x.new_empty(x.shape)
            kernel.launch(x, scratch, 1.0)
            memory.append(weakref.ref(scratch))
            del scratch
        alive.append(sum(ref() is not None for ref in memory))
        out = x.new_empty(x.shape)
        kernel.launch(x, out, 2.0)
        return out

    function = Replayed(function)
    for pieces, computed in ((2, 2), (3, 4)):
        kernel.computed = 0
        alive.clear()
        for _ in range(4):
            assert torch.equal(function(filled(1.0), pieces), filled(2.0))
        assert kernel.computed == computed
    assert alive[2:] == [0, 0]  # after the one that was recorded


def test_memory_that_the_call_holds_itself_may_be_large(kernel, monkeypatch):
    monkeypatch.setattr(recording, "_MAX_FREED", 2 * 64)

    def function(x):
        kernel.computed += 1
        memory = [x.new_empty(x.shape) for _ in range(8)]
        for scratch in memory:
            kernel.launch(x, scratch, 1.0)
        return kernel.compute(memory[-1])

    function = Replayed(function)
    for _ in range(4):
        assert torch.equal(function(filled(1.0)), filled(2.0))
    assert kernel.computed == 4  # two calls, each of which counts twice
