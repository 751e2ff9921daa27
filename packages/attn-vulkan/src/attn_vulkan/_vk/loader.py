"""Find and open the Vulkan loader, the library between a program and the installed drivers."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from attn_vulkan._vk.errors import LoaderNotFound

LOADER_VARIABLE = "ATTN_VULKAN_LOADER"

_MACOS_FILES = ("libvulkan.1.dylib", "libvulkan.dylib", "libMoltenVK.dylib")
# dlopen on macOS does not look where Homebrew puts libraries on Apple silicon.
_MACOS_FOLDERS = ("", "/opt/homebrew/lib", "/usr/local/lib")


def open_loader() -> Any:
    """Open the loader.

    ``ATTN_VULKAN_LOADER`` names a file to use in place of the platform's usual ones.

    Returns
    -------
    ctypes library
        With ``vkGetInstanceProcAddr``, which finds every other function.

    Raises
    ------
    LoaderNotFound
        No candidate could be opened.
    """
    names = candidates()
    for name in names:
        try:
            library = _open(name)
        except OSError:
            continue
        if hasattr(library, "vkGetInstanceProcAddr"):
            return library
    raise LoaderNotFound(f"no Vulkan loader found (tried {', '.join(names)})")


def candidates() -> list[str]:
    """File names of the loader on this platform, in the order they are tried."""
    chosen = os.environ.get(LOADER_VARIABLE)
    if chosen:
        return [chosen]
    if sys.platform == "win32":
        return ["vulkan-1.dll"]
    if sys.platform == "darwin":
        return [str(Path(folder, file)) for folder in _MACOS_FOLDERS for file in _MACOS_FILES]
    return ["libvulkan.so.1", "libvulkan.so"]


def _open(name: str) -> Any:
    # Vulkan functions are stdcall on Windows, which differs from cdecl in 32-bit processes.
    if sys.platform == "win32":
        return ctypes.WinDLL(name)
    return ctypes.CDLL(name)
