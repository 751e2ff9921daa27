"""What versions of Gluon name differently. Importing this imports Gluon."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma


def _first(owner, *names):
    """Return what `owner` has under the first of these names, from the newest on."""
    return next(getattr(owner, name) for name in names if hasattr(owner, name))


thread_barrier = _first(gl, "barrier", "thread_barrier")
reinterpret = _first(gl.shared_memory_descriptor, "reinterpret", "_reinterpret")
async_load = _first(async_copy, "async_load", "async_copy_global_to_shared")
tma_load = _first(tma, "async_load", "async_copy_global_to_shared")
tma_store = _first(tma, "async_store", "async_copy_shared_to_global")
