"""EvoAttention: gated prefix-sum attention over values alone, linear in the length."""

from attn_core.errors import BackendUnavailableError, UnsupportedProblemError
from attn_evo import _backends
from attn_evo._version import __version__
from attn_evo.api import evo_attention, evo_attention_step, get_available_backends, prefix_sum
from attn_evo.module import EvoAttention
from attn_evo.sharding import evo_attention_sharded
from attn_evo.state import EvoState
from attn_evo.weights import EvoWeights

_backends.register()

__all__ = [
    "BackendUnavailableError",
    "EvoAttention",
    "EvoState",
    "EvoWeights",
    "UnsupportedProblemError",
    "__version__",
    "evo_attention",
    "evo_attention_sharded",
    "evo_attention_step",
    "get_available_backends",
    "prefix_sum",
]
