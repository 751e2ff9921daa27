"""Let the tests import the demo's modules, as ``python demos/demo.py`` does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
