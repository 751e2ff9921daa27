"""Let the tests import the demo's modules, as ``python demos/demo.py`` does."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

import vit  # noqa: E402


@pytest.fixture(scope="session")
def data():
    return vit.digits(torch.device("cpu"))
