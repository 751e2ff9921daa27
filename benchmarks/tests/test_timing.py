from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing

READ_MS = 0.065
CYCLES_PER_MS = 2_000_000


class Device:
    """A GPU and the host that launches on it, as two clocks in milliseconds."""

    def __init__(self):
        self.host = self.free = 0.0
        self.spins = []

    def launch(self, device_ms, host_ms=0.005):
        self.host += host_ms
        self.free = max(self.free, self.host) + device_ms

    def spin(self, cycles):
        self.spins.append(cycles / CYCLES_PER_MS)
        self.launch(self.spins[-1])

    def wait(self, *_):
        self.host = max(self.host, self.free)

    def event(self, **_):
        device = self

        class Event:
            def record(self):
                device.launch(0.0)
                self.time = device.free

            def query(self):
                return self.time <= device.host

            def elapsed_time(self, other):
                return other.time - self.time

        return Event()


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(timing, "_READ_BYTES", 4)
    monkeypatch.setattr(torch, "sum", lambda *_, **__: device.launch(READ_MS))
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "_sleep", device.spin)
    monkeypatch.setattr(torch.cuda, "synchronize", device.wait)
    fake_time = SimpleNamespace(perf_counter=lambda: device.host * 1e-3, monotonic=time.monotonic)
    monkeypatch.setattr(timing, "time", fake_time)
    return device


def call_of(device, kernels_ms, host_ms):
    def call():
        for kernel_ms in kernels_ms:
            device.launch(kernel_ms, host_ms / len(kernels_ms))

    return call


@pytest.mark.parametrize("host_ms", [0.02, 0.2, 0.9])
@pytest.mark.parametrize("kernels_ms", [(0.01,), (0.01, 0.02, 0.03), (0.3, 0.1)], ids=str)
def test_kernels_take_the_same_time_whatever_the_host_needs(device, kernels_ms, host_ms):
    clock = timing.CudaClock(torch.device("cpu"))
    samples = clock.samples(call_of(device, kernels_ms, host_ms), 7)
    assert samples == pytest.approx([sum(kernels_ms)] * 7)


def test_an_eager_call_waits_for_the_host(device):
    clock = timing.EagerClock(timing.CudaClock(torch.device("cpu")))
    [first, *_] = clock.samples(call_of(device, (0.01,), 0.2), 3)
    assert 0.01 < first < 0.2 + 2 * 0.01
    assert device.spins == []


def test_a_host_that_becomes_slow_is_waited_for(device):
    hosts_ms = iter([0.02, 0.5, 0.02, 0.9, 0.9, 3.0, 0.02] + [0.02] * 20)

    def call():
        device.launch(0.01, next(hosts_ms))

    samples = timing.CudaClock(torch.device("cpu")).samples(call, 6)
    assert samples == pytest.approx([0.01] * 6)


def test_a_device_that_is_busy_with_earlier_repeats_does_not_spin(device):
    samples = timing.CudaClock(torch.device("cpu")).samples(call_of(device, (5.0,), 0.05), 6)
    assert samples == pytest.approx([5.0] * 6)
    assert device.spins == []


def test_a_call_that_waits_for_the_device_ends(device):
    def call():
        device.launch(0.01)
        device.wait()
        device.launch(0.01, host_ms=0.1)

    samples = timing.CudaClock(torch.device("cpu")).samples(call, 5)
    assert len(samples) == 5
    assert min(samples) > 0.1
    assert max(device.spins) == pytest.approx(timing._LONGEST_SPIN_MS)
