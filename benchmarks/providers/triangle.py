"""attn-triangle: attention within the rows of a pair tensor, with a shared bias."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from attn_core import UnsupportedProblemError
from benchmarks import timing
from benchmarks.problems import Case
from benchmarks.providers.base import (
    Call,
    Expected,
    Provider,
    Subject,
    Tasks,
    error_limit,
    leaf,
    nothing_compiled,
    wants_grad,
)

_BACKWARD_FLOPS = 2.5
_BLOCK_SCORES = 1 << 24


class Inputs(NamedTuple):
    """q, k, v, dout (B, H, N, N, D), bias (B, H, N, N), mask (B, N, N), True where masked."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor
    mask: torch.Tensor
    dout: torch.Tensor


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw random inputs and mask the last keys of every row."""
    generator = torch.Generator(device).manual_seed(case.seed)
    square = (case["B"], case["H"], case["N"], case["N"])
    q, k, v, bias, dout = (
        torch.randn(shape, dtype=case.dtype, device=device, generator=generator)
        for shape in ((*square, case["D"]),) * 3 + (square, (*square, case["D"]))
    )
    mask = torch.zeros(case["B"], case["N"], case["N"], dtype=torch.bool, device=device)
    mask[..., seen_keys(case) :] = True
    return Inputs(q, k, v, bias, mask, dout)


def seen_keys(case: Case) -> int:
    """Return how many keys of a row are not masked."""
    return max(1, round(case["N"] * (1 - case["masked"])))


def reference(case: Case, inputs: Inputs, gradients: bool) -> list[Expected]:
    """Attention and its gradients by the plain formulas, in float64, of the first and last head.

    All rows are computed: the gradient of the bias is their sum.
    """
    heads = sorted({0, case["H"] - 1})

    def part(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, heads]

    q, k, v, bias, dout = (
        part(getattr(inputs, name)).double() for name in ("q", "k", "v", "bias", "dout")
    )
    scale = case["D"] ** -0.5
    out, dq, dk, dv = (torch.empty_like(q) for _ in range(4))
    dbias = torch.zeros_like(bias)
    step = max(1, _BLOCK_SCORES // (case["B"] * len(heads) * case["N"] ** 2))
    for start in range(0, case["N"], step):
        rows = (slice(None), slice(None), slice(start, start + step))
        scores = q[rows] @ k[rows].mT * scale + bias[:, :, None]
        scores.masked_fill_(inputs.mask[:, None, start : start + step, None], -torch.inf)
        probs = torch.softmax(scores, -1)
        out[rows] = probs @ v[rows]
        if not gradients:
            continue
        delta = (dout[rows] * out[rows]).sum(-1, keepdim=True)
        dscores = probs * (dout[rows] @ v[rows].mT - delta)
        dq[rows], dk[rows] = dscores @ k[rows] * scale, dscores.mT @ q[rows] * scale
        dv[rows] = probs.mT @ dout[rows]
        dbias += dscores.sum(2)
    limit = error_limit(case.dtype)
    expected = [Expected("out", out, part, limit)]
    if gradients:
        grads = {"dq": dq, "dk": dk, "dv": dv, "dbias": dbias}
        expected += [Expected(name, grad, part, 2 * limit) for name, grad in grads.items()]
    return expected


def flops(case: Case, pass_: str) -> float | None:
    """Count two products of D multiplications and additions for each unmasked score."""
    forward = 4 * case["B"] * case["H"] * case["N"] ** 2 * seen_keys(case) * case["D"]
    return {"forward": forward, "backward": _BACKWARD_FLOPS * forward}.get(pass_)


def traffic(case: Case, pass_: str) -> float:
    """Count the bytes that must be read and written once; lse and mask are left out."""
    pairs = case["B"] * case["H"] * case["N"] ** 2
    # q k v out and the bias; backward: q k v out dout dq dk dv, the bias and its gradient
    tensors, biases = (8, 2) if pass_ == "backward" else (4, 1)
    return pairs * (tensors * case["D"] + biases) * case.dtype.itemsize


def _leaves(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return tuple(leaf(tensor, wants_grad(case)) for tensor in inputs[:4])


# Of an H200: exponentials a second, bf16 multiplications and additions, and bytes.
_EXPONENTIALS, _FLOPS, _BYTES = 132 * 16 * 1.98e9, 790e12, 4.3e12
_PRODUCTS = {"forward": 2, "backward": 5}


def floor(case: Case, pass_: str) -> float | None:
    """Return the milliseconds that an H200 needs for the exponentials, products or bytes alone."""
    if pass_ not in _PRODUCTS:
        return None
    scores = case["B"] * case["H"] * case["N"] ** 2 * seen_keys(case)
    products = 2 * _PRODUCTS[pass_] * scores * max(case["D"], 16) / _FLOPS
    return 1e3 * max(scores / _EXPONENTIALS, products, traffic(case, pass_) / _BYTES)


def _ours(backend: str, deterministic: bool, case: Case, inputs: Inputs) -> Call:
    from attn_triangle import triangle_attention

    leaves = _leaves(case, inputs)
    mask = inputs.mask if case["masked"] else None
    options = {"backend": backend, "deterministic": deterministic}
    return Call(lambda: triangle_attention(*leaves, mask, **options), leaves, inputs.dout)


# What is compiled apart: the forward pass, or the gradients of the backward pass.
_PARTS = {
    "hopper": ("forward", "dq dbias", "dk_dv"),
    "triton": ("forward", "dq dk_dv dbias"),
}


def _our_kernels(backend: str, case: Case) -> Tasks:
    is_short = case["N"] <= 128  # both backends have other kernels for it, and the same
    kind = (case["D"], bool(case["masked"]), is_short)
    return {
        (backend, part, *kind): functools.partial(_compile_ours, backend, part, case)
        for part in _PARTS["triton" if is_short else backend]
    }


def _compile_ours(backend: str, part: str, case: Case, inputs: Inputs) -> None:
    from attn_triangle import ops

    q, k, v, bias, mask, dout = inputs
    given = (q, k, v, bias, mask if case["masked"] else None)
    static = (case["D"] ** -0.5, "mean")
    if part == "forward":
        ops.attention(*given, *static, True, backend)
        return
    out, lse = dout, torch.zeros(q.shape[:-1], device=q.device)
    ops.attention_backward(dout, None, *given, out, lse, *static, part, True, backend)


def _sdpa(case: Case, inputs: Inputs) -> Call:
    """Torch with the bias written out for every row, as without a fused kernel."""
    leaves = _leaves(case, inputs)

    def forward() -> torch.Tensor:
        q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in leaves[:3])
        bias = leaves[3][:, None].expand(-1, case["N"], -1, -1, -1)
        bias = bias.masked_fill(inputs.mask[:, :, None, None], -torch.inf).flatten(0, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.unflatten(0, (case["B"], case["N"])).transpose(1, 2)

    return Call(forward, leaves, inputs.dout, context=_sdpa_context(inputs.q.device))


def _sdpa_context(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cuda":
        return contextlib.nullcontext
    # cuDNN's backward gives NaN for some lengths when a mask is passed.
    return functools.partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION)


# For each configuration that trifast tries at the first call: a sixth of what it would take.
_TUNING_MILLISECONDS = 20
_TUNING_REPEATS = 20
_TUNING_PARTS = 4


def _trifast(case: Case, inputs: Inputs) -> Call:
    from trifast import triangle_attention

    for tuner in _trifast_tuners():
        tuner.do_bench = _run_briefly
    leaves = _leaves(case, inputs)
    return Call(lambda: triangle_attention(*leaves, inputs.mask), leaves, inputs.dout)


def _trifast_tuners() -> list[Any]:
    from trifast import triton as kernels

    return [kernels._fwd, kernels._bwd_q, kernels._bwd_kv, kernels._bwd_b]


def _trifast_kernels(case: Case) -> Tasks:
    bucket = (case["N"] - 1).bit_length()  # its kernels are compiled for a power of two
    return {
        ("trifast", bucket, case["D"], part): functools.partial(_compile_trifast, part, case)
        for part in range(_TUNING_PARTS)
    }


def _compile_trifast(part: int, case: Case, inputs: Inputs) -> None:
    """Compile some of the configurations that it will try, without a choice among them."""
    from trifast import triangle_attention

    tuners = _trifast_tuners()
    all_configs = [tuner.configs for tuner in tuners]
    for tuner in tuners:
        tuner.cache.clear()
        tuner.do_bench = _run_once
        tuner.configs = tuner.configs[part::_TUNING_PARTS]
    try:
        leaves = _leaves(case, inputs)
        torch.autograd.grad(triangle_attention(*leaves, inputs.mask), leaves, inputs.dout)
    finally:
        for tuner, configs in zip(tuners, all_configs, strict=True):
            tuner.configs = configs


def _run_briefly(function: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    clock = timing.CudaClock(torch.device("cuda"))
    function()
    [once] = clock.samples(function, 1)
    repeats = max(1, min(_TUNING_REPEATS, int(_TUNING_MILLISECONDS / once)))
    median = statistics.median(clock.samples(function, repeats))
    return [median for _ in quantiles]


def _run_once(function: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    function()
    return [0.0 for _ in quantiles]


def _cuequivariance(case: Case, inputs: Inputs) -> Call:
    # Below this length it computes by plain torch without saying so.
    os.environ["CUEQ_TRIATTN_FALLBACK_THRESHOLD"] = "0"
    from cuequivariance_torch import triangle_attention

    _require_cuequivariance_kernel(case)
    q, k, v = (leaf(tensor.transpose(1, 2), wants_grad(case)) for tensor in inputs[:3])
    bias = leaf(inputs.bias, wants_grad(case))
    keep = ~inputs.mask[:, :, None, None]  # [B, N, 1, 1, N]
    return Call(
        lambda: triangle_attention(q, k, v, bias[:, None], keep),
        (q, k, v, bias),
        inputs.dout.transpose(1, 2).contiguous(),
        canonical=lambda tensor: tensor.transpose(1, 2) if tensor.dim() == 5 else tensor,
    )


def _require_cuequivariance_kernel(case: Case) -> None:
    divisor, widest = (4, 32) if case.dtype == torch.float32 else (8, 128)
    if case["D"] % divisor or case["D"] > widest:
        raise UnsupportedProblemError(
            f"its kernel takes head dims to {widest} in steps of {divisor}; it would run torch"
        )


def _own_provider(backend: str, name: str, deterministic: bool) -> Provider:
    return Provider(
        name,
        functools.partial(_ours, backend, deterministic),
        "ours",
        "attn_triangle",
        compiles=functools.partial(_our_kernels, backend),
    )


SUBJECT = Subject(
    package="attn-triangle",
    providers=(
        _own_provider("hopper", "hopper", deterministic=False),
        _own_provider("hopper", "hopper-det", deterministic=True),
        _own_provider("triton", "triton", deterministic=True),
        Provider(
            "torch",
            functools.partial(_ours, "torch", True),
            "ours",
            "attn_triangle",
            devices=("cpu", "cuda"),
            compiles=nothing_compiled,
        ),
        Provider("sdpa", _sdpa, devices=("cpu", "cuda"), compiles=nothing_compiled),
        Provider(
            "trifast",
            _trifast,
            module="trifast",
            distribution="trifast",
            compiles=_trifast_kernels,
        ),
        Provider(
            "cuequivariance",
            _cuequivariance,
            module="cuequivariance_torch",
            distribution="cuequivariance-torch",
            compiles=nothing_compiled,
        ),
    ),
    make_inputs=make_inputs,
    reference=reference,
    flops=flops,
    traffic=traffic,
    x_axis="N",
    warm=True,
    memory=True,
    floor=floor,
)
