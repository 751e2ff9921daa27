"""MegaFold's fused evoformer attention."""

from __future__ import annotations

import torch

from attn_triangle.compat._evoformer import evoformer_attention


class TritonEvoformer:
    """``megafold.model.FusedEvoAttention.evoattention.TritonEvoformer``, called by `apply`."""

    @staticmethod
    def apply(
        Q: torch.Tensor,  # noqa: N803
        K: torch.Tensor,  # noqa: N803
        V: torch.Tensor,  # noqa: N803
        res_mask: torch.Tensor,
        pair_bias: torch.Tensor,
    ) -> torch.Tensor:
        """Attend; differentiable in every argument.

        Parameters
        ----------
        Q, K, V : Tensor, shape (*, N, L, H, D)
            Queries, keys and values; the scores are scaled by 1 / sqrt(D).
        res_mask : Tensor, shape (*, N, 1, 1, L)
            Added to the scores: 0 keeps a key, -1e9 masks it out. A mask of bool is refused: added
            as 0 and 1 it would hide nothing.
        pair_bias : Tensor, shape (*, 1, H, L, L)
            Added to the scores.

        Returns
        -------
        Tensor, shape (*, N, L, H, D)
            The output, of Q's dtype.

        Raises
        ------
        ValueError
            `res_mask` is of bool, or as for `attn_triangle.triangle_attention`.
        """
        return evoformer_attention(Q, K, V, res_mask, pair_bias, ("res_mask", "pair_bias"))
