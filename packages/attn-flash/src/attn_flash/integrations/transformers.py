"""Hugging Face transformers: models whose attention is computed by this package.

    from attn_flash.integrations import transformers as hook
    hook.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="attn")

Any model that takes its attention from ``AttentionInterface`` runs: grouped heads, sliding windows,
softcaps, sinks, position biases, packed sequences, left and right padding, every kind of cache.
Plain causal and windowed masks are not materialised, but for models made for eager attention alone;
padding costs one row of numbers for each sequence; masks of any other pattern are handed on as they
are. A model that computes all of its attention by itself is refused.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F

from attn_core.errors import UnsupportedProblemError
from attn_flash.api import flash_attn_varlen_func
from attn_flash.integrations._attend import attend

__all__ = ["NAME", "attention_forward", "attention_mask", "register", "unregister"]

NAME = "attn"
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def register(name: str = NAME) -> None:
    """Make this package known to transformers, as an attention implementation.

    Parameters
    ----------
    name : str, default "attn"
        What ``attn_implementation=`` then takes. Not a name with "flash" in it: transformers takes
        every such name for a build of flash-attn, and looks for that.

    Raises
    ------
    ValueError
        There is "flash" in the name.
    ImportError
        transformers is not installed, or older than 4.53.
    """
    if "flash" in name:
        raise ValueError(f'name must not contain "flash", which transformers keeps, got {name!r}')
    transformers = _transformers()
    transformers.AttentionInterface.register(name, attention_forward)
    transformers.AttentionMaskInterface.register(name, attention_mask)


def unregister(name: str = NAME) -> None:
    """Undo `register`; without one nothing happens.

    Parameters
    ----------
    name : str, default "attn"
        As in `register`.
    """
    transformers = _transformers()
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend, with the arguments transformers gives its attention functions.

    Parameters
    ----------
    module : Module
        The attention layer.
    query, key, value : Tensor, shape (B, H, M, D), (B, H_KV, N, D) and (B, H_KV, N, D_v)
        Heads first.
    attention_mask : Tensor, optional
        From `attention_mask`: None, padding (B, N), or a whole mask that broadcasts to (B, H, M, N)
        and holds causality and windows too.
    dropout, scaling, sliding_window, softcap, is_causal, s_aux, position_bias
        As in transformers; `s_aux` are sinks (H,), `position_bias` is added to the scores.
    cache : object, optional
        Must be None: the paged cache of continuous batching is not supported.
    **kwargs
        ``cu_seq_lens_q`` and its companions are of packed sequences; others say nothing here.

    Returns
    -------
    out : Tensor, shape (B, M, H, D_v)
        Heads last, as transformers wants it.
    weights : None
        They are never computed.

    Raises
    ------
    UnsupportedProblemError
        The weights are asked for, or the cache is that of continuous batching.
    """
    if kwargs.get("output_attentions"):
        raise UnsupportedProblemError(
            'output_attentions must be False, weights are never computed: use attention "eager"'
        )
    if cache is not None:
        raise UnsupportedProblemError(
            f"cache must be None: continuous batching is not supported, got {type(cache).__name__}"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    softcap = softcap or 0.0
    if any(kwargs.get(name) is not None for name in _PACKED):
        window = _window(sliding_window, causal)
        out = _attend_packed(q, k, v, dropout, scaling, window, softcap, s_aux, kwargs)
        return out, None
    mask = attention_mask
    if mask is not None and mask.dim() == 4:
        causal, sliding_window = False, None
        mask = mask[..., : key.shape[2]]
    elif mask is not None:
        mask = mask[:, None, None, :]
    out = attend(
        q,
        k,
        v,
        scale=scaling,
        window=_window(sliding_window, causal),
        softcap=softcap,
        dropout_p=dropout,
        mask=mask,
        bias=position_bias,
        sinks=s_aux,
    )
    return out, None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Say what `attention_forward` has to know of a mask, with the arguments of transformers.

    Parameters
    ----------
    batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask
        As in ``transformers.masking_utils.sdpa_mask``.
    local_size, allow_is_causal_skip, allow_is_bidirectional_skip
        As there.
    **kwargs
        Handed on to it; `config` among them is the model's.

    Returns
    -------
    Tensor or None
        None where causality and the window say everything, (B, N) bool where there is padding
        besides, else (B, 1, M, N) bool; added to the scores where the model is made for attention
        "eager" alone.

    Raises
    ------
    UnsupportedProblemError
        The model computes attention by itself, and would take None for a mask that hides nothing.
    """
    needs_all = _is_made_for_eager(type(kwargs.get("config")))
    is_plain = not needs_all and (allow_is_causal_skip or allow_is_bidirectional_skip)
    if not is_plain or not _ends_together(q_length, q_offset, kv_length, kv_offset):
        masks = _transformers("masking_utils")
        make = masks.eager_mask if needs_all else masks.sdpa_mask
        mask: torch.Tensor | None = make(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function or masks.causal_mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **kwargs,
        )
        return mask
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[1]
    padding = F.pad(attention_mask.bool(), (0, max(missing, 0)))
    padding = padding[:, kv_offset : kv_offset + kv_length]
    if not torch.compiler.is_compiling() and bool(padding.all()):
        return None
    return padding


def _transformers(module: str = "") -> Any:
    return importlib.import_module(f"transformers.{module}".rstrip("."))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_made_for_eager(config: type) -> bool:
    """Whether a mask has to tell a model all: layers may compute attention, or not say if causal.

    A model none of whose layers calls `attention_forward` is refused.
    """
    return _reads_whole_masks(config)


@functools.cache
def _reads_whole_masks(config: type) -> bool:
    model: Any = _transformers("models.auto.modeling_auto").MODEL_MAPPING.get(config, None)
    can_be_set = getattr(model, "_can_set_attn_implementation", None)  # since transformers 4.56
    if can_be_set is None or model._supports_attention_backend or model._supports_sdpa:
        return False
    if can_be_set():
        return True
    raise UnsupportedProblemError(
        f"{model.__name__} does not take its attention from AttentionInterface: "
        'use attention "eager"'
    )


def _ends_together(
    q_length: int, q_offset: int | torch.Tensor, kv_length: int, kv_offset: int
) -> bool:
    """Whether the last query is at the position of the last key, as windows here have it."""
    if isinstance(q_offset, torch.Tensor):
        return False  # of a static cache, whose keys go on after the last query
    return q_offset + q_length == kv_offset + kv_length


def _window(sliding_window: int | None, causal: bool) -> tuple[int, int]:
    reach = -1 if sliding_window is None else sliding_window - 1
    return reach, 0 if causal else reach


def _attend_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: tuple[int, int],
    softcap: float,
    sinks: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Attend within sequences that lie one after the other along the only row of the batch."""
    bounds_q, bounds_k, longest_q, longest_k = (kwargs.get(name) for name in _PACKED)
    if q.shape[0] != 1 or bounds_q is None or longest_q is None:
        raise ValueError(
            "packed sequences must come in one row with cu_seq_lens_q and max_length_q, got "
            f"{q.shape[0]} rows and {kwargs.keys() & set(_PACKED)}"
        )
    bounds_k = bounds_q if bounds_k is None else bounds_k
    out = flash_attn_varlen_func(
        q[0],
        k[0],
        v[0],
        bounds_q.to(torch.int32),
        bounds_k.to(torch.int32),
        int(longest_q),
        int(longest_q if longest_k is None else longest_k),
        dropout,
        scaling,
        window_size=window,
        softcap=softcap,
        sinks=sinks,
    )
    result: torch.Tensor = out.unsqueeze(0)
    return result
