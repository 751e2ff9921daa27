"""Gluon is experimental: kernels are tested on the versions of Triton that the backend takes."""

import pytest

from attn_core.device import triton_version
from attn_flash._hopper.support import TRITON_VERSIONS


@pytest.fixture(autouse=True)
def triton_is_known(request):
    if request.node.get_closest_marker("compile") and triton_version() not in TRITON_VERSIONS:
        pytest.skip("the backend refuses this version of Triton, see test_support.py")
