"""Operators as torch sees them: a thin helper over torch.library.

An `Operator` is defined in the dispatcher, so torch.compile, torch.export and opcheck see it. In
plain eager mode a call goes straight to the implementation: the dispatcher would add tens of
microseconds of Python and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from attn_core.errors import UnsupportedProblemError

_libraries: dict[str, torch.library.Library] = {}
# Arguments of any other type, tensor subclasses first of all, go through the dispatcher.
_PLAIN_NUMBERS = frozenset({bool, int, float})
_PLAIN_TYPES = _PLAIN_NUMBERS | {torch.Tensor, torch.nn.Parameter, torch.dtype, str, type(None)}


class Operator:
    """One operator of the dispatcher.

    Parameters
    ----------
    name : str
        Qualified name, such as ``"attn_flash::attention"``.
    schema : str
        Arguments and returns in torch's schema language.
    implementation : callable
        Computes the operator on real tensors of any device. Outputs are new tensors.
    fake : callable
        Same arguments; returns empty outputs of the right shape, stride, dtype and device.
    autograd : callable, optional
        Same arguments; computes the operator so that autograd can differentiate it, usually by an
        ``autograd.Function``. Called only when a gradient is needed.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        implementation: Callable[..., Any],
        fake: Callable[..., Any],
        autograd: Callable[..., Any] | None = None,
    ) -> None:
        namespace, base = name.split("::")
        library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
        library.define(base + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(base, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(name, fake, lib=library)
        self._name = name
        self._implementation = implementation
        self._autograd = autograd
        self.overload = getattr(getattr(torch.ops, namespace), base).default
        if autograd is not None:
            library.impl(base, self._dispatch_autograd, "Autograd")

    def __call__(self, *args: Any) -> Any:
        """Compute the operator; differentiable where it has an autograd rule."""
        if not is_plain_eager(args):
            return self.overload(*args)
        if self._autograd is not None and needs_grad(args):
            return self._autograd(*args)
        return self._implementation(*args)

    def below_autograd(self, *args: Any) -> Any:
        """Compute the operator inside an autograd.Function, where no gradient is recorded."""
        if is_plain_eager(args):
            return self._implementation(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def _dispatch_autograd(self, *args: Any) -> Any:
        if _has_tangent(args):  # torch would go on with a tangent of zeros
            raise UnsupportedProblemError(
                f"{self._name} has no forward-mode gradient: differentiate it in reverse mode"
            )
        if self._autograd is None or not needs_grad(args):
            return self.below_autograd(*args)
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedProblemError(
                f"{self._name} has no rule for torch.func.grad and its relatives: differentiate it "
                "with torch.autograd; torch.vmap around that runs"
            )
        return self._autograd(*args)


def needs_grad(args: tuple[Any, ...]) -> bool:
    """Whether autograd will ask for the gradient of a tensor among `args`."""
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.requires_grad:
                return True
    return False


def _has_tangent(args: tuple[Any, ...]) -> bool:
    """Whether a forward-mode gradient of a tensor among `args` is under way."""
    return forward_ad._current_level >= 0 and any(
        isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None
        for arg in args
    )


def is_plain_eager(args: tuple[Any, ...]) -> bool:
    """Whether nothing watches the call: no compiler, mode, transform or tensor subclass."""
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and (_PLAIN_TYPES.issuperset(map(type, args)) or all(map(_is_plain, args)))
    )


def _is_plain(arg: Any) -> bool:
    kind = type(arg)
    return kind in _PLAIN_TYPES or (kind is list and _PLAIN_NUMBERS.issuperset(map(type, arg)))
