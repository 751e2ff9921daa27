"""The backend's functions: each chooses the kernel and the schedule of a problem."""

from __future__ import annotations

import torch

from attn_flash._hopper import backward, problem, schedules
from attn_flash._hopper.backward_short import attention_backward_short
from attn_flash._hopper.descriptors import addressable
from attn_flash._hopper.forward import forward
from attn_flash._hopper.forward_short import forward_short
from attn_flash._triton import backward as portable
from attn_flash.options import Options

_WIDEST_BACKWARD = 128  # head dimension


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (B, M, H, D) over k, v (B, N, H_KV, D): out like q and lse (B, H, M)."""
    if not options.is_varlen:
        return _attention(q, k, v, options, None)
    sequences = problem.Sequences(
        options.cu_seqlens_q, options.cu_seqlens_k, options.seqused_k, options.max_seqlen_k
    )
    out, lse = _attention(q[None], k[None], v[None], options, sequences)
    return out[0], lse[0]


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    sequences: problem.Sequences | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, M, H, D = q.shape
    N = k.shape[1]
    out = q.new_empty((B, M, H, D))
    lse = q.new_empty((B, H, M), dtype=torch.float32)
    if B * M * H == 0:
        return out, lse
    if N == 0:
        return out.zero_(), lse.fill_(-float("inf"))
    q, k, v = addressable(q), addressable(k), addressable(v)
    scale, window = options.scale, options.window
    if sequences is None and schedules.is_short(q, k, window):
        forward_short(q, k, v, out, lse, scale)
        return out, lse
    len_k = N if sequences is None else sequences.longest_k
    schedule = schedules.schedule(D, len_k, window != (-1, -1), sequences is not None)
    forward(q, k, v, out, lse, scale, window, schedule, sequences)
    return out, lse


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs_dbias: bool,
    options: Options,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v, given those of out (dout) and, maybe, lse (dlse).

    Triton's portable kernels compute those that the ones for Hopper cannot, or not as fast.
    """
    if dlse is None and not options.is_varlen and schedules.is_short_backward(q, k, options.window):
        grads = attention_backward_short(dout, q, k, v, out, lse, options.scale)
    elif _is_portable(q, k, options):
        return portable.attention_backward(dout, dlse, q, k, v, out, lse, needs_dbias, options)
    else:
        grads = backward.attention_backward(
            dout, dlse, q, k, v, out, lse, options.scale, options.window, options.deterministic
        )
    return *grads, None, None


def _is_portable(q: torch.Tensor, k: torch.Tensor, options: Options) -> bool:
    """Whether Triton's portable kernels compute the gradients of q and k.

    Wider heads leave the kernel for Hopper no registers, narrow ones of few tokens leave it little
    to overlap, and it hides scores before it scales them.
    """
    if options.is_varlen or options.scale <= 0.0:
        return True
    return q.shape[3] > _WIDEST_BACKWARD or schedules.is_portable_backward(q, k)
