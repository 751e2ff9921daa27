import pytest
import torch

from attn_core.eager import signature
from attn_core.tiling import allows_tf32, ceil_div, dot_precision, padded_head_dim


@pytest.mark.parametrize("a, b, blocks", [(0, 4, 0), (1, 4, 1), (8, 4, 2), (9, 4, 3)])
def test_ceil_div(a, b, blocks):
    assert ceil_div(a, b) == blocks


@pytest.mark.parametrize("head_dim, width", [(1, 16), (16, 16), (17, 32), (128, 128), (129, 256)])
def test_padded_head_dim(head_dim, width):
    assert padded_head_dim(head_dim) == width


@pytest.fixture
def matmul():
    """torch's settings of matrix products, put back after the test."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    yield settings
    settings.allow_tf32 = before


def test_only_float32_follows_torch_in_the_choice_of_tf32(matmul):
    single, half = torch.empty(0), torch.empty(0, dtype=torch.bfloat16)
    matmul.allow_tf32 = False
    assert dot_precision(single) == "ieee"
    matmul.allow_tf32 = True
    assert (dot_precision(single), dot_precision(half)) == ("tf32", "ieee")


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has one switch alone"
)
def test_the_newer_switch_counts_too(matmul):
    """The older one cannot be asked while they differ."""
    call = (torch.ones(4), 2.0)
    matmul.allow_tf32 = False
    before = signature(call).key
    matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            _ = matmul.allow_tf32
        assert dot_precision(torch.empty(0)) == "tf32"
        assert signature(call).key != before
    finally:
        matmul.fp32_precision = "ieee"
    assert not allows_tf32()
    assert signature(call).key == before
