"""Let the tests import the demo's modules, as ``python demos/demo.py`` does."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)
