"""Train a small vision transformer with attn-flash, then run every other package on real data.

Usage: python demos/demo.py [--out build/demo.png] [--epochs 12]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import figure
import others
import vit
from attn_core import device_info
from attn_flash import get_available_backends

REQUIRED_ACCURACY = 0.95


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 where the ViT learned its digits and every package agreed with float64."""
    options = _parse(arguments)
    console = Console()
    # Batches this small gain little from a second thread, and lose much where cores are shared.
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = device_info(device).name if device.type == "cuda" else "CPU"
    backend = get_available_backends()[0]
    console.print(f"[bold]A ViT on handwritten digits[/], on {machine}, backend {backend!r}")

    data = vit.digits(device)
    flash, sdpa = _train_both(console, data, options.epochs)
    console.print(_curves(flash, sdpa))
    if device.type == "cpu":
        console.print("on a CPU both call torch's own kernel, so the losses are the same")
    gap = max(abs(a - b) for a, b in zip(flash.losses, sdpa.losses, strict=True))
    reached = flash.accuracies[-1]
    console.print(
        f"largest difference of the losses {gap:.1e}\n"
        f"held-out accuracy [bold]{reached:.1%}[/], with SDPA {sdpa.accuracies[-1]:.1%}\n"
        f"an epoch takes {statistics.median(flash.seconds):.2f} s, "
        f"with SDPA {statistics.median(sdpa.seconds):.2f} s\n"
    )

    rows = others.rows(flash.model, data)
    console.print(_comparison(rows))
    console.print(others.vulkan())

    figure.draw(options.out, data, flash, sdpa, f"A ViT learns digits on {machine}")
    console.print(f"\npicture: {options.out}")
    return verdict(console, reached, rows)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo.png"), help="the picture")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the digits")
    return parser.parse_args(arguments)


def _train_both(
    console: Console, data: vit.Digits, epochs: int
) -> tuple[vit.Training, vit.Training]:
    """Train with attn-flash and with SDPA in turns, so that a busy machine slows both alike."""
    trainings = {
        "attn-flash": vit.Training(data, vit.attend_flash, epochs),
        "torch SDPA": vit.Training(data, vit.attend_sdpa, epochs),
    }
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=None),
        TextColumn("epoch {task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=epochs, loss=math.nan) for name in trainings}
        for _ in range(epochs):
            for name, training in trainings.items():
                training.epoch()
                progress.update(tasks[name], advance=1, loss=training.losses[-1])
    return trainings["attn-flash"], trainings["torch SDPA"]


def _curves(flash: vit.Training, sdpa: vit.Training) -> Table:
    table = Table("epoch", "loss, attn-flash", "loss, torch SDPA", "difference", "accuracy")
    rows = zip(flash.losses, sdpa.losses, flash.accuracies, strict=True)
    for epoch, (ours, theirs, accuracy) in enumerate(rows, start=1):
        table.add_row(
            str(epoch),
            f"{ours:.6f}",
            f"{theirs:.6f}",
            f"{abs(ours - theirs):.1e}",
            f"{accuracy:.1%}",
        )
    return table


def _comparison(rows: list[others.Row]) -> Table:
    table = Table("operator on real data", box=box.SIMPLE_HEAD)
    for column in ("backend", "error", "time", "plain torch"):
        table.add_column(column, no_wrap=True, justify="right")
    for row in rows:
        table.add_row(
            f"[bold]{row.package}[/] {row.shape}\n{row.what}",
            row.backend,
            f"{row.error:.1e}",
            f"{1e3 * row.seconds:.2f} ms",
            f"{1e3 * row.plain_seconds:.2f} ms",
        )
    table.caption = "error: largest difference from float64; time: median of one run"
    return table


def verdict(console: Console, reached: float, rows: list[others.Row]) -> int:
    """Say what is not as promised; the number to exit with."""
    complaints = [
        f"{row.package} is off by {row.error:.1e}, {row.tolerance:.1e} are allowed"
        for row in rows
        if not row.error <= row.tolerance
    ]
    if reached < REQUIRED_ACCURACY:
        complaints.append(f"accuracy {reached:.0%} is below {REQUIRED_ACCURACY:.0%}")
    for complaint in complaints:
        console.print(f"[red]{complaint}[/]")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
