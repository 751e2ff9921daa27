"""The flash-attention operators of torch itself, computed by this package on CUDA devices.

    from attn_flash.integrations import torch_flash
    torch_flash.register()
    torch.nn.attention.activate_flash_attention_impl("attn")

Then scaled_dot_product_attention wherever torch picks its flash kernel,
``torch.nn.attention.varlen`` and nested tensors all run here, forward and backward, under
torch.compile too. ``torch.nn.attention.restore_flash_attention_impl()`` ends that. torch has this
hook since 2.11.
"""

from __future__ import annotations

from typing import Any

import torch

from attn_core.errors import BackendUnavailableError, UnsupportedProblemError
from attn_flash import below_autograd
from attn_flash.checks import options_of

__all__ = ["NAME", "register"]

NAME = "attn"
_DISPATCH_KEY = "CUDA"


def register(name: str = NAME) -> None:
    """Make this package known to torch, as an implementation of flash attention.

    Parameters
    ----------
    name : str, default "attn"
        What ``torch.nn.attention.activate_flash_attention_impl`` then takes.

    Raises
    ------
    BackendUnavailableError
        This version of torch has no such hook.
    """
    add = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if add is None:
        raise BackendUnavailableError(
            "torch must be 2.11 or newer for other implementations of flash attention, got "
            f"{torch.__version__}"
        )
    add(name, register_fn=_activate)


class _Handle:
    """Keeps the operators in the dispatcher until torch asks for its own again."""

    def __init__(self, library: torch.library.Library) -> None:
        self._library: torch.library.Library | None = library

    def remove(self) -> None:
        """Give torch its own operators back."""
        if self._library is not None:
            self._library._destroy()
            self._library = None


def _activate() -> _Handle:
    library = torch.library.Library("aten", "IMPL", _DISPATCH_KEY)
    for name, function in _OPERATORS.items():
        library.impl(name, function, _DISPATCH_KEY)
    return _Handle(library)


def _flash_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Attend heads last; dense (B, S, H, D), or ragged (T, H, D) with cum_seq_q."""
    if return_debug_mask and dropout_p > 0:
        raise UnsupportedProblemError("return_debug_mask must be False with dropout, got True")
    window = _window(window_size_left, window_size_right)
    opts = options_of(
        query,
        *(dropout_p, scale, is_causal, window),
        alibi_slopes=alibi_slopes,
        seqused_k=seqused_k,
        block_table=block_table,
        **_ragged(cum_seq_q, cum_seq_k, max_q, max_k),
    )
    out, lse, rng_state = below_autograd.forward(query, key, value, opts)
    return out, lse, rng_state, rng_state.new_zeros(()), query.new_empty(0)


def _flash_attention_forward_inplace(out: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """Write the output to `out` and return lse."""
    result, lse, *_ = _flash_attention_forward(*args, **options)
    out.copy_(result)
    return lse


def _flash_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value."""
    window = _window(window_size_left, window_size_right)
    opts = options_of(
        query,
        *(dropout_p, scale, is_causal, window),
        rng_state=rng_state if dropout_p else None,
        **_ragged(cum_seq_q, cum_seq_k, max_q, max_k),
    )
    return below_autograd.backward(grad_out, query, key, value, out, logsumexp, opts)


def _scaled_dot_product_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """Attend heads first."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    sizes = (q.shape[1], k.shape[1])
    out, lse, *state = _flash_attention_forward(
        q, k, v, None, None, *sizes, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return out.transpose(1, 2), lse, None, None, *sizes, *state


def _scaled_dot_product_flash_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    *rest: Any,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value, heads first."""
    dout, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = _flash_attention_backward(dout, q, k, v, o, logsumexp, None, None, *rest, scale=scale)
    return tuple(grad.transpose(1, 2) for grad in grads)


_OPERATORS = {
    "_flash_attention_forward": _flash_attention_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_attention_forward_inplace,
    "_flash_attention_backward": _flash_attention_backward,
    "_scaled_dot_product_flash_attention": _scaled_dot_product_flash_attention,
    "_scaled_dot_product_flash_attention_backward": _scaled_dot_product_flash_attention_backward,
}


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return -1 if left is None else left, -1 if right is None else right


def _ragged(
    cum_seq_q: torch.Tensor | None, cum_seq_k: torch.Tensor | None, max_q: int, max_k: int
) -> dict[str, Any]:
    """What ragged sequences add; torch names the lengths of dense ones too."""
    if cum_seq_q is None:
        return {}
    return {
        "cu_seqlens_q": cum_seq_q,
        "cu_seqlens_k": cum_seq_k,
        "max_seqlen_q": max_q,
        "max_seqlen_k": max_k,
    }
