from __future__ import annotations

import pytest
import torch

from benchmarks import problems
from benchmarks.providers import PACKAGES, subject
from benchmarks.providers.base import PASSES

TABLED = (*PACKAGES, "attn-vulkan")


@pytest.mark.parametrize("package", TABLED)
@pytest.mark.parametrize("group", problems.GROUPS)
def test_rows_are_complete(package, group):
    cases = problems.load(package, group)
    assert cases
    assert len({case.id for case in cases}) == len(cases)
    for case in cases:
        assert case.source
        assert set(case.passes) <= set(PASSES)
        assert isinstance(case.dtype, torch.dtype)
        assert case["H"] % case["H_KV"] == 0


@pytest.mark.parametrize("package", PACKAGES)
def test_every_case_can_be_counted(package):
    measured = subject(package)
    for group in ("gpu", "cpu"):
        for case in problems.load(package, group):
            assert measured.traffic(case, "forward") > 0
            assert measured.x_axis in case.sizes


def test_the_grid_has_16k_tokens_of_2048_elements():
    for case in problems.load("attn-flash", "gpu"):
        if case.series:
            assert case["B"] * case["M"] == 16384
            assert case["H"] * case["D"] == 2048


def test_select_puts_headline_cases_first():
    cases = problems.select(problems.load("attn-flash", "gpu"), "d64-full")
    flags = [case.headline for case in cases]
    assert flags == sorted(flags, reverse=True)
    assert not all(flags)
    assert all(case.headline for case in problems.select(cases, headline=True))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="package must have a section"):
        problems.load("attn-nothing", "gpu")
    with pytest.raises(ValueError, match="group must be one of"):
        problems.load("attn-flash", "tpu")
    with pytest.raises(ValueError, match="package must be one of"):
        subject("attn-nothing")
