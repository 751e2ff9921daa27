"""Backend "triton" through the public function on a GPU, against the reference in float64.

A kernel is compiled for every new combination of dtype, head dimension, mask and ragged lengths,
which takes about a second; cases share them where they can.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from attn_core import backends
from attn_core.testing import assert_within_budget, poison_new_allocations, random_tensor
from attn_triangle import ops, reference, triangle_attention
from attn_triangle.checks import triangle_problem

pytestmark = pytest.mark.gpu

BACKEND = "triton"
NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


class Case(NamedTuple):
    """One problem; `mask` is none, random, rows (some are masked as a whole) or padded."""

    B: int = 1
    H: int = 2
    R: int = 129
    M: int = 129
    N: int = 129
    D: int = 32
    mask: str = "rows"
    masked_rows: str = "mean"
    dtype: torch.dtype = BFLOAT
    std: float = 1.0

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"b{self.B}-h{self.H}-r{self.R}-m{self.M}-n{self.N}-d{self.D}-{dtype}-{self.mask}"
            f"-{self.masked_rows}-std{self.std:g}"
        )

    def draw(self, name, *shape, device, dtype=None, std=1.0):
        return random_tensor(
            shape, seed=f"{self}-{name}", dtype=dtype or self.dtype, device=device, scale=std
        )

    def inputs(self, device):
        B, H, R, M, N, D = self[:6]
        shapes = {"q": (B, H, R, M, D), "k": (B, H, R, N, D), "v": (B, H, R, N, D)}
        shapes["bias"] = (B, H, M, N)
        return [self.draw(name, *shapes[name], device=device, std=self.std) for name in shapes]

    def make_mask(self, device):
        shape = (self.B, self.R, self.N)
        if self.mask == "none":
            return None
        if self.mask == "padded":
            return (torch.arange(self.N, device=device) >= self.N * 7 // 10).expand(shape)
        mask = self.draw("mask", *shape, device=device) > 0
        if self.mask == "rows":
            mask[:, ::2] = True
        return mask


CASES = [
    Case(),
    Case(masked_rows="zero"),
    Case(R=128, M=128, N=128, mask="random"),
    Case(B=2, R=128, M=128, N=128, mask="padded"),
    Case(R=130, M=1, N=200, std=10.0),
    Case(H=4, R=1, M=70, N=333, D=48, mask="random"),
    Case(R=64, M=64, N=64, D=64, mask="none", dtype=HALF),
    Case(R=9, M=65, N=67, D=128, mask="random"),
    Case(R=33, M=33, N=33, D=8, dtype=FLOAT),
]


def both_passes(function, inputs, dout, dlse):
    """Results of `function` on `inputs` and all gradients, by name."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(*leaves)
    grads = torch.autograd.grad([out, lse], leaves, [dout.to(out.dtype), dlse.to(lse.dtype)])
    return dict(zip(NAMES, (out, lse, *grads), strict=True))


def check(case, inputs, mask, device):
    dout = case.draw("dout", *inputs[0].shape, device=device)
    dlse = case.draw("dlse", *inputs[0].shape[:-1], device=device, dtype=FLOAT)

    def ours(*leaves):
        return triangle_attention(
            *leaves, mask, return_lse=True, masked_rows=case.masked_rows, backend=BACKEND
        )

    def formula(*leaves):
        return reference.attention(*leaves, mask, case.D**-0.5, case.masked_rows)

    with poison_new_allocations():
        actual = both_passes(ours, inputs, dout, dlse)
    same_dtype = both_passes(formula, inputs, dout, dlse)
    exact = both_passes(formula, [x.double() for x in inputs], dout, dlse)
    # In float32 both errors are a few roundings, added up in another order: the largest is luck.
    factor = 4.0 if case.dtype == FLOAT else 2.0
    for name in NAMES:
        assert_within_budget(actual[name], same_dtype[name], exact[name], name=name, factor=factor)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients(case, device):
    check(case, case.inputs(device), case.make_mask(device), device)


def test_auto_takes_this_backend(device):
    case = Case(dtype=FLOAT)
    *inputs, mask = *case.inputs(device), case.make_mask(device)
    problem = triangle_problem(*inputs, mask, None, "mean")
    assert backends.resolve(ops.ATTENTION, problem, "auto") == BACKEND


@pytest.mark.parametrize("order", [(0, 2, 3, 1, 4), (0, 3, 2, 1, 4)], ids=["starting", "ending"])
def test_projections_are_read_in_place(order, device):
    case = Case(R=128, M=128, N=128)
    inverse = sorted(range(5), key=order.__getitem__)
    q, k, v, bias = case.inputs(device)
    views = [x.permute(order).contiguous().permute(inverse) for x in (q, k, v)]
    bias = bias.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    check(case, [*views, bias], case.make_mask(device), device)


def test_bias_is_broadcast_and_its_gradient_reduced(device):
    case = Case(B=2, R=128, M=128, N=128)
    q, k, v, _ = case.inputs(device)
    bias = case.draw("one", 1, 1, 128, 128, device=device, dtype=FLOAT)
    check(case, [q, k, v, bias], case.make_mask(device), device)


def test_rows_beyond_32_bits_apart(device):
    if torch.cuda.get_device_properties(device).total_memory < 16 << 30:
        pytest.skip("needs 16 GiB of memory")
    case = Case(H=1, R=2, M=64, N=64, mask="random")
    inputs = case.inputs(device)
    size, far = inputs[0][0, 0, 0].numel(), 2**31
    memory = torch.empty(far + 3 * size, dtype=case.dtype, device=device)
    for i, x in enumerate(inputs[:3]):
        shape, strides = x.shape, (2 * far, 2 * far, far, case.D, 1)
        inputs[i] = memory.as_strided(shape, strides, i * size).copy_(x)
    check(case, inputs, case.make_mask(device), device)


def test_same_bits_every_time(device):
    case = Case(B=2)
    runs = []
    for _ in range(2):
        inputs = [x.requires_grad_() for x in case.inputs(device)]
        out = triangle_attention(*inputs, case.make_mask(device), backend=BACKEND)
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_values_of_masked_keys_change_nothing(device):
    case = Case(mask="random")
    q, k, v, bias = case.inputs(device)
    mask = case.make_mask(device)
    hidden = mask[:, None, :, :, None]
    moved = [x.masked_fill(hidden, 1e4) for x in (k, v)]
    out = triangle_attention(q, k, v, bias, mask, backend=BACKEND)
    assert torch.equal(triangle_attention(q, *moved, bias, mask, backend=BACKEND), out)


def test_compiles_to_one_graph(device):
    case = Case()
    *inputs, mask = *case.inputs(device), case.make_mask(device)
    leaves = [x.requires_grad_() for x in inputs]

    def loss(*leaves):
        return triangle_attention(*leaves, mask).float().square().mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    actual = torch.autograd.grad(compiled(*leaves), leaves)
    for grad, other in zip(actual, expected, strict=True):
        assert torch.equal(grad, other)


def test_runs_in_a_cuda_graph(device):
    case = Case()
    inputs, mask = case.inputs(device), case.make_mask(device)
    leaves = [x.requires_grad_() for x in inputs]
    dout = case.draw("dout", *leaves[0].shape, device=device)

    def step():
        out = triangle_attention(*leaves, mask, backend=BACKEND)
        return (out, *torch.autograd.grad(out, leaves, dout))

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        expected = step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    graph.replay()
    torch.cuda.synchronize(device)
    for result, other in zip(captured, expected, strict=True):
        assert torch.equal(result, other)
