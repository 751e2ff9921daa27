"""attn-flash's flash_attn_with_kvcache: one query a sequence over a dense cache."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.problems import Case
from benchmarks.providers.base import Call, Expected, Provider, Subject, error_limit

_CHECKED_SEQUENCES = 4


class Inputs(NamedTuple):
    """q (B, M, H, D), caches (B, N, H_KV, D), lens (B,)."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    lens: torch.Tensor


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw random inputs."""
    generator = torch.Generator(device).manual_seed(case.seed)
    cache = (case["B"], case["N"], case["H_KV"], case["D"])
    q, k_cache, v_cache = (
        torch.randn(shape, dtype=case.dtype, device=device, generator=generator)
        for shape in ((case["B"], case["M"], case["H"], case["D"]), cache, cache)
    )
    lens = torch.full((case["B"],), case["N"], dtype=torch.int32, device=device)
    return Inputs(q, k_cache, v_cache, lens)


def reference(case: Case, inputs: Inputs, gradients: bool) -> list[Expected]:
    """Attention of the first sequences, in float64."""
    chosen = slice(0, _CHECKED_SEQUENCES)
    group = case["H"] // case["H_KV"]
    q = inputs.q[chosen].double().unflatten(2, (case["H_KV"], group))
    k, v = (cache[chosen].double() for cache in inputs[1:3])
    scores = torch.einsum("bmhgd,bnhd->bmhgn", q, k) * case["D"] ** -0.5
    out = torch.einsum("bmhgn,bnhd->bmhgd", torch.softmax(scores, -1), v).flatten(2, 3)
    return [Expected("out", out, lambda tensor: tensor[chosen], error_limit(case.dtype))]


def flops(case: Case, pass_: str) -> float | None:
    """Count two products of D multiplications and additions for each query head and key."""
    return 4 * case["B"] * case["M"] * case["N"] * case["H"] * case["D"]


def traffic(case: Case, pass_: str) -> float:
    """Count the bytes of the keys and values, of q and of the output."""
    keys = 2 * case["N"] * case["H_KV"]
    return case["B"] * (keys + 2 * case["M"] * case["H"]) * case["D"] * case.dtype.itemsize


def _ours(backend: str, case: Case, inputs: Inputs) -> Call:
    from attn_flash import flash_attn_with_kvcache

    q, k_cache, v_cache, lens = inputs
    return Call(
        lambda: flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lens, backend=backend)
    )


def _sdpa(case: Case, inputs: Inputs) -> Call:
    """Torch, told by the shapes alone that every slot holds a key."""
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])
    return Call(
        lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        canonical=lambda out: out.transpose(1, 2),
    )


def _backend(name: str, **options: Any) -> Provider:
    prepare = functools.partial(_ours, name)
    return Provider(name, prepare, "ours", "attn_flash", passes=("forward",), **options)


SUBJECT = Subject(
    package="attn-flash-kvcache",
    providers=(
        _backend("triton"),
        _backend("torch", devices=("cpu",), graph=False),
        Provider("sdpa", _sdpa, devices=("cpu", "cuda"), passes=("forward",)),
    ),
    make_inputs=make_inputs,
    reference=reference,
    flops=flops,
    traffic=traffic,
    x_axis="N",
    graph=True,
)
