"""The suite every backend of every operator must pass, ours or a third party's.

An operator package ships its cases as ``attn_x/conformance.py`` with a tuple ``CASES`` (not
imported by ``import attn_x``), and runs them in ``tests/test_conformance.py``::

    from attn_core.testing.conformance import Suite
    from attn_x.conformance import CASES

    class TestConformance(Suite):
        cases = CASES

Each case runs on every backend that `attn_core.backends.available` knows for its operator, and on
"auto", which may refuse nothing. The author of a backend for operators of others runs
`installed_cases` and names the backend::

    class TestConformance(Suite):
        cases = installed_cases()
        backends = ("mine",)

Cases should hold the sizes 0, 1, a tile and a tile plus one, and a query without keys.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attn_core import backends
from attn_core.errors import UnsupportedProblemError
from attn_core.family import MODULES
from attn_core.testing.budget import assert_within_budget
from attn_core.testing.inputs import embedded, poison_new_allocations, random_tensor

Tensors = Mapping[str, torch.Tensor]
Outputs = torch.Tensor | tuple[torch.Tensor, ...]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_RUNS_OF_A_REPLAY = 3  # after the first: `attn_core.replay` repeats what it has seen twice
_NAN_BYTE = 0xFF  # a number of nothing but these is NaN in every dtype


@dataclass(frozen=True)
class ConformanceCase:
    """One problem posed to every backend of one operator.

    Attributes
    ----------
    op : str
        Operator name, such as ``"attn_flash::attention"``.
    id : str
        The problem in words and sizes, such as ``"causal-b1-h4-m63-n129-d64"``. It also seeds.
    make_inputs : callable
        ``make_inputs(dtype, device)`` returns the input tensors by name, the same at each call.
    call : callable
        ``call(backend, **inputs)`` runs the public function: one output or a tuple of them.
    reference : callable
        ``reference(**inputs)`` computes the same outputs in plain PyTorch, in the inputs' dtype.
    grads : sequence of str, default ()
        The inputs that have a gradient.
    dtypes : sequence of torch.dtype, default float16, bfloat16, float32
        What to run it in.
    """

    op: str
    id: str
    make_inputs: Callable[[torch.dtype, torch.device], Tensors]
    call: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    grads: Sequence[str] = ()
    dtypes: Sequence[torch.dtype] = DTYPES


class Suite:
    """Tests of `cases` on `backends`; subclass it in a test module and give it cases.

    Attributes
    ----------
    cases : sequence of ConformanceCase
        What to run.
    backends : sequence of str, optional
        Names of the backends to run it on; by default "auto" and every available one.
    """

    cases: ClassVar[Sequence[ConformanceCase]] = ()
    backends: ClassVar[Sequence[str] | None] = None

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Make one test of each case, dtype, backend and pass."""
        runs = [
            (case, dtype, backend, with_grads)
            for case in self.cases
            for dtype in case.dtypes
            for backend in self.backends or (backends.AUTO, *backends.available(case.op))
            for with_grads in ((False, True) if case.grads else (False,))
        ]
        metafunc.parametrize("case, dtype, backend, with_grads", runs, ids=[_id(*r) for r in runs])

    def test_is_within_the_error_budget(
        self,
        case: ConformanceCase,
        dtype: torch.dtype,
        backend: str,
        with_grads: bool,
        device: torch.device,
    ) -> None:
        """Outputs and gradients are as near to float64 as the budget asks."""
        inputs = case.make_inputs(dtype, device)
        _assert_right(
            case, dtype, inputs, _run(case, dtype, backend, inputs, with_grads), with_grads
        )

    def test_reads_and_writes_only_what_it_may(
        self,
        case: ConformanceCase,
        dtype: torch.dtype,
        backend: str,
        with_grads: bool,
        device: torch.device,
    ) -> None:
        """Strided inputs in the middle of NaN, outputs in memory full of NaN: still right."""
        inputs = {
            name: embedded(tensor, order=_unusual_order(tensor))
            for name, tensor in case.make_inputs(dtype, device).items()
        }
        with poison_new_allocations():
            results = _run(case, dtype, backend, inputs, with_grads)
        _assert_right(case, dtype, inputs, results, with_grads)

    def test_is_deterministic(
        self,
        case: ConformanceCase,
        dtype: torch.dtype,
        backend: str,
        with_grads: bool,
        device: torch.device,
    ) -> None:
        """The same inputs give the same bits, in other memory too, and where calls are repeated."""
        inputs = case.make_inputs(dtype, device)
        results = _run(case, dtype, backend, inputs, with_grads)
        first = {name: value.detach().clone() for name, value in results.items()}
        for _ in range(1 if device.type == "cpu" else _RUNS_OF_A_REPLAY):
            inputs = _moved(inputs, case.make_inputs(dtype, device))
            again = _run(case, dtype, backend, inputs, with_grads)
            for name, value in first.items():
                if not torch.equal(value, again[name]):
                    raise AssertionError(f"{name} differs between two runs of {case.id}")


def installed_cases() -> list[ConformanceCase]:
    """Return the cases of every operator package of the family that is installed."""
    return [
        case
        for module in MODULES
        if importlib.util.find_spec(module) and importlib.util.find_spec(f"{module}.conformance")
        for case in importlib.import_module(f"{module}.conformance").CASES
    ]


def _id(case: ConformanceCase, dtype: torch.dtype, backend: str, with_grads: bool) -> str:
    part = "backward" if with_grads else "forward"
    op, name = case.op.rpartition("::")[2], str(dtype).removeprefix("torch.")
    return f"{op}-{case.id}-{name}-{backend}-{part}"


def _unusual_order(tensor: torch.Tensor) -> list[int]:
    """Reverse the order of the dimensions in memory, but keep the innermost in its place."""
    return [*reversed(range(tensor.dim() - 1)), *range(tensor.dim())[-1:]]


def _moved(old: Tensors, new: Tensors) -> Tensors:
    """Return the new inputs after the old ones, which nobody should read any more, are NaN."""
    for tensor in old.values():
        if tensor.is_floating_point():
            tensor.untyped_storage().fill_(_NAN_BYTE)  # type: ignore[attr-defined]
    return new


def _run(
    case: ConformanceCase, dtype: torch.dtype, backend: str, inputs: Tensors, with_grads: bool
) -> dict[str, torch.Tensor]:
    call = functools.partial(case.call, backend)
    try:
        return _results(case, dtype, call, inputs, with_grads)
    except UnsupportedProblemError as error:
        if backend == backends.AUTO:
            raise
        import pytest

        pytest.skip(str(error))


def _assert_right(
    case: ConformanceCase,
    dtype: torch.dtype,
    inputs: Tensors,
    results: Mapping[str, torch.Tensor],
    with_grads: bool,
) -> None:
    wide = {name: _widened(tensor) for name, tensor in inputs.items()}
    same_dtype = _results(case, dtype, case.reference, inputs, with_grads)
    reference = _results(case, dtype, case.reference, wide, with_grads)
    for name, value in results.items():
        assert_within_budget(value, same_dtype[name], reference[name], name=f"{case.id} {name}")


def _results(
    case: ConformanceCase,
    dtype: torch.dtype,
    compute: Callable[..., Outputs],
    inputs: Tensors,
    with_grads: bool,
) -> dict[str, torch.Tensor]:
    """Outputs and, where asked for, the gradients of a fixed random combination of them."""
    wanted = case.grads if with_grads else ()
    inputs = {
        name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()
    }
    outputs = compute(**inputs)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    results = {f"output {index}": output for index, output in enumerate(outputs)}
    if not with_grads:
        return results
    smooth = [output for output in outputs if output.requires_grad]
    # Rounded to the problem's dtype first: float64 has to see the very same numbers.
    cotangents = [
        random_tensor(output.shape, seed=f"{case.id}-{index}", dtype=dtype).to(output)
        for index, output in enumerate(smooth)
    ]
    grads = torch.autograd.grad(smooth, [inputs[name] for name in wanted], cotangents)
    return results | {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor
