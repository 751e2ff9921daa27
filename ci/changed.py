"""Print the packages that a range of revisions affects: ``python ci/changed.py main...HEAD``."""

from __future__ import annotations

import sys

from repository import changed_files, dependents, names

# A change here can change any package.
COMMON = ("ci/", "shared/", ".ci/", ".github/", "noxfile.py", "pyproject.toml")


def affected(files: list[str]) -> list[str]:
    """Packages that must be looked at again when `files` change."""
    if any(file.startswith(COMMON) for file in files):
        return names()
    touched = {file.split("/")[1] for file in files if file.startswith("packages/")}
    return sorted({name for package in touched & set(names()) for name in dependents(package)})


if __name__ == "__main__":
    print(" ".join(affected(changed_files(sys.argv[1]))))
