"""Calls that are repeated, with kernels that copy memory by address and count their launches."""

import ctypes
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from attn_core import checks, eager, environment, library, recording, replay, tuning
from attn_core.replay import Replayed, repeatable
from attn_core.testing.repeats import assert_repeats


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
        if recording.current() is not None:
            recording.current().launched([x, out], start)

    def touch(self, out):
        if recording.current() is not None:
            recording.current().launched([out], lambda pointers: None)

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
    keys = {name: eager.signature(args).key for name, args in unequal()}
    for allowed in (True, False):
        with torch.set_grad_enabled(allowed):
            keys[f"grad {allowed}"] = eager.signature((torch.ones(4, 4), 7.0)).key
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
    before = eager.signature(args).key
    switch(True)
    try:
        assert eager.signature(args).key != before
    finally:
        switch(False)
    assert eager.signature(args).key == before


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


def test_arguments_elsewhere_are_not_repeated(kernel):
    function = Replayed(lambda x, y: kernel.compute(x))
    for _ in range(4):
        function(filled(1.0), torch.empty(2, device="meta"))
    assert kernel.computed == 4


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


def leaves(*values):
    return [filled(value).requires_grad_() for value in values]


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
