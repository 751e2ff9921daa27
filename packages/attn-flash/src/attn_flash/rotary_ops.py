"""Rotary embedding as torch.compile and opcheck see it, and the rule that differentiates it.

``attn_flash::rotate`` returns a new tensor, ``attn_flash::rotate_`` writes to the one it is given.
The gradient is the same rotation backwards, with `conjugate` turned round, so it can be
differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attn_core import backends
from attn_core.eager import is_plain_eager
from attn_core.library import Function, Operator
from attn_flash.rotary_checks import describe

ROTATE = "attn_flash::rotate"
ROTATE_BACKWARD = "attn_flash::rotate_backward"  # what backends call a gradient: the same function

_ARGUMENTS = (
    "Tensor cos, Tensor sin, Tensor? offsets, SymInt offset, Tensor? cu_seqlens,"
    " SymInt max_seqlen, bool interleaved, bool conjugate, str backend"
)


def _rotate(x: torch.Tensor, *args: Any) -> torch.Tensor:
    out = x.new_empty(x.shape)
    _rotate_into(out, x, *args)
    return out


def _rotate_inplace(x: torch.Tensor, *args: Any) -> None:
    _rotate_into(x, x, *args)


def _rotate_into(
    out: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
    backend: str,
) -> None:
    if backend == backends.AUTO:  # only a compiled graph leaves the choice to this point
        problem = describe(x, cos, interleaved, cu_seqlens)
        backend = backends.resolve(ROTATE, problem)
    compute = backends.implementation(ROTATE, backend)
    compute(out, x, cos, sin, offsets, offset, cu_seqlens, max_seqlen, interleaved, conjugate)


def _rotate_fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _rotate_inplace_fake(*_: Any) -> None:
    return None


class _Rotate(Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any
    ) -> torch.Tensor:
        cos, sin, offsets, ctx.offset, cu_seqlens, *ctx.static = args
        ctx.save_for_backward(cos, sin, offsets, cu_seqlens)
        return compute(x, *args)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        cos, sin, offsets, cu_seqlens = ctx.saved_tensors
        max_seqlen, interleaved, conjugate, backend = ctx.static
        back = (max_seqlen, interleaved, not conjugate, backend)
        dx = rotate(dout, cos, sin, offsets, ctx.offset, cu_seqlens, *back)
        return None, dx, *[None] * 9


class _RotateInplace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, heads: Any, static: Any, *tensors: Any) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.heads, ctx.static = heads, static
        if _refuses_changes(x):
            _rotate_heads(rotate_.below_autograd, x.data, heads, static, *tensors)
            return x.view_as(x)
        _rotate_heads(rotate_.below_autograd, x, heads, static, *tensors)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        offset, max_seqlen, interleaved, conjugate, backend = ctx.static
        static = (offset, max_seqlen, interleaved, not conjugate, backend)
        dx = rotate_inplace(dout.clone(), ctx.heads, static, *ctx.saved_tensors)
        return dx, None, None, *[None] * len(ctx.saved_tensors)


def rotate_inplace(
    x: torch.Tensor,
    heads: Sequence[tuple[int, int] | None],
    static: tuple[int, int, bool, bool, str],
    offsets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *tables: torch.Tensor,
) -> torch.Tensor:
    """Rotate parts of x in place and return it, differentiably.

    Each of `heads` is a range of x's dimension 2 to rotate, by the next two of `tables`: cosines
    and sines. None is all of x. `static` are offset, max_seqlen, interleaved, conjugate, backend.
    """
    tensors = (offsets, cu_seqlens, *tables)
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    if not is_plain_eager((x, *tensors)):
        has_own_history = needs_grad and _refuses_changes(x)
        out = x.clone() if has_own_history else x
        _rotate_heads(_copy_rotated, out, heads, static, *tensors)
        if has_own_history:
            with torch.no_grad():
                x.copy_(out)
        return out
    if needs_grad:
        return _RotateInplace.apply(x, heads, static, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    _rotate_heads(rotate_, x, heads, static, *tensors)
    return x


def _refuses_changes(x: torch.Tensor) -> bool:
    """Whether autograd allows no change in place: of a leaf, or of one of several views.

    The result is then a tensor with a history of its own, as in flash-attn.
    """
    return x.is_leaf or x._base is not None


def _rotate_heads(
    operate: Callable[..., Any],
    x: torch.Tensor,
    heads: Sequence[tuple[int, int] | None],
    static: tuple[int, int, bool, bool, str],
    *tensors: torch.Tensor | None,
) -> None:
    offsets, cu_seqlens, *tables = tensors
    offset, *rest = static
    for part, cos, sin in zip(heads, tables[::2], tables[1::2], strict=True):
        operate(_part(x, part), cos, sin, offsets, offset, cu_seqlens, *rest)


def _part(x: torch.Tensor, heads: tuple[int, int] | None) -> torch.Tensor:
    if heads is None:
        return x
    part = x[:, :, heads[0] : heads[1]]
    if part.dim() == 4:
        return part
    return part.view(*part.shape[:2], part.shape[2] * part.shape[3], part.shape[4])


def _copy_rotated(x: torch.Tensor, *args: Any) -> None:
    x.copy_(rotate(x, *args))


rotate = Operator(
    ROTATE,
    f"(Tensor x, {_ARGUMENTS}) -> Tensor",
    _rotate,
    _rotate_fake,
    autograd=_Rotate.apply,
)
rotate_ = Operator(
    "attn_flash::rotate_",
    f"(Tensor(a!) x, {_ARGUMENTS}) -> ()",
    _rotate_inplace,
    _rotate_inplace_fake,
)
