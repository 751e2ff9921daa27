"""Which shared prefixes the Hopper kernel takes."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from attn_core.device import DeviceInfo
from attn_paged._hopper.support import takes
from attn_paged.options import AttentionOptions


class Refused(NamedTuple):
    """What a problem that is taken is changed by."""

    block_size: int = 16
    D: int = 128
    D_v: int = 128
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype = torch.bfloat16
    softcap: float = 0.0
    tokens: int = 64
    version: tuple[int, int] = (3, 9)
    arch: str = "sm_90"
    shift: int = 0


def is_taken(case, monkeypatch):
    info = DeviceInfo("cuda", case.arch, case.arch)
    monkeypatch.setattr("attn_paged._hopper.support.device_info", lambda device: info)
    monkeypatch.setattr("attn_paged._hopper.support.triton_version", lambda: case.version)
    shift = case.shift
    q = torch.empty(case.tokens, 8, case.D + shift, dtype=case.dtype)[..., shift:]
    k_cache, v_cache = (
        torch.empty(3, case.block_size, 2, D, dtype=case.cache_dtype) for D in (case.D, case.D_v)
    )
    tables = torch.empty(case.tokens, 9, dtype=torch.int32)
    return takes(q, k_cache, v_cache, tables, AttentionOptions(0.1, softcap=case.softcap))


def test_what_is_taken(monkeypatch):
    for case in (Refused(), Refused(block_size=8), Refused(block_size=256), Refused(D=72, D_v=8)):
        assert is_taken(case, monkeypatch)


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 4}, {"block_size": 24}, {"block_size": 96}, {"D": 136}, {"D": 68},
        {"D_v": 256}, {"dtype": torch.float32, "cache_dtype": torch.float32},
        {"cache_dtype": torch.int8}, {"softcap": 30.0}, {"tokens": 500}, {"version": (3, 5)},
        {"arch": "sm_100"}, {"shift": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_left_to_the_portable_kernel(change, monkeypatch):
    assert not is_taken(Refused(**change), monkeypatch)
