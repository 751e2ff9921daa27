"""EvoAttention as a torch.nn.Module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attn_core import backends
from attn_core.checks import flag, require_dtype, require_multiple, require_positive, require_rank
from attn_evo.api import evo_attention, evo_attention_step
from attn_evo.checks import DTYPES
from attn_evo.reference import NORM_EPSILON
from attn_evo.state import EvoState
from attn_evo.weights import EvoWeights

_PEER_CORE = "core."
_PEER_COPY = "ref."


class EvoAttention(nn.Module):
    """EvoAttention on embeddings: one head reads each slice of D = E / H features.

    All parameters exist from the start. A state dict of evo-attn's module can be loaded: the
    output projection, which that module does not have, then becomes the identity.

    Parameters
    ----------
    embed_dim : int
        E, a multiple of `num_heads`.
    num_heads : int
        H.
    bias : bool, default False
        Add a learned vector (E,) to the output: the bias of the output projection, or without one
        a vector that starts at zero. The four projections inside the heads, which belong to the
        formula, always have theirs.
    out_proj : bool, default True
        Mix the heads by a linear layer (E, E) at the end.
    backend : str, default "auto"
        As in `evo_attention`.
    device : torch.device or str, optional
        Where the parameters are made.
    dtype : torch.dtype, optional
        Dtype of the parameters.

    Attributes
    ----------
    q_proj, v_proj_local, global_stat_gate_proj, final_gate_proj : torch.nn.Linear
        (W_q, b_q), (W_l, b_l), (W_g, b_g) and (W_f, b_f), from D to D, shared by all heads.
    norm : torch.nn.LayerNorm
        Over the D features of a head.
    out_proj : torch.nn.Module
        Output projection, the bias alone, or the identity.

    Examples
    --------
    >>> import torch
    >>> from attn_evo import EvoAttention
    >>> layer = EvoAttention(embed_dim=256, num_heads=4)
    >>> layer(torch.randn(2, 100, 256)).shape
    torch.Size([2, 100, 256])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = False,
        out_proj: bool = True,
        *,
        backend: str = backends.AUTO,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive("embed_dim", embed_dim)
        require_positive("num_heads", num_heads)
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        bias = flag("bias", bias)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.backend = backend

        def linear(size: int, bias: bool = True) -> nn.Linear:
            return nn.Linear(size, size, bias, device=device, dtype=dtype)

        self.q_proj = linear(self.head_dim)
        self.v_proj_local = linear(self.head_dim)
        self.global_stat_gate_proj = linear(self.head_dim)
        self.final_gate_proj = linear(self.head_dim)
        self.norm = nn.LayerNorm(self.head_dim, NORM_EPSILON, device=device, dtype=dtype)
        if flag("out_proj", out_proj):
            self.out_proj: nn.Module = linear(embed_dim, bias)
        elif bias:
            self.out_proj = _Bias(embed_dim, device=device, dtype=dtype)
        else:
            self.out_proj = nn.Identity()
        self.register_load_state_dict_pre_hook(_accept_peer_names)  # type: ignore[no-untyped-call]

    @property
    def weights(self) -> EvoWeights:
        """The ten parameters as `evo_attention` takes them."""
        layers = (
            self.q_proj,
            self.v_proj_local,
            self.global_stat_gate_proj,
            self.final_gate_proj,
            self.norm,
        )
        return EvoWeights(*(tensor for layer in layers for tensor in (layer.weight, layer.bias)))

    def forward(
        self,
        x: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        causal: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend within x (B, L, E); more arguments go to `evo_attention`."""
        out = evo_attention(
            self._split_heads(x),
            causal,
            attention_mask,
            weights=self.weights,
            backend=self.backend,
            **kwargs,
        )
        return self._merge_heads(out)

    def step(
        self,
        x: torch.Tensor,
        state: EvoState | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        accum_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, EvoState]:
        """Continue a causal stream with x (B, L, E), as `evo_attention_step` does.

        Parameters
        ----------
        x : Tensor, shape (B, L, E)
            The next L embeddings.
        state : EvoState, optional
            What the call before has returned; None at the first token.
        attention_mask : Tensor, shape (B, L), optional
            Of these tokens.
        accum_dtype : torch.dtype, default that of `state`, or float32
            Dtype of the sums.

        Returns
        -------
        out : Tensor, shape (B, L, E)
            What `forward` gives for these tokens after all those before.
        state : EvoState
            For the next call.
        """
        out, state = evo_attention_step(
            self._split_heads(x),
            state,
            attention_mask,
            accum_dtype,
            weights=self.weights,
            backend=self.backend,
        )
        return self._merge_heads(out), state

    def extra_repr(self) -> str:
        """Show the settings in the module's repr."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, backend={self.backend!r}"

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        require_rank("x", x, "(B, L, E)")
        if x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must have shape (B, L, {self.embed_dim}), got {tuple(x.shape)}")
        require_dtype("x", x, DTYPES)
        heads: torch.Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2)

    def _merge_heads(self, out: torch.Tensor) -> torch.Tensor:
        merged: torch.Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return merged


class _Bias(nn.Module):
    """Adds a learned vector, zero at the start."""

    def __init__(
        self, size: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias.to(x.dtype)


def _accept_peer_names(
    module: EvoAttention, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any
) -> None:
    """Rename what evo-attn's module calls ``core.q_proj``, ...; drop its unused copy ``ref``."""
    core = [name for name in state_dict if name.startswith(prefix + _PEER_CORE)]
    if not core:
        return
    for name in core:
        state_dict[prefix + name[len(prefix + _PEER_CORE) :]] = state_dict.pop(name)
    for name in [name for name in state_dict if name.startswith(prefix + _PEER_COPY)]:
        del state_dict[name]
    for name, parameter in module.out_proj.named_parameters():
        neutral = torch.zeros_like(parameter, requires_grad=False)
        if name == "weight":
            neutral.fill_diagonal_(1)
        state_dict[f"{prefix}out_proj.{name}"] = neutral
