"""What the Hopper launchers derive from a problem."""

from __future__ import annotations

import functools

import torch

from attn_core.device import device_info

# Integers that change from call to call: compiled for any value.
NOT_SPECIALIZED = [
    "M",
    "N",
    "H",
    "group",
    "num_tiles",
    "num_heads",
    "heads_per_group",
    "left",
    "right",
]
LOG2_E = 1.4426950408889634
_L2_SHARE = 32 << 20  # bytes of keys and values that running programs may touch at once
_SMALLEST_SCALE = 1e-30


def padded_head_dim(head_dim: int) -> int:
    """Width of a tile that holds the head dimension: the copy engine fills it with zeros."""
    return max(64, 1 << (head_dim - 1).bit_length())


@functools.lru_cache(maxsize=None)
def num_sms(device: torch.device) -> int:
    """Programs that run at once: a program takes most of a multiprocessor's shared memory."""
    return device_info(device).num_sms


def heads_per_group(k: torch.Tensor) -> int:
    """How many heads' keys and values fit the share of the L2 cache that programs work in."""
    head_bytes = 2 * k.shape[1] * k.shape[3] * k.element_size()
    return max(1, _L2_SHARE // max(head_bytes, 1))


def scale_log2(scale: float) -> float:
    """Return the positive factor of scores in powers of two; 0 would make NaN of hidden ones."""
    return max(abs(scale) * LOG2_E, _SMALLEST_SCALE)


def tile_counter(device: torch.device) -> torch.Tensor:
    """Return a counter that is 0, and that kernels leave at 0.

    Kernels on two streams may run at once, so each stream has its own; what a graph captures keeps
    belongs to the graph.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    return _counter(device, stream)


@functools.lru_cache(maxsize=None)
def _counter(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
