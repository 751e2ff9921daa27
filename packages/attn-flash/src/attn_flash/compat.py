"""The functions of this package under flash-attn's names, for code that imports those.

    import attn_flash.compat
    attn_flash.compat.install_as_flash_attn()

    from flash_attn import flash_attn_func, flash_attn_with_kvcache
    from flash_attn.bert_padding import pad_input, unpad_input
    from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb

No package named flash_attn is installed: the modules exist in this process alone, until
`uninstall_as_flash_attn`. ``importlib.metadata`` finds a distribution flash-attn meanwhile, because
libraries look for one before they import. Do it before they look: many remember the answer.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch

import attn_flash
from attn_core import backends
from attn_flash import below_autograd, bert_padding, flash_attn_3, rotary_checks, rotary_ops
from attn_flash.layers import rotary

__all__ = ["VERSION", "install_as_flash_attn", "is_installed", "uninstall_as_flash_attn"]

VERSION = "2.8.4"
"""Version of flash-attn whose contract these modules have."""

_FUNCTIONS = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
)
# Names of flash-attn 1, which flash-attn-triton has kept.
_FORMER = {
    "flash_attn_unpadded_func": "flash_attn_varlen_func",
    "flash_attn_unpadded_kvpacked_func": "flash_attn_varlen_kvpacked_func",
    "flash_attn_unpadded_qkvpacked_func": "flash_attn_varlen_qkvpacked_func",
}
# What context-parallel libraries call: private in flash-attn, and relied upon.
_PASSES = (
    "_flash_attn_forward",
    "_flash_attn_backward",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
)
# flash-attn's autograd functions, which some models call directly.
_PADDING_CLASSES = {
    "IndexFirstAxis": "index_first_axis",
    "IndexFirstAxisResidual": "index_first_axis_residual",
    "IndexPutFirstAxis": "index_put_first_axis",
}
_ROTARY_CLASSES = {
    "ApplyRotaryEmb": "apply_rotary_emb",
    "ApplyRotaryEmbKV_": "apply_rotary_emb_kv_",
    "ApplyRotaryEmbQKV_": "apply_rotary_emb_qkv_",
}
_PROBABILITIES_BLOCK = 128
_lock = threading.Lock()
_displaced: dict[str, ModuleType | None] = {}


def install_as_flash_attn(*, replace: bool = False) -> None:
    """Let ``import flash_attn`` find this package.

    ``import flash_attn_interface``, FlashAttention-3's, finds it too, and so does
    ``import flash_attn_triton``.

    Parameters
    ----------
    replace : bool, default False
        Take the place of a flash-attn that is installed. What was imported from it stays as it is.

    Raises
    ------
    ImportError
        flash-attn, flash-attn-3 or flash-attn-triton is installed, and `replace` is False.

    Examples
    --------
    >>> from attn_flash import compat
    >>> compat.install_as_flash_attn()
    >>> from flash_attn import flash_attn_func
    >>> compat.uninstall_as_flash_attn()
    """
    with _lock:
        if _displaced:
            return
        modules = _modules()
        roots = [name for name in modules if "." not in name]
        installed = [name for name in roots if importlib.util.find_spec(name) is not None]
        if installed and not replace:
            raise ImportError(
                f"{installed[0]} is installed; replace=True puts attn_flash in its place"
            )
        names = {*modules, *(n for n in sys.modules if n.partition(".")[0] in roots)}
        for name in names:
            _displaced[name] = sys.modules.pop(name, None)
        sys.modules.update(modules)
        sys.meta_path.insert(0, _finder)


def uninstall_as_flash_attn() -> None:
    """Undo `install_as_flash_attn`; without one nothing happens.

    Examples
    --------
    >>> from attn_flash import compat
    >>> compat.uninstall_as_flash_attn()
    """
    with _lock:
        for name, module in _displaced.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        _displaced.clear()
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)


def is_installed() -> bool:
    """Whether ``import flash_attn`` finds this package.

    Returns
    -------
    bool
        True between `install_as_flash_attn` and `uninstall_as_flash_attn`.

    Examples
    --------
    >>> from attn_flash import compat
    >>> compat.is_installed()
    False
    """
    return bool(_displaced)


def _apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> torch.Tensor:
    """Rotate x, or with `conjugate` turn it back, as ``flash_attn.ops.triton.rotary`` does."""
    offsets, offset = rotary_checks.offsets(seqlen_offsets)
    problem = rotary_checks.rotary_problem(
        x, cos, sin, bool(interleaved), offsets, offset, cu_seqlens, max_seqlen
    )
    longest = x.shape[1] if cu_seqlens is None or max_seqlen is None else max_seqlen
    backend = backends.resolve(rotary_ops.ROTATE, problem)
    static = (longest, problem.interleaved, bool(conjugate), backend)
    with torch.no_grad():
        if inplace:
            return rotary_ops.rotate_inplace(
                x, (None,), (offset, *static), offsets, cu_seqlens, cos, sin
            )
        return rotary_ops.rotate(  # type: ignore[no-any-return]
            x, cos, sin, offsets, offset, cu_seqlens, *static
        )


def _get_block_size_n(
    device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool
) -> int:
    """Say how many keys share a pivot in flash-attn's probabilities; here they are normalised."""
    del device, head_dim, is_dropout, is_causal
    return _PROBABILITIES_BLOCK


def _rotary_kernel(name: str) -> Any:
    """Find the kernel of rotation, for code that counts how often it is compiled."""
    if name != "rotary_kernel":
        raise AttributeError(f"module 'flash_attn.ops.triton.rotary' has no attribute {name!r}")
    from attn_flash._triton.rotary import _rotate_kernel  # imports Triton

    return _rotate_kernel


def _modules() -> dict[str, ModuleType]:
    """Build the modules of flash-attn and flash-attn-triton."""
    functions = {name: getattr(attn_flash, name) for name in _FUNCTIONS}
    public = functions | {new: functions[old] for new, old in _FORMER.items()}
    passes = {name: getattr(below_autograd, name) for name in _PASSES}
    interface = public | passes | {f"_wrapped{name}": passes[name] for name in _PASSES}
    interface["_get_block_size_n"] = _get_block_size_n
    top = public | {"FlashAttention": attn_flash.FlashAttention, "__version__": VERSION}
    tables: dict[str, dict[str, Any]] = {
        "flash_attn": top,
        "flash_attn.bert_padding": _exports(bert_padding, _PADDING_CLASSES),
        "flash_attn.flash_attn_interface": interface,
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": _exports(rotary, _ROTARY_CLASSES),
        "flash_attn.ops": {},
        "flash_attn.ops.triton": {},
        "flash_attn.ops.triton.rotary": {
            "apply_rotary": _apply_rotary,
            "__getattr__": _rotary_kernel,
        },
        "flash_attn_interface": _exports(flash_attn_3, {}),
        "flash_attn_triton": top,
        "flash_attn_triton.flash_attn_interface": interface,
    }
    modules: dict[str, ModuleType] = {}
    for name, table in tables.items():  # parents come before their children
        is_package = any(other.startswith(f"{name}.") for other in tables)
        module = modules[name] = _module(name, table, is_package)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


def _module(name: str, table: dict[str, Any], is_package: bool) -> ModuleType:
    module = ModuleType(name, f"{name}, computed by attn_flash.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=is_package)
    module.__package__ = name if is_package else name.rpartition(".")[0]
    module.__file__ = __file__
    if is_package:
        module.__path__ = []
    vars(module).update(table)
    return module


def _exports(module: ModuleType, classes: dict[str, str]) -> dict[str, Any]:
    """Names of a module, and classes whose `apply` is one of its functions."""
    names = {name: getattr(module, name) for name in module.__all__}
    return names | {
        name: type(name, (), {"apply": staticmethod(names[function])})
        for name, function in classes.items()
    }


class _Distribution(importlib.metadata.Distribution):
    """What importlib.metadata says of flash-attn."""

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\n",
            "top_level.txt": "flash_attn\n",
        }
        return texts.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        raise FileNotFoundError(f"flash-attn has no files of its own, got {path}")


class _Finder(importlib.metadata.DistributionFinder):
    """Finds the distribution; the modules need no finding, being imported already."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        del fullname, path, target

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        wanted = None if context is None else context.name
        if wanted is None or wanted.lower().replace("_", "-") == "flash-attn":
            yield _Distribution()


_finder = _Finder()
