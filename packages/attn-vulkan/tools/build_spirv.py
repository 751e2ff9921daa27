# ruff: noqa: INP001  (a script)
"""Compile the shaders of the package to the SPIR-V that its wheel carries, and validate it.

    python tools/build_spirv.py            # needs glslang 16 or newer and spirv-val
    python tools/build_spirv.py forward    # only the shaders whose source starts so

``GLSLANG`` and ``SPIRV_VAL`` name other programs. What was compiled from what, and by which
compiler, is written to ``shaders/manifest.json``; a test holds the files against it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

SHADERS = Path(__file__).parents[1] / "src" / "attn_vulkan" / "shaders"
MANIFEST = SHADERS / "manifest.json"
INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)

DTYPES = {"float32": 32, "float16": 16, "bfloat16": 116}
HALVES = ("float16", "bfloat16")


def builds() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Every file to build: its name, its source and its defines."""
    made = {}
    for dtype, number in DTYPES.items():
        define = f"DTYPE={number}"
        made[f"combine_{dtype}"] = ("combine.comp", (define,))
        made[f"delta_{dtype}"] = ("delta.comp", (define,))
        for variant, extra in (("scalar", ()), ("subgroup", ("SUBGROUP",))):
            made[f"forward_{variant}_{dtype}"] = ("forward.comp", (define, *extra))
            made[f"backward_dq_{variant}_{dtype}"] = ("backward.comp", (define, "DQ", *extra))
            made[f"backward_dkv_{variant}_{dtype}"] = ("backward.comp", (define, *extra))
    for dtype in HALVES:
        define = f"DTYPE={DTYPES[dtype]}"
        made[f"layout_{dtype}"] = ("layout.comp", (define,))
        for variant in ("matrix", "matrix2"):
            made[f"forward_{variant}_{dtype}"] = (f"forward_{variant}.comp", (define,))
            made[f"backward_dq_{variant}_{dtype}"] = (f"backward_{variant}.comp", (define, "DQ"))
            made[f"backward_dkv_{variant}_{dtype}"] = (f"backward_{variant}.comp", (define,))
    return {name: build for name, build in made.items() if (SHADERS / build[0]).exists()}


def target(source: str) -> str:
    """Version of Vulkan a source is compiled for; GL_NV_cooperative_matrix2 needs SPIR-V 1.6."""
    return "vulkan1.3" if "matrix2" in source else "vulkan1.2"


def sources(path: Path) -> list[Path]:
    """`path` and what it includes, in the order of reading."""
    included = [SHADERS / name for name in INCLUDE.findall(path.read_text())]
    return [path, *(inner for file in included for inner in sources(file))]


def source_hash(source: str, defines: tuple[str, ...]) -> str:
    """Hash of everything a build is made from."""
    digest = hashlib.sha256(" ".join((target(source), *defines)).encode())
    for path in sources(SHADERS / source):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build(name: str, source: str, defines: tuple[str, ...]) -> dict[str, object]:
    """Compile and validate one file; return its row of the manifest."""
    output = SHADERS / "spirv" / f"{name}.spv"
    output.parent.mkdir(exist_ok=True)
    run(
        *(
            os.environ.get("GLSLANG", "glslang"),
            "-V",
            "-g0",
            "--quiet",
            "--target-env",
            target(source),
        ),
        "-P#extension GL_GOOGLE_include_directive : require",
        *(f"-D{define}" for define in defines),
        *(str(SHADERS / source), "-o", str(output)),
    )
    validate(output, target(source))
    return {
        "source": source,
        "defines": list(defines),
        "target": target(source),
        "source_sha256": source_hash(source, defines),
        "spirv_sha256": hashlib.sha256(output.read_bytes()).hexdigest(),
    }


def validate(path: Path, environment: str) -> None:
    """Run spirv-val."""
    program = os.environ.get("SPIRV_VAL", "spirv-val")
    run(program, "--target-env", environment, "--scalar-block-layout", str(path))


def compiler_version() -> str:
    """What the compiler calls itself."""
    text = run(os.environ.get("GLSLANG", "glslang"), "--version")
    return "glslang " + text.split("Glslang Version:")[1].split()[0].rpartition(":")[2]


def run(*command: str) -> str:
    """Run a program; its output is shown where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    """Build everything, or what the command line names."""
    wanted = builds()
    prefixes = tuple(sys.argv[1:]) or ("",)
    manifest = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {"builds": {}}
    rows = {name: row for name, row in manifest["builds"].items() if name in wanted}
    for name, (source, defines) in wanted.items():
        if source.startswith(prefixes):
            rows[name] = build(name, source, defines)
    manifest = {"compiler": compiler_version(), "builds": dict(sorted(rows.items()))}
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n")
    for stale in set((SHADERS / "spirv").glob("*.spv")) - {
        SHADERS / "spirv" / f"{name}.spv" for name in wanted
    }:
        stale.unlink()


if __name__ == "__main__":
    main()
