"""The problems every backend of the package's operators must solve.

`attn_core.testing.conformance` runs them; nothing of the package imports this module.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from attn_core.testing.conformance import DTYPES, ConformanceCase
from attn_core.testing.inputs import random_tensor
from attn_evo import reference
from attn_evo.api import evo_attention, prefix_sum
from attn_evo.ops import ATTENTION, PREFIX_SUM
from attn_evo.weights import EvoWeights


def _attention_inputs(
    sizes: tuple[int, int, int, int], has_mask: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    batch, _, length, dim = sizes

    def draw(name: str, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
        return random_tensor(shape, seed=f"{sizes}-{name}", dtype=dtype, device=device, scale=scale)

    inputs = {"v": draw("v", sizes)}
    for name in EvoWeights._fields:
        is_matrix = name.startswith("w_")
        inputs[name] = draw(name, (dim, dim), dim**-0.5) if is_matrix else draw(name, (dim,), 0.5)
    if has_mask:
        inputs["mask"] = draw("mask", (batch, length)) > -1
    return inputs


def _attend(
    backend: str,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool,
    **weights: torch.Tensor,
) -> torch.Tensor:
    return evo_attention(v, causal, mask, weights=EvoWeights(**weights), backend=backend)


def _attention_reference(
    v: torch.Tensor, mask: torch.Tensor | None = None, *, causal: bool, **weights: torch.Tensor
) -> torch.Tensor:
    out, _ = reference.attention(v, EvoWeights(**weights), causal, mask)
    return out


def _attention_cases(
    word: str,
    sizes: tuple[int, int, int, int],
    *,
    causal: bool = True,
    has_mask: bool = False,
    has_grads: bool = True,
) -> list[ConformanceCase]:
    def case(grads: Sequence[str], dtypes: Sequence[torch.dtype]) -> ConformanceCase:
        return ConformanceCase(
            op=ATTENTION,
            id=word + "-b{}-h{}-l{}-d{}".format(*sizes),
            make_inputs=functools.partial(_attention_inputs, sizes, has_mask),
            call=functools.partial(_attend, causal=causal),
            reference=functools.partial(_attention_reference, causal=causal),
            grads=grads,
            dtypes=dtypes,
        )

    if not has_grads:
        return [case((), DTYPES)]
    # In float32 both gradients err by the last bits, which the poles magnify: the ratio is luck.
    narrow = tuple(dtype for dtype in DTYPES if dtype != torch.float32)
    return [case(("v", *EvoWeights._fields), narrow), case((), (torch.float32,))]


def _prefix_sum_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    return {"x": random_tensor(shape, seed=f"{shape}", dtype=dtype, device=device)}


def _sum(backend: str, x: torch.Tensor, **flags: Any) -> torch.Tensor:
    return prefix_sum(x, **flags, backend=backend)


def _prefix_sum_case(
    word: str,
    shape: tuple[int, ...],
    dim: int = -2,
    *,
    exclusive: bool = False,
    reverse: bool = False,
) -> ConformanceCase:
    flags: dict[str, Any] = {"dim": dim, "exclusive": exclusive, "reverse": reverse}
    return ConformanceCase(
        op=PREFIX_SUM,
        id=f"{word}-{'x'.join(map(str, shape))}",
        make_inputs=functools.partial(_prefix_sum_inputs, shape),
        call=functools.partial(_sum, **flags),
        reference=functools.partial(reference.prefix_sum, **flags),
        grads=("x",),
    )


CASES = (
    *_attention_cases("causal", (1, 2, 65, 64)),
    *_attention_cases("causal-mask", (2, 2, 63, 24), has_mask=True),
    *_attention_cases("causal-long", (1, 1, 1000, 16)),
    *_attention_cases("full", (2, 2, 65, 32), causal=False),
    *_attention_cases("odd-head-dim", (1, 2, 40, 7), causal=False, has_mask=True),
    *_attention_cases("largest-head-dim", (1, 1, 17, 256), has_grads=False),
    *_attention_cases("one-token", (2, 2, 1, 8), has_grads=False),
    *_attention_cases("no-tokens", (2, 2, 0, 8), has_grads=False),
    _prefix_sum_case("inclusive", (2, 3, 65, 16)),
    _prefix_sum_case("exclusive-reverse", (2, 1025, 5), exclusive=True, reverse=True),
    _prefix_sum_case("innermost", (7, 129), dim=-1, reverse=True),
    _prefix_sum_case("empty", (2, 0, 4), exclusive=True),
)
