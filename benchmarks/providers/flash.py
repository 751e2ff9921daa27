"""attn-flash: softmax attention, forward and backward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from attn_core import BackendUnavailableError, UnsupportedProblemError
from benchmarks.problems import Case
from benchmarks.providers.base import (
    HOST,
    Call,
    Expected,
    Provider,
    Subject,
    compiled,
    error_limit,
    leaf,
    nothing_compiled,
    wants_grad,
)

_BACKWARD_FLOPS = 2.5  # five matrix products for the two of the forward pass
_LONG = 2048  # tokens from which kernels are the same for all
_CHECKED_SCORES = 1 << 26  # of the float64 reference; beyond it, only corners are checked
_BLOCK_SCORES = 1 << 24


class Inputs(NamedTuple):
    """q, dout (B, M, H, D) and k, v (B, N, H_KV, D)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw random inputs, the same for the same case."""
    generator = torch.Generator(device).manual_seed(case.seed)
    queries = (case["B"], case["M"], case["H"], case["D"])
    keys = (case["B"], case["N"], case["H_KV"], case["D"])
    return Inputs(
        *(
            torch.randn(shape, dtype=case.dtype, device=device, generator=generator)
            for shape in (queries, keys, keys, queries)
        )
    )


def window(case: Case) -> tuple[int, int]:
    """Return the window as (left, right), with causal closing the right side."""
    left, right = case["window"]
    return (left, 0) if case["causal"] else (left, right)


def visible_pairs(case: Case) -> float:
    """Count the scores a call must compute; causal self-attention counts as half, as is usual."""
    if is_ragged(case):
        return sum(_pairs(case, length, length) for length in case["lengths"])
    return _pairs(case, case["M"], case["N"])


def is_ragged(case: Case) -> bool:
    """Whether the tokens are those of sequences that attend to themselves alone."""
    return "lengths" in case.sizes


def _pairs(case: Case, len_q: int, len_k: int) -> float:
    left, right = window(case)
    if (left, right) == (-1, 0) and len_q == len_k:
        return len_q * len_k / 2
    diagonal = torch.arange(len_q) + len_k - len_q
    first = (diagonal - left).clamp_min(0) if left >= 0 else torch.zeros_like(diagonal)
    last = diagonal + right if right >= 0 else torch.full_like(diagonal, len_k - 1)
    return float((last.clamp_max(len_k - 1) - first + 1).clamp_min(0).sum())


def flops(case: Case, pass_: str) -> float | None:
    """Count two products of D multiplications and additions for each visible score."""
    forward = 4 * case["B"] * case["H"] * visible_pairs(case) * case["D"]
    return {"forward": forward, "backward": _BACKWARD_FLOPS * forward}.get(pass_)


def traffic(case: Case, pass_: str) -> float:
    """Count the bytes that must be read and written once; lse is left out."""
    queries = case["B"] * case["M"] * case["H"] * case["D"]
    keys = case["B"] * case["N"] * case["H_KV"] * case["D"]
    # q out, k v; backward: q out dout dq, k v dk dv
    elements = 4 * queries + 4 * keys if pass_ == "backward" else 2 * queries + 2 * keys
    return elements * case.dtype.itemsize


class Part(NamedTuple):
    """Some batch entries and some key heads, with the query heads that read them."""

    batches: list[int]
    heads_kv: list[int]
    group: int

    def queries(self, tensor: torch.Tensor) -> torch.Tensor:
        """Cut a (B, M, H, D) tensor to (b, M, h, D)."""
        heads = [h * self.group + g for h in self.heads_kv for g in range(self.group)]
        return tensor[self.batches][:, :, heads]

    def keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """Cut a (B, N, H_KV, D) tensor to (b, N, h_kv, D)."""
        return tensor[self.batches][:, :, self.heads_kv]


def checked_part(case: Case) -> Part:
    """Return the whole problem if it is small, else the first and last batch entry and head."""
    batch, heads_kv, group = case["B"], case["H_KV"], case["H"] // case["H_KV"]
    if batch * case["H"] * case["M"] * case["N"] <= _CHECKED_SCORES:
        return Part(list(range(batch)), list(range(heads_kv)), group)
    return Part(sorted({0, batch - 1}), sorted({0, heads_kv - 1}), group)


def reference(case: Case, inputs: Inputs, gradients: bool) -> list[Expected]:
    """Softmax attention and its gradients by the plain formulas, in float64."""
    part = checked_part(case)
    q, dout = (part.queries(tensor).double() for tensor in (inputs.q, inputs.dout))
    k, v = (part.keys(tensor).double() for tensor in (inputs.k, inputs.v))
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for b, head, rows in _blocks(q, k, part.group):
        at = (b, rows, slice(head * part.group, (head + 1) * part.group))
        keys, values = k[b, :, head], v[b, :, head]  # [N, D]
        scores = torch.einsum("mgd,nd->gmn", q[at], keys) * case["D"] ** -0.5
        scores.masked_fill_(~_visible(case, rows, q.device), -torch.inf)
        probs = torch.softmax(scores, -1).nan_to_num_(0.0)
        out[at] = torch.einsum("gmn,nd->mgd", probs, values)
        if not gradients:
            continue
        delta = (dout[at] * out[at]).sum(-1).T[..., None]  # [G, M, 1]
        dscores = torch.einsum("mgd,nd->gmn", dout[at], values).sub_(delta).mul_(probs)
        dscores.mul_(case["D"] ** -0.5)
        dq[at] = torch.einsum("gmn,nd->mgd", dscores, keys)
        dk[b, :, head] += torch.einsum("gmn,mgd->nd", dscores, q[at])
        dv[b, :, head] += torch.einsum("gmn,mgd->nd", probs, dout[at])
    limit = error_limit(case.dtype)
    expected = [Expected("out", out, part.queries, limit)]
    if gradients:
        expected.append(Expected("dq", dq, part.queries, 2 * limit))
        expected.append(Expected("dk", dk, part.keys, 2 * limit))
        expected.append(Expected("dv", dv, part.keys, 2 * limit))
    return expected


def _blocks(q: torch.Tensor, k: torch.Tensor, group: int) -> Iterator[tuple[int, int, slice]]:
    step = max(1, _BLOCK_SCORES // (group * k.shape[1]))
    for b in range(q.shape[0]):
        for head in range(k.shape[2]):
            for start in range(0, q.shape[1], step):
                yield b, head, slice(start, min(start + step, q.shape[1]))


def _visible(case: Case, rows: slice, device: torch.device) -> torch.Tensor:
    left, right = window(case)
    i = torch.arange(rows.start, rows.stop, device=device)[:, None] + case["N"] - case["M"]
    j = torch.arange(case["N"], device=device)
    mask = torch.ones(i.shape[0], case["N"], dtype=torch.bool, device=device)
    if left >= 0:
        mask &= j >= i - left
    if right >= 0:
        mask &= j <= i + right
    if is_ragged(case):
        sequence = _sequences(case, device)
        mask &= sequence[rows, None] == sequence
    return mask


def _sequences(case: Case, device: torch.device) -> torch.Tensor:
    """Which sequence each token is of, (M,)."""
    lengths = torch.tensor(case["lengths"], device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(lengths)


def _bounds(case: Case, device: torch.device) -> tuple[Any, ...]:
    """Where sequences of queries and keys begin, and the length of the longest."""
    lengths = torch.tensor(case["lengths"], device=device)
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return starts, starts, max(case["lengths"]), max(case["lengths"])


def _packed(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Make a function of tensors (T, H, D) one of tensors (1, T, H, D)."""
    return lambda *tensors: attend(*(x.flatten(0, 1) for x in tensors)).unsqueeze(0)


def _heads_second(
    case: Case,
    inputs: Inputs,
    attend: Callable[..., torch.Tensor],
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Call:
    """A call on (B, M, H, D) tensors, flash-attn's layout."""
    q, k, v = (leaf(tensor, wants_grad(case)) for tensor in inputs[:3])
    return Call(lambda: attend(q, k, v), (q, k, v), inputs.dout, context=context)


def heads_first(
    case: Case,
    inputs: Inputs,
    attend: Callable[..., torch.Tensor],
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Call:
    """A call on dense (B, H, M, D) tensors, torch's layout."""
    q, k, v = (leaf(tensor.transpose(1, 2), wants_grad(case)) for tensor in inputs[:3])
    dout = inputs.dout.transpose(1, 2).contiguous()
    return Call(
        lambda: attend(q, k, v),
        (q, k, v),
        dout,
        canonical=lambda tensor: tensor.transpose(1, 2),
        context=context,
    )


def _ours(backend: str, case: Case, inputs: Inputs, deterministic: bool = False) -> Call:
    from attn_flash import flash_attn_func, flash_attn_varlen_func

    options = {
        "causal": case["causal"],
        "window_size": case["window"],
        "deterministic": deterministic,
        "backend": backend,
    }
    if not is_ragged(case):
        return _heads_second(case, inputs, functools.partial(flash_attn_func, **options))
    bounds = _bounds(case, inputs.q.device)
    return _heads_second(
        case, inputs, _packed(lambda q, k, v: flash_attn_varlen_func(q, k, v, *bounds, **options))
    )


def _sdpa(backend: str, case: Case, inputs: Inputs) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if backend == "FLASH_ATTENTION" and is_ragged(case):
        return _ragged_sdpa(case, inputs)
    _require_top_left(case)
    _require_kernel(backend, case, inputs.q.device)
    attend = functools.partial(
        F.scaled_dot_product_attention,
        is_causal=case["causal"],
        enable_gqa=case["H"] != case["H_KV"],
    )
    if not backend:
        return heads_first(case, inputs, attend)
    # With one backend allowed torch raises where that one cannot run, and never takes another.
    pinned = functools.partial(sdpa_kernel, getattr(SDPBackend, backend))
    return heads_first(case, inputs, attend, pinned)


def _ragged_sdpa(case: Case, inputs: Inputs) -> Call:
    """The operator that torch's functions for ragged sequences call, in all of its versions."""
    bounds = _bounds(case, inputs.q.device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        dropout_p, debug = 0.0, False
        outputs = torch.ops.aten._flash_attention_forward(
            q, k, v, *bounds, dropout_p, case["causal"], debug
        )
        return _first(outputs)

    return _heads_second(case, inputs, _packed(attend))


def _require_kernel(backend: str, case: Case, device: torch.device) -> None:
    """Refuse what torch has no such kernel for on a GPU."""
    if device.type == "cpu":
        return
    if backend == "EFFICIENT_ATTENTION" and case["H"] != case["H_KV"]:
        raise UnsupportedProblemError("it has no shared key heads")
    if backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION") and case.dtype == torch.float32:
        raise UnsupportedProblemError("it takes float16 and bfloat16 alone")


def _flex(case: Case, inputs: Inputs) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = compiled(flex_attention)
    block_mask = None
    if window(case) != (-1, -1) or is_ragged(case):
        block_mask = create_block_mask(
            _mask_mod(case, inputs.q.device),
            None,
            None,
            case["M"],
            case["N"],
            device=str(inputs.q.device),
        )
    attend = functools.partial(flex, block_mask=block_mask, enable_gqa=case["H"] != case["H_KV"])
    return heads_first(case, inputs, attend)


def _mask_mod(case: Case, device: torch.device) -> Callable[..., torch.Tensor]:
    left, right = window(case)
    shift = case["N"] - case["M"]
    sequence = _sequences(case, device) if is_ragged(case) else None

    def mask_mod(
        b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        mask = j >= 0
        if left >= 0:
            mask = mask & (j >= i + shift - left)
        if right >= 0:
            mask = mask & (j <= i + shift + right)
        if sequence is not None:
            mask = mask & (sequence[i] == sequence[j])
        return mask

    return mask_mod


def _flash4(case: Case, inputs: Inputs) -> Call:
    from flash_attn import cute

    sides = tuple(None if side < 0 else side for side in case["window"])
    options = {"causal": case["causal"], "window_size": sides}
    if not is_ragged(case):
        attend = functools.partial(cute.flash_attn_func, **options)
        return _heads_second(case, inputs, lambda q, k, v: _first(attend(q, k, v)))
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    bounds = dict(zip(names, _bounds(case, inputs.q.device), strict=True))
    attend = functools.partial(cute.flash_attn_varlen_func, **options, **bounds)
    return _heads_second(case, inputs, _packed(lambda q, k, v: _first(attend(q, k, v))))


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def _aule(case: Case, inputs: Inputs) -> Call:
    import aule

    _require_top_left(case)
    if not {"triton", "triton-amd"} & set(aule.get_available_backends()):
        raise BackendUnavailableError("aule finds no Triton here and would compute on the CPU")
    attend = functools.partial(aule.flash_attention, causal=case["causal"])
    return heads_first(case, inputs, attend)


def _require_top_left(case: Case) -> None:
    if is_ragged(case):
        raise UnsupportedProblemError("it has no ragged sequences")
    if tuple(case["window"]) != (-1, -1):
        raise UnsupportedProblemError("it has no sliding window")
    if case["causal"] and case["M"] != case["N"]:
        raise UnsupportedProblemError("its causal mask is aligned at the top left")


def _kind(case: Case) -> tuple[Any, ...]:
    """What kernels are compiled for."""
    group = case["H"] // case["H_KV"]
    length = min(case["M"], _LONG)
    return case.dtype, case["D"], window(case), is_ragged(case), group, length, case.passes


def _backend(name: str, **options: Any) -> Provider:
    backend, _, order = name.partition("-")
    prepare = functools.partial(_ours, backend, deterministic=order == "det")
    return Provider(name, prepare, "ours", "attn_flash", kind_of=_kind, **options)


def _of_torch(name: str, backend: str, **options: Any) -> Provider:
    return Provider(name, functools.partial(_sdpa, backend), compiles=nothing_compiled, **options)


SUBJECT = Subject(
    package="attn-flash",
    providers=(
        _backend("hopper"),
        _backend("hopper-det", passes=("backward",), headline_only=True),
        _backend("triton"),
        _backend("torch", optional=True),
        _backend("torch", devices=("cpu",)),
        _of_torch("sdpa", "", devices=("cpu",)),
        _of_torch("sdpa", "", passes=HOST),
        _of_torch("cudnn", "CUDNN_ATTENTION"),
        _of_torch("flash", "FLASH_ATTENTION"),
        _of_torch("efficient", "EFFICIENT_ATTENTION"),
        Provider("flex", _flex, headline_only=True),  # compiled anew for every case
        Provider(
            "fa4",
            _flash4,
            module="flash_attn.cute",
            distribution="flash-attn-4",
            kind_of=_kind,
        ),
        Provider("aule", _aule, module="aule", distribution="aule-attention", kind_of=_kind),
    ),
    make_inputs=make_inputs,
    reference=reference,
    flops=flops,
    traffic=traffic,
    x_axis="M",
    warm=True,
)
