"""The block of parameters that a shader's push constant points at."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_uint32, c_uint64
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from attn_vulkan.problem import ITEM_BYTES, Problem

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class View:
    """Where a tensor is on the device: its address and the strides of (batch, row, head, element).

    Strides count elements; a stride of 0 repeats.
    """

    address: int
    strides: tuple[int, int, int, int]

    def without_batch(self) -> View:
        """Return the view of packed sequences, whose rows are those of one batch."""
        return View(self.address, (0, *self.strides[1:]))

    def at(self, batch: int, head: int, item_bytes: int) -> View:
        """Return the view of the sequences and heads from these on."""
        elements = batch * self.strides[0] + head * self.strides[2]
        return View(self.address + elements * item_bytes, self.strides)


class _View(ctypes.Structure):
    _fields_: ClassVar = [
        ("address", c_uint64),
        ("strides", c_int64 * 4),
    ]


_VIEWS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "bias", "lse", "delta", "slopes")
_ADDRESSES = ("sinks", "cu_q", "cu_k", "lens_k", "blocks")
_OF_KEYS = ("k", "v", "dk", "dv")
_FLOAT32 = ("lse", "delta", "slopes")


class Parameters(ctypes.Structure):
    """The C side of ``Parameters`` in attention.glsl, in the same order."""

    _fields_: ClassVar = [
        *[(name, _View) for name in _VIEWS],
        *[(name, c_uint64) for name in _ADDRESSES],
        ("blocks_stride", c_int64),
        ("part_out", c_uint64),
        ("part_sums", c_uint64),
        ("batches", c_uint32),
        ("heads", c_uint32),
        ("group", c_uint32),
        ("len_q", c_uint32),
        ("len_k", c_uint32),
        ("head_dim", c_uint32),
        ("head_dim_v", c_uint32),
        ("block_size", c_uint32),
        ("splits", c_uint32),
        ("left", c_int32),
        ("right", c_int32),
        ("scale", c_float),
        ("cap", c_float),
        ("softmax_scale", c_float),
    ]


@dataclass(frozen=True)
class Tensors:
    """The tensors of one call on the device; None for those it has not.

    `cu_q` and `cu_k` (batch + 1) bound packed sequences, `lens_k` (batch) counts the keys of each
    sequence, `blocks` (batch, max_blocks) is the block table of a paged cache, whose k and v have
    the strides of (block, slot, head, element).
    """

    q: View
    k: View
    v: View
    out: View
    lse: View
    dout: View | None = None
    dq: View | None = None
    dk: View | None = None
    dv: View | None = None
    delta: View | None = None
    bias: View | None = None
    slopes: View | None = None
    sinks: int = 0
    cu_q: int = 0
    cu_k: int = 0
    lens_k: int = 0
    blocks: int = 0
    blocks_stride: int = 0


def halves(problem: Problem, tensors: Tensors, of_batch: bool) -> list[tuple[Problem, Tensors]]:
    """Cut a problem between two of its sequences, or else between two of its key heads."""
    size = problem.batches if of_batch else problem.heads_kv
    return [
        _part(problem, tensors, range(first, end), of_batch)
        for first, end in ((0, size // 2), (size // 2, size))
    ]


def _part(
    problem: Problem, tensors: Tensors, part: range, of_batch: bool
) -> tuple[Problem, Tensors]:
    batch, head_kv = (part.start, 0) if of_batch else (0, part.start)
    head = head_kv * problem.group
    fields: dict[str, Any] = {}
    for name in _VIEWS:
        view, is_of_keys = getattr(tensors, name), name in _OF_KEYS
        if view is not None:
            fields[name] = view.at(
                0 if is_of_keys and tensors.blocks else batch,  # all sequences share the blocks
                head_kv if is_of_keys else head,
                4 if name in _FLOAT32 else ITEM_BYTES[problem.dtype],
            )
    firsts = {
        "sinks": head,
        **dict.fromkeys(("cu_q", "cu_k", "lens_k"), batch),
        "blocks": batch * tensors.blocks_stride,
    }
    for name, first in firsts.items():
        address = getattr(tensors, name)
        fields[name] = address + 4 * first if address else 0
    if of_batch:
        problem = replace(problem, batches=len(part))
    else:
        problem = replace(problem, heads=len(part) * problem.group, heads_kv=len(part))
    return problem, replace(tensors, **fields)


def parameters(problem: Problem, tensors: Tensors, softmax_scale: float) -> Parameters:
    """Fill the block for one problem; `splits` is 1 and there are no parts."""
    left, right = problem.bounds
    cap = problem.softcap
    block = Parameters(
        blocks_stride=tensors.blocks_stride,
        batches=problem.batches,
        heads=problem.heads,
        group=problem.group,
        len_q=problem.len_q,
        len_k=problem.len_k,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        block_size=problem.block_size,
        splits=1,
        left=left,
        right=right,
        scale=softmax_scale / cap if cap else softmax_scale * LOG2_E,
        cap=cap * LOG2_E,
        softmax_scale=softmax_scale,
    )
    for name in _VIEWS:
        view = getattr(tensors, name)
        if view is not None:
            setattr(block, name, _View(view.address, _strides(view.strides)))
    for name in _ADDRESSES:
        setattr(block, name, getattr(tensors, name))
    return block


def _strides(values: Sequence[int]) -> ctypes.Array[c_int64]:
    return (c_int64 * 4)(*values)
