"""The conformance suite: it passes right backends and catches each kind of wrong one."""

import pytest
import torch

from attn_core import backends
from attn_core.errors import UnsupportedProblemError
from attn_core.testing.conformance import ConformanceCase, Suite, installed_cases

SCALE = "attn_core_tests::scale"


class Problem:
    device = torch.device("cpu")
    needs_grad = False


def scale(x, factor):
    return x * factor


def make_inputs(shape):
    def make(dtype, device):
        generator = torch.Generator().manual_seed(0)
        x, factor = torch.randn(2, *shape, generator=generator).to(dtype).to(device)
        return {"x": x, "factor": factor}

    return make


def case(call, shape=(3, 5), grads=("x", "factor")):
    name = "-".join(map(str, shape))
    return ConformanceCase(SCALE, name, make_inputs(shape), call, scale, grads)


def right(backend, x, factor):
    backends.resolve(SCALE, Problem(), backend)
    return scale(x, factor)


CASES = tuple(case(right, shape) for shape in [(0, 5), (1, 1), (3, 5), (2, 3, 4)])


@pytest.fixture(scope="module", autouse=True)
def scale_backends():
    ops = {SCALE: "unused:unused"}
    known = dict(backends._backends)
    backends.register(backends.Backend("plain", ops, 1, lambda op, problem: None))
    backends.register(backends.Backend("refusing", ops, 0, lambda op, problem: "it never runs"))
    yield
    backends._backends.clear()
    backends._backends.update(known)
    backends._resolve.cache_clear()


class TestRightBackend(Suite):
    cases = CASES
    backends = ("auto", "plain")


def verdict(test, call, backend="plain", grads=("x", "factor")):
    run = getattr(Suite(), test)
    run(case(call, grads=grads), torch.float32, backend, bool(grads), torch.device("cpu"))


def test_refusal_of_a_named_backend_is_a_skip():
    with pytest.raises(pytest.skip.Exception, match="refusing: it never runs"):
        verdict("test_is_within_the_error_budget", right, "refusing")


def test_auto_may_not_refuse():
    def refuse(backend, x, factor):
        raise UnsupportedProblemError("no backend runs this")

    with pytest.raises(UnsupportedProblemError):
        verdict("test_is_within_the_error_budget", refuse, "auto")


def test_wrong_output_is_caught():
    def wrong(backend, x, factor):
        return x * factor * 1.001

    with pytest.raises(AssertionError, match="3-5 output 0: largest error"):
        verdict("test_is_within_the_error_budget", wrong)


def test_wrong_gradient_is_caught():
    def wrong(backend, x, factor):
        return x * factor + 0.01 * (factor - factor.detach())

    with pytest.raises(AssertionError, match="3-5 gradient of factor: largest error"):
        verdict("test_is_within_the_error_budget", wrong)


def test_reading_past_the_end_is_caught():
    def greedy(backend, x, factor):
        beside = torch.as_strided(x, (1,), (1,), x.storage_offset() + x.shape[1])
        return x * factor + 0 * beside

    verdict("test_is_within_the_error_budget", lambda backend, x, factor: x * factor)
    with pytest.raises(AssertionError, match="3-5 output 0: 15 of 15 are NaN"):
        verdict("test_reads_and_writes_only_what_it_may", greedy, grads=())


def test_unwritten_output_is_caught():
    def lazy(backend, x, factor):
        out = torch.empty_like(x)
        out[:-1] = x[:-1] * factor[:-1]
        return out

    with pytest.raises(AssertionError, match="3-5 output 0: 5 of 15 are NaN"):
        verdict("test_reads_and_writes_only_what_it_may", lazy, grads=())


def test_assumed_contiguity_is_caught():
    def flat(backend, x, factor):
        return torch.as_strided(x, x.shape, (x.shape[1], 1)) * factor

    verdict("test_is_within_the_error_budget", flat, grads=())
    with pytest.raises(AssertionError, match="NaN|largest error"):
        verdict("test_reads_and_writes_only_what_it_may", flat, grads=())


def test_nondeterminism_is_caught():
    calls = iter(range(9))

    def drifting(backend, x, factor):
        return x * factor + 1e-7 * next(calls)

    with pytest.raises(AssertionError, match="output 0 differs between two runs of 3-5"):
        verdict("test_is_deterministic", drifting)


def test_reading_the_memory_of_an_earlier_call_is_caught():
    kept = []

    def forgetful(backend, x, factor):
        kept.append(x)
        return kept[0] * factor

    with pytest.raises(AssertionError, match="output 0 differs between two runs of 3-5"):
        verdict("test_is_deterministic", forgetful, grads=())


def test_cases_of_installed_packages_are_found():
    for found in installed_cases():
        assert backends.available(found.op)
