"""attn-paged: one query a sequence over a cache of blocks."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from attn_core import UnsupportedProblemError
from benchmarks.problems import Case
from benchmarks.providers.base import Call, Expected, Provider, Subject, error_limit

_CHECKED_SEQUENCES = 4
_WORKSPACE_BYTES = 128 << 20


class Inputs(NamedTuple):
    """q (B, H, D), caches (blocks, block, H_KV, D), tables (B, blocks of a sequence), lens (B,)."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor


def lengths(case: Case) -> list[int]:
    """Return the number of keys of each sequence."""
    if not case["ragged"]:
        return [case["N"]] * case["B"]
    generator = torch.Generator().manual_seed(case.seed)
    return torch.randint(1, case["N"] + 1, (case["B"],), generator=generator).tolist()


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw random inputs whose blocks lie in the cache in random order."""
    generator = torch.Generator(device).manual_seed(case.seed)
    row = math.ceil(case["N"] / case["block"])
    blocks = case["B"] * row
    cache = (blocks, case["block"], case["H_KV"], case["D"])
    q, k_cache, v_cache = (
        torch.randn(shape, dtype=case.dtype, device=device, generator=generator)
        for shape in ((case["B"], case["H"], case["D"]), cache, cache)
    )
    order = torch.randperm(blocks, device=device, generator=generator, dtype=torch.int32)
    lens = torch.tensor(lengths(case), dtype=torch.int32, device=device)
    return Inputs(q, k_cache, v_cache, order.view(case["B"], row), lens)


def reference(case: Case, inputs: Inputs, gradients: bool) -> list[Expected]:
    """Attention of some sequences over their gathered keys, in float64."""
    batch = case["B"]
    step = max(1, (batch - 1) // (_CHECKED_SEQUENCES - 1))
    chosen = sorted({*range(0, batch, step), batch - 1})
    group = case["H"] // case["H_KV"]
    outs = []
    for b in chosen:
        q = inputs.q[b].double().unflatten(0, (case["H_KV"], group))  # [H_KV, G, D]
        k, v = (_gather(cache, inputs, b).double() for cache in inputs[1:3])  # [N, H_KV, D]
        scores = torch.einsum("hgd,nhd->hgn", q, k) * case["D"] ** -0.5
        outs.append(torch.einsum("hgn,nhd->hgd", torch.softmax(scores, -1), v).flatten(0, 1))
    out = torch.stack(outs)
    return [Expected("out", out, lambda tensor: tensor[chosen], error_limit(case.dtype))]


def flops(case: Case, pass_: str) -> float | None:
    """Count two products of D multiplications and additions for each query head and key."""
    return 4 * sum(lengths(case)) * case["H"] * case["D"]


def traffic(case: Case, pass_: str) -> float:
    """Count the bytes of the keys and values in use, of q and of the output."""
    keys = 2 * sum(lengths(case)) * case["H_KV"] * case["D"]
    return (keys + 2 * case["B"] * case["H"] * case["D"]) * case.dtype.itemsize


def _gather(cache: torch.Tensor, inputs: Inputs, b: int) -> torch.Tensor:
    rows = cache[inputs.block_tables[b].long()].flatten(0, 1)
    return rows[: int(inputs.context_lens[b])]


def _ours(backend: str, case: Case, inputs: Inputs) -> Call:
    from attn_paged import paged_attention

    return Call(lambda: paged_attention(*inputs, backend=backend))


def _contiguous(case: Case, inputs: Inputs) -> Call:
    """Torch over the same keys lying one after the other: what paging costs, at best nothing."""
    if case["ragged"]:
        raise UnsupportedProblemError("sequences of unequal length do not fit one dense tensor")
    k, v = (
        cache[inputs.block_tables.long()].flatten(1, 2)[:, : case["N"]].transpose(1, 2)
        for cache in inputs[1:3]
    )
    q = inputs.q[:, :, None]  # [B, H, 1, D]
    return Call(
        lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        canonical=lambda out: out[:, :, 0],
    )


def _flashinfer(case: Case, inputs: Inputs) -> Call:
    import flashinfer

    lens = torch.tensor(lengths(case))
    used = torch.ceil(lens / case["block"]).int()  # blocks of each sequence
    indptr = F.pad(used.cumsum(0), (1, 0)).int()
    indices = torch.cat([row[:n] for row, n in zip(inputs.block_tables, used, strict=True)])
    last = (lens - (used - 1) * case["block"]).int()
    device = inputs.q.device
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    heads = (case["H"], case["H_KV"], case["D"], case["block"])
    wrapper.plan(
        *(tensor.to(device) for tensor in (indptr, indices, last)),
        *heads,
        q_data_type=case.dtype,
        kv_data_type=case.dtype,
    )
    return Call(lambda: wrapper.run(inputs.q, inputs[1:3]))


def _xqa(case: Case, inputs: Inputs) -> Call:
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.q.device)
    return Call(
        lambda: xqa_batch_decode_with_kv_cache(
            inputs.q,
            inputs[1:3],
            workspace,
            inputs.block_tables,
            inputs.context_lens,
            case["N"],
            bmm1_scale=case["D"] ** -0.5,
            bmm2_scale=1.0,
            kv_layout="NHD",
        )
    )


def _aule(case: Case, inputs: Inputs) -> Call:
    from aule import flash_attention_paged_amd

    return Call(lambda: flash_attention_paged_amd(*inputs))


def _backend(name: str, **options: Any) -> Provider:
    prepare = functools.partial(_ours, name)
    return Provider(name, prepare, "ours", "attn_paged", passes=("forward",), **options)


def _peer(name: str, prepare: Any, module: str, distribution: str, **options: Any) -> Provider:
    return Provider(name, prepare, "peer", module, distribution, passes=("forward",), **options)


SUBJECT = Subject(
    package="attn-paged",
    providers=(
        _backend("triton"),
        _backend("torch", devices=("cpu",), graph=False),
        _backend("torch", optional=True, graph=False),
        Provider("contiguous", _contiguous, "bound", devices=("cpu", "cuda")),
        _peer("flashinfer", _flashinfer, "flashinfer", "flashinfer-python"),
        _peer("xqa", _xqa, "flashinfer", "flashinfer-python"),
        _peer("aule", _aule, "aule", "aule-attention", graph=False),
    ),
    make_inputs=make_inputs,
    reference=reference,
    flops=flops,
    traffic=traffic,
    x_axis="N",
    graph=True,
)
