"""The problems every backend of ``attn_paged::attention`` and ``append_to_cache`` must solve.

`attn_core.testing.conformance` runs them; nothing of the package imports this module.
"""

from __future__ import annotations

import functools
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from attn_core.testing.conformance import ConformanceCase
from attn_core.testing.inputs import random_tensor
from attn_paged import reference
from attn_paged.api import append_to_cache, paged_attention
from attn_paged.ops import APPEND, ATTENTION
from attn_paged.options import AppendOptions, AttentionOptions

_STALE = (-12345, 2**30)
_NUM_BLOCKS = 6
_REQUIRED = ("q", "k_cache", "v_cache", "block_tables", "context_lens")


class _Sizes(NamedTuple):
    """Keys and queries of each sequence, H, H_KV, D, D_v, block size, rows of no sequence."""

    lens_k: tuple[int, ...]
    lens_q: tuple[int, ...]
    heads: int = 4
    heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int = 64
    block_size: int = 16
    padding: int = 0

    def __str__(self) -> str:
        lens_q, lens_k = ("x".join(map(str, lens)) for lens in (self.lens_q, self.lens_k))
        padded = f"-padded{self.padding}" if self.padding else ""
        return (
            f"m{lens_q}-n{lens_k}-h{self.heads}-kv{self.heads_kv}-d{self.head_dim}"
            f"-dv{self.head_dim_v}-block{self.block_size}{padded}"
        )


def _make_attention(
    sizes: _Sizes, extras: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Caches full of NaN but for the sequences, and tables with stale entries past their ends."""
    block_tables, num_blocks = _make_tables(sizes)
    slots = (num_blocks, sizes.block_size, sizes.heads_kv)
    shapes = {
        "q": (sum(sizes.lens_q) + sizes.padding, sizes.heads, sizes.head_dim),
        "k_cache": (*slots, sizes.head_dim),
        "v_cache": (*slots, sizes.head_dim_v),
        "alibi_slopes": (sizes.heads,),
        "sinks": (sizes.heads,),
    }
    inputs = {
        name: random_tensor(
            shape,
            seed=f"{sizes}-{name}",
            dtype=torch.float32 if name == "alibi_slopes" else dtype,
            device=device,
        )
        for name, shape in shapes.items()
        if name in ("q", "k_cache", "v_cache", *extras)
    }
    is_used = torch.zeros(slots[:2], dtype=torch.bool)
    for table, length in zip(block_tables.tolist(), sizes.lens_k, strict=True):
        for position in range(length):
            is_used[table[position // sizes.block_size], position % sizes.block_size] = True
    for name in ("k_cache", "v_cache"):
        inputs[name][~is_used.to(device)] = torch.nan
    bounds = list(accumulate(sizes.lens_q, initial=0))
    return inputs | {
        "block_tables": block_tables.to(device),
        "context_lens": torch.tensor(sizes.lens_k, dtype=torch.int32, device=device),
        "cu_seqlens_q": torch.tensor(bounds, dtype=torch.int32, device=device),
    }


def _make_tables(sizes: _Sizes) -> tuple[torch.Tensor, int]:
    """Block tables that use the blocks of a cache backwards, and the number of blocks."""
    counts = [-(-length // sizes.block_size) for length in sizes.lens_k]
    stale = torch.tensor(_STALE, dtype=torch.int32)
    block_tables = stale.repeat(len(counts), max(counts, default=0) // 2 + 1)
    unused = sum(counts)
    for row, count in enumerate(counts):
        block_tables[row, :count] = torch.arange(unused, unused - count, -1)
        unused -= count
    return block_tables, sum(counts) + 1


def _attend(
    backend: str, *, options: dict[str, Any], cu_seqlens_q: torch.Tensor, **inputs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    is_decode = len(inputs["q"]) == len(inputs["context_lens"])
    result: tuple[torch.Tensor, torch.Tensor] = paged_attention(
        **inputs,
        **options,
        cu_seqlens_q=None if is_decode else cu_seqlens_q,
        return_lse=True,
        backend=backend,
    )
    return result


def _attention_reference(
    *, options: dict[str, Any], **inputs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = options.get("window_size", (-1, -1))
    q, k_cache, v_cache, block_tables, context_lens = (inputs.pop(name) for name in _REQUIRED)
    every_option = AttentionOptions(
        scale=q.shape[2] ** -0.5,
        window=(left, 0 if options.get("causal", True) else right),
        softcap=options.get("softcap", 0.0),
        **inputs,
    )
    return reference.attention(q, k_cache, v_cache, block_tables, context_lens, every_option)


def _attention_case(
    word: str, sizes: _Sizes, *extras: str, **options: float | bool | tuple[int, int]
) -> ConformanceCase:
    return ConformanceCase(
        op=ATTENTION,
        id=f"{word}-{sizes}",
        make_inputs=functools.partial(_make_attention, sizes, extras),
        call=functools.partial(_attend, options=options),
        reference=functools.partial(_attention_reference, options=options),
    )


def _make_append(
    slots: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    shapes = {
        "k": (len(slots), 2, 24),
        "v": (len(slots), 2, 16),
        "k_cache": (_NUM_BLOCKS, 7, 2, 24),
        "v_cache": (_NUM_BLOCKS, 7, 2, 16),
    }
    inputs = {
        name: random_tensor(shape, seed=f"{slots}-{name}", dtype=dtype, device=device)
        for name, shape in shapes.items()
    }
    return inputs | {"slot_mapping": torch.tensor(slots, dtype=torch.int64, device=device)}


def _append(
    backend: str,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    caches = k_cache.clone(), v_cache.clone()
    append_to_cache(k, v, *caches, slot_mapping, backend=backend)
    return caches


def _append_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    caches = k_cache.clone(), v_cache.clone()
    reference.append_to_cache(k, v, *caches, slot_mapping, AppendOptions())
    return caches


def _append_case(word: str, slots: tuple[int, ...]) -> ConformanceCase:
    return ConformanceCase(
        op=APPEND,
        id=f"{word}-t{len(slots)}",
        make_inputs=functools.partial(_make_append, slots),
        call=_append,
        reference=_append_reference,
    )


_RAGGED = (0, 1, 15, 16, 17, 130)
_DECODE = (1,) * len(_RAGGED)
_MIXED = _Sizes((64, 0, 5, 130, 12), (1, 0, 5, 65, 1))

CASES = (
    _attention_case("decode", _Sizes(_RAGGED, _DECODE)),
    _attention_case("decode", _Sizes(_RAGGED, _DECODE, 8, 1, 128, 128, 64)),
    _attention_case("decode", _Sizes(_RAGGED, _DECODE, 3, 1, 80, 80, 1)),
    _attention_case("decode", _Sizes((0, 65), (1, 1), 16, 1, 576, 512, 16)),
    _attention_case("odd-sizes", _Sizes((63, 8), (63, 2), 6, 2, 7, 9, 3)),
    _attention_case("prefill", _Sizes((129,), (129,))),
    _attention_case("chunk", _Sizes((200, 66), (65, 64))),
    _attention_case("mixed", _MIXED),
    _attention_case("mixed", _Sizes((20, 3), (5, 0), padding=3)),
    _attention_case("queries-without-keys", _Sizes((5, 0), (9, 3))),
    _attention_case("full", _MIXED, causal=False),
    _attention_case("window", _MIXED, window_size=(17, 0)),
    _attention_case("window-both-sides", _MIXED, causal=False, window_size=(9, 5)),
    _attention_case("softcap", _MIXED, softcap=2.0),
    _attention_case("alibi", _MIXED, "alibi_slopes"),
    _attention_case("sinks", _MIXED, "sinks"),
    _attention_case("everything", _MIXED, "alibi_slopes", "sinks", softcap=3.0, window_size=(9, 0)),
    _attention_case("no-queries", _Sizes((5, 0), (0, 0))),
    _append_case("all", (0, 41, 7, 6, 20)),
    _append_case("some", (-1, 5, -1, 0, 13, -1)),
    _append_case("none", (-1, -1)),
    _append_case("no-tokens", ()),
)
