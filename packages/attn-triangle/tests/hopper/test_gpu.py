"""Backend "hopper" through the public function, against the reference in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from attn_core import replay
from attn_core.device import device_info
from attn_core.testing import assert_within_budget, poison_new_allocations, random_tensor
from attn_triangle import UnsupportedProblemError, reference, triangle_attention
from attn_triangle._hopper import configs

pytest.importorskip("triton")

from attn_triangle._triton import short

pytestmark = pytest.mark.gpu

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _only_on_hopper(device):
    if device_info(device).arch != "sm_90":
        pytest.skip("needs compute capability 9.0")


class Case(NamedTuple):
    """One problem; `mask` is none, random, rows (some masked as a whole), front or padded."""

    B: int = 1
    H: int = 2
    R: int = 5
    M: int = 333
    N: int = 333
    D: int = 32
    mask: str = "rows"
    masked_rows: str = "mean"
    dtype: torch.dtype = BFLOAT
    bias_dtype: torch.dtype = BFLOAT
    std: float = 1.0
    deterministic: bool = True

    def __str__(self):
        dtypes = [str(x).removeprefix("torch.") for x in (self.dtype, self.bias_dtype)]
        words = ["det" if self.deterministic else "atomics", self.mask, self.masked_rows]
        return (
            f"b{self.B}-h{self.H}-r{self.R}-m{self.M}-n{self.N}-d{self.D}-std{self.std:g}-"
            + "-".join([*dtypes, *words])
        )

    def draw(self, name, *shape, device, dtype=None, std=1.0):
        return random_tensor(
            shape, seed=f"{self}-{name}", dtype=dtype or self.dtype, device=device, scale=std
        )

    def inputs(self, device):
        """q, k and v as a projection leaves them, heads before channels in memory."""
        B, H, R, M, N, D = self[:6]
        q, k, v = (
            self.draw(name, B, R, length, H, D, device=device, std=self.std).permute(0, 3, 1, 2, 4)
            for name, length in (("q", M), ("k", N), ("v", N))
        )
        return [q, k, v, self.draw("bias", B, H, M, N, device=device, dtype=self.bias_dtype)]

    def make_mask(self, device):
        shape = (self.B, self.R, self.N)
        keys = torch.arange(self.N, device=device)
        if self.mask == "none":
            return None
        if self.mask == "padded":
            return (keys >= self.N * 7 // 10).expand(shape)
        mask = self.draw("mask", *shape, device=device) > 0
        if self.mask == "rows":
            mask[:, ::2] = True
        if self.mask == "front":  # the first tile of keys says nothing of the second
            mask[:, ::2] = keys < 200
        return mask


CASES = [
    Case(),
    Case(deterministic=False),
    Case(masked_rows="zero", deterministic=False),
    Case(B=2, R=4, M=384, N=384, mask="none"),
    Case(B=2, R=4, M=384, N=384, mask="none", deterministic=False),
    Case(mask="padded"),
    Case(mask="front", deterministic=False),
    Case(mask="random", std=10.0),
    Case(R=2, M=1, N=400, mask="random", deterministic=False),
    Case(R=1, M=70, D=64, bias_dtype=FLOAT),
    Case(D=64, deterministic=False),
    Case(D=24, dtype=HALF, bias_dtype=HALF),
    Case(D=8, dtype=HALF, bias_dtype=FLOAT, std=10.0, deterministic=False),
    Case(D=16, masked_rows="zero", mask="random"),
    Case(H=4, R=40, M=128, N=128),
    Case(R=9, M=100, N=128, D=16, masked_rows="zero", mask="random", dtype=HALF, bias_dtype=HALF),
]


def both_passes(function, inputs, dout, dlse):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(*leaves)
    grads = torch.autograd.grad([out, lse], leaves, [dout.to(out.dtype), dlse.to(lse.dtype)])
    return dict(zip(NAMES, (out, lse, *grads), strict=True))


def check(case, inputs, mask, device):
    dout = case.draw("dout", *inputs[0].shape, device=device)
    dlse = case.draw("dlse", *inputs[0].shape[:-1], device=device, dtype=FLOAT)

    def ours(*leaves):
        return triangle_attention(
            *leaves,
            mask,
            return_lse=True,
            masked_rows=case.masked_rows,
            deterministic=case.deterministic,
            backend="hopper",
        )

    def formula(*leaves):
        return reference.attention(*leaves, mask, case.D**-0.5, case.masked_rows)

    with poison_new_allocations():
        actual = both_passes(ours, inputs, dout, dlse)
    same_dtype = both_passes(formula, inputs, dout, dlse)
    exact = both_passes(formula, [x.double() for x in inputs], dout, dlse)
    for name in NAMES:
        # A float32 gradient of 16-bit products is beside one that PyTorch rounds to 16 bits twice.
        assert_within_budget(actual[name], same_dtype[name], exact[name], name=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients(case, device):
    check(case, case.inputs(device), case.make_mask(device), device)


@pytest.mark.parametrize("deterministic", [True, False], ids=["det", "atomics"])
def test_sizes_one_after_the_other(device, deterministic):
    """A kernel that is compiled for one size serves all; large ones give a program many tiles."""
    for size in (128, 256, 128, 250):
        case = Case(H=4, R=size, M=size, N=size, mask="none", deterministic=deterministic)
        check(case, case.inputs(device), case.make_mask(device), device)


def test_scores_of_which_the_first_tile_is_no_guide(device):
    case = Case(M=384, N=384, mask="none")
    q, k, v, bias = case.inputs(device)
    bias[..., 0, :] = -torch.inf
    bias[..., 1, :200] = -1e4
    bias[..., 2, :200] = -torch.inf
    bias[..., 3, 200:] = 300.0
    check(case, [q, k, v, bias], None, device)


def test_the_ending_node_is_read_in_place(device):
    case = Case(R=333, H=1)
    q, k, v, bias = case.inputs(device)
    views = [x.transpose(2, 3) for x in (q, k, v)]
    before = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    out = triangle_attention(*views, bias, backend="hopper")
    peak = torch.cuda.max_memory_allocated(device) - held
    assert before >= held
    assert peak < out.nbytes * 1.5  # no copy of q, k or v
    exact = triangle_attention(*(x.contiguous() for x in views), bias, backend="hopper")
    assert torch.equal(out, exact)


def bytes_taken(call, device):
    """What a call returns, and how many bytes it asks for at most beyond those of before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    results = call()
    return results, torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - before


def test_a_mask_takes_no_memory_in_the_forward_pass(device):
    case = Case(H=4, R=320, M=320, N=320)
    inputs, mask = case.inputs(device), case.make_mask(device)
    for _ in range(3):  # the last one repeats what the second one did
        results, taken = bytes_taken(
            lambda: triangle_attention(*inputs, mask, return_lse=True, backend="hopper"), device
        )
        assert taken == sum(result.nbytes for result in results)


def test_gradients_of_short_rows_take_no_memory_beyond_them(device):
    case = Case(H=4, R=128, M=128, N=128)
    leaves, mask = [x.requires_grad_() for x in case.inputs(device)], case.make_mask(device)
    out = triangle_attention(*leaves, mask, backend="hopper")
    dout = torch.ones_like(out)
    for _ in range(3):
        grads, taken = bytes_taken(
            lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), device
        )
        assert taken == sum(grad.nbytes for grad in grads)


def test_bias_is_broadcast_and_its_gradient_reduced(device):
    for deterministic in (True, False):
        case = Case(B=2, deterministic=deterministic)
        q, k, v, _ = case.inputs(device)
        for shape in ((1, 1, 333, 333), (1, 2, 1, 333)):
            bias = case.draw(f"bias-{shape}", *shape, device=device, dtype=FLOAT)
            check(case, [q, k, v, bias], case.make_mask(device), device)


def test_a_plain_sum_has_a_gradient(device):
    case = Case()
    leaves = [x.requires_grad_() for x in case.inputs(device)]
    mask = case.make_mask(device)
    grads = {
        name: torch.autograd.grad(triangle_attention(*leaves, mask, backend=name).sum(), leaves)
        for name in ("hopper", "triton")
    }
    for grad, other in zip(*grads.values(), strict=True):
        torch.testing.assert_close(grad, other, rtol=2e-2, atol=2e-2)


def test_later_calls_read_their_own_tensors(device):
    # The third call of a kind repeats the launches of the second on other addresses.
    kept = []
    for std in (1.0, 2.0, 3.0, 4.0):
        case = Case(mask="none", std=std)
        inputs = case.inputs(device)
        kept.append(inputs)  # at other addresses than those that come
        out = triangle_attention(*inputs, backend="hopper")
        exact = reference.attention(*[x.double() for x in inputs], None, case.D**-0.5, "mean")[0]
        torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=4e-2)
        check(case, inputs, None, device)


@pytest.mark.parametrize("needed", range(4), ids=["q", "k", "v", "bias"])
def test_one_gradient_alone(needed, device):
    case = Case()
    inputs, mask = case.inputs(device), case.make_mask(device)
    alone = [x.detach().requires_grad_(i == needed) for i, x in enumerate(inputs)]
    together = [x.detach().requires_grad_() for x in inputs]
    dout = case.draw("dout", *inputs[0].shape, device=device)
    grads = [
        torch.autograd.grad(
            triangle_attention(*leaves, mask, backend="hopper"), leaves[needed], dout
        )[0]
        for leaves in (alone, together)
    ]
    torch.testing.assert_close(
        *grads, rtol=2e-2, atol=1e-3
    )  # other kernels where dq and dbias come from one


def test_same_bits_every_time(device):
    case = Case(B=2, R=40)
    runs = []
    for _ in range(2):
        leaves = [x.requires_grad_() for x in case.inputs(device)]
        out = triangle_attention(*leaves, case.make_mask(device), backend="hopper")
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_rows_beyond_32_bits_apart(device):
    if torch.cuda.get_device_properties(device).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of memory")
    case = Case(H=1, R=2, M=384, N=384, mask="random")
    inputs = case.inputs(device)
    size, far = inputs[0][0, 0, 0].numel(), 2**31
    memory = torch.empty(far + 3 * size, dtype=case.dtype, device=device)
    for i, x in enumerate(inputs[:3]):
        strides = (2 * far, 2 * far, far, case.D, 1)
        inputs[i] = memory.as_strided(x.shape, strides, i * size).copy_(x)
    check(case, inputs, case.make_mask(device), device)


@pytest.mark.parametrize("deterministic", [True, False], ids=["det", "atomics"])
def test_runs_in_a_cuda_graph(deterministic, device):
    case = Case()
    leaves = [x.requires_grad_() for x in case.inputs(device)]
    mask = case.make_mask(device)
    dout = case.draw("dout", *leaves[0].shape, device=device)

    def step():
        out = triangle_attention(*leaves, mask, deterministic=deterministic, backend="hopper")
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
        torch.testing.assert_close(result, other)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda x: x[..., :7].contiguous(), "head dimensions to 64 in steps of 8, got 7"),
        (lambda x: x[..., 1:9], "multiples of 16 bytes"),
        (lambda x: x[..., :100, :], "gains nothing below 128 keys, got 100"),
        (lambda x: x.float(), "float16 and bfloat16"),
        (lambda x: x.repeat(1, 1, 1, 1, 3), "head dimensions to 64 in steps of 8, got 96"),
    ],
    ids=["odd-dim", "offset", "short", "float32", "wide"],
)
def test_what_it_does_not_take_is_refused(change, reason, device):
    *inputs, bias = Case().inputs(device)
    q, k, v = (change(x) for x in inputs)
    bias = bias[..., : q.shape[3], : k.shape[3]].to(q.dtype)
    with pytest.raises(UnsupportedProblemError, match=reason):
        triangle_attention(q, k, v, bias, backend="hopper")


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "det"])
@pytest.mark.parametrize("few_scores", [0, 4 * 128**3], ids=["hopper", "any-gpu"])
def test_short_rows_by_the_kernels_of_long_ones(few_scores, deterministic, device, monkeypatch):
    monkeypatch.setattr(short, "LONGEST", 0)
    monkeypatch.setattr(configs, "FEW_SCORES", few_scores)
    replay.forget()
    case = Case(H=4, R=128, M=128, N=128, deterministic=deterministic)
    check(case, case.inputs(device), case.make_mask(device), device)
    replay.forget()
