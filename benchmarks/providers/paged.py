"""attn-paged: one query a sequence over a cache of blocks."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from attn_core import UnsupportedProblemError
from benchmarks.problems import Case
from benchmarks.providers.base import (
    Call,
    Expected,
    Provider,
    Subject,
    error_limit,
    nothing_compiled,
)

_CHECKED_SEQUENCES = 4
_WORKSPACE_BYTES = 128 << 20
_VLLM_SEGMENTS = 16  # of a sequence, and the programs below which vLLM cuts one into them
_VLLM_PROGRAMS = 128
_MOST_AULE_KEYS = 2**17  # of all sequences: 4 ms
_MOST_COMPILED_FOR = {"B": 64, "N": 8192}  # for more the same kernels run
_PASSES = ("forward", "host")


class Inputs(NamedTuple):
    """q (T, H, D), caches (blocks, block, H_KV, D), tables (B, blocks of a sequence), lens (B,)."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


def lengths(case: Case) -> list[int]:
    """Return the number of keys of each sequence."""
    if not case["ragged"]:
        return [case["N"]] * case["B"]
    generator = torch.Generator().manual_seed(case.seed)
    return torch.randint(1, case["N"] + 1, (case["B"],), generator=generator).tolist()


def query_lengths(case: Case) -> list[int]:
    """Return the number of queries of each sequence: the first ones prefill, the others decode."""
    return [case["N"]] * case["prefills"] + [1] * (case["B"] - case["prefills"])


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw random inputs whose blocks lie in the cache in random order."""
    generator = torch.Generator(device).manual_seed(case.seed)
    row = math.ceil(case["N"] / case["block"])
    blocks = case["B"] * row
    cache = (blocks, case["block"], case["H_KV"], case["D"])
    q, k_cache, v_cache = (
        torch.randn(shape, dtype=case.dtype, device=device, generator=generator)
        for shape in ((sum(query_lengths(case)), case["H"], case["D"]), cache, cache)
    )
    order = torch.randperm(blocks, device=device, generator=generator, dtype=torch.int32)
    tables = order.view(case["B"], row)
    shared = case["prefix"] // case["block"]
    tables[:, :shared] = tables[0, :shared].clone()
    lens = torch.tensor(lengths(case), dtype=torch.int32, device=device)
    if case["latent"]:
        v_cache = k_cache[..., : case["latent"]]
    inputs = Inputs(q, k_cache, v_cache, tables, lens)
    if case["prefills"]:
        bounds = torch.tensor([0, *query_lengths(case)], device=device).cumsum(0).int()
        inputs = inputs._replace(cu_seqlens_q=bounds)
    return _quantised(inputs, case["cache"]) if case["cache"] else inputs


def _quantised(inputs: Inputs, name: str) -> Inputs:
    """The same with caches of another dtype and scales for each token and head."""
    from attn_paged import append_to_cache

    dtype = getattr(torch, name)
    k_cache, v_cache = inputs.k_cache, inputs.v_cache
    caches = [torch.empty_like(cache, dtype=dtype) for cache in (k_cache, v_cache)]
    scales = [torch.empty(k_cache.shape[:3], device=k_cache.device) for _ in caches]
    slots = torch.arange(k_cache.shape[0] * k_cache.shape[1], device=k_cache.device)
    rows = [cache.flatten(0, 1) for cache in (k_cache, v_cache)]
    append_to_cache(*rows, *caches, slots, k_scale=scales[0], v_scale=scales[1])
    return inputs._replace(
        k_cache=caches[0], v_cache=caches[1], k_scale=scales[0], v_scale=scales[1]
    )


def reference(case: Case, inputs: Inputs, gradients: bool) -> list[Expected]:
    """Attention of some sequences over their gathered keys, in float64."""
    batch = case["B"]
    step = max(1, (batch - 1) // (_CHECKED_SEQUENCES - 1))
    chosen = sorted({*range(0, batch, step), batch - 1})
    group = case["H"] // case["H_KV"]
    last = torch.tensor(query_lengths(case)).cumsum(0) - 1  # the newest query of each sequence
    outs = []
    for b in chosen:
        q = inputs.q[last[b]].double().unflatten(0, (case["H_KV"], group))  # [H_KV, G, D]
        k = _gather(inputs.k_cache, inputs.k_scale, inputs, b)  # [N, H_KV, D]
        v = _gather(inputs.v_cache, inputs.v_scale, inputs, b)
        scores = torch.einsum("hgd,nhd->hgn", q, k) * case["D"] ** -0.5
        outs.append(torch.einsum("hgn,nhd->hgd", torch.softmax(scores, -1), v).flatten(0, 1))
    out = torch.stack(outs)
    rows = last[chosen].tolist()
    return [Expected("out", out, lambda tensor: tensor[rows], error_limit(case.dtype))]


def flops(case: Case, pass_: str) -> float | None:
    """Count the multiplications and additions of both products for each head and visible key."""
    pairs = sum(
        len_q * len_k - len_q * (len_q - 1) / 2
        for len_q, len_k in zip(query_lengths(case), lengths(case), strict=True)
    )
    return 2 * pairs * case["H"] * (case["D"] + (case["latent"] or case["D"]))


def traffic(case: Case, pass_: str) -> float:
    """Count the bytes of the keys and values in use, of q and of the output."""
    rows = 1 if case["latent"] else 2  # of a token
    size = getattr(torch, case["cache"]).itemsize if case["cache"] else case.dtype.itemsize
    tokens = sum(lengths(case)) - case["prefix"] * (case["B"] - 1)
    scales = 8 * case["H_KV"] if case["cache"] else 0
    keys = tokens * (rows * case["H_KV"] * case["D"] * size + scales)
    width = case["D"] + (case["latent"] or case["D"])  # of a query and its output
    return keys + sum(query_lengths(case)) * case["H"] * width * case.dtype.itemsize


def _gather(
    cache: torch.Tensor, scale: torch.Tensor | None, inputs: Inputs, b: int
) -> torch.Tensor:
    blocks = inputs.block_tables[b].long()
    rows = cache[blocks].double()
    if scale is not None:
        rows = rows * scale[blocks].double()[..., None]
    return rows.flatten(0, 1)[: int(inputs.context_lens[b])]


def _ours(backend: str, case: Case, inputs: Inputs) -> Call:
    from attn_paged import paged_attention

    options = inputs._asdict() | {"backend": backend, "shared_prefix": case["prefix"] > 0}
    return Call(lambda: paged_attention(**options))


def _plain(case: Case, inputs: Inputs) -> Call:
    """Ours without what the case is about: every prefix read, or keys that are not quantised."""
    from attn_paged import paged_attention

    if not case["cache"] and not case["prefix"]:
        raise UnsupportedProblemError("the case is plain")
    options = inputs._asdict() | {"k_scale": None, "v_scale": None}
    for name in ("k", "v") if case["cache"] else ():
        numbers = inputs._asdict()[f"{name}_cache"].float()
        numbers *= inputs._asdict()[f"{name}_scale"][..., None]
        options[f"{name}_cache"] = numbers.to(case.dtype)
    return Call(lambda: paged_attention(**options))


def _contiguous(case: Case, inputs: Inputs) -> Call:
    """Torch over the same keys lying one after the other: what paging costs, at best nothing."""
    if case["ragged"] or case["prefills"]:
        raise UnsupportedProblemError("sequences of unequal length do not fit one dense tensor")
    if case["cache"] or case["latent"]:
        raise UnsupportedProblemError("keys are neither dequantised nor taken for values")
    k, v = (
        cache[inputs.block_tables.long()].flatten(1, 2)[:, : case["N"]].transpose(1, 2)
        for cache in inputs[1:3]
    )
    q = inputs.q[:, :, None]  # [B, H, 1, D]
    return Call(
        lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        canonical=lambda out: out[:, :, 0],
    )


def _require_decoding(case: Case) -> None:
    if case["prefills"] or case["cache"]:
        raise UnsupportedProblemError("only decoding from a cache of q's dtype is compared")


def _require_own_values(case: Case) -> None:
    _require_decoding(case)
    if case["latent"]:
        raise UnsupportedProblemError("values lie in a cache of their own")


def _pages(case: Case, inputs: Inputs) -> list[torch.Tensor]:
    """Blocks as FlashInfer lists them: where each sequence's begin, all ids, keys of the last."""
    lens = torch.tensor(lengths(case))
    used = torch.ceil(lens / case["block"]).int()  # blocks of each sequence
    indptr = F.pad(used.cumsum(0), (1, 0)).int()
    indices = torch.cat([row[:n] for row, n in zip(inputs.block_tables, used, strict=True)])
    last = (lens - (used - 1) * case["block"]).int()
    return [tensor.to(inputs.q.device) for tensor in (indptr, indices, last)]


def _flashinfer(case: Case, inputs: Inputs, plans_each_call: bool = False) -> Call:
    import flashinfer

    _require_decoding(case)
    if case["latent"]:
        return _flashinfer_latent(case, inputs)
    pages = _pages(case, inputs)
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    heads = (case["H"], case["H_KV"], case["D"], case["block"])
    dtypes = {"q_data_type": case.dtype, "kv_data_type": case.dtype}
    wrapper.plan(*pages, *heads, **dtypes)

    def attend() -> torch.Tensor:
        if plans_each_call:
            wrapper.plan(*pages, *heads, **dtypes)
        return wrapper.run(inputs.q, inputs[1:3])

    return Call(attend)


def _flashinfer_planned(case: Case, inputs: Inputs) -> Call:
    """Plan for the lengths of every batch, as serving has to; on the host, so not in a graph."""
    if not case["ragged"]:
        raise UnsupportedProblemError("only ragged batches are planned in each call")
    return _flashinfer(case, inputs, plans_each_call=True)


def _flashinfer_latent(case: Case, inputs: Inputs) -> Call:
    import flashinfer

    device, value = inputs.q.device, case["latent"]
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace, backend="fa2")
    indptr, indices, _ = _pages(case, inputs)
    queries = torch.arange(case["B"] + 1, dtype=torch.int32, device=device)
    wrapper.plan(
        *(queries, indptr, indices, inputs.context_lens),
        *(case["H"], value, case["D"] - value, case["block"]),
        *(False, case["D"] ** -0.5, case.dtype, case.dtype),
    )
    parts = [
        tensor.squeeze(2) for tensor in (inputs.k_cache[..., :value], inputs.k_cache[..., value:])
    ]
    q_parts = (inputs.q[..., :value], inputs.q[..., value:])
    return Call(lambda: wrapper.run(*q_parts, *parts))


def _xqa(case: Case, inputs: Inputs) -> Call:
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    _require_own_values(case)
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


def _vllm(case: Case, inputs: Inputs) -> Call:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    if case["latent"]:
        raise UnsupportedProblemError("its kernel is not made for keys of 576 numbers")
    q, k, v, tables, lens, bounds, k_scale, v_scale = inputs
    device = q.device
    if bounds is None:
        bounds = torch.arange(case["B"] + 1, dtype=torch.int32, device=device)
    modes = {
        "": KVQuantMode.NONE,
        "float8_e4m3fn": KVQuantMode.FP8_PER_TOKEN_HEAD,
        "int8": KVQuantMode.INT8_PER_TOKEN_HEAD,
    }
    most = _VLLM_PROGRAMS // case["H_KV"]  # sequences that it cuts into segments
    segments = torch.empty((2, most, case["H"], _VLLM_SEGMENTS), device=device)
    outputs = torch.empty((*segments.shape[1:], case["D"]), device=device)
    out = torch.empty_like(q)

    def attend() -> torch.Tensor:
        unified_attention(
            *(q, k, v, out, bounds, max(query_lengths(case)), lens, case["N"]),
            *(case["D"] ** -0.5, True, (-1, -1), tables, 0.0, None, None, None),
            seq_threshold_3D=most,
            num_par_softmax_segments=_VLLM_SEGMENTS,
            softmax_segm_output=outputs,
            softmax_segm_max=segments[0],
            softmax_segm_expsum=segments[1],
            kv_quant_mode=modes[case["cache"]],
            k_scale_cache=k_scale,
            v_scale_cache=v_scale,
        )
        return out

    return Call(attend)


def _aule(case: Case, inputs: Inputs) -> Call:
    from aule.triton_flash_amd import flash_attention_paged_amd  # plain Triton, on any GPU

    _require_own_values(case)
    if case["B"] * case["N"] > _MOST_AULE_KEYS:
        raise UnsupportedProblemError("one call would take as long as all others together")
    return Call(lambda: flash_attention_paged_amd(*inputs[:5]))


def _kind(case: Case) -> tuple[Any, ...]:
    """What kernels are compiled for."""
    largest = {name: min(case[name], most) for name, most in _MOST_COMPILED_FOR.items()}
    return case.dtype, *sorted({**case.sizes, **largest}.items())


def _backend(name: str, **options: Any) -> Provider:
    prepare = functools.partial(_ours, name)
    return Provider(name, prepare, "ours", "attn_paged", passes=_PASSES, kind_of=_kind, **options)


def _peer(name: str, prepare: Any, module: str, distribution: str, **options: Any) -> Provider:
    return Provider(
        name, prepare, "peer", module, distribution, passes=_PASSES, kind_of=_kind, **options
    )


def _flashinfer_peer(name: str, prepare: Any, **options: Any) -> Provider:
    return _peer(
        *(name, prepare, "flashinfer", "flashinfer-python"),
        compiles=nothing_compiled,  # or by itself, on all cores
        **options,
    )


def _bound(name: str, prepare: Any, **options: Any) -> Provider:
    return Provider(name, prepare, "bound", compiles=nothing_compiled, **options)


SUBJECT = Subject(
    package="attn-paged",
    providers=(
        _backend("triton"),
        _backend("torch", devices=("cpu",), graph=False),
        _backend("torch", optional=True, graph=False),
        _bound("plain", _plain, passes=("forward",)),
        _bound("contiguous", _contiguous, devices=("cpu", "cuda")),
        _flashinfer_peer("flashinfer", _flashinfer),
        _flashinfer_peer("flashinfer-plan", _flashinfer_planned, graph=False),
        _flashinfer_peer("xqa", _xqa),
        _peer("vllm", _vllm, "vllm.v1.attention.ops.triton_unified_attention", "vllm"),
        _peer("aule", _aule, "aule", "aule-attention", graph=False),
    ),
    make_inputs=make_inputs,
    reference=reference,
    flops=flops,
    traffic=traffic,
    x_axis="N",
    graph=True,
    warm=True,
    warming_share=0.3,
)
