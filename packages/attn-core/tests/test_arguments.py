"""Arguments that several operators have: what each may be, and the form it is put in."""

import math
import re

import numpy as np
import pytest
import torch

from attn_core import arguments


def test_scale():
    assert arguments.softmax_scale(None, 64) == 0.125
    assert arguments.softmax_scale(None, 0) == 1.0  # of an empty head, which is refused elsewhere
    assert arguments.softmax_scale(np.float32(0.5), 64) == 0.5


@pytest.mark.parametrize("value", ["x", math.nan, math.inf, [1.0], torch.tensor(1.0), 1j, 10**400])
def test_scale_must_be_a_finite_number(value):
    message = f"scale must be a finite number or None, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        arguments.softmax_scale(value, 64, "scale")


@pytest.mark.parametrize("value", [None, "x", -1.0, math.nan, math.inf])
def test_softcap_must_be_finite_and_not_negative(value):
    assert arguments.softcap(30) == 30.0
    with pytest.raises(ValueError, match="^softcap must be a finite number, 0 or more, got"):
        arguments.softcap(value)


@pytest.mark.parametrize(
    "causal, window_size, expected",
    [
        (False, (-1, -1), (-1, -1)),
        (False, [3, -7], (3, -1)),
        (False, torch.tensor([3, 2]), (3, 2)),
        (True, (3, 2), (3, 0)),
        (False, (2**70, 2**31), (2**31 - 1, 2**31 - 1)),
        (True, (-5, -1), (-1, 0)),
        (np.True_, (-1, -1), (-1, 0)),
    ],
)
def test_window(causal, window_size, expected):
    assert arguments.window(causal, window_size) == expected


@pytest.mark.parametrize("value", [None, 3, (1,), (1, 2, 3), (1.5, 2), "ab"])
def test_window_must_be_two_integers(value):
    with pytest.raises(ValueError, match=r"^window_size must be two integers \(left, right\), got"):
        arguments.window(False, value)


def test_causal_must_be_a_switch():
    with pytest.raises(ValueError, match="^causal must be True or False, got 'yes'$"):
        arguments.window("yes", (-1, -1))


def test_reach_counts_the_own_key():
    assert [arguments.reach(size) for size in (1, 8, -1, -9, 2**70)] == [0, 7, -1, -1, 2**31 - 1]
    with pytest.raises(ValueError, match="^window_size must be positive, or negative for no"):
        arguments.reach(0)
    with pytest.raises(ValueError, match="^window_size must be an integer, got 1.5$"):
        arguments.reach(1.5)
