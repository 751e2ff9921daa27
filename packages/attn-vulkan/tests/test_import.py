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


def test_numpy_needs_no_torch():
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import numpy as np, attn_vulkan, attn_vulkan.__main__\n"
        "q, k = np.ones((1, 3, 2, 16), np.float32), np.ones((1, 5, 1, 16), np.float32)\n"
        "try:\n"
        "    attn_vulkan.attention(q, np.ones((1, 5, 3, 16), np.float32), k)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "try:\n"
        "    out, lse = attn_vulkan.attention(q, k, k, return_lse=True)\n"
        "    np.testing.assert_allclose(out, 1.0, rtol=1e-6)\n"
        "    attn_vulkan.attention_backward(out, q, k, k, out, lse)\n"
        "except attn_vulkan.VulkanError as error:\n"
        "    print(error)\n"
    )
    answer = run(code)
    assert answer.returncode == 0, answer.stderr
    assert "v must have shape" in answer.stdout


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
