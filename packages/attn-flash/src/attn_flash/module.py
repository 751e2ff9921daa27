"""Attention as a torch.nn.Module."""

from __future__ import annotations

from typing import Any

import torch

from attn_core import arguments, backends
from attn_flash import checks
from attn_flash.api import flash_attn_func


class FlashAttention(torch.nn.Module):
    """Softmax attention without parameters, for models that want a module.

    Parameters
    ----------
    attention_dropout : float, default 0.0
        Probability that a weight is dropped, in training.
    softmax_scale : float, default 1 / sqrt(D)
        Factor of the scores.
    backend : str, default "auto"
        As in `flash_attn_func`.

    Raises
    ------
    ValueError
        A number does not fit; the message names it.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import FlashAttention
    >>> q, k, v = torch.randn(3, 2, 17, 4, 32).unbind(0)
    >>> FlashAttention()(q, k, v, causal=True).shape
    torch.Size([2, 17, 4, 32])
    """

    def __init__(
        self,
        attention_dropout: float = 0.0,
        softmax_scale: float | None = None,
        *,
        backend: str = backends.AUTO,
    ) -> None:
        super().__init__()
        if softmax_scale is not None:
            softmax_scale = arguments.softmax_scale(softmax_scale, 1)
        self.attention_dropout = checks.probability(attention_dropout, "attention_dropout")
        self.softmax_scale = softmax_scale
        self.backend = backend

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        """Attend with q (B, M, H, D) to k, v (B, N, H_KV, D); more arguments go to the function."""
        out: torch.Tensor = flash_attn_func(
            q,
            k,
            v,
            dropout_p=self.attention_dropout if self.training else 0.0,
            softmax_scale=self.softmax_scale,
            causal=causal,
            backend=self.backend,
            **kwargs,
        )
        return out

    def extra_repr(self) -> str:
        """Show the settings in the module's repr."""
        return f"softmax_scale={self.softmax_scale}, backend={self.backend!r}"
