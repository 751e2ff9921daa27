"""The public functions: each validates its arguments, resolves a backend and calls the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_core import arguments, backends
from attn_core.checks import flag, require_rank
from attn_core.replay import repeatable
from attn_paged import checks, ops
from attn_paged.options import AppendOptions, AttentionOptions

OPEN_WINDOW = (-1, -1)


@repeatable
def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool | torch.Tensor = True,
    window_size: Sequence[int] = OPEN_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    batch_invariant: bool = False,
    shared_prefix: bool = False,
    return_lse: bool = False,
    backend: str = backends.AUTO,
) -> Any:
    """Softmax attention over a paged cache: decode, prefill, chunked prefill and mixed batches.

    The i-th of the M queries of a sequence with N keys has position ``p = i + N - M``: queries are
    the last tokens of their sequence, and their keys are in the cache already. Only slots that a
    query of the sequence may see are read, so what unused slots and stale table entries hold does
    not matter. Values of tensors on a GPU are not read on the host, unless the environment variable
    ATTN_CHECK_VALUES is 1; those on the CPU are checked.

    Parameters
    ----------
    q : Tensor, shape (T, H, D)
        Queries of all sequences, one sequence after the other, float16, bfloat16, float32 or
        float64; D from 1 to 576. Without `cu_seqlens_q` one query a sequence, so T = B.
    k_cache : Tensor, shape (num_blocks, block_size, H_KV, D)
        Keys on q's device, of q's dtype, or float8_e4m3fn or int8 with `k_scale` and `v_scale`.
        Any block size from 1 and any strides: a cache whose heads come before the slots is passed
        as a transposed view, one that packs keys and values as two slices. H must be a multiple of
        H_KV: query head h reads key head ``h // (H // H_KV)``.
    v_cache : Tensor, shape (num_blocks, block_size, H_KV, D_v)
        Values; D_v from 1 to 576.
    block_tables : Tensor, shape (B, max_blocks), int32
        Row b lists the blocks of sequence b in order; key j is in slot ``j % block_size`` of block
        ``block_tables[b, j // block_size]``.
    context_lens : Tensor, shape (B,), int32
        Number of keys of each sequence, those of its new tokens included, from 0 to
        ``max_blocks * block_size``.
    cu_seqlens_q : Tensor, shape (B + 1,), int32, optional
        Queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1`` belong to sequence b. Rows of q
        past the last entry are padding: out 0, lse -inf.
    softmax_scale : float, default 1 / sqrt(D)
        Factor of the scores.
    causal : bool or Tensor, shape (B,), bool, default True
        The query at position p sees keys up to p; a tensor says for which sequences.
    window_size : pair of int, default (-1, -1)
        The query at position p sees keys ``p - left`` to ``p + right``; -1 leaves a side open.
    softcap : float, default 0.0
        Where positive, scores become ``softcap * tanh(score / softcap)``.
    alibi_slopes : Tensor, shape (H,) or (B, H), float32, optional
        The score of key j gets ``-slope * abs(p - j)`` added, after softcapping.
    sinks : Tensor, shape (H,), float32 or q's dtype, optional
        Score of one more key in each head, whose value is 0.
    tree_mask : Tensor, shape (sum of M * M,) or (T, W), bool, optional
        Which keys a query may see, besides `causal` and `window_size`. Flat: of each sequence in
        turn the M by M matrix of its new tokens, as speculative decoding verifies a tree of them.
        With rows: ``tree_mask[t, w]`` is about key ``N - W + w`` of the sequence of query t. Keys
        before those the mask is about may be seen.
    k_scale, v_scale : Tensor, shape (num_blocks, block_size, H_KV), (H_KV,) or (), float32
        Only with quantised caches: a key is its number times its scale.
    batch_invariant : bool, default False
        The result of a sequence has the same bits whatever else is in the batch. Keys are still
        attended to in parallel, in parts of fixed size; a backend may be slower for it.
    shared_prefix : bool, default False
        Look on the device for sequences whose leading blocks are the same and attend to those
        blocks once for all of them. The result is the same up to rounding. Not with
        `alibi_slopes`, a window closed on the left, a tree_mask (T, W) or `batch_invariant`.
        Backend "torch" attends to each sequence by itself.
    return_lse : bool, default False
        Also return lse.
    backend : str, default "auto"
        "torch", another registered backend, or "auto" for the best that supports the problem. A
        named backend is never replaced.

    Returns
    -------
    out : Tensor, shape (T, H, D_v)
        Of q's dtype. A query without keys has out 0.
    lse : Tensor, shape (H, T), float32 (float64 for float64 inputs)
        Only with `return_lse`: natural logarithm of the sum of exponentials of the final scores,
        the sink's included; -inf for a query with neither key nor sink.

    Raises
    ------
    ValueError
        A shape, dtype, device or number does not fit; the message names it.
    UnsupportedProblemError
        Features that do not go together, an input that requires a gradient, or no backend
        computes the problem.
    BackendUnavailableError
        No backend of that name exists.

    References
    ----------
    Kwon et al., "Efficient Memory Management for Large Language Model Serving with
    PagedAttention", 2023. Shared prefixes: Juravsky et al., "Hydragen", 2024. Trees: Miao et al.,
    "SpecInfer", 2024. ALiBi: Press et al., "Train Short, Test Long", 2022. Sinks: Xiao et al.,
    "Efficient Streaming Language Models with Attention Sinks", 2024.

    Examples
    --------
    >>> import torch
    >>> from attn_paged import paged_attention
    >>> k_cache, v_cache = torch.randn(2, 10, 16, 2, 64).unbind(0)
    >>> block_tables = torch.tensor([[7, 2], [4, -1]], dtype=torch.int32)
    >>> context_lens = torch.tensor([20, 5], dtype=torch.int32)
    >>> paged_attention(torch.randn(2, 8, 64), k_cache, v_cache, block_tables, context_lens).shape
    torch.Size([2, 8, 64])

    The last three tokens of the first sequence and one of the second, in one call:

    >>> cu_seqlens_q = torch.tensor([0, 3, 4], dtype=torch.int32)
    >>> out, lse = paged_attention(
    ...     torch.randn(4, 8, 64), k_cache, v_cache, block_tables, context_lens,
    ...     cu_seqlens_q=cu_seqlens_q, return_lse=True,
    ... )
    >>> out.shape, lse.shape
    (torch.Size([4, 8, 64]), torch.Size([8, 4]))
    """
    return_lse = flag("return_lse", return_lse)
    window, is_causal = checks.window(causal, window_size)
    require_rank("q", q, "(T, H, D)")
    options = AttentionOptions(
        arguments.softmax_scale(softmax_scale, q.shape[2]),
        window,
        arguments.softcap(softcap),
        *(cu_seqlens_q, alibi_slopes, sinks, k_scale, v_scale, is_causal, tree_mask),
        flag("batch_invariant", batch_invariant),
        flag("shared_prefix", shared_prefix),
    )
    tensors = (q, k_cache, v_cache, block_tables, context_lens)
    problem = checks.attention_problem(*tensors, options)
    name = backends.resolve(ops.ATTENTION, problem, backend)
    out, lse = ops.attention(
        *tensors,
        *(cu_seqlens_q, alibi_slopes, sinks, k_scale, v_scale, is_causal, tree_mask),
        *(options.scale, *window, options.softcap, options.batch_invariant, options.shared_prefix),
        name,
    )
    return (out, lse) if return_lse else out


def flash_attention_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    window_size: int = -1,
    *,
    scale: float | None = None,
    backend: str = backends.AUTO,
) -> torch.Tensor:
    """Decode one token of each sequence, with q as a layer whose heads come first has it.

    Parameters
    ----------
    q : Tensor, shape (B, H, 1, D)
        The newest query of each sequence.
    k_cache, v_cache, block_tables, context_lens
        As in `paged_attention`.
    window_size : int, default -1
        A query sees the `window_size` last keys, its own included; -1 for all.
    scale : float, default 1 / sqrt(D)
        Factor of the scores.
    backend : str, default "auto"
        As in `paged_attention`.

    Returns
    -------
    Tensor, shape (B, H, 1, D_v)
        Of q's dtype.

    Raises
    ------
    ValueError
        A shape, dtype, device or number does not fit; the message names it.

    Examples
    --------
    >>> import torch
    >>> from attn_paged import flash_attention_paged
    >>> k_cache, v_cache = torch.randn(2, 4, 16, 2, 64).unbind(0)
    >>> block_tables = torch.tensor([[3, 1]], dtype=torch.int32)
    >>> context_lens = torch.tensor([20], dtype=torch.int32)
    >>> q = torch.randn(1, 8, 1, 64)
    >>> flash_attention_paged(q, k_cache, v_cache, block_tables, context_lens).shape
    torch.Size([1, 8, 1, 64])
    """
    require_rank("q", q, "(B, H, 1, D)")
    if q.shape[2] != 1:
        raise ValueError(f"q must have shape (B, H, 1, D), got {tuple(q.shape)}")
    out: torch.Tensor = paged_attention(
        q.squeeze(2),
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        softmax_scale=scale,
        window_size=(arguments.reach(window_size), 0),
        backend=backend,
    )
    return out.unsqueeze(2)


@repeatable
def append_to_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    backend: str = backends.AUTO,
) -> None:
    """Write the keys and values of new tokens into their slots, in place.

    Keys may be turned by their position on the way, and both may be quantised.

    Parameters
    ----------
    k : Tensor, shape (T, H_KV, D)
        Keys of the new tokens: float16, bfloat16, float32 or float64, on the caches' device.
    v : Tensor, shape (T, H_KV, D_v)
        Their values.
    k_cache : Tensor, shape (num_blocks, block_size, H_KV, D)
        Keys to write to, of k's dtype, float8_e4m3fn or int8; any strides.
    v_cache : Tensor, shape (num_blocks, block_size, H_KV, D_v)
        Values to write to; any strides.
    slot_mapping : Tensor, shape (T,), int64 or int32
        Slot of each token, ``block * block_size + offset``; a negative slot skips its token. Slots
        that are not negative must differ from each other.
    k_scale, v_scale : Tensor, float32, optional
        Needed for quantised caches. Of shape (num_blocks, block_size, H_KV): written with the scale
        of each token and head, its largest magnitude over the largest number of the cache's dtype.
        Of shape (H_KV,) or (): the scales to use; what exceeds their range is clamped.
    rotary_cos, rotary_sin : Tensor, shape (positions, R / 2), float32 or k's dtype, optional
        Cosines and sines of the rotary embedding; R up to D, the rest of a key is not turned.
    positions : Tensor, shape (T,), int64 or int32, optional
        Row of `rotary_cos` and `rotary_sin` for each token; needed with them.
    rotary_interleaved : bool, default False
        Turn neighbouring entries of a key together, instead of one of each half.
    backend : str, default "auto"
        As in `paged_attention`.

    Raises
    ------
    ValueError
        A shape, dtype or device does not fit; the message names it.
    UnsupportedProblemError
        An input requires a gradient, or no backend computes the problem.

    Notes
    -----
    In a function that is compiled for dynamic shapes, pass a tensor that packs keys and values as
    a whole and take its slices inside: PyTorch 2.13 mixes up inputs that share memory and are
    written to, whatever operator writes.

    Examples
    --------
    >>> import torch
    >>> from attn_paged import append_to_cache
    >>> k_cache, v_cache = torch.zeros(2, 4, 16, 2, 64).unbind(0)
    >>> k, v = torch.ones(2, 3, 2, 64).unbind(0)
    >>> append_to_cache(k, v, k_cache, v_cache, torch.tensor([33, -1, 5]))
    >>> k_cache[2, 1].sum().item(), k_cache.sum().item()
    (128.0, 256.0)
    """
    rotary_interleaved = flag("rotary_interleaved", rotary_interleaved)
    rotary = checks.rotary(rotary_cos, rotary_sin, positions, rotary_interleaved)
    tensors = (k, v, k_cache, v_cache, slot_mapping)
    problem = checks.append_problem(*tensors, AppendOptions(k_scale, v_scale, rotary))
    name = backends.resolve(ops.APPEND, problem, backend)
    ops.append_to_cache(
        *tensors,
        *(k_scale, v_scale, rotary_cos, rotary_sin, positions, rotary_interleaved),
        name,
    )
