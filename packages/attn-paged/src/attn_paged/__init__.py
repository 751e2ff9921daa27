"""Attention over a paged key-value cache, with the cache and its manager."""

from attn_core.errors import BackendUnavailableError, UnsupportedProblemError
from attn_paged import _backends
from attn_paged._pool import OutOfBlocksError
from attn_paged._version import __version__
from attn_paged.api import append_to_cache, flash_attention_paged, paged_attention
from attn_paged.cache import PagedBatch, PagedKVCache
from attn_paged.manager import BlockManager

_backends.register()

__all__ = [
    "BackendUnavailableError",
    "BlockManager",
    "OutOfBlocksError",
    "PagedBatch",
    "PagedKVCache",
    "UnsupportedProblemError",
    "__version__",
    "append_to_cache",
    "flash_attention_paged",
    "paged_attention",
]
