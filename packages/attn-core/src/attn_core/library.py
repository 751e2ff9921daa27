"""Operators as torch sees them: a thin helper over torch.library.

An `Operator` is defined in the dispatcher, so torch.compile, torch.export and opcheck see it. In
plain eager mode a call goes straight to the implementation, or repeats an earlier one, see
`replay`: the dispatcher would cost more and change nothing. Autocast stays outside: an operator
computes in the dtypes it is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from attn_core import recording
from attn_core.eager import is_plain_eager, needs_grad
from attn_core.errors import UnsupportedProblemError
from attn_core.replay import Replayed

_libraries: dict[str, torch.library.Library] = {}


class Function(torch.autograd.Function):
    """The base of rules for autograd, applied at a third of the cost of torch's own.

    That looks for transforms of torch.func, which no `Operator` lets get this far.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Compute the forward pass and record the backward pass."""
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


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
        ``autograd(compute, *args)`` computes the operator so that autograd can differentiate it,
        usually by a `Function` whose forward pass is ``compute(*args)``. Called only when a
        gradient is needed.
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
        implementation = _outside_autocast(implementation)
        autograd = None if autograd is None else _outside_autocast(autograd)
        library.define(base + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(base, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(name, fake, lib=library)
        self._name = name
        self._implementation = Replayed(implementation)
        self._autograd = autograd
        self.overload = getattr(getattr(torch.ops, namespace), base).default
        if autograd is not None:
            library.impl(base, self._dispatch_autograd, "Autograd")

    def __call__(self, *args: Any) -> Any:
        """Compute the operator; differentiable where it has an autograd rule."""
        if not is_plain_eager(args):
            return self.overload(*args)
        if self._autograd is None or not needs_grad(args):
            return self._implementation(*args)
        results = self._autograd(self.below_autograd, *args)
        tape = recording.current()
        if tape is not None:
            tape.differentiated(self._autograd, args, results)
        return results

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
        return self._autograd(self.below_autograd, *args)


def _outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*args)
        with torch._C._DisableAutocast():
            return function(*args)

    return call


def _has_tangent(args: tuple[Any, ...]) -> bool:
    """Whether a forward-mode gradient of a tensor among `args` is under way."""
    return forward_ad._current_level >= 0 and any(
        isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None
        for arg in args
    )
