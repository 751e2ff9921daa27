"""Memory for results of ragged sequences: tokens of no sequence get zeros from a kernel.

Only the GPU knows where the last sequence ends. Clearing everything would take as long as a tenth
of a short attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attn_core.launch import Launcher
from attn_core.tuning import TileConfig
from attn_flash._triton.problem import Size

_PROGRAMS = 64
_CONFIG = TileConfig(1, 1024, 4, 1)


@triton.jit(do_not_specialize=["stride_s", "B", "tokens", "width"])
def _zero_rest_kernel(
    x_ptr,  # [tokens, width], contiguous
    starts_ptr, stride_s,  # [B + 1]
    B, tokens, width,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zero x from the end of the last sequence on."""
    first = tl.load(starts_ptr + B * stride_s).to(tl.int64) * width
    size = tl.cast(tokens, tl.int64) * width
    offs = tl.arange(0, BLOCK)
    for start in range(first + tl.program_id(0) * BLOCK, size, PROGRAMS * BLOCK):
        tl.store(x_ptr + start + offs, tl.zeros([BLOCK], tl.float32), mask=start + offs < size)


_launch = Launcher(_zero_rest_kernel)


def new_outputs(
    q: torch.Tensor, size: Size, starts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for out and lse; tokens of no sequence are as queries without keys."""
    if starts is None:
        out = q.new_empty((size.B, size.M, size.H, size.D_v))
        return out, q.new_empty((size.B, size.H, size.M), dtype=torch.float32)
    out = q.new_empty((size.rows, size.H, size.D_v))
    _zero_rest(out, starts)
    return out, q.new_full((size.H, size.rows), -torch.inf, dtype=torch.float32)


def new_gradient(
    x: torch.Tensor, starts: torch.Tensor | None, is_partly_used: bool = False
) -> torch.Tensor:
    """Memory for the gradient of x, zero for tokens that are not used."""
    if is_partly_used:
        return x.new_zeros(x.shape)
    grad = x.new_empty(x.shape)
    if starts is not None:
        _zero_rest(grad, starts)
    return grad


def _zero_rest(x: torch.Tensor, starts: torch.Tensor) -> None:
    """Zero x (T, H, D), contiguous, after the last sequence that `starts` (B + 1) delimits."""
    if x.numel() == 0:
        return
    _launch(
        _PROGRAMS,
        strides=(),
        args=(
            x, starts, starts.stride(0), starts.shape[0] - 1, x.shape[0], x.shape[1] * x.shape[2]
        ),
        constexprs={"PROGRAMS": _PROGRAMS, "BLOCK": _CONFIG.block_n},
        config=_CONFIG,
    )  # fmt: skip
