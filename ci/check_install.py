"""Import an installed package where Triton cannot be: ``python -I ci/check_install.py attn-flash``.

Runs in an environment that holds the package, attn-core and what they depend on, nothing else.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys

FAMILY = ("attn_core", "attn_evo", "attn_flash", "attn_paged", "attn_triangle", "attn_vulkan")
META_PACKAGE = "attn-all"


def main(package: str) -> None:
    sys.modules["triton"] = None  # type: ignore[assignment]  # import triton raises ImportError
    wanted = set(FAMILY) if package == META_PACKAGE else {"attn_core", package.replace("-", "_")}
    installed = {name for name in FAMILY if importlib.util.find_spec(name)}
    if installed != wanted:
        sys.exit(f"{package} brings {sorted(installed)}, not {sorted(wanted)}")
    for name in sorted(wanted):
        module = importlib.import_module(name)
        version = importlib.metadata.version(name.replace("_", "-"))
        if module.__version__ != version:
            sys.exit(f"{name} says it is {module.__version__}, its metadata {version}")
        print(f"{name} {version} imports without triton")


if __name__ == "__main__":
    main(sys.argv[1])
