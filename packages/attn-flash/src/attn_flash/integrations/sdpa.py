"""torch.nn.functional.scaled_dot_product_attention, computed by this package.

What it cannot compute goes on to torch's own function; `explain` says what does, and why.

Code that looks the function up in its module, as PyTorch's own layers and most libraries do, sees
the change at once. A name bound by ``from torch.nn.functional import ...`` before it does not.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from attn_core import backends
from attn_core.errors import BackendUnavailableError
from attn_flash.integrations._attend import attend

__all__ = ["explain", "install", "is_installed", "sdpa_patched", "uninstall"]

_original = F.scaled_dot_product_attention
_lock = threading.Lock()
_users = 0  # installations and contexts that hold the replacement in place
_installed: str | None = None  # the backend of `install`


class _Contexts(threading.local):
    """Backends of the `sdpa_patched` blocks that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.backends: list[str] = []


_contexts = _Contexts()


def install(backend: str = backends.AUTO) -> None:
    """Compute scaled_dot_product_attention here from now on, in every thread.

    Parameters
    ----------
    backend : str, default "auto"
        As in `flash_attn_func`. A named backend that refuses a problem leaves it to torch.

    Raises
    ------
    BackendUnavailableError
        No backend of that name exists.

    Examples
    --------
    >>> import attn_flash
    >>> attn_flash.install()
    >>> attn_flash.uninstall()
    """
    global _installed
    _require_backend(backend)
    with _lock:
        if _installed is None:
            _hold()
        _installed = backend


def uninstall() -> None:
    """Undo `install`; without one nothing happens.

    Examples
    --------
    >>> import attn_flash
    >>> attn_flash.uninstall()
    """
    global _installed
    with _lock:
        if _installed is not None:
            _installed = None
            _release()


def is_installed() -> bool:
    """Whether scaled_dot_product_attention is computed here, in this thread.

    Returns
    -------
    bool
        True after `install` and within `sdpa_patched`.

    Examples
    --------
    >>> from attn_flash.integrations.sdpa import is_installed
    >>> is_installed()
    False
    """
    return _backend() is not None


@contextlib.contextmanager
def sdpa_patched(backend: str = backends.AUTO) -> Iterator[None]:
    """Compute scaled_dot_product_attention here within the block, in this thread alone.

    Blocks nest, the innermost one names the backend, and `install` outlives them.

    Parameters
    ----------
    backend : str, default "auto"
        As in `install`.

    Yields
    ------
    None
        The block runs.

    Raises
    ------
    BackendUnavailableError
        No backend of that name exists.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import sdpa_patched
    >>> q = torch.randn(2, 4, 10, 32)
    >>> with sdpa_patched():
    ...     torch.nn.functional.scaled_dot_product_attention(q, q, q).shape
    torch.Size([2, 4, 10, 32])
    """
    _require_backend(backend)
    with _lock:
        _hold()
    _contexts.backends.append(backend)
    try:
        yield
    finally:
        _contexts.backends.pop()
        with _lock:
            _release()


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    """Say who would compute a call of scaled_dot_product_attention after `install`.

    Parameters
    ----------
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        As in torch. Nothing is computed.

    Returns
    -------
    str
        ``"attn_flash"``, or ``"torch: "`` and the reason.

    Examples
    --------
    >>> import torch
    >>> from attn_flash import explain
    >>> q = torch.randn(2, 4, 10, 32)
    >>> explain(q, q, q, is_causal=True)
    'attn_flash'
    >>> explain(q, q.double(), q)
    'torch: query, key and value have different dtypes or devices'
    """
    tensors = (query, key, value, attn_mask)
    reason = _refusal(*tensors, is_causal, enable_gqa)
    if reason is None:
        from torch._subclasses.fake_tensor import FakeTensorMode  # imports Triton

        mode = FakeTensorMode()
        query, key, value = (mode.from_tensor(x) for x in (query, key, value))
        mask = attn_mask if attn_mask is None else mode.from_tensor(attn_mask)
        try:
            with mode:
                _attend(
                    query,
                    key,
                    value,
                    mask,
                    dropout_p,
                    is_causal,
                    scale,
                    _backend() or backends.AUTO,
                )
        except ValueError as error:
            reason = str(error)
    return "attn_flash" if reason is None else f"torch: {reason}"


@functools.wraps(_original)
def _scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    backend = _backend()
    if (
        backend is not None
        and _refusal(query, key, value, attn_mask, is_causal, enable_gqa) is None
    ):
        try:
            return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, backend)
        except ValueError:
            pass  # torch computes it, or has its own words for what is wrong
    return _original(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _backend() -> str | None:
    return _contexts.backends[-1] if _contexts.backends else _installed


def _hold() -> None:
    global _users
    if _users == 0:
        F.scaled_dot_product_attention = _scaled_dot_product_attention
    _users += 1


def _release() -> None:
    global _users
    _users -= 1
    if _users == 0 and F.scaled_dot_product_attention is _scaled_dot_product_attention:
        F.scaled_dot_product_attention = _original


def _require_backend(backend: str) -> None:
    from attn_flash.ops import ATTENTION

    known = [backends.AUTO, *backends.available(ATTENTION)]
    if backend not in known:
        raise BackendUnavailableError(f"backend must be one of {known}, got {backend!r}")


def _refusal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """Why torch should compute the call, or raise its own error; None where this package can."""
    return (
        _refusal_of_kinds(query, key, value, attn_mask)
        or _refusal_of_shapes(query, key, value, enable_gqa)
        or _refusal_of_mask(query, key, attn_mask, is_causal)
    )


def _refusal_of_kinds(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None
) -> str | None:
    tensors = (query, key, value)
    plain = (torch.Tensor, torch.nn.Parameter)
    if any(type(x) not in plain for x in tensors):
        return "query, key or value is a subclass of Tensor"
    if attn_mask is not None and type(attn_mask) not in plain and not _is_causal_bias(attn_mask):
        return "attn_mask is a subclass of Tensor"
    if not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    ):
        return "a transform of functorch or a forward-mode gradient is under way"
    if any(x.is_nested or x.layout != torch.strided for x in tensors):
        return "query, key or value is nested or sparse"
    same_dtype = query.dtype == key.dtype == value.dtype or _autocast_dtype(query) is not None
    if not same_dtype or not query.device == key.device == value.device:
        return "query, key and value have different dtypes or devices"
    return None


def _refusal_of_shapes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> str | None:
    if not 3 <= query.dim() <= 5:
        return f"query has {query.dim()} dimensions, not 3 to 5"
    if not query.dim() == key.dim() == value.dim():
        return "query, key and value have different numbers of dimensions"
    if query.shape[:-3] != key.shape[:-3] or key.shape[:-1] != value.shape[:-1]:
        return "batch dimensions of query, key and value differ"
    if query.shape[-3] != key.shape[-3] and not enable_gqa:
        return "query and key have different numbers of heads without enable_gqa"
    return None


def _refusal_of_mask(
    query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool
) -> str | None:
    if attn_mask is None:
        return None
    if is_causal:
        return "attn_mask and is_causal are both given"
    if _is_causal_bias(attn_mask):
        return None
    if not attn_mask.is_floating_point() and attn_mask.dtype != torch.bool:
        return f"attn_mask has dtype {attn_mask.dtype}"
    scores = (*query.shape[:-1], key.shape[-2])
    sizes = zip(reversed(attn_mask.shape), reversed(scores), strict=False)
    if not 2 <= attn_mask.dim() <= len(scores) or any(a not in (1, b) for a, b in sizes):
        return f"attn_mask does not broadcast to the scores, got shape {tuple(attn_mask.shape)}"
    return None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    backend: str,
) -> torch.Tensor:
    dtype = _autocast_dtype(query)
    if dtype is not None:
        query, key, value = (x.to(dtype) for x in (query, key, value))
    window = (-1, -1)
    if _is_causal_bias(attn_mask):
        is_causal = attn_mask.variant.name == "UPPER_LEFT"  # type: ignore[union-attr]
        window = (-1, -1) if is_causal else (-1, 0)
        attn_mask = None
    if is_causal:
        window, key, value = upper_left(query.shape[-2], key, value, dim=-2)
    mask = None if attn_mask is None else _four_dimensional(attn_mask, query)
    out = attend(
        *(_heads_last(x) for x in (query, key, value)),
        scale=scale,
        window=window,
        dropout_p=dropout_p,
        mask=mask,
        backend=backend,
    )
    return out.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])


def _is_causal_bias(mask: torch.Tensor | None) -> bool:
    # Importing the module would import torch's compiler; whoever has a bias has imported it.
    module: Any = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(mask, module.CausalBias)


def _autocast_dtype(query: torch.Tensor) -> torch.dtype | None:
    """What torch's own function would cast its inputs to."""
    device = query.device.type
    # torch 2.6 cannot trace the first question
    is_known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if not is_known or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def upper_left(
    len_q: int, key: torch.Tensor, value: torch.Tensor, dim: int
) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor]:
    """Make up a causal mask that is aligned at the upper left, as torch's is.

    Windows here are aligned at the lower right: the window is moved, or keys that no query sees are
    cut off along `dim`.
    """
    len_k = key.shape[dim]
    if len_k > len_q:
        return (-1, 0), key.narrow(dim, 0, len_q), value.narrow(dim, 0, len_q)
    return (-1, len_q - len_k), key, value


def _heads_last(x: torch.Tensor) -> torch.Tensor:
    """(..., H, S, D) as (B, S, H, D)."""
    heads_first = x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, -4)
    return heads_first.transpose(1, 2)


def _four_dimensional(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A mask that broadcasts to the scores of `query`, as one of (B, H, M, N) does."""
    while mask.dim() < max(query.dim(), 4):
        mask = mask.unsqueeze(0)
    if mask.dim() == 4:
        return mask
    if mask.shape[:2] == (1, 1):
        return mask[0]
    return mask.expand(*query.shape[:2], *mask.shape[2:]).flatten(0, 1)
