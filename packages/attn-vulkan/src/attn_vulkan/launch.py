"""From a problem and its arrays in host memory to kernels on an open device, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attn_vulkan import variants
from attn_vulkan._vk.errors import VulkanError
from attn_vulkan.device import Device
from attn_vulkan.parameters import Parameters, Tensors, View, halves, parameters
from attn_vulkan.placement import Placement, Span
from attn_vulkan.problem import Problem
from attn_vulkan.runtime.commands import Commands
from attn_vulkan.runtime.context import Context
from attn_vulkan.variants import Plan

_FLOAT_BYTES = 4
_COMBINE_THREADS = 128
_DELTA_THREADS = 64
_RESULTS = ("out", "lse")
_GRADIENTS = ("dq", "dk", "dv")
_VECTOR_BYTES = 16
_FAR = 1 << 32
# Tensors whose first dimension packed sequences share.
_PACKED_Q = ("q", "out", "lse", "dout", "dq", "delta")
_PACKED_K = ("k", "v", "dk", "dv")
# The dimensions of an array that are (batch, row, head, element) of its View; None for absent ones.
_ROWS_FIRST = (0, 1, 2, 3)
_HEADS_FIRST = (0, 2, 1, 3)
_ORDERS: dict[str, tuple[int | None, ...]] = {
    **dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), _ROWS_FIRST),
    "bias": _HEADS_FIRST,
    "lse": (0, 2, 1, None),
    "delta": (0, 2, 1, None),
    "slopes": (0, None, 1, None),
}


@dataclass(frozen=True)
class Array:
    """A tensor: its first element's address, its shape and strides in elements, bytes of one.

    `owner` keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int
    owner: object

    def span(self, is_output: bool = False, is_packed: bool = False) -> Span:
        """Bytes from the first to the last element; strides are not negative.

        An output of packed sequences keeps the rows that belong to none of them.
        """
        if 0 in self.shape:
            return Span(self.pointer, 0, is_output)
        last = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        is_whole = not is_packed and last + 1 == math.prod(self.shape)
        return Span(self.pointer, (last + 1) * self.item_bytes, is_output, is_whole)

    def is_aligned(self) -> bool:
        """Whether rows are dense and start at multiples of 16 bytes, less than 4 GiB apart."""
        step = _VECTOR_BYTES // self.item_bytes
        outer = [s for n, s in zip(self.shape[:-1], self.strides[:-1], strict=True) if n > 1]
        return (
            self.pointer % _VECTOR_BYTES == 0
            and self.strides[-1] == 1
            and self.shape[-1] % step == 0
            and all(stride % step == 0 for stride in outer)
            and self.strides[1] * self.item_bytes < _FAR
        )


Arrays = Mapping[str, Array]


def are_aligned(arrays: Arrays) -> bool:
    """Whether shaders may load the rows of every tensor of heads in vectors."""
    return all(arrays[name].is_aligned() for name in arrays if _ORDERS.get(name) == _ROWS_FIRST)


def forward(context: Context, problem: Problem, arrays: Arrays, softmax_scale: float) -> None:
    """Fill ``out`` and ``lse`` among `arrays`, which are named as the fields of `Tensors`."""
    if not problem.batches * problem.heads * problem.len_q:
        return
    _run(record_forward, context, problem, arrays, softmax_scale)


def backward(context: Context, problem: Problem, arrays: Arrays, softmax_scale: float) -> None:
    """Fill ``dq``, ``dk`` and ``dv``; ``delta``, if there, holds the gradient of lse on entry."""
    _run(record_backward, context, problem, arrays, softmax_scale)


def runnable(context: Context, problem: Problem, fits: Callable[[str, Problem], bool]) -> list[str]:
    """Variants that compute a problem here, the fastest first."""
    return [
        name
        for name in variants.available(context.device, problem.dtype)
        if fits(name, problem) and context.trusts(name, problem.dtype)
    ]


def record_forward(
    context: Context,
    commands: Commands,
    problem: Problem,
    tensors: Tensors,
    softmax_scale: float,
    variant: str | None = None,
) -> Plan:
    """Record the forward pass on tensors of the device, by default with the fastest variant."""
    if not variant:
        names = runnable(context, problem, variants.fits_forward)
        variant = variants.choose(variants.ranked(context.device, problem, names))
    plan = variants.forward(context.device, variant, problem, softmax_scale)
    dispatches = [plan.groups(problem)]
    if plan.splits > 1:
        dispatches.append((problem.len_q, problem.heads, problem.batches))
    rest = _halved(context.device, problem, tensors, dispatches)
    for half in rest:
        record_forward(context, commands, *half, softmax_scale, variant)
    if rest:
        return plan
    block = parameters(problem, tensors, softmax_scale)
    if plan.splits > 1:
        _allocate_parts(context, commands, problem, plan, block)
    pipeline = context.pipelines.get(plan.shader, plan.constants)
    commands.dispatch(pipeline, bytes(block), dispatches[0])
    if plan.splits > 1:
        combine = context.pipelines.get(f"combine_{problem.dtype}", (_COMBINE_THREADS,))
        commands.dispatch(combine, bytes(block), dispatches[1])
    return plan


def record_backward(
    context: Context,
    commands: Commands,
    problem: Problem,
    tensors: Tensors,
    softmax_scale: float,
    variant: str | None = None,
) -> tuple[Plan, Plan]:
    """Record the backward pass on tensors of the device, by default with the fastest variant."""
    variant = variant or variants.choose(runnable(context, problem, variants.fits_backward))
    plans = variants.backward(context.device, variant, problem)
    deltas = -(-problem.len_q // _DELTA_THREADS), problem.heads, problem.batches
    dq, dkv = (
        (-(-length // plan.rows) * heads, 1, problem.batches)
        for plan, length, heads in (
            (plans[0], problem.len_q, problem.heads),
            (plans[1], problem.len_k, problem.heads_kv),
        )
    )
    rest = _halved(context.device, problem, tensors, [deltas, dq, dkv])
    for half in rest:
        record_backward(context, commands, *half, softmax_scale, variant)
    if rest:
        return plans
    block = parameters(problem, tensors, softmax_scale)
    has_dlse = tensors.delta is not None
    if not has_dlse:
        _allocate_delta(context, commands, problem, block)
    delta = context.pipelines.get(
        f"delta_{problem.dtype}", (_DELTA_THREADS, int(problem.is_aligned), int(has_dlse))
    )
    commands.dispatch(delta, bytes(block), deltas)
    for plan, groups in zip(plans, (dq, dkv), strict=True):
        pipeline = context.pipelines.get(plan.shader, plan.constants)
        commands.dispatch(pipeline, bytes(block), groups, barrier=plan is plans[0])
    return plans


def _halved(
    device: Device, problem: Problem, tensors: Tensors, dispatches: Sequence[tuple[int, int, int]]
) -> list[tuple[Problem, Tensors]]:
    """Halves of a problem where a dispatch has more workgroups than it may, or else nothing.

    Raises
    ------
    VulkanError
        One head of keys of one sequence has more than that.
    """
    most_x, most_y, most_z = device.workgroups
    if problem.batches > 1 and any(z > most_z for _, _, z in dispatches):
        return halves(problem, tensors, of_batch=True)
    if problem.heads_kv > 1 and any(x > most_x or y > most_y for x, y, _ in dispatches):
        return halves(problem, tensors, of_batch=False)
    for groups in dispatches:
        if any(count > most for count, most in zip(groups, device.workgroups, strict=True)):
            raise VulkanError(
                f"{device.name} starts {device.workgroups} workgroups at most, got {groups}"
            )
    return []


def _run(
    record: Callable[..., Any],
    context: Context,
    problem: Problem,
    arrays: Arrays,
    softmax_scale: float,
) -> None:
    """Place the arrays, record, run, and bring the outputs back."""
    with context.commands() as commands:
        placement = Placement(context, commands, spans(arrays))
        record(context, commands, problem, tensors_of(arrays, placement.address), softmax_scale)
        placement.fetch()


def spans(arrays: Arrays) -> list[Span]:
    """Memory that a call reads and writes."""
    is_packed = "cu_q" in arrays
    outputs = _GRADIENTS if "dq" in arrays else _RESULTS  # the backward pass reads the results
    return [array.span(name in outputs, is_packed) for name, array in arrays.items()]


def tensors_of(arrays: Arrays, address_of: Callable[[Span], int]) -> Tensors:
    """The arrays as shaders see them."""
    fields: dict[str, Any] = {}
    for name, array in arrays.items():
        address = address_of(array.span())
        order = _ORDERS.get(name)
        fields[name] = address if order is None else _view(address, array, order)
    for bounds, names in (("cu_q", _PACKED_Q), ("cu_k", _PACKED_K)):
        for name in names if bounds in arrays else ():
            if name in fields:
                fields[name] = fields[name].without_batch()
    if "blocks" in arrays:
        fields["blocks_stride"] = arrays["blocks"].strides[0]
    return Tensors(**fields)


def _view(address: int, array: Array, order: tuple[int | None, ...]) -> View:
    batch, row, head, element = (0 if dim is None else array.strides[dim] for dim in order)
    return View(address, (batch, row, head, element))


def _allocate_parts(
    context: Context, commands: Commands, problem: Problem, plan: Plan, block: Parameters
) -> None:
    """Make room for what each split computes."""
    rows = plan.splits * problem.batches * problem.heads * problem.len_q
    out, sums = (
        commands.keep(context.memory.allocate(rows * width * _FLOAT_BYTES))
        for width in (problem.head_dim_v, 2)
    )
    block.splits, block.part_out, block.part_sums = plan.splits, out.address, sums.address


def _allocate_delta(
    context: Context, commands: Commands, problem: Problem, block: Parameters
) -> None:
    """Make room for delta: (batch, head, query), or (head, query) of packed sequences."""
    rows = problem.tokens or problem.len_q
    batches = 1 if problem.tokens else problem.batches
    size = batches * problem.heads * rows * _FLOAT_BYTES
    block.delta.address = commands.keep(context.memory.allocate(size)).address
    block.delta.strides[:] = [0 if problem.tokens else problem.heads * rows, 1, rows, 0]
