"""Our functions in the place of another package's, for programs that cannot be changed."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from attn_triangle import utils
from attn_triangle.compat import cuequivariance, deepspeed, megafold, protenix, trifast

_CUE_FUNCTIONS = {
    "triangle_attention": cuequivariance.triangle_attention,
    "mask_to_kv_lengths": cuequivariance.mask_to_kv_lengths,
}
_TRIFAST_UTILS = {name: getattr(utils, name) for name in utils.__all__}
# What is put where: package, module, names.
_NAMES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "trifast": {
        "trifast": {"triangle_attention": trifast.triangle_attention},
        "trifast.torch": {
            "triangle_attention": trifast.triangle_attention,
            "_triangle_attention": trifast.triangle_attention_with_lse,
            "triangle_attention_bwd": trifast.triangle_attention_bwd,
        },
        "trifast.equiv": {
            "attention_reference": trifast.attention_reference,
            "triangle_attention_simple": trifast.attention_reference,
            "triangle_self_attention_ds4s": trifast.triangle_attention,
            "disable_tf32": utils.disable_tf32,
            "enable_tf32": utils.enable_tf32,
        },
        "trifast.utils": _TRIFAST_UTILS,
    },
    "cuequivariance_torch": {
        "cuequivariance_torch": _CUE_FUNCTIONS,
        "cuequivariance_torch.primitives": {},
        "cuequivariance_torch.primitives.triangle": _CUE_FUNCTIONS,
        "cuequivariance_ops_torch": {"triangle_attention": cuequivariance.triangle_attention},
        "cuequivariance_ops_torch.triangle_attention": {
            "triangle_attention": cuequivariance.triangle_attention,
            "CUEQ_TRIATTN_FALLBACK_THRESHOLD": cuequivariance.FALLBACK_THRESHOLD,
        },
    },
    "deepspeed": {
        "deepspeed": {},
        "deepspeed.ops": {},
        "deepspeed.ops.deepspeed4science": {
            "DS4Sci_EvoformerAttention": deepspeed.DS4Sci_EvoformerAttention
        },
    },
    "megafold": {
        "megafold": {},
        "megafold.model": {},
        "megafold.model.FusedEvoAttention": {"TritonEvoformer": megafold.TritonEvoformer},
        "megafold.model.FusedEvoAttention.evoattention": {
            "TritonEvoformer": megafold.TritonEvoformer
        },
    },
    "protenix": {
        "protenix": {},
        "protenix.model": {},
        "protenix.model.tri_attention": {},
        "protenix.model.tri_attention.op": {"TriAttentionFunction": protenix.TriAttentionFunction},
    },
}
PACKAGES = tuple(_NAMES)
_ABSENT = object()


class Installed:
    """What `install_as` did; `undo`, or the end of a ``with`` block, takes it back.

    Attributes
    ----------
    package : str
        The name that was given.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self._undoing: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Put back what was there before; the second time nothing happens."""
        while self._undoing:
            self._undoing.pop()()

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _module(self, name: str) -> types.ModuleType:
        """The module of that name: the real one, or an empty one where there is none."""
        try:
            return importlib.import_module(name)
        except Exception:  # trifast raises AssertionError where there is no GPU
            module = types.ModuleType(name, "Made by attn_triangle.compat.install_as.")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        self._undoing.append(lambda: sys.modules.__delitem__(name))
        parent, _, child = name.rpartition(".")
        # A function may have the name of the module that holds it; the function stays in front.
        if parent and not hasattr(sys.modules[parent], child):
            self._set(sys.modules[parent], child, module)
        return module

    def _set(self, module: types.ModuleType, name: str, value: object) -> None:
        before = getattr(module, name, _ABSENT)
        setattr(module, name, value)
        if before is _ABSENT:
            self._undoing.append(lambda: delattr(module, name))
        else:
            self._undoing.append(lambda: setattr(module, name, before))


def install_as(package: str) -> Installed:
    """Let programs that import another package's triangle attention get ours.

    Where the package is installed, its function is replaced in its modules; where it is not, or
    does not import, modules of its name that hold nothing else take its place. A module that has
    bound the function to a name of its own keeps what it has: call this before such imports.

    Parameters
    ----------
    package : {"trifast", "cuequivariance_torch", "deepspeed", "megafold", "protenix"}
        Whose place to take.

    Returns
    -------
    Installed
        Takes it back by `Installed.undo` or at the end of a ``with`` block.

    Raises
    ------
    ValueError
        The package is none of these.

    Examples
    --------
    >>> from attn_triangle.compat import install_as
    >>> with install_as("cuequivariance_torch"):
    ...     from cuequivariance_torch.primitives.triangle import triangle_attention
    >>> triangle_attention.__module__
    'attn_triangle.compat.cuequivariance'
    """
    if package not in _NAMES:
        raise ValueError(f"package must be one of {PACKAGES}, got {package!r}")
    installed = Installed(package)
    for module_name, names in _NAMES[package].items():
        module = installed._module(module_name)
        for name, value in names.items():
            installed._set(module, name, value)
    return installed
