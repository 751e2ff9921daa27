"""The SPIR-V in the wheel is what the sources say, and valid."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import attn_vulkan
from attn_vulkan import parameters

SOURCE = Path(attn_vulkan.__file__).parent
SHADERS = SOURCE / "shaders"
TOOLS = Path(__file__).parents[1] / "tools"
MANIFEST = json.loads((SHADERS / "manifest.json").read_text())
BUILDS = MANIFEST["builds"]
# Types that prose names; they are plain numbers in ctypes.
HANDLES = {"VkBuffer", "VkDeviceMemory", "VkInstance", "VkPipeline", "VkResult"}
SPIRV_VAL = os.environ.get("SPIRV_VAL") or shutil.which("spirv-val")


@pytest.fixture(scope="module")
def tool():
    def load(name):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_every_build_is_there_and_nothing_else(tool):
    wanted = set(tool("build_spirv").builds())
    assert wanted == set(BUILDS) == {path.stem for path in (SHADERS / "spirv").glob("*.spv")}


@pytest.mark.parametrize("name", sorted(BUILDS))
def test_the_source_has_not_changed_since_it_was_built(tool, name):
    build = tool("build_spirv")
    source, defines = build.builds()[name]
    assert BUILDS[name]["source_sha256"] == build.source_hash(source, defines), (
        "run tools/build_spirv.py"
    )


@pytest.mark.parametrize("name", sorted(BUILDS))
def test_the_binary_is_the_one_that_was_built(name):
    code = (SHADERS / "spirv" / f"{name}.spv").read_bytes()
    assert hashlib.sha256(code).hexdigest() == BUILDS[name]["spirv_sha256"]


@pytest.mark.skipif(SPIRV_VAL is None, reason="spirv-val is not installed")
@pytest.mark.parametrize("name", sorted(BUILDS))
def test_the_binary_is_valid(name):
    target = BUILDS[name]["target"]
    command = [SPIRV_VAL, "--target-env", target, "--scalar-block-layout"]
    done = subprocess.run(
        [*command, SHADERS / "spirv" / f"{name}.spv"], capture_output=True, text=True, check=False
    )
    if "Invalid capability operand" in done.stderr or "Invalid extension" in done.stderr:
        pytest.skip("this spirv-val is older than the extension of the shader")
    assert done.returncode == 0, done.stderr


def test_parameters_have_the_layout_of_the_shaders():
    text = (SHADERS / "attention.glsl").read_text()
    body = re.search(r"buffer Parameters \{(.*?)\n\};", text, re.DOTALL)[1]
    members = re.findall(r"^\s*(\w+) (\w+);", body, re.MULTILINE)
    sizes = {"View": 40, "uint64_t": 8, "int64_t": 8, "uint": 4, "int": 4, "float": 4}
    offset = 0
    fields = parameters.Parameters._fields_
    assert [name.rstrip("_") for _, name in members] == [name for name, _ in fields]
    for kind, name in members:
        assert getattr(parameters.Parameters, name.rstrip("_")).offset == offset
        offset += sizes[kind]
    assert ctypes.sizeof(parameters.Parameters) - offset < 8


def test_bindings_hold_every_name_the_package_spells(tool):
    names = tool("generate_bindings").wanted(SOURCE)
    text = (SOURCE / "_vk" / "registry.py").read_text()
    present = set(re.findall(r"^(?:class )?(VK_\w+|Vk\w+)", text, re.MULTILINE))
    present |= set(re.findall(r'^    "(vk\w+)"', text, re.MULTILINE))
    extensions = {name for name in names if re.fullmatch(r"VK_(KHR|NV|AMD|EXT)_[a-z0-9_]+", name)}
    assert names - extensions - HANDLES <= present, "run tools/generate_bindings.py"


def test_bindings_are_those_of_the_registry(tool):
    generate = tool("generate_bindings")
    path = Path(os.environ.get("VK_XML", "/usr/share/vulkan/registry/vk.xml"))
    if not path.exists():
        pytest.skip("the Vulkan registry is not installed")
    registry = generate.Registry(generate.ElementTree.parse(path).getroot())
    text = generate.OUTPUT.read_text()
    if f"Vulkan {registry.version};" not in text:
        pytest.skip(f"the registry is another version, {registry.version}")
    assert generate.generate(registry, generate.wanted(SOURCE)) == text
