"""The operators torch.compile, torch.export and opcheck see.

``attn_paged::attention`` reads a cache, ``attn_paged::append_to_cache`` writes to one in place.
Neither has a gradient: a cache serves a model that has been trained.
"""

from __future__ import annotations

from typing import Any

import torch

from attn_core import backends
from attn_core.dtypes import accumulator_dtype
from attn_core.errors import UnsupportedProblemError
from attn_core.library import Operator
from attn_paged.checks import describe_append, describe_attention
from attn_paged.options import AppendOptions, AttentionOptions, Rotary

ATTENTION = "attn_paged::attention"
APPEND = "attn_paged::append_to_cache"


def _attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    is_causal: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    batch_invariant: bool,
    shared_prefix: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = AttentionOptions(
        scale,
        (window_left, window_right),
        softcap,
        *(cu_seqlens_q, alibi_slopes, sinks, k_scale, v_scale, is_causal, tree_mask),
        batch_invariant,
        shared_prefix,
    )
    arguments = (q, k_cache, v_cache, block_tables, context_lens, options)
    if backend == backends.AUTO:  # only a compiled graph leaves the choice to this point
        problem = describe_attention(q, k_cache, v_cache, block_tables, options)
        backend = backends.resolve(ATTENTION, problem)
    return backends.implementation(ATTENTION, backend)(*arguments)  # type: ignore[no-any-return]


def _attention_fake(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _head_dim = q.shape
    out = q.new_empty((tokens, heads, v_cache.shape[3]))
    return out, q.new_empty((heads, tokens), dtype=accumulator_dtype(q.dtype))


def _append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    rotary_interleaved: bool,
    backend: str,
) -> None:
    rotary = None
    if rotary_cos is not None and rotary_sin is not None and positions is not None:
        rotary = Rotary(rotary_cos, rotary_sin, positions, rotary_interleaved)
    options = AppendOptions(k_scale, v_scale, rotary)
    if backend == backends.AUTO:
        backend = backends.resolve(APPEND, describe_append(k, v, k_cache))
    backends.implementation(APPEND, backend)(k, v, k_cache, v_cache, slot_mapping, options)


def _append_fake(*_: Any) -> None:
    return None


def _refuse_gradient(*_: Any) -> Any:
    raise UnsupportedProblemError(
        "a paged cache has no backward pass: call its operators under torch.no_grad()"
    )


attention = Operator(
    ATTENTION,
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor context_lens,"
    " Tensor? cu_seqlens_q, Tensor? alibi_slopes, Tensor? sinks, Tensor? k_scale, Tensor? v_scale,"
    " Tensor? is_causal, Tensor? tree_mask, float scale, int window_left, int window_right,"
    " float softcap, bool batch_invariant, bool shared_prefix, str backend) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
    autograd=_refuse_gradient,
)
append_to_cache = Operator(
    APPEND,
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping,"
    " Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor? rotary_cos, Tensor? rotary_sin,"
    " Tensor? positions, bool rotary_interleaved, str backend) -> ()",
    _append,
    _append_fake,
    autograd=_refuse_gradient,
)
