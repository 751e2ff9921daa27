"""The operators behind `flash_attn_with_kvcache`, as torch.compile and opcheck see them.

``attn_flash::append_to_kvcache`` writes to a cache in place, ``attn_flash::kvcache_attention``
reads it. Neither has a gradient: a cache serves a model that has been trained.
"""

from __future__ import annotations

from typing import Any

import torch

from attn_core import backends
from attn_core.dtypes import accumulator_dtype
from attn_core.errors import UnsupportedProblemError
from attn_core.library import Operator
from attn_flash import kvcache_checks
from attn_flash.kvcache_checks import Cache

ATTENTION = "attn_flash::kvcache_attention"
APPEND = "attn_flash::append_to_kvcache"

_ROTARY = "Tensor? rotary_cos, Tensor? rotary_sin, bool interleaved"
_CACHE = "Tensor? seqlens, SymInt length, Tensor? batch_idx, Tensor? leftpad, Tensor? block_table"


def _append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    interleaved: bool,
    *rest: Any,
) -> None:
    *where, backend = rest
    cache = Cache(*where)
    if backend == backends.AUTO:  # only a compiled graph leaves the choice to this point
        problem = kvcache_checks.describe(k, k_cache, v_cache, k, cache.block_table, rotary_cos)
        backend = backends.resolve(APPEND, problem)
    compute = backends.implementation(APPEND, backend)
    compute(k, v, k_cache, v_cache, rotary_cos, rotary_sin, interleaved, cache)


def _append_fake(*_: Any) -> None:
    return None


def _attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    interleaved: bool,
    seqlens: torch.Tensor | None,
    length: int,
    batch_idx: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    new: int,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    window = (window_left, window_right)
    if backend == backends.AUTO:
        problem = kvcache_checks.describe(
            q, k_cache, v_cache, None, block_table, rotary_cos, window, softcap
        )
        backend = backends.resolve(ATTENTION, problem)
    return backends.implementation(ATTENTION, backend)(  # type: ignore[no-any-return]
        q,
        k_cache,
        v_cache,
        rotary_cos,
        rotary_sin,
        interleaved,
        Cache(seqlens, length, batch_idx, leftpad, block_table),
        alibi_slopes,
        new,
        scale,
        window,
        softcap,
        num_splits,
    )


def _attention_fake(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, len_q, heads, _head_dim = q.shape
    out = q.new_empty((batch, len_q, heads, v_cache.shape[3]))
    return out, q.new_empty((batch, heads, len_q), dtype=accumulator_dtype(q.dtype))


def _refuse_gradient(*_: Any) -> Any:
    raise UnsupportedProblemError(
        "attention with a KV cache has no backward pass: call its operators under torch.no_grad()"
    )


append = Operator(
    APPEND,
    f"(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, {_ROTARY}, {_CACHE},"
    " str backend) -> ()",
    _append,
    _append_fake,
    autograd=_refuse_gradient,
)
attention = Operator(
    ATTENTION,
    f"(Tensor q, Tensor k_cache, Tensor v_cache, {_ROTARY}, {_CACHE}, Tensor? alibi_slopes,"
    " SymInt new, float scale, SymInt window_left, SymInt window_right, float softcap,"
    " int num_splits, str backend) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
    autograd=_refuse_gradient,
)
