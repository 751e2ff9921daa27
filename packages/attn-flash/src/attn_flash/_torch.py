"""Backend "torch": right on every device torch has.

On the CPU torch's own flash kernel, the one behind F.scaled_dot_product_attention, does the work
wherever its contract fits. Everywhere else the plain formula runs over blocks of queries, so that
memory grows with the number of keys and not with M times N. Ragged sequences go one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_core.dropout import keep_mask
from attn_core.dtypes import accumulator_dtype
from attn_flash.options import Options
from attn_flash.reference import distances, key_rows, sequences, visible

_LOW = -1e38
_BLOCK_BYTES = 1 << 27  # of one block of scores
# Older kernels read past the end of k and v that have fewer heads than q.
_CPU_KERNEL_TAKES_GQA = torch.__version__ >= "2.9"


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (B, M, H, D) over k, v (B, N, H_KV, D): out (B, M, H, D_v), lse (B, H, M)."""
    if not options.is_varlen:
        return _attention(q, k, v, options)
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    lse = torch.full(
        (q.shape[1], q.shape[0]), -torch.inf, dtype=accumulator_dtype(q.dtype), device=q.device
    )
    for b, rows, keys, values, own in sequences(q, k, v, options):
        result = _attention(q[None, rows], keys, values, own, first_batch=b)
        out[rows], lse[:, rows] = result[0][0], result[1][0]
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
    """Gradients of q, k, v, attn_bias and sinks, given those of out and, maybe, lse."""
    if not options.is_varlen:
        return _attention_backward(dout, dlse, q, k, v, out, lse, needs_dbias, options)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    bias, sinks = options.attn_bias if needs_dbias else None, options.sinks
    dbias, dsinks = (None if x is None else x.new_zeros(x.shape) for x in (bias, sinks))
    assert options.cu_seqlens_k is not None
    starts_k = options.cu_seqlens_k.tolist()
    for b, rows, keys, values, own in sequences(q, k, v, options):
        one = slice(rows.start, rows.stop)
        own_dq, own_dk, own_dv, own_dbias, own_dsinks = _attention_backward(
            dout[None, one],
            None if dlse is None else dlse[None, :, one],
            q[None, one],
            keys,
            values,
            out[None, one],
            lse[None, :, one],
            needs_dbias,
            own,
            first_batch=b,
        )
        cols = key_rows(b, starts_k[b], keys.shape[1], k, options)
        dq[one], dk[cols], dv[cols] = own_dq[0], own_dk[0], own_dv[0]
        if dbias is not None:
            assert own_dbias is not None
            row = slice(None) if dbias.shape[0] == 1 else slice(b, b + 1)
            dbias[row, :, : own_dbias.shape[2], : own_dbias.shape[3]] += own_dbias
        if dsinks is not None:
            assert own_dsinks is not None
            dsinks += own_dsinks
    return dq, dk, dv, dbias, dsinks


def signed_probabilities(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, options: Options
) -> torch.Tensor:
    """Probabilities (B, H, M, N) in q's dtype, negative where dropout drops them."""
    if not options.is_varlen:
        return _signed_probabilities(q, k, lse, options)
    assert options.cu_seqlens_q is not None
    lengths = options.lengths(q, k)
    probs = q.new_zeros((options.cu_seqlens_q.shape[0] - 1, q.shape[1], *lengths))
    for b, rows, keys, _, own in sequences(q, k, k, options):
        part = _signed_probabilities(q[None, rows], keys, lse[None, :, rows], own, first_batch=b)
        probs[b, :, : part.shape[2], : part.shape[3]] = part[0]
    return probs


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, first_batch: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    if _fits_cpu_kernel(q, k, v, options):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_for_cpu_kernel(q, k, v), 0.0, options.window[1] == 0, scale=options.scale
        )
        return out.transpose(1, 2).contiguous(), lse.contiguous()
    grouped, keys, values = _grouped(q, k), _keys(k), _keys(v)
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    lse = torch.full(_lse_shape(q), -torch.inf, dtype=keys.dtype, device=q.device)
    for rows in _query_blocks(q, k):
        scores, _ = _scores(grouped, keys, rows, options)
        block_lse = torch.logsumexp(scores, dim=-1)  # [B, H, M]
        if options.sinks is not None:
            block_lse = torch.logaddexp(block_lse, options.sinks.to(block_lse)[:, None])
        probs = _probabilities(scores, block_lse)
        if options.dropout_p != 0.0:
            probs *= _dropout(probs, rows, options, first_batch)
        block = torch.einsum("bhgij,bhjd->bihgd", _by_group(probs, k), values)
        out[:, rows] = block.flatten(2, 3).to(q.dtype)
        lse[..., rows] = block_lse
    return out, lse


def _attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs_dbias: bool,
    options: Options,
    first_batch: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    if dlse is None and _fits_cpu_kernel(q, k, v, options):
        return *_cpu_kernel_backward(dout, q, k, v, out, lse, options), None, None
    grouped, keys, values, douts = _grouped(q, k), _keys(k), _keys(v), _grouped(dout, k)
    dq = q.new_zeros(q.shape)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    bias = options.attn_bias
    dbias = torch.zeros_like(bias, dtype=keys.dtype) if needs_dbias and bias is not None else None
    sinks = options.sinks
    dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=keys.dtype)
    for rows in _query_blocks(q, k):
        scores, slope = _scores(grouped, keys, rows, options)
        probs = _probabilities(scores, lse[..., rows])
        dprobs = torch.einsum("bihgd,bhjd->bhgij", douts[:, rows], values).flatten(1, 2)
        kept = probs
        if options.dropout_p != 0.0:
            factor = _dropout(probs, rows, options, first_batch)
            kept, dprobs = probs * factor, dprobs * factor
        delta = (probs * dprobs).sum(-1)  # dout times out, before out was rounded
        if dlse is not None:
            delta -= dlse[..., rows]
        dscores = probs * (dprobs - delta[..., None])
        if dsinks is not None and sinks is not None:
            share = torch.exp(sinks.to(lse)[:, None] - _finite(lse[..., rows]))
            dsinks -= (share * delta).sum((0, 2))
        if dbias is not None:
            _add_reduced(dbias, dscores, rows)
        dscores = _by_group(dscores * slope, k)
        dq[:, rows] = torch.einsum("bhgij,bhjd->bihgd", dscores, keys).flatten(2, 3).to(q.dtype)
        dk += torch.einsum("bhgij,bihgd->bhjd", dscores, grouped[:, rows])
        dv += torch.einsum("bhgij,bihgd->bhjd", _by_group(kept, k), douts[:, rows])
    dk, dv = (grad.transpose(1, 2).to(k.dtype).contiguous() for grad in (dk, dv))
    return (
        dq,
        dk,
        dv,
        None if dbias is None or bias is None else dbias.to(bias.dtype),
        None if dsinks is None or sinks is None else dsinks.to(sinks.dtype),
    )


def _cpu_kernel_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv by torch's kernel, which adds up in the dtype of its inputs: in float32."""
    inputs = (x.to(accumulator_dtype(x.dtype)) for x in (dout, q, k, v, out))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_for_cpu_kernel(*inputs), lse, 0.0, options.window[1] == 0, scale=options.scale
    )
    dq, dk, dv = (grad.transpose(1, 2).to(q.dtype).contiguous() for grad in grads)
    return dq, dk, dv


def _signed_probabilities(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, options: Options, first_batch: int = 0
) -> torch.Tensor:
    grouped, keys = _grouped(q, k), _keys(k)
    probs = q.new_empty((*_lse_shape(q), k.shape[1]))
    for rows in _query_blocks(q, k):
        scores, _ = _scores(grouped, keys, rows, options)
        block = _probabilities(scores, lse[..., rows])
        if options.dropout_p != 0.0:
            block = torch.where(_kept(block, rows, options, first_batch), block, -block)
        probs[:, :, rows] = block.to(q.dtype)
    return probs


def _fits_cpu_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> bool:
    if q.device.type != "cpu" or q.numel() == 0 or k.numel() == 0:
        return False  # it divides by sizes: empty tensors kill the process
    if k.shape[1] == 1:
        return False  # gradients of q and k are 0 then: it would leave what it rounds
    if options.features() or q.shape[-1] != v.shape[-1]:
        return False
    if options.window == (-1, 0):  # its mask is top-left, and scaled: -inf * 0 is NaN
        has_its_mask = q.shape[1] == k.shape[1] and options.scale > 0
    else:
        has_its_mask = options.window == (-1, -1)
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


def _grouped(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(B, M, H, D) as (B, M, H_KV, G, D), in the accumulator's dtype."""
    grouped: torch.Tensor = x.to(accumulator_dtype(x.dtype)).unflatten(2, (k.shape[2], -1))
    return grouped


def _by_group(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(B, H, M, N) as (B, H_KV, G, M, N)."""
    grouped: torch.Tensor = x.unflatten(1, (k.shape[2], -1))
    return grouped


def _keys(x: torch.Tensor) -> torch.Tensor:
    """(B, N, H_KV, D) as (B, H_KV, N, D), in the accumulator's dtype."""
    return x.to(accumulator_dtype(x.dtype)).transpose(1, 2)


def _lse_shape(q: torch.Tensor) -> tuple[int, int, int]:
    return q.shape[0], q.shape[2], q.shape[1]


def _query_blocks(q: torch.Tensor, k: torch.Tensor) -> Iterator[slice]:
    row_bytes = 8 * q.shape[0] * q.shape[2] * max(k.shape[1], 1)
    step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, q.shape[1], step):
        yield slice(start, min(start + step, q.shape[1]))


def _scores(
    grouped: torch.Tensor, keys: torch.Tensor, rows: slice, options: Options
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Scores of a block of queries (B, H, rows, N) and their derivatives by the products q k."""
    products = torch.einsum("bihgd,bhjd->bhgij", grouped[:, rows], keys).flatten(1, 2)
    scores = products * options.scale
    slope: torch.Tensor | float = options.scale
    if options.softcap != 0.0:
        share = torch.tanh(scores / options.softcap)
        scores, slope = options.softcap * share, (1.0 - share.square()) * options.scale
    len_q, len_k = grouped.shape[1], keys.shape[2]
    if options.alibi_slopes is not None:
        distance = distances(len_q, len_k, keys.device)[rows].abs()
        scores = scores - options.alibi_slopes[..., None, None].to(scores.dtype) * distance
    bias, key_mask = options.attn_bias, options.key_mask
    if bias is not None:
        scores = _masked(scores, bias if bias.shape[2] == 1 else bias[:, :, rows])
    if key_mask is not None:
        scores = _masked(scores, key_mask[:, None, None, :])
    seen = visible(len_q, len_k, options.window, keys.device)
    return (scores if seen is None else _masked(scores, seen[rows])), slope


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.to(scores.dtype)


def _kept(probs: torch.Tensor, rows: slice, options: Options, first_batch: int) -> torch.Tensor:
    assert options.rng_state is not None
    seed, offset = options.rng_state.unbind()
    return keep_mask(
        probs.shape,
        options.dropout_p,
        seed,
        offset,
        probs.device,
        first_batch=first_batch,
        first_query=rows.start,
    )


def _dropout(probs: torch.Tensor, rows: slice, options: Options, first_batch: int) -> torch.Tensor:
    """What dropout multiplies a block of probabilities by."""
    kept = _kept(probs, rows, options, first_batch)
    return kept.to(probs.dtype) / (1.0 - options.dropout_p)


def _add_reduced(dbias: torch.Tensor, dscores: torch.Tensor, rows: slice) -> None:
    """Add the gradient of the scores of some rows to that of a bias that broadcasts to all."""
    part = dbias if dbias.shape[2] == 1 else dbias[:, :, rows]
    part += dscores.sum_to_size(part.shape)


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """exp(scores - lse): 0 where a query sees no key, a mean where all it sees is the lowest."""
    probs = torch.exp(scores - _finite(lse)[..., None])
    # A logarithm of the number of keys is lost beside numbers as large as these.
    is_lowest = (lse < _LOW) & (lse != -torch.inf)
    return probs / torch.where(is_lowest, probs.sum(-1), 1.0)[..., None]


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """A pivot that is a number also where a query sees no key."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
