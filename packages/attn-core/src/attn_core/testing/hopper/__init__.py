"""Run Gluon kernels for Hopper on a CPU, so that errors of their protocol show without a GPU.

The source of the kernels runs as it is, on stand-ins for Gluon that compute with NumPy. Programs
start in a random order, some at once; each partition of a program is a thread that now and then
falls behind. Barriers count arrivals, bytes and phases as the hardware does. Whatever the hardware
may delay is delayed: copies land late, or when somebody waits for them, in memory that holds NaN
until then; products read their operands and stores leave shared memory only when somebody waits for
them, and what leaves it is in global memory only when somebody waits for that. A missing wait gives
wrong numbers; a missing arrival, or a missing fence between threads and the units that copy and
multiply, a `ProtocolError`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator

from attn_core.testing.hopper._engines import reduce_add
from attn_core.testing.hopper._language import stand_ins
from attn_core.testing.hopper._pointers import claim, publish, wait_until_set
from attn_core.testing.hopper._registers import round_to
from attn_core.testing.hopper._threads import ProtocolError

__all__ = ["ProtocolError", "emulation", "round_to"]

_TILES = ("attn_core.tiles.gluon_names", "attn_core.tiles.hopper")


@contextlib.contextmanager
def emulation(*modules: str) -> Iterator[list[types.ModuleType]]:
    """Import modules of kernels anew, in this order, on the stand-ins.

    Within the context their kernels run on tensors on the CPU, started as on a GPU. A module that
    other ones import comes before them.

    Parameters
    ----------
    *modules : str
        Names to import.

    Yields
    ------
    list of module
        The modules.

    Raises
    ------
    ProtocolError
        When a kernel runs: a thread waits in vain, arrives where a barrier is complete, hands over
        memory without a fence, or ends with work in flight.
    """
    import triton.experimental.gluon.language.nvidia.hopper  # noqa: F401 - before it is hidden
    from triton.language import core

    replaced = stand_ins()
    names = (*replaced, *_TILES, *modules)
    before = {name: sys.modules.get(name) for name in names}
    aggregate = core._aggregate
    try:
        core._aggregate = lambda function: function
        for name in names:
            _put(name, replaced.get(name))
        yield [_import(name) for name in modules]
    finally:
        core._aggregate = aggregate
        for name, module in before.items():
            _put(name, module)


def _put(name: str, module: types.ModuleType | None) -> None:
    """Let imports of `name` find a module, or import it anew."""
    parent, _, child = name.rpartition(".")
    package = sys.modules.get(parent)
    if module is None:
        sys.modules.pop(name, None)
        if hasattr(package, child):
            delattr(package, child)
        return
    sys.modules[name] = module
    if package is not None:
        setattr(package, child, module)


def _import(name: str) -> types.ModuleType:
    module = importlib.import_module(name)
    for stand_in in (reduce_add, claim, publish, wait_until_set):
        if hasattr(module, stand_in.__name__):
            setattr(module, stand_in.__name__, stand_in)
    return module
