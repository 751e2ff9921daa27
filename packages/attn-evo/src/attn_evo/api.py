"""The public functions: each validates its arguments, resolves a backend and calls the operator."""

from __future__ import annotations

from typing import Any

import torch

from attn_core import backends
from attn_core.checks import flag
from attn_core.replay import repeatable
from attn_evo import checks, ops
from attn_evo.environment import requested_backend
from attn_evo.state import EvoState
from attn_evo.weights import EvoWeights


def evo_attention(
    v: torch.Tensor,
    causal: bool = True,
    attention_mask: torch.Tensor | None = None,
    accum_dtype: torch.dtype | None = None,
    block_m: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    *,
    weights: EvoWeights | None = None,
    backend: str = backends.AUTO,
) -> torch.Tensor:
    """EvoAttention: gated prefix sums of values, in time and memory linear in their number.

    Parameters
    ----------
    v : Tensor, shape (B, H, L, D)
        Values, float16, bfloat16, float32 or float64; any L, any D from 1, any strides.
    causal : bool, default True
        Token t sums tokens up to t; otherwise every token sums all of them.
    attention_mask : Tensor, shape (B, L), (B, 1, L) or (B, 1, L, 1), optional
        Multiplies v: 1 keeps a token, 0 makes it a zero, whose output is the bias of the norm. In
        a mask of bool or integers every number but 0 keeps; a floating mask may also scale. Means
        count masked tokens too.
    accum_dtype : torch.dtype, default float32
        Dtype of the sums, float32 or float64; float64 is the default for v in float64. Backend
        "torch" computes everything between v and the output in it.
    block_m, num_warps, num_stages : int, optional
        Tile rows, warps and pipeline stages of the forward pass, for backends with tiles. Backend
        "torch" has none and takes none.
    weights : EvoWeights, default ``EvoWeights.identity(D)``
        The ten parameters, on the device of v.
    backend : str, default "auto"
        "torch", another registered backend, or "auto" for the best that supports the problem. A
        named backend is never replaced.

    Returns
    -------
    Tensor, shape (B, H, L, D)
        Of v's dtype, contiguous. Differentiable in v and the weights.

    Raises
    ------
    ValueError
        A shape, dtype, device or number does not fit; the message names it.
    UnsupportedProblemError
        No backend, or not the one named, computes the problem.
    BackendUnavailableError
        No backend of that name exists.

    References
    ----------
    evo-attn 0.2.0, https://github.com/ZhenyaSSSS/evo-attn. The formula is in `attn_evo.reference`.

    Examples
    --------
    >>> import torch
    >>> from attn_evo import evo_attention
    >>> v = torch.randn(2, 8, 1000, 64)
    >>> evo_attention(v).shape
    torch.Size([2, 8, 1000, 64])
    """
    tiles = checks.tiles(block_m, num_warps, num_stages)
    out, _ = attend(v, causal, attention_mask, None, accum_dtype, tiles, weights, backend)
    return out


def evo_attention_step(
    v: torch.Tensor,
    state: EvoState | None = None,
    attention_mask: torch.Tensor | None = None,
    accum_dtype: torch.dtype | None = None,
    *,
    weights: EvoWeights | None = None,
    backend: str = backends.AUTO,
) -> tuple[torch.Tensor, EvoState]:
    """Continue a causal `evo_attention` with the next tokens, one or many.

    The outputs of all calls, one after another, are those of one call with all tokens.

    Parameters
    ----------
    v : Tensor, shape (B, H, L, D)
        The next L values, as in `evo_attention`.
    state : EvoState, optional
        What the call before has returned; None at the first token.
    attention_mask : Tensor, shape (B, L), (B, 1, L) or (B, 1, L, 1), optional
        Of these tokens, as in `evo_attention`.
    accum_dtype : torch.dtype, default that of `state`, or float32
        Dtype of the sums, as in `evo_attention`.
    weights : EvoWeights, default ``EvoWeights.identity(D)``
        The same at every call.
    backend : str, default "auto"
        As in `evo_attention`.

    Returns
    -------
    out : Tensor, shape (B, H, L, D)
        Of v's dtype.
    state : EvoState
        For the next call. Differentiable: detach its sums to cut the gradient between calls.

    Raises
    ------
    ValueError, UnsupportedProblemError, BackendUnavailableError
        As in `evo_attention`; also for a state of other sizes, dtype or device.

    Examples
    --------
    >>> import torch
    >>> from attn_evo import evo_attention, evo_attention_step
    >>> v = torch.randn(1, 4, 10, 32)
    >>> state, outputs = None, []
    >>> for token in v.split(1, dim=2):
    ...     out, state = evo_attention_step(token, state)
    ...     outputs.append(out)
    >>> torch.allclose(torch.cat(outputs, dim=2), evo_attention(v), atol=1e-5)
    True
    """
    out, sums = attend(v, True, attention_mask, state, accum_dtype, (), weights, backend)
    tokens = v.shape[2]
    if state is None:
        return out, EvoState(sums, torch.full((), tokens, dtype=torch.int64, device=v.device))
    return out, EvoState(sums, state.length + tokens)


def prefix_sum(
    x: torch.Tensor,
    dim: int = -2,
    exclusive: bool = False,
    reverse: bool = False,
    *,
    backend: str = backends.AUTO,
) -> torch.Tensor:
    """Sum of the elements up to each one along a dimension.

    Parameters
    ----------
    x : Tensor, any shape
        float16, bfloat16, float32 or float64; any strides.
    dim : int, default -2
        Dimension to sum along: in (B, H, L, D) that of the tokens.
    exclusive : bool, default False
        Leave the element itself out: the first sum is 0.
    reverse : bool, default False
        Sum from the last element to the first.
    backend : str, default "auto"
        As in `evo_attention`.

    Returns
    -------
    Tensor, shape of x
        Of x's dtype, contiguous; accumulated in float32 (float64 for float64). Differentiable.

    Raises
    ------
    ValueError
        The dtype or `dim` does not fit; the message names it.
    UnsupportedProblemError, BackendUnavailableError
        As in `evo_attention`.

    Examples
    --------
    >>> import torch
    >>> from attn_evo import prefix_sum
    >>> prefix_sum(torch.tensor([1.0, 2.0, 3.0]), dim=0, exclusive=True)
    tensor([0., 1., 3.])
    """
    exclusive, reverse = flag("exclusive", exclusive), flag("reverse", reverse)
    problem = checks.prefix_sum_problem(x, dim, exclusive, reverse)
    name = backends.resolve(ops.PREFIX_SUM, problem, requested_backend(backend))
    return ops.prefix_sum(x, problem.dim, exclusive, reverse, name)  # type: ignore[no-any-return]


def get_available_backends() -> list[str]:
    """Names of the backends that can run on this machine, the preferred first.

    Returns
    -------
    list of str
        For example ``["torch"]``.

    Examples
    --------
    >>> from attn_evo import get_available_backends
    >>> "torch" in get_available_backends()
    True
    """
    return backends.runnable(ops.ATTENTION)


def attend(
    v: torch.Tensor,
    causal: bool,
    attention_mask: torch.Tensor | None,
    state: EvoState | None,
    accum_dtype: torch.dtype | None,
    tiles: tuple[int, ...],
    weights: EvoWeights | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend after the tokens of `state`; without `causal` they are seen like those of v.

    Returns the output and the sums (2, B, H, D) with those of v. `tiles` is as in
    `checks.AttentionProblem`, the rest as in `evo_attention`.
    """
    checks.require_values(v)
    checks.require_state(state, v)
    weights = checks.weights_for(v, weights)
    sums, length = (None, None) if state is None else state
    return _attend(  # type: ignore[no-any-return]
        v,
        causal,
        attention_mask,
        sums,
        length,
        accum_dtype,
        tiles,
        requested_backend(backend),
        *weights,
    )


@repeatable
def _attend(
    v: torch.Tensor,
    causal: bool,
    attention_mask: torch.Tensor | None,
    sums: torch.Tensor | None,
    length: torch.Tensor | None,
    accum_dtype: torch.dtype | None,
    tiles: tuple[int, ...],
    backend: str,
    *tensors: torch.Tensor,
) -> Any:
    """`attend`, whose state and weights are plain arguments here: such calls can be repeated."""
    causal = flag("causal", causal)
    weights = EvoWeights(*tensors)
    checks.require_weights(weights, v)
    v, mask = checks.masked_values(v, attention_mask)
    accum_dtype = checks.accum_dtype_for(v, accum_dtype, sums)
    problem = checks.attention_problem(v, weights, mask, sums, causal, accum_dtype, tiles)
    name = backends.resolve(ops.ATTENTION, problem, backend)
    return ops.attention(v, *weights, mask, sums, length, causal, accum_dtype, list(tiles), name)
