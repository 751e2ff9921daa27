"""The Triton kernels in the interpreter, on tiles small enough for it, against float64."""

from __future__ import annotations

import pytest
import torch

from attn_core.testing import assert_within_budget, embedded, poison_new_allocations, random_tensor
from attn_core.tuning import TileConfig
from attn_flash import reference
from attn_flash.options import Options

from ..cases import CAUSAL, OPEN, Case, random_like, show_dtype, show_window

pytest.importorskip("triton")

from attn_flash._triton import backward, configs, forward

pytestmark = pytest.mark.interpret

WINDOWS = [OPEN, CAUSAL, (3, 0), (20, -1), (-1, 5), (7, 3), (33, 18)]
DTYPES = [torch.float32, torch.float16]
# In float32 both errors are a few roundings, added up in another order: the largest is luck.
FACTORS = {torch.float32: 4.0, torch.float16: 2.0}
NAMES = ("out", "lse", "dq", "dk", "dv")
BLOCK = 16


SMALL = Case(1, 2, 1, 19, 37, 8)
SQUARE = Case(2, 2, 2, 35, 35, 8)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 by 16, so that few tokens make several blocks."""
    use_tiles(monkeypatch, TileConfig(BLOCK, BLOCK))


def use_tiles(monkeypatch, config):
    monkeypatch.setattr(configs, "tiles", lambda table, q, size, window: config)


def show_tiles(config):
    return f"tiles{config.block_m}x{config.block_n}"


def attend(q, k, v, window, scale, dout, dlse):
    """Outputs and gradients of the kernels, which find nothing but NaN in fresh memory."""
    options = Options(scale=scale, window_left=window[0], window_right=window[1])
    with poison_new_allocations():
        out, lse = forward.attention(q, k, v, options)
        *grads, dbias, dsinks = backward.attention_backward(
            dout, dlse, q, k, v, out, lse, False, options
        )
    assert dbias is None
    assert dsinks is None
    return dict(zip(NAMES, (out, lse, *grads), strict=True))


def plain(q, k, v, window, scale, dout, dlse):
    """The same of the reference."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = reference.attention(q, k, v, scale, window)
    outputs, douts = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs, douts = [out, lse], [*douts, dlse.to(lse.dtype)]
    grads = torch.autograd.grad(outputs, (q, k, v), douts)
    return dict(zip(NAMES, (out, lse, *grads), strict=True))


def run(q, k, v, window=OPEN, *, scale=None, with_dlse=False, dout=None):
    """Results of the kernels, and of the reference in the same dtype and in float64."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dout = random_like(q, "dout") if dout is None else dout
    B, M, H, _ = q.shape
    dlse = random_tensor((B, H, M), seed="dlse") if with_dlse else None
    problem = (window, scale, dout, dlse)
    actual = attend(q, k, v, *problem)
    exact = plain(q.double(), k.double(), v.double(), *problem)
    return actual, plain(q, k, v, *problem), exact


def check(q, k, v, window=OPEN, **options):
    actual, same_dtype, exact = run(q, k, v, window, **options)
    assert actual["lse"].dtype == torch.float32
    for name in NAMES:
        assert name == "lse" or actual[name].dtype == q.dtype
        assert_within_budget(
            actual[name], same_dtype[name], exact[name], name=name, factor=FACTORS[q.dtype]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=show_dtype)
@pytest.mark.parametrize("window", WINDOWS, ids=show_window)
@pytest.mark.parametrize("case", [SMALL, Case(1, 2, 2, 47, 30, 16)], ids=str)
def test_outputs_and_gradients(case, window, dtype):
    check(*case.inputs(dtype), window)


LENGTHS = [
    (1, BLOCK - 1),
    (BLOCK - 1, BLOCK),
    (BLOCK, BLOCK),
    (BLOCK, BLOCK + 1),
    (BLOCK + 1, BLOCK + 1),
    (31, 7),
    (2, 53),
    (53, 2),
    (3 * BLOCK, 2 * BLOCK),
]


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (5, 4)], ids=show_window)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "m{}-n{}".format(*lengths))
def test_lengths(lengths, window):
    check(*Case(1, 1, 1, *lengths, 16).inputs(), window)


@pytest.mark.parametrize("dtype", DTYPES, ids=show_dtype)
@pytest.mark.parametrize("lengths, window", [((1, 1), OPEN), ((18, 1), OPEN), ((18, 19), (0, 0))])
def test_one_key(lengths, window, dtype):
    # Its weight is 1, so dq and dk are 0 but for rounding, of which PyTorch happens to have none.
    actual, _, exact = run(*Case(1, 2, 1, *lengths, 8).inputs(dtype), window)
    for name in NAMES:
        torch.testing.assert_close(actual[name], exact[name].to(actual[name].dtype))


@pytest.mark.parametrize("D", [1, 8, 16, 24, 33, 64])
@pytest.mark.parametrize("window", [OPEN, (9, 0)], ids=show_window)
def test_head_dims(window, D):
    check(*Case(1, 1, 1, 20, 21, D).inputs(), window)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 2), (3, 1)], ids=str)
def test_heads_that_share_keys(heads):
    check(*Case(2, *heads, 17, 18, 8).inputs(), CAUSAL)


@pytest.mark.parametrize(
    "config", [(16, 32), (32, 16), (64, 64)], ids=lambda t: show_tiles(TileConfig(*t))
)
@pytest.mark.parametrize("window", [OPEN, CAUSAL, (4, 2)], ids=show_window)
@pytest.mark.parametrize(
    "lengths", [(37, 83), (67, 65)], ids=lambda lengths: "m{}-n{}".format(*lengths)
)
def test_tiles(lengths, window, config, monkeypatch):
    use_tiles(monkeypatch, TileConfig(*config))
    check(*Case(1, 1, 1, *lengths, 16).inputs(), window)


def test_default_tiles(monkeypatch):
    monkeypatch.setattr(configs, "tiles", lambda table, q, size, window: table.default)
    check(*Case(1, 2, 1, 70, 75, 16).inputs(), CAUSAL)


@pytest.mark.parametrize("length", [1023, 1025])
def test_where_tails_end(length, monkeypatch):
    use_tiles(monkeypatch, TileConfig(64, 64))
    check(*Case(1, 1, 1, 3, length, 16).inputs())
    check(*Case(1, 1, 1, length, 3, 16).inputs())


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 1, 0, 3), (3, 0, 1, 2), (0, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("window", [OPEN, (7, 3)], ids=show_window)
def test_any_strides_and_nothing_beside_the_tensors(order, window):
    q, k, v = (embedded(x, order=order) for x in SQUARE.inputs())
    dout = embedded(random_like(q, "dout"), order=order)
    check(q, k, v, window, dout=dout)


def test_heads_before_the_sequence():
    q, k, v = (embedded(x.transpose(1, 2)).transpose(1, 2) for x in SMALL.inputs())
    check(q, k, v, CAUSAL)


def test_packed():
    check(*embedded(random_tensor((2, 19, 3, 2, 8), seed=0)).unbind(2), CAUSAL)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_broadcast(dim):
    q, k, v = SQUARE.inputs()
    k, v, dout = (x.narrow(dim, 0, 1).expand_as(x) for x in (k, v, random_like(q, "dout")))
    check(q, k, v, CAUSAL, dout=dout)


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (7, 3)], ids=show_window)
@pytest.mark.parametrize("dtype", DTYPES, ids=show_dtype)
def test_gradients_through_lse(dtype, window):
    check(*SMALL.inputs(dtype), window, with_dlse=True)


@pytest.mark.parametrize("order", [(2, 1, 0), (0, 2, 1)], ids=str)
def test_gradient_of_lse_has_any_strides(order):
    q, k, v = SMALL.inputs()
    scale = 0.3
    dout, dlse = random_like(q, "dout"), random_tensor((1, 2, 19), seed="dlse")
    expected = attend(q, k, v, CAUSAL, scale, dout, dlse)
    actual = attend(q, k, v, CAUSAL, scale, dout, embedded(dlse, order=order))
    for name in NAMES:
        assert torch.equal(actual[name], expected[name])


@pytest.mark.parametrize("scale", [-1.0, -0.1, 0.0, 3.0])
@pytest.mark.parametrize("window", [OPEN, (7, 3)], ids=show_window)
def test_softmax_scale(window, scale):
    check(*SMALL.inputs(), window, scale=scale)


@pytest.mark.parametrize("window", [OPEN, CAUSAL], ids=show_window)
@pytest.mark.parametrize("dtype", DTYPES, ids=show_dtype)
def test_large_scores(dtype, window):
    check(*SMALL.inputs(dtype, scale=10.0), window)


@pytest.mark.parametrize("case", [Case(1, 2, 1, 50, 20, 8), Case(1, 1, 1, 17, 1, 8)], ids=str)
def test_queries_without_keys(case):
    q, k, v = case.inputs()
    without_keys = case.M - case.N
    results, _, _ = run(q, k, v, CAUSAL, with_dlse=True)
    assert results["out"][:, :without_keys].eq(0).all()
    assert results["lse"][..., :without_keys].eq(-torch.inf).all()
    assert results["dq"][:, :without_keys].eq(0).all()
    for grad in ("dk", "dv"):
        assert results[grad].isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("window", [OPEN, CAUSAL, (2, 2)], ids=show_window)
def test_empty(window, sizes):
    B, M, N = sizes
    q, k, v = Case(B, 2, 1, M, N, 8).inputs()
    results, _, _ = run(q, k, v, window)
    assert [results[name].shape for name in ("out", "dq", "dk", "dv")] == [
        q.shape, q.shape, k.shape, v.shape,
    ]  # fmt: skip
    assert results["lse"].shape == (B, 2, M)
    assert results["lse"].eq(-torch.inf).all()
    for name in ("out", "dq", "dk", "dv"):
        assert results[name].eq(0).all()


def test_order_of_keys_means_nothing():
    q, k, v = SMALL.inputs()
    dout, order = random_like(q, "dout"), torch.randperm(SMALL.N)
    expected = attend(q, k, v, OPEN, 0.3, dout, None)
    actual = attend(q, k[:, order], v[:, order], OPEN, 0.3, dout, None)
    for name in NAMES:
        restored = expected[name][:, order] if name in ("dk", "dv") else expected[name]
        torch.testing.assert_close(actual[name], restored, atol=1e-5, rtol=1e-5)


def test_causal_queries_do_not_depend_on_later_keys():
    q, k, v = SQUARE.inputs()
    now = 21
    dout = random_like(q, "dout")
    dout[:, now:] = 0
    expected = attend(q, k, v, CAUSAL, 0.3, dout, None)
    k[:, now:], v[:, now:] = 50 * k[:, now:], -v[:, now:]
    actual = attend(q, k, v, CAUSAL, 0.3, dout, None)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(actual[name][:, :now], expected[name][:, :now])
    assert torch.equal(actual["lse"][..., :now], expected["lse"][..., :now])


@pytest.mark.parametrize("window", [OPEN, CAUSAL], ids=show_window)
def test_one_batch_element_alone(window):
    q, k, v = Case(3, 2, 1, 19, 21, 8).inputs()
    dout = random_like(q, "dout")
    together = attend(q, k, v, window, 0.3, dout, None)
    alone = attend(q[1:2], k[1:2], v[1:2], window, 0.3, dout[1:2], None)
    for name in NAMES:
        assert torch.equal(alone[name], together[name][1:2])


@pytest.mark.parametrize("window", [OPEN, CAUSAL, (7, 3)], ids=show_window)
def test_order_of_tiles_changes_no_bit(window, monkeypatch):
    monkeypatch.setattr(forward.problem, "heads_per_group", lambda tensor, length: 10**6)
    q, k, v = SQUARE.inputs()
    dout = random_like(q, "dout")
    expected = attend(q, k, v, window, 0.3, dout, None)
    monkeypatch.setattr(forward.problem, "heads_per_group", lambda tensor, length: 3)
    actual = attend(q, k, v, window, 0.3, dout, None)
    for name in NAMES:
        assert torch.equal(actual[name], expected[name])
