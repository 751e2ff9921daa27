"""Check what is in built distributions: ``python ci/check_dists.py dist attn-core attn-flash``."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

from repository import ROOT, git, pyproject


def sources(package: str) -> set[str]:
    """Files of `package` that git tracks or would track."""
    home = f"packages/{package}/"
    listed = git("ls-files", "--cached", "--others", "--exclude-standard", home)
    return {file.removeprefix(home) for file in listed.splitlines() if (ROOT / file).exists()}


def wheel_faults(wheel: Path, package: str) -> list[str]:
    """What is wrong with the wheel of `package`."""
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
        [metadata_path] = [name for name in found if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(archive.read(metadata_path).decode())
    info = metadata_path.removesuffix("METADATA")
    code = {name for name in found if not name.startswith(info)}
    wanted = {file.removeprefix("src/") for file in sources(package) if file.startswith("src/")}
    module = package.replace("-", "_")
    project = pyproject(package)["project"]
    checks = {
        f"lacks {sorted(wanted - code)}": wanted - code,
        f"also holds {sorted(code - wanted)}": code - wanted,
        "lacks its licence": f"{info}licenses/LICENSE" not in found,
        "lacks py.typed": bool(wanted) and f"{module}/py.typed" not in found,
        "does not say its licence": metadata["License-Expression"] != project["license"],
        "has other extras than its pyproject.toml": set(metadata.get_all("Provides-Extra", []))
        != set(project.get("optional-dependencies", {})),
    }
    return [f"{wheel.name} {fault}" for fault, holds in checks.items() if holds]


def sdist_faults(sdist: Path, package: str) -> list[str]:
    """What is wrong with the sdist of `package`: tests must be in it too."""
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {file for file in sources(package) if not file.startswith("changelog.d/")}
    return [f"{sdist.name} lacks {file}" for file in sorted(wanted - found)]


def main(folder: str, *packages: str) -> int:
    faults = []
    for package in packages:
        stem = package.replace("-", "_")
        [wheel] = Path(folder).glob(f"{stem}-*.whl")
        [sdist] = Path(folder).glob(f"{stem}-*.tar.gz")
        faults += wheel_faults(wheel, package) + sdist_faults(sdist, package)
    print("\n".join(faults) or f"as they should be: {', '.join(packages)}")
    return len(faults)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
