"""Host arrays where shaders reach them: in place if the driver can, else copied."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_vulkan.runtime.commands import Commands
    from attn_vulkan.runtime.context import Context
    from attn_vulkan.runtime.memory import Buffer

# Below this size, copying by the host is faster than asking the driver to map pages.
IMPORT_FROM_BYTES = 1 << 18
_SHARED_MEMORY = ("integrated", "cpu")


@dataclass(frozen=True)
class Span:
    """Bytes that a call reads, or writes.

    `is_whole` says that it writes every byte of an output, so that its contents need no copy.
    """

    pointer: int
    size: int
    is_output: bool = False
    is_whole: bool = True


@dataclass
class _Placed:
    span: Span
    host: Buffer  # what the device reads the host's bytes from, and at which offset
    offset: int = 0
    is_staged: bool = False
    local: Buffer | None = None
    address: int = 0

    def copy_to_span(self) -> None:
        ctypes.memmove(self.span.pointer, self.host.pointer, self.span.size)


class Placement:
    """Puts the spans of one call on the device and its outputs back into them.

    On devices that share the host's memory the spans are imported and used in place, with
    ``VK_EXT_external_memory_host``. A discrete GPU copies them to its own memory out of imported
    pages, or out of a staging buffer where a span is small or cannot be imported.
    """

    def __init__(self, context: Context, commands: Commands, spans: Iterable[Span]) -> None:
        self._context = context
        self._commands = commands
        self._in_place = context.device.type in _SHARED_MEMORY
        wanted = [span for span in spans if span.size]
        self._imports = self._import([span for span in wanted if self._is_imported(span)])
        self._placed = {(span.pointer, span.size): self._place(span) for span in wanted}

    def address(self, span: Span) -> int:
        """Where shaders find the first byte of a span."""
        return self._placed[span.pointer, span.size].address if span.size else 0

    def fetch(self) -> None:
        """Bring outputs back to host memory, after the kernels."""
        outputs = [placed for placed in self._placed.values() if placed.span.is_output]
        for placed in outputs:
            if placed.local is not None:
                self._commands.copy(placed.local, 0, placed.host, placed.offset, placed.span.size)
            if placed.is_staged:
                self._commands.then(placed.copy_to_span)

    def _is_imported(self, span: Span) -> bool:
        if not self._context.device.features.external_memory_host:
            return False
        return self._in_place or span.size >= IMPORT_FROM_BYTES

    def _import(self, spans: list[Span]) -> list[tuple[int, int, Buffer]]:
        """Import the pages of the spans, each page once."""
        alignment = self._context.host_alignment
        imported = []
        for first, end in _merged(spans, alignment):
            buffer = self._context.memory.import_host(first, end - first)
            if buffer is not None:
                imported.append((first, end, self._commands.keep(buffer)))
        return imported

    def _place(self, span: Span) -> _Placed:
        for first, end, buffer in self._imports:
            if first <= span.pointer and span.pointer + span.size <= end:
                return self._localised(_Placed(span, buffer, span.pointer - first))
        staging = self._commands.keep(self._context.memory.allocate(span.size, "staging"))
        ctypes.memmove(staging.pointer, span.pointer, span.size)
        return self._localised(_Placed(span, staging, is_staged=True))

    def _localised(self, placed: _Placed) -> _Placed:
        if self._in_place:
            placed.address = placed.host.address + placed.offset
            return placed
        placed.local = self._commands.keep(self._context.memory.allocate(placed.span.size))
        placed.address = placed.local.address
        if not (placed.span.is_output and placed.span.is_whole):
            self._commands.copy(placed.host, placed.offset, placed.local, 0, placed.span.size)
        return placed


def _merged(spans: Iterable[Span], alignment: int) -> list[tuple[int, int]]:
    """Ranges of whole pages that cover the spans and do not overlap."""
    pages = sorted(
        (
            span.pointer // alignment * alignment,
            -(-(span.pointer + span.size) // alignment) * alignment,
        )
        for span in spans
    )
    merged: list[tuple[int, int]] = []
    for first, end in pages:
        if merged and first < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return merged
