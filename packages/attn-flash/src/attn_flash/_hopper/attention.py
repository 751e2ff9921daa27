"""The backend's functions: each chooses the kernel and the schedule of a problem."""

from __future__ import annotations

import torch

from attn_flash import one_key
from attn_flash._hopper import backward, problem, schedules
from attn_flash._hopper.backward_short import attention_backward_short
from attn_flash._hopper.backward_wide import attention_backward_wide
from attn_flash._hopper.descriptors import addressable
from attn_flash._hopper.forward import forward
from attn_flash._hopper.forward_short import forward_short
from attn_flash._triton import backward as portable
from attn_flash.options import Options

_WIDEST_IN_ONE_KERNEL = 128  # head dimension


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (B, M, H, D) over k, v (B, N, H_KV, D): out like q and lse (B, H, M)."""
    if not options.is_varlen:
        return _attention(q, k, v, options, None)
    out, lse = _attention(q[None], k[None], v[None], options, _sequences(options))
    return out[0], lse[0]


def _sequences(options: Options) -> problem.Sequences:
    return problem.Sequences(
        options.cu_seqlens_q, options.cu_seqlens_k, options.seqused_k, options.max_seqlen_k
    )


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
    schedule = schedules.schedule(D, len_k, window, sequences is not None)
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
    scale, window = options.scale, options.window
    if one_key.is_one_key(k, options):
        return *one_key.gradients(dout, dlse, q, k, v, lse, scale), None, None
    if dlse is None and not options.is_varlen and schedules.is_short_backward(q, k, window):
        return *attention_backward_short(dout, q, k, v, out, lse, scale), None, None
    if _is_portable(q, k, options):
        return portable.attention_backward(dout, dlse, q, k, v, out, lse, needs_dbias, options)
    tensors = dout, dlse, q, k, v, out, lse
    if q.shape[-1] > _WIDEST_IN_ONE_KERNEL:
        return *attention_backward_wide(*tensors, scale, window), None, None
    if not options.is_varlen:
        grads = backward.attention_backward(*tensors, scale, window, options.deterministic)
        return *grads, None, None
    batches = (None if x is None else x[None] for x in tensors)
    grads = backward.attention_backward(
        *batches, scale, window, options.deterministic, _sequences(options)
    )
    return *(grad[0] for grad in grads), None, None


def _is_portable(q: torch.Tensor, k: torch.Tensor, options: Options) -> bool:
    """Whether Triton's portable kernels compute the gradients of q and k.

    Those for Hopper hide scores before they scale them, so the scale must be positive. Narrow heads
    of few tokens leave them little to overlap.
    """
    if options.scale <= 0.0 or options.seqused_k is not None:
        return True
    if q.shape[-1] > _WIDEST_IN_ONE_KERNEL:
        return options.is_varlen
    if options.is_varlen:
        longest = max(options.max_seqlen_q, options.max_seqlen_k)
    else:
        longest = max(q.shape[1], k.shape[1])
    return schedules.is_portable_backward(q.shape[-1], longest)
