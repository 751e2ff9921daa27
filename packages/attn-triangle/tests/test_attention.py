"""triangle_attention against the plain formula in float64: results, gradients, edge cases."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_core.testing import assert_within_budget, embedded, poison_new_allocations, random_tensor
from attn_triangle import _torch, triangle_attention

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")


@dataclass(frozen=True)
class Case:
    """One problem; `mask` is none, random, rows (some rows are masked as a whole) or all."""

    batch: tuple[int, ...] = (1,)
    heads: int = 2
    rows: int = 17
    len_q: int = 17
    len_k: int = 17
    head_dim: int = 8
    mask: str = "random"
    masked_rows: str = "mean"
    dtype: torch.dtype = torch.float32
    std: float = 1.0

    def __str__(self) -> str:
        batch = "x".join(map(str, self.batch)) or "0d"
        return (
            f"b{batch}-h{self.heads}-r{self.rows}-m{self.len_q}-n{self.len_k}-d{self.head_dim}"
            f"-{str(self.dtype).removeprefix('torch.')}-{self.mask}-{self.masked_rows}"
            f"-std{self.std:g}"
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        outer = (*self.batch, self.heads)
        return {
            "q": (*outer, self.rows, self.len_q, self.head_dim),
            "k": (*outer, self.rows, self.len_k, self.head_dim),
            "v": (*outer, self.rows, self.len_k, self.head_dim),
            "bias": (*outer, self.len_q, self.len_k),
        }

    def inputs(self, device: torch.device) -> list[torch.Tensor]:
        return [
            random_tensor(
                shape, seed=f"{self}-{name}", dtype=self.dtype, device=device, scale=self.std
            )
            for name, shape in self.shapes.items()
        ]

    def make_mask(self, device: torch.device) -> torch.Tensor | None:
        shape = (*self.batch, self.rows, self.len_k)
        if self.mask == "none":
            return None
        if self.mask == "all":
            return torch.ones(shape, dtype=torch.bool, device=device)
        mask = random_tensor(shape, seed=f"{self}-mask", device=device) > 0
        if self.mask == "rows":
            mask[..., ::2, :] = True
        return mask


def square(n: int, **others) -> Case:
    return Case(rows=n, len_q=n, len_k=n, **others)


CASES = [
    *[square(n, head_dim=d) for n in (1, 2, 17, 33) for d in (1, 8, 24, 32)],
    *[square(17, mask=mask) for mask in ("none", "rows", "all")],
    *[square(17, mask=mask, masked_rows="zero") for mask in ("rows", "all")],
    *[square(9, batch=batch, mask="rows") for batch in ((), (2,), (2, 3))],
    Case(rows=5, len_q=9, len_k=33),
    Case(rows=33, len_q=1, len_k=7, heads=3, mask="rows"),
    Case(rows=1, len_q=40, len_k=40, heads=16, head_dim=48),
    square(13, head_dim=128),
    *[square(17, head_dim=16, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)],
    *[square(17, dtype=torch.float64, mask=mask) for mask in ("random", "rows")],
    *[square(17, std=10.0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)],
]


def plain(q, k, v, bias, mask, scale, masked_rows):
    """The formula with a huge negative score for masked keys, as protein models write it."""
    scores = torch.einsum("...ijd,...ikd->...ijk", q, k) * scale + bias.unsqueeze(-3)
    if mask is None:
        lse = torch.logsumexp(scores, dim=-1)
        return torch.einsum("...ijk,...ikd->...ijd", torch.softmax(scores, dim=-1), v), lse
    scores = scores.masked_fill(mask[..., None, :, None, :], torch.finfo(scores.dtype).min)
    is_masked_row = mask.all(-1)[..., None, :, None]  # [*, 1, R, 1]
    lse = torch.logsumexp(scores, dim=-1).masked_fill(is_masked_row, -torch.inf)
    probs = torch.softmax(scores, dim=-1)
    if masked_rows == "zero":
        probs = probs.masked_fill(is_masked_row[..., None], 0.0)
    return torch.einsum("...ijk,...ikd->...ijd", probs, v), lse


def both_passes(function, inputs, dout, dlse):
    """Results of `function` on `inputs` and all gradients, by the names in NAMES."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(*leaves)
    grads = torch.autograd.grad([out, lse], leaves, [dout.to(out.dtype), dlse.to(lse.dtype)])
    return dict(zip(NAMES, (out, lse, *grads), strict=True))


def compare(actual, same_dtype, reference, *, has_one_key=False):
    for name in NAMES:
        assert actual[name].shape == reference[name].shape, name
        if has_one_key and name in ("dq", "dk", "dbias"):
            # The weight is 1 whatever the score: what is left of the gradient is dlse's alone.
            torch.testing.assert_close(
                actual[name].double(), reference[name], rtol=1e-5, atol=1e-5, msg=name
            )
            continue
        assert_within_budget(actual[name], same_dtype[name], reference[name], name=name)


def check(case, inputs, mask, device, **arguments):
    scale = case.head_dim**-0.5
    dout = random_tensor(case.shapes["q"], seed=f"{case}-dout", device=device)
    dlse = random_tensor(case.shapes["q"][:-1], seed=f"{case}-dlse", device=device)

    def ours(*leaves):
        return triangle_attention(
            *leaves, mask, return_lse=True, masked_rows=case.masked_rows, **arguments
        )

    def formula(*leaves):
        return plain(*leaves, mask, scale, case.masked_rows)

    with poison_new_allocations():
        actual = both_passes(ours, inputs, dout.to(case.dtype), dlse)
    same_dtype = both_passes(formula, inputs, dout.to(case.dtype), dlse)
    reference = both_passes(
        formula, [x.double() for x in inputs], dout.to(case.dtype).double(), dlse
    )
    compare(actual, same_dtype, reference, has_one_key=case.len_k == 1)
    return actual


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_those_of_the_formula(case, device):
    actual = check(case, case.inputs(device), case.make_mask(device), device)
    assert actual["out"].dtype == case.dtype
    assert actual["lse"].dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    "order",
    [(0, 2, 3, 1, 4), (0, 3, 2, 1, 4), (4, 3, 2, 1, 0), (0, 1, 3, 2, 4)],
    ids=["projection", "ending-node", "reversed", "transposed"],
)
def test_views_are_read_in_place(order, device):
    case = square(17, batch=(2,), mask="rows")
    q, k, v, bias = case.inputs(device)
    views = [embedded(x, order=order) for x in (q, k, v)] + [embedded(bias, order=(0, 2, 3, 1))]
    mask = embedded(case.make_mask(device), order=(0, 2, 1))
    check(case, views, mask, device)


def test_batch_dimensions_that_do_not_fold_are_accepted(device):
    case = square(9, batch=(2, 3), mask="rows")
    inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in case.inputs(device)]
    mask = case.make_mask(device).transpose(0, 1).contiguous().transpose(0, 1)
    check(case, inputs, mask, device)


@pytest.mark.parametrize(
    "shape",
    [(2, 9, 9), (1, 1, 2, 9, 9), (3, 2, 9, 9), (2, 1, 2, 9, 9), (2, 3, 1, 9, 9), (9, 1), (1, 1, 1)],
    ids=str,
)
def test_bias_is_broadcast_and_its_gradient_reduced(shape, device):
    case = square(9, batch=(2, 3), mask="rows")
    q, k, v, _ = case.inputs(device)
    bias = random_tensor((1, *shape) if len(shape) == 2 else shape, seed=str(shape), device=device)
    check(case, [q, k, v, bias], case.make_mask(device), device)


@pytest.mark.parametrize("shape", [(9, 9), (1, 9), (3, 1, 9), (2, 1, 9, 9), (2, 3, 9, 1)], ids=str)
def test_mask_is_broadcast(shape, device):
    case = square(9, batch=(2, 3))
    mask = random_tensor(shape, seed=str(shape), device=device) > 0
    full = mask.expand(2, 3, 9, 9)
    inputs = case.inputs(device)
    torch.testing.assert_close(
        triangle_attention(*inputs, mask), triangle_attention(*inputs, full), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_bias_keeps_its_dtype_and_precision(dtype, device):
    case = square(17, dtype=dtype)
    q, k, v, bias = case.inputs(device)
    bias = random_tensor(bias.shape, seed=1, device=device).requires_grad_()
    out = triangle_attention(q, k, v, bias)
    out.float().sum().backward()
    expected, _ = plain(*(x.float() for x in (q, k, v)), bias, None, 8**-0.5, "mean")
    torch.testing.assert_close(out, expected.to(dtype))
    assert bias.grad.dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, 0.3, -1, 2.5])
def test_scale_multiplies_the_products_but_not_the_bias(scale, device):
    case = square(9, dtype=torch.float64)
    inputs, mask = case.inputs(device), case.make_mask(device)
    expected, _ = plain(*inputs, mask, scale, "mean")
    torch.testing.assert_close(triangle_attention(*inputs, mask, scale=scale), expected)


def test_masked_row_is_the_mean_of_all_its_values(device):
    case = square(9, dtype=torch.float64, mask="none")
    q, k, v, bias = (x.requires_grad_() for x in case.inputs(device))
    mask = torch.zeros(9, 9, dtype=torch.bool, device=device)
    mask[4] = True
    out, lse = triangle_attention(q, k, v, bias, mask, return_lse=True)
    dout = random_tensor(out.shape, seed=1, dtype=out.dtype, device=device)
    (out * dout)[:, :, 4].sum().backward()
    mean = v[:, :, 4].mean(dim=-2, keepdim=True).expand(-1, -1, 9, -1)
    torch.testing.assert_close(out[:, :, 4], mean)
    assert (lse[:, :, 4] == -torch.inf).all()
    assert lse[:, :, :4].isfinite().all()
    share = dout[:, :, 4].sum(dim=-2, keepdim=True).expand(-1, -1, 9, -1) / 9
    torch.testing.assert_close(v.grad[:, :, 4], share)
    assert not q.grad.any()
    assert not k.grad.any()
    assert not bias.grad.any()


def test_masked_row_is_zero_on_request(device):
    case = square(9, mask="rows")
    inputs = [x.requires_grad_() for x in case.inputs(device)]
    out, lse = triangle_attention(
        *inputs, case.make_mask(device), masked_rows="zero", return_lse=True
    )
    out.sum().backward()
    assert not out[:, :, ::2].any()
    assert (lse[:, :, ::2] == -torch.inf).all()
    assert not inputs[2].grad[:, :, ::2].any()
    assert inputs[2].grad[:, :, 1::2].any()


@pytest.mark.parametrize("masked_rows", ["mean", "zero"])
def test_query_hidden_by_its_bias_is_a_query_that_sees_no_key(masked_rows, device):
    q, k, v, bias = square(9, dtype=torch.float64).inputs(device)
    bias[:, :, 3] = -torch.inf
    inputs = [x.requires_grad_() for x in (q, k, v, bias)]
    out, lse = triangle_attention(*inputs, masked_rows=masked_rows, return_lse=True)
    grads = torch.autograd.grad(out.sum(), inputs)
    expected = v.mean(dim=-2) if masked_rows == "mean" else torch.zeros_like(v[..., 0, :])
    torch.testing.assert_close(out[..., 3, :], expected)
    assert (lse[..., 3] == -torch.inf).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    "sizes",
    [{"batch": (0,)}, {"rows": 0}, {"len_q": 0}, {"len_k": 0}, {"heads": 0}],
    ids=lambda sizes: f"no-{next(iter(sizes))}",
)
def test_empty_sizes(sizes, device):
    case = Case(mask="none", **sizes)
    inputs = [x.requires_grad_() for x in case.inputs(device)]
    out, lse = triangle_attention(*inputs, return_lse=True)
    grads = torch.autograd.grad(out.sum() + lse.exp().sum(), inputs)
    assert out.shape == case.shapes["q"]
    assert not out.any()
    assert (lse == -torch.inf).all()
    for grad, x in zip(grads, inputs, strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


@pytest.mark.parametrize("shift", [-1e4, 1e4], ids=["down", "up"])
def test_a_constant_in_the_bias_changes_nothing(shift, device):
    q, k, v, bias = square(17, dtype=torch.float64).inputs(device)
    out, lse = triangle_attention(q, k, v, bias, return_lse=True)
    shifted_out, shifted_lse = triangle_attention(q, k, v, bias + shift, return_lse=True)
    torch.testing.assert_close(shifted_out, out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shifted_lse, lse + shift)


def test_order_of_keys_changes_nothing(device):
    case = square(17, dtype=torch.float64)
    q, k, v, bias = case.inputs(device)
    mask = case.make_mask(device)
    order = torch.randperm(17).to(device)
    permuted = triangle_attention(
        q, k[..., order, :], v[..., order, :], bias[..., order], mask[..., order]
    )
    torch.testing.assert_close(permuted, triangle_attention(q, k, v, bias, mask))


def test_values_of_masked_keys_are_not_read_into_the_result(device):
    case = square(17)
    q, k, v, bias = case.inputs(device)
    mask = case.make_mask(device)
    out = triangle_attention(q, k, v, bias, mask)
    hidden = mask[:, None, :, :, None]
    moved = triangle_attention(
        q, k.masked_fill(hidden, 1e4), v.masked_fill(hidden, -1e4), bias, mask
    )
    torch.testing.assert_close(moved, out, rtol=0, atol=0)


def test_one_batch_element_alone_is_the_same_as_in_the_batch(device):
    case = square(17, batch=(3,), dtype=torch.float64)
    inputs, mask = case.inputs(device), case.make_mask(device)
    alone = triangle_attention(*(x[1] for x in inputs), mask[1])
    torch.testing.assert_close(triangle_attention(*inputs, mask)[1], alone)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_result_flattens_for_the_output_projection_without_a_copy(batch, device):
    out = triangle_attention(*square(9, batch=batch).inputs(device))
    assert out.movedim(-4, -2).is_contiguous()


def test_same_bits_every_time(device):
    case = square(33, batch=(2,), mask="rows")
    runs = []
    for _ in range(2):
        inputs = [x.requires_grad_() for x in case.inputs(device)]
        out = triangle_attention(*inputs, case.make_mask(device))
        runs.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_blocks_of_rows_make_no_difference(device, monkeypatch):
    case = square(17, batch=(2,), mask="rows")
    for row_count in (1, 3):
        size = row_count * 4 * 2 * case.heads * 17 * 17
        monkeypatch.setattr(_torch, "_BLOCK_BYTES_CPU", size)
        monkeypatch.setattr(_torch, "_BLOCK_BYTES_GPU", size)
        check(case, case.inputs(device), case.make_mask(device), device, backend="torch")


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest storage that any operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


def test_no_tensor_grows_with_the_cube_of_the_length(device, monkeypatch):
    monkeypatch.setattr(_torch, "_BLOCK_BYTES_CPU", 1)
    monkeypatch.setattr(_torch, "_BLOCK_BYTES_GPU", 1)
    case = square(24, head_dim=4)
    inputs = [x.requires_grad_() for x in case.inputs(device)]
    with LargestTensor() as largest:
        out = triangle_attention(*inputs, case.make_mask(device), backend="torch")
        torch.autograd.grad(out.sum(), inputs)
    assert 0 < largest.nbytes <= inputs[0].nbytes


def gradcheck_inputs(device):
    case = Case(
        batch=(), rows=3, len_q=2, len_k=3, head_dim=1, heads=1, mask="none", dtype=torch.float64
    )
    q, k, v, _ = case.inputs(device)
    bias = random_tensor((1, 1, 3), seed=1, dtype=torch.float64, device=device)
    mask = torch.zeros(3, 3, dtype=torch.bool, device=device)
    mask[0, 1:] = mask[1, 2] = True
    return [x.requires_grad_() for x in (q, k, v, bias)], mask


@pytest.mark.parametrize("check_gradient", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_agree_with_differences_of_results(check_gradient, device):
    inputs, mask = gradcheck_inputs(device)

    def function(*leaves):
        return triangle_attention(*leaves, mask, return_lse=True)

    assert check_gradient(function, inputs)


@pytest.mark.parametrize("masked_rows", ["mean", "zero"])
@pytest.mark.parametrize("check_gradient", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_of_masked_rows_agree_with_differences(check_gradient, masked_rows, device):
    inputs, mask = gradcheck_inputs(device)
    mask[2] = True

    def function(*leaves):
        return triangle_attention(*leaves, mask, masked_rows=masked_rows)

    assert check_gradient(function, inputs)


@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "bias"])
@pytest.mark.parametrize("create_graph", [False, True], ids=["first-order", "second-order"])
def test_gradient_of_one_input_alone(which, create_graph, device):
    case = square(5, dtype=torch.float64)
    inputs, mask = case.inputs(device), case.make_mask(device)
    inputs[which].requires_grad_()
    expected, _ = plain(*inputs, mask, 8**-0.5, "mean")
    (expected,) = torch.autograd.grad(expected.square().sum(), inputs[which])
    out = triangle_attention(*inputs, mask)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[which], create_graph=create_graph)
    torch.testing.assert_close(grad, expected)


def test_gradient_of_lse_alone(device):
    case = square(9, dtype=torch.float64, mask="rows")
    mask = case.make_mask(device)
    inputs = [x.requires_grad_() for x in case.inputs(device)]
    _, lse = triangle_attention(*inputs, mask, return_lse=True)
    _, expected = plain(*inputs, mask, 8**-0.5, "mean")
    grads = torch.autograd.grad(lse.exp().sum(), inputs)
    expected_grads = torch.autograd.grad(expected.exp().sum(), inputs[:2] + inputs[3:])
    assert not grads[2].any()
    for grad, other in zip(grads[:2] + grads[3:], expected_grads, strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("needed", ["q", "k", "v", "bias", "mask"])
def test_one_gradient_alone(needed, device):
    case = square(9, mask="random")
    names = ("q", "k", "v", "bias", "mask")
    added = random_tensor((1, 9, 9), seed="added", device=device)
    tensors = dict(zip(names, [*case.inputs(device), added], strict=True))
    everything = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    whole = triangle_attention(**everything)
    dout = torch.ones_like(whole)
    expected = torch.autograd.grad(whole, everything[needed], dout)
    alone = {name: x.detach().requires_grad_(name == needed) for name, x in tensors.items()}
    out = triangle_attention(**alone)
    assert torch.equal(torch.autograd.grad(out, alone[needed], dout)[0], expected[0])


@pytest.mark.parametrize("shape", [(1, 9, 9), (1, 1, 9), (9, 1), (1, 9)], ids=str)
def test_additive_masks_broadcast_and_have_gradients(shape, device):
    case = square(9, batch=(2,))
    q, k, v, bias = (x.requires_grad_() for x in case.inputs(device))
    mask = random_tensor(shape, seed="added", device=device).requires_grad_()
    out = triangle_attention(q, k, v, bias, mask)
    full = mask.expand(2, 9, 9)
    scores = q @ k.mT * case.head_dim**-0.5 + bias[:, :, None] + full[:, None, :, None]
    expected = scores.softmax(-1) @ v
    torch.testing.assert_close(out, expected)
    inputs = (q, k, v, bias, mask)
    weights = torch.randn_like(out)
    for grad, other in zip(
        torch.autograd.grad(out, inputs, weights),
        torch.autograd.grad(expected, inputs, weights),
        strict=True,
    ):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)
