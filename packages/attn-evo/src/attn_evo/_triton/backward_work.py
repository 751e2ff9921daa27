"""What the launches of the backward pass share."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from attn_core.tuning import TileConfig
from attn_evo._hopper import support
from attn_evo._triton import configs, problem
from attn_evo._triton.forward import running_sums, sums_of_values
from attn_evo.weights import EvoWeights


class Work(NamedTuple):
    """What the launches share: one call, its scratch memory and its outputs."""

    call: problem.Call
    scratch: problem.Scratch
    half_ratio: torch.Tensor
    inverse: torch.Tensor
    dlocal: torch.Tensor
    df: torch.Tensor
    dcontext: torch.Tensor
    dv: torch.Tensor
    dsums: torch.Tensor
    dsums_after: torch.Tensor | None
    partial_matrices: torch.Tensor
    partial_vectors: torch.Tensor
    causal: bool

    @property
    def partials(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each program leaves its share of the weights' gradients."""
        return self.partial_matrices, self.partial_vectors

    @property
    def dsums_after_args(self) -> tuple[Any, ...]:
        """The gradients of the sums with their strides, or what stands in for them."""
        if self.dsums_after is None:
            return self.dsums, 0, 0, 0, 0
        return self.dsums_after, *self.dsums_after.stride()


def work_of(
    v: torch.Tensor,
    weights: EvoWeights,
    mask: torch.Tensor | None,
    sums: torch.Tensor | None,
    length: torch.Tensor | None,
    causal: bool,
    dsums_after: torch.Tensor | None,
    config: TileConfig,
) -> Work:
    """Run the forward scans of a call again, and allocate what its gradients take."""
    B, H, _, D = v.shape
    dv = v.new_empty(v.shape)
    dsums = v.new_empty((2, B, H, D), dtype=torch.float32)
    call = problem.call(v, mask, sums, length, config)
    inverse = _tokens(call, _inverse_dtype(v.dtype))
    return Work(
        call,
        _running_sums(call, weights, causal, torch.empty_like(dsums)),
        _tokens(call, v.dtype),
        inverse,
        inverse if inverse.dtype == v.dtype else _tokens(call, v.dtype),
        _tokens(call, v.dtype),
        _tokens(call, v.dtype) if causal else dv,
        dv,
        dsums,
        dsums_after,
        *_partials(call),
        causal,
    )


def work_of_whole_sequences(v: torch.Tensor, weights: EvoWeights, config: TileConfig) -> Work:
    """Pack the weights, where programs own a whole sequence each, and allocate as `work_of`."""
    B, H, _, D = v.shape
    call = problem.call(v, None, None, None, config).undivided
    scratch = sums_of_values(call, weights, only_packs=True)
    dv = v.new_empty(v.shape)
    dsums = v.new_empty((2, B, H, D), dtype=torch.float32)
    half_ratio, inverse, df, dcontext = (_tokens(call, v.dtype) for _ in range(4))
    return Work(
        call, scratch, half_ratio, inverse, inverse, df, dcontext, dv, dsums, None,
        *_partials(call), True,
    )  # fmt: skip


def _running_sums(
    call: problem.Call, weights: EvoWeights, causal: bool, sums_after: torch.Tensor
) -> problem.Scratch:
    has_tiles = causal and call.blocks["BLOCK_M"] == support.BLOCK_M
    if has_tiles and support.takes(call.v[0], call.flags["HAS_MASK"], call.flags["HAS_STATE"]):
        from attn_evo._hopper import forward

        return forward.running_sums(call, weights, sums_after)
    return running_sums(call, weights, causal, sums_after)


def _tokens(call: problem.Call, dtype: torch.dtype) -> torch.Tensor:
    L, _, num_heads, *_ = call.sizes
    v = call.v[0]
    return v.new_empty((num_heads, L, call.blocks["BLOCK_D"]), dtype=dtype)


def _partials(call: problem.Call) -> tuple[torch.Tensor, torch.Tensor]:
    block_d = call.blocks["BLOCK_D"]
    matrices = (call.num_programs, 4, block_d, block_d)
    new = functools.partial(call.v[0].new_empty, dtype=torch.float32)
    return new(matrices), new((call.num_programs, 6, block_d))


def tiles_of(name: str, call: problem.Call) -> TileConfig:
    """Tiles of one launch of the backward pass."""
    return configs.backward_kernel(name, call.v[0], call.config)


def _inverse_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of 1 / denominator, which may reach 1e8, beyond float16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
