"""A data set of coloured squares, a model of a few channels, and a silent listener."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastvit.builtin import recipe_for
from fastvit.config import Preprocessing
from fastvit.parallel import World
from fastvit.recipes import Recipe

SIDE = 8
CPU = World(torch.device("cpu"))
PREPROCESSING = Preprocessing((3, SIDE, SIDE), (0.5,) * 3, (0.25,) * 3, 1.0)


def deliver(kind: int) -> None:
    """Send a signal to this process, which must handle it: it would end otherwise."""
    handler = signal.getsignal(kind)
    assert callable(handler), f"the loop has no handler of {kind}: {handler}"
    signal.raise_signal(kind)


class Tiny(nn.Module):
    """Conv, norm, dropout (so that a step draws random numbers), classifier."""

    def __init__(self, num_classes: int = 3, width: int = 6, drop: float = 0.2):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


@dataclass
class Recorder:
    """A listener that remembers; `on_step` may interfere."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    on_step: Callable[[Any], None] = lambda progress: None

    def started(self, engine, position) -> None:
        self.engine, self.first = engine, position

    def stepped(self, progress) -> None:
        self.losses.append(progress.loss)
        self.on_step(progress)

    def evaluating(self, done, images) -> None:
        pass

    def epoch_ended(self, row, best) -> None:
        self.rows.append(row)

    def noted(self, text) -> None:
        self.notes.append(text)


def write_images(place: Path, classes=("a", "b", "c"), each: int = 8) -> None:
    """Noise around a colour of each class's own, as PNG."""
    rng = np.random.default_rng(len(str(each)))
    for label, name in enumerate(classes):
        (place / name).mkdir(parents=True)
        for index in range(each):
            pixels = rng.integers(0, 90, (12, 12, 3))
            pixels[..., label % 3] += 130
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(place / name / f"{index}.png")


def small(**values: Any) -> Recipe:
    """The recipe `small`, smaller: 3 updates of 8 images an epoch, 2 epochs."""
    base = {
        "epochs": 2,
        "warmup_epochs": 1,
        "image_size": SIDE,
        "batch_size": 8,
        "micro_batch": 8,
        "mixup": 0.2,
        "cutmix": 1.0,
        "hflip": 0.5,
        "erase_prob": 0.5,
        "layer_scale_init": None,
        "lr": 0.02,
    }
    return recipe_for("small", "tiny").with_values(**{**base, **values})
