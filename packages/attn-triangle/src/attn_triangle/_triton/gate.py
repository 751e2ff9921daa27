"""The epilogue of the module, out * sigmoid(logits), in one kernel a pass.

PyTorch would write the sigmoid to memory, and keep it there until the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attn_core import tiling
from attn_core.launch import Launcher
from attn_core.tuning import TileConfig

_CONFIG = TileConfig(1, 1024, 4, 2)


@triton.jit
def _gate_kernel(out_ptr, logits_ptr, gated_ptr, num_elements, BLOCK_N: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < num_elements
    out = tl.load(out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    logits = tl.load(logits_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    gated = out * tl.sigmoid(logits)
    tl.store(gated_ptr + offs, gated.to(gated_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_backward_kernel(
    dgated_ptr, out_ptr, logits_ptr, dout_ptr, dlogits_ptr, num_elements, BLOCK_N: tl.constexpr
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < num_elements
    dgated = tl.load(dgated_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    opening = tl.sigmoid(tl.load(logits_ptr + offs, mask=mask, other=0.0).to(tl.float32))
    dout = dgated * opening
    dlogits = dout * out * (1.0 - opening)
    tl.store(dout_ptr + offs, dout.to(dout_ptr.dtype.element_ty), mask=mask)
    tl.store(dlogits_ptr + offs, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


_launch = Launcher(_gate_kernel)
_launch_backward = Launcher(_gate_backward_kernel)


def gate(out: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Compute out * sigmoid(logits)."""
    gated = out.new_empty(out.shape)
    _start(_launch, out.contiguous(), logits.contiguous(), gated)
    return gated


def gate_backward(
    dgated: torch.Tensor, out: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of out and logits."""
    dout, dlogits = out.new_empty(out.shape), logits.new_empty(logits.shape)
    inputs = (dgated.contiguous(), out.contiguous(), logits.contiguous())
    _start(_launch_backward, *inputs, dout, dlogits)
    return dout, dlogits


def _start(launch: Launcher, *tensors: torch.Tensor) -> None:
    num_elements = tensors[0].numel()
    if num_elements == 0:
        return
    launch(
        tiling.ceil_div(num_elements, _CONFIG.block_n),
        strides=(tuple(x.dtype for x in tensors), *_compiled_for(num_elements)),
        args=(*tensors, num_elements),
        constexprs={"BLOCK_N": _CONFIG.block_n},
        config=_CONFIG,
    )


def _compiled_for(size: int) -> tuple[bool, bool, bool]:
    """What Triton compiles an integer for: its divisibility, whether it is 1, and its width."""
    return size % 16 == 0, size == 1, size >= 1 << 31
