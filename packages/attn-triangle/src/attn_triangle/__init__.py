"""Triangle attention on pair representations, the operator of AlphaFold 2 and its successors."""

from attn_core.errors import BackendUnavailableError, UnsupportedProblemError
from attn_triangle import _backends
from attn_triangle._version import __version__
from attn_triangle.api import triangle_attention
from attn_triangle.module import TriangleAttention
from attn_triangle.sharding import shard_rows, triangle_attention_sharded
from attn_triangle.state_dicts import convert_state_dict

_backends.register()

__all__ = [
    "BackendUnavailableError",
    "TriangleAttention",
    "UnsupportedProblemError",
    "__version__",
    "convert_state_dict",
    "shard_rows",
    "triangle_attention",
    "triangle_attention_sharded",
]
