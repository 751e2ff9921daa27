"""The pytest plugin, run in sessions of its own."""

import pytest
import torch

from attn_core import tuning
from attn_core.testing import plugin

pytest_plugins = ["pytester"]
PLUGIN = ("-p", "attn_core.testing.plugin", "-p", "no:cacheprovider")

MARKED = """
    import pytest
    @pytest.mark.gpu
    def test_gpu(device):
        assert device.type != "cpu"
    @pytest.mark.interpret
    def test_interpret(): pass
    @pytest.mark.compile
    def test_compile(): pass
    def test_plain(device):
        assert device.type == "cpu"
"""


@pytest.fixture
def run(pytester, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(plugin, "_has_triton", lambda: True)
    return lambda *args: pytester.runpytest_inprocess(*PLUGIN, "-rs", *args)


def test_cpu_session_skips_what_needs_a_gpu_or_the_interpreter(pytester, run):
    pytester.makepyfile(MARKED)
    result = run()
    result.assert_outcomes(passed=2, skipped=2)
    result.stdout.fnmatch_lines(["*needs --device cuda*", "*needs TRITON_INTERPRET=1*"])


def test_interpreted_session_skips_compilation(pytester, run, monkeypatch):
    pytester.makepyfile(MARKED)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run("-m", "interpret or compile")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*cannot compile under TRITON_INTERPRET=1*"])


def test_nothing_of_triton_runs_without_it(pytester, run, monkeypatch):
    pytester.makepyfile(MARKED)
    monkeypatch.setattr(plugin, "_has_triton", lambda: False)
    result = run("-m", "interpret or compile")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["*triton is not installed*"])


def test_absent_device_is_an_error(pytester, run):
    pytester.makepyfile(MARKED)
    result = run("--device", "npu")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--device npu is not present here, only cpu*"])


def test_allow_missing_skips_tests_of_an_absent_device(pytester, run):
    pytester.makepyfile(MARKED)
    result = run("--device", "npu", "--allow-missing", "-m", "gpu or not compile and not interpret")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["*no npu device*"])


def test_registered_device_has_its_tensors_on_the_cpu(pytester, run):
    pytester.makeconftest(
        "from attn_core.testing.plugin import register_device\n"
        "register_device('abacus', lambda: True)\n"
    )
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.gpu
        def test_gpu(device):
            assert device.type == "cpu"
        """
    )
    run("--device", "abacus").assert_outcomes(passed=1)


def test_seed_depends_on_the_test_alone(pytester, run):
    pytester.makepyfile(
        """
        import random, pytest, torch
        drawn = {}
        @pytest.mark.parametrize("name", ["a", "b"])
        @pytest.mark.parametrize("again", [0])
        def test_draw(name, again):
            drawn[name] = (torch.rand(()).item(), random.random())
        def test_first():
            drawn["first"] = torch.rand(()).item()
            torch.manual_seed(0)
        def test_differs():
            assert drawn["a"] != drawn["b"]
        """
    )
    run().assert_outcomes(passed=4)
    pytester.makepyfile(
        test_alone="""
        import torch
        values = []
        def test_one(): values.append(torch.rand(3))
        def test_same_again(request):
            from attn_core.testing import seed_from
            torch.manual_seed(seed_from("test_alone.py::test_one"))
            assert torch.equal(torch.rand(3), values[0])
        """
    )
    run("test_alone.py").assert_outcomes(passed=2)


def test_fp_fusion_is_stated(pytester, run, monkeypatch):
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    pytester.makepyfile(
        "import os\ndef test_it(): assert os.environ['TRITON_DEFAULT_FP_FUSION'] == '1'"
    )
    run().assert_outcomes(passed=1)


def test_every_device_is_the_target(use_target):
    use_target("gfx942", modules=(plugin,), num_sms=3)
    for module in (tuning, plugin):
        info = module.device_info(torch.device("cpu"))
        assert (info.type, info.arch, info.num_sms) == ("hip", "gfx942", 3)
