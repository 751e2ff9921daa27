"""Settings of the documentation: ``sphinx-build -W docs build/docs``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Installed or not, the packages documented are those of this checkout.
sys.path[:0] = [str(path) for path in sorted(ROOT.glob("packages/*/src"))]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

project = "attn"
author = "The attn maintainers"
copyright = f"2026, {author}"  # noqa: A001  (the name Sphinx reads)

extensions = [
    "benchmark_results",
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "support_matrix",
]
exclude_patterns = ["_build", "tests"]

autodoc_typehints = "none"  # the docstrings give types, shapes and dtypes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
default_role = "py:obj"


myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "attn"
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def escape_leading_dimensions(app, what, name, obj, options, lines):
    """Keep the star of ``shape (*, H, D)`` from starting an emphasis."""
    lines[:] = [line.replace("(*,", r"(\*,") for line in lines]


def setup(app):
    """Hook into autodoc."""
    app.connect("autodoc-process-docstring", escape_leading_dimensions)
