"""The operators of attn-flash and attn-paged on torch tensors, as attn-core calls them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, TypeVar

import torch

from attn_vulkan import launch
from attn_vulkan.launch import Array
from attn_vulkan.problem import Problem
from attn_vulkan.runtime.context import open_context

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _by_way_of_the_host(function: _Function) -> _Function:
    """Copy the tensors of a call to the CPU and its results back, where no other way is known."""

    @functools.wraps(function)
    def call(q: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor | None, ...]:
        if not _needs_the_host(q.device):
            return function(q, *arguments)  # type: ignore[no-any-return]
        results = function(q.cpu(), *map(_on_host, arguments))
        return tuple(None if x is None else x.to(q.device) for x in results)

    return call  # type: ignore[return-value]


def _needs_the_host(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is not None


def _on_host(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.cpu()
    if hasattr(argument, "_replace"):
        return argument._replace(**{n: _on_host(x) for n, x in argument._asdict().items()})
    return argument


@_by_way_of_the_host
def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``attn_flash::attention`` with the options of that package."""
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)
    if options.cu_seqlens_q is not None:  # tokens may belong to no sequence
        out.zero_()
        lse.fill_(-torch.inf)
    arrays = _flash_arrays(options, q=q, k=k, v=v, out=out, lse=lse)
    _forward(q.device, _flash_problem(q, k, v, options, arrays), arrays, options.scale)
    return out, lse


@_by_way_of_the_host
def flash_attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs_dbias: bool,
    options: Any,
) -> tuple[torch.Tensor | None, ...]:
    """Compute ``attn_flash::attention_backward``: dq, dk, dv, no dbias, and dsinks."""
    new = torch.zeros_like if options.cu_seqlens_q is not None else torch.empty_like
    dq, dk, dv = (new(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
    tensors |= {"dq": dq, "dk": dk, "dv": dv}
    if dlse is not None:
        tensors["delta"] = dlse.float().clone(memory_format=torch.contiguous_format)
    arrays = _flash_arrays(options, **tensors)
    _backward(q.device, _flash_problem(q, k, v, options, arrays), arrays, options.scale)
    return dq, dk, dv, None, _sink_gradient(dout, dlse, out, lse, options.sinks)


@_by_way_of_the_host
def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``attn_paged::attention``: q (T, H, D) over blocks of keys and values."""
    tokens, heads, _ = q.shape
    out = q.new_empty((tokens, heads, v_cache.shape[3]))
    lse = q.new_empty((heads, tokens), dtype=torch.float32)
    if options.cu_seqlens_q is not None:  # tokens may belong to no sequence
        out.zero_()
        lse.fill_(-torch.inf)
    if not tokens or not len(context_lens):
        return out, lse
    arrays = _paged_arrays(q, k_cache, v_cache, out, lse, block_tables, context_lens, options)
    bounds = [0, 1] if options.cu_seqlens_q is None else options.cu_seqlens_q.tolist()
    problem = Problem(
        dtype=_dtype_name(q),
        batches=len(context_lens),
        len_q=max(end - start for start, end in pairwise(bounds)),
        len_k=int(context_lens.max()),
        heads=heads,
        heads_kv=k_cache.shape[2],
        head_dim=q.shape[2],
        head_dim_v=v_cache.shape[3],
        window=options.window,
        softcap=options.softcap,
        has_slopes="slopes" in arrays,
        has_sinks="sinks" in arrays,
        block_size=k_cache.shape[1],
        is_aligned=launch.are_aligned(arrays),
    )
    _forward(q.device, problem, arrays, options.scale)
    return out, lse


def _paged_arrays(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: Any,
) -> dict[str, Array]:
    """Packed sequences are rows of one batch; without cu_seqlens_q each token is its own batch."""
    is_ragged = options.cu_seqlens_q is not None
    where = 0 if is_ragged else 1
    tensors = {
        "q": q.unsqueeze(where),
        "k": k_cache,
        "v": v_cache,
        "out": out.unsqueeze(where),
        "lse": lse.unsqueeze(0) if is_ragged else lse.t().unsqueeze(2),
        "blocks": block_tables,
        "lens_k": context_lens.contiguous(),
    }
    if is_ragged:
        tensors["cu_q"] = options.cu_seqlens_q.contiguous()
    if options.alibi_slopes is not None:
        tensors["slopes"] = options.alibi_slopes.expand(len(context_lens), q.shape[1])
    if options.sinks is not None:
        tensors["sinks"] = options.sinks.float().contiguous()
    return _arrays(**tensors)


def _forward(
    device: torch.device, problem: Problem, arrays: Mapping[str, Array], scale: float
) -> None:
    if device.type == "cpu":
        launch.forward(open_context(), problem, arrays, scale)
    elif problem.batches * problem.heads * problem.len_q:
        _on_cuda(launch.record_forward, device, problem, arrays, scale)


def _backward(
    device: torch.device, problem: Problem, arrays: Mapping[str, Array], scale: float
) -> None:
    if device.type == "cpu":
        launch.backward(open_context(), problem, arrays, scale)
    else:
        _on_cuda(launch.record_backward, device, problem, arrays, scale)


def _on_cuda(
    record: Callable[..., Any],
    device: torch.device,
    problem: Problem,
    arrays: Mapping[str, Array],
    scale: float,
) -> None:
    """Run on the stream of the caller, who does not wait."""
    from attn_vulkan import cuda

    with (
        torch.cuda.device(device),
        cuda.placed(cuda.open_bridge(device), launch.spans(arrays)) as placement,
        placement.context.recording() as commands,
    ):
        tensors = launch.tensors_of(arrays, placement.address)
        record(placement.context, commands, problem, tensors, scale)
        placement.run(commands)


def _flash_arrays(options: Any, **tensors: torch.Tensor) -> dict[str, Array]:
    """Add the optional tensors; packed sequences become one batch of rows."""
    q, k = tensors["q"], tensors["k"]
    if options.cu_seqlens_q is not None:
        tensors = {
            name: x if options.block_table is not None and name in ("k", "v") else x.unsqueeze(0)
            for name, x in tensors.items()
        }
        tensors["cu_q"] = options.cu_seqlens_q.contiguous()
    batch, heads = _batches(q, options), q.shape[-2]
    if options.block_table is not None:
        tensors["blocks"] = options.block_table
        tensors["lens_k"] = options.seqused_k.contiguous()
    elif options.cu_seqlens_k is not None:
        tensors["cu_k"] = options.cu_seqlens_k.contiguous()
        if options.seqused_k is not None:
            tensors["lens_k"] = options.seqused_k.contiguous()
    if options.alibi_slopes is not None:
        tensors["slopes"] = options.alibi_slopes.expand(batch, heads)
    if options.sinks is not None:
        tensors["sinks"] = options.sinks.float().contiguous()
    bias = _bias(options, q.dtype)
    if bias is not None:
        tensors["bias"] = bias.expand(batch, heads, *options.lengths(q, k))
    return _arrays(**tensors)


def _flash_problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Any, arrays: Mapping[str, Array]
) -> Problem:
    len_q, len_k = options.lengths(q, k)
    return Problem(
        dtype=_dtype_name(q),
        batches=_batches(q, options),
        len_q=len_q,
        len_k=len_k,
        heads=q.shape[-2],
        heads_kv=k.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        window=options.window,
        softcap=options.softcap,
        has_bias="bias" in arrays,
        has_slopes="slopes" in arrays,
        has_sinks="sinks" in arrays,
        tokens=len(q) if "cu_q" in arrays else 0,
        block_size=k.shape[1] if "blocks" in arrays else 0,
        is_aligned=launch.are_aligned(arrays),
    )


def _batches(q: torch.Tensor, options: Any) -> int:
    return len(q) if options.cu_seqlens_q is None else len(options.cu_seqlens_q) - 1


def _bias(options: Any, dtype: torch.dtype) -> torch.Tensor | None:
    """The bias and the mask of keys as one sum of four dimensions."""
    mask = options.key_mask
    parts = [options.attn_bias, None if mask is None else mask[:, None, None, :]]
    added = [
        torch.zeros_like(part, dtype=dtype).masked_fill_(~part, -torch.inf)
        if part.dtype == torch.bool
        else part.to(dtype)
        for part in parts
        if part is not None
    ]
    return sum(added[1:], added[0]) if added else None


def _sink_gradient(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor | None:
    """A sink takes weight from every key and has no value: -sum_i p_i (dout_i out_i - dlse_i)."""
    if sinks is None:
        return None
    weights = torch.exp(sinks.float()[:, None] - lse)
    delta = (dout.float() * out.float()).sum(-1).transpose(-1, -2)
    if dlse is not None:
        delta = delta - dlse
    per_query = (weights * delta).masked_fill(lse == -torch.inf, 0.0)
    return -per_query.transpose(-1, -2).flatten(0, -2).sum(0).to(sinks.dtype)


def _arrays(**tensors: torch.Tensor) -> dict[str, Array]:
    return {
        name: Array(
            tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.element_size(), tensor
        )
        for name, tensor in tensors.items()
    }


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
