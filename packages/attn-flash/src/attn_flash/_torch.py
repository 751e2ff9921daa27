"""Backend "torch": right on every device torch has.

On the CPU torch's own flash kernel, the one behind F.scaled_dot_product_attention, does the work
wherever its contract fits. Everywhere else the plain formula runs over blocks of queries, so that
memory grows with the number of keys and not with M times N.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_flash.reference import visible

_BLOCK_BYTES = 1 << 27  # of one block of scores
# Older kernels read past the end of k and v that have fewer heads than q.
_CPU_KERNEL_TAKES_GQA = torch.__version__ >= "2.9"


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (B, M, H, D) over k, v (B, N, H_KV, D): out like q and lse (B, H, M)."""
    if _fits_cpu_kernel(q, k, scale, window):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_for_cpu_kernel(q, k, v), 0.0, window[1] == 0, scale=scale
        )
        return out.transpose(1, 2).contiguous(), lse.contiguous()
    grouped, keys, values = _grouped(q, k), _keys(k), _keys(v)
    out = q.new_zeros(q.shape)
    lse = torch.full(_lse_shape(q), -torch.inf, dtype=keys.dtype, device=q.device)
    for rows in _query_blocks(q, k):
        scores = _scores(grouped, keys, rows, scale, window)
        block_lse = torch.logsumexp(scores, dim=-1)  # [B, H_KV, G, M]
        probs = torch.exp(scores - _finite(block_lse)[..., None])
        out[:, rows] = torch.einsum("bhgij,bhjd->bihgd", probs, values).flatten(2, 3).to(q.dtype)
        lse[..., rows] = block_lse.flatten(1, 2)
    return out, lse


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients dq, dk, dv of `attention`, given those of out (dout) and, maybe, of lse (dlse)."""
    if dlse is None and _fits_cpu_kernel(q, k, scale, window):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_for_cpu_kernel(dout, q, k, v, out), lse, 0.0, window[1] == 0, scale=scale
        )
        dq, dk, dv = (grad.transpose(1, 2).contiguous() for grad in grads)
        return dq, dk, dv
    grouped, keys, values, douts = _grouped(q, k), _keys(k), _keys(v), _grouped(dout, k)
    lse = lse.unflatten(1, (k.shape[2], -1))  # [B, H_KV, G, M]
    delta = (douts * _grouped(out, k)).sum(-1).permute(0, 2, 3, 1)
    if dlse is not None:
        delta = delta - dlse.unflatten(1, (k.shape[2], -1))
    dq = q.new_zeros(q.shape)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    for rows in _query_blocks(q, k):
        scores = _scores(grouped, keys, rows, scale, window)
        probs = torch.exp(scores - _finite(lse[..., rows])[..., None])
        dprobs = torch.einsum("bihgd,bhjd->bhgij", douts[:, rows], values)
        dscores = probs * (dprobs - delta[..., rows, None]) * scale
        dq[:, rows] = torch.einsum("bhgij,bhjd->bihgd", dscores, keys).flatten(2, 3).to(q.dtype)
        dk += torch.einsum("bhgij,bihgd->bhjd", dscores, grouped[:, rows])
        dv += torch.einsum("bhgij,bihgd->bhjd", probs, douts[:, rows])
    dk, dv = (grad.transpose(1, 2).to(k.dtype).contiguous() for grad in (dk, dv))
    return dq, dk, dv


def _fits_cpu_kernel(
    q: torch.Tensor, k: torch.Tensor, scale: float, window: tuple[int, int]
) -> bool:
    if q.device.type != "cpu" or q.numel() == 0 or k.numel() == 0:
        return False  # it divides by sizes: empty tensors kill the process
    if window == (-1, 0):  # its mask is top-left, and scaled: -inf * 0 is NaN
        has_its_mask = q.shape[1] == k.shape[1] and scale > 0
    else:
        has_its_mask = window == (-1, -1)
    return has_its_mask and (_CPU_KERNEL_TAKES_GQA or q.shape[2] == k.shape[2])


def _for_cpu_kernel(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, S, H, D) as (B, H, S, D), copied where the kernel's matrix products would misread it."""
    return tuple(
        (tensor if _is_blas_matrix(tensor) else tensor.contiguous()).transpose(1, 2)
        for tensor in tensors
    )


def _is_blas_matrix(x: torch.Tensor) -> bool:
    # Rows of adjacent elements that do not overlap; the kernel takes anything for one unchecked.
    return x.stride(3) == 1 and x.stride(1) >= x.shape[3]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grouped(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(B, M, H, D) as (B, M, H_KV, G, D), in the accumulator's dtype."""
    grouped: torch.Tensor = x.to(_accumulator(x.dtype)).unflatten(2, (k.shape[2], -1))
    return grouped


def _keys(x: torch.Tensor) -> torch.Tensor:
    """(B, N, H_KV, D) as (B, H_KV, N, D), in the accumulator's dtype."""
    return x.to(_accumulator(x.dtype)).transpose(1, 2)


def _lse_shape(q: torch.Tensor) -> tuple[int, int, int]:
    return q.shape[0], q.shape[2], q.shape[1]


def _query_blocks(q: torch.Tensor, k: torch.Tensor) -> Iterator[slice]:
    row_bytes = 8 * q.shape[0] * q.shape[2] * max(k.shape[1], 1)
    step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, q.shape[1], step):
        yield slice(start, min(start + step, q.shape[1]))


def _scores(
    grouped: torch.Tensor, keys: torch.Tensor, rows: slice, scale: float, window: tuple[int, int]
) -> torch.Tensor:
    """Scaled scores of a block of queries, -inf outside the window: (B, H_KV, G, rows, N)."""
    scores = torch.einsum("bihgd,bhjd->bhgij", grouped[:, rows], keys) * scale
    mask = visible(grouped.shape[1], keys.shape[2], window, keys.device)
    return scores if mask is None else scores.masked_fill(~mask[rows], -torch.inf)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """A pivot that is a number also where a query sees no key."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
