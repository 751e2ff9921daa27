"""FlashAttention for every device torch runs on: Triton kernels on GPUs, torch elsewhere."""

from attn_core.errors import BackendUnavailableError, UnsupportedProblemError
from attn_flash import _backends, _companions
from attn_flash._version import __version__
from attn_flash.api import (
    flash_attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    get_available_backends,
    sdpa_triton_fa,
)
from attn_flash.kvcache import flash_attn_with_kvcache
from attn_flash.module import FlashAttention
from attn_flash.rope import flash_attention_rope

_backends.register()
_companions.register()

__all__ = [
    "BackendUnavailableError",
    "FlashAttention",
    "UnsupportedProblemError",
    "__version__",
    "flash_attention",
    "flash_attention_rope",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_available_backends",
    "sdpa_triton_fa",
]
