"""The meaning of the operators, in plain PyTorch.

    out_i = sum_j z_ij p_ij v_j,    p_ij = exp(s_ij - lse_i),    lse_i = log sum_j exp(s_ij)

over the keys j that query i sees, with the scores s of `options.Options`. A sink is one more term
of the sum in lse, and none of that in out. Dropout multiplies by z: 1 / (1 - dropout_p) where
`attn_core.dropout` keeps the weight, 0 elsewhere. A query without keys has out 0 and, without a
sink, lse -inf.

Vaswani et al., "Attention Is All You Need", 2017. Windows: Dao, "FlashAttention-2", 2023. Slopes:
Press et al., "Train Short, Test Long", 2022. Softcap: Gemma Team, "Gemma 2", 2024. Sinks: Xiao et
al., "Efficient Streaming Language Models with Attention Sinks", 2024, learned as in gpt-oss.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_core.dropout import keep_mask
from attn_flash.options import Options


def visible(
    len_q: int, len_k: int, window: tuple[int, int], device: torch.device
) -> torch.Tensor | None:
    """Which key each query sees: (M, N) bool, aligned at the bottom right; None for all."""
    left, right = window
    if left < 0 and right < 0:
        return None
    distance = distances(len_q, len_k, device)
    mask = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        mask &= distance <= left
    if right >= 0:
        mask &= distance >= -right
    return mask


def distances(len_q: int, len_k: int, device: torch.device) -> torch.Tensor:
    """How far each key lies before each query: (M, N) int64, aligned at the bottom right."""
    i = torch.arange(len_q, device=device)[:, None] + (len_k - len_q)
    return i - torch.arange(len_k, device=device)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: tuple[int, int],
    *,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
    first_batch: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (B, M, H, D) over k, v (B, N, H_KV, D): out (B, M, H, D_v), lse (B, H, M)."""
    group = q.shape[2] // max(k.shape[2], 1)
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap != 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = distances(q.shape[1], k.shape[1], q.device).abs()
        scores = scores - alibi_slopes[..., None, None].to(scores.dtype) * distance
    masks = [attn_bias, None if key_mask is None else key_mask[:, None, None, :]]
    masks.append(visible(q.shape[1], k.shape[1], window, q.device))
    for mask in masks:
        if mask is not None:
            is_bool = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, -torch.inf) if is_bool else scores + mask
    scores = scores.to(q.dtype)
    # Where a whole row is -inf, autograd would multiply zeros by NaN.
    scores = scores.masked_fill(scores == -torch.inf, -torch.inf)
    terms = scores
    if sinks is not None:
        column = sinks.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        terms = torch.cat([scores, column], dim=-1)
    lse = torch.logsumexp(terms, dim=-1)
    pivot = lse.masked_fill(lse == -torch.inf, 0.0)
    probs = torch.exp(scores - pivot[..., None])
    if dropout_p != 0.0:
        assert rng_state is not None
        seed, offset = rng_state.unbind()
        keep = keep_mask(scores.shape, dropout_p, seed, offset, q.device, first_batch=first_batch)
        probs = probs * keep / (1.0 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", probs, v), lse


def attention_with(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as `options` describe it, ragged or not."""
    if not options.is_varlen:
        return _dense(q, k, v, options)
    outs, lses, end = [], [], 0
    for b, rows, keys, values, own in sequences(q, k, v, options):
        out, lse = _dense(q[None, rows], keys, values, own, first_batch=b)
        outs.append(out[0])
        lses.append(lse[0])
        end = rows.stop
    rest = q.shape[0] - end  # tokens of no sequence
    outs.append(q.new_zeros((rest, q.shape[1], v.shape[-1])))
    lses.append(q.new_full((q.shape[1], rest), -torch.inf))
    return torch.cat(outs), torch.cat(lses, dim=1)


def sequences(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor, Options]]:
    """Each ragged sequence: its number, rows in q, keys and values (1, N, H_KV, D), options."""
    assert options.cu_seqlens_q is not None
    assert options.cu_seqlens_k is not None
    starts_q, starts_k = options.cu_seqlens_q.tolist(), options.cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        rows, len_k = slice(*starts_q[b : b + 2]), starts_k[b + 1] - starts_k[b]
        if options.seqused_k is not None:
            len_k = int(options.seqused_k[b])
        keys = key_rows(b, starts_k[b], len_k, k, options)
        own = _of_sequence(options, b, rows.stop - rows.start, len_k)
        yield b, rows, k.flatten(0, -3)[keys][None], v.flatten(0, -3)[keys][None], own


def key_rows(
    b: int, start: int, length: int, k: torch.Tensor, options: Options
) -> slice | torch.Tensor:
    """Where the keys of a ragged sequence are, counted over all slots of all pages."""
    if options.block_table is None:
        return slice(start, start + length)
    page_size = k.shape[1]
    j = torch.arange(length, device=k.device)
    return options.block_table[b, j // page_size].long() * page_size + j % page_size


def _of_sequence(options: Options, b: int, len_q: int, len_k: int) -> Options:
    """What remains of the options within one ragged sequence, a batch of its own."""
    slopes, bias, mask = options.alibi_slopes, options.attn_bias, options.key_mask
    if slopes is not None and slopes.dim() == 2:
        slopes = slopes[b : b + 1]
    if bias is not None:
        bias = bias if bias.shape[0] == 1 else bias[b : b + 1]
        bias = bias[:, :, :len_q, :len_k]
    return options._replace(
        alibi_slopes=slopes,
        attn_bias=bias,
        key_mask=None if mask is None else mask[b : b + 1, :len_k],
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_k=None,
        block_table=None,
    )


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, first_batch: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    return attention(
        q,
        k,
        v,
        options.scale,
        options.window,
        softcap=options.softcap,
        alibi_slopes=options.alibi_slopes,
        attn_bias=options.attn_bias,
        key_mask=options.key_mask,
        sinks=options.sinks,
        dropout_p=options.dropout_p,
        rng_state=options.rng_state,
        first_batch=first_batch,
    )
