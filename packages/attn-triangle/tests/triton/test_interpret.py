"""The Triton kernels in the interpreter, on tiles small enough for it, against float64."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch

from attn_core.testing import assert_within_budget, embedded, poison_new_allocations, random_tensor
from attn_core.tuning import TileConfig
from attn_triangle import reference

pytest.importorskip("triton")

from attn_triangle._triton import backward, configs, dbias, forward, problem, short

pytestmark = pytest.mark.interpret

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias", "dmask")
BLOCK = 16


class Case(NamedTuple):
    """One problem; `mask` is none, random, rows (some masked as a whole), padded, added or all."""

    B: int = 1
    H: int = 1
    R: int = 3
    M: int = 19
    N: int = 21
    D: int = 8
    mask: str = "random"
    masked_rows: str = "mean"
    dtype: torch.dtype = torch.float32

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"b{self.B}-h{self.H}-r{self.R}-m{self.M}-n{self.N}-d{self.D}-{dtype}-{self.mask}"
            f"-{self.masked_rows}"
        )

    def draw(self, name, *shape, dtype=None):
        return random_tensor(shape, seed=f"{self}-{name}", dtype=dtype or self.dtype)

    def inputs(self):
        B, H, R, M, N, D = self[:6]
        q, k, v = (self.draw(name, B, H, R, n, D) for name, n in (("q", M), ("k", N), ("v", N)))
        return [q, k, v, self.draw("bias", B, H, M, N)]

    def make_mask(self):
        shape = (self.B, self.R, self.N)
        if self.mask == "none":
            return None
        if self.mask == "padded":
            return (torch.arange(self.N) >= self.N - BLOCK - 2).expand(shape)
        if self.mask == "added":
            added = self.draw("mask", *shape)
            added[:, 1, BLOCK:] -= 1e9
            added[:, 0, 3] = -torch.inf
            return added
        if self.mask == "all":
            return torch.ones(shape, dtype=torch.bool)
        mask = self.draw("mask", *shape) > 0
        if self.mask == "rows":
            mask[:, ::2] = True
        return mask


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 by 16, so that few tokens make several blocks, and no row is a short one."""
    use_tiles(monkeypatch, TileConfig(BLOCK, BLOCK))
    monkeypatch.setattr(short, "LONGEST", 0)


def use_tiles(monkeypatch, config, rows=2):
    monkeypatch.setattr(configs, "tiles", lambda *_: config)
    monkeypatch.setattr(problem, "rows_per_program", lambda q: min(rows, q.shape[2]))


def attend(inputs, mask, scale, masked_rows, dout, dlse):
    """Results and gradients of the kernels, which find nothing but NaN in fresh memory."""
    with poison_new_allocations():
        out, lse = forward.attention(*inputs, mask, scale, masked_rows)
        grads = backward.attention_backward(
            dout, dlse, *inputs, mask, out, lse, scale, masked_rows, wanted_of(mask), True
        )
    return dict(zip(NAMES, (out, lse, *grads), strict=False))


def is_additive(mask):
    return mask is not None and mask.dtype != torch.bool


def wanted_of(mask):
    return "dq dk_dv dbias" + (" dmask" if is_additive(mask) else "")


def plain(inputs, mask, scale, masked_rows, dout, dlse):
    """The same of the reference."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    if is_additive(mask):
        mask = mask.detach().to(inputs[0].dtype).requires_grad_()
        leaves.append(mask)
    out, lse = reference.attention(*leaves[:4], mask, scale, masked_rows)
    outputs, douts = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs, douts = [out, lse], [*douts, dlse.to(lse.dtype)]
    grads = torch.autograd.grad(outputs, leaves, douts)
    return dict(zip(NAMES, (out, lse, *grads), strict=False))


def check(case, inputs=None, mask=None, *, scale=None, with_dlse=False, dout=None):
    inputs = case.inputs() if inputs is None else inputs
    mask = case.make_mask() if mask is None else mask
    q = inputs[0]
    scale = case.D**-0.5 if scale is None else scale
    dout = case.draw("dout", *q.shape) if dout is None else dout
    dlse = case.draw("dlse", *q.shape[:-1], dtype=torch.float32) if with_dlse else None
    arguments = (mask, scale, case.masked_rows, dout, dlse)
    actual = attend(inputs, *arguments)
    same_dtype = plain(inputs, *arguments)
    exact = plain([x.double() for x in inputs], *arguments)
    # In float32 both errors are a few roundings, added up in another order: the largest is luck.
    factor = 4.0 if case.dtype == torch.float32 else 2.0
    for name in exact:
        wanted = {"lse": torch.float32, "dbias": inputs[3].dtype}.get(name, case.dtype)
        assert actual[name].dtype == wanted
        assert_within_budget(actual[name], same_dtype[name], exact[name], name=name, factor=factor)
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("masked_rows", ["mean", "zero"])
@pytest.mark.parametrize("mask", ["none", "random", "rows", "added"])
def test_results_and_gradients(mask, masked_rows, dtype):
    check(Case(H=2, mask=mask, masked_rows=masked_rows, dtype=dtype), with_dlse=True)


SHORT = [
    Case(H=2, M=70, N=90, mask="rows", dtype=torch.float16),
    Case(B=2, R=5, M=128, N=64, D=16, mask="none", dtype=torch.float16),
    Case(R=2, M=33, N=128, D=24, masked_rows="zero", mask="rows", dtype=torch.float16),
    Case(R=1, M=1, N=65, D=32, mask="padded", dtype=torch.float16),
    Case(R=12, M=64, N=64, D=32, mask="none", dtype=torch.float16),  # sums in dk and dv
    Case(R=7, M=3, N=5, D=9, dtype=torch.float16),  # there too, in an odd number of 16 bits
]


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_short_rows(case, monkeypatch):
    # Programs of a few rows, the last of fewer.
    info = dataclasses.replace(short.device_info("cpu"), num_sms=4)
    monkeypatch.setattr(short, "device_info", lambda device: info)
    monkeypatch.setattr(short, "LONGEST", 128)
    inputs = case.inputs()
    inputs[3][:, :, -1] = -torch.inf  # a query without keys
    check(case, inputs, with_dlse=True)


def test_gradients_of_short_rows_are_allocated_once(monkeypatch):
    case = SHORT[-1]
    q = case.inputs()[0]
    monkeypatch.setattr(short, "LONGEST", 128)
    monkeypatch.setattr(short, "short_backward", lambda *_: "all gradients")
    monkeypatch.setattr(backward, "new_heads_last", lambda _: pytest.fail("allocated before"))
    arguments = (q, None, q, q, q, q, None, q, q, 1.0, "mean", "dq dk_dv dbias", True)
    assert backward.attention_backward(*arguments) == "all gradients"


LENGTHS = [(1, 2), (15, 16), (16, 17), (16, 16), (31, 7), (2, 35), (35, 2)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "m{}-n{}".format(*lengths))
def test_lengths(lengths):
    M, N = lengths
    check(Case(R=1, M=M, N=N, mask="none"))


def test_one_key():
    # Its weight is 1, so dq, dk and dbias are 0 but for rounding, of which PyTorch has none.
    case = Case(M=3, N=1, mask="none")
    arguments = (None, 0.5, "mean", case.draw("dout", 1, 1, 3, 3, 8), None)
    actual = attend(case.inputs(), *arguments)
    expected = plain(case.inputs(), *arguments)
    for name in NAMES[:-1]:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("D", [1, 16, 24, 33])
def test_head_dims(D):
    check(Case(R=2, M=17, N=18, D=D))


@pytest.mark.parametrize("R", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_that_share_a_program(rows, R, monkeypatch):
    use_tiles(monkeypatch, TileConfig(BLOCK, BLOCK), rows)
    check(Case(B=2, R=R, M=5, N=18, mask="rows"))


@pytest.mark.parametrize("mask", ["padded", "all"])
def test_blocks_of_masked_keys(mask):
    check(Case(R=2, M=18, N=50, mask=mask))


def test_keys_beyond_the_visible_ones_are_not_read():
    case = Case(R=2, M=4, N=50, mask="padded", masked_rows="zero")
    q, k, v, bias = case.inputs()
    mask = case.make_mask()
    first_hidden_block = 48
    for x in (k, v):
        x[:, :, :, first_hidden_block:] = torch.nan
    out, lse = forward.attention(q, k, v, bias, mask, 1.0, "zero")
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("config", [(16, 32), (32, 16)], ids=lambda c: "tiles{}x{}".format(*c))
def test_tiles(config, monkeypatch):
    use_tiles(monkeypatch, TileConfig(*config))
    check(Case(M=37, N=67))


@pytest.mark.parametrize("shape", [(1, 1, 19, 21), (2, 1, 1, 21), (1, 2, 19, 1)], ids=str)
def test_bias_is_broadcast_and_its_gradient_reduced(shape):
    case = Case(B=2, H=2)
    q, k, v, _ = case.inputs()
    bias = case.draw("small bias", *shape)
    actual = check(case, [q, k, v, bias])
    assert actual["dbias"].shape == shape


@pytest.mark.parametrize("shape", [(1, 3, 21), (2, 1, 21), (2, 3, 1)], ids=str)
def test_mask_is_broadcast(shape):
    case = Case(B=2)
    check(case, mask=case.draw("small mask", *shape) > 0.5)


@pytest.mark.parametrize(
    "order",
    [(0, 2, 3, 1, 4), (0, 3, 2, 1, 4), (4, 3, 2, 1, 0)],
    ids=["projection", "ending-node", "reversed"],
)
def test_views_are_read_in_place(order):
    case = Case(B=2, H=2, mask="rows")
    q, k, v, bias = case.inputs()
    dout = embedded(case.draw("dout", *q.shape), order=order)
    views = [embedded(x, order=order) for x in (q, k, v)] + [embedded(bias, order=(0, 2, 3, 1))]
    check(case, views, embedded(case.make_mask(), order=(0, 2, 1)), dout=dout)


def test_float32_bias_beside_float16_queries():
    case = Case(dtype=torch.float16)
    inputs = case.inputs()
    inputs[3] = case.draw("bias", *inputs[3].shape, dtype=torch.float32)
    mask = case.make_mask()
    dout = case.draw("dout", *inputs[0].shape)
    actual = attend(inputs, mask, 0.3, "mean", dout, None)
    exact = plain([x.double() for x in inputs], mask, 0.3, "mean", dout, None)
    torch.testing.assert_close(actual["out"].double(), exact["out"], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(actual["dbias"].double(), exact["dbias"], rtol=2e-3, atol=5e-3)
    assert actual["dbias"].dtype == torch.float32


@pytest.mark.parametrize("masked_rows", ["mean", "zero"])
def test_query_hidden_by_its_bias(masked_rows):
    case = Case(H=2, masked_rows=masked_rows)
    inputs = case.inputs()
    inputs[3][:, :, 3] = -torch.inf
    inputs[3][:, :, 5, 2:] = -torch.inf
    check(case, inputs)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale(scale):
    # Large scores cost float32 digits that PyTorch keeps: it normalises again, we subtract lse.
    check(Case(R=2, mask="none", dtype=torch.float16), scale=scale)


@pytest.mark.parametrize("num_sms", [1, 100])
def test_rows_are_split_among_programs(num_sms, monkeypatch):
    info = dbias.device_info("cpu")
    monkeypatch.setattr(
        dbias, "device_info", lambda device: info.__class__("cuda", "gpu", "", num_sms)
    )
    check(Case(R=5, M=17, N=18))


def test_strides_beyond_32_bits():
    case = Case(R=1, M=3, N=4)
    q, k, v, bias = case.inputs()
    # Of a dimension of size 1: nothing lies so far away.
    far = [x.as_strided(x.shape, (2**40, 2**36, 2**33, *x.stride()[3:])) for x in (q, k, v)]
    check(case, [*far, bias])


@pytest.mark.parametrize("size", ["B", "H", "R", "M", "N"])
def test_empty_sizes(size):
    case = Case(**{size: 0}, mask="none")
    inputs = case.inputs()
    with poison_new_allocations():
        out, lse = forward.attention(*inputs, None, 1.0, "mean")
        grads = backward.attention_backward(
            out, None, *inputs, None, out, lse, 1.0, "mean", "dq dk_dv dbias", True
        )
    assert not out.any()
    assert (lse == -torch.inf).all()
    for grad, x in zip(grads, inputs, strict=False):
        assert grad.shape == x.shape
        assert not grad.any()


@pytest.mark.parametrize("masked_rows", ["mean", "zero"])
@pytest.mark.parametrize("mask", ["none", "rows"])
def test_tiles_without_a_number_for_an_lse_are_computed_again(mask, masked_rows):
    redo = pytest.importorskip("attn_triangle._hopper.redo")
    case = Case(H=2, M=70, N=37, mask=mask, masked_rows=masked_rows)
    inputs = case.inputs()
    inputs[3][..., 4, :] = -torch.inf
    q, mask, scale = inputs[0], case.make_mask(), case.D**-0.5
    out, lse = torch.full_like(q, 7.0), torch.full(q.shape[:-1], 7.0)
    lse[0, 0, 1, 5] = lse[0, 1, 2, 64] = torch.nan
    redo.redo(*inputs, mask, out, lse, scale, masked_rows)
    exact_out, exact_lse = reference.attention(*inputs, mask, scale, masked_rows)
    redone = torch.zeros(q.shape[:-1], dtype=torch.bool)
    redone[0, 0, 1, :64] = redone[0, 1, 2, 64:] = True
    torch.testing.assert_close(out[redone], exact_out[redone], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[redone], exact_lse[redone], rtol=1e-5, atol=1e-5)
    assert (out[~redone] == 7.0).all()
    assert (lse[~redone] == 7.0).all()
