"""A small vision transformer on handwritten digits, trained with any attention function."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from attn_flash import flash_attn_qkvpacked_func

Attend = Callable[[torch.Tensor], torch.Tensor]  # qkv (B, S, 3, H, D) to out (B, S, H, D)

SIDE = 8  # pixels of a digit's side
PATCH = 3  # pixels of a patch's side
GRID = SIDE - PATCH + 1  # patches along a side: they overlap
MEAN, STD = 0.305, 0.376  # of the pixels


def attend_flash(qkv: torch.Tensor) -> torch.Tensor:
    """Attention by attn-flash."""
    return flash_attn_qkvpacked_func(qkv)


def attend_sdpa(qkv: torch.Tensor) -> torch.Tensor:
    """Attention by torch itself."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@dataclass(frozen=True)
class Digits:
    """Images (B, 1, 8, 8) with values from 0 to 1 and their labels (B,), split in two."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def digits(device: torch.device) -> Digits:
    """The 1797 scanned digits that scikit-learn ships, a quarter of them held out."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.25, random_state=0, stratify=labels
    )
    parts = images[train], labels[train], images[test], labels[test]
    return Digits(*(part.to(device) for part in parts))


class Block(nn.Module):
    """Pre-norm transformer block whose attention is a plain function."""

    def __init__(self, dim: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads = heads
        self.attend = attend
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, S, C) to tokens."""
        x = x + self.to_out(self.attend(self.qkv(x)).flatten(2))
        return x + self.mlp(x)

    def qkv(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of the tokens: (B, S, 3, H, D)."""
        return self.to_qkv(self.norm(x)).unflatten(2, (3, self.heads, -1))


class ViT(nn.Module):
    """Overlapping patches, a class token, a few blocks, one linear head."""

    def __init__(self, attend: Attend, dim: int = 64, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, kernel_size=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(0.3 * torch.randn(1, 1 + GRID**2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, attend) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 1, 8, 8) to the scores of the ten digits."""
        x = self.tokens(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Class token and patches of images, with their positions: (B, S, C)."""
        patches = self.embed((images - MEAN) / STD).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(images), -1, -1), patches], 1) + self.position

    def last_qkv(self, images: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of the last block: (B, S, 3, H, D)."""
        x = self.tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].qkv(x)


class Training:
    """One ViT on its way; the same seed gives the same weights and batches for every `attend`.

    After each epoch `losses` (its mean), `accuracies` and `seconds` are one longer.
    """

    def __init__(
        self,
        data: Digits,
        attend: Attend,
        epochs: int,
        *,
        batch_size: int = 64,
        learning_rate: float = 2e-3,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.model = ViT(attend).to(data.train_images.device)
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.seconds: list[float] = []
        self._data = data
        self._batch_size = batch_size
        self._order = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, weight_decay=0.05
        )
        steps = epochs * math.ceil(len(data.train_labels) / batch_size)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(self._optimizer, learning_rate, steps)

    def epoch(self) -> None:
        """Show the model every training digit once."""
        start = time.perf_counter()
        shuffled = torch.randperm(len(self._data.train_labels), generator=self._order)
        batches = shuffled.to(self._data.train_labels.device).split(self._batch_size)
        self.losses.append(torch.stack([self._step(batch) for batch in batches]).mean().item())
        self.seconds.append(time.perf_counter() - start)
        self.accuracies.append(accuracy(self.model, self._data))

    def _step(self, batch: torch.Tensor) -> torch.Tensor:
        scores = self.model(self._data.train_images[batch])
        loss = F.cross_entropy(scores, self._data.train_labels[batch])
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        return loss.detach()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the held-out digits the model names rightly."""
    return (model(data.test_images).argmax(1) == data.test_labels).float().mean().item()


@torch.no_grad()
def class_attention(model: ViT, images: torch.Tensor) -> torch.Tensor:
    """Where the class token of the last block looks, mean over heads: (B, GRID, GRID).

    The attention call keeps no probabilities, yet its log-sum-exp gives them back row by row:
    p_j = exp(scale q k_j - lse).
    """
    qkv = model.last_qkv(images)
    _, lse, _ = flash_attn_qkvpacked_func(qkv, return_attn_probs=True)
    q, k, _ = qkv.unbind(2)
    scores = torch.einsum("bhd,bjhd->bhj", q[:, 0], k) * q.shape[-1] ** -0.5
    probs = torch.exp(scores - lse[..., :1])
    return probs[..., 1:].mean(1).unflatten(1, (GRID, GRID))
