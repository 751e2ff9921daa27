"""Plain eager calls, which nothing watches, and what tells one from another."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from attn_core.tiling import allows_tf32

_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_NUMBERS = frozenset({bool, int, float})
# Arguments of any other type, tensor subclasses first of all, go through the dispatcher.
_PLAIN = _TENSORS | _NUMBERS | {torch.dtype, str, type(None)}
_SEQUENCES = frozenset({list, tuple})
_ALIGNMENT = 16  # bytes: kernels are compiled, and chosen, for addresses that are less aligned


class Signature(NamedTuple):
    """What a call has in common with others, and its tensors.

    Attributes
    ----------
    key : hashable
        All that may decide which kernels run on which memory, but for addresses.
    tensors : list of Tensor
        Those among the arguments, in their order.
    pointers : list of int
        Their addresses.
    """

    key: Hashable
    tensors: list[torch.Tensor]
    pointers: list[int]


class Observer(TorchDispatchMode):
    """A mode of the dispatcher that changes nothing: what runs in it is still plain."""


def is_plain_eager(args: Sequence[Any]) -> bool:
    """Whether nothing watches the call: no compiler, tracer, mode, transform or tensor subclass.

    Its arguments are tensors as such, None, names, dtypes, numbers and lists of numbers. No tensor
    is negated by a mark alone, as ``x.conj().imag`` is: kernels would not see it, and the
    dispatcher negates its memory. Nor does one stand for a batch, as those of
    ``torch.autograd.grad(is_grads_batched=True)`` do.
    """
    is_watched = (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or (torch._C._len_torch_dispatch_stack() > 0 and not _is_only_observed())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )
    if is_watched or not (_PLAIN.issuperset(map(type, args)) or all(map(_is_plain, args))):
        return False
    for arg in args:
        if type(arg) in _TENSORS and (arg.is_neg() or is_legacy_batchedtensor(arg)):
            return False
    return True


def needs_grad(args: Sequence[Any]) -> bool:
    """Whether autograd will ask for the gradient of a tensor among `args`."""
    return torch.is_grad_enabled() and any(
        isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
    )


def signature(args: Sequence[Any]) -> Signature | None:
    """Describe plain arguments; None where one has no address, or less aligned than new memory.

    Beside metadata and numbers the key holds which tensors begin at the same address, whether
    gradients are recorded, and what torch allows: TF32, and sums in any order.
    """
    tensors: list[torch.Tensor] = []
    pointers: list[int] = []
    key: list[Any] = []
    misaligned = 0
    try:
        for arg in args:
            kind = type(arg)
            if kind in _TENSORS:
                pointer = arg.data_ptr()
                tensors.append(arg)
                pointers.append(pointer)
                misaligned |= pointer % _ALIGNMENT
                key += (kind, arg.shape, arg.stride(), arg.dtype, arg.device, arg.requires_grad)
                key.append(pointers.index(pointer))
            else:
                key += (kind, _by_value(arg) if kind in _SEQUENCES else arg)
    except RuntimeError:  # of a sparse or nested tensor, which the call itself is to refuse
        return None
    key += (torch.is_grad_enabled(), allows_tf32(), torch._C._get_deterministic_algorithms())
    return None if misaligned else Signature(tuple(key), tensors, pointers)


def _is_only_observed() -> bool:
    modes = map(torch._C._get_dispatch_stack_at, range(torch._C._len_torch_dispatch_stack()))
    return all(isinstance(mode, Observer) for mode in modes)


def _is_plain(arg: Any) -> bool:
    kind = type(arg)
    return kind in _PLAIN or (kind in _SEQUENCES and _NUMBERS.issuperset(map(type, arg)))


def _by_value(numbers: Sequence[Any]) -> Hashable:
    return tuple(numbers), tuple(map(type, numbers))
