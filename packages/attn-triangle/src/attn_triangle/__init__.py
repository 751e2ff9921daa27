"""Triangle attention on pair representations, the operator of AlphaFold 2 and its successors."""

from attn_core.errors import BackendUnavailableError, UnsupportedProblemError
from attn_triangle import _backends
from attn_triangle._version import __version__
from attn_triangle.api import triangle_attention
from attn_triangle.module import TriangleAttention

_backends.register()

__all__ = [
    "BackendUnavailableError",
    "TriangleAttention",
    "UnsupportedProblemError",
    "__version__",
    "triangle_attention",
]
