"""Measure the tiles of the Triton kernels on this GPU.

The fastest go to the user's disk (ATTN_CACHE_DIR) and win over the shipped ones in every later
process. Problems that were measured before are skipped unless --force is given. A program that is
started with ATTN_TUNE=force measures by itself, at its first call with each problem.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from attn_core import environment, tuning
from attn_core.device import triton_refusal
from attn_triangle.api import triangle_attention
from attn_triangle.utils import gen_tensors

_DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


class Problem(NamedTuple):
    """One problem to tune for: residues, heads, head dimension and dtype."""

    n: int
    h: int
    d: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"n{self.n}-h{self.h}-d{self.d}-{str(self.dtype).removeprefix('torch.')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, with a progress bar, and print a table of what won."""
    options = _parser().parse_args(arguments)
    device = options.device
    refusal = _refusal(device)
    if refusal is not None:
        sys.stderr.write(f"there is nothing to tune: {refusal}\n")
        return 1
    problems = [
        Problem(n, h, d, dtype)
        for d in options.d
        for h in options.h
        for dtype in options.dtype
        for n in _powers_of_two(options.min_n, options.max_n)
    ]
    _print_table(_tune_all(problems, device, options.force))
    return 0


def _refusal(device: torch.device) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no NVIDIA or AMD GPU"
    return triton_refusal(device)


def tune(problem: Problem, device: torch.device, force: bool = False) -> dict[str, Any]:
    """Measure the tiles of all kernels of both passes; return those that won, by kernel.

    Without `force`, a problem whose tiles are all on disk is left alone.
    """
    from attn_triangle._triton import configs

    inputs = gen_tensors(problem.n, problem.d, problem.h, True, device, problem.dtype)
    key = configs.key_of(inputs[0], inputs[1])
    if force or not all(key in tuning.measured(table, device) for table in configs.TABLES):
        with _tuning_in_calls():
            _run_all_kernels(*inputs)
    return {
        table.name.rpartition(".")[2]: tuning.pick(table, device, key) for table in configs.TABLES
    }


def _run_all_kernels(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor
) -> None:
    """Attend, and compute the bias's gradient apart: for all of short rows one kernel would do."""
    out = triangle_attention(q, k, v, bias.detach(), mask, backend="triton")
    torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    out = triangle_attention(q.detach(), k.detach(), v.detach(), bias, mask, backend="triton")
    torch.autograd.grad(out, bias, torch.randn_like(out))


def _tune_all(
    problems: Sequence[Problem], device: torch.device, force: bool
) -> dict[Problem, dict[str, Any]]:
    from rich.progress import track

    return {
        problem: tune(problem, device, force)
        for problem in track(problems, description="measuring tiles")
    }


@contextlib.contextmanager
def _tuning_in_calls() -> Iterator[None]:
    """Let the next calls of this process measure, whatever they have picked before."""
    before = os.environ.get(environment.TUNE)
    os.environ[environment.TUNE] = "force"
    tuning.forget()
    try:
        yield
    finally:
        if before is None:
            del os.environ[environment.TUNE]
        else:
            os.environ[environment.TUNE] = before


def _print_table(results: dict[Problem, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("problem", "kernel", "queries x keys", "warps", "stages", title="fastest tiles")
    for problem, rows in results.items():
        for kernel, config in rows.items():
            tile = f"{config.block_m} x {config.block_n}"
            table.add_row(str(problem), kernel, tile, str(config.num_warps), str(config.num_stages))
    Console().print(table)


def _powers_of_two(low: int, high: int) -> list[int]:
    """Those between the powers that `low` rounds up to and `high` rounds up to."""
    first, last = ((value - 1).bit_length() for value in (low, high))
    return [1 << exponent for exponent in range(first, last + 1)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attn-triangle-tune", description=__doc__)
    parser.add_argument(
        "--min-n", type=_positive, default=16, help="fewest residues (default: %(default)s)"
    )
    parser.add_argument(
        "--max-n", type=_positive, default=1024, help="most residues (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        type=_dtypes,
        default=[torch.bfloat16],
        help=f"of {', '.join(_DTYPES)}, comma-separated, or all (default: bfloat16)",
    )
    parser.add_argument(
        "--h", type=_integers, default=[4], help="heads, comma-separated (default: 4)"
    )
    parser.add_argument(
        "--d", type=_integers, default=[32], help="head dims, comma-separated (default: 32)"
    )
    parser.add_argument(
        "--device", type=_device, default="cuda", help="GPU to measure on (default: cuda)"
    )
    parser.add_argument("--force", action="store_true", help="measure again what is on disk")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be cuda or cuda:N, got {text!r}") from None


def _integers(text: str) -> list[int]:
    return [_positive(word) for word in text.split(",")]


def _dtypes(text: str) -> list[torch.dtype]:
    if text == "all":
        return list(_DTYPES.values())
    words = text.split(",")
    if unknown := [word for word in words if word not in _DTYPES]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(_DTYPES)} or all, got {unknown}")
    return [_DTYPES[word] for word in words]


if __name__ == "__main__":
    sys.exit(main())
