"""Protenix's triangle attention kernel."""

from __future__ import annotations

import torch

from attn_triangle.compat._evoformer import evoformer_attention


class TriAttentionFunction:
    """``protenix.model.tri_attention.op.TriAttentionFunction``, called by `apply`."""

    @staticmethod
    def apply(
        Q: torch.Tensor,  # noqa: N803
        K: torch.Tensor,  # noqa: N803
        V: torch.Tensor,  # noqa: N803
        Bias1: torch.Tensor | None,  # noqa: N803
        Bias2: torch.Tensor | None,  # noqa: N803
        deterministic: bool = False,
    ) -> torch.Tensor:
        """Attend; differentiable in every argument but the last.

        Parameters
        ----------
        Q, K, V : Tensor, shape (*, N, S, H, D)
            Queries, already scaled, keys and values.
        Bias1 : Tensor, shape (*, N, 1, 1, S), or None
            Added to the scores: 0 keeps a key, -1e9 masks it out.
        Bias2 : Tensor, shape (*, 1, H, S, S), or None
            Added to the scores.
        deterministic : bool, default False
            As in `attn_triangle.triangle_attention`.

        Returns
        -------
        Tensor, shape (*, N, S, H, D)
            The output, of Q's dtype.

        Raises
        ------
        ValueError
            A bias is not floating, or as for `attn_triangle.triangle_attention`.
        """
        names = ("Bias1", "Bias2")
        return evoformer_attention(Q, K, V, Bias1, Bias2, names, 1.0, deterministic)
