"""Score terms, dropout and ragged sequences of the Triton kernels on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import assert_within_budget, poison_new_allocations, random_tensor
from attn_flash import (
    dropout_mask,
    flash_attn_func,
    flash_attn_varlen_func,
    ops,
    reference,
)
from attn_flash.options import Options

pytestmark = pytest.mark.gpu

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")
WINDOWS = {"full": (-1, -1), "causal": (-1, 0), "window": (100, 30)}
FEATURES = (
    "plain", "softcap", "alibi", "bias", "bias-of-a-head", "bias-of-keys", "bias-of-queries",
    "bool-bias", "key-mask", "sinks", "dropout", "everything",
)  # fmt: skip
SIZES = {"d64": (2, 4, 2, 200, 333, 64, 64), "d128": (1, 4, 4, 257, 257, 128, 128)}
ODD_SIZES = {
    "d40-dv72": (2, 4, 1, 130, 65, 40, 72), "d192-dv128": (1, 2, 2, 70, 150, 192, 128),
    "d1": (1, 2, 1, 33, 40, 1, 1), "d111-dv256": (1, 2, 2, 33, 65, 111, 256),
}  # fmt: skip


def tensor(name, *shape, dtype, device):
    return random_tensor(shape, seed=name, dtype=dtype, device=device)


def features(name, B, H, M, N, dtype, device):
    def make(label, *shape, dtype=dtype):
        return tensor(label, *shape, dtype=dtype, device=device)

    state = torch.tensor([-(2**40) + 7, 5], device=device)
    table = {
        "plain": {},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": torch.rand(B, H, device=device)},
        "bias": {"attn_bias": make("bias", B, H, M, N)},
        "bias-of-a-head": {"attn_bias": make("bias", 1, H, M, N, dtype=torch.float32)},
        "bias-of-keys": {"attn_bias": make("bias", B, 1, 1, N)},
        "bias-of-queries": {"attn_bias": make("bias", 1, H, M, 1)},
        "bool-bias": {"attn_bias": make("bias", B, 1, M, N) > -0.5},
        "key-mask": {"key_mask": make("mask", B, N) > 0},
        "sinks": {"sinks": make("sinks", H)},
        "dropout": {"dropout_p": 0.3, "rng_state": state},
    }
    everything = {}
    for other in ("softcap", "alibi", "bias", "key-mask", "sinks", "dropout"):
        everything |= table[other]
    return (table | {"everything": everything})[name]


def differentiate(compute, q, k, v, options, dtype=None, needs_dbias=True):
    """Outputs of `compute` and their gradients, in `dtype` or as they come."""
    dtype = dtype or q.dtype
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    inputs = {"q": q, "k": k, "v": v}
    bias, sinks = options.attn_bias, options.sinks
    if bias is not None and bias.is_floating_point():
        bias = bias if dtype != torch.float64 else bias.double()
        bias = bias.detach().requires_grad_(needs_dbias)
        options = options._replace(attn_bias=bias)
        if needs_dbias:
            inputs["attn_bias"] = bias
    if sinks is not None:
        inputs["sinks"] = sinks.to(dtype).requires_grad_()
        options = options._replace(sinks=inputs["sinks"])
    out, lse = compute(q, k, v, options)
    dout = random_tensor(out.shape, seed="dout", device=q.device).to(out.dtype)
    dlse = random_tensor(lse.shape, seed="dlse", device=q.device).to(lse.dtype)
    grads = iter(torch.autograd.grad([out, lse], list(inputs.values()), [dout, dlse]))
    found = {name: next(grads) for name in inputs}
    return out, lse, *(found.get(name) for name in ("q", "k", "v", "attn_bias", "sinks"))


def by_triton(q, k, v, options):
    return ops.attention(q, k, v, *options, "triton")


def check(q, k, v, options, **needs):
    with poison_new_allocations():
        actual = differentiate(by_triton, q, k, v, options, **needs)
    same = differentiate(reference.attention_with, q, k, v, options, **needs)
    exact = differentiate(reference.attention_with, q, k, v, options, torch.float64, **needs)
    # In float32 both errors are a few roundings, added up in another order: the largest is luck.
    # A kernel adds up one product after the other, PyTorch short chains of them: the roundings of
    # 256 in float32, one by one, are up to five times its error.
    usual = 2.0 if q.dtype != torch.float32 else 4.0 * max(1.0, v.shape[-1] / 128)
    for name, x, y, z in zip(NAMES, actual, same, exact, strict=True):
        if x is not None:
            # Sums of a few numbers that nearly cancel: one rounding more or less is luck.
            factor = usual if x.numel() > 256 else 8.0
            assert_within_budget(x, y.to(x.dtype), z, name=name, factor=factor)


def dense_problem(sizes, name, dtype, device, window):
    B, H, H_KV, M, N, D, D_v = sizes
    q = tensor("q", B, M, H, D, dtype=dtype, device=device)
    k = tensor("k", B, N, H_KV, D, dtype=dtype, device=device)
    v = tensor("v", B, N, H_KV, D_v, dtype=dtype, device=device)
    terms = features(name, B, H, M, N, dtype, device)
    return q, k, v, Options(scale=D**-0.5, window_left=window[0], window_right=window[1], **terms)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_dense(sizes, name, window, device):
    check(*dense_problem(sizes, name, torch.bfloat16, device, window))


@pytest.mark.parametrize("name", ["bias", "bool-bias", "key-mask"])
def test_long(name, device):
    sizes = 1, 2, 1, 70, 1100, 128, 128
    check(*dense_problem(sizes, name, torch.bfloat16, device, (-1, -1)))


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0)], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["bias", "bool-bias", "key-mask", "alibi", "softcap", "dropout"])
def test_long_of_narrow_heads(name, dtype, window, device):
    sizes = 2, 16, 8, 70, 1104, 64, 64
    check(*dense_problem(sizes, name, dtype, device, window))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_that_reach_their_cap(dtype, device):
    sizes = 2, 4, 2, 70, 300, 64, 64
    q, k, v, _ = dense_problem(sizes, "plain", dtype, device, (-1, -1))
    q[:, 1] = 0.0
    q[:, 2], k[:, :, 0] = -10.0, k[:, :, 0].abs()  # a query whose scores are all the lowest
    options = Options(scale=5.0, softcap=50.0, window_right=0)
    actual = by_triton(q, k, v, options)
    same = reference.attention_with(q, k, v, options)
    exact = reference.attention_with(q.double(), k.double(), v.double(), options)
    for name, x, y, z in zip(NAMES, actual, same, exact, strict=False):
        assert_within_budget(x, y.to(x.dtype), z, name=name)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0)], ids=["full", "causal"])
@pytest.mark.parametrize("tokens", [304, 1104])
def test_a_bias_that_needs_no_gradient(tokens, window, device):
    sizes = 1, 2, 1, 70, tokens, 64, 64
    problem = dense_problem(sizes, "bias", torch.bfloat16, device, window)
    check(*problem, needs_dbias=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("sizes", ODD_SIZES.values(), ids=ODD_SIZES)
def test_odd_sizes(sizes, name, dtype, device):
    check(*dense_problem(sizes, name, dtype, device, (-1, 0)))


def ragged_problem(lengths_q, lengths_k, name, device, window, D=64):
    starts = [
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
        for lengths in (lengths_q, lengths_k)
    ]
    B, H, H_KV, M, N = len(lengths_q), 4, 2, max(lengths_q), max(lengths_k)
    dtype = torch.bfloat16
    q = tensor("q", sum(lengths_q) + 3, H, D, dtype=dtype, device=device)
    k = tensor("k", sum(lengths_k) + 1, H_KV, D, dtype=dtype, device=device)
    v = tensor("v", sum(lengths_k) + 1, H_KV, D, dtype=dtype, device=device)
    options = Options(
        scale=D**-0.5, window_left=window[0], window_right=window[1],
        cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], max_seqlen_q=M, max_seqlen_k=N,
        **features(name, B, H, M, N, dtype, device),
    )  # fmt: skip
    return q, k, v, options


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("name", ["plain", "bias-of-a-head", "everything"])
def test_ragged(name, window, device):
    check(*ragged_problem((100, 0, 1, 257), (130, 5, 64, 257), name, device, window))


@pytest.mark.parametrize("page_size", [1, 16, 48, 256])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_pages(page_size, window, device):
    q, k, v, options = ragged_problem((5, 0, 130), (130, 7, 257), "plain", device, window)
    max_pages = -(-257 // page_size)
    table = torch.randperm(3 * max_pages, device=device).int().reshape(3, max_pages)
    shape = (3 * max_pages, page_size, 2, 64)
    k, v = (tensor(x, *shape, dtype=q.dtype, device=device) for x in "kv")
    options = options._replace(block_table=table)
    with poison_new_allocations():
        actual = by_triton(q, k, v, options)
    same = reference.attention_with(q, k, v, options)
    exact = reference.attention_with(q.double(), k.double(), v.double(), options)
    for name, x, y, z in zip(NAMES, actual, same, exact, strict=False):
        assert_within_budget(x, y.to(x.dtype), z, name=name)


def test_gradients_have_the_same_bits_every_time(device):
    q, k, v, options = dense_problem(
        (2, 4, 2, 500, 700, 64, 64), "everything", torch.bfloat16, device, (-1, 0)
    )
    first = differentiate(by_triton, q, k, v, options)
    for _ in range(50):
        for x, y in zip(first, differentiate(by_triton, q, k, v, options), strict=True):
            assert torch.equal(x, y)


def test_dropout_drops_what_the_mask_says(device):
    q, k = (tensor(x, 1, 65, 2, 16, dtype=torch.float16, device=device) for x in "qk")
    state = torch.tensor([99, 3], device=device)
    values = torch.eye(65, device=device, dtype=torch.float16)[None, :, None].expand(-1, -1, 2, -1)
    out = flash_attn_func(q, k, values, 0.4, rng_state=state, backend="triton")
    kept = dropout_mask((1, 2, 65, 65), 0.4, state)
    assert torch.equal(out.transpose(1, 2) != 0, kept)


def test_seed_repeats_dropout(device):
    q = tensor("q", 1, 65, 2, 16, dtype=torch.float16, device=device)
    torch.manual_seed(5)
    first, second = (flash_attn_func(q, q, q, 0.5, backend="triton") for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(flash_attn_func(q, q, q, 0.5, backend="triton"), first)
    assert not torch.equal(first, second)


def test_cuda_graph_with_changing_lengths_and_dropout(device):
    q, k, v, options = ragged_problem((100, 157), (130, 127), "plain", device, (-1, 0))

    def attend(dropout_p):
        return flash_attn_varlen_func(
            q, k, v, options.cu_seqlens_q, options.cu_seqlens_k, 257, 257, dropout_p, causal=True,
            backend="triton",
        )  # fmt: skip

    for dropout_p in (0.0, 0.2):
        attend(dropout_p)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(dropout_p)
        graph.replay()
        first = out.clone()
        graph.replay()
        assert torch.equal(out, first) == (dropout_p == 0.0)
        for lengths in ((10, 240), (257, 0)):
            bounds = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
            options.cu_seqlens_q.copy_(bounds)
            options.cu_seqlens_k.copy_(bounds)
            graph.replay()
            if dropout_p == 0.0:
                assert torch.equal(out, attend(0.0))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own
def test_compile(device):
    q, k, v, options = dense_problem(
        (2, 4, 2, 130, 130, 64, 64), "everything", torch.bfloat16, device, (-1, -1)
    )
    terms = {
        name: getattr(options, name)
        for name in ("softcap", "alibi_slopes", "attn_bias", "key_mask", "sinks", "rng_state")
    }

    def attend(q, k, v):
        return flash_attn_func(q, k, v, 0.3, causal=True, **terms)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(q, k, v), attend(q, k, v))
