"""Problems, their right answers, and how kernels compile: what the tests of this folder share."""

from __future__ import annotations

import linecache
import math
import sys
from itertools import accumulate
from typing import NamedTuple

import torch

from attn_core.testing import assert_within_budget, random_tensor
from attn_core.testing.compilation import compile_ahead
from attn_flash import reference
from attn_flash.options import Options

OPEN = (-1, -1)
CAUSAL = (-1, 0)
HALF = torch.float16
REPEATS = 250  # of what has the same bits every time, on a GPU


def _window_name(window):
    left, right = window
    return {OPEN: "full", CAUSAL: "causal"}.get(window, f"window{left}_{right}")


def _dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


class Case(NamedTuple):
    """A batch of sequences of one length."""

    B: int
    H: int
    H_KV: int
    M: int
    N: int
    D: int
    window: tuple[int, int] = OPEN
    dtype: torch.dtype = torch.bfloat16
    factor: float = 1.0  # of the scale

    def __str__(self):
        sizes = "b{}-h{}-kv{}-m{}-n{}-d{}".format(*self[:6])
        factor = "" if self.factor == 1.0 else f"-scale{self.factor:g}"
        return f"{sizes}-{_window_name(self.window)}-{_dtype_name(self.dtype)}{factor}"

    @property
    def scale(self):
        return self.factor * self.D**-0.5

    def tensors(self, device="cpu", *, scale=1.0):
        """q, k and v, in units of `scale`."""
        queries, keys = (self.B, self.M, self.H, self.D), (self.B, self.N, self.H_KV, self.D)
        return [
            random_tensor(
                shape, seed=f"{self}-{name}", dtype=self.dtype, device=device, scale=scale
            )
            for name, shape in {"q": queries, "k": keys, "v": keys}.items()
        ]

    def options(self):
        left, right = self.window
        return Options(scale=self.scale, window_left=left, window_right=right)

    def gradients(self, device="cpu", *, scale=1.0):
        """The gradients of out, in units of `scale`, and of lse."""
        shape = self.B, self.M, self.H, self.D
        dout = random_tensor(
            shape, seed=f"{self}-dout", dtype=self.dtype, device=device, scale=scale
        )
        return dout, random_tensor((self.B, self.H, self.M), seed=f"{self}-dlse", device=device)


def short_case(B, H, M, D=64, dtype=torch.bfloat16, factor=1.0):
    """As many queries as keys and heads of both, without a window."""
    return Case(B, H, H, M, M, D, OPEN, dtype, factor)


class Ragged(NamedTuple):
    """Sequences of any lengths, one after the other."""

    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...]
    used_k: tuple[int, ...] | None = None
    H: int = 2
    H_KV: int = 1
    D: int = 64
    window: tuple[int, int] = OPEN
    dtype: torch.dtype = torch.bfloat16

    def __str__(self):
        parts = "m" + _lengths_name(self.lens_q), "n" + _lengths_name(self.lens_k)
        used = () if self.used_k is None else ("used" + _lengths_name(self.used_k),)
        sizes = f"h{self.H}", f"kv{self.H_KV}", f"d{self.D}"
        return "-".join((*parts, *used, *sizes, _window_name(self.window), _dtype_name(self.dtype)))

    def tensors(self, device="cpu"):
        """q, k and v; what belongs to no sequence is NaN."""
        return [self._tensor(name, device) for name in "qkv"]

    def _tensor(self, name, device):
        lengths, heads = (self.lens_q, self.H) if name == "q" else (self.lens_k, self.H_KV)
        shape = (sum(lengths) + 70, heads, self.D)
        x = random_tensor(shape, seed=f"{self}-{name}", dtype=self.dtype, device=device)
        starts = list(accumulate(lengths, initial=0))
        x[starts[-1] :] = math.nan
        if name != "q" and self.used_k is not None:
            for b, used in enumerate(self.used_k):
                x[starts[b] + used : starts[b + 1]] = math.nan
        return x

    def options(self, device="cpu"):
        def integers(values):
            return torch.tensor(list(values), dtype=torch.int32, device=device)

        return Options(
            cu_seqlens_q=integers(accumulate(self.lens_q, initial=0)),
            cu_seqlens_k=integers(accumulate(self.lens_k, initial=0)),
            seqused_k=None if self.used_k is None else integers(self.used_k),
            max_seqlen_q=max(self.lens_q, default=0),
            max_seqlen_k=max(self.lens_k, default=0),
            scale=self.D**-0.5,
            window_left=self.window[0],
            window_right=self.window[1],
        )


def _lengths_name(lengths):
    if len(lengths) > 4:
        return f"{len(lengths)}x{max(lengths)}"
    return "_".join(map(str, lengths))


# --- right answers ------------------------------------------------------------------------------


def exact(case, tensors, dout, dlse=None, dtype=torch.float64):
    """Gradients, out and lse of the reference, computed in another dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out, lse = reference.attention(*leaves, case.scale, case.window)
    outputs, cotangents = [out], [dout.to(dtype)]
    if dlse is not None:
        outputs, cotangents = [out, lse], [*cotangents, dlse.to(lse.dtype)]
    return torch.autograd.grad(outputs, leaves, cotangents), out.detach(), lse.detach()


def assert_outputs(actual, same, expected):
    """Compare out and lse with those of the reference in the same dtype and in float64."""
    for name, value, alike, right in zip(("out", "lse"), actual, same, expected, strict=True):
        assert_within_budget(value, alike, right, name=name)


def assert_gradients(actual, same, expected):
    """Compare dq, dk and dv with those of the reference in the same dtype and in float64."""
    for name, value, alike, right in zip(("dq", "dk", "dv"), actual, same, expected, strict=True):
        assert value.dtype == alike.dtype
        if right.numel():
            assert_within_budget(value, alike, right, name=name)


def assert_same_bits(actual, expected):
    for name, value, right in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        assert torch.equal(value, right), name


# --- compilation --------------------------------------------------------------------------------

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
}


class Compiler:
    """Takes the place of a launcher and compiles what it would start."""

    def __init__(self, launcher):
        self._kernel = launcher._kernel
        self.compiled = []

    def __call__(self, _num_programs, args, constants, maxnreg):
        signature = dict(zip(self._kernel.arg_names, map(_type_of, args), strict=False))
        options = {"num_warps": 4, "maxnreg": maxnreg}
        self.compiled.append(compile_ahead(self._kernel, signature, constants, "sm_90", **options))


def _type_of(value):
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}:16"
    if isinstance(value, tuple):
        tile = value.describe()
        return f"tensordesc<{TYPES[value.tensor.dtype]}{tile.block_shape},{tile.layout!r}>"
    return "fp32" if isinstance(value, float) else "i32"


def compiler(monkeypatch, module, launcher="_launch"):
    """Make a module compile what it would start."""
    compiler = Compiler(getattr(module, launcher))
    monkeypatch.setattr(module, launcher, compiler)
    return compiler


# --- mistakes that the emulator should notice ---------------------------------------------------


def forget(monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda *args, **options: None)


def forget_wait(monkeypatch, mbarrier, function, barrier):
    """Leave out the waits for a barrier in `shared` that one function of a kernel has."""
    wait = mbarrier.wait

    def wait_elsewhere(*args, **options):
        caller = sys._getframe(1)
        line = linecache.getline(caller.f_code.co_filename, caller.f_lineno)
        if caller.f_code.co_name != function or f"shared.{barrier}" not in line:
            wait(*args, **options)

    monkeypatch.setattr(mbarrier, "wait", wait_elsewhere)


def check_often(check, *args):
    """A race that is open is lost one time in ten, or more often."""
    for _ in range(200):
        check(*args)
