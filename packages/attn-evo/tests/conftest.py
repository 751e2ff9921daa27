from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from attn_core.testing import assert_within_budget, random_tensor
from attn_evo import EvoWeights, reference

NAMES = ("out", "sums_after", "dv", "dsums", *(f"d{name}" for name in EvoWeights._fields))
# In float32 both errors are a few roundings, which the poles magnify: the ratio of the largest ones
# is luck, so norms are compared.
FLOAT32_ERROR = 2e-5
FLOAT32_FACTOR = 8.0


class Case(NamedTuple):
    """One problem of attention: its inputs, and its results in plain PyTorch."""

    B: int
    H: int
    L: int
    D: int
    causal: bool = True
    has_mask: bool = False
    has_state: bool = False

    def __str__(self):
        flags = [name for name in ("mask", "state") if getattr(self, f"has_{name}")]
        sizes = f"b{self.B}-h{self.H}-l{self.L}-d{self.D}"
        return "-".join([sizes, "causal" if self.causal else "full", *flags])

    def draw(self, name, shape, scale=1.0, dtype=torch.float32, device="cpu"):
        return random_tensor(shape, seed=f"{self}-{name}", dtype=dtype, device=device, scale=scale)

    def inputs(self, dtype, device="cpu"):
        """v, weights, mask, sums, length, dout, dsums_after."""
        shape, sums_shape = (self.B, self.H, self.L, self.D), (2, self.B, self.H, self.D)
        scales = {
            name: self.D**-0.5 if name.startswith("w_") else 0.5 for name in EvoWeights._fields
        }
        weights = EvoWeights(
            *(
                self.draw(name, (self.D, self.D)[: 1 + name.startswith("w_")], scale, dtype, device)
                for name, scale in scales.items()
            )
        )
        mask = self.draw("mask", shape[::2], device=device) > -1 if self.has_mask else None
        sums = self.draw("sums", sums_shape, device=device) if self.has_state else None
        length = torch.tensor(300, device=device) if self.has_state else None
        dsums = self.draw("dsums", sums_shape, device=device) if self.has_state else None
        v = self.draw("v", shape, 1.0, dtype, device)
        return v, weights, mask, sums, length, self.draw("dout", shape, 1.0, dtype, device), dsums

    def plain(self, inputs, dtype):
        """Results of the reference by name, everything in `dtype`."""
        v, weights, mask, sums, length, dout, dsums_after = inputs
        before = v.new_zeros((2, self.B, self.H, self.D)) if sums is None else sums
        leaves = [x.detach().to(dtype).requires_grad_() for x in (v, before, *weights)]
        v, before, *weights = leaves
        outputs = reference.attention(v, EvoWeights(*weights), self.causal, mask, before, length)
        douts = [dout, torch.zeros_like(outputs[1]) if dsums_after is None else dsums_after]
        grads = torch.autograd.grad(outputs, leaves, [x.to(dtype) for x in douts])
        return dict(zip(NAMES, (*outputs, *grads), strict=True))


def _assert_results(case, actual, inputs):
    """Hold outputs and gradients to the error budget."""
    dtype = inputs[0].dtype
    same_dtype, exact = case.plain(inputs, dtype), case.plain(inputs, torch.float64)
    for name, value in actual.items():
        if dtype != torch.float32:
            factor = 4.0 if name.startswith("d") else 2.0  # near a pole the largest error is luck
            assert_within_budget(value, same_dtype[name], exact[name], name=name, factor=factor)
            continue
        error, torch_error = (value - exact[name]).norm(), (same_dtype[name] - exact[name]).norm()
        allowed = FLOAT32_ERROR * exact[name].norm() + FLOAT32_FACTOR * torch_error
        assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"


@pytest.fixture(autouse=True)
def no_backend_from_outside(monkeypatch):
    for name in ("ATTN_BACKEND", "ATTN_TUNE", "EVO_BACKEND", "EVO_AUTOTUNE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make_weights():
    """Random weights of the size a trained layer has; `name` seeds them."""

    def make(name, dim, dtype=torch.float32, device="cpu"):
        shapes = [(dim, dim), (dim,)] * 4 + [(dim,)] * 2
        scales = [dim**-0.5, 0.5] * 4 + [1.0, 0.5]
        return EvoWeights(
            *(
                random_tensor(shape, seed=f"{name}-{field}", dtype=dtype, device=device, scale=s)
                for field, shape, s in zip(EvoWeights._fields, shapes, scales, strict=True)
            )
        )

    return make


def _packed(x):
    B, H, L, D = x.shape
    whole = x.new_full((B, L, H, 3, D), torch.nan)
    whole[:, :, :, 1] = x.transpose(1, 2)
    return whole[:, :, :, 1].transpose(1, 2)


@pytest.fixture
def packed():
    """A function that puts a tensor between NaN, as one projection for all heads has its parts."""
    return _packed


@pytest.fixture
def make_case():
    """The class of problems, which tests cannot import from here."""
    return Case


@pytest.fixture
def assert_results():
    """A function that holds results by name to the error budget of a case and its inputs."""
    return _assert_results
