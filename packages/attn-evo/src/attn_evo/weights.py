"""The ten parameters of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch

from attn_core.checks import require_positive


class EvoWeights(NamedTuple):
    """Parameters of `evo_attention`, shared by all heads; D is the head dimension.

    All ten have one dtype, which may differ from that of v: float32 weights serve bfloat16 values.
    Matrices are applied as in `torch.nn.Linear`, ``x @ w.T + b``.

    Attributes
    ----------
    w_q, b_q : Tensor, shapes (D, D) and (D,)
        Projection that the denominator divides.
    w_l, b_l : Tensor, shapes (D, D) and (D,)
        Local part of the denominator.
    w_g, b_g : Tensor, shapes (D, D) and (D,)
        Gate of the running statistic, applied to the running mean.
    w_f, b_f : Tensor, shapes (D, D) and (D,)
        Final gate.
    norm_weight, norm_bias : Tensor, shape (D,)
        Layer normalisation of the output.

    Examples
    --------
    >>> import torch
    >>> from attn_evo import EvoWeights, evo_attention
    >>> weights = EvoWeights.identity(32)
    >>> evo_attention(torch.randn(1, 4, 100, 32), weights=weights).shape
    torch.Size([1, 4, 100, 32])
    """

    w_q: torch.Tensor
    b_q: torch.Tensor
    w_l: torch.Tensor
    b_l: torch.Tensor
    w_g: torch.Tensor
    b_g: torch.Tensor
    w_f: torch.Tensor
    b_f: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor

    @classmethod
    def identity(
        cls,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> EvoWeights:
        """Return the parameter-free default: identity matrices, no biases, a plain norm.

        The local part of the denominator is then v itself and so is its numerator: their ratio
        stays within -1 and 1, and the operator has no poles.

        Parameters
        ----------
        head_dim : int
            D.
        dtype : torch.dtype, default float32
            Of all ten tensors.
        device : torch.device or str, default "cpu"
            Of all ten tensors.

        Returns
        -------
        EvoWeights
            The same at every call. Its matrices are one tensor, and so are its biases.
        """
        is_traced = torch._C._get_tracing_state() is not None
        if not isinstance(head_dim, torch.SymInt) and not is_traced:
            require_positive("head_dim", head_dim)
        matrix = torch.eye(head_dim, dtype=dtype, device=device)
        zeros = torch.zeros(head_dim, dtype=dtype, device=device)
        ones = torch.ones(head_dim, dtype=dtype, device=device)
        return cls(matrix, zeros, matrix, zeros, matrix, zeros, matrix, zeros, ones, zeros)
