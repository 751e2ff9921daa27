"""Validate the docstrings of public names and run their examples.

``python ci/docstrings.py attn_core attn_flash``: what each module names in ``__all__`` must have a
complete numpydoc docstring, and its examples must print what they say, on the CPU.
"""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import sys
from types import ModuleType

from numpydoc.validate import validate

# This list may only shrink.
IGNORED = {
    "ES01": "an extended summary is written where there is more to say",
    "EX01": "types and errors need no example",
    "GL01": "a docstring begins on the line of its quotes, as ruff's D212 has it",
    "PR04": "arguments that another function describes are named with that function",
    "PR08": "a description may begin with the name of an argument",
    "RT02": "a return value has a name where that says more than its type",
    "RT03": "a return value's name and type can say it all",
    "SA01": "See Also is written where there is something to see",
    "SS05": "takes a plural noun for a verb",
    "SS06": "checked by ruff",
}


def public(module: ModuleType) -> dict[str, object]:
    """Functions and classes that a module names in ``__all__``."""
    members = {name: getattr(module, name) for name in module.__all__}
    return {n: m for n, m in members.items() if inspect.isfunction(m) or inspect.isclass(m)}


def faults(module: ModuleType, name: str) -> list[str]:
    """What numpydoc finds wrong with one docstring."""
    member = getattr(module, name)
    is_record = dataclasses.is_dataclass(member) or hasattr(member, "_fields")
    ignored = {*IGNORED, "PR01"} if is_record else IGNORED.keys()  # fields stand under Attributes
    errors = validate(f"{module.__name__}.{name}")["errors"]
    return [f"{code} {text}" for code, text in errors if code not in ignored]


def run_examples(member: object, name: str) -> doctest.TestResults:
    """Run the examples in a docstring and in those of its methods."""
    namespace = dict(vars(sys.modules[member.__module__]))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in doctest.DocTestFinder().find(member, name, globs=namespace):
        runner.run(example)
    return runner.summarize(verbose=False)


def main(*modules: str) -> int:
    failures = 0
    for module in map(importlib.import_module, modules):
        count = 0
        for name, member in public(module).items():
            for fault in faults(module, name):
                print(f"{module.__name__}.{name}: {fault}")
                failures += 1
            result = run_examples(member, f"{module.__name__}.{name}")
            failures += result.failed
            count += result.attempted
        print(f"{module.__name__}: {len(public(module))} public names, {count} examples run")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
