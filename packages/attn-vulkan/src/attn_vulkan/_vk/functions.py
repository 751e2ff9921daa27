"""The commands of Vulkan as checked Python callables."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_uint32
from typing import Any

from attn_vulkan._vk import registry as vk
from attn_vulkan._vk.errors import VulkanError, error_of

_PROTOTYPE = getattr(ctypes, "WINFUNCTYPE", ctypes.CFUNCTYPE)


class Functions:
    """Commands by name, each looked up when it is first used.

    A command that returns a negative VkResult raises; a positive one is handed to the caller.

    Parameters
    ----------
    address_of : callable
        Finds a command's address, None where the driver lacks it.
    """

    def __init__(self, address_of: Callable[[str], int | None]) -> None:
        self._address_of = address_of

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in vk.COMMANDS:
            raise AttributeError(name)
        address = self._address_of(name)
        if not address:
            raise VulkanError(f"the Vulkan loader has no {name}")
        returns, arguments = vk.COMMANDS[name]
        function: Any = _PROTOTYPE(returns, *arguments)(address)
        if returns is ctypes.c_int32:
            function.errcheck = _raise_on_failure(name)
        setattr(self, name, function)
        return function  # type: ignore[no-any-return]


def _raise_on_failure(name: str) -> Callable[..., int]:
    def check(result: int, *_: Any) -> int:
        if result < 0:
            raise error_of(name, result)
        return result

    return check


def read_list(item: Any, function: Callable[..., Any], *first: Any) -> list[Any]:
    """Call a function of Vulkan's count-then-fill kind until the list of `item` is whole."""
    count = c_uint32()
    while True:
        function(*first, ctypes.addressof(count), None)
        items = (item * count.value)()
        for entry in items if issubclass(item, vk.Tagged) else ():
            entry.sType = item.STYPE
        result = function(*first, ctypes.addressof(count), ctypes.addressof(items))
        if result != vk.VK_INCOMPLETE:  # the list grew between the two calls
            return list(items[: count.value])
