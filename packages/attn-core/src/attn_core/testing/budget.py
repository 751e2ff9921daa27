"""How wrong a result may be.

A result may err at most twice as much as plain PyTorch errs in the same dtype, both measured
against float64, plus twice the rounding of the reference to the result's dtype. This holds for the
largest error and for the root mean square. The budget follows the problem: no tolerance is tuned.
"""

from __future__ import annotations

import torch

FACTOR = 2.0
_ROUNDINGS = 2.0
# Nothing is wider than float64, so there the reference errs as much as the result does.
_ROUNDINGS_FLOAT64 = 256.0


def assert_within_budget(
    actual: torch.Tensor,
    same_dtype: torch.Tensor,
    reference: torch.Tensor,
    *,
    name: str = "result",
    factor: float = FACTOR,
) -> None:
    """Check a result against the error budget.

    Parameters
    ----------
    actual : Tensor
        The result under test.
    same_dtype : Tensor, same shape
        What plain PyTorch computes from the same inputs in their own dtype.
    reference : Tensor, same shape, float64
        What plain PyTorch computes from the same inputs in float64.
    name : str, default "result"
        What the message calls the tensor.
    factor : float, default 2
        How many errors of PyTorch the result may have.

    Raises
    ------
    AssertionError
        The result is beyond the budget, holds a NaN, or has infinities in other places than the
        reference.
    ValueError
        The tensors cannot be compared: shapes differ, the reference is not float64, or one of the
        two references holds NaN.

    Examples
    --------
    >>> import torch
    >>> from attn_core.testing import assert_within_budget
    >>> x = torch.randn(100)
    >>> assert_within_budget(x.exp(), torch.exp(x), x.double().exp())
    """
    _require_comparable(actual, same_dtype, reference)
    dtype = actual.dtype
    actual, same_dtype, reference = (
        tensor.detach().double().cpu() for tensor in (actual, same_dtype, reference)
    )
    _check_special_values(name, actual, reference)
    finite = reference.isfinite()
    if not finite.any():
        return
    actual, same_dtype, reference = actual[finite], same_dtype[finite], reference[finite]
    error, torch_error = actual - reference, same_dtype - reference
    roundings = _ROUNDINGS_FLOAT64 if dtype == torch.float64 else _ROUNDINGS
    rounding = roundings * torch.finfo(dtype).eps / 2 * reference
    for measure, size in (("largest", _largest), ("rms", _rms)):
        allowed = factor * size(torch_error) + size(rounding)
        if not size(error) <= allowed:
            raise AssertionError(
                f"{name}: {measure} error {size(error):.3e} is over the budget {allowed:.3e} "
                f"(PyTorch in the same dtype errs {size(torch_error):.3e})"
            )


def _require_comparable(
    actual: torch.Tensor, same_dtype: torch.Tensor, reference: torch.Tensor
) -> None:
    if reference.dtype != torch.float64:
        raise ValueError(f"reference must have dtype float64, got {reference.dtype}")
    if not actual.shape == same_dtype.shape == reference.shape:
        raise ValueError(
            "actual, same_dtype and reference must have the same shape, got "
            f"{tuple(actual.shape)}, {tuple(same_dtype.shape)} and {tuple(reference.shape)}"
        )
    for name, tensor in (("same_dtype", same_dtype), ("reference", reference)):
        if tensor.isnan().any():
            raise ValueError(f"{name} must hold no NaN: nothing can be compared with one")


def _check_special_values(name: str, actual: torch.Tensor, reference: torch.Tensor) -> None:
    if actual.isnan().any():
        raise AssertionError(f"{name}: {int(actual.isnan().sum())} of {actual.numel()} are NaN")
    infinite = reference.isinf() | actual.isinf()
    if not torch.equal(actual[infinite], reference[infinite]):
        raise AssertionError(f"{name}: infinities differ from those of the reference")


def _largest(error: torch.Tensor) -> float:
    return error.abs().max().item()


def _rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()
