"""What an attention problem is, and the checks that turn arguments into one."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from attn_core import arguments, checks
from attn_core.eager import needs_grad
from attn_core.errors import UnsupportedProblemError
from attn_core.recording import each_time
from attn_flash.options import Options

MAX_HEAD_DIM = 256
MAX_DROPOUT_HEADS = 65536
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DENSE_Q, _DENSE_K, _DENSE_V = "(B, M, H, D)", "(B, N, H_KV, D)", "(B, N, H_KV, D_v)"
_RAGGED_Q, _RAGGED_K, _RAGGED_V = "(T_q, H, D)", "(T_k, H_KV, D)", "(T_k, H_KV, D_v)"
_PAGED_K, _PAGED_V = "(num_pages, page_size, H_KV, D)", "(num_pages, page_size, H_KV, D_v)"


class AttentionProblem(NamedTuple):
    """The static facts of one call: all that a backend needs to accept or refuse it.

    `window` is (left, right): query i sees keys ``i + N - M - left`` to ``i + N - M + right``,
    both included; -1 leaves a side open. Causal attention is a window closed on the right, (-1, 0).
    `features` are those of `Options.features`: empty for a plain problem. Lengths are those of the
    longest sequences where they are ragged.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    len_q: int
    len_k: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    window: tuple[int, int]
    features: frozenset[str]
    needs_grad: bool


def attention_problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> AttentionProblem:
    """Validate q, k, v and the tensors among `options`, and describe the problem they pose."""
    is_varlen = options.cu_seqlens_q is not None  # torch 2.6 cannot trace properties of a tuple
    batch = _check_ragged(q, k, v, options) if is_varlen else _check_dense(q, k, v)
    checks.require_multiple("the number of heads of q", q.shape[-2], "that of k and v", k.shape[-2])
    checks.require_range("the head dimension of q", q.shape[-1], 1, MAX_HEAD_DIM)
    checks.require_range("the head dimension of v", v.shape[-1], 1, MAX_HEAD_DIM)
    _check_score_terms(q, k, batch, options)
    if is_varlen:
        _check_values(q, k, options)
    differentiable = (q, k, v, options.attn_bias, options.sinks)
    return describe(q, k, v, options, needs_grad(differentiable))


def describe(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, needs_grad: bool
) -> AttentionProblem:
    """Describe the problem that valid arguments pose."""
    len_q, len_k = options.lengths(q, k)
    starts = options.cu_seqlens_q
    return AttentionProblem(
        q.device,
        q.dtype,
        q.shape[0] if starts is None else starts.shape[0] - 1,
        len_q,
        len_k,
        q.shape[-2],
        k.shape[-2],
        q.shape[-1],
        v.shape[-1],
        (options.window_left, options.window_right),
        options.features(),
        needs_grad,
    )


def options_of(
    q: torch.Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    attn_bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    rng_state: torch.Tensor | None = None,
    **ragged: Any,
) -> Options:
    """Put together what does not depend on shapes, with defaults in place."""
    checks.require_tensor("q", q)
    left, right = arguments.window(causal, window_size)
    dropout_p = probability(dropout_p)
    return Options(
        alibi_slopes=alibi_slopes,
        attn_bias=_four_dimensional(attn_bias),
        key_mask=key_mask,
        sinks=sinks,
        rng_state=dropout_state(rng_state, dropout_p, q.device),
        scale=arguments.softmax_scale(softmax_scale, q.shape[-1] if q.dim() else 1),
        window_left=left,
        window_right=right,
        softcap=arguments.softcap(softcap),
        dropout_p=dropout_p,
        deterministic=checks.flag("deterministic", deterministic)
        or torch.are_deterministic_algorithms_enabled(),
        **ragged,
    )


def probability(value: Any, name: str = "dropout_p") -> float:
    """Return the probability that a weight is dropped."""
    if not checks.is_finite(value) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be a number from 0 to below 1, got {value!r}")
    return float(value)


def length(name: str, value: Any) -> int:
    """Return a length that is not negative."""
    try:
        number = operator.index(value) if not isinstance(value, torch.SymInt) else value
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {number}")
    return number  # type: ignore[return-value]  # a symbolic integer will do


def dropout_state(
    value: torch.Tensor | None, dropout_p: float, device: torch.device
) -> torch.Tensor | None:
    """Return the state of dropout, drawn from torch's default generator where none is given."""
    if value is None:
        if dropout_p == 0.0:
            return None
        return each_time(lambda: torch.randint(2**62, (2,), dtype=torch.int64, device=device))
    checks.require_shape("rng_state", value, "(2,)", (2,))
    checks.require_dtype("rng_state", value, (torch.int64,))
    if value.device != device:
        raise ValueError(f"rng_state must be on the device of q, {device}, got {value.device}")
    return value


def _four_dimensional(attn_bias: torch.Tensor | None) -> torch.Tensor | None:
    """Give a bias the leading dimensions that broadcasting would."""
    if attn_bias is None:
        return None
    checks.require_tensor("attn_bias", attn_bias)
    if attn_bias.dim() > 4:
        raise ValueError(
            "attn_bias must have at most 4 dimensions (B, H, M, N), got shape "
            f"{tuple(attn_bias.shape)}"
        )
    return attn_bias[(None,) * (4 - attn_bias.dim())] if attn_bias.dim() < 4 else attn_bias


def _check_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> int:
    if _is_dense(q, k, v):
        return q.shape[0]
    checks.require_rank("q", q, _DENSE_Q)
    checks.require_dtype("q", q, DTYPES)
    checks.require_rank("k", k, _DENSE_K)
    checks.require_like("k", k, "q", q)
    checks.require_rank("v", v, _DENSE_V)
    checks.require_like("v", v, "q", q)
    batch, _, _, head_dim = q.shape
    _, len_k, heads_kv, _ = k.shape
    checks.require_shape("k", k, _DENSE_K, (batch, len_k, heads_kv, head_dim))
    checks.require_shape("v", v, _DENSE_V, (batch, len_k, heads_kv, v.shape[3]))
    return batch


def _is_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `_check_dense` has nothing to say, at less cost than its checks one by one."""
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor)):
        return False
    if not (isinstance(v, torch.Tensor) and q.dim() == k.dim() == v.dim() == 4):
        return False
    shape = q.shape
    return (
        q.layout == k.layout == v.layout == torch.strided
        and q.dtype in DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.device == k.device == v.device
        and k.shape[:3] == v.shape[:3]
        and k.shape[0] == shape[0]
        and k.shape[3] == shape[3]
    )


def _check_ragged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> int:
    symbols_k, symbols_v = _RAGGED_K, _RAGGED_V
    if options.block_table is not None:
        symbols_k, symbols_v = _PAGED_K, _PAGED_V
    checks.require_rank("q", q, _RAGGED_Q)
    checks.require_dtype("q", q, DTYPES)
    checks.require_rank("k", k, symbols_k)
    checks.require_like("k", k, "q", q)
    checks.require_rank("v", v, symbols_v)
    checks.require_like("v", v, "q", q)
    checks.require_shape("k", k, symbols_k, (*k.shape[:-1], q.shape[-1]))
    checks.require_shape("v", v, symbols_v, (*k.shape[:-1], v.shape[-1]))
    batch = _check_integers("cu_seqlens_q", options.cu_seqlens_q, q, "(B + 1,)", None) - 1
    if batch < 0:
        raise ValueError("cu_seqlens_q must have B + 1 elements, at least 1, got 0")
    _check_integers("cu_seqlens_k", options.cu_seqlens_k, q, "(B + 1,)", batch + 1)
    if options.seqused_k is not None:
        _check_integers("seqused_k", options.seqused_k, q, "(B,)", batch)
    table = options.block_table
    if table is not None:
        checks.require_rank("block_table", table, "(B, max_pages)")
        checks.require_shape("block_table", table, "(B, max_pages)", (batch, table.shape[1]))
        checks.require_dtype("block_table", table, (torch.int32,))
        checks.require_device("block_table", table, "q", q)
        if k.shape[1] == 0:
            raise ValueError(f"k must have pages of at least 1 slot, got shape {tuple(k.shape)}")
        room = table.shape[1] * k.shape[1]
        if options.max_seqlen_k > room:
            raise ValueError(
                "max_seqlen_k must be at most what a row of block_table has room for, "
                f"{room}, got {options.max_seqlen_k}"
            )
    return batch


def _check_integers(
    name: str, tensor: torch.Tensor | None, q: torch.Tensor, symbols: str, size: int | None
) -> int:
    """Check a one-dimensional int32 tensor and return its size."""
    assert tensor is not None
    checks.require_rank(name, tensor, "(B,)" if size is None else symbols)
    if size is not None:
        checks.require_shape(name, tensor, symbols, (size,))
    checks.require_dtype(name, tensor, (torch.int32,))
    checks.require_device(name, tensor, "q", q)
    return tensor.shape[0]


def _check_score_terms(q: torch.Tensor, k: torch.Tensor, batch: int, options: Options) -> None:
    if options.softcap == 0.0 and not options.features():
        return
    heads, (len_q, len_k) = q.shape[-2], options.lengths(q, k)
    slopes, bias = options.alibi_slopes, options.attn_bias
    key_mask, sinks = options.key_mask, options.sinks
    if slopes is not None:
        arguments.require_slopes(slopes, batch, heads, q)
        _refuse_gradient("alibi_slopes", slopes)
    if bias is not None:
        whole = (batch, heads, len_q, len_k)
        if any(size not in (1, full) for size, full in zip(bias.shape, whole, strict=True)):
            raise ValueError(
                f"attn_bias must broadcast to (B, H, M, N) = {whole}, got {tuple(bias.shape)}"
            )
        checks.require_dtype("attn_bias", bias, (torch.bool, *DTYPES))
        checks.require_device("attn_bias", bias, "q", q)
    if key_mask is not None:
        checks.require_shape("key_mask", key_mask, "(B, N)", (batch, len_k))
        checks.require_dtype("key_mask", key_mask, (torch.bool, *DTYPES))
        checks.require_device("key_mask", key_mask, "q", q)
        _refuse_gradient("key_mask", key_mask, ": attn_bias of shape (B, 1, 1, N) has one")
    if sinks is not None:
        checks.require_shape("sinks", sinks, "(H,)", (heads,))
        checks.require_dtype("sinks", sinks, DTYPES)
        checks.require_device("sinks", sinks, "q", q)
    if options.dropout_p != 0.0 and max(batch, heads) > MAX_DROPOUT_HEADS:
        raise UnsupportedProblemError(
            f"dropout_p must be 0 for more than {MAX_DROPOUT_HEADS} sequences or heads, got "
            f"{batch} and {heads}"
        )


def _refuse_gradient(name: str, tensor: torch.Tensor, instead: str = "") -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise UnsupportedProblemError(
            f"{name} must not require a gradient, none is computed{instead}; detach it"
        )


def _check_values(q: torch.Tensor, k: torch.Tensor, options: Options) -> None:
    """Check what is in the tensors of a ragged problem, where reading them waits for no device."""
    if not checks.may_read_values(q):
        return
    assert options.cu_seqlens_q is not None
    assert options.cu_seqlens_k is not None
    starts_q, starts_k = options.cu_seqlens_q.tolist(), options.cu_seqlens_k.tolist()
    table = options.block_table
    tokens_k = None if table is not None else k.shape[0]
    _check_starts("cu_seqlens_q", starts_q, "q", q.shape[0], options.max_seqlen_q)
    longest = options.max_seqlen_k if options.seqused_k is None else None
    _check_starts("cu_seqlens_k", starts_k, "k", tokens_k, longest)
    lengths = [stop - start for start, stop in pairwise(starts_k)]
    if options.seqused_k is not None:
        used = options.seqused_k.tolist()
        for b, (count, length) in enumerate(zip(used, lengths, strict=True)):
            limit = options.max_seqlen_k
            limit = limit if table is not None else min(limit, length)
            checks.require_range(f"seqused_k[{b}]", count, 0, limit)
        lengths = used
    if table is None:
        return
    for b, length in enumerate(lengths):
        for page in table[b, : -(-length // k.shape[1])].tolist():
            checks.require_range(f"an entry of block_table[{b}]", page, 0, k.shape[0] - 1)


def _check_starts(
    name: str, starts: list[int], tensor_name: str, tokens: int | None, longest: int | None
) -> None:
    if starts[0] != 0:
        raise ValueError(f"{name} must begin with 0, got {starts[0]}")
    for start, stop in pairwise(starts):
        if stop < start:
            raise ValueError(f"{name} must not decrease, got {stop} after {start}")
        if longest is not None and stop - start > longest:
            raise ValueError(
                f"{name.replace('cu_seqlens', 'max_seqlen')} must be at least the length of every "
                f"sequence, {stop - start} for one, got {longest}"
            )
    if tokens is not None and starts[-1] > tokens:
        raise ValueError(
            f"{name} must end within the {tokens} tokens of {tensor_name}, got {starts[-1]}"
        )
