import pytest
import torch

from attn_core.tiling import ceil_div, dot_precision, padded_head_dim


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
