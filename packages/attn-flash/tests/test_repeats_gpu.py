"""Calls that are repeated, on a GPU: the bits of calls in full, whatever else has changed.

All problems are of one size, so that few kernels are compiled.
"""

from __future__ import annotations

import threading

import pytest
import torch

from attn_core import backends, environment
from attn_core.device import device_info
from attn_core.testing import random_tensor
from attn_core.testing.repeats import assert_repeats, counted_replays
from attn_flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

pytestmark = pytest.mark.gpu

BFLOAT, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
B, S, H, D = 2, 160, 4, 64


@pytest.fixture(params=["triton", "hopper"])
def backend(request, device):
    if request.param == "hopper" and device_info(device).arch != "sm_90":
        pytest.skip("needs compute capability 9.0")
    return request.param


def draw(i, *shape, device, count=3, dtype=BFLOAT):
    return [random_tensor(shape, seed=f"{i}-{n}", dtype=dtype, device=device) for n in range(count)]


def attend(q, k, v, **options):
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    return out, lse


def with_gradients(function):
    """`function` of q, k, v and dout, which returns the gradients too."""

    def compute(q, k, v, dout, *rest):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = function(q, k, v, *rest)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    return compute


def test_dense(backend, device):
    assert_repeats(
        lambda q, k, v: attend(q, k, v, causal=True, backend=backend),
        lambda i: draw(i, B, S, H, D, device=device),
    )


def test_kinds_take_turns(backend, device):
    """Dtypes, layouts and numbers that alternate, as the layers of a model do."""

    def make(i):
        kind = i % 3
        q, k, v = draw(i, B, S, H, D, device=device, dtype=HALF if kind == 1 else BFLOAT)
        if kind == 2:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return q, k, v, 0.1 * (kind + 1)

    assert_repeats(
        lambda q, k, v, scale: attend(q, k, v, softmax_scale=scale, causal=True, backend=backend),
        make,
        kinds=3,
    )


def test_memory_of_another_alignment(backend, device):
    """After aligned calls one whose tensors begin between two 16-byte lines."""

    def shifted(x):
        memory = x.new_empty(x.numel() + 1)[1:]
        return memory.copy_(x.flatten()).view(x.shape)

    for i in range(6):
        q, k, v = draw(i, B, S, H, D, device=device)
        expected = attend(q, k, v, causal=True, backend="triton")[0]
        name = "triton" if i == 4 else backend  # the copy engine takes no such tensor
        args = (*map(shifted, (q, k)), v) if i == 4 else (q, k, v)
        actual = attend(*args, causal=True, backend=name)[0]
        torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)


def test_graph_of_a_repeated_call(backend, device):
    q, k, v = draw(0, B, S, H, D, device=device)
    for _ in range(4):
        expected, _ = attend(q, k, v, causal=True, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), counted_replays() as replays:
        out, _ = attend(q, k, v, causal=True, backend=backend)
    assert replays
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)


def test_other_streams(backend, device):
    """A repeated call is ordered after what its stream has waited for."""
    q, k, v = draw(0, B, S, H, D, device=device)
    expected, _ = attend(q, k, v, causal=True, backend=backend)
    for _ in range(3):
        attend(q, k, v, causal=True, backend=backend)
    for _ in range(3):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), counted_replays() as replays:
            late = torch.zeros_like(q)
            torch.cuda._sleep(20_000_000)
            late.copy_(q)
            out, _ = attend(late, k, v, causal=True, backend=backend)
            assert replays
        stream.synchronize()
        assert torch.equal(out, expected)


def test_threads(backend, device):
    inputs = [draw(i, B, S, H, D, device=device) for i in range(4)]
    expected = [attend(*x, causal=True, backend=backend)[0] for x in inputs]
    differences = []

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream(device)):
            for _ in range(50):
                out, _ = attend(*inputs[number], causal=True, backend=backend)
                if not torch.equal(out, expected[number]):
                    differences.append(number)

    torch.cuda.synchronize(device)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differences


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_surroundings_that_change(device):
    """Gradients, inference mode, autocast, a compiler and a backend by name, in turn."""
    q, k, v = draw(0, B, S, H, D, device=device)

    def call(q=q):
        return flash_attn_func(q, k, v, causal=True, backend="triton")

    expected = call()
    compiled = torch.compile(call, backend="eager")
    for _ in range(4):
        leaf = q.detach().requires_grad_()
        assert call(leaf).requires_grad
        with torch.no_grad():
            assert not call(leaf).requires_grad
        with torch.inference_mode():
            assert call().is_inference()
        assert not call().is_inference()
        with torch.autocast("cuda", torch.float16):
            assert call().dtype == BFLOAT
        for out in (call(leaf), compiled(), call()):
            assert torch.equal(out, expected)


def test_backend_of_the_environment(device, monkeypatch):
    q, k, v = draw(0, B, S, H, D, device=device)
    ran = []
    for name in ("triton", "torch", "triton") * 3:
        monkeypatch.setenv(environment.BACKEND, name)
        ran.append(flash_attn_func(q, k, v, causal=True))
    triton, torch_ = ran[:2]
    assert not torch.equal(triton, torch_)  # else this test shows nothing
    for out, expected in zip(ran, (triton, torch_, triton) * 3, strict=True):
        assert torch.equal(out, expected)


def test_backend_that_is_registered_later(device, monkeypatch):
    q, k, v = draw(0, B, S, H, D, device=device)
    for _ in range(4):
        flash_attn_func(q, k, v, causal=True)
    monkeypatch.setattr(backends, "_backends", dict(backends._backends))
    monkeypatch.setitem(globals(), "nothing", lambda q, *_: (torch.zeros_like(q), q.new_zeros(1)))
    ops = {"attn_flash::attention": f"{__name__}:nothing"}
    backends.register(backends.Backend("nothing", ops, 1000, lambda op, problem: None))
    try:
        for _ in range(4):
            assert not flash_attn_func(q, k, v, causal=True).any()
    finally:
        monkeypatch.undo()
        backends.register(backends._backends["attn_flash::attention", "torch"])
    assert flash_attn_func(q, k, v, causal=True).any()


def test_gradients(backend, device):
    assert_repeats(
        with_gradients(
            lambda *qkv: flash_attn_func(*qkv, causal=True, deterministic=True, backend=backend)
        ),
        lambda i: draw(i, B, S, H, D, device=device, count=4),
        passes=2,
    )


def test_nothing_is_kept_alive(backend, device):
    def allocated():
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)

    def step(i):
        q, k, v = (x.requires_grad_() for x in draw(i, B, S, H, D, device=device))
        attend(q, k, v, causal=True, backend=backend)[0].sum().backward()

    for i in range(4):
        step(i)
    before = allocated()
    for i in range(4):
        step(i)
    assert allocated() == before


def test_ragged(backend, device):
    def make(i):
        lengths = [0, 40 + i, 0, 100 - i, 20]  # of one longest length, sums and number
        starts = torch.tensor(lengths, device=device).cumsum(0).int()
        return *draw(i, 160, H, D, device=device, count=4), starts

    def function(q, k, v, starts):
        return flash_attn_varlen_func(
            q, k, v, starts, starts, 100, 100, causal=True, deterministic=True, backend=backend
        )

    assert_repeats(with_gradients(function), make, passes=2)


def test_cache_that_grows(device):
    """Lengths and tables are read anew; the cache is written in place."""
    pages, page = 12, 64

    def make(i):
        q, new_k, new_v = draw(i, B, 1, H, D, device=device)
        k_cache, v_cache = draw(i, pages, page, H, D, device=device, count=2)
        lengths = torch.tensor([5 + 30 * i, 64 - i], dtype=torch.int32, device=device)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(i))
        return q, k_cache, v_cache, new_k, new_v, lengths, order.view(B, -1).int().to(device)

    def function(q, k_cache, v_cache, k, v, lengths, table):
        out, lse = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lengths, block_table=table, causal=True,
            return_softmax_lse=True, backend="triton",
        )  # fmt: skip
        return out, lse, k_cache, v_cache

    assert_repeats(function, make)


def test_dropout_follows_the_generator(device):
    """Every call draws its own state, as many numbers as a call in full."""

    def masks(q, k, v):
        torch.manual_seed(7)
        results = [flash_attn_func(q, k, v, 0.5, backend="triton") for _ in range(2)]
        assert not torch.equal(*results)
        return *results, torch.cuda.get_rng_state(q.device)

    assert_repeats(masks, lambda i: draw(i, B, S, H, D, device=device))


def test_dropout_in_a_graph(device):
    q, k, v = draw(0, B, S, H, D, device=device)
    for _ in range(4):
        flash_attn_func(q, k, v, 0.5, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v, 0.5, backend="triton")
    results = []
    for _ in range(2):
        graph.replay()
        results.append(out.clone())
    assert torch.isfinite(torch.stack(results)).all()
    assert not torch.equal(*results)


def test_tf32_that_is_switched(device, monkeypatch):
    def function(q, k, v, allowed):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        return attend(q, k, v, backend="triton")

    assert_repeats(
        function, lambda i: (*draw(0, B, S, H, D, device=device, dtype=FLOAT), i % 2 == 0), kinds=2
    )
