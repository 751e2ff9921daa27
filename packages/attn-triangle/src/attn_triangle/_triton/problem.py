"""What the launchers of this package derive from a problem before they start a kernel."""

from __future__ import annotations

import torch

from attn_core.device import device_info
from attn_core.tiling import ceil_div

# Integers that change from call to call: compiled for any value.
NOT_SPECIALIZED = [
    "M",
    "N",
    "R",
    "H",
    "num_tiles",
    "num_tiles_n",
    "num_groups",
    "num_heads",
    "rows_per_split",
]
_QUERIES = 64  # of a program, about
_PROGRAMS_PER_SM = 4
_SMALL = 1 << 17  # elements of a bias
_ALIGNED = 16  # elements: Triton widens loads only where it knows of such a factor


def rows_per_program(q: torch.Tensor) -> int:
    """How many rows share a tile of the bias: two where registers hold two tiles of results.

    Where that would leave multiprocessors without work it is one.
    """
    B, H, R, M, D = q.shape
    programs = ceil_div(M, _QUERIES) * ceil_div(R, 2) * B * H
    has_many = programs >= _PROGRAMS_PER_SM * device_info(q.device).num_sms
    return 2 if R > 1 and q.element_size() == 2 and D <= 64 and has_many else 1


def broadcast_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides that repeat a tensor along its dimensions of size 1."""
    return tuple(
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def packed_bias(bias: torch.Tensor, length: int, block: int) -> torch.Tensor:
    """The bias (., ., ., length) with its last dimension in whole blocks, laid out for wide loads.

    What fills up the last block is -inf, which hides its scores. Each row of the pair tensor reads
    the whole bias, so one copy, small beside the queries, is soon repaid; a bias that already fits
    is returned as it is.
    """
    strides = broadcast_strides(bias)
    is_whole = bias.shape[3] == length and length % block == 0
    is_aligned = bias.data_ptr() % 16 == 0 and not any(stride % _ALIGNED for stride in strides[:3])
    # Of a small bias, a copy would take longer than it saves.
    if is_whole and ((is_aligned and strides[3] == 1) or bias.numel() <= _SMALL):
        return bias
    packed = bias.new_full((*bias.shape[:3], ceil_div(length, block) * block), -torch.inf)
    packed[..., :length] = bias
    return packed
