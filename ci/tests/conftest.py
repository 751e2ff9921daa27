"""Let the tests import the scripts, as ``python ci/changed.py`` does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
