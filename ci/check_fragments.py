"""Fail where a package's code changed and its changelog did not.

``python ci/check_fragments.py main...HEAD attn-core attn-flash``
"""

from __future__ import annotations

import sys

from repository import changed_files


def is_silent(package: str, files: list[str]) -> bool:
    """Whether `files` change the code of `package` and say nothing about it."""
    home = f"packages/{package}"
    has_code = any(file.startswith(f"{home}/src/") for file in files)
    has_note = any(
        file.startswith((f"{home}/changelog.d/", f"{home}/CHANGELOG.md")) for file in files
    )
    return has_code and not has_note


def main(revisions: str, *packages: str) -> int:
    files = changed_files(revisions)
    silent = [package for package in packages if is_silent(package, files)]
    for package in silent:
        print(f"{package}: src/ changed in {revisions} without a fragment in changelog.d/")
    return len(silent)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
