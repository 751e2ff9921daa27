"""Triangle self-attention as a torch.nn.Module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from attn_core import backends
from attn_core.checks import flag, require_positive, require_shape, require_tensor
from attn_triangle._gating import sigmoid_gate
from attn_triangle.api import triangle_attention
from attn_triangle.state_dicts import convert_state_dict, sizes_of


class TriangleAttention(nn.Module):
    """Gated triangle self-attention around the starting or the ending node.

    Layer norm, projections to queries, keys, values and one bias a head, `triangle_attention`, a
    sigmoid gate and the output projection: Algorithm 13 of AlphaFold 2, or Algorithm 14, which is
    the same on the transposed pair tensor. Add the result to the input yourself. Parameters have
    OpenFold's names and its initial values: gates near open, output projection zero, so that the
    fresh module returns 0.

    Parameters
    ----------
    c_in : int
        Channels of the pair representation.
    c_hidden : int
        Channels of one head, from 1 to 128.
    no_heads : int
        Number of heads.
    starting : bool, default True
        Attend around the starting node (along rows), or else the ending node (along columns).
    deterministic : bool, default True
        As in `triangle_attention`.
    backend : str, default "auto"
        As in `triangle_attention`.

    Raises
    ------
    ValueError
        A size is not a positive integer.

    References
    ----------
    Jumper et al., "Highly accurate protein structure prediction with AlphaFold", 2021, supplement,
    Algorithms 13 and 14.

    Examples
    --------
    >>> import torch
    >>> from attn_triangle import TriangleAttention
    >>> pair = torch.randn(1, 40, 40, 128)
    >>> keep = torch.ones(1, 40, 40)
    >>> layer = TriangleAttention(c_in=128, c_hidden=32, no_heads=4, starting=False)
    >>> (pair + layer(pair, keep)).shape
    torch.Size([1, 40, 40, 128])
    """

    def __init__(
        self,
        c_in: int,
        c_hidden: int,
        no_heads: int,
        starting: bool = True,
        *,
        deterministic: bool = True,
        backend: str = backends.AUTO,
    ) -> None:
        super().__init__()
        for name, size in (("c_in", c_in), ("c_hidden", c_hidden), ("no_heads", no_heads)):
            require_positive(name, size)
        self.starting = flag("starting", starting)
        self.layer_norm = nn.LayerNorm(c_in)
        self.linear = nn.Linear(c_in, no_heads, bias=False)
        self.mha = _GatedAttention(c_in, c_hidden, no_heads, deterministic, backend)
        nn.init.normal_(self.linear.weight, std=c_in**-0.5)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        starting: bool = True,
        *,
        prefix: str = "",
        deterministic: bool = True,
        backend: str = backends.AUTO,
    ) -> TriangleAttention:
        """Build the module that computes what the module of another project does.

        Parameters
        ----------
        state_dict : mapping of str to Tensor
            Of a triangle attention module of OpenFold, OpenFold-3, Boltz or Protenix, or of a model
            that holds one.
        starting : bool, default True
            Whether it is the one around the starting node: their weights do not tell.
        prefix : str, default ""
            Name of the module within the model, such as ``"blocks.0.pair_stack.tri_att_start"``.
        deterministic, backend
            As in the constructor.

        Returns
        -------
        TriangleAttention
            With those weights, in their dtype and on their device.

        Raises
        ------
        ValueError
            The weights are not those of triangle attention.
        """
        converted = convert_state_dict(state_dict, prefix=prefix)
        module = cls(*sizes_of(converted), starting, deterministic=deterministic, backend=backend)
        module.load_state_dict(converted)
        weight = converted["mha.linear_q.weight"]
        return module.to(weight.device, weight.dtype)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Update a pair representation.

        Parameters
        ----------
        x : Tensor, shape (*, N, N, c_in)
            Pair representation.
        mask : Tensor, shape (*, N, N), optional
            Of any dtype; 1 or True *keeps* a pair, 0 or False masks it out as a key. This is
            OpenFold's convention for pair masks and the opposite of `triangle_attention`'s.

        Returns
        -------
        Tensor, shape (*, N, N, c_in)
            The update, to be added to `x`. Masked pairs get one too.

        Raises
        ------
        ValueError
            `x` or `mask` does not have the right shape.
        """
        self._check(x, mask)
        if not self.starting:
            x = x.transpose(-2, -3)
            mask = None if mask is None else mask.transpose(-1, -2)
        x = self.layer_norm(x)
        bias = self.linear(x).movedim(-1, -3)  # [*, H, N, N]
        update: torch.Tensor = self.mha(x, bias, None if mask is None else mask == 0)
        return update if self.starting else update.transpose(-2, -3)

    def extra_repr(self) -> str:
        """Show the orientation in the module's repr."""
        return f"starting={self.starting}"

    def _check(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        channels = self.layer_norm.normalized_shape[0]
        require_tensor("x", x)
        if x.dim() < 3 or x.shape[-2] != x.shape[-3] or x.shape[-1] != channels:
            raise ValueError(
                f"x must have shape (*, N, N, c_in) with c_in = {channels}, got {tuple(x.shape)}"
            )
        if mask is not None:
            require_shape("mask", mask, "(*, N, N)", x.shape[:-1])


class _GatedAttention(nn.Module):
    """Projections, attention, gate and output projection on a normalised pair representation."""

    def __init__(
        self, c_in: int, c_hidden: int, no_heads: int, deterministic: bool, backend: str
    ) -> None:
        super().__init__()
        self.deterministic = flag("deterministic", deterministic)
        self.c_hidden = c_hidden
        self.no_heads = no_heads
        self.backend = backend
        self.linear_q = nn.Linear(c_in, c_hidden * no_heads, bias=False)
        self.linear_k = nn.Linear(c_in, c_hidden * no_heads, bias=False)
        self.linear_v = nn.Linear(c_in, c_hidden * no_heads, bias=False)
        self.linear_g = nn.Linear(c_in, c_hidden * no_heads)
        self.linear_o = nn.Linear(c_hidden * no_heads, c_in)
        for projection in (self.linear_q, self.linear_k, self.linear_v):
            nn.init.xavier_uniform_(projection.weight)
        nn.init.zeros_(self.linear_g.weight)
        nn.init.ones_(self.linear_g.bias)
        nn.init.zeros_(self.linear_o.weight)
        nn.init.zeros_(self.linear_o.bias)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend within the rows of x (*, N, N, c_in); bias (*, H, N, N), mask True = masked."""
        q, k, v = (
            self._heads_first(project(x))
            for project in (self.linear_q, self.linear_k, self.linear_v)
        )
        out = triangle_attention(
            q, k, v, bias, mask, deterministic=self.deterministic, backend=self.backend
        )
        gated = sigmoid_gate(out.movedim(-4, -2).flatten(-2), self.linear_g(x), self.backend)
        update: torch.Tensor = self.linear_o(gated)
        return update

    def _heads_first(self, x: torch.Tensor) -> torch.Tensor:
        """(*, N, N, H D) as (*, H, N, N, D), a view."""
        return x.view(*x.shape[:-1], self.no_heads, self.c_hidden).movedim(-2, -4)
