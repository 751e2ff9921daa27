"""Every job of this repository, for people and for CI: ``nox -l`` lists them.

Arguments after ``--`` that name packages pick those packages, the rest goes to the tool:
``nox -s tests -- attn-triangle -q``. On a machine that has torch already and no network,
``nox --no-venv -s SESSION`` installs nothing and runs from the source folders.
"""

from __future__ import annotations

import ctypes.util
import graphlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "virtualenv"  # uv does not see every build of torch
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "typecheck", "tests", "docstrings"]

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
CONSTRAINTS = ROOT / "shared" / "constraints"
TOOLS = nox.project.load_toml(ROOT / "pyproject.toml")
PYPROJECT = {
    path.parent.name: nox.project.load_toml(path)
    for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}


def siblings(package: str) -> list[str]:
    """Packages of this repository that `package` depends on."""
    names = [re.split(r"[^\w-]", line)[0] for line in PYPROJECT[package]["project"]["dependencies"]]
    return [name for name in names if name in PYPROJECT]


# In the order in which they depend on one another.
PACKAGES = tuple(graphlib.TopologicalSorter({p: siblings(p) for p in PYPROJECT}).static_order())

# A stack is one name for a set of versions that install together; Triton stands on one of torch.
STACKS = tuple(path.stem for path in sorted(CONSTRAINTS.glob("*.txt")))
DEFAULT_STACK = "torch-2.13"
MINIMUMS = "minimums"
TRITON_STACKS = [stack for stack in STACKS if "-triton-" in stack]

# hatchling asks for editables only when it meets an editable install
BUILD_BACKEND = [*PYPROJECT["attn-core"]["build-system"]["requires"], "editables"]
DEVICES = ("cpu", "cuda", "hip", "vulkan")
OTHER_TESTS = ("benchmarks/tests", "ci/tests", "demos/tests", "docs/tests")
APT_FAILED = 100
CPU_TESTS = "not gpu and not interpret and not compile"
SANITIZED = "m65-n65 or m129-n129 or test_ragged_sequences"
# The default changes in Triton 3.10, and with it the last bits of results.
RUN_ENV = {"TRITON_DEFAULT_FP_FUSION": "1"}
LINTED = ("noxfile.py", "benchmarks", "ci", "demos", "docs", "packages")

triton_stack = nox.parametrize("stack", [nox.param(stack, id=stack) for stack in TRITON_STACKS])


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests that need neither a GPU nor Triton."""
    picked_all = len(split(session.posargs)[0]) == len(PACKAGES)
    elsewhere = existing(OTHER_TESTS) if picked_all else []
    run_tests_side_by_side(
        session,
        DEFAULT_STACK,
        CPU_TESTS,
        *elsewhere,
        groups=("bench", "demo"),
        package_groups=("test", "libraries"),
    )


@nox.session(name="tests-interpret")
@triton_stack
def tests_interpret(session: nox.Session, stack: str) -> None:
    """Run the Triton kernels on the CPU, in Triton's interpreter."""
    run_tests_side_by_side(session, stack, "interpret", env={"TRITON_INTERPRET": "1"})


@nox.session(name="tests-compile")
@triton_stack
def tests_compile(session: nox.Session, stack: str) -> None:
    """Compile every kernel for sm_80, sm_90, sm_100 and gfx942, without a GPU."""
    run_tests_side_by_side(session, stack, "compile")


@nox.session(name="tests-cuda")
def tests_cuda(session: nox.Session) -> None:
    """Run the GPU tests on CUDA; -- --allow-missing skips where there is no device."""
    run_tests_side_by_side(session, DEFAULT_STACK, "gpu", "--device=cuda")


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run small GPU tests of attn-flash's Hopper kernels under compute-sanitizer, if it is there.

    ``-- --tool=racecheck`` picks another of its tools than memcheck.
    """
    if shutil.which("compute-sanitizer") is None:
        session.error("compute-sanitizer of the CUDA toolkit must be on the PATH")
    tool = session.posargs or ["--tool=memcheck"]
    env = install(session, DEFAULT_STACK, *package_group("test"))
    session.run(
        *("compute-sanitizer", *tool, "--target-processes=all", "--error-exitcode=1"),
        *(python(session), "-m", "pytest", "-m", "gpu", "--device=cuda", "-k", SANITIZED),
        "packages/attn-flash/tests/hopper",
        env={**env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        external=True,
    )


@nox.session(name="tests-rocm")
def tests_rocm(session: nox.Session) -> None:
    """Run the GPU tests on ROCm; -- --allow-missing skips where there is no device."""
    run_tests_side_by_side(session, DEFAULT_STACK, "gpu", "--device=hip")


@nox.session(name="tests-vulkan")
def tests_vulkan(session: nox.Session) -> None:
    """Run attn-vulkan's tests on a GPU, or on Mesa's lavapipe, which is installed if need be."""
    install_lavapipe(session)
    everything = ""
    run_tests_side_by_side(
        session, DEFAULT_STACK, everything, "--device=vulkan", packages=["attn-vulkan"]
    )


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the tests on the lowest versions the packages allow."""
    run_tests(session, MINIMUMS, CPU_TESTS)


@nox.session
def conformance(session: nox.Session) -> None:
    """Hold every installed backend to its operator's contract, on every device present."""
    packages, args = split(session.posargs)
    env = install(session, DEFAULT_STACK, *package_group("test"))
    suites = existing(f"packages/{package}/tests/test_conformance.py" for package in packages)
    for device in DEVICES:
        options = (f"--device={device}", "--allow-missing")
        session.run(python(session), "-m", "pytest", *options, *suites, *args, env=env)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format, spelling and the direction of imports."""
    install_tools(session, "lint")
    session.run("ruff", "check", *existing(LINTED), external=True)
    session.run("ruff", "format", "--check", *existing(LINTED), external=True)
    session.run("codespell", *existing((*LINTED, "README.md", "CONTRIBUTING.md")), external=True)
    session.run("lint-imports", "--no-logo", env=source_path(), external=True)


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check types with mypy, strictly but for the kernels."""
    packages, args = split(session.posargs)
    env = install(session, DEFAULT_STACK, *package_group("test"), *root_groups("typecheck"))
    sources = existing(f"packages/{package}/src" for package in packages)
    session.run(python(session), "-m", "mypy", *args, *sources, env=env)


@nox.session
def docstrings(session: nox.Session) -> None:
    """Validate the docstrings of public names and run their examples on the CPU."""
    packages, args = split(session.posargs)
    env = install(session, DEFAULT_STACK, *root_groups("docstrings"))
    modules = [package.replace("-", "_") for package in packages if has_module(package)]
    session.run(python(session), "ci/docstrings.py", *modules, *args, env=env)


@nox.session
def build(session: nox.Session) -> None:
    """Build sdists and wheels, check what is in them, install each wheel with attn-core alone."""
    install_tools(session, "build")
    shutil.rmtree(DIST, ignore_errors=True)
    for package in PACKAGES:
        build_package(session, package)
    session.run(python(session), "ci/check_dists.py", str(DIST), *PACKAGES)
    for package in PACKAGES:
        install_alone(session, package)
    for extra in PYPROJECT["attn-all"]["project"]["optional-dependencies"]:
        install_alone(session, "attn-all", extra)


@nox.session
def bench(session: nox.Session) -> None:
    """Time operators against their peers: nox -s bench -- attn-flash."""
    env = install(session, DEFAULT_STACK, *root_groups("bench"))
    session.run(python(session), "-m", "benchmarks", *session.posargs, env=env)


@nox.session(name="bench-compare")
def bench_compare(session: nox.Session) -> None:
    """Compare two results of bench: nox -s bench-compare -- OLD.json NEW.json."""
    env = install(session, DEFAULT_STACK, *root_groups("bench"))
    session.run(python(session), "-m", "benchmarks.compare", *session.posargs, env=env)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    env = install(session, DEFAULT_STACK, *root_groups("docs"))
    session.run(python(session), "-m", "sphinx", "-W", "docs", "docs/_build/html", env=env)


@nox.session
def demo(session: nox.Session) -> None:
    """Train a small vision transformer on handwritten digits, then meet the other packages."""
    env = install(session, DEFAULT_STACK, *root_groups("demo"))
    session.run(python(session), "demos/demo.py", *session.posargs, env=env)


@nox.session
def changelog(session: nox.Session) -> None:
    """Draft each package's next changelog; fail where src/ changed without a fragment."""
    packages, args = split(session.posargs)
    install_tools(session, "changelog")
    for package in packages:
        session.run(
            *("towncrier", "build", "--draft", "--config", str(ROOT / "pyproject.toml")),
            *("--dir", f"packages/{package}", "--name", package, "--version", version(package)),
            external=True,
        )
    session.run(python(session), "ci/check_fragments.py", *(args or ["main...HEAD"]), *packages)


@nox.session
def release(session: nox.Session) -> None:
    """Check that a package is ready, build it and tag it here: nox -s release -- attn-flash."""
    packages, args = split(session.posargs)
    if args or len(packages) != 1:
        session.error(f"name one package of {', '.join(PACKAGES)}")
    [package] = packages
    install_tools(session, "build")
    tag = f"{package}-v{version(package)}"
    session.run(python(session), "ci/check_release.py", package, tag)
    shutil.rmtree(DIST, ignore_errors=True)
    build_package(session, package)
    session.run(python(session), "ci/check_dists.py", str(DIST), package)
    session.run("git", "tag", "--annotate", tag, "--message", tag, external=True)
    session.log(f"tagged {tag} here; pushing it is yours")


@nox.session(venv_backend="none")
def dev(session: nox.Session) -> None:
    """Make .venv with every package editable and every tool."""
    home = ROOT / ".venv"
    tools = root_groups(*TOOLS["dependency-groups"])
    session.run(sys.executable, "-m", "virtualenv", str(home))
    session.run(
        *(python_of(home), "-m", "pip", "install", *stack_files("-r", TRITON_STACKS[0])),
        *(*editable(), *package_group("test"), *tools),
    )


def run_tests(
    session: nox.Session,
    stack: str,
    markers: str,
    *options: str,
    packages: Iterable[str] = (),
    groups: Iterable[str] = (),
    package_groups: Iterable[str] = ("test",),
    env: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run the tests that `markers` selects, of `packages` or else of those that were picked."""
    picked, args = split(session.posargs)
    requirements = [*package_group(*package_groups), *root_groups(*groups)]
    folders = existing(f"packages/{package}/tests" for package in packages or picked)
    session.run(
        *(python(session), "-m", "pytest", "-m", markers, *folders, *options, *args),
        env={**install(session, stack, *requirements), **env},
    )


def run_tests_side_by_side(
    session: nox.Session,
    stack: str,
    markers: str,
    *options: str,
    groups: Iterable[str] = (),
    env: Mapping[str, str] = MappingProxyType({}),
    **rest: Any,
) -> None:
    """Run tests in a process for each core, up to 8, where a session may install that."""
    if session.venv_backend != "none":
        options = (*options, "-n=auto", "--maxprocesses=8", "--dist=worksteal")
        groups = (*groups, "parallel")
        env = {**env, "OMP_NUM_THREADS": "1"}
    run_tests(session, stack, markers, *options, groups=groups, env=env, **rest)


def split(posargs: list[str]) -> tuple[list[str], list[str]]:
    """Part the arguments after ``--``: picked packages (all by default), and the tool's own."""
    packages = [package for package in PACKAGES if package in posargs]
    return packages or list(PACKAGES), [arg for arg in posargs if arg not in PACKAGES]


def install(session: nox.Session, stack: str, *requirements: str) -> dict[str, str]:
    """Install the packages editable over a stack; return the environment to run in."""
    if session.venv_backend == "none":
        # Tiles measured on this machine stay out of the way, and platformdirs may be missing.
        return {**RUN_ENV, **source_path(), "ATTN_CACHE_DIR": str(ROOT / ".nox" / "attn-cache")}
    put_stack(session, python(session), stack)
    constraints = stack_files("-c", stack)
    session.install("--no-build-isolation", *constraints, *editable(), *requirements)
    return RUN_ENV


def install_tools(session: nox.Session, group: str) -> None:
    """Install one group of tools that need no package of this repository."""
    if session.venv_backend != "none":
        session.install(*root_groups(group))


def install_lavapipe(session: nox.Session) -> None:
    """Install a Vulkan device made of the CPU where there is no loader and apt-get may be used.

    Where apt-get fails, as it does without a network, the tests say what they miss.
    """
    has_loader = ctypes.util.find_library("vulkan") is not None
    if has_loader or shutil.which("apt-get") is None or os.geteuid() != 0:
        return
    for command in (["update"], ["install", "--yes", "mesa-vulkan-drivers", "libvulkan1"]):
        session.run("apt-get", *command, external=True, success_codes=[0, APT_FAILED])


def put_stack(session: nox.Session, interpreter: str, stack: str) -> None:
    """Let the environment of `interpreter` see a stack.

    torch and Triton are large, so each is installed once, into a folder of its own. An environment
    holds the packages of this repository and the tools of a session, and sees the rest there.
    """
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = session.run(interpreter, "-c", code, external=True, silent=True, log=False)
    folders = [f"{layer_folder(session, layer)}\n" for layer in layers(stack)]
    Path(str(site).strip(), "stack.pth").write_text("".join(folders))


def layers(stack: str) -> list[str]:
    """Names of what is installed apart for a stack: its Triton if it names one, then its torch."""
    torch, _, triton = stack.partition("-triton-")
    return [stack, torch] if triton else [stack]


def stack_files(option: str, stack: str) -> list[str]:
    """Arguments of pip that give the files of a stack to `option`."""
    return [arg for layer in layers(stack) for arg in (option, str(CONSTRAINTS / f"{layer}.txt"))]


def layer_folder(session: nox.Session, layer: str) -> Path:
    """Where a layer is installed: on first use, and again when its file changes."""
    requirements = CONSTRAINTS / f"{layer}.txt"
    build_backend = [] if layer in TRITON_STACKS else BUILD_BACKEND  # torch's layer has it
    folder = ROOT / session.cache_dir / "stacks" / layer
    stamp = folder / "installed"
    wanted = "\n".join((sys.version, requirements.read_text(), *build_backend))
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    fresh = folder.with_name(f"{layer}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    installed = session.run_install(
        *(python(session), "-m", "pip", "install", "--target", str(fresh)),
        *("-r", str(requirements), *build_backend),
        silent=True,
    )
    if installed is None:  # nox -R makes do with what there is
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    stamp.write_text(wanted)
    return folder


def build_package(session: nox.Session, package: str) -> None:
    """Build the sdist of one package, and the wheel from it."""
    source = f"packages/{package}"
    session.run(python(session), "-m", "build", "--no-isolation", "--outdir", str(DIST), source)


def install_alone(session: nox.Session, package: str, extra: str = "") -> None:
    """Install a built wheel in an empty environment with attn-core alone, and import it."""
    home = ROOT / session.cache_dir / "alone"
    session.run(python(session), "-m", "venv", "--clear", "--without-pip", str(home))
    interpreter = python_of(home)
    put_stack(session, interpreter, TRITON_STACKS[0] if extra else DEFAULT_STACK)
    pip = (python(session), "-m", "pip", "--python", interpreter, "install")
    [core] = DIST.glob("attn_core-*.whl")
    session.run(*pip, str(core))
    requirement = f"{package}[{extra}]" if extra else package
    session.run(*pip, "--no-index", "--find-links", str(DIST), requirement)
    session.run(interpreter, "-I", "ci/check_install.py", package, external=True)


def editable() -> list[str]:
    """Arguments of pip that install every package from its folder; all in one command."""
    return [arg for package in PACKAGES for arg in ("-e", f"packages/{package}")]


def source_path() -> dict[str, str]:
    """Environment in which the packages are imported from their folders."""
    sources = [str(ROOT / "packages" / package / "src") for package in PACKAGES]
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*sources, inherited] if inherited else sources)}


def package_group(*names: str) -> list[str]:
    """Requirements of dependency groups, over all packages that have them."""
    groups = [
        nox.project.dependency_groups(PYPROJECT[package], name)
        for package in PACKAGES
        for name in names
        if name in PYPROJECT[package].get("dependency-groups", {})
    ]
    return list(dict.fromkeys(requirement for group in groups for requirement in group))


def root_groups(*names: str) -> list[str]:
    """Requirements of dependency groups of the repository."""
    return list(nox.project.dependency_groups(TOOLS, *names))


def version(package: str) -> str:
    """Version of a package, as its own file says."""
    pyproject = PYPROJECT[package]
    if not has_module(package):
        return str(pyproject["project"]["version"])
    source = Path(ROOT, "packages", package, pyproject["tool"]["hatch"]["version"]["path"])
    return source.read_text().split('"')[1]


def has_module(package: str) -> bool:
    """Whether a package holds code; attn-all is a list of dependencies."""
    return "version" in PYPROJECT[package]["project"].get("dynamic", [])


def existing(paths: Iterable[str]) -> list[str]:
    """Those of `paths` that are there."""
    return [path for path in paths if (ROOT / path).exists()]


def python(session: nox.Session) -> str:
    """Interpreter of the session's environment, or without one the one that runs nox."""
    return sys.executable if session.venv_backend == "none" else "python"


def python_of(home: Path) -> str:
    """Interpreter of the virtual environment in `home`."""
    return str(home / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
