"""DeepSpeed's evoformer attention (``deepspeed.ops.deepspeed4science``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_core.checks import require_tensor
from attn_triangle.compat._evoformer import evoformer_attention, require_rank

_NAMES = ("the first of biases", "the second of biases")


def DS4Sci_EvoformerAttention(  # noqa: N802  (its name there)
    Q: torch.Tensor,  # noqa: N803
    K: torch.Tensor,  # noqa: N803
    V: torch.Tensor,  # noqa: N803
    biases: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """``DS4Sci_EvoformerAttention``.

    Any length, head dimension to 128 and dtype, beyond what the original takes; `biases` is left as
    it is.

    Parameters
    ----------
    Q, K, V : Tensor, shape (*, N, L, H, D)
        Queries, keys and values.
    biases : sequence of Tensor or None
        At most two: one of shape (*, N, 1, 1, L), mostly a mask of 0 and -1e9, and one of shape
        (*, 1, H, L, L). Both are added to the scores and have gradients.

    Returns
    -------
    Tensor, shape (*, N, L, H, D)
        The output, of Q's dtype.

    Raises
    ------
    ValueError
        There are more than two biases, or as for `attn_triangle.triangle_attention`.

    Examples
    --------
    >>> import torch
    >>> from attn_triangle.compat import DS4Sci_EvoformerAttention
    >>> q, k, v = torch.randn(3, 1, 20, 20, 4, 32).unbind(0)
    >>> mask = torch.zeros(1, 20, 1, 1, 20)
    >>> DS4Sci_EvoformerAttention(q, k, v, [mask, torch.randn(1, 1, 4, 20, 20)]).shape
    torch.Size([1, 20, 20, 4, 32])
    """
    if not isinstance(biases, Sequence) or len(biases) > 2:
        got = len(biases) if isinstance(biases, Sequence) else type(biases).__name__
        raise ValueError(f"biases must be a sequence of at most two tensors, got {got}")
    require_rank(Q, K, V)
    row_bias, pair_bias = (*biases, None, None)[:2]
    _require_shapes(Q, K, row_bias, pair_bias)
    return evoformer_attention(Q, K, V, row_bias, pair_bias, _NAMES)


def _require_shapes(
    q: torch.Tensor,
    k: torch.Tensor,
    row_bias: torch.Tensor | None,
    pair_bias: torch.Tensor | None,
) -> None:
    *batch, rows, length, heads, _ = q.shape
    keys = k.shape[-3]
    shapes = ((*batch, rows, 1, 1, keys), (*batch, 1, heads, length, keys))
    for name, bias, shape in zip(_NAMES, (row_bias, pair_bias), shapes, strict=True):
        if bias is None:
            continue
        require_tensor(name, bias)
        if tuple(bias.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(bias.shape)}")
