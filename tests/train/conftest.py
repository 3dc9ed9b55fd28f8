"""Fixtures of the training tests; what they are made of is in `train_helpers`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from train_helpers import CPU, PREPROCESSING, Recorder, Tiny, write_images

from fastvit.data import Splits, open_splits
from fastvit.recipes import Recipe
from fastvit.run import Job, Outcome
from fastvit.train import train


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with 24 training and 12 validation images of 3 classes."""
    write_images(tmp_path / "data" / "train")
    write_images(tmp_path / "data" / "val", each=4)
    return tmp_path / "data"


@pytest.fixture
def splits(images) -> Splits:
    return open_splits(str(images))


@pytest.fixture
def run(splits, tmp_path):
    """Trains a `Tiny` from the same first weights each time."""
    torch.manual_seed(1)
    first = Tiny()

    def run(
        recipe: Recipe, name: str = "run", listener: Recorder | None = None, **options
    ) -> tuple[Recorder, Outcome]:
        folder = tmp_path / name
        model = options.pop("model", first)
        folder.mkdir(exist_ok=True)
        job = Job(
            recipe,
            options.pop("splits", splits),
            PREPROCESSING,
            folder,
            CPU,
            **options,
        )
        listener = listener or Recorder()
        return listener, train(copy.deepcopy(model), job, listener)

    return run
