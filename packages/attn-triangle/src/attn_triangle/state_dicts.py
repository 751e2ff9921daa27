"""Weights of other projects' triangle attention modules, under the names of `TriangleAttention`.

All of them descend from OpenFold's and differ in two ways: OpenFold-3 calls the projection to the
pair bias ``linear_z``, and the projections of the gate and of the output have no bias in Boltz,
Protenix and OpenFold-3, where it counts as 0. cuEquivariance's and RoseTTAFold's fused projections
are no modules of this kind and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_RENAMED = {"linear_z.weight": "linear.weight"}
_WEIGHTS = (
    "layer_norm.weight",
    "layer_norm.bias",
    "linear.weight",
    *(f"mha.linear_{name}.weight" for name in "qkvgo"),
)
_BIASES = ("mha.linear_g.bias", "mha.linear_o.bias")


def convert_state_dict(
    state_dict: Mapping[str, torch.Tensor], *, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Return the weights of another project's module as `TriangleAttention` loads them.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        Of a triangle attention module of OpenFold, OpenFold-3, Boltz or Protenix, or of a model
        that holds one.
    prefix : str, default ""
        Name of the module within the model, with or without a dot at its end.

    Returns
    -------
    dict of str to Tensor
        What ``TriangleAttention.load_state_dict`` takes; biases that the other module lacks are 0.

    Raises
    ------
    ValueError
        The weights are not those of triangle attention.

    Examples
    --------
    >>> from attn_triangle import TriangleAttention, convert_state_dict
    >>> layer = TriangleAttention(c_in=16, c_hidden=8, no_heads=2)
    >>> model = {f"tri_att_end.{name}": x for name, x in layer.state_dict().items()}
    >>> layer.load_state_dict(convert_state_dict(model, prefix="tri_att_end"))
    <All keys matched successfully>
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    prefix = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in state_dict.items()
        if name.startswith(prefix)
    }
    own = {_RENAMED.get(name, name): tensor for name, tensor in own.items()}
    missing = [name for name in _WEIGHTS if name not in own]
    unknown = [name for name in own if name not in (*_WEIGHTS, *_BIASES)]
    if missing or unknown:
        raise ValueError(
            "state_dict must hold the weights of one triangle attention module under prefix "
            f"{prefix!r}, missing {missing} and unknown {unknown[:8]}"
        )
    for name in _BIASES:
        weight = own[name.replace("bias", "weight")]
        own.setdefault(name, weight.new_zeros(weight.shape[0]))
    return own


def sizes_of(converted: Mapping[str, torch.Tensor]) -> tuple[int, int, int]:
    """Return c_in, c_hidden and no_heads of a module with these weights."""
    no_heads, c_in = converted["linear.weight"].shape
    width = converted["mha.linear_q.weight"].shape[0]
    if width % no_heads:
        raise ValueError(
            f"state_dict must have queries in {no_heads} heads, got {width} channels of queries"
        )
    return c_in, width // no_heads, no_heads
