"""What the launchers of this package derive from a problem before they start a kernel."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from attn_core.dropout import threshold
from attn_core.errors import UnsupportedProblemError
from attn_flash.options import Options

# Integers that change from call to call: compiled for any value.
NOT_SPECIALIZED = [
    "M",
    "N",
    "H",
    "H_KV",
    "num_tiles",
    "num_heads",
    "heads_per_group",
    "threshold",
    "left",
    "right",
]
LOG2_E = 1.4426950408889634
_RUN_BYTES = 16
_LEAST_SCALE = 1e-30
_L2_SHARE = 32 << 20  # bytes of keys and values that running programs may touch at once
_TAIL_MATTERS = 1024  # tokens
_UNBENDING = {"dropout_p", "cu_seqlens_q", "seqused_k", "block_table"}  # they leave scores alone
# Exponentials of scores up to this, and sums of them, are far from what bfloat16 and float32 hold.
_BOUNDED_SOFTCAP = 50.0
_LARGEST_TILE = (128, 256)  # rows and columns
_SHARING = 8  # scores to an element of a boolean bias


class Size(NamedTuple):
    """Sizes of a problem; M and N are those of the longest sequences where they are ragged."""

    B: int
    M: int
    N: int
    H: int
    H_KV: int
    D: int
    D_v: int
    rows: int  # queries of a head in lse: all of them where sequences are ragged


def size(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> Size:
    """Sizes of the problem that q, k, v and options pose."""
    M, N = options.lengths(q, k)
    starts = options.cu_seqlens_q
    B = q.shape[0] if starts is None else starts.shape[0] - 1
    rows = M if starts is None else q.shape[0]
    return Size(B, M, N, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], rows)


def four_strides(x: torch.Tensor, options: Options) -> tuple[int, ...]:
    """Strides along batch, sequence, head and head dimension."""
    return (0, *x.stride()) if options.is_varlen else x.stride()


def starts(options: Options) -> tuple[torch.Tensor | None, ...]:
    """Where ragged sequences begin, and how many keys of each count."""
    tensors = (options.cu_seqlens_q, options.cu_seqlens_k, options.seqused_k)
    return tuple(None if x is None else x.contiguous() for x in tensors)


def with_narrow_bias(options: Options) -> Options:
    """Make float32 of a float64 bias: kernels add no finer, and have no memory for its tiles."""
    bias = options.attn_bias
    if bias is None or bias.dtype != torch.float64:
        return options
    return options._replace(attn_bias=bias.float())


def with_added_bias(q: torch.Tensor, size: Size, options: Options) -> Options:
    """Make 0 and -inf of a boolean bias, where so many scores share it that this costs little.

    Kernels add two bytes to a score faster than they select it by one.
    """
    bias = options.attn_bias
    if bias is None or bias.dtype != torch.bool:
        return options
    if _SHARING * bias.numel() > size.B * size.H * size.M * size.N:
        return options
    added = torch.log(bias, out=torch.empty_like(bias, dtype=q.dtype))
    return options._replace(attn_bias=added)


class ScoreTerms(NamedTuple):
    """How kernels are told of score modifications and dropout."""

    args: tuple[Any, ...]  # tensors with their strides
    scalars: tuple[Any, ...]  # softcap_log2, threshold, keep_scale
    flags: dict[str, int]
    key: tuple[Any, ...]  # what a kernel is compiled for


_NO_TERMS = ScoreTerms(
    args=(None, 0, 0, None, 0, 0, 0, 0, None, 0, 0, None),
    scalars=(0.0, 0, 1.0),
    flags=dict.fromkeys(("SOFTCAP", "HAS_ALIBI", "HAS_BIAS", "HAS_KEY_MASK", "HAS_DROPOUT"), 0),
    key=(),
)


def score_terms(q: torch.Tensor, size: Size, options: Options) -> ScoreTerms:
    """Put together the arguments of kernels that modify scores."""
    if not options.features():
        return _NO_TERMS
    slopes, bias, key_mask = options.alibi_slopes, options.attn_bias, options.key_mask
    slopes_strides = (0, 0) if slopes is None else slopes.expand(size.B, size.H).stride()
    bias_strides: tuple[int, ...] = (0, 0, 0, 0)
    if bias is not None:
        bias_strides = bias.expand(size.B, size.H, size.M, size.N).stride()
        _, _, row_stride, column_stride = bias_strides
        require_narrow_tiles(((0, row_stride, 0, column_stride),))
    mask_strides = (0, 0) if key_mask is None else key_mask.stride()
    state = options.rng_state if options.dropout_p != 0.0 else None
    return ScoreTerms(
        args=(
            slopes, *slopes_strides,
            bias.view(torch.uint8) if _kind(bias) == 2 else bias, *bias_strides,
            key_mask, *mask_strides,
            None if state is None else state.contiguous(),
        ),
        scalars=(
            options.softcap * LOG2_E, threshold(options.dropout_p), 1.0 / (1.0 - options.dropout_p)
        ),
        flags={
            "SOFTCAP": _softcap_mode(q, options), "HAS_ALIBI": slopes is not None,
            "HAS_BIAS": _kind(bias), "HAS_KEY_MASK": _kind(key_mask),
            "HAS_DROPOUT": _dropout_mode(q, options),
        },
        key=(
            slopes_strides, bias_strides, mask_strides,
            *(None if x is None else x.dtype for x in (bias, key_mask)),
        ),
    )  # fmt: skip


def _kind(term: torch.Tensor | None) -> int:
    """What a term does to scores, in the terms of `scores`."""
    if term is None:
        return 0
    return 2 if term.dtype == torch.bool else 1


def _softcap_mode(q: torch.Tensor, options: Options) -> int:
    """How kernels compute tanh, in the terms of `scores`."""
    if options.softcap == 0.0:
        return 0
    return 2 if q.element_size() == 2 and _takes_ptx(q) else 1


def _dropout_mode(q: torch.Tensor, options: Options) -> int:
    """How kernels draw random numbers, in the terms of `scores`."""
    if options.dropout_p == 0.0:
        return 0
    return 2 if _takes_ptx(q) else 1


def is_bounded(q: torch.Tensor, size: Size, options: Options) -> bool:
    """Whether exponentials need no maximum to be subtracted: softcapping has the last word.

    The weight of a single key is exactly 1 only if its own score is subtracted.
    """
    is_last = options.features() <= _UNBENDING | {"softcap"}
    is_small = 0.0 < options.softcap <= _BOUNDED_SOFTCAP
    return is_last and is_small and size.N > 1 and q.dtype == torch.bfloat16


def _takes_ptx(q: torch.Tensor) -> bool:
    return q.device.type == "cuda" and torch.version.hip is None


def bias_run(bias: torch.Tensor | None) -> int:
    """How many elements of a row of the bias, from a multiple on, share 16 aligned bytes.

    Loading them at once never leaves the memory that belongs to the tensor.
    """
    if bias is None or bias.stride(-1) != 1 or bias.data_ptr() % _RUN_BYTES:
        return 1
    if any(stride % _RUN_BYTES for stride in bias.stride()[:-1]):
        return 1
    return _RUN_BYTES // bias.element_size()


def log2_scale(options: Options) -> float:
    """Factor of the products in units of log2; kernels divide by it, so it is never quite 0."""
    return math.copysign(max(abs(options.scale), _LEAST_SCALE), options.scale) * LOG2_E


def tail_block(length: int, block: int, options: Options) -> int:
    """Size of the last block along a sequence: small where the full blocks leave little for it.

    197 tokens in blocks of 64 leave 5: a tail of 16 saves a fifth of the work. Long sequences gain
    nothing, and windows end elsewhere; neither is worth another compilation.
    """
    rest = length % block
    is_plain = options.window == (-1, -1) and not options.features()
    if length > _TAIL_MATTERS or not is_plain or rest == 0:
        return block
    return max(16, 1 << (rest - 1).bit_length())


def heads_per_group(k: torch.Tensor, length: int) -> int:
    """How many heads' keys and values fit the share of the L2 cache that programs work in."""
    head_bytes = 2 * length * k.shape[-1] * k.element_size()
    return max(1, _L2_SHARE // max(head_bytes, 1))


def require_narrow_tiles(key: tuple[Any, ...]) -> None:
    """Check that offsets within a tile fit 32 bits, given the strides of (B, S, H, D) tensors."""
    rows, columns = _LARGEST_TILE
    for strides in key:
        if not isinstance(strides, tuple) or len(strides) != 4:
            continue  # it belongs to another tensor
        _, row_stride, _, column_stride = strides
        if (rows - 1) * row_stride + (columns - 1) * column_stride >= 2**31:
            raise UnsupportedProblemError(
                "triton: a tile must span less than 2**31 elements, got strides "
                f"{row_stride} along the sequence and {column_stride} along the head dimension"
            )
