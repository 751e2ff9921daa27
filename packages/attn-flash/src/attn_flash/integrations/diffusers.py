"""diffusers: models whose attention is computed by this package.

    from attn_flash.integrations import diffusers as hook
    hook.register()
    model.set_attention_backend("attn")

diffusers 0.35 and newer keep their backends in an enum and a registry that are private; both are
extended here, and `unregister` takes the name out again.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from attn_core.errors import UnsupportedProblemError
from attn_flash.integrations import sdpa
from attn_flash.integrations._attend import attend

__all__ = ["NAME", "attention", "register", "unregister"]

NAME = "attn"


def register(name: str = NAME) -> None:
    """Make this package known to diffusers, as an attention backend.

    Parameters
    ----------
    name : str, default "attn"
        What ``set_attention_backend`` then takes; lower case.

    Raises
    ------
    ValueError
        diffusers has another backend of that name, or the name is not in lower case.
    ImportError
        diffusers is not installed, or older than 0.35.
    """
    names, registry = _registry()
    if name != name.lower():
        raise ValueError(f"name must be in lower case, got {name!r}")
    if name in names._value2member_map_:
        if registry._backends.get(names(name)) is attention:
            return
        raise ValueError(f"name must be new to diffusers, which has a backend {name!r}")
    member = str.__new__(names, name)
    member._name_, member._value_ = name.upper(), name
    names._member_map_[member._name_] = member
    names._value2member_map_[name] = member
    names._member_names_.append(member._name_)
    registry.register(member)(attention)


def unregister(name: str = NAME) -> None:
    """Undo `register`; without one nothing happens.

    Parameters
    ----------
    name : str, default "attn"
        As in `register`. Models set to it must be set to another backend first.
    """
    names, registry = _registry()
    member = names._value2member_map_.get(name)
    if member is None or registry._backends.get(member) is not attention:
        return
    if registry._active_backend == member:
        registry.set_active_backend(names.NATIVE)
    for table in (registry._backends, registry._constraints, registry._supported_arg_names):
        table.pop(member, None)
    del names._value2member_map_[name], names._member_map_[member._name_]
    names._member_names_.remove(member._name_)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """Attend, with the arguments diffusers gives its attention backends.

    Parameters
    ----------
    query, key, value : Tensor, shape (B, M, H, D), (B, N, H_KV, D) and (B, N, H_KV, D_v)
        Heads last.
    attn_mask : Tensor, optional
        Boolean or added to the scores: padding (B, N), else what broadcasts to (B, H, M, N).
    dropout_p, is_causal, scale, enable_gqa
        As in torch's scaled_dot_product_attention.
    return_lse : bool, default False
        Must be False.
    _parallel_config : object, optional
        Must be None: context parallelism is not supported.

    Returns
    -------
    Tensor, shape (B, M, H, D_v)
        Of query's dtype.

    Raises
    ------
    UnsupportedProblemError
        An argument that must be None or False is not.
    ValueError
        A shape does not fit; the message names it.
    """
    if return_lse:
        raise UnsupportedProblemError("return_lse must be False, got True")
    if _parallel_config is not None:
        raise UnsupportedProblemError("context parallelism is not supported by this backend")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal must be False where there is an attn_mask, got True")
    if not enable_gqa and query.shape[2] != key.shape[2]:
        raise ValueError(
            "query and key must have the same number of heads without enable_gqa, got "
            f"{query.shape[2]} and {key.shape[2]}"
        )
    window = (-1, -1)
    if is_causal:
        window, key, value = sdpa.upper_left(query.shape[1], key, value, dim=1)
    if attn_mask is not None and attn_mask.dim() == 2:
        is_padding = attn_mask.shape == (query.shape[0], key.shape[1])
        attn_mask = attn_mask[:, None, None] if is_padding else attn_mask[None, None]
    return attend(
        query, key, value, scale=scale, window=window, dropout_p=dropout_p, mask=attn_mask
    )


def _registry() -> tuple[Any, Any]:
    dispatch: Any = importlib.import_module("diffusers.models.attention_dispatch")
    return dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
