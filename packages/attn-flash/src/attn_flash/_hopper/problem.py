"""What the Hopper launchers derive from a problem."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from attn_core.device import device_info
from attn_core.recording import each_time

# Integers that change from call to call: compiled for any value.
NOT_SPECIALIZED = [
    "B",
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
_ELEMENT_SIZE = 2  # bytes
_SMALLEST_SCALE = 1e-30


class Sequences(NamedTuple):
    """Ragged sequences, one after the other in a batch of one.

    Attributes
    ----------
    starts_q, starts_k : Tensor, shape (B + 1,), int32
        Where they begin.
    used_k : Tensor, shape (B,), int32, optional
        How many keys of each count.
    longest_k : int
        Keys of the longest one.
    """

    starts_q: torch.Tensor
    starts_k: torch.Tensor
    used_k: torch.Tensor | None
    longest_k: int

    def arguments(self) -> tuple[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return B and the tensors as kernels read them, with any one for None."""
        used = self.starts_k if self.used_k is None else self.used_k
        tensors = self.starts_q.contiguous(), self.starts_k.contiguous(), used.contiguous()
        return self.starts_q.shape[0] - 1, tensors


def padded_head_dim(head_dim: int) -> int:
    """Width of a tile that holds the head dimension: the copy engine fills it with zeros."""
    return max(64, 1 << (head_dim - 1).bit_length())


@functools.lru_cache(maxsize=None)
def num_sms(device: torch.device) -> int:
    """Programs that run at once: a program takes most of a multiprocessor's shared memory."""
    return device_info(device).num_sms


def heads_per_group(len_k: int, head_dim: int) -> int:
    """How many heads' keys and values fit the share of the L2 cache that programs work in."""
    head_bytes = 2 * len_k * head_dim * _ELEMENT_SIZE
    return max(1, _L2_SHARE // max(head_bytes, 1))


def scale_log2(scale: float) -> float:
    """Return the positive factor of scores in powers of two; 0 would make NaN of hidden ones."""
    return max(abs(scale) * LOG2_E, _SMALLEST_SCALE)


def tile_counter(device: torch.device) -> torch.Tensor:
    """Return a counter that is 0, and that kernels leave at 0.

    Kernels on two streams may run at once, so each stream has its own; what a graph captures keeps
    belongs to the graph.
    """
    return each_time(functools.partial(_current_counter, device))


def _current_counter(device: torch.device) -> torch.Tensor:
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    return _counter(device, stream)


@functools.lru_cache(maxsize=None)
def _counter(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
