"""How the forward kernels run: tiles, the depth of rings, and who computes when.

Measured on an H200 with Triton 3.6.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from attn_flash._hopper import problem


class Schedule(NamedTuple):
    """How the forward kernel runs.

    Attributes
    ----------
    consumers : int
        Warpgroups that compute, 64 queries each.
    block_n : int
        Keys of one step.
    q_stages, k_stages, v_stages : int
        Buffers of queries (for each consumer), keys and values.
    takes_turns : bool
        Whether consumers start their products one after another, so that one's softmax runs under
        the other's products.
    is_dynamic : bool
        Whether programs take the next tile when they are free, at the price of an atomic addition
        a tile, instead of every n-th.
    stages_out : bool
        Whether out leaves through shared memory rather than straight from registers.
    scores_first : bool
        Whether consumers start the first scores of the next tile before a tile's last output, and
        do their softmax under it.
    stores_first : bool
        Whether they otherwise store a tile's out before that softmax.
    skips : bool
        Whether a consumer leaves out blocks of keys that only others of its tile see; without
        turns.
    keeps_pivots : bool
        Whether a row keeps its pivot until scores pass it by far, which takes a look at every block
        and spares most of them the rescaling of out.
    """

    consumers: int = 2
    block_n: int = 128
    q_stages: int = 2
    k_stages: int = 2
    v_stages: int = 2
    takes_turns: bool = True
    is_dynamic: bool = False
    stages_out: bool = True
    scores_first: bool = False
    stores_first: bool = True
    skips: bool = False
    keeps_pivots: bool = True


_WIDE = Schedule(
    block_n=64, q_stages=1, k_stages=3, takes_turns=False, stages_out=False, stores_first=False
)
_NARROW = Schedule(block_n=64, k_stages=3, v_stages=3, takes_turns=False, skips=True)
_NARROW_KEYS = 512  # of a window, at most, in which most blocks cross an edge
_LONG = 2048  # keys from which 192 queries at a time pay
_LONG_RAGGED = 4096  # and for ragged sequences with a closed window
_SHORT = 320  # queries and keys, at most, of a head that fits shared memory as a whole
_SHORT_BACKWARD = 272  # tokens, at most, of a head whose gradients fit shared memory
_PORTABLE_BACKWARD = 448  # tokens up to which narrow heads go backward faster without Gluon


@functools.lru_cache
def schedule(head_dim: int, len_k: int, window: tuple[int, int], is_ragged: bool) -> Schedule:
    """Choose the schedule for heads, keys and a window, and for ragged sequences."""
    block_d = problem.padded_head_dim(head_dim)
    is_closed = window != (-1, -1)
    tiles_differ = is_closed or is_ragged
    if block_d == 256:
        return _WIDE._replace(is_dynamic=tiles_differ)
    if min(window) >= 0 and sum(window) < _NARROW_KEYS:
        return _NARROW._replace(is_dynamic=True)
    if block_d == 64 and len_k >= (_LONG_RAGGED if is_closed and is_ragged else _LONG):
        return Schedule(3, is_dynamic=tiles_differ)
    return Schedule(
        is_dynamic=tiles_differ,
        scores_first=block_d == 128 and is_closed and window[0] < 0,
        keeps_pivots=block_d == 128 or len_k >= _LONG,
    )


def is_short(q: torch.Tensor, k: torch.Tensor, window: tuple[int, int]) -> bool:
    """Whether the kernel for short sequences computes q (B, M, H, D) and k (B, N, H_KV, D)."""
    B, M, H, D = q.shape
    limit = _SHORT if M > 64 else _SHORT // 2  # heads of one tile need a third in shared memory
    fits = D <= 64 and M <= _SHORT and k.shape[1] <= limit
    return fits and window == (-1, -1) and problem.num_sms(q.device) <= B * H


def is_short_backward(q: torch.Tensor, k: torch.Tensor, window: tuple[int, int]) -> bool:
    """Whether one program computes all gradients of a head of q and k."""
    B, M, H, D = q.shape
    fits = D <= 64 and 0 < M <= _SHORT_BACKWARD and k.shape[1:3] == (M, H)
    return fits and window == (-1, -1) and problem.num_sms(q.device) <= B * H


def is_portable_backward(head_dim: int, longest: int) -> bool:
    """Whether Triton's portable kernels are faster backward: for narrow heads of few tokens."""
    return head_dim <= 64 and longest <= _PORTABLE_BACKWARD
