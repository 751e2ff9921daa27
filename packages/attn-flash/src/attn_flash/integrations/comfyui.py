"""ComfyUI: its models' attention computed by this package.

    # custom_nodes/attn_flash/__init__.py
    from attn_flash.integrations import comfyui
    comfyui.register()
    NODE_CLASS_MAPPINGS = {}

After `register` ComfyUI knows the function "attn"; `use` makes every model that takes ComfyUI's
default run it, masks included, and `restore` ends that. For one model alone set
``transformer_options["optimized_attention_override"]`` to `override`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from attn_flash.integrations._attend import attend

__all__ = ["NAME", "attention", "override", "register", "restore", "use"]

NAME = "attn"
_DEFAULTS = ("optimized_attention", "optimized_attention_masked")
_replaced: list[tuple[Any, str, Any]] = []


def register(name: str = NAME) -> None:
    """Make this package known to ComfyUI, as an attention function.

    Parameters
    ----------
    name : str, default "attn"
        What ``get_attention_function`` then takes.

    Raises
    ------
    ImportError
        ComfyUI is not on the path.
    """
    comfy_attention = _comfy_attention()
    registered = getattr(comfy_attention, "REGISTERED_ATTENTION_FUNCTIONS", {})
    if registered.get(name) is not attention:
        comfy_attention.register_attention_function(name, attention)


def use() -> None:
    """Put this package's attention in the place of ComfyUI's default, in every loaded module.

    Modules of models bind the default when they are imported, so each of them is changed; one that
    is imported later takes the new default by itself.
    """
    if _replaced:
        return
    comfy_attention = _comfy_attention()
    for default in _DEFAULTS:
        before = getattr(comfy_attention, default)
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(default) is before:
                _replaced.append((module, default, before))
                setattr(module, default, attention)


def restore() -> None:
    """Undo `use`; without one nothing happens."""
    while _replaced:
        module, default, before = _replaced.pop()
        setattr(module, default, before)


def override(original: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Attend in the place of another attention function of ComfyUI.

    Parameters
    ----------
    original : callable
        That function; not called.
    *args, **kwargs
        Those of `attention`.

    Returns
    -------
    Tensor
        As `attention` returns it.
    """
    return attention(*args, **kwargs)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Attend, with the arguments ComfyUI gives its attention functions.

    Parameters
    ----------
    q, k, v : Tensor, shape (B, S, heads * D), or (B, heads, S, D) with `skip_reshape`
        Queries, keys and values.
    heads : int
        H.
    mask : Tensor, optional
        Boolean or added to the scores, of 2 dimensions (M, N), 3 (B, M, N) or 4.
    attn_precision : torch.dtype, optional
        Computed in float32 where it says so.
    skip_reshape : bool, default False
        The tensors come with their heads apart.
    skip_output_reshape : bool, default False
        The result is wanted with its heads apart.
    **kwargs
        ``scale`` is the factor of the scores, ``enable_gqa`` allows fewer key heads; others say
        nothing about attention.

    Returns
    -------
    Tensor, shape (B, M, heads * D), or (B, heads, M, D) with `skip_output_reshape`
        Of q's dtype.

    Raises
    ------
    ValueError
        A shape does not fit; the message names it.
    """
    dtype = q.dtype
    if attn_precision == torch.float32:
        q, k, v = (x.float() for x in (q, k, v))
    if skip_reshape:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    else:
        dim = q.shape[-1] // heads
        q, k, v = (x.unflatten(-1, (-1, dim)) for x in (q, k, v))
    if mask is not None:
        while mask.dim() < 3:
            mask = mask.unsqueeze(0)
        mask = mask.unsqueeze(1) if mask.dim() == 3 else mask
    out = attend(q, k, v, scale=kwargs.get("scale"), mask=mask).to(dtype)
    return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)


def _comfy_attention() -> Any:
    return importlib.import_module("comfy.ldm.modules.attention")
