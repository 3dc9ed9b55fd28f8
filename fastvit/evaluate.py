"""Evaluation: one pass over the images, each model on the same batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.batches import Batch, Problem

Run = Callable[[Tensor], Tensor]
TOP = 5


@dataclass
class Predictions:
    """What one model said of each image, in the order of evaluation.

    Attributes:
        seconds: spent in the model alone.
    """

    indices: Tensor  # (N,)
    targets: Tensor  # (N,)
    predicted: Tensor  # (N,)
    in_top5: Tensor  # (N,) bool
    losses: Tensor  # (N,) cross entropy, nats
    confidence: Tensor  # (N,) probability of the predicted class
    classes: int
    seconds: float = 0.0

    @property
    def images(self) -> int:
        """Images that were evaluated."""
        return len(self.targets)

    @property
    def top1(self) -> float:
        """Per cent of images whose most likely class is right."""
        return _percent(self.predicted == self.targets)

    @property
    def top5(self) -> float:
        """Per cent of images whose class is among the five most likely."""
        return _percent(self.in_top5)

    @property
    def loss(self) -> float:
        """Mean cross entropy, nats."""
        return self.losses.double().mean().item() if self.images else float("nan")

    @property
    def images_per_second(self) -> float:
        """Images through the model a second, reading them not counted."""
        return self.images / self.seconds if self.seconds else float("nan")

    def confusion(self) -> Tensor:
        """Counts (K, K): row the right class, column the predicted one."""
        cells = self.targets * self.classes + self.predicted
        counts = torch.bincount(cells, minlength=self.classes**2)
        return counts.view(self.classes, self.classes)

    def calibration_error(self, bins: int = 15) -> float:
        """Expected calibration error, Σ (n_b / n) |accuracy_b - confidence_b|.

        Bins of equal width over the confidence (Guo et al., 2017).
        """
        if not self.images:
            return float("nan")
        place = (self.confidence.double() * bins).long().clamp_(0, bins - 1)
        right = (self.predicted == self.targets).double()
        gap = torch.zeros(bins, dtype=torch.float64)
        gap.index_add_(0, place, right - self.confidence.double())
        return (gap.abs().sum() / self.images).item()


@dataclass
class Evaluation:
    """The predictions of each form, and the images that could not be read."""

    forms: dict[str, Predictions]
    problems: list[Problem] = field(default_factory=list)


def evaluate(
    forms: Mapping[str, Run],
    batches: Iterable[Batch],
    device: torch.device,
    *,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    progress: Callable[[int], bool] | None = None,
    warm_up: bool = False,
) -> Evaluation | None:
    """Run every form on every batch.

    Args:
        forms: name to a callable from images (B, C, H, W) to logits (B, K).
        progress: told how many images are done; False ends the evaluation.
        warm_up: every form runs the first batch once more, before the clock runs:
            a first call allocates, chooses kernels and compiles.

    Returns:
        None where `progress` ended it.
    """
    rows: dict[str, list[dict[str, Tensor]]] = {name: [] for name in forms}
    seconds = dict.fromkeys(forms, 0.0)
    problems: list[Problem] = []
    classes, done = 0, 0
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for batch in batches:
        problems.extend(batch.problems)
        if not len(batch.targets):
            continue
        images = batch.images.to(device, non_blocking=True, memory_format=layout)
        if warm_up and not done:
            for run in forms.values():
                with torch.no_grad(), _autocast(device, autocast):
                    run(images)
        for name, run in forms.items():
            with torch.no_grad(), _autocast(device, autocast):
                began = _now(device)
                logits = run(images)
                seconds[name] += _now(device) - began
            classes = logits.shape[1]
            rows[name].append(_judged(logits.float().cpu(), batch))
        done += len(batch.targets)
        if progress is not None and not progress(done):
            return None
    found = {name: _joined(rows[name], classes, seconds[name]) for name in forms}
    return Evaluation(found, problems)


def agreement(one: Predictions, other: Predictions) -> float:
    """Share of images to which both give the same most likely class."""
    assert torch.equal(one.indices, other.indices)
    return _percent(one.predicted == other.predicted) / 100


def _judged(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    targets = batch.targets
    likely = logits.topk(min(TOP, logits.shape[1])).indices
    predicted = likely[:, 0]
    return {
        "indices": batch.indices,
        "targets": targets,
        "predicted": predicted,
        "in_top5": (likely == targets[:, None]).any(1),
        "losses": F.cross_entropy(logits, targets, reduction="none"),
        "confidence": logits.softmax(1).gather(1, predicted[:, None])[:, 0],
    }


def _joined(rows: list[dict[str, Tensor]], classes: int, seconds: float) -> Predictions:
    kinds = {"in_top5": torch.bool, "losses": torch.float, "confidence": torch.float}
    names = ("indices", "targets", "predicted", "in_top5", "losses", "confidence")
    empty = {name: torch.empty(0, dtype=kinds.get(name, torch.long)) for name in names}
    columns = {n: torch.cat([row[n] for row in rows or [empty]]) for n in names}
    return Predictions(**columns, classes=classes, seconds=seconds)


def _percent(hits: Tensor) -> float:
    return hits.double().mean().item() * 100 if len(hits) else float("nan")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
