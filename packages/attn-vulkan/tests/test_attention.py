"""attn_vulkan.attention on numpy arrays: every feature against the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest

import attn_vulkan
from attn_core.testing import seed_from
from attn_vulkan import selftest, variants
from attn_vulkan.runtime.context import open_context

pytestmark = [pytest.mark.vulkan, pytest.mark.usefixtures("real_device")]

TOLERANCE = {"float32": 1e-5, "float16": 4e-3}
# A device made of the CPU takes seconds to compile each.
DIMS = [40, *(pytest.param(dim, marks=pytest.mark.gpu) for dim in (64, 128))]
WIDE = pytest.param(256, marks=pytest.mark.gpu)
EVERYTHING = {
    "causal": True,
    "window_size": (20, 0),
    "softcap": 2.0,
    "alibi": True,
    "bias": True,
    "sinks": True,
}


def draw(seed, shape, dtype="float32"):
    return np.random.default_rng(seed_from(seed)).standard_normal(shape).astype(dtype)


def make(name, sizes, dtype):
    batch, len_q, len_k, heads, heads_kv, dim, dim_v = sizes
    return (
        draw(f"{name}-q", (batch, len_q, heads, dim), dtype),
        draw(f"{name}-k", (batch, len_k, heads_kv, dim), dtype),
        draw(f"{name}-v", (batch, len_k, heads_kv, dim_v), dtype),
    )


def reference(q, k, v, *, scale, window=(-1, -1), softcap=0.0, bias=None, slopes=None, sinks=None):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat(group, 2), v.repeat(group, 2)
    scores = np.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    i = np.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    j = np.arange(k.shape[1])
    if slopes is not None:
        scores -= np.broadcast_to(slopes, scores.shape[:2])[..., None, None] * abs(i - j)
    if bias is not None:
        scores = scores + bias
    left, right = window
    hidden = (left >= 0) & (j < i - left) | (right >= 0) & (j > i + right)
    scores = np.where(hidden, -np.inf, scores)
    parts = scores
    if sinks is not None:
        sink = np.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        parts = np.concatenate([scores, sink], -1)
    top = np.maximum(parts.max(-1, keepdims=True, initial=-1e300), -1e300)
    with np.errstate(divide="ignore"):  # a query without keys
        lse = top + np.log(np.exp(parts - top).sum(-1, keepdims=True))
    weights = np.where(np.isfinite(lse), np.exp(scores - np.where(np.isfinite(lse), lse, 0)), 0)
    return np.einsum("bhij,bjhd->bihd", weights, v), lse[..., 0]


def check(name, sizes, dtype="float32", **options):
    q, k, v = make(name, sizes, dtype)
    batch, len_q, len_k, heads, *_ = sizes
    window = options.get("window_size", (-1, -1))
    if options.get("causal"):
        window = (window[0], 0)
    extras = {}
    if options.pop("bias", False):
        extras["bias"] = draw(f"{name}-bias", (1, heads, len_q, len_k), dtype)
    if options.pop("alibi", False):
        extras["alibi_slopes"] = abs(draw(f"{name}-slopes", (batch, heads))) / 8
    if options.pop("sinks", False):
        extras["sinks"] = draw(f"{name}-sinks", (heads,))
    out, lse = attn_vulkan.attention(q, k, v, **options, **extras, return_lse=True)
    expected, expected_lse = reference(
        q,
        k,
        v,
        scale=sizes[5] ** -0.5,
        window=window,
        softcap=options.get("softcap", 0.0),
        bias=extras.get("bias"),
        slopes=extras.get("alibi_slopes"),
        sinks=extras.get("sinks"),
    )
    assert out.dtype == q.dtype
    np.testing.assert_allclose(out, expected, atol=TOLERANCE[dtype], rtol=0)
    np.testing.assert_allclose(lse, expected_lse, atol=TOLERANCE[dtype], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (9, 3)},
        {"softcap": 1.5},
        {"alibi": True},
        {"bias": True},
        {"sinks": True},
        EVERYTHING,
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_features(options, dtype):
    check("features", (2, 33, 70, 4, 2, 32, 32), dtype, **options)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1, 1, 1),
        (1, 7, 9, 6, 2, 5, 11),
        (1, 65, 31, 2, 1, 72, 40),
        (1, 9, 17, 2, 2, 256, 256),
        (3, 1, 600, 8, 2, 64, 64),
    ],
    ids="b{0[0]}-m{0[1]}-n{0[2]}-h{0[3]}-kv{0[4]}-d{0[5]}-dv{0[6]}".format,
)
def test_sizes(sizes):
    check("sizes", sizes, causal=True)


def use(monkeypatch, variant, dtype):
    """Fix the variant, or skip where the device has it not."""
    context = open_context()
    runnable = variants.available(context.device, dtype)
    if variant not in [name for name in runnable if context.trusts(name, dtype)]:
        pytest.skip(f"{context.device.name} has no variant {variant} for {dtype}")
    monkeypatch.setenv("ATTN_VULKAN_VARIANT", variant)


@pytest.mark.parametrize("dim", [*DIMS, WIDE])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, EVERYTHING], ids=["plain", "causal", "everything"]
)
@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_variants(monkeypatch, variant, options, dim):
    use(monkeypatch, variant, "float16")
    check("variants", (1, 140, 270, 4, 2, dim, dim), "float16", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (90, 40)},
        {"window_size": (3, -1)},
        {"sinks": True, "causal": True},
        EVERYTHING,
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("variant", ["matrix", "matrix2"])
def test_the_largest_tiles(monkeypatch, variant, options, dim):
    """More than one tile of rows, the last of which is not full, and many of keys."""
    use(monkeypatch, variant, "float16")
    check("large", (2, 300, 333, 4, 2, dim, dim), "float16", **options)
    check("long", (1, 530, 1100, 1, 1, dim, dim), "float16", **options)
    check("short", (1, 513, 200, 1, 1, dim, dim), "float16", **options)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_scores_that_grow_along_the_keys(monkeypatch, variant, causal, dim):
    """The pivot of softmax has to follow; some rows see the largest score first."""
    use(monkeypatch, variant, "float16")
    q, k, v = make("grow", (1, 300, 400, 2, 1, dim, dim), "float16")
    k *= np.linspace(0.1, 8, 400, dtype=np.float16)[:, None, None]
    k[:, 7] *= 60
    out, lse = attn_vulkan.attention(q, k, v, causal=causal, return_lse=True)
    window = (-1, 0 if causal else -1)
    expected, expected_lse = reference(q, k, v, scale=dim**-0.5, window=window)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE["float16"], rtol=0)
    np.testing.assert_allclose(lse, expected_lse, atol=TOLERANCE["float16"], rtol=1e-6)


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_a_scale_near_zero_gives_the_mean_of_what_is_visible(monkeypatch, variant):
    use(monkeypatch, variant, "float16")
    q, k, v = make("scale", (1, 70, 130, 2, 1, 64, 64), "float16")
    out, lse = attn_vulkan.attention(q, k, v, softmax_scale=1e-30, causal=True, return_lse=True)
    expected, expected_lse = reference(q, k, v, scale=1e-30, window=(-1, 0))
    np.testing.assert_allclose(out, expected, atol=TOLERANCE["float16"], rtol=0)
    np.testing.assert_allclose(lse, expected_lse, atol=TOLERANCE["float16"], rtol=1e-6)


@pytest.mark.parametrize("variant", ["matrix", "subgroup", "scalar"])
def test_split_keys_and_packed_heads(monkeypatch, variant):
    use(monkeypatch, variant, "float16")
    check("split", (1, 2, 1100, 8, 2, 64, 64), "float16", **EVERYTHING)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 1, 3000, 8, 1, 128, 128),
        (1, 4, 900, 16, 4, 64, 32),
        (1, 2, 1100, 4, 4, 72, 40),
        (1, 3, 1100, 5, 1, 33, 65),
        (1, 1, 1100, 8, 2, 256, 256),
        (1, 16, 40, 1, 1, 128, 128),
    ],
    ids="b{0[0]}-m{0[1]}-n{0[2]}-h{0[3]}-kv{0[4]}-d{0[5]}-dv{0[6]}".format,
)
def test_subgroups_that_share_rows(monkeypatch, sizes, options):
    use(monkeypatch, "matrix", "float16")
    check("decoding", sizes, "float16", **options)


@pytest.mark.parametrize("dim", [32, *(pytest.param(d, marks=pytest.mark.gpu) for d in (64, 128))])
def test_rows_that_are_read_through_the_cache(monkeypatch, dim):
    monkeypatch.setattr(variants, "_caches_rows", lambda *_: True)
    q, k, v = make("cached", (1, 150, 170, 2, 1, dim, dim), "float32")
    dout = draw("cached-dout", q.shape)
    out, lse = attn_vulkan.attention(q, k, v, causal=True, return_lse=True)
    grads = attn_vulkan.attention_backward(dout, q, k, v, out, lse, causal=True)
    wide = [x.astype(np.float64) for x in (q, k, v, dout)]
    for found, expected in zip(
        (out, lse, *grads), selftest._reference(*wide, causal=True), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=5e-6, rtol=0)


@pytest.mark.gpu
def test_gradients_of_matrices_stop_at_128(monkeypatch):
    use(monkeypatch, "matrix", "float16")
    q, k, v = make("wide", (1, 20, 20, 1, 1, 144, 144), "float16")
    out, lse = attn_vulkan.attention(q, k, v, return_lse=True)
    with pytest.raises(ValueError, match="ATTN_VULKAN_VARIANT must be one of subgroup, scalar"):
        attn_vulkan.attention_backward(q, q, k, v, out, lse)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("variant", ["matrix", "subgroup", "scalar"])
def test_gradients_of_variants(monkeypatch, variant, causal, dim):
    use(monkeypatch, variant, "float16")
    q, k, v = make("grads", (1, 70, 90, 4, 2, dim, dim), "float16")
    dout = draw("grads-dout", q.shape, "float16")
    out, lse = attn_vulkan.attention(q, k, v, causal=causal, return_lse=True)
    grads = attn_vulkan.attention_backward(dout, q, k, v, out, lse, causal=causal)
    wide = [x.astype(np.float64) for x in (q, k, v, dout)]
    for grad, expected in zip(grads, selftest._reference(*wide, causal=causal)[2:], strict=True):
        np.testing.assert_allclose(grad, expected, atol=1e-2, rtol=0)


def test_strides():
    q, k, v = make("strides", (2, 17, 33, 4, 2, 24, 24), "float32")
    wide = np.full((2, 4, 17, 51), np.nan, np.float32)
    strided = wide[:, :, :, 1:49:2].transpose(0, 2, 1, 3)
    strided[:] = q
    np.testing.assert_array_equal(
        attn_vulkan.attention(strided, k, v), attn_vulkan.attention(q, k, v)
    )


def test_a_negative_stride_of_one_element_counts_for_nothing():
    q, k, v = make("single", (1, 20, 30, 2, 1, 16, 16), "float32")
    expected = attn_vulkan.attention(q, k, v)
    out = attn_vulkan.attention(q[::-1], k[:, :, ::-1], v[::-1])
    np.testing.assert_array_equal(out, expected)


def test_keys_that_are_hidden_change_nothing():
    q, k, v = make("hidden", (1, 40, 40, 2, 2, 32, 32), "float32")
    expected = attn_vulkan.attention(q, k, v, window_size=(5, 0))[:, :20]
    k[:, 20:] = v[:, 20:] = 1e20
    out = attn_vulkan.attention(q, k, v, window_size=(5, 0))
    np.testing.assert_array_equal(out[:, :20], expected)


def test_a_query_without_keys():
    q, k, v = make("empty", (1, 5, 3, 1, 1, 8, 8), "float32")
    out, lse = attn_vulkan.attention(q, k, v, causal=True, return_lse=True)
    assert not out[:, :2].any()
    assert np.isneginf(lse[..., :2]).all()
    assert np.isfinite(lse[..., 2:]).all()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"k": (1, 9, 2, 16)}, r"k must have shape \(B, N, H_KV, D\) = \(1, 9, 2, 32\), got"),
        ({"q": (1, 5, 3, 32)}, "the number of heads of q must be a multiple of that of k and v"),
        ({"v": (9, 2, 32)}, r"v must be an array of 4 dimensions"),
        ({"softcap": -1.0}, "softcap must be a finite number, 0 or more, got -1.0"),
        ({"softmax_scale": np.inf}, "softmax_scale must be a finite number or None, got inf"),
        ({"window_size": (1,)}, "window_size must be two integers"),
        ({"window_size": 3}, "window_size must be two integers"),
        ({"softcap": "x"}, "softcap must be a finite number, 0 or more, got 'x'"),
        ({"causal": "no"}, "causal must be True or False, got 'no'"),
        ({"bias": 1.0}, "bias must be an array, got float"),
        ({"sinks": np.zeros(3, np.float32)}, r"sinks must have a shape that broadcasts to \(4,\)"),
        ({"bias": np.zeros((1, 1))}, "bias must have dtype float32, got float64"),
        ({"device": "0"}, "device must be an integer or None, got '0'"),
        ({"device": True}, "device must be an integer or None, got True"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors(change, message):
    shapes = {"q": (1, 5, 4, 32), "k": (1, 9, 2, 32), "v": (1, 9, 2, 32)}
    options = {name: value for name, value in change.items() if name not in shapes}
    shapes |= {name: shape for name, shape in change.items() if name in shapes}
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        attn_vulkan.attention(**arrays, **options)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_numbers_that_the_device_would_misread(name):
    arrays = {n: np.zeros((1, 4, 2, 8), np.float32) for n in "qkv"}
    packed = np.zeros((1, 4, 2, 8), [("x", "f4"), ("tag", "u1")])
    for misread in (arrays[name].astype(">f4"), packed["x"]):
        with pytest.raises(ValueError, match=f"{name} must be aligned and of the machine's byte"):
            attn_vulkan.attention(**arrays | {name: misread})
    with pytest.raises(ValueError, match=f"the strides of {name} must not be negative"):
        attn_vulkan.attention(**arrays | {name: arrays[name][:, ::-1]})
    with pytest.raises(ValueError, match=f"{name} must be an array of 4 dim.*, got NoneType"):
        attn_vulkan.attention(**arrays | {name: None})


def test_an_unknown_variant(monkeypatch):
    monkeypatch.setenv("ATTN_VULKAN_VARIANT", "warp")
    q = np.zeros((1, 2, 1, 8), np.float32)
    with pytest.raises(ValueError, match="ATTN_VULKAN_VARIANT must be one of .*scalar, got 'warp'"):
        attn_vulkan.attention(q, q, q)


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0, "bias": True}], ids=str)
def test_gradients_are_those_of_finite_differences(options):
    q, k, v = make("grad", (1, 5, 7, 4, 2, 8, 8), "float32")
    bias = draw("grad-bias", (4, 5, 7)) if options.pop("bias", False) else None
    dout = draw("grad-dout", (1, 5, 4, 8))
    out, lse = attn_vulkan.attention(q, k, v, bias=bias, return_lse=True, **options)
    grads = attn_vulkan.attention_backward(dout, q, k, v, out, lse, bias=bias, **options)
    window = (-1, 0) if options.get("causal") else (-1, -1)

    def loss(*inputs):
        result, _ = reference(
            *inputs, scale=8**-0.5, window=window, softcap=options.get("softcap", 0.0), bias=bias
        )
        return (result * dout).sum()

    for position, grad in enumerate(grads):
        direction = draw(f"grad-{position}", grad.shape).astype(np.float64)
        moved = []
        for step in (1e-4, -1e-4):
            inputs = [x.astype(np.float64) for x in (q, k, v)]
            inputs[position] = inputs[position] + step * direction
            moved.append(loss(*inputs))
        assert (grad * direction).sum() == pytest.approx((moved[0] - moved[1]) / 2e-4, rel=1e-3)
