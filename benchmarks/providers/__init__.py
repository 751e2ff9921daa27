"""What is measured: one module for each package or part of one, with all there is to know."""

from __future__ import annotations

import importlib

from benchmarks.providers.base import Subject

PACKAGES = {
    "attn-flash": "flash",
    "attn-flash-terms": "flash_terms",
    "attn-flash-kvcache": "kvcache",
    "attn-paged": "paged",
    "attn-triangle": "triangle",
    "attn-evo": "evo",
    "attn-evo-prefix-sum": "prefix_sum",
    "attn-vulkan": "vulkan",
}


def subject(package: str) -> Subject:
    """Return what there is to measure in one package."""
    if package not in PACKAGES:
        raise ValueError(f"package must be one of {', '.join(PACKAGES)}, got {package!r}")
    module = importlib.import_module(f"benchmarks.providers.{PACKAGES[package]}")
    return module.SUBJECT  # type: ignore[no-any-return]
