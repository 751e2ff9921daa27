from __future__ import annotations

import os
import subprocess
import sys


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_import_opens_no_loader_and_no_gpu_library():
    code = (
        "import ctypes, sys\n"
        "opened = []\n"
        "real = ctypes.CDLL.__init__\n"
        "def spy(self, name, *args, **kwargs):\n"
        "    opened.append(str(name))\n"
        "    real(self, name, *args, **kwargs)\n"
        "ctypes.CDLL.__init__ = spy\n"
        "import attn_vulkan, attn_vulkan._backend\n"
        "assert not [name for name in opened if 'vulkan' in name.lower()], opened\n"
        "assert not {'triton', 'attn_flash', 'attn_paged'} & set(sys.modules)\n"
    )
    answer = run(code)
    assert answer.returncode == 0, answer.stderr


def test_import_works_without_a_loader():
    answer = run("import attn_vulkan", ATTN_VULKAN_LOADER="/nowhere/libvulkan.so.1")
    assert answer.returncode == 0, answer.stderr


def test_module_runs_without_a_loader():
    answer = subprocess.run(
        [sys.executable, "-m", "attn_vulkan"],
        env={**os.environ, "ATTN_VULKAN_LOADER": "/nowhere/libvulkan.so.1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    assert "no Vulkan loader found" in answer.stdout
