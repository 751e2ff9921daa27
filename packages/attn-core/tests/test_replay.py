"""Calls that are repeated, with kernels that copy memory by address and count their launches."""

import ctypes
import weakref

import pytest
import torch

from attn_core import environment, library, replay, tuning
from attn_core.replay import Replayed, recording, repeatable


class Kernel:
    """Writes ``out = x * factor`` by address; `compute` is the Python that comes before it."""

    def __init__(self):
        self.computed = self.launched = 0

    def launch(self, x, out, factor):
        size = x.numel()

        def start(pointers):
            self.launched += 1
            source, target = (_memory(pointer, size) for pointer in pointers)
            for i in range(size):
                target[i] = source[i] * factor

        start([x.data_ptr(), out.data_ptr()])
        if recording() is not None:
            recording().launched([x, out], start)

    def touch(self, out):
        if recording() is not None:
            recording().launched([out], lambda pointers: None)

    def compute(self, x, factor=2.0):
        self.computed += 1
        out = x.new_empty(x.shape)
        self.launch(x, out, factor)
        return out


def _memory(pointer, size):
    return (ctypes.c_float * size).from_address(pointer)


@pytest.fixture(autouse=True)
def cpu_launches(monkeypatch):
    monkeypatch.setattr(replay, "_launches_here", lambda tensor: isinstance(tensor, torch.Tensor))
    monkeypatch.delenv(environment.BACKEND, raising=False)
    monkeypatch.delenv(environment.CHECK_VALUES, raising=False)


@pytest.fixture
def kernel():
    return Kernel()


def filled(value, shape=(4, 4), dtype=torch.float32):
    return torch.full(shape, value, dtype=dtype)


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


def unequal():
    """Calls of which no two may share what they have worked out."""
    base = torch.ones(128)
    square = base[:16].view(4, 4)
    yield "plain", (square, 2.0)
    yield "factor", (square, 3.0)
    yield "type of factor", (square, 2)
    yield "shape", (base[:8].view(2, 4), 2.0)
    yield "strides", (square.t(), 2.0)
    yield "more strides", (base[:32].view(4, 8)[:, :4], 2.0)
    yield "dtype", (square.double(), 2.0)
    yield "requires_grad", (square.clone().requires_grad_(), 2.0)
    yield "parameter", (torch.nn.Parameter(square.clone(), requires_grad=False), 2.0)
    yield "another tensor", (square, 2.0, base[16:32].view(4, 4))
    yield "the same tensor", (square, 2.0, square)
    yield "no tensor", (square, 2.0, None)
    yield "False", (square, 2.0, False)
    yield "zero", (square, 2.0, 0)
    yield "window", (square, 2.0, (1, -1))
    yield "window of floats", (square, 2.0, (1.0, -1))
    yield "window as list", (square, 2.0, [1, -1])
    yield "name", (square, 2.0, "triton")


def test_no_two_calls_share_a_key():
    keys = {name: replay.signature(args).key for name, args in unequal()}
    for allowed in (True, False):
        with torch.set_grad_enabled(allowed):
            keys[f"grad {allowed}"] = replay.signature((torch.ones(4, 4), 7.0)).key
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize(
    "switch",
    [
        lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
        torch.use_deterministic_algorithms,
    ],
    ids=["tf32", "deterministic"],
)
def test_switches_of_torch_are_part_of_the_key(switch):
    args = (torch.ones(4), 2.0)
    before = replay.signature(args).key
    switch(True)
    try:
        assert replay.signature(args).key != before
    finally:
        switch(False)
    assert replay.signature(args).key == before


def test_unaligned_tensors_are_not_repeated(kernel):
    function = Replayed(kernel.compute)
    x = torch.ones(17)[1:].view(4, 4)
    for _ in range(4):
        function(x, 2.0)
    assert kernel.computed == 4


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


def test_memory_that_is_made_each_time(kernel):
    current = filled(3.0)

    def make():
        torch.zeros(3)  # a replay calls the whole function, so it may do anything
        return current

    def function(x):
        kernel.computed += 1
        out = x.new_empty(x.shape)
        kernel.launch(replay.each_time(make), out, 1.0)
        return out

    replayed = Replayed(function)
    for value in range(5):
        current = filled(float(value))
        assert torch.equal(replayed(filled(7.0)), current)
    assert kernel.computed == 2


def test_arguments_elsewhere_are_not_repeated(kernel):
    function = Replayed(lambda x, y: kernel.compute(x))
    for _ in range(4):
        function(filled(1.0), torch.empty(2, device="meta"))
    assert kernel.computed == 4


def test_large_memory_is_not_held_to_the_end(kernel, monkeypatch):
    monkeypatch.setattr(replay, "_MAX_MADE", 3 * 64)
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


def test_failure_is_raised_every_time():
    def refuse(x):
        raise ValueError("no")

    function = Replayed(refuse)
    for _ in range(4):
        with pytest.raises(ValueError, match="no"):
            function(filled(1.0))
    assert recording() is None


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
