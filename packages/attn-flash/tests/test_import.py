"""Importing the package imports neither Triton nor a GPU library."""

from __future__ import annotations

import subprocess
import sys

FOREIGN = {"triton", "attn_paged", "attn_triangle", "attn_evo", "attn_vulkan"}


def run(code):
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_import_imports_no_gpu_library_and_no_sibling():
    code = (
        "import sys, torch, attn_flash\n"
        f"print({FOREIGN} & set(sys.modules), torch.cuda.is_initialized())\n"
    )
    assert run(code) == "set() False"


def test_a_call_on_the_cpu_imports_no_triton():
    code = (
        "import sys, torch, attn_flash\n"
        "q = torch.ones(1, 3, 2, 8, requires_grad=True)\n"
        "attn_flash.flash_attn_func(q, q, q).sum().backward()\n"
        "print('triton' in sys.modules)\n"
    )
    assert run(code) == "False"


def test_it_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # as if it were not installed
        "import torch, attn_flash\n"
        "q = torch.ones(1, 3, 2, 8)\n"
        "found = attn_flash.get_available_backends()\n"  # of an installed sibling too
        "print('torch' in found, 'triton' in found, attn_flash.flash_attn_func(q, q, q).shape[1])\n"
    )
    assert run(code) == "True False 3"
