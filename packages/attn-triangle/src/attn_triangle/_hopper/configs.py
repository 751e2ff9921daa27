"""Tiles of the Hopper kernels.

A CTA has three or four computing warpgroups, each with 64 rows of its own. Tiles of one row i share
its keys and values, tiles of several rows the bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# A thread, of 64K for the computing warpgroups and that of the loading warp. What the latter gives
# back the others get.
_REGISTERS = {3: 128, 4: 96}


class Plan(NamedTuple):
    """How a CTA is laid out.

    Attributes
    ----------
    tiles, rows : int
        Tiles of 64 of one row i, and rows i. A warpgroup computes one tile of one row.
    block : int
        Length of the blocks that stream by.
    stages : int
        How many of them are loaded ahead.
    """

    tiles: int
    rows: int
    block: int
    stages: int

    @property
    def registers(self) -> int:
        """Registers of a thread at the start, before they are shared out."""
        return _REGISTERS[self.tiles * self.rows]

    def fit(self, rows: int, bias_dtype: torch.dtype) -> Plan:
        """Leave space for a wide bias, or no warpgroup without work where rows are few."""
        if bias_dtype == torch.float32:
            return self._replace(stages=max(2, self.stages - 1))
        if rows < self.rows:
            return self._replace(tiles=self.tiles * self.rows, rows=1)
        return self


FORWARD = {16: Plan(2, 2, 64, 4), 32: Plan(2, 2, 64, 4), 64: Plan(2, 2, 64, 2)}
BACKWARD_DK_DV = {16: Plan(1, 3, 64, 4), 32: Plan(1, 3, 64, 4), 64: Plan(1, 3, 32, 3)}
BACKWARD_DQ = {16: Plan(1, 3, 64, 4), 32: Plan(1, 3, 64, 3), 64: Plan(1, 3, 64, 2)}
BACKWARD_DQ_DBIAS = {16: Plan(2, 4, 32, 3), 32: Plan(2, 4, 32, 3)}  # a warpgroup has all rows
BACKWARD_DBIAS = {16: Plan(3, 1, 64, 4), 32: Plan(3, 1, 64, 3), 64: Plan(3, 1, 64, 2)}
LONGEST_BLOCK = 64  # of keys, among all of these
# Up to so many scores a forward pass ends before the warps of a CTA have met: the kernel for any
# GPU is faster.
FEW_SCORES = 2**23
