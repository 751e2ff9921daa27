"""The problems every backend of `flash_attn_with_kvcache` and of `apply_rotary_emb` must solve.

`attn_core.testing.conformance` runs them; nothing of the package imports this module.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from attn_core.testing.conformance import ConformanceCase
from attn_core.testing.inputs import random_tensor, seed_from
from attn_flash import kvcache_reference
from attn_flash.kvcache import flash_attn_with_kvcache
from attn_flash.kvcache_checks import Cache
from attn_flash.kvcache_ops import ATTENTION
from attn_flash.layers.rotary import apply_rotary_emb
from attn_flash.rotary_ops import ROTATE
from attn_flash.rotary_reference import rotate

# In float32 the errors compared are a few roundings, added up in another order: luck decides.
_DTYPES = (torch.float16, torch.bfloat16)
_STALE = -12345


class KVCacheCase(NamedTuple):
    """One call of `flash_attn_with_kvcache`.

    `lens` are the keys of each sequence before the append, M queries and `new` keys come to each.
    `page` is the page size, 0 for a cache that is not paged; `rotary` is D_rotary.
    """

    lens: tuple[int, ...]
    M: int = 1
    new: int = 0
    H: int = 4
    H_KV: int = 2
    D: int = 64
    D_v: int = 64
    capacity: int = 160
    page: int = 0
    rotary: int = 0
    interleaved: bool = True
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    batch_idx: bool = False
    leftpad: bool = False
    splits: int = 0
    scale: float | None = None

    def __str__(self) -> str:
        lens = "x".join(map(str, self.lens))
        words = [
            f"n{lens}-m{self.M}-new{self.new}-h{self.H}-kv{self.H_KV}-d{self.D}-dv{self.D_v}",
            f"page{self.page}" if self.page else "",
            f"rotary{self.rotary}" + ("i" if self.interleaved else "") if self.rotary else "",
            "causal" if self.causal else "",
            "window{},{}".format(*self.window) if self.window != (-1, -1) else "",
            f"cap{self.softcap}" if self.softcap else "",
            *(word for word in ("alibi", "batch_idx", "leftpad") if getattr(self, word)),
            f"splits{self.splits}" if self.splits else "",
            f"scale{self.scale}" if self.scale is not None else "",
        ]
        return "-".join(filter(None, words))

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """Tensors of the call; slots without a key hold NaN, table entries without use -12345."""
        draw = functools.partial(self._normal, dtype=dtype)
        batch = len(self.lens)
        entries = batch + 2 if self.batch_idx else batch
        generator = torch.Generator().manual_seed(seed_from(str(self)))
        inputs = {"q": draw("q", batch, self.M, self.H, self.D)}
        if self.batch_idx:
            chosen = torch.randperm(entries, generator=generator)[:batch]
            inputs["cache_batch_idx"] = chosen.to(torch.int32)
        if self.page:
            pages = -(-self.capacity // self.page)
            table = torch.randperm(entries * pages, generator=generator).to(torch.int32)
            inputs["block_table"] = table.view(entries, pages)
            slots = (entries * pages, self.page)
        else:
            slots = (entries, self.capacity)
        inputs["cache_seqlens"] = torch.tensor(self.lens, dtype=torch.int32)
        if self.leftpad:
            pads = [int(n * 0.3) + (b % 2) for b, n in enumerate(self.lens)]
            inputs["cache_leftpad"] = torch.tensor(pads, dtype=torch.int32)
        inputs["k_cache"] = draw("k_cache", *slots, self.H_KV, self.D)
        inputs["v_cache"] = draw("v_cache", *slots, self.H_KV, self.D_v)
        self._poison(inputs)
        if self.new:
            inputs["k"] = draw("k", batch, self.new, self.H_KV, self.D)
            inputs["v"] = draw("v", batch, self.new, self.H_KV, self.D_v)
        if self.rotary:
            rows = pages * self.page if self.page else self.capacity
            angles = random_tensor((rows, self.rotary // 2), seed=f"{self}-angles", scale=3.0)
            inputs["rotary_cos"] = angles.cos().to(dtype)
            inputs["rotary_sin"] = angles.sin().to(dtype)
        if self.alibi:
            slopes = random_tensor((batch, self.H), seed=f"{self}-slopes").abs()
            inputs["alibi_slopes"] = slopes * 0.3
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def options(self) -> dict[str, Any]:
        """Arguments of the call that are no tensors."""
        return {
            "softmax_scale": self.scale,
            "causal": self.causal,
            "window_size": self.window,
            "softcap": self.softcap,
            "rotary_interleaved": self.interleaved,
            "num_splits": self.splits,
            "return_softmax_lse": True,
        }

    def call(self, backend: str, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """Output, lse and the caches after the call, whose unwritten slots read 7."""
        inputs = _with_own_caches(inputs)
        out, lse = flash_attn_with_kvcache(**inputs, **self.options(), backend=backend)
        return out, lse, inputs["k_cache"].nan_to_num(7.0), inputs["v_cache"].nan_to_num(7.0)

    def reference(self, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """What `call` must return."""
        inputs = _with_own_caches(inputs)
        q, k_cache, v_cache = inputs["q"], inputs["k_cache"], inputs["v_cache"]
        rotary = (inputs.get("rotary_cos"), inputs.get("rotary_sin"), self.interleaved)
        cache = _cache(inputs)
        if self.new:
            kvcache_reference.append(inputs["k"], inputs["v"], k_cache, v_cache, *rotary, cache)
        left, right = self.window
        out, lse = kvcache_reference.attention(
            q,
            k_cache,
            v_cache,
            *rotary,
            cache,
            inputs.get("alibi_slopes"),
            self.new,
            self.D**-0.5 if self.scale is None else self.scale,
            (left, 0 if self.causal else right),
            self.softcap,
        )
        return out, lse, k_cache.nan_to_num(7.0), v_cache.nan_to_num(7.0)

    def _normal(self, name: str, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return random_tensor(shape, seed=f"{self}-{name}", dtype=dtype)

    def _poison(self, inputs: dict[str, torch.Tensor]) -> None:
        """Fill what holds no key with what must not be read."""
        cache = _cache(inputs)
        k_cache, v_cache = inputs["k_cache"], inputs["v_cache"]
        is_used = torch.zeros(k_cache.shape[:2], dtype=torch.bool)
        for b, n in enumerate(self.lens):
            start = 0 if cache.leftpad is None else int(cache.leftpad[b])
            rows, columns = kvcache_reference.slots(cache, b, n, k_cache.shape[1])
            is_used[rows[start:], columns[start:]] = True
        for tensor in (k_cache, v_cache):
            tensor[~is_used] = torch.nan
        if cache.block_table is None:
            return
        is_listed = torch.zeros_like(cache.block_table, dtype=torch.bool)
        for b, n in enumerate(self.lens):
            row = b if cache.batch_idx is None else int(cache.batch_idx[b])
            is_listed[row, : -(-(n + self.new) // self.page)] = True
        cache.block_table[~is_listed] = _STALE


def _with_own_caches(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copy the caches, keeping their strides: the call writes to them."""
    copies = {}
    for name in ("k_cache", "v_cache"):
        cache = inputs[name]
        copies[name] = torch.empty_strided(
            cache.shape, cache.stride(), dtype=cache.dtype, device=cache.device
        ).copy_(cache)
    return inputs | copies


def _cache(inputs: dict[str, torch.Tensor]) -> Cache:
    return Cache(
        inputs["cache_seqlens"],
        0,
        inputs.get("cache_batch_idx"),
        inputs.get("cache_leftpad"),
        inputs.get("block_table"),
    )


KVCACHE_CASES = (
    KVCacheCase((0, 1, 63, 64, 65, 150)),
    KVCacheCase((100, 3, 0), new=1, rotary=64, causal=True),
    KVCacheCase((100, 3, 64), M=5, new=5, causal=True, rotary=32, interleaved=False, splits=3),
    KVCacheCase((100, 3, 64), M=7, new=2, rotary=32),  # all queries at one position
    KVCacheCase((90, 33), M=3, causal=True, page=16, batch_idx=True, leftpad=True, new=3),
    KVCacheCase((120, 17), M=2, H=6, H_KV=2, D=40, D_v=24, page=7, window=(20, -1), new=2),
    KVCacheCase((150, 40), M=4, window=(30, 5), softcap=5.0, alibi=True, leftpad=True),
    KVCacheCase((150, 2), M=3, H=8, H_KV=1, D=128, D_v=128, alibi=True, causal=True, splits=2),
    KVCacheCase((5, 0), M=9, causal=True),  # queries without keys
    KVCacheCase((20, 150), M=40, H=2, H_KV=1, causal=True, new=10, splits=1),
    KVCacheCase((64,), H=2, H_KV=2, D=7, D_v=9, scale=-0.7),
)


class RotaryCase(NamedTuple):
    """One call of `apply_rotary_emb`; `lens` makes it one of variable length."""

    B: int
    S: int
    H: int
    D: int
    rotary: int
    interleaved: bool = False
    offsets: str = "zero"  # or "int" or "tensor"
    lens: tuple[int, ...] = ()

    def __str__(self) -> str:
        words = [f"b{self.B}-s{self.S}-h{self.H}-d{self.D}-rotary{self.rotary}", self.offsets]
        if self.interleaved:
            words.append("interleaved")
        if self.lens:
            words.append("lens" + "x".join(map(str, self.lens)))
        return "-".join(words)

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """Tensors of the call."""
        shape = (sum(self.lens), self.H, self.D) if self.lens else (self.B, self.S, self.H, self.D)
        angles = random_tensor((2 * self.S + 3, self.rotary // 2), seed=f"{self}-a", scale=3.0)
        inputs = {
            "x": random_tensor(shape, seed=f"{self}-x", dtype=dtype),
            "cos": angles.cos().to(dtype),
            "sin": angles.sin().to(dtype),
        }
        if self.lens:
            bounds = torch.tensor((0, *self.lens)).cumsum(0)
            inputs["cu_seqlens"] = bounds.to(torch.int32)
        if self.offsets == "tensor":
            count = len(self.lens) or self.B
            inputs["seqlen_offsets"] = torch.arange(count, dtype=torch.int32) % (self.S + 3)
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def _offset(self) -> int:
        return 3 if self.offsets == "int" else 0

    def call(self, backend: str, **inputs: Any) -> torch.Tensor:
        """Rotate, out of place."""
        offsets = inputs.pop("seqlen_offsets", self._offset())
        longest = self.S if self.lens else None
        return apply_rotary_emb(
            **inputs,
            interleaved=self.interleaved,
            seqlen_offsets=offsets,
            max_seqlen=longest,
            backend=backend,
        )

    def reference(self, **inputs: Any) -> torch.Tensor:
        """What `call` must return."""
        x, cos, sin = inputs["x"], inputs["cos"], inputs["sin"]
        lens = self.lens or (self.S,) * self.B
        sequences = x.split(lens) if self.lens else x.unbind(0)
        outs = []
        for b, (sequence, length) in enumerate(zip(sequences, lens, strict=True)):
            start = self._offset()
            if "seqlen_offsets" in inputs:
                start = int(inputs["seqlen_offsets"][b])
            rows = slice(start, start + length)
            outs.append(rotate(sequence, cos[rows, None], sin[rows, None], self.interleaved))
        return torch.cat(outs) if self.lens else torch.stack(outs)


ROTARY_CASES = (
    RotaryCase(2, 33, 3, 64, 64),
    RotaryCase(1, 7, 2, 80, 24, interleaved=True, offsets="int"),
    RotaryCase(3, 5, 1, 20, 12, offsets="tensor"),
    RotaryCase(3, 9, 2, 32, 32, interleaved=True, offsets="tensor", lens=(4, 0, 9, 1)),
    RotaryCase(1, 21, 2, 9, 2, lens=(21, 3)),
    RotaryCase(2, 0, 2, 16, 16),
)


CASES = (
    *(
        ConformanceCase(
            ATTENTION, str(case), case.inputs, case.call, case.reference, dtypes=_DTYPES
        )
        for case in KVCACHE_CASES
    ),
    *(
        ConformanceCase(ROTATE, str(case), case.inputs, case.call, case.reference, grads=("x",))
        for case in ROTARY_CASES
    ),
)
