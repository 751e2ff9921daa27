"""The picture of a demo run: the loss curves of both trainings, and where the ViT looks."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch.nn import functional as F

from vit import PATCH, SIDE, Digits, Training, class_attention

INK, FLASH, SDPA, GRID_LINE = "#22272e", "#e4572e", "#2e86ab", "#e6e8eb"
GLOW = LinearSegmentedColormap.from_list("glow", ["#ffffff", "#ffd28a", FLASH])
SMOOTH = 16  # drawn points to a pixel's side
STYLE = {
    "font.size": 10,
    "axes.edgecolor": GRID_LINE,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw(path: Path, data: Digits, flash: Training, sdpa: Training, title: str) -> None:
    """Write the picture to `path`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 4), dpi=160, layout="constrained")
        curves, digits = figure.subfigures(1, 2, width_ratios=(0.62, 1), wspace=0.03)
        _curves(curves.subplots(), flash, sdpa, title)
        _attention(digits.subplots(2, 5), data, flash)
        digits.suptitle("Where the class token looks", x=0.02, ha="left", weight="bold", size=12)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white")


def _curves(axes: Axes, flash: Training, sdpa: Training, title: str) -> None:
    epochs = range(1, len(flash.losses) + 1)
    axes.plot(epochs, flash.losses, color=FLASH, linewidth=5, alpha=0.45, label="attn-flash")
    axes.plot(epochs, sdpa.losses, color=SDPA, linewidth=1.6, linestyle="--", label="torch SDPA")
    axes.set(yscale="log", xlabel="epoch", ylabel="training loss", title=title)
    axes.grid(axis="y", color=GRID_LINE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    axes.annotate(
        f"{100 * flash.accuracies[-1]:.1f} % of held-out\ndigits named rightly",
        (0.04, 0.06),
        xycoords="axes fraction",
    )


def _attention(grid: np.ndarray, data: Digits, run: Training) -> None:
    chosen = [int((data.test_labels == digit).nonzero()[0]) for digit in range(10)]
    images = data.test_images[chosen]
    with torch.no_grad():
        names = run.model(images).argmax(1).tolist()
    glow = _enlarge(_on_pixels(class_attention(run.model, images)))
    least, most = glow.amin((1, 2), keepdim=True), glow.amax((1, 2), keepdim=True)
    glow = (glow - least) / (most - least)
    for axes, name, digit, weights in zip(
        grid.flat, names, _enlarge(images[:, 0]).cpu(), glow.cpu(), strict=True
    ):
        paper = GLOW(weights.numpy())[..., :3]
        axes.imshow(paper * (1 - 0.9 * digit.numpy()[..., None]))
        axes.set_title(f"read as {name}", size=9, weight="normal", loc="center", pad=3)
        axes.set(xticks=[], yticks=[])


def _on_pixels(weights: torch.Tensor) -> torch.Tensor:
    """Share a patch's weight among the pixels it covers: (B, GRID, GRID) to (B, SIDE, SIDE)."""
    columns = weights.flatten(1)[:, None].expand(-1, PATCH**2, -1)
    return F.fold(columns, (SIDE, SIDE), PATCH)[:, 0] / PATCH**2


def _enlarge(pictures: torch.Tensor) -> torch.Tensor:
    size = (SMOOTH * SIDE, SMOOTH * SIDE)
    return F.interpolate(pictures[:, None], size, mode="bicubic")[:, 0].clamp(0, 1)
