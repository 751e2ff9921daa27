"""The public function: it validates its arguments, resolves a backend and calls the operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from attn_core import backends
from attn_core.checks import flag
from attn_core.replay import repeatable
from attn_triangle import checks, ops


@repeatable
def triangle_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    masked_rows: str = "mean",
    deterministic: bool = True,
    backend: str = backends.AUTO,
) -> Any:
    """Attention within each row of a pair tensor, with a bias that all rows share.

    Query j of row i attends to the keys k of the same row with the scores
    ``scale * q[i, j] @ k[i, k] + bias[j, k]``. Rows, queries and keys are as many as residues (R =
    M = N) in triangle attention; they may differ, as in row attention over an alignment.

    Parameters
    ----------
    q : Tensor, shape (*, H, R, M, D)
        Queries, float16, bfloat16, float32 or float64. Any leading dimensions, none included; D
        from 1 to 128; any strides.
    k, v : Tensor, shape (*, H, R, N, D)
        Keys and values, of q's dtype and device.
    bias : Tensor, shape (*, H, M, N)
        Added to the scores of every row; of q's dtype or float32. Any size may be 1, and leading
        dimensions may be left out.
    mask : Tensor, shape (*, R, N), optional
        Of bool: True masks a key *out*, for all queries and heads of its row. Of q's dtype or
        float32: added to the scores, differentiable. Broadcasts as `bias` does.
    scale : float, default 1 / sqrt(D)
        Factor of the products of queries and keys; the bias is not scaled.
    return_lse : bool, default False
        Also return lse.
    masked_rows : {"mean", "zero"}, default "mean"
        Output of a query that sees no key, because its row is masked or its bias is -inf: the mean
        over all N values of the row, masked or not, or 0. Its gradient agrees: it reaches the
        values with weight 1 / N, or nothing.
    deterministic : bool, default True
        Gradients with the same bits every time. False lets a backend that gains by it add up the
        gradient of `bias` in any order, except under ``torch.use_deterministic_algorithms``.
    backend : str, default "auto"
        "torch", another registered backend, or "auto" for the best that supports the problem. A
        named backend is never replaced.

    Returns
    -------
    out : Tensor, shape (*, H, R, M, D)
        Of q's dtype. Its memory is laid out as (*, R, M, H, D), so that moving H before D and
        flattening them for an output projection copies nothing.
    lse : Tensor, shape (*, H, R, M), float32
        Only with `return_lse`: natural logarithm of the sum of exponentials of the scores, -inf for
        a query that sees no key; float64 for float64 inputs. Differentiable.

    Raises
    ------
    ValueError
        A shape, dtype, device or value does not fit; the message names it.
    UnsupportedProblemError
        No backend computes the problem.
    BackendUnavailableError
        No backend of that name exists.

    Notes
    -----
    Memory grows with R (M + N) and M N in both passes. Gradients that nobody needs are not
    computed; those of `bias` and `mask` are summed over everything they were broadcast to. A second
    derivative is recomputed by the plain formula and takes memory in R M N.

    References
    ----------
    Jumper et al., "Highly accurate protein structure prediction with AlphaFold", 2021, supplement,
    Algorithms 13 and 14.

    Examples
    --------
    >>> import torch
    >>> from attn_triangle import triangle_attention
    >>> q, k, v = torch.randn(3, 1, 4, 50, 50, 32).unbind(0)
    >>> bias = torch.randn(1, 4, 50, 50)
    >>> mask = torch.zeros(1, 50, 50, dtype=torch.bool)
    >>> mask[..., 40:] = True
    >>> triangle_attention(q, k, v, bias, mask).shape
    torch.Size([1, 4, 50, 50, 32])
    """
    problem = checks.triangle_problem(q, k, v, bias, mask, scale, masked_rows)
    deterministic = flag("deterministic", deterministic)
    return_lse = flag("return_lse", return_lse)
    name = backends.resolve(ops.ATTENTION, problem, backend)
    batch = q.shape[:-4]
    out, lse = ops.attention(
        _one_batch_dim(q, 4),
        _one_batch_dim(k, 4),
        _one_batch_dim(v, 4),
        _broadcast_batch(bias, batch, 3),
        None if mask is None else _broadcast_batch(mask, batch, 2),
        problem.scale,
        masked_rows,
        deterministic or torch.are_deterministic_algorithms_enabled(),
        name,
    )
    if len(batch) != 1:
        out, lse = out.view(q.shape), lse.view(q.shape[:-1])
    return (out, lse) if return_lse else out


def _one_batch_dim(x: torch.Tensor, inner: int) -> torch.Tensor:
    """Fold all but the `inner` last dimensions into one; a view where the strides allow it."""
    return x[None] if x.dim() == inner else x.flatten(0, x.dim() - inner - 1)


def _broadcast_batch(x: torch.Tensor, batch: Sequence[int], inner: int) -> torch.Tensor:
    """Fold the leading dimensions, which stay 1 where x is the same for the whole batch."""
    leading = x.shape[: x.dim() - inner]
    if math.prod(leading) != 1 and leading != batch:
        x = x.expand(*batch, *x.shape[-inner:])
    return _one_batch_dim(x, inner)
