"""Which backend runs what, where: a table made by asking the backends.

As a Sphinx extension it provides the directive ``support-matrix``. As a program it prints the
table, or brings the one in a Markdown file up to date:

    python docs/_ext/support_matrix.py [--write README.md]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from attn_core import backends, device
from attn_core.errors import UnsupportedProblemError

PACKAGES = ("attn_flash", "attn_paged", "attn_triangle", "attn_evo")
TRITON = (3, 6)  # as if installed
GPU = torch.device("cuda", 0)
MACHINES = {
    "CPU": (torch.device("cpu"), None),
    "NVIDIA Hopper": (GPU, device.DeviceInfo("cuda", "an NVIDIA GPU", "sm_90", 132)),
    "other NVIDIA from sm_80": (GPU, device.DeviceInfo("cuda", "an NVIDIA GPU", "sm_80", 108)),
    "older NVIDIA": (GPU, device.DeviceInfo("cuda", "an NVIDIA GPU", "sm_75", 40)),
    "AMD CDNA": (GPU, device.DeviceInfo("hip", "an AMD GPU", "gfx942", 304)),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BEGIN, END = "<!-- support-matrix -->", "<!-- /support-matrix -->"


def matrix() -> list[list[str]]:
    """Rows of the table, its head first. Each operator has a row forward, and one backward."""
    for package in PACKAGES:
        importlib.import_module(package)
    rows = [["operator", "pass", *MACHINES]]
    for op, typical in sorted(backends.operators().items()):
        problem = typical(torch.device("cpu"))
        for name, needs_grad in (("forward", False), ("backward", True)):
            cells = [_cell(op, problem, needs_grad, *machine) for machine in MACHINES.values()]
            if any(cells):
                rows.append([f"`{op}`", name, *(cell or "none" for cell in cells)])
    return rows


def markdown() -> str:
    """The table in Markdown."""
    head, *rows = matrix()
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def updated(text: str) -> str:
    """Replace what `text` has between the markers by the table of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


def _cell(
    op: str,
    problem: Any,
    needs_grad: bool,
    where: torch.device,
    info: device.DeviceInfo | None,
) -> str:
    """Name the backends that "auto" takes, each with its dtypes; empty where none runs."""
    if needs_grad and "needs_grad" not in problem._fields:
        return ""
    dtypes: dict[str, list[str]] = {}
    with _pretended(info):
        for dtype in DTYPES:
            posed = _posed(problem, device=where, dtype=dtype, needs_grad=needs_grad)
            with contextlib.suppress(UnsupportedProblemError):
                name = backends.resolve(op, posed)
                dtypes.setdefault(name, []).append(str(dtype).removeprefix("torch."))
    if len(dtypes) == 1 and len(*dtypes.values()) == len(DTYPES):
        return next(iter(dtypes))
    return "; ".join(f"{name}: {' '.join(names)}" for name, names in dtypes.items())


def _posed(problem: Any, **changes: Any) -> Any:
    """Change every field of a problem that it has; a second dtype follows the first."""
    for field in problem._fields:
        if field == "accum_dtype":
            changes[field] = torch.promote_types(changes["dtype"], torch.float32)
        elif field.endswith("_dtype") and getattr(problem, field) == problem.dtype:
            changes[field] = changes["dtype"]
    return problem._replace(**{k: v for k, v in changes.items() if k in problem._fields})


@contextlib.contextmanager
def _pretended(info: device.DeviceInfo | None) -> Iterator[None]:
    """Let the backends see Triton, and a GPU described by `info`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ", ATTN_BACKEND="auto"))
        if info is not None:
            stack.enter_context(mock.patch.object(device, "_device_info", return_value=info))
        for module in [m for name, m in sys.modules.items() if name.startswith("attn_")]:
            if hasattr(module, "triton_version"):
                stack.enter_context(
                    mock.patch.object(module, "triton_version", return_value=TRITON)
                )
        backends._resolve.cache_clear()
        try:
            yield
        finally:
            backends._resolve.cache_clear()


def setup(app: Any) -> dict[str, bool]:
    """Register the directive with Sphinx."""
    from docutils.statemachine import StringList
    from sphinx.util.docutils import SphinxDirective

    class SupportMatrix(SphinxDirective):
        def run(self) -> list[Any]:
            self.content = StringList(markdown().splitlines(), source=__file__)
            return self.parse_content_to_nodes()

    app.add_directive("support-matrix", SupportMatrix)
    return {"parallel_read_safe": True}


def main() -> None:
    """Print the table, or write it into a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="a Markdown file that has the markers")
    path = parser.parse_args().write
    if path is None:
        print(markdown())
        return
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
