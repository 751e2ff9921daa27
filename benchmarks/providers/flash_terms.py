"""attn-flash with what may be done to scores: its cost is that beyond the row "plain"."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from attn_core import UnsupportedProblemError
from attn_core.dropout import keep_mask
from benchmarks.problems import Case
from benchmarks.providers import flash
from benchmarks.providers.base import (
    Call,
    Expected,
    Provider,
    Subject,
    Tasks,
    compiled,
    error_limit,
    leaf,
    nothing_compiled,
    wants_grad,
)

_SOFTCAP = 30.0
_DROPPED = 0.1
_SEED, _OFFSET = 1234, 5
_SEEN_SHARE = 0.9  # of the scores, by boolean masks


class Inputs(NamedTuple):
    """q, k, v, dout (B, M, H, D), and the tensor of the term, if it has one."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    term: torch.Tensor | None


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw random inputs, the same for the same case."""
    generator = torch.Generator(device).manual_seed(case.seed)
    draw = functools.partial(torch.randn, device=device, generator=generator)
    shape = (case["B"], case["M"], case["H"], case["D"])
    tensors = [draw(shape, dtype=case.dtype) for _ in range(4)]
    shapes = {
        "alibi": (case["H"],),
        "bias": (1, case["H"], case["M"], case["N"]),
        "bool-bias": (1, 1, case["M"], case["N"]),
        "key-mask": (case["B"], case["N"]),
    }
    if case["term"] not in shapes:
        return Inputs(*tensors, None)
    size = shapes[case["term"]]
    if case["term"] == "bias":
        return Inputs(*tensors, draw(size, dtype=case.dtype))
    share = torch.rand(size, device=device, generator=generator)
    return Inputs(*tensors, share if case["term"] == "alibi" else share < _SEEN_SHARE)


def reference(case: Case, inputs: Inputs, gradients: bool) -> list[Expected]:
    """Attention of some heads and its gradients, by autograd in float64."""
    part = flash.checked_part(case)
    shape = (len(part.batches), case["M"], len(part.heads_kv), case["D"])
    found = {
        name: torch.empty(shape, dtype=torch.float64, device=inputs.q.device)
        for name in ("out", "dq", "dk", "dv")
    }
    for i, b in enumerate(part.batches):
        for j, h in enumerate(part.heads_kv):
            for whole, own in zip(found.values(), _head(case, inputs, b, h), strict=True):
                whole[i, :, j] = own
    limit = error_limit(case.dtype)
    expected = [
        Expected(name, value, part.queries, limit if name == "out" else 2 * limit)
        for name, value in found.items()
    ]
    return expected if gradients else expected[:1]


def _head(case: Case, inputs: Inputs, b: int, h: int) -> tuple[torch.Tensor, ...]:
    """Output and gradients of one head, (M, D) each."""
    q, k, v = (x[b, :, h].double().requires_grad_() for x in inputs[:3])
    with torch.enable_grad():
        scores = _modified(case, inputs.term, q @ k.T * case["D"] ** -0.5, b, h)
        probs = torch.softmax(scores, -1)
        if case["term"] == "dropout":
            shape = (1, h + 1, case["M"], case["N"])
            keep = keep_mask(shape, _DROPPED, _SEED, _OFFSET, q.device, first_batch=b)[0, h]
            probs = probs * keep / (1 - _DROPPED)
        out = probs @ v
    return out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.dout[b, :, h].double())


def _modified(
    case: Case, term: torch.Tensor | None, scores: torch.Tensor, b: int, h: int
) -> torch.Tensor:
    if case["term"] == "softcap":
        return _SOFTCAP * torch.tanh(scores / _SOFTCAP)
    if term is None:
        return scores
    if case["term"] == "alibi":
        i = torch.arange(case["M"], device=term.device)
        return scores - term[h].double() * (i[:, None] - i).abs()
    if case["term"] == "key-mask":
        return scores.masked_fill(~term[b], -torch.inf)
    if case["term"] == "bool-bias":
        return scores.masked_fill(~term[0, 0], -torch.inf)
    return scores + term[0, h].double()


def traffic(case: Case, pass_: str) -> float:
    """Count the bytes that must be read and written once, those of the term too."""
    bias = case["M"] * case["N"] * {"bias": 2 * case["H"], "bool-bias": 1}.get(case["term"], 0)
    return flash.traffic(case, pass_) + bias


def _ours(backend: str, case: Case, inputs: Inputs) -> Call:
    from attn_flash import flash_attn_func

    q, k, v = (leaf(tensor, wants_grad(case)) for tensor in inputs[:3])
    options = _options(case, inputs)
    return Call(
        lambda: flash_attn_func(q, k, v, backend=backend, **options), (q, k, v), inputs.dout
    )


def _options(case: Case, inputs: Inputs) -> dict[str, Any]:
    """How attn-flash is told of the term."""
    state = torch.tensor([_SEED, _OFFSET], device=inputs.q.device)
    return {
        "plain": {},
        "softcap": {"softcap": _SOFTCAP},
        "alibi": {"alibi_slopes": inputs.term},
        "bias": {"attn_bias": inputs.term},
        "bool-bias": {"attn_bias": inputs.term},
        "key-mask": {"key_mask": inputs.term},
        "dropout": {"dropout_p": _DROPPED, "rng_state": state},
    }[case["term"]]


def _our_kernels(case: Case) -> Tasks:
    return {
        ("triton", case.id, part): functools.partial(_compile_ours, part, case)
        for part in case.passes
    }


def _compile_ours(part: str, case: Case, inputs: Inputs) -> None:
    from attn_flash import ops
    from attn_flash.options import Options

    q, k, v, dout, _ = inputs
    options = Options(scale=case["D"] ** -0.5, **_options(case, inputs))
    if part == "forward":
        ops.attention(q, k, v, *options, "triton")
        return
    lse = torch.zeros(ops.lse_shape(q), device=q.device)
    ops.attention_backward(dout, None, q, k, v, dout, lse, False, *options, "triton")


def _flex(case: Case, inputs: Inputs) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    attend = functools.partial(compiled(flex_attention), score_mod=_score_mod(case, inputs.term))
    return flash.heads_first(case, inputs, attend)


def _score_mod(case: Case, term: torch.Tensor | None) -> Callable[..., torch.Tensor] | None:
    """What flex attention compiles into its kernel."""
    if case["term"] == "dropout":
        raise UnsupportedProblemError("it has no dropout")
    return {
        "plain": None,
        "softcap": lambda s, b, h, i, j: _SOFTCAP * torch.tanh(s / _SOFTCAP),
        "alibi": lambda s, b, h, i, j: s - term[h] * (i - j).abs(),
        "bias": lambda s, b, h, i, j: s + term[0, h, i, j],
        "bool-bias": lambda s, b, h, i, j: torch.where(term[0, 0, i, j], s, -float("inf")),
        "key-mask": lambda s, b, h, i, j: torch.where(term[b, j], s, -float("inf")),
    }[case["term"]]


def _efficient(case: Case, inputs: Inputs) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mask = inputs.term
    if case["term"] in ("softcap", "alibi", "dropout"):
        raise UnsupportedProblemError(f"it has no {case['term']} that others can be compared with")
    if mask is not None:
        mask = (mask[:, None, None] if mask.dim() == 2 else mask).expand(
            case["B"], case["H"], case["M"], case["N"]
        )
    attend = functools.partial(F.scaled_dot_product_attention, attn_mask=mask)
    pinned = functools.partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION)
    return flash.heads_first(case, inputs, attend, pinned)


SUBJECT = Subject(
    package="attn-flash-terms",
    providers=(
        Provider(
            "triton",
            functools.partial(_ours, "triton"),
            "ours",
            "attn_flash",
            compiles=_our_kernels,
        ),
        Provider(
            "torch", functools.partial(_ours, "torch"), "ours", "attn_flash", devices=("cpu",)
        ),
        Provider("flex", _flex),
        Provider("efficient", _efficient, compiles=nothing_compiled),
    ),
    make_inputs=make_inputs,
    reference=reference,
    flops=flash.flops,
    traffic=traffic,
    x_axis="M",
    warm=True,
    warming_share=0.45,
)
