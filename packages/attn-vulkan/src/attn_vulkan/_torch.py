"""The operators of attn-flash and attn-paged on torch tensors, as attn-core calls them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from attn_vulkan import launch
from attn_vulkan.launch import Array
from attn_vulkan.problem import Problem
from attn_vulkan.runtime.context import open_context


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``attn_flash::attention``: q (B, M, H, D) over k, v (B, N, H_KV, D)."""
    batch, len_q, heads, _ = q.shape
    out = q.new_empty((batch, len_q, heads, v.shape[3]))
    lse = q.new_empty((batch, heads, len_q), dtype=torch.float32)
    arrays = _arrays(q=q, k=k, v=v, out=out, lse=lse)
    launch.forward(open_context(), _problem(q, k, v, window, arrays), arrays, scale)
    return out, lse


def flash_attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute ``attn_flash::attention_backward``."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
    tensors |= {"dq": dq, "dk": dk, "dv": dv}
    if dlse is not None:
        tensors["delta"] = dlse.float().clone(memory_format=torch.contiguous_format)
    arrays = _arrays(**tensors)
    launch.backward(open_context(), _problem(q, k, v, window, arrays), arrays, scale)
    return dq, dk, dv


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
    if not tokens:
        return out, lse
    cu_seqlens_q, alibi_slopes, sinks = (
        options.cu_seqlens_q,
        options.alibi_slopes,
        options.sinks,
    )
    is_ragged = cu_seqlens_q is not None
    # Packed sequences are rows of one batch; without cu_seqlens_q each token is its own batch.
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
    if cu_seqlens_q is not None:
        tensors["cu_q"] = cu_seqlens_q.contiguous()
    if alibi_slopes is not None:
        tensors["slopes"] = alibi_slopes.expand(len(context_lens), heads)
    if sinks is not None:
        tensors["sinks"] = sinks.float().contiguous()
    arrays = _arrays(**tensors)
    bounds = [0, 1] if cu_seqlens_q is None else cu_seqlens_q.tolist()
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
        has_slopes=alibi_slopes is not None,
        has_sinks=sinks is not None,
        block_size=k_cache.shape[1],
        is_aligned=launch.are_aligned(arrays),
    )
    launch.forward(open_context(), problem, arrays, options.scale)
    return out, lse


def _problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: tuple[int, int],
    arrays: Mapping[str, Array],
) -> Problem:
    batch, len_q, heads, head_dim = q.shape
    _, len_k, heads_kv, head_dim_v = v.shape
    return Problem(
        dtype=_dtype_name(q),
        batches=batch,
        len_q=len_q,
        len_k=len_k,
        heads=heads,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        window=window,
        is_aligned=launch.are_aligned(arrays),
    )


def _arrays(**tensors: torch.Tensor) -> dict[str, Array]:
    return {
        name: Array(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.element_size())
        for name, tensor in tensors.items()
    }


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
