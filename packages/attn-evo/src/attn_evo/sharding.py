"""EvoAttention of a sequence that is spread over the ranks of a device mesh.

A rank holds some consecutive tokens. Ranks exchange sums of their tokens, (B, H, D) each, and never
a token: first of v, then, with `causal`, of gated v, which the sums of v before it decide.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from attn_core import backends
from attn_core.checks import flag
from attn_evo import checks
from attn_evo.api import attend
from attn_evo.state import EvoState
from attn_evo.weights import EvoWeights

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def evo_attention_sharded(
    v: torch.Tensor,
    causal: bool = True,
    attention_mask: torch.Tensor | None = None,
    accum_dtype: torch.dtype | None = None,
    *,
    mesh: DeviceMesh,
    mesh_dim: int | str = 0,
    weights: EvoWeights | None = None,
    backend: str = backends.AUTO,
) -> torch.Tensor:
    """`evo_attention` of the tokens that this rank holds, as part of the whole sequence.

    Every rank of the mesh dimension calls it together, in both passes. The first rank holds the
    first tokens, and so on.

    Parameters
    ----------
    v : Tensor, shape (B, H, L, D)
        This rank's values; L may differ from rank to rank, and be 0.
    causal : bool, default True
        As in `evo_attention`, of the whole sequence.
    attention_mask : Tensor, shape (B, L), (B, 1, L) or (B, 1, L, 1), optional
        Of this rank's tokens.
    accum_dtype : torch.dtype, default float32
        As in `evo_attention`.
    mesh : DeviceMesh
        The ranks, on the device type of v.
    mesh_dim : int or str, default 0
        The dimension of the mesh that the tokens are spread over.
    weights : EvoWeights, default ``EvoWeights.identity(D)``
        The same on every rank. Their gradients are those of the whole sequence, summed over the
        ranks in float32 at least.
    backend : str, default "auto"
        As in `evo_attention`.

    Returns
    -------
    Tensor, shape (B, H, L, D)
        Of this rank's tokens.

    Raises
    ------
    ValueError
        The mesh is of another device type or has no such dimension, or as in `evo_attention`.
    UnsupportedProblemError, BackendUnavailableError
        As in `evo_attention`.

    Examples
    --------
    In a process of ``torchrun --nproc-per-node 2``, with `v` (B, H, L, D) whole on both::

        mesh = init_device_mesh("cuda", (2,))
        own = v.tensor_split(mesh.size(), dim=2)[mesh.get_local_rank()]
        out = evo_attention_sharded(own, mesh=mesh)
    """
    checks.require_values(v)
    causal = flag("causal", causal)
    _require_mesh(mesh, mesh_dim, v)
    group = mesh.get_group(mesh_dim)
    weights = checks.weights_for(v, weights)
    checks.require_weights(weights, v)
    weights = EvoWeights(*(_shared(weight, group) for weight in weights))
    v, mask = checks.masked_values(v, attention_mask)
    accum_dtype = checks.accum_dtype_for(v, accum_dtype, None)
    kept = v if mask is None else v.masked_fill(~mask[:, None, :, None], 0)
    context = kept.sum(dim=2, dtype=accum_dtype)
    others = _causal_state if causal else _full_state
    state = others(v, mask, context, weights, backend, group)
    out, _ = attend(v, causal, mask, state, accum_dtype, (), weights, backend)
    return out


def _require_mesh(mesh: DeviceMesh, mesh_dim: int | str, v: torch.Tensor) -> None:
    if not hasattr(mesh, "device_type"):
        raise ValueError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.device_type != v.device.type:
        raise ValueError(
            f"mesh must be of the device type of v, {v.device.type}, got {mesh.device_type}"
        )
    names = mesh.mesh_dim_names or ()
    if mesh_dim not in (*range(-mesh.ndim, mesh.ndim), *names):
        raise ValueError(
            f"mesh_dim must be a dimension of mesh, of {mesh.ndim} dimensions named {names}, "
            f"got {mesh_dim!r}"
        )


def _causal_state(
    v: torch.Tensor,
    mask: torch.Tensor | None,
    context: torch.Tensor,
    weights: EvoWeights,
    backend: str,
    group: Any,
) -> EvoState:
    """The state of the tokens on earlier ranks; `context` is the sum of v on this one."""
    before, length = _sum_over_ranks(context, group, True), _tokens(v, group, True)
    own = EvoState(torch.stack((before, torch.zeros_like(before))), length)
    _, gated = attend(v, True, mask, own, context.dtype, (), weights, backend)
    return EvoState(torch.stack((before, _sum_over_ranks(gated[1], group, True))), length)


def _full_state(
    v: torch.Tensor,
    mask: torch.Tensor | None,
    context: torch.Tensor,
    weights: EvoWeights,
    backend: str,
    group: Any,
) -> EvoState:
    """The state of the tokens on all other ranks; `context` is the sum of v on this one."""
    total, length = _sum_over_ranks(context, group, False), _tokens(v, group, False)
    w_g, b_g = weights.w_g.to(total.dtype), weights.b_g.to(total.dtype)
    gate = torch.sigmoid(F.linear(total / length.clamp(min=1), w_g, b_g))
    others = total - context
    return EvoState(torch.stack((others, gate * others)), length - v.shape[2])


def _tokens(v: torch.Tensor, group: Any, before: bool) -> torch.Tensor:
    """The number of tokens on earlier ranks or on all of them, ()."""
    own = torch.full((), v.shape[2], dtype=torch.int64, device=v.device)
    return _reduce(own, group, range(_rank(group)) if before else range(_size(group)))


def _sum_over_ranks(x: torch.Tensor, group: Any, before: bool) -> torch.Tensor:
    """The sum of x over earlier ranks or over all of them, differentiable."""
    return _SumOverRanks.apply(x, group, before)  # type: ignore[no-any-return,no-untyped-call]


def _shared(weight: torch.Tensor, group: Any) -> torch.Tensor:
    """A weight whose gradient is summed over the ranks, in float32 at least."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return _SumGradient.apply(wide, group)  # type: ignore[no-any-return,no-untyped-call]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, before: bool) -> torch.Tensor:
        ctx.group, ctx.before = group, before
        return _reduce(x, group, range(_rank(group)) if before else range(_size(group)))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        first = _rank(ctx.group) + 1 if ctx.before else 0
        return _reduce(grad, ctx.group, range(first, _size(ctx.group))), None, None


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over the ranks of a process group."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _reduce(grad, ctx.group, range(_size(ctx.group))), None


def _reduce(x: torch.Tensor, group: Any, ranks: Iterable[int]) -> torch.Tensor:
    """The sum of x over some ranks, in their order; every rank takes part."""
    from torch.distributed import all_gather

    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(_size(group))
    ]
    all_gather(parts, x.contiguous(), group=group)
    return sum((parts[rank] for rank in ranks), torch.zeros_like(parts[0]))


def _rank(group: Any) -> int:
    from torch.distributed import get_rank

    return get_rank(group)


def _size(group: Any) -> int:
    from torch.distributed import get_world_size

    return get_world_size(group)
