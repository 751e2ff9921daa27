"""What the Hopper launchers derive from a problem, and which problems they take."""

from __future__ import annotations

import functools

import torch

from attn_core.device import device_info, triton_version


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
TRITON_VERSIONS = ((3, 6),)
"""Those that the kernels compile and were measured with: Gluon changes between releases."""
_L2_SHARE = 32 << 20  # bytes of keys and values that running programs may touch at once
_LENGTH_LIMIT = 1 << 30  # coordinates of the copy engine are 32-bit integers


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


@functools.lru_cache(maxsize=None)
def counter(device):
    return torch.zeros(1, dtype=torch.int32, device=device)
