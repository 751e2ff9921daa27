"""Attention on numpy arrays, without torch: each function validates, places and launches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attn_core import arguments, checks
from attn_vulkan import launch, variants
from attn_vulkan._vk.errors import VulkanError
from attn_vulkan.launch import Array
from attn_vulkan.problem import ITEM_BYTES, MAX_HEAD_DIM, Problem
from attn_vulkan.runtime.context import Context, open_context

if TYPE_CHECKING:
    import numpy

OPEN_WINDOW = (-1, -1)


def attention(
    q: numpy.ndarray[Any, Any],
    k: numpy.ndarray[Any, Any],
    v: numpy.ndarray[Any, Any],
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = OPEN_WINDOW,
    softcap: float = 0.0,
    bias: numpy.ndarray[Any, Any] | None = None,
    alibi_slopes: numpy.ndarray[Any, Any] | None = None,
    sinks: numpy.ndarray[Any, Any] | None = None,
    return_lse: bool = False,
    device: int | None = None,
) -> Any:
    """Softmax attention of numpy arrays on a Vulkan device.

    Parameters
    ----------
    q : ndarray, shape (B, M, H, D)
        Queries: float32, float16 or bfloat16 (of ml_dtypes); D from 1 to 256; strides may be any
        that are not negative.
    k, v : ndarray, shape (B, N, H_KV, D)
        Keys and values of q's dtype. H must be a multiple of H_KV. The head dimension of v may
        differ.
    softmax_scale : float, default 1 / sqrt(D)
        Factor of the scores.
    causal : bool, default False
        Query i sees keys up to ``i + N - M``.
    window_size : pair of int, default (-1, -1)
        Query i sees keys ``i + N - M - left`` to ``i + N - M + right``; -1 leaves a side open.
    softcap : float, default 0.0
        Scores s become ``softcap * tanh(s / softcap)``; 0 for none.
    bias : ndarray, broadcastable to (B, H, M, N), optional
        Added to the scores, of q's dtype; -inf hides a key.
    alibi_slopes : ndarray, shape (H,) or (B, H), float32, optional
        ``slope * abs(i + N - M - j)`` is subtracted from the scores.
    sinks : ndarray, shape (H,), float32, optional
        A score of each head that takes weight and has no value.
    return_lse : bool, default False
        Also return the log-sum-exp of the scores.
    device : int, optional
        Position in `devices()`; by default ``ATTN_VULKAN_DEVICE``, or else the first GPU.

    Returns
    -------
    out : ndarray, shape (B, M, H, D)
        Of q's dtype; 0 for a query without keys.
    lse : ndarray, shape (B, H, M), float32
        Only with `return_lse`; -inf for a query without keys.

    Raises
    ------
    ValueError
        A shape, dtype or number does not fit; the message names it.
    VulkanError
        There is no loader or device, or a driver fails.

    References
    ----------
    Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_vulkan
    >>> q = np.ones((1, 5, 4, 32), np.float32)
    >>> k = v = np.ones((1, 7, 2, 32), np.float32)
    >>> try:
    ...     shape = attn_vulkan.attention(q, k, v, causal=True).shape
    ... except attn_vulkan.VulkanError:  # no device on this machine
    ...     shape = q.shape
    >>> shape
    (1, 5, 4, 32)
    """
    import numpy as np

    return_lse = checks.flag("return_lse", return_lse)
    window = arguments.window(causal, window_size)
    optional = {"bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    arrays, problem = _described(q, k, v, window, softcap, optional)
    scale = arguments.softmax_scale(softmax_scale, problem.head_dim)
    batch, len_q, heads, _ = q.shape
    out = np.empty((batch, len_q, heads, v.shape[3]), q.dtype)
    lse = np.empty((batch, heads, len_q), np.float32)
    arrays |= {"out": _array("out", out), "lse": _array("lse", lse)}
    launch.forward(_opened(device, problem), _aligned(problem, arrays), arrays, scale)
    return (out, lse) if return_lse else out


def attention_backward(
    dout: numpy.ndarray[Any, Any],
    q: numpy.ndarray[Any, Any],
    k: numpy.ndarray[Any, Any],
    v: numpy.ndarray[Any, Any],
    out: numpy.ndarray[Any, Any],
    lse: numpy.ndarray[Any, Any],
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = OPEN_WINDOW,
    softcap: float = 0.0,
    bias: numpy.ndarray[Any, Any] | None = None,
    alibi_slopes: numpy.ndarray[Any, Any] | None = None,
    device: int | None = None,
) -> tuple[Any, Any, Any]:
    """Gradients of `attention` with respect to q, k and v.

    Parameters
    ----------
    dout : ndarray, shape (B, M, H, D)
        Gradient of out, of q's dtype.
    q, k, v : ndarray
        What `attention` took.
    out, lse : ndarray
        What it returned.
    softmax_scale, causal, window_size, softcap, bias, alibi_slopes, device
        As there. Sinks are known through `lse`.

    Returns
    -------
    dq, dk, dv : ndarray
        Of the shapes and dtype of q, k and v; the same bits every time.

    Raises
    ------
    ValueError, VulkanError
        As `attention`.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_vulkan
    >>> q = k = v = np.ones((1, 5, 2, 32), np.float32)
    >>> try:
    ...     out, lse = attn_vulkan.attention(q, k, v, return_lse=True)
    ...     dq, dk, dv = attn_vulkan.attention_backward(np.ones_like(out), q, k, v, out, lse)
    ... except attn_vulkan.VulkanError:  # no device on this machine
    ...     dv = v
    >>> dv.shape
    (1, 5, 2, 32)
    """
    import numpy as np

    window = arguments.window(causal, window_size)
    optional = {"bias": bias, "alibi_slopes": alibi_slopes, "sinks": None}
    arrays, problem = _described(q, k, v, window, softcap, optional)
    scale = arguments.softmax_scale(softmax_scale, problem.head_dim)
    batch, len_q, heads, _ = q.shape
    _require_shape("dout", dout, "(B, M, H, D)", (batch, len_q, heads, v.shape[3]))
    _require_shape("out", out, "(B, M, H, D)", dout.shape)
    _require_shape("lse", lse, "(B, H, M)", (batch, heads, len_q))
    for name, array, dtype in (("dout", dout, q.dtype), ("out", out, q.dtype), ("lse", lse, "f4")):
        _require_dtype(name, array, np.dtype(dtype).name)
    dq, dk, dv = (np.empty(x.shape, x.dtype) for x in (q, k, v))
    given = {"dout": dout, "out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    arrays |= {name: _array(name, array) for name, array in given.items()}
    launch.backward(_opened(device, problem), _aligned(problem, arrays), arrays, scale)
    return dq, dk, dv


def _described(
    q: Any, k: Any, v: Any, window: tuple[int, int], softcap: float, optional: dict[str, Any]
) -> tuple[dict[str, Array], Problem]:
    """Validate the inputs; return them as arrays, and the problem they pose."""
    import numpy as np

    for name, array in (("q", q), ("k", k), ("v", v)):
        if not isinstance(array, np.ndarray) or array.ndim != 4:
            got = array.shape if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(f"{name} must be an array of 4 dimensions (B, S, H, D), got {got}")
        _require_dtype(name, array, q.dtype.name if q.dtype.name in ITEM_BYTES else "")
    batch, len_q, heads, head_dim = q.shape
    _, len_k, heads_kv, _ = k.shape
    _require_shape("k", k, "(B, N, H_KV, D)", (batch, len_k, heads_kv, head_dim))
    _require_shape("v", v, "(B, N, H_KV, D_v)", (*k.shape[:3], v.shape[3]))
    checks.require_multiple("the number of heads of q", heads, "that of k and v", heads_kv)
    checks.require_range("the head dimension of q", head_dim, 1, MAX_HEAD_DIM)
    checks.require_range("the head dimension of v", v.shape[3], 1, MAX_HEAD_DIM)
    softcap = arguments.softcap(softcap)
    arrays = {name: _array(name, array) for name, array in (("q", q), ("k", k), ("v", v))}
    shapes = {"bias": (batch, heads, len_q, len_k), "slopes": (batch, heads), "sinks": (heads,)}
    dtypes = {"bias": q.dtype, "slopes": np.float32, "sinks": np.float32}
    for name, array in zip(shapes, optional.values(), strict=True):
        if array is not None:
            arrays[name] = _broadcast(name, array, shapes[name], dtypes[name])
    problem = Problem(
        dtype=q.dtype.name,
        batches=batch,
        len_q=len_q,
        len_k=len_k,
        heads=heads,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=v.shape[3],
        window=window,
        softcap=softcap,
        has_bias="bias" in arrays,
        has_slopes="slopes" in arrays,
        has_sinks="sinks" in arrays,
    )
    return arrays, problem


def _broadcast(name: str, array: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    import numpy as np

    public = {"slopes": "alibi_slopes"}.get(name, name)
    _require_dtype(public, array, np.dtype(dtype).name)
    try:
        whole = np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"{public} must have a shape that broadcasts to {shape}, got {array.shape}"
        ) from None
    return _array(public, whole)


def _aligned(problem: Problem, arrays: dict[str, Array]) -> Problem:
    return dataclasses.replace(problem, is_aligned=launch.are_aligned(arrays))


def _opened(device: Any, problem: Problem) -> Context:
    if device is not None and (isinstance(device, bool) or not hasattr(device, "__index__")):
        raise ValueError(f"device must be an integer or None, got {device!r}")
    context = open_context(device)
    reason = variants.refusal(context.device, problem.dtype)
    if reason is not None:
        raise VulkanError(reason)
    return context


def _array(name: str, array: Any) -> Array:
    strides = tuple(stride // array.itemsize for stride in array.strides)
    if any(stride < 0 and size > 1 for stride, size in zip(strides, array.shape, strict=True)):
        raise ValueError(
            f"the strides of {name} must not be negative, got {array.strides}: copy the array"
        )
    return Array(array.ctypes.data, array.shape, strides, array.itemsize, array)


def _require_shape(name: str, array: Any, symbols: str, expected: tuple[int, ...]) -> None:
    _require_array(name, array)
    if tuple(array.shape) != tuple(expected):
        raise ValueError(
            f"{name} must have shape {symbols} = {tuple(expected)}, got {tuple(array.shape)}"
        )


def _require_array(name: str, array: Any) -> None:
    import numpy as np

    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} must be an array, got {type(array).__name__}")
    if not (array.dtype.isnative and array.flags.aligned):
        raise ValueError(
            f"{name} must be aligned and of the machine's byte order, got dtype {array.dtype.str} "
            f"and strides {array.strides}: copy the array"
        )


def _require_dtype(name: str, array: Any, expected: str) -> None:
    _require_array(name, array)
    if array.dtype.name != expected:
        allowed = expected or ", ".join(ITEM_BYTES)
        raise ValueError(f"{name} must have dtype {allowed}, got {array.dtype.name}")
