"""Score terms, dropout and ragged sequences of the Triton kernels, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import assert_within_budget, poison_new_allocations, random_tensor
from attn_core.tuning import TileConfig
from attn_flash import reference
from attn_flash.options import Options

from ..cases import assert_nan_where_expected, with_nan

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from attn_flash._triton import backward, configs, forward, problem  # noqa: E402
from attn_flash._triton.scores import exp2_bounded  # noqa: E402

pytestmark = pytest.mark.interpret

B, H, H_KV, M, N, D, D_V = 2, 2, 1, 19, 37, 8, 5
STATE = torch.tensor([1234567890123, 5])
NAMES = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")
WINDOWS = {"full": (-1, -1), "causal": (-1, 0), "window": (7, 3)}


def tensor(name, *shape, dtype=torch.float32):
    return random_tensor(shape, seed=name, dtype=dtype)


FEATURES = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.linspace(0.1, 1.0, H)},
    "alibi-batch": {"alibi_slopes": torch.linspace(0.1, 1.0, B * H).reshape(B, H)},
    "bias": {"attn_bias": tensor("bias", B, H, M, N)},
    "bias-of-float64": {"attn_bias": tensor("bias", B, 1, M, N, dtype=torch.float64)},
    "bias-of-a-head": {"attn_bias": tensor("bias", 1, H, M, N)},
    "bias-of-keys": {"attn_bias": tensor("bias", B, 1, 1, N)},
    "bias-of-queries": {"attn_bias": tensor("bias", 1, H, M, 1)},
    "bias-of-a-batch": {"attn_bias": tensor("bias", B, 1, 1, 1)},
    "bool-bias": {"attn_bias": tensor("bias", B, 1, M, N) > -0.5},
    "key-mask": {"key_mask": tensor("mask", B, N) > 0},
    "added-key-mask": {"key_mask": tensor("mask", B, N)},
    "sinks": {"sinks": tensor("sinks", H)},
    "dropout": {"dropout_p": 0.3, "rng_state": STATE},
    "everything": {
        "softcap": 2.0,
        "alibi_slopes": torch.linspace(0.1, 1.0, B * H).reshape(B, H),
        "attn_bias": tensor("bias", B, 1, M, N),
        "key_mask": tensor("mask", B, N) > 0,
        "sinks": tensor("sinks", H),
        "dropout_p": 0.3,
        "rng_state": STATE,
    },
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(configs, "tiles", lambda table, q, size, window: TileConfig(16, 16))


def run_kernels(q, k, v, options, dout, dlse, needs_dbias):
    with poison_new_allocations():
        out, lse = forward.attention(q, k, v, options)
        grads = backward.attention_backward(dout, dlse, q, k, v, out, lse, needs_dbias, options)
    return out, lse, *grads


def run_reference(q, k, v, options, dout, dlse, needs_dbias, dtype):
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    inputs = [q, k, v]
    if needs_dbias:
        options = options._replace(attn_bias=options.attn_bias.to(dtype).requires_grad_())
        inputs.append(options.attn_bias)
    if options.sinks is not None:
        options = options._replace(sinks=options.sinks.to(dtype).requires_grad_())
        inputs.append(options.sinks)
    out, lse = reference.attention_with(q, k, v, options)
    outputs = [out] if dlse is None else [out, lse]
    douts = [x.to(dtype) for x in (dout, dlse) if x is not None]
    grads = list(torch.autograd.grad(outputs, inputs, douts))
    if not needs_dbias:
        grads.insert(3, None)
    if options.sinks is None:
        grads.append(None)
    return out, lse, *grads


def check(q, k, v, options, *, with_dlse=True):
    bias = options.attn_bias
    needs_dbias = bias is not None and bias.is_floating_point()
    shape = (*q.shape[:-1], v.shape[-1])
    dout = tensor("dout", *shape)
    lse_shape = reference.attention_with(q, k, v, options)[1].shape
    dlse = tensor("dlse", *lse_shape) if with_dlse else None
    arguments = (q, k, v, options, dout, dlse, needs_dbias)
    actual = run_kernels(*arguments)
    same = run_reference(*arguments, torch.float32)
    exact = run_reference(*arguments, torch.float64)
    for name, x, y, z in zip(NAMES, actual, same, exact, strict=True):
        assert (x is None) == (z is None), name
        if x is not None:
            assert x.shape == z.shape
            assert name != "dbias" or x.dtype == bias.dtype
            # Few numbers with few roundings each: their largest error is luck.
            assert_within_budget(x, y, z, name=name, factor=4.0 if x.numel() > 16 else 16.0)


CASES = [(name, "window") for name in FEATURES if name != "plain"] + [("everything", "causal")]


@pytest.mark.parametrize("name, window", CASES)
def test_dense(name, window):
    window = WINDOWS[window]
    q, k, v = tensor("q", B, M, H, D), tensor("k", B, N, H_KV, D), tensor("v", B, N, H_KV, D_V)
    options = Options(
        scale=D**-0.5, window_left=window[0], window_right=window[1], **FEATURES[name]
    )
    check(q, k, v, options)


def test_gradient_of_a_bias_that_is_not_written_down_before_it_is_summed(monkeypatch):
    monkeypatch.setattr(backward, "_MOST_COPIES", 0)
    monkeypatch.setattr(backward, "_MOST_EXPANDED", 0)
    test_dense("bias-of-a-head", "window")


@pytest.mark.parametrize("scale", [D**-0.5, -0.7])
def test_a_boolean_bias_that_many_scores_share_is_added(scale, monkeypatch):
    monkeypatch.setattr(problem, "_SHARING", 0)
    q, k, v = tensor("q", B, M, H, D), tensor("k", B, N, H_KV, D), tensor("v", B, N, H_KV, D_V)
    bias = tensor("bias", B, 1, M, N) > -0.5
    bias[0, 0, 3] = False  # a query without keys
    options = Options(scale=scale, window_left=7, window_right=3, attn_bias=bias)
    size = problem.size(q, k, v, options)
    assert problem.with_added_bias(q, size, options).attn_bias.dtype == q.dtype
    check(q, k, v, options)


@pytest.mark.parametrize("name", ["key-mask", "added-key-mask"])
def test_products_a_tile_ahead(name, monkeypatch):
    monkeypatch.setattr(configs, "SHORT", 0)
    monkeypatch.setattr(configs, "tiles", lambda *_: TileConfig(16, 16, num_stages=3))
    test_dense(name, "full")


@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("name", ["alibi", "bool-bias", "everything"])
def test_scales_that_are_not_positive(name, scale):
    q, k, v = tensor("q", B, M, H, D), tensor("k", B, N, H_KV, D), tensor("v", B, N, H_KV, D_V)
    check(q, k, v, Options(scale=scale, window_right=0, **FEATURES[name]))


@triton.jit
def exp2_kernel(out_ptr, x_ptr, factor, COLUMNS: tl.constexpr):
    cells = tl.arange(0, 2)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + cells, exp2_bounded(tl.load(x_ptr + cells), factor))


def test_powers_by_polynomial():
    x = torch.linspace(-60, 60, 4096).reshape(2, 2048)
    x[:, -2:] = torch.nan
    out = torch.empty_like(x)
    exp2_kernel[1,](out, x, 2.0, 2048)
    expected = torch.exp2(2.0 * x.double())
    assert out.isnan().equal(x.isnan())
    assert ((out / expected - 1.0).abs().nan_to_num() < 1 / 13_000).all()


@pytest.mark.parametrize("name", ["softcap", "softcap-dropout"])
@pytest.mark.parametrize("window", WINDOWS)
def test_bounded_scores(name, window, monkeypatch):
    monkeypatch.setattr(problem, "is_bounded", lambda q, size, options: True)
    left, right = WINDOWS[window]
    features = {**FEATURES["softcap"], **(FEATURES["dropout"] if "dropout" in name else {})}
    options = Options(scale=2.0, window_left=left, window_right=right, **features)
    q, k, v = tensor("q", B, M, H, D), tensor("k", B, N, H_KV, D), tensor("v", B, N, H_KV, D_V)
    out, lse = forward.attention(q, k, v, options)
    expected, expected_lse = reference.attention_with(q, k, v, options)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-4)


def test_which_scores_are_bounded():
    q, k = (torch.empty(B, M, H, D, dtype=torch.bfloat16) for _ in range(2))
    bounded = Options(softcap=50.0, window_right=0)
    size = problem.size(q, k, k, bounded)
    assert problem.is_bounded(q, size, bounded)
    assert problem.is_bounded(q, size, bounded._replace(dropout_p=0.5))
    assert not problem.is_bounded(q, size, bounded._replace(softcap=51.0))
    assert not problem.is_bounded(q, size, bounded._replace(softcap=0.0))
    assert not problem.is_bounded(q, size, bounded._replace(sinks=torch.zeros(H)))
    assert not problem.is_bounded(q, size, bounded._replace(alibi_slopes=torch.ones(H)))
    assert not problem.is_bounded(q, size._replace(N=1), bounded)
    assert not problem.is_bounded(q.half(), size, bounded)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of the interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("window", ["full", "causal"])
@pytest.mark.parametrize("name", FEATURES)
def test_nan_reaches_the_rows_that_see_it(name, window):
    left, right = WINDOWS[window]
    options = Options(scale=D**-0.5, window_left=left, window_right=right, **FEATURES[name])
    q, k = with_nan(tensor("q", B, M, H, D), tensor("k", B, N, H_KV, D))
    v = tensor("v", B, N, H_KV, D_V)
    expected = reference.attention_with(*(x.double() for x in (q, k, v)), options)
    assert_nan_where_expected(forward.attention(q, k, v, options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_row_of_the_lowest_numbers_is_a_mean(dtype):
    q, k, v = tensor("q", B, M, H, D), tensor("k", B, N, H_KV, D), tensor("v", B, N, H_KV, D_V)
    bias = torch.zeros(1, 1, M, N, dtype=dtype)
    bias[..., 3, :] = torch.finfo(dtype).min
    bias[..., 4, 1:] = torch.finfo(dtype).min
    bias[..., 5, :] = -torch.inf
    out, lse = forward.attention(q, k, v, Options(attn_bias=bias, scale=0.0))
    torch.testing.assert_close(out[:, 3], v.mean(1).expand(B, H, D_V))
    torch.testing.assert_close(out[:, 4], v[:, 0].expand(B, H, D_V))
    assert not out[:, 5].any()
    assert lse[..., 3].isfinite().all()
    assert (lse[..., 5] == -torch.inf).all()


@pytest.mark.parametrize(
    "name, window", [("plain", "full"), ("bias-of-a-head", "causal"), ("everything", "window")]
)
def test_ragged(name, window):
    window = WINDOWS[window]
    lengths_q, lengths_k = (M, 3), (N, 20)
    starts = [
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    ]
    q = tensor("q", sum(lengths_q) + 2, H, D)
    k, v = tensor("k", sum(lengths_k) + 1, H_KV, D), tensor("v", sum(lengths_k) + 1, H_KV, D_V)
    options = Options(
        scale=-0.5, window_left=window[0], window_right=window[1],
        cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], max_seqlen_q=M, max_seqlen_k=N,
        **FEATURES[name],
    )  # fmt: skip
    check(q, k, v, options)
    check(q, k, v, options, with_dlse=False)
    used = torch.tensor([5, 17], dtype=torch.int32)
    if name == "plain":
        check(q, k, v, options._replace(seqused_k=used))


def test_tokens_of_no_sequence_give_sinks_nothing():
    starts_q, starts_k = torch.tensor([[0, 2], [0, 0]], dtype=torch.int32)
    q, k, v = tensor("q", 4, H, D), tensor("k", 0, H_KV, D), tensor("v", 0, H_KV, D_V)
    options = Options(
        sinks=tensor("sinks", H), cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=2
    )
    dout, dlse = torch.ones(4, H, D_V), torch.ones(H, 4)
    *_, dsinks = run_kernels(q, k, v, options, dout, dlse, False)
    assert dsinks.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("page_size", [5, 16])
def test_pages(page_size):
    starts = [torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 22], [0, 37, 40])]
    max_pages = -(-N // page_size)
    table = torch.randperm(2 * max_pages).int().reshape(2, max_pages)
    q = tensor("q", 22, H, D)
    k = tensor("k", 2 * max_pages, page_size, H_KV, D)
    v = tensor("v", 2 * max_pages, page_size, H_KV, D_V)
    options = Options(
        window_right=0, scale=D**-0.5, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1],
        block_table=table, max_seqlen_q=M, max_seqlen_k=N,
    )  # fmt: skip
    with poison_new_allocations():
        actual = forward.attention(q, k, v, options)
    same = reference.attention_with(q, k, v, options)
    exact = reference.attention_with(q.double(), k.double(), v.double(), options)
    for name, x, y, z in zip(NAMES, actual, same, exact, strict=False):
        assert_within_budget(x, y, z, name=name, factor=4.0)
