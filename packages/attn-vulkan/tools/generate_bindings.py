# ruff: noqa: INP001  (a script)
"""Write ``_vk/registry.py``: the names of Vulkan that the package uses, out of its registry.

    python tools/generate_bindings.py /usr/share/vulkan/registry/vk.xml

The registry comes with the Vulkan headers (Debian: libvulkan-dev, 1.4.317 or newer for every name).
A name is wanted where the package's source spells it: ``vkCreateBuffer``, ``VkBufferCreateInfo``,
``VK_WHOLE_SIZE``. Structures bring along those they contain.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

SOURCE = Path(__file__).parents[1] / "src" / "attn_vulkan"
OUTPUT = SOURCE / "_vk" / "registry.py"

HEADER = '''"""Structures, constants and commands of Vulkan, under their own names.

Written by tools/generate_bindings.py from the registry of Vulkan {version}; do not edit.
"""

# ruff: noqa: E501, I001
# fmt: off
from __future__ import annotations

import ctypes
from ctypes import {imports}
from typing import Any, ClassVar


class Tagged(ctypes.Structure):
    """A structure that starts with its own sType, which the constructor fills in."""

    STYPE: ClassVar[int]

    def __init__(self, **fields: Any) -> None:
        super().__init__(sType=self.STYPE, **fields)
'''
C_TYPES = {
    "char": "c_char",
    "float": "c_float",
    "double": "c_double",
    "int": "c_int",
    "int32_t": "c_int32",
    "int64_t": "c_int64",
    "size_t": "c_size_t",
    "uint8_t": "c_uint8",
    "uint16_t": "c_uint16",
    "uint32_t": "c_uint32",
    "uint64_t": "c_uint64",
}
PREFIX = re.compile(r"\b(?:vk|Vk|VK_)[A-Z0-9]\w+\b")


class Registry:
    """What vk.xml says about types, constants and commands."""

    def __init__(self, root: Element) -> None:
        self.types = {
            self._name(entry): entry
            for entry in root.iterfind("types/type")
            if self._name(entry) and _is_desktop(entry)
        }
        self.commands = {
            entry.findtext("proto/name"): entry
            for entry in root.iterfind("commands/command")
            if entry.find("proto") is not None and _is_desktop(entry)
        }
        self.values = dict(self._values(root))
        self.version = self._header_version()

    def closure(self, names: set[str]) -> list[str]:
        """Structures among `names` and those they contain, each after what it needs."""
        ordered: dict[str, None] = {}

        def visit(name: str) -> None:
            for member in self._members(name):
                if not _is_pointer(member) and self._is_structure(member.findtext("type", "")):
                    visit(member.findtext("type", ""))
            ordered.setdefault(name)

        for name in sorted(names):
            if self._is_structure(name):
                visit(name)
        return list(ordered)

    def structure(self, name: str) -> str:
        """Python class of one structure."""
        members = self._members(name)
        tag = members[0].get("values") if members[0].findtext("name") == "sType" else None
        base = "Tagged" if tag else f"ctypes.{self.types[name].get('category', '').title()}"
        lines = ["", "", f"class {name}({base.replace('Struct', 'Structure')}):"]
        if tag:
            lines.append(f"    STYPE = {self.values[tag]}")
        lines.append("    _fields_: ClassVar = [")
        lines += [f'        ("{m.findtext("name")}", {self._field(m)}),' for m in members]
        return "\n".join([*lines, "    ]"])

    def command(self, name: str) -> str:
        """One row of the table of commands: what it returns and takes."""
        entry = self.commands[name]
        returned = entry.findtext("proto/type", "")
        result = "None" if returned == "void" else self._field(entry.find("proto"))
        taken = [self._field(p) for p in entry.iterfind("param") if _is_desktop(p)]
        comma = "," * (len(taken) == 1)
        return f'    "{name}": ({result}, ({", ".join(taken)}{comma})),'

    def _members(self, name: str) -> list[Element]:
        entry = self.types[name]
        if entry.get("alias"):
            return self._members(entry.get("alias", ""))
        return [member for member in entry.iterfind("member") if _is_desktop(member)]

    def _is_structure(self, name: str) -> bool:
        return name in self.types and self.types[name].get("category") in ("struct", "union")

    def _field(self, entry: Element | None) -> str:
        assert entry is not None
        kind = entry.findtext("type", "")
        if _is_pointer(entry):
            return "c_char_p" if kind == "char" and _text(entry).count("*") == 1 else "c_void_p"
        base = self._c_type(kind)
        for size in reversed(re.findall(r"\[(\w+)\]", _text(entry))):
            base = f"{base} * {self.values.get(size, size)}"
        return base

    def _c_type(self, kind: str) -> str:
        if kind in C_TYPES or kind.startswith("PFN_"):
            return C_TYPES.get(kind, "c_void_p")
        entry = self.types[kind]
        category = entry.get("category")
        if entry.get("alias"):
            return self._c_type(entry.get("alias", ""))
        if category == "handle":
            return "c_uint64" if "NON_DISPATCHABLE" in _text(entry) else "c_void_p"
        if category == "enum":
            return "c_uint32" if "FlagBits" in kind else "c_int32"
        if category in ("bitmask", "basetype"):
            return self._c_type(entry.findtext("type", ""))
        return kind

    def _values(self, root: Element) -> Iterator[tuple[str, int]]:
        for enum in root.iter("enum"):
            value = _value(enum)
            if value is not None:
                yield enum.get("name", ""), value
        for extension in root.iterfind("extensions/extension"):
            base = 1_000_000_000 + (int(extension.get("number", 0)) - 1) * 1000
            yield from (
                (enum.get("name", ""), _signed(enum, base + int(enum.get("offset", 0))))
                for enum in extension.iter("enum")
                if enum.get("offset") and not enum.get("extnumber")
            )

    def _header_version(self) -> str:
        text = "".join(self.types["VK_HEADER_VERSION_COMPLETE"].itertext())
        patch = "".join(self.types["VK_HEADER_VERSION"].itertext()).split()[-1]
        major, minor = re.findall(r"\d+", text)[1:3]
        return f"{major}.{minor}.{patch}"

    @staticmethod
    def _name(entry: Element) -> str:
        return entry.get("name") or entry.findtext("name") or ""


def _is_desktop(entry: Element) -> bool:
    return "vulkan" in entry.get("api", entry.get("export", "vulkan")).split(",")


def _is_pointer(entry: Element) -> bool:
    return "*" in _text(entry)


def _text(entry: Element) -> str:
    comments = {id(comment) for comment in entry.iterfind("comment")}
    return (entry.text or "") + "".join(
        ("" if id(child) in comments else "".join(child.itertext())) + (child.tail or "")
        for child in entry
    )


def _signed(enum: Element, value: int) -> int:
    return -value if enum.get("dir") == "-" else value


def _value(enum: Element) -> int | None:
    if enum.get("bitpos"):
        return 1 << int(enum.get("bitpos", 0))
    if enum.get("offset") and enum.get("extnumber"):
        base = 1_000_000_000 + (int(enum.get("extnumber", 0)) - 1) * 1000
        return _signed(enum, base + int(enum.get("offset", 0)))
    text = enum.get("value")
    if text is None or text.startswith('"') or "F" in text.upper().removeprefix("0X"):
        return None
    number = int(re.sub(r"[~()UL]", "", text), 0)
    if text.startswith("(~"):
        return ~number % (1 << 64 if "ULL" in text else 1 << 32)
    return number


def wanted(source: Path) -> set[str]:
    """Names of Vulkan that the Python files under `source` spell, the output aside."""
    files = [path for path in source.rglob("*.py") if path.name != OUTPUT.name]
    return {name for path in files for name in PREFIX.findall(path.read_text())}


def generate(registry: Registry, names: set[str]) -> str:
    """Text of the module."""
    structures = [registry.structure(name) for name in registry.closure(names)]
    constants = [
        f"{name} = {registry.values[name]}" for name in sorted(names & registry.values.keys())
    ]
    commands = [registry.command(name) for name in sorted(names & registry.commands.keys())]
    body = "\n".join(
        [
            "",
            *constants,
            *structures,
            "",
            "",
            "# What each command returns and takes.",
            "COMMANDS: dict[str, tuple[Any, tuple[Any, ...]]] = {",
            *commands,
            "}",
            "",
        ]
    )
    imports = ", ".join(sorted(set(re.findall(r"\bc_\w+\b", body))))
    return HEADER.format(version=registry.version, imports=imports) + body


def main() -> None:
    """Read the registry named on the command line and write the module."""
    root = ElementTree.parse(sys.argv[1]).getroot()  # noqa: S314  (a file of the headers package)
    OUTPUT.write_text(generate(Registry(root), wanted(SOURCE)))


if __name__ == "__main__":
    main()
