"""The operators as torch.compile and opcheck see them, backends by name, error messages."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from attn_core import backends
from attn_triangle import (
    BackendUnavailableError,
    UnsupportedProblemError,
    layout,
    ops,
    triangle_attention,
)
from attn_triangle.utils import gen_tensors


def operator_inputs(device, *, needs_grad):
    q, k, v, bias, mask = gen_tensors(5, 4, 2, True, device, torch.float32, batch=2)
    mask[:, 1] = True
    inputs = [*(x.transpose(2, 3) for x in (q, k, v)), bias[:1]]
    return [*(x.detach().requires_grad_(needs_grad) for x in inputs), mask]


@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("has_mask", [False, True], ids=["open", "masked"])
def test_opcheck_of_the_operator(needs_grad, has_mask, device):
    *inputs, mask = operator_inputs(device, needs_grad=needs_grad)
    arguments = (*inputs, mask if has_mask else None, 0.5, "mean", True, "torch")
    torch.library.opcheck(ops.attention.overload, arguments)


@pytest.mark.parametrize("needs_grad", [False, True], ids=["first-order", "second-order"])
@pytest.mark.parametrize("has_dlse", [False, True], ids=["out", "out-and-lse"])
@pytest.mark.parametrize("wanted", ["dq dk_dv dbias", "dbias"])
def test_opcheck_of_its_gradient(wanted, has_dlse, needs_grad, device):
    inputs = operator_inputs(device, needs_grad=needs_grad)
    with torch.no_grad():
        out, lse = ops.attention(*inputs, 0.5, "mean", True, "torch")
    dlse = torch.randn_like(lse) if has_dlse else None
    arguments = (
        torch.randn_like(out), dlse, *inputs, out, lse, 0.5, "mean", wanted, True, "torch",
    )  # fmt: skip
    torch.library.opcheck(ops.attention_backward.overload, arguments)


@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
def test_opcheck_of_the_gate(needs_grad, device):
    out, logits = (torch.randn(3, 5, 8, device=device, requires_grad=needs_grad) for _ in range(2))
    torch.library.opcheck(ops.gate.overload, (out, logits, "torch"))


def test_compiles_once_for_all_lengths(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def both(q, k, v, bias, mask):
        return triangle_attention(q, k, v, bias, mask, return_lse=True)

    compiled = torch.compile(both, backend=counter, fullgraph=True, dynamic=True)
    for n in (7, 8, 17):
        inputs = gen_tensors(n, 8, 2, True, device, torch.float32, batch=2)
        inputs[-1][:, 0] = True
        expected_out, expected_lse = both(*inputs)
        out, lse = compiled(*inputs)
        torch.testing.assert_close(out, expected_out)
        torch.testing.assert_close(lse, expected_lse)
        assert out.stride() == expected_out.stride()
        grads = torch.autograd.grad(out.square().sum(), inputs[:4])
        expected = torch.autograd.grad(expected_out.square().sum(), inputs[:4])
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, other)
    assert counter.frame_count == 1


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_compiles_with_any_batch_dimensions(batch, device):
    torch._dynamo.reset()
    q, k, v = torch.randn(3, *batch, 2, 5, 7, 4, device=device).unbind(0)
    bias = torch.randn(2, 7, 7, device=device)
    compiled = torch.compile(triangle_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(q, k, v, bias), triangle_attention(q, k, v, bias))


def test_backend_by_name(device, monkeypatch):
    inputs = gen_tensors(5, 4, 2, True, device, torch.float64)
    out = triangle_attention(*inputs, backend="torch")
    monkeypatch.setenv("ATTN_BACKEND", "torch")
    assert torch.equal(triangle_attention(*inputs), out)
    with pytest.raises(
        BackendUnavailableError, match=r"backend must be one of .*'torch'.*'vulcan'"
    ):
        triangle_attention(*inputs, backend="vulcan")
    monkeypatch.setenv("ATTN_BACKEND", "vulcan")
    with pytest.raises(BackendUnavailableError, match="'vulcan'"):
        triangle_attention(*inputs)


def test_a_backend_sees_what_the_call_asks(device):
    problem = backends.operators()[ops.ATTENTION](device)
    assert "torch" in backends.available(ops.ATTENTION)
    assert backends.explain(ops.ATTENTION, problem, "torch")[-1].reason is None
    seen = []

    def refuse(op, asked):
        seen.append(asked)
        return "it is a test"

    key = (ops.ATTENTION, "nosy")
    backends.register(backends.Backend("nosy", {ops.ATTENTION: "nowhere:nothing"}, -1, refuse))
    try:
        q, k, v, bias, mask = gen_tensors(5, 4, 2, True, device, torch.float16, batch=3)
        with torch.no_grad(), pytest.raises(UnsupportedProblemError, match="it is a test"):
            triangle_attention(q[..., :2, :], k, v, bias[..., :2, :].float(), mask, backend="nosy")
        with pytest.raises(UnsupportedProblemError, match="no backward pass"):
            triangle_attention(q, k, v, bias, mask, backend="nosy")
    finally:
        backends._backends.pop(key)
        backends._resolve.cache_clear()
    (asked,) = seen
    assert asked == (
        q.device, torch.float16, torch.float32, 3, 2, 5, 2, 5, 4, True, "mean", False, False, False,
        0.5,
    )  # fmt: skip


@pytest.mark.parametrize(
    "view, expected",
    [
        (lambda x: x, True),
        (lambda x: x.transpose(0, 1), True),
        (lambda x: x[1:], True),
        (lambda x: x[..., 8:16], True),
        (lambda x: x[:, :1].expand(-1, 5, -1), False),
        (lambda x: x[:, :1], True),
        (lambda x: x[..., 1:9], False),
        (lambda x: x[..., ::2], False),
        (lambda x: x[..., :7].contiguous(), False),
        (lambda x: x.transpose(1, 2), False),
    ],
)
def test_what_tma_can_read(view, expected):
    assert layout.is_aligned(view(torch.zeros(4, 6, 16, dtype=torch.float16))) == expected


def change(**replacements):
    """Valid arguments, some replaced by what a function makes of them."""
    names = ("q", "k", "v", "bias", "mask")
    arguments = dict(zip(names, gen_tensors(5, 4, 2, True, "cpu", torch.float32), strict=True))
    for name, replacement in replacements.items():
        arguments[name] = replacement(arguments[name]) if callable(replacement) else replacement
    return arguments


@pytest.mark.parametrize(
    "replacements, message",
    [
        ({"q": None}, "q must be a tensor, got NoneType"),
        (
            {"q": lambda q: q[0, 0]},
            r"q must have at least 4 dimensions \(\*, H, R, M, D\), got shape \(5, 5, 4\)",
        ),
        (
            {"q": lambda q: q.int()},
            "q must have dtype float16, bfloat16, float32, float64, got int32",
        ),
        ({"k": lambda k: k.half()}, "k must have the dtype of q, torch.float32, got torch.float16"),
        ({"v": lambda v: v.to("meta")}, "v must be on the device of q, cpu, got meta"),
        (
            {"k": lambda k: k[..., :3]},
            r"k must have shape \(\*, H, R, N, D\) = \(1, 2, 5, 5, 4\), got \(1, 2, 5, 5, 3\)",
        ),
        (
            {"k": lambda k: k[:, :, :1]},
            r"k must have shape .* = \(1, 2, 5, 5, 4\), got \(1, 2, 1, 5, 4\)",
        ),
        (
            {"v": lambda v: v[..., 1:, :]},
            r"v must have shape .* = \(1, 2, 5, 5, 4\), got \(1, 2, 5, 4, 4\)",
        ),
        (
            {name: lambda x: x.new_zeros(2, 3, 3, 129) for name in ("q", "k", "v")},
            "the head dimension of q must be between 1 and 128, got 129",
        ),
        (
            {name: lambda x: x[..., :0] for name in ("q", "k", "v")},
            "the head dimension of q must be between 1 and 128, got 0",
        ),
        ({"bias": None}, "bias must be a tensor, got NoneType"),
        (
            {"bias": lambda bias: bias[0, 0]},
            r"bias must have at least 3 dimensions \(\*, H, M, N\), got shape \(5, 5\)",
        ),
        (
            {"bias": lambda bias: bias[..., :4]},
            r"bias must have shape \(\*, H, M, N\) = \(1, 2, 5, 5\), or 1 .*, got \(1, 2, 5, 4\)",
        ),
        ({"bias": lambda bias: bias[None]}, r"bias must have shape .*got \(1, 1, 2, 5, 5\)"),
        (
            {"bias": lambda bias: bias.bfloat16()},
            "bias must have the dtype of q, torch.float32, got torch.bfloat16",
        ),
        ({"bias": lambda bias: bias.to("meta")}, "bias must be on the device of q, cpu, got meta"),
        ({"mask": lambda mask: mask.half()}, "mask must have dtype bool, float32, got float16"),
        (
            {"mask": lambda mask: mask[0, 0]},
            r"mask must have at least 2 dimensions \(\*, R, N\), got shape \(5,\)",
        ),
        (
            {"mask": lambda mask: mask[..., :2]},
            r"mask must have shape \(\*, R, N\) = \(1, 5, 5\), or 1 .*, got \(1, 5, 2\)",
        ),
        ({"mask": lambda mask: mask.to("meta")}, "mask must be on the device of q, cpu, got meta"),
        ({"masked_rows": "nan"}, r"masked_rows must be one of \('mean', 'zero'\), got 'nan'"),
        ({"scale": float("inf")}, "scale must be a finite number or None, got inf"),
        ({"scale": torch.ones(())}, r"scale must be a finite number or None, got tensor\(1.\)"),
    ],
)
def test_a_bad_argument_is_named(replacements, message):
    with pytest.raises(ValueError, match=message):
        triangle_attention(**change(**replacements))


def test_import_loads_no_gpu_library():
    program = "import sys, attn_triangle; print('triton' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "False"
