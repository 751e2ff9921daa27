"""Generate for many requests at a time: ``python -m benchmarks.serving --device cuda``.

A random model of LLaMA's shape serves requests of different lengths: by continuous batching through
the paged cache of attn-paged, and by ``generate()`` on padded batches, its own way of serving many.
Writes results/<device>/serving-<date>.json and a plot of the tokens generated over time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attn_paged.huggingface import ContinuousBatching, cache_for
from benchmarks.providers import subject
from benchmarks.results import ROOT, Result, new_result, path_for

_BLOCK = 16
_VOCABULARY = 32000
# Hidden size, layers, query heads, key heads.
SIZES = {"tiny": (64, 2, 4, 2), "1b": (2048, 16, 32, 8), "8b": (4096, 32, 32, 8)}


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens to generate."""

    prompt: list[int]
    count: int


def requests(number: int, longest_prompt: int, longest_answer: int) -> list[Request]:
    """Draw requests with lengths from 1 to the longest, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, count: int = 1) -> list[int]:
        return torch.randint(1, high + 1, (count,), generator=generator).tolist()

    return [
        Request(draw(_VOCABULARY - 1, draw(longest_prompt)[0]), draw(longest_answer)[0])
        for _ in range(number)
    ]


def random_model(size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Make a LLaMA with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, heads_kv = SIZES[size]
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads_kv,
        max_position_embeddings=1 << 16,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def serve_paged(model: Any, work: Sequence[Request]) -> Iterator[int]:
    """Continuous batching; yields how many tokens have been generated after each step."""
    tokens = sum(len(request.prompt) + request.count + _BLOCK for request in work)
    batching = ContinuousBatching(model, cache_for(model, -(-tokens // _BLOCK), _BLOCK))
    for request in work:
        batching.add(request.prompt, request.count)
    done = 0
    while not batching.is_idle:
        done += sum(map(len, batching.step().values()))
        yield done


def serve_padded(model: Any, work: Sequence[Request], batch: int) -> Iterator[int]:
    """generate() on padded batches, each as long as its longest answer."""
    model.set_attn_implementation("sdpa")
    done = 0
    for start in range(0, len(work), batch):
        part = work[start : start + batch]
        width = max(len(request.prompt) for request in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(part):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(request.count for request in part),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        done += sum(request.count for request in part)
        yield done


def measure(steps: Iterator[int], total: int, name: str) -> list[tuple[float, int]]:
    """Run to the end with a progress bar; return seconds and tokens done, step by step."""
    points = [(0.0, 0)]
    start = time.monotonic()
    for done in steps:
        points.append((time.monotonic() - start, done))
        bar = "#" * (30 * done // total)
        rate = done / points[-1][0]
        if sys.stderr.isatty() or done == total:
            text = f"\r{name:8s} [{bar:30s}] {done}/{total} {rate:.0f} tokens/s"
            print(text, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return points


def plot(curves: dict[str, list[tuple[float, int]]], title: str, path: Path) -> None:
    """Draw tokens generated over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        rate = points[-1][1] / points[-1][0]
        axes.plot(*zip(*points, strict=True), label=f"{name}: {rate:,.0f} tokens/s")
    axes.set(xlabel="seconds", ylabel="tokens of finished requests", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str]) -> int:
    """Measure both ways and write what came of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=1024, help="longest prompt")
    parser.add_argument("--answer", type=int, default=256, help="longest answer")
    parser.add_argument("--batch", type=int, default=64, help="requests of a padded batch")
    parser.add_argument("--out", type=Path, default=ROOT)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(options.size, device, dtype)
    work = requests(options.requests, options.prompt, options.answer)
    total = sum(request.count for request in work)
    ways = {
        "paged": lambda: serve_paged(model, work),
        "padded": lambda: serve_padded(model, work, options.batch),
    }
    curves = {}
    for name, serve in ways.items():
        list(serve())  # compiles kernels and lets the allocator grow
        curves[name] = measure(serve(), total, name)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    record = new_result(subject("attn-paged"), device, settings)
    write(record, curves, path_for(record, options.out).with_name(f"serving-{record.date}.json"))
    return 0


def write(record: Result, curves: dict[str, list[tuple[float, int]]], path: Path) -> None:
    """Write the numbers, a plot and a page of both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rates = {name: points[-1][1] / points[-1][0] for name, points in curves.items()}
    text = json.dumps({**asdict(record), "tokens_per_second": rates, "points": curves})
    path.write_text(text + "\n", encoding="utf-8")
    title = "{requests} requests, prompts of up to {prompt} and answers of up to {answer} tokens"
    title = title.format(**record.settings)
    plot(curves, title, path.with_suffix(".png"))
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    rows = "\n".join(f"| {name} | {rate:,.0f} |" for name, rate in rates.items())
    page = (
        f"{record.device['name']}, {record.date}: {versions}. A random LLaMA of the size of "
        f"{record.settings['size']}. {title}. paged: continuous batching through attn-paged; "
        f"padded: `generate()` of transformers on batches of {record.settings['batch']}.\n\n"
        f"![{path.stem}]({path.stem}.png)\n\n| way | tokens/s |\n|---|---:|\n{rows}\n"
    )
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    print(", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
