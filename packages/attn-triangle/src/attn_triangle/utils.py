"""Helpers for tests and benchmarks of triangle attention, with TriFast's names and arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["clone_and_clear_grad", "disable_tf32", "enable_tf32", "gen_tensors"]

P = ParamSpec("P")
T = TypeVar("T")


def gen_tensors(
    n: int,
    d: int,
    h: int,
    use_mask: bool,
    device: torch.device | str,
    dtype: torch.dtype,
    batch: int = 1,
    std: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random inputs of `triangle_attention`, the floating ones ready to collect gradients.

    Parameters
    ----------
    n, d, h : int
        Residues, head dimension and heads.
    use_mask : bool
        Mask out each key with probability 1/2, or none.
    device : torch.device or str
        Where the tensors live.
    dtype : torch.dtype
        Of all but the mask.
    batch : int, default 1
        Size of the leading dimension.
    std : float, default 1.0
        Standard deviation of the normal entries.

    Returns
    -------
    q, k, v : Tensor, shape (batch, h, n, n, d)
        Leaves that require gradients.
    bias : Tensor, shape (batch, h, n, n)
        A leaf that requires gradients.
    mask : Tensor of bool, shape (batch, n, n)
        True is masked out.

    Examples
    --------
    >>> import torch
    >>> from attn_triangle.utils import gen_tensors
    >>> [tuple(x.shape) for x in gen_tensors(8, 4, 2, True, "cpu", torch.float32)][2:]
    [(1, 2, 8, 8, 4), (1, 2, 8, 8), (1, 8, 8)]
    """

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype).mul_(std).requires_grad_()

    q, k, v = (leaf(batch, h, n, n, d) for _ in range(3))
    bias = leaf(batch, h, n, n)
    mask = torch.zeros(batch, n, n, device=device, dtype=torch.bool)
    if use_mask:
        mask.bernoulli_(0.5)
    return q, k, v, bias, mask


def clone_and_clear_grad(*tensors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Take the gradients off `tensors`.

    Parameters
    ----------
    *tensors : Tensor
        Leaves; afterwards their ``grad`` is None.

    Returns
    -------
    tuple of Tensor or None
        A copy of each gradient, None where there was none.

    Examples
    --------
    >>> import torch
    >>> from attn_triangle.utils import clone_and_clear_grad
    >>> x = torch.ones(2, requires_grad=True)
    >>> x.sum().backward()
    >>> clone_and_clear_grad(x), x.grad
    ((tensor([1., 1.]),), None)
    """
    grads = tuple(None if tensor.grad is None else tensor.grad.clone() for tensor in tensors)
    for tensor in tensors:
        tensor.grad = None
    return grads


def disable_tf32(function: Callable[P, T]) -> Callable[P, T]:
    """Make `function` multiply float32 matrices in full precision; the setting is put back after.

    Parameters
    ----------
    function : callable
        Called with its arguments unchanged.

    Returns
    -------
    callable
        The wrapped function.

    Examples
    --------
    >>> import torch
    >>> from attn_triangle.utils import disable_tf32
    >>> disable_tf32(torch.matmul)(torch.eye(2), torch.ones(2))
    tensor([1., 1.])
    """
    return _with_matmul_precision(function, "highest")


def enable_tf32(function: Callable[P, T]) -> Callable[P, T]:
    """Let `function` multiply float32 matrices in TF32 where the device has it.

    Parameters
    ----------
    function : callable
        Called with its arguments unchanged.

    Returns
    -------
    callable
        The wrapped function; the setting is put back after each call.

    Examples
    --------
    >>> import torch
    >>> from attn_triangle.utils import enable_tf32
    >>> enable_tf32(torch.matmul)(torch.eye(2), torch.ones(2))
    tensor([1., 1.])
    """
    return _with_matmul_precision(function, "high")


def _with_matmul_precision(function: Callable[P, T], precision: str) -> Callable[P, T]:
    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_float32_matmul_precision(before)

    return wrapped
