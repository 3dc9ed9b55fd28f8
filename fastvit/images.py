"""Where Pillow does not do what training needs: deep pixels, posterising."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image, decoded, with a model's channels of 8 bits.

    Pillow clips pixels of 16 bits to 255, so that a scan becomes white: their high
    byte is taken instead.

    Args:
        mode: Pillow's name of the channels, as RGB.

    Raises:
        ValueError: pixels are floating point numbers, whose range is not known.
    """
    if image.mode == "F":
        raise ValueError("pixels are floating point numbers of unknown range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.int64).clip(0, 0xFFFF)
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    return image.convert(mode)


def why_unreadable(error: Exception) -> str:
    """What is wrong with an image, in a few words that do not repeat its name."""
    if isinstance(error, UnidentifiedImageError):
        return "it is empty, or no image of a kind that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return reason.rstrip(".")[:200]


def posterise(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Keep so many bits of each channel; 0 leaves black.

    timm's increasing policies (`-inc1`, the paper's) draw 0 bits now and then, which
    Pillow 12 and before made black and Pillow 13 refuses.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else image.point(lambda _: 0)


def mend_posterise(transform: Any) -> None:
    """Put `posterise` in place of timm's in a composed transform."""
    for op in _operations(transform):
        if op.name.startswith("Posterize"):
            op.aug_fn = posterise


def _operations(transform: Any) -> Iterator[Any]:
    """The operations of timm's RandAugment, AugMix and AutoAugment in a transform."""
    for step in getattr(transform, "transforms", ()):
        yield from getattr(step, "ops", ())
        for policy in getattr(step, "policy", ()):
            yield from policy
