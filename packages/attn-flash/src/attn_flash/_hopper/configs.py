"""Schedules of the forward kernel: its tiles, the depth of its rings, and who computes when."""

from __future__ import annotations

from typing import NamedTuple


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
    is_persistent : bool
        Whether a program stays and computes tile after tile.
    is_dynamic : bool
        Whether persistent programs take the next tile when they are free, at the price of an
        atomic addition a tile, instead of every n-th.
    """

    consumers: int = 2
    block_n: int = 128
    q_stages: int = 2
    k_stages: int = 2
    v_stages: int = 2
    takes_turns: bool = True
    is_persistent: bool = True
    is_dynamic: bool = False
