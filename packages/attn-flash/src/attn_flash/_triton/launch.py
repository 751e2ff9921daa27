"""What every launcher of this package needs to know before it starts a kernel."""

import contextlib

import torch
import triton

LOG2_E = 1.4426950408889634
_L2_SHARE = 32 << 20  # bytes of keys and values that running programs may touch at once


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's device current: Triton launches on the current one."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def padded_head_dim(head_dim: int) -> int:
    """Width of a tile that holds the head dimension: a power of two that tl.dot accepts."""
    return max(16, triton.next_power_of_2(head_dim))


def dot_precision(tensor: torch.Tensor) -> str:
    """How float32 products are computed: TF32 only where torch's own matmuls may use it."""
    if tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


def heads_per_group(k: torch.Tensor) -> int:
    """How many heads' keys and values fit the share of the L2 cache that programs work in."""
    head_bytes = 2 * k.shape[1] * k.shape[3] * k.element_size()
    return max(1, _L2_SHARE // max(head_bytes, 1))
