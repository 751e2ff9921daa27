"""The problems every backend of ``attn_flash::attention`` must solve.

`attn_core.testing.conformance` runs them; nothing of the package imports this module.
"""

from __future__ import annotations

import functools

import torch

from attn_core.testing.conformance import ConformanceCase
from attn_core.testing.inputs import random_tensor
from attn_flash import reference
from attn_flash.api import flash_attn_func
from attn_flash.ops import ATTENTION

_OPEN = (-1, -1)
_CAUSAL = (-1, 0)


def _make_inputs(
    sizes: tuple[int, int, int, int, int, int],
    magnitude: float,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    batch, heads, heads_kv, len_q, len_k, head_dim = sizes
    shapes = {
        "q": (batch, len_q, heads, head_dim),
        "k": (batch, len_k, heads_kv, head_dim),
        "v": (batch, len_k, heads_kv, head_dim),
    }
    return {
        name: random_tensor(
            shape, seed=f"{sizes}-{name}", dtype=dtype, device=device, scale=magnitude
        )
        for name, shape in shapes.items()
    }


def _call(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, _ = flash_attn_func(
        q, k, v, window_size=window, return_attn_probs=True, backend=backend
    )
    return out, lse


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.attention(q, k, v, q.shape[-1] ** -0.5, window)


def _case(
    word: str,
    sizes: tuple[int, int, int, int, int, int],
    window: tuple[int, int] = _OPEN,
    *,
    magnitude: float = 1.0,
    has_grads: bool = True,
) -> ConformanceCase:
    return ConformanceCase(
        op=ATTENTION,
        id=word + "-b{}-h{}-kv{}-m{}-n{}-d{}".format(*sizes),
        make_inputs=functools.partial(_make_inputs, sizes, magnitude),
        call=functools.partial(_call, window=window),
        reference=functools.partial(_reference, window=window),
        grads=("q", "k", "v") if has_grads else (),
    )


CASES = (
    _case("full", (2, 4, 4, 64, 64, 64)),
    _case("full", (1, 4, 2, 129, 65, 128)),
    _case("full", (1, 2, 1, 31, 97, 40)),
    _case("causal", (2, 4, 4, 64, 64, 64), _CAUSAL),
    _case("causal", (1, 4, 1, 65, 129, 32), _CAUSAL),
    _case("causal-queries-without-keys", (1, 2, 2, 97, 31, 64), _CAUSAL),
    _case("window", (1, 4, 2, 130, 130, 64), (17, 5)),
    _case("window-open-right", (1, 2, 2, 65, 70, 80), (9, -1)),
    _case("odd-head-dim", (1, 3, 1, 63, 66, 7), _CAUSAL),
    _case("largest-head-dim", (1, 2, 2, 33, 40, 256)),
    _case("large-scores", (1, 2, 2, 65, 65, 64), _CAUSAL, magnitude=3.0),
    # With one key the gradients of q and k are 0, and nothing but rounding is left to compare.
    _case("one-query-one-key", (2, 4, 2, 1, 1, 64), has_grads=False),
    _case("decoding", (2, 8, 2, 1, 127, 64), _CAUSAL),
    _case("no-batch", (0, 2, 2, 3, 5, 8)),
    _case("no-queries", (2, 2, 2, 0, 5, 8)),
    _case("no-keys", (2, 2, 1, 5, 0, 8)),
)
