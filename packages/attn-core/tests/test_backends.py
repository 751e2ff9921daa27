"""Choosing a backend, and the words in which a choice is refused."""

import importlib.metadata
import math
import threading
from concurrent import futures

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from attn_core import backends
from attn_core.errors import BackendUnavailableError, UnsupportedProblemError


def test_auto_takes_the_preferred_backend_that_can(registry):
    registry.add("slow", 0)
    registry.add("fast", 10, reason="it is tired")
    registry.add("middle", 5)
    assert backends.available(registry.op) == ["fast", "middle", "slow"]
    assert backends.resolve(registry.op, registry.Problem()) == "middle"


def test_named_backend_never_falls_back(registry):
    registry.add("torch", 0)
    registry.add("triton", 10, reason="it is tired")
    message = rf"the backend that was named does not run this {registry.op} problem \(triton: it is"
    with pytest.raises(UnsupportedProblemError, match=message):
        backends.resolve(registry.op, registry.Problem(), "triton")


def test_every_reason_is_given(registry):
    registry.add("torch", 0, reason="it is closed")
    registry.add("triton", 10, reason="it is tired")
    with pytest.raises(UnsupportedProblemError, match=r"no .* \(triton: it is tired; torch: it is"):
        backends.resolve(registry.op, registry.Problem())


def test_unknown_backend(registry):
    registry.add("torch")
    message = (
        r"backend must be one of \['auto', 'torch'\] for attn_core_tests::op, got 'tensorflow'"
    )
    with pytest.raises(BackendUnavailableError, match=message):
        backends.resolve(registry.op, registry.Problem(), "tensorflow")


def test_a_backend_s_name_is_a_string(registry):
    registry.add("torch")
    with pytest.raises(ValueError, match=r"backend must be the name of one, got \['torch'\]"):
        backends.resolve(registry.op, registry.Problem(), ["torch"])


def test_require_asks_one_backend(registry):
    registry.add("torch", 0)
    registry.add("triton", 10, reason="it is tired")
    problem = registry.Problem()
    backends.require(registry.op, problem, "auto")
    backends.require(registry.op, problem, "torch")
    with pytest.raises(UnsupportedProblemError, match="triton: it is tired"):
        backends.require(registry.op, problem, "triton")
    with pytest.raises(BackendUnavailableError, match="got 'tensorflow'"):
        backends.require(registry.op, problem, "tensorflow")


def test_environment_takes_the_place_of_auto_alone(registry, monkeypatch):
    registry.add("torch", 0)
    registry.add("triton", 10)
    monkeypatch.setenv("ATTN_BACKEND", "torch")
    assert backends.resolve(registry.op, registry.Problem()) == "torch"
    assert backends.resolve(registry.op, registry.Problem(), "triton") == "triton"
    monkeypatch.setenv("ATTN_BACKEND", "")
    assert backends.resolve(registry.op, registry.Problem()) == "triton"
    monkeypatch.setenv("ATTN_BACKEND", "tensorflow")
    with pytest.raises(BackendUnavailableError, match="got 'tensorflow' from ATTN_BACKEND$"):
        backends.resolve(registry.op, registry.Problem())
    with pytest.raises(BackendUnavailableError, match="got 'abacus'$"):
        backends.resolve(registry.op, registry.Problem(), "abacus")


def test_backend_without_backward_is_for_inference(registry):
    registry.add("torch", 0)
    registry.add("forward-only", 10, has_backward=False)
    assert backends.resolve(registry.op, registry.Problem()) == "forward-only"
    assert backends.resolve(registry.op, registry.Problem(needs_grad=True)) == "torch"
    with pytest.raises(UnsupportedProblemError, match="forward-only: it has no backward pass"):
        backends.resolve(registry.op, registry.Problem(needs_grad=True), "forward-only")


def test_those_that_run_a_typical_problem_are_named(registry):
    backends.register_example(registry.op, registry.Problem)
    registry.add("torch", 0)
    registry.add("triton", 10, reason="it is tired")
    registry.add("spare", 5)
    assert backends.runnable(registry.op) == ["spare", "torch"]


def test_explain_gives_one_verdict_a_backend(registry):
    registry.add("torch", 0)
    registry.add("triton", 10, reason="it is tired")
    registry.add("spare", -1)
    verdicts = backends.explain(registry.op, registry.Problem())
    assert [tuple(vars(verdict).values()) for verdict in verdicts] == [
        ("triton", "it is tired", False),
        ("torch", None, True),
        ("spare", None, False),
    ]
    assert not any(v.chosen for v in backends.explain(registry.op, registry.Problem(), "triton"))
    assert not any(v.chosen for v in backends.explain(registry.op, registry.Problem(), "unknown"))


def test_later_backend_of_the_same_name_wins(registry):
    registry.add("torch", reason="it is old")
    with pytest.raises(UnsupportedProblemError, match="torch: it is old"):
        backends.resolve(registry.op, registry.Problem())
    registry.add("torch", function="math:exp")
    assert backends.resolve(registry.op, registry.Problem()) == "torch"
    assert backends.implementation(registry.op, "torch") is math.exp


def test_implementation_is_imported_on_first_use(registry):
    registry.add("torch", function="math:cos")
    registry.add("broken", function="no_such_module:cos")
    assert backends.implementation(registry.op, "torch") is math.cos
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        backends.implementation(registry.op, "broken")
    with pytest.raises(BackendUnavailableError, match=r"one of \['torch', 'broken'\] .* 'x'"):
        backends.implementation(registry.op, "x")


def test_registered_names_the_operators(registry):
    registry.add("torch")
    registry.add("forward-only", has_backward=False)
    assert backends.registered() == {
        "torch": [registry.op, f"{registry.op}_backward"],
        "forward-only": [registry.op],
    }


def test_compiled_code_resolves_when_it_runs(registry, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert backends.resolve(registry.op, registry.Problem()) == "auto"
    monkeypatch.setenv("ATTN_BACKEND", "torch")
    assert backends.resolve(registry.op, registry.Problem()) == "torch"


def test_a_problem_with_sizes_left_open_is_resolved_when_it_runs(registry):
    registry.add("torch")
    chosen = []

    def call(x):
        chosen.append(backends.resolve(registry.op, registry.Problem(size=x.shape[0])))
        return x

    make_fx(call, tracing_mode="symbolic")(torch.empty(5))
    assert chosen == ["auto"]


def test_an_error_of_a_backend_is_its_own(registry):
    def refuse(op, problem):
        raise TypeError("broken")

    backends.register(backends.Backend("torch", {registry.op: "math:sqrt"}, 0, refuse))
    with pytest.raises(TypeError, match="broken"):
        backends.resolve(registry.op, registry.Problem())


class EntryPoint:
    def __init__(self, name, load):
        self.name = name
        self.load = load


@pytest.fixture
def plugins(registry, monkeypatch):
    """Set the entry points that will be found."""
    found = []
    monkeypatch.setattr(backends, "_plugins_loaded", False)
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: found if group == "attn_core.backends" else [],
    )
    return found


def test_plugin_adds_backends(registry, plugins):
    plugin = backends.Backend("plugin", {registry.op: "math:sqrt"}, 3, lambda op, problem: None)
    plugins.append(EntryPoint("mine", lambda: lambda: [plugin]))
    registry.add("torch")
    assert backends.available(registry.op) == ["plugin", "torch"]
    assert backends.resolve(registry.op, registry.Problem()) == "plugin"


def test_threads_wait_for_plugins(registry, plugins):
    plugin = backends.Backend("plugin", {registry.op: "math:sqrt"}, 3, lambda op, problem: None)
    begun, may_end = threading.Event(), threading.Event()

    def load():
        assert backends.available(registry.op) == ["torch"]  # a plug-in may ask
        begun.set()
        may_end.wait(10)
        return lambda: [plugin]

    plugins.append(EntryPoint("slow", load))
    registry.add("torch")
    with futures.ThreadPoolExecutor(2) as threads:
        first = threads.submit(backends.available, registry.op)
        assert begun.wait(10)
        second = threads.submit(backends.available, registry.op)
        assert not futures.wait([second], 0.1).done
        may_end.set()
        assert first.result() == second.result() == ["plugin", "torch"]


@pytest.mark.parametrize("stage", ["import", "call"])
def test_broken_plugin_warns_and_spares_the_others(registry, plugins, stage):
    def fail():
        raise RuntimeError("no driver")

    plugins.append(EntryPoint("broken", fail if stage == "import" else lambda: fail))
    plugins.append(
        EntryPoint(
            "good",
            lambda: (
                lambda: [
                    backends.Backend(
                        "good", {registry.op: "math:sqrt"}, 0, lambda op, problem: None
                    )
                ]
            ),
        )
    )
    with pytest.warns(UserWarning, match="attention backend 'broken' is broken: no driver"):
        assert backends.available(registry.op) == ["good"]
    assert backends.available(registry.op) == ["good"], "warned once"
