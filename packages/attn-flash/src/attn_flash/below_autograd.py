"""The passes of attention one by one, with the names that flash-attn's own autograd rule calls.

Context-parallel libraries split attention between devices and call these themselves. They are no
part of the public contract: `attn_flash.compat` offers them where flash-attn has them.
"""

from __future__ import annotations

import torch

from attn_core import backends
from attn_core.errors import UnsupportedProblemError
from attn_flash import checks, ops
from attn_flash.options import Options


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, opts: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the output, lse and the state of dropout."""
    with torch.no_grad():
        problem = checks.attention_problem(q, k, v, opts)
        backend = backends.resolve(ops.ATTENTION, problem)
        out, lse = ops.attention.below_autograd(q, k, v, *opts, backend)
    state = opts.rng_state
    return out, lse, q.new_zeros(2, dtype=torch.int64) if state is None else state


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    opts: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v."""
    with torch.no_grad():
        checks.attention_problem(q, k, v, opts)
        problem = checks.describe(q, k, v, opts, needs_grad=True)
        backend = backends.resolve(ops.ATTENTION, problem)
        tensors = (dout, None, q, k, v, out, lse)
        dq, dk, dv, *_ = ops.attention_backward.below_autograd(*tensors, False, *opts, backend)
    return dq, dk, dv


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend with dense q (B, M, H, D): out, lse, no probabilities, and the state of dropout."""
    window = (window_size_left, window_size_right)
    settings = (dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    opts = checks.options_of(q, *settings)
    return _forward(q, k, v, opts, return_softmax)


def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend with ragged q (T_q, H, D); outputs are written in full, so zero_tensors is moot."""
    if leftpad_k is not None:
        raise UnsupportedProblemError("leftpad_k must be None for ragged sequences, got a tensor")
    window = (window_size_left, window_size_right)
    settings = (dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    opts = checks.options_of(
        q,
        *settings,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k,
        block_table=block_table,
    )
    return _forward(q, k, v, opts, return_softmax)


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the gradients to dq, dk and dv, and return rowsum(dout * out) (B, H, M)."""
    window = (window_size_left, window_size_right)
    settings = (dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, deterministic)
    opts = checks.options_of(q, *settings, rng_state=rng_state if dropout_p else None)
    return _backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), opts)


def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> torch.Tensor:
    """Write the gradients to dq, dk and dv, and return rowsum(dout * out) (H, T_q)."""
    window = (window_size_left, window_size_right)
    settings = (dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, deterministic)
    opts = checks.options_of(
        q,
        *settings,
        rng_state=rng_state if dropout_p else None,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return _backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), opts)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, opts: Options, return_softmax: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if return_softmax and opts.dropout_p > 0:
        raise UnsupportedProblemError(
            "return_softmax must be False with dropout: flash_attn_func returns probabilities"
        )
    out, lse, rng_state = forward(q, k, v, opts)
    return out, lse, q.new_empty(0), rng_state


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    targets: tuple[torch.Tensor | None, ...],
    opts: Options,
) -> torch.Tensor:
    for target, gradient in zip(targets, backward(dout, q, k, v, out, lse, opts), strict=True):
        if target is not None:
            target.copy_(gradient)
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2).contiguous()
