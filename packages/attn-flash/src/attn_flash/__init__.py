"""FlashAttention for every device torch runs on: Triton kernels on GPUs, torch elsewhere."""

from attn_core.errors import BackendUnavailableError, UnsupportedProblemError
from attn_core.merge import merge_attention_states
from attn_flash import _backends, _companions
from attn_flash._version import __version__
from attn_flash.api import (
    dropout_mask,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    get_available_backends,
)
from attn_flash.heads_first import flash_attention, sdpa_triton_fa
from attn_flash.integrations.sdpa import explain, install, sdpa_patched, uninstall
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
    "dropout_mask",
    "explain",
    "flash_attention",
    "flash_attention_rope",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_available_backends",
    "install",
    "merge_attention_states",
    "sdpa_patched",
    "sdpa_triton_fa",
    "uninstall",
]
