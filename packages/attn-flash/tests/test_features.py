"""Everything beside a scale and a window: score terms, dropout, ragged sequences."""

from __future__ import annotations

import math

import pytest
import torch

from attn_core.dropout import keep_mask
from attn_core.testing import random_tensor
from attn_flash import (
    dropout_mask,
    flash_attention,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    merge_attention_states,
    ops,
    reference,
    sdpa_triton_fa,
)
from attn_flash.options import Options

B, H, H_KV, M, N, D, D_V = 2, 4, 2, 5, 7, 4, 3
STATE = torch.tensor([1234567890123, 5])
FORWARD = torch.ops.attn_flash.attention.default
BACKWARD = torch.ops.attn_flash.attention_backward.default


def tensor(name, *shape, dtype=torch.float64):
    return random_tensor(shape, seed=name, dtype=dtype)


def seen(name, *shape):
    return tensor(name, *shape) > -0.5


FEATURES = {
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.linspace(0.1, 1.0, H)},
    "alibi-batch": {"alibi_slopes": torch.linspace(0.1, 1.0, B * H).reshape(B, H)},
    "bias": {"attn_bias": tensor("bias", B, H, M, N)},
    "bias-of-heads": {"attn_bias": tensor("bias", H, M, N)},
    "bias-of-keys": {"attn_bias": tensor("bias", B, 1, 1, N)},
    "bias-of-queries": {"attn_bias": tensor("bias", 1, H, M, 1)},
    "bias-float32": {"attn_bias": tensor("bias", 1, 1, M, N, dtype=torch.float32)},
    "bool-bias": {"attn_bias": seen("bias", B, 1, M, N)},
    "key-mask": {"key_mask": seen("mask", B, N)},
    "added-key-mask": {"key_mask": tensor("mask", B, N)},
    "sinks": {"sinks": tensor("sinks", H)},
    "dropout": {"dropout_p": 0.3, "rng_state": STATE},
    "everything": {
        "softcap": 2.0,
        "alibi_slopes": torch.linspace(0.1, 1.0, B * H).reshape(B, H),
        "attn_bias": tensor("bias", B, 1, M, N),
        "key_mask": seen("mask", B, N),
        "sinks": tensor("sinks", H),
        "dropout_p": 0.3,
        "rng_state": STATE,
    },
}
WINDOWS = {"full": (-1, -1), "causal": (-1, 0), "window": (2, 1)}
all_features = pytest.mark.parametrize("name", FEATURES)
all_windows = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)


def qkv(dtype=torch.float64):
    return (
        tensor("q", B, M, H, D, dtype=dtype),
        tensor("k", B, N, H_KV, D, dtype=dtype),
        tensor("v", B, N, H_KV, D_V, dtype=dtype),
    )


def with_gradients(inputs, features):
    """Leaves of all that has a gradient: the tensors, and the features that use them."""
    names = [
        name
        for name in ("attn_bias", "sinks")
        if name in features and features[name].is_floating_point()
    ]
    leaves = [x.clone().requires_grad_() for x in (*inputs, *(features[name] for name in names))]
    return leaves, lambda tensors: features | dict(zip(names, tensors[3:], strict=True))


def differentiate(call, leaves):
    outputs = call(*leaves)
    douts = [random_tensor(x.shape, seed=i, dtype=x.dtype) for i, x in enumerate(outputs)]
    return *outputs, *torch.autograd.grad(outputs, leaves, douts)


@all_features
@all_windows
def test_is_the_reference(name, window):
    leaves, features = with_gradients(qkv(), FEATURES[name])

    def attend(*tensors):
        return flash_attn_func(
            *tensors[:3],
            window_size=window,
            return_attn_probs=True,
            backend="torch",
            **features(tensors),
        )[:2]

    def expect(*tensors):
        return reference.attention(*tensors[:3], D**-0.5, window, **features(tensors))

    torch.testing.assert_close(differentiate(attend, leaves), differentiate(expect, leaves))


@all_features
def test_gradgradcheck(name):
    leaves, features = with_gradients(
        (tensor("q", 2, 3, 4, 2), tensor("k", 2, 3, 2, 2), tensor("v", 2, 3, 2, 1)),
        {
            key: value[..., -3:, :3] if key == "attn_bias" else value[..., :3]
            if key == "key_mask" else value
            for key, value in FEATURES[name].items()
        },
    )  # fmt: skip

    def attend(*tensors):
        out, lse, _ = flash_attn_func(
            *tensors[:3], causal=True, return_attn_probs=True, **features(tensors)
        )
        return out, lse.masked_fill(lse == -math.inf, 0.0)  # of which there are no differences

    leaves = [x.double().detach().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, leaves, fast_mode=True)


def by_definition(q, k, v, scale, features):
    """Everything at once for one query, key and head at a time."""
    out, lse = q.new_zeros(B, M, H, D_V), q.new_full((B, H, M), -math.inf)
    keep = keep_mask((B, H, M, N), features["dropout_p"], *features["rng_state"].tolist())
    cap, p = features["softcap"], features["dropout_p"]
    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(M)):
        g = h * H_KV // H
        weights = {}
        for j in range(N):
            if not features["key_mask"][b, j]:
                continue
            score = cap * math.tanh(scale * (q[b, i, h] @ k[b, j, g]).item() / cap)
            score -= features["alibi_slopes"][b, h].item() * abs(i + N - M - j)
            weights[j] = math.exp(score + features["attn_bias"][b, 0, i, j].item())
        total = sum(weights.values()) + math.exp(features["sinks"][h].item())
        for j, weight in weights.items():
            out[b, i, h] += weight / total * keep[b, h, i, j] / (1 - p) * v[b, j, g]
        lse[b, h, i] = math.log(total)
    return out, lse


def test_reference_is_the_definition():
    features = FEATURES["everything"]
    actual = reference.attention(*qkv(), 0.7, (-1, -1), **features)
    torch.testing.assert_close(actual, by_definition(*qkv(), 0.7, features))


def test_a_sink_is_a_key_whose_value_is_zero():
    q, k, v = qkv()
    sinks = torch.zeros(H, dtype=torch.float64)  # the score of a key of zeros
    zero = torch.zeros_like
    expected = flash_attn_func(
        q, torch.cat([k, zero(k[:, :1])], 1), torch.cat([v, zero(v[:, :1])], 1)
    )
    torch.testing.assert_close(flash_attn_func(q, k, v, sinks=sinks), expected)


@pytest.mark.parametrize("sink", [None, 0.5], ids=["no-sink", "sink"])
def test_rows_without_keys(sink):
    leaves = [x.requires_grad_() for x in qkv()]
    sinks = None if sink is None else torch.full((H,), sink, dtype=torch.float64)
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[1] = False
    out, lse, _ = flash_attn_func(*leaves, key_mask=mask, sinks=sinks, return_attn_probs=True)
    assert not out[1].any()
    assert (lse[1] == (-math.inf if sink is None else sink)).all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()
        assert not grad[1].any()


def test_sinks_of_minus_infinity_are_none():
    leaves = [x.requires_grad_() for x in (*qkv(), torch.full((H,), -math.inf).double())]

    def attend(*tensors):
        return (
            flash_attn_func(*tensors[:3], window_size=(-1, 0), sinks=tensors[3], key_mask=mask),
        )

    mask = torch.ones(B, N, dtype=torch.bool)
    mask[1] = False
    out, *grads, dsinks = differentiate(attend, leaves)
    assert torch.equal(out, flash_attn_func(*leaves[:3], causal=True, key_mask=mask))
    assert all(grad.isfinite().all() for grad in grads)
    assert not dsinks.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_the_lowest_numbers_is_a_mean(dtype):
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv())
    bias = torch.zeros(M, N, dtype=dtype)
    bias[1] = torch.finfo(dtype).min
    out = flash_attn_func(q, k, v, attn_bias=bias)
    mean = v.float().mean(1).repeat_interleave(H // H_KV, 1)
    torch.testing.assert_close(out[:, 1].float(), mean, atol=1e-2, rtol=1e-2)
    (dv,) = torch.autograd.grad(out[:, 1].sum(), v)
    torch.testing.assert_close(dv.float(), torch.full(dv.shape, H / H_KV / N), atol=1e-2, rtol=1e-2)


def ragged(lengths_q, lengths_k, dtype=torch.float64):
    """Tensors and cumulative lengths of sequences, with a few tokens of none at the end."""
    starts = [
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    ]
    tokens_q, tokens_k = sum(lengths_q) + 2, sum(lengths_k) + 1
    tensors = (
        tensor("q", tokens_q, H, D, dtype=dtype),
        tensor("k", tokens_k, H_KV, D, dtype=dtype),
        tensor("v", tokens_k, H_KV, D_V, dtype=dtype),
    )
    return tensors, starts, max(lengths_q), max(lengths_k)


@all_features
@all_windows
def test_ragged_sequences_one_by_one(name, window):
    lengths_q, lengths_k = (M, 0, 3), (N, 2, 2)
    tensors, starts, *longest = ragged(lengths_q, lengths_k)
    features = dict(FEATURES[name])
    for key, value in features.items():
        is_batched = isinstance(value, torch.Tensor) and value.shape[0] == B
        if is_batched and key not in ("rng_state", "sinks"):
            features[key] = value[:1].expand(3, *value.shape[1:]).clone()
    leaves, use = with_gradients(tensors, features)

    def attend(*tensors):
        return flash_attn_varlen_func(
            *tensors[:3], *starts, *longest,
            window_size=window, return_attn_probs=True, **use(tensors),
        )[:2]  # fmt: skip

    def expect(*tensors):
        values = dict(use(tensors))
        bias = values.pop("attn_bias", None)
        values["attn_bias"] = None if bias is None else bias[(None,) * (4 - bias.dim())]
        options = Options(
            cu_seqlens_q=starts[0], cu_seqlens_k=starts[1],
            max_seqlen_q=longest[0], max_seqlen_k=longest[1], scale=D**-0.5,
            window_left=window[0], window_right=window[1], **values,
        )  # fmt: skip
        return reference.attention_with(*tensors[:3], options)

    actual, expected = differentiate(attend, leaves), differentiate(expect, leaves)
    torch.testing.assert_close(actual, expected)
    assert not actual[0][-2:].any()
    own = flash_attn_func(  # the first sequence alone
        *(x[None, :length] for x, length in zip(tensors, (M, N, N), strict=True)),
        window_size=window,
        **{
            key: value[:1]
            if key in ("alibi_slopes", "attn_bias", "key_mask") and value.shape[0] == 3
            else value
            for key, value in features.items()
        },
    )
    torch.testing.assert_close(actual[0][:M], own[0])


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_block_table(page_size):
    lengths_q, lengths_k = (3, 0, 5), (7, 2, 16)
    (q, k, v), starts, *longest = ragged(lengths_q, lengths_k)
    max_pages = -(-16 // page_size)
    table = torch.randperm(3 * max_pages).int().reshape(3, max_pages)
    pages = [x.new_full((3 * max_pages, page_size, *x.shape[1:]), math.nan) for x in (k, v)]
    for b, length in enumerate(lengths_k):
        for j in range(length):
            for paged, x in zip(pages, (k, v), strict=True):
                paged[table[b, j // page_size], j % page_size] = x[starts[1][b] + j]
    arguments = (*starts, *longest)
    expected = flash_attn_varlen_func(q, k, v, *arguments, causal=True)
    actual = flash_attn_varlen_func(q, *pages, *arguments, causal=True, block_table=table)
    torch.testing.assert_close(actual, expected)
    used = torch.tensor(lengths_k, dtype=torch.int32) // 2
    torch.testing.assert_close(
        flash_attn_varlen_func(q, *pages, *arguments, block_table=table, seqused_k=used),
        flash_attn_varlen_func(q, k, v, *arguments, seqused_k=used),
    )


def test_gradients_behind_a_block_table():
    tensors, starts, *longest = ragged((3, 0, 5), (7, 2, 16))
    q, k, v = (x.requires_grad_() for x in tensors)
    table = torch.tensor([[3, 0, 99, 99], [3, 99, 99, 99], [1, 2, 4, 5]], dtype=torch.int32)
    pages = [x[: 6 * 4].detach().clone().unflatten(0, (6, 4)).requires_grad_() for x in (k, v)]
    lengths = [7, 2, 16]
    rows = [
        int(table[b, j // 4]) * 4 + j % 4 for b, length in enumerate(lengths) for j in range(length)
    ]

    def attend(q, k, v):
        return flash_attn_varlen_func(
            q, k, v, *starts, *longest, causal=True, return_attn_probs=True, block_table=table
        )[:2]

    def expect(q, k, v):
        k, v = (x.flatten(0, 1)[rows] for x in (k, v))
        return flash_attn_varlen_func(
            q, k, v, *starts, *longest, causal=True, return_attn_probs=True
        )[:2]

    leaves = (q, *pages)
    torch.testing.assert_close(differentiate(attend, leaves), differentiate(expect, leaves))
    with torch.no_grad():
        torch.testing.assert_close(attend(*leaves), expect(*leaves))


def test_packed_ragged_tensors():
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = tensor("qkv", 9, 3, H, D)
    q, k, v = packed.unbind(1)
    arguments = (0.0, 0.3, True, (3, 0), 1.0)
    expected = flash_attn_varlen_func(q, k, v, starts, starts, 5, 5, *arguments)
    actual = flash_attn_varlen_qkvpacked_func(packed, starts, 5, *arguments)
    assert torch.equal(actual, expected)
    actual = flash_attn_varlen_kvpacked_func(q, packed[:, 1:], starts, starts, 5, 5, *arguments)
    assert torch.equal(actual, expected)


def test_dropout_is_repeated_by_the_seed():
    q, k, v = qkv()
    torch.manual_seed(3)
    first, second = flash_attn_func(q, k, v, 0.5), flash_attn_func(q, k, v, 0.5)
    torch.manual_seed(3)
    assert torch.equal(flash_attn_func(q, k, v, 0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_probabilities_are_negative_where_dropout_drops(causal):
    q, k, v = qkv()
    out, lse, probs = flash_attn_func(
        q, k, v, 0.3, causal=causal, return_attn_probs=True, rng_state=STATE
    )
    kept = dropout_mask((B, H, M, N), 0.3, STATE)
    assert torch.equal(probs.signbit(), ~kept)
    weights = (probs.abs() * kept / 0.7).unflatten(1, (H_KV, -1))
    torch.testing.assert_close(probs.abs().sum(-1), torch.ones_like(lse))
    expected = torch.einsum("bhgij,bjhd->bihgd", weights, v).flatten(2, 3)
    torch.testing.assert_close(out, expected)


def test_probabilities_of_ragged_sequences():
    (q, k, v), starts, *longest = ragged((M, 3), (N, 2))
    _, _, probs = flash_attn_varlen_func(
        q, k, v, *starts, *longest, 0.4, return_attn_probs=True, rng_state=STATE
    )
    assert probs.shape == (2, H, M, N)
    mask = dropout_mask((2, H, M, N), 0.4, STATE)
    assert torch.equal(probs[0].signbit(), ~mask[0])
    assert torch.equal(probs[1, :, :3, :2].signbit(), ~mask[1, :, :3, :2])
    assert not probs[1, :, 3:].any()
    assert not probs[1, :, :, 2:].any()


def test_split_keys_merge_with_gradients():
    q, k, v = (x.requires_grad_() for x in qkv())
    parts = [
        flash_attn_func(q, k[:, part], v[:, part], return_attn_probs=True)[:2]
        for part in (slice(0, 3), slice(3, None))
    ]
    merged = merge_attention_states(*parts[0], *parts[1])
    whole = flash_attn_func(q, k, v, return_attn_probs=True)[:2]
    torch.testing.assert_close(merged, whole)
    dout = random_tensor(whole[0].shape, seed=0, dtype=torch.float64)
    grads = [torch.autograd.grad(out, (q, k, v), dout) for out in (merged[0], whole[0])]
    torch.testing.assert_close(*grads)


def test_heads_first_takes_every_feature():
    q, k, v = (x.transpose(1, 2) for x in qkv())
    features = FEATURES["everything"]
    out, lse = flash_attention(q, k, v, causal=False, return_lse=True, **features)
    expected = reference.attention(*qkv(), D**-0.5, (-1, -1), **features)
    torch.testing.assert_close((out.transpose(1, 2), lse), expected)


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_sdpa_masks(kind):
    q, k, v = (tensor(name, B, H, M, D) for name in "qkv")
    mask = seen("mask", B, 1, M, M) if kind == "bool" else tensor("mask", M, M)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(sdpa_triton_fa(q, k, v, mask), expected.nan_to_num())


@all_features
def test_opcheck(name):
    leaves, features = with_gradients(qkv(torch.float32), FEATURES[name])
    values = features(leaves)
    if "attn_bias" in values:
        bias = values["attn_bias"]
        values["attn_bias"] = bias[(None,) * (4 - bias.dim())].detach()
    options = Options(scale=0.5, **{
        name: value.detach() if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    })  # fmt: skip
    tensors = [x.detach() for x in leaves[:3]]
    torch.library.opcheck(FORWARD, (*tensors, *options, "torch"))
    out, lse = ops.attention(*tensors, *options, "torch")
    bias = options.attn_bias
    needs_dbias = bias is not None and bias.is_floating_point()
    dout = random_tensor(out.shape, seed=0)
    arguments = (dout, None, *tensors, out, lse, needs_dbias, *options, "torch")
    torch.library.opcheck(BACKWARD, arguments)


def test_opcheck_ragged():
    tensors, starts, *_ = ragged((M, 3), (N, 2), dtype=torch.float32)
    options = Options(
        cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], max_seqlen_q=M, max_seqlen_k=N
    )
    inputs = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(FORWARD, (*inputs, *options, "torch"))
    lse = ops.attention(*tensors, *options, "torch")[1].detach()
    dropped = options._replace(dropout_p=0.5, rng_state=STATE)
    torch.library.opcheck(
        torch.ops.attn_flash.attention_probs.default,
        (*(x.detach() for x in tensors[:2]), lse, *dropped),
    )


def test_compile_with_everything():
    torch._dynamo.reset()
    features = FEATURES["everything"]

    def attend(q, k, v, bias, sinks):
        changes = {"attn_bias": bias, "sinks": sinks}
        return flash_attn_func(q, k, v, causal=True, **{**features, **changes})

    leaves, _ = with_gradients(qkv(), features)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    actual = differentiate(lambda *x: (compiled(*x),), leaves)
    torch.testing.assert_close(actual, differentiate(lambda *x: (attend(*x),), leaves))


def test_compile_ragged_with_dropout():
    torch._dynamo.reset()
    tensors, starts, *longest = ragged((M, 3), (N, 2))

    def attend(q, k, v, starts_q, starts_k, longest_q, longest_k):
        return flash_attn_varlen_func(
            q, k, v, starts_q, starts_k, longest_q, longest_k, 0.5, return_attn_probs=True
        )

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    out, _, probs = compiled(*tensors, *starts, *longest)
    assert out.isfinite().all()
    assert (probs < 0).any()


def test_slopes_and_dropout_are_as_precise_as_the_scores():
    q, k, v = qkv()
    slopes = FEATURES["alibi"]["alibi_slopes"]
    dropout = FEATURES["dropout"]
    out, lse, _ = flash_attn_func(
        torch.zeros_like(q), k, v, alibi_slopes=slopes, return_attn_probs=True, **dropout
    )
    distance = torch.arange(M)[:, None] + N - M - torch.arange(N)
    scores = -slopes.double()[:, None, None] * distance.abs()
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1).expand(B, H, M))
    keep = dropout_mask((B, H, M, N), **dropout)
    probs = torch.softmax(scores, -1) * keep / (1.0 - dropout["dropout_p"])
    values = v.repeat_interleave(H // H_KV, dim=2)
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", probs, values))


def test_queries_that_a_bias_hides_all_keys_from_have_gradients_zero_of_any_order():
    leaves = [x.requires_grad_() for x in qkv()]
    bias = torch.zeros(1, 1, M, N, dtype=torch.float64)
    bias[..., 2, :] = -math.inf
    bias.requires_grad_()
    out = flash_attn_func(*leaves, attn_bias=bias)
    first = torch.autograd.grad(out.square().sum(), [*leaves, bias], create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), [*leaves, bias])
    for dq, dk, dv, dbias in (first, second):
        assert not dq[:, 2].any()
        assert not dbias[..., 2, :].any()
        assert dk.isfinite().all()
        assert dv.isfinite().all()
