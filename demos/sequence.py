"""Train a small EvoAttention classifier on digits that come row by row, then stream some to it.

Usage: python demos/sequence.py [--epochs 20]
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from attn_evo import EvoAttention, EvoState
from vit import MEAN, SIDE, STD, Digits, accuracy, digits

REQUIRED_ACCURACY = 0.93
STREAMED = 20  # digits that are shown to the trained model token by token
STREAM_TOLERANCE = 1e-4  # of the scores
BATCH_SIZE = 64
LEARNING_RATE = 4e-3


class Block(nn.Module):
    """Pre-norm block of causal EvoAttention and a small MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attend = EvoAttention(dim, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(
        self, x: torch.Tensor, state: EvoState | None = None
    ) -> tuple[torch.Tensor, EvoState]:
        """Map the next tokens (B, L, C) to tokens, and the state before them to that behind."""
        out, state = self.attend.step(self.norm(x), state)
        x = x + out
        return x + self.mlp(x), state


class Classifier(nn.Module):
    """Names a digit from its rows, one token each, by what the last of them has seen."""

    def __init__(self, dim: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE, dim)
        self.position = nn.Parameter(0.3 * torch.randn(SIDE, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 1, 8, 8) to the scores of the ten digits."""
        x = self._tokens(images)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x[:, -1])

    @torch.no_grad()
    def stream(self, images: torch.Tensor) -> torch.Tensor:
        """As `forward`, from one token at a time: each layer keeps two vectors a head."""
        states: list[EvoState | None] = [None] * len(self.blocks)
        for token in self._tokens(images).split(1, dim=1):
            x = token
            for index, block in enumerate(self.blocks):
                x, states[index] = block(x, states[index])
        return self.head(x[:, -1])

    def _tokens(self, images: torch.Tensor) -> torch.Tensor:
        rows = ((images - MEAN) / STD).flatten(1, 2)
        return self.embed(rows) + self.position


def train(data: Digits, epochs: int, seed: int = 0) -> Classifier:
    """Train a classifier and print a line for each epoch."""
    torch.manual_seed(seed)
    model = Classifier().to(data.train_images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = epochs * math.ceil(len(data.train_labels) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for epoch in range(epochs):
        start, losses = time.perf_counter(), []
        shuffled = torch.randperm(len(data.train_labels)).to(data.train_labels.device)
        for batch in shuffled.split(BATCH_SIZE):
            loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # poles of the gate have steep sides
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch + 1:2}: loss {sum(losses) / len(losses):.3f}, "
            f"held-out accuracy {accuracy(model, data):.1%}, {seconds:.1f} s"
        )
    return model


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 where the model learned its digits and streaming gives the same scores."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="default %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = digits(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = train(data, options.epochs)

    images = data.test_images[:STREAMED]
    with torch.no_grad():
        difference = (model.stream(images) - model(images)).abs().max().item()
    reached = accuracy(model, data)
    print(f"held-out accuracy {reached:.1%}, required {REQUIRED_ACCURACY:.0%}")
    print(f"token by token the scores differ by {difference:.1e} at most")
    return int(reached < REQUIRED_ACCURACY or difference > STREAM_TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
