"""Say what keeps a package from being tagged.

``python ci/check_release.py attn-flash attn-flash-v0.1.0``
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from repository import ROOT, git

RELEASE_BRANCH = "main"


def first_heading(changelog: str) -> str:
    """Version of the newest section of a changelog, empty where there is none."""
    found = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    return found[1] if found else ""


def obstacles(package: str, tag: str) -> list[str]:
    """Reasons not to release `package` now, as `tag`."""
    home = ROOT / "packages" / package
    version = tag.removeprefix(f"{package}-v")
    newest = first_heading((home / "CHANGELOG.md").read_text())
    branch = git("rev-parse", "--abbrev-ref", "HEAD")
    waiting = sorted(path.name for path in Path(home, "changelog.d").glob("*.md"))
    checks = {
        f"the branch is {branch}, not {RELEASE_BRANCH}": branch != RELEASE_BRANCH,
        "the tree has changes that are not committed": bool(git("status", "--porcelain")),
        f"the changelog's first heading is {newest!r}, not {version!r}": newest != version,
        f"changelog.d/ still holds {', '.join(waiting)}": bool(waiting),
        f"the tag {tag} exists": bool(git("tag", "--list", tag)),
    }
    return [reason for reason, holds in checks.items() if holds]


if __name__ == "__main__":
    reasons = obstacles(*sys.argv[1:])
    for reason in reasons:
        print(f"{sys.argv[1]}: {reason}")
    sys.exit(len(reasons))
