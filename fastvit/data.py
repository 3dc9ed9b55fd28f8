"""Data sets: folders of images and timm's schemes, checked before any work begins.

timm reads them (`create_dataset`, `create_transform`); what is added are the checks:
classes that are empty, missing or in another order, and a clear word for each.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset, create_transform
from timm.utils.misc import natural_key
from torch import Tensor

from fastvit.batches import ImageSource
from fastvit.config import Preprocessing
from fastvit.errors import DataError, RecipeError
from fastvit.images import mend_posterise
from fastvit.recipes import Augment
from fastvit.schemes import TimmImages, open_scheme, scheme_of
from fastvit.shards import ShardImages, same_numbers
from fastvit.streams import StreamImages

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid")}
_LISTED = 5


@dataclass(frozen=True)
class Splits:
    """What is trained on and what is held out, with the same classes in one order."""

    train: ImageSource
    val: ImageSource
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def open_splits(
    data: str,
    *,
    root: str | None = None,
    names: tuple[str, str] = ("train", "validation"),
    channels: int = 3,
) -> Splits:
    """Training and validation images, checked.

    Args:
        data: a folder with `train/` and `val/` (or `validation/`), one sub-folder a
            class; or a timm data set, as `torch/cifar10` or `hfds/NAME`.
        root: where a timm data set lies.
        names: of the two splits of a timm data set.

    Raises:
        DataError: a folder is missing or empty, or classes differ in number or order.
    """
    mode = _mode(channels)
    if scheme_of(data):
        return _scheme_splits(data, root, names, mode)
    base = _folder(data)
    kinds = ("train", "val")
    places = [_split_folder(base, *pair) for pair in zip(kinds, names, strict=True)]
    classes = class_folders(places[0])
    if len(classes) < 2:
        raise DataError(
            f"{places[0]} has one class, {classes[0]}: there is nothing to tell apart.",
            hint="Make one sub-folder a class, two or more.",
        )
    theirs = class_folders(places[1])
    _same_classes(data, (places[0].name, places[1].name), classes, theirs)
    sources = [open_folder(place, classes, mode) for place in places]
    return Splits(*sources, classes, tuple(n for p in places for n in _loose(p)))


def open_for_evaluation(
    data: str,
    *,
    root: str | None = None,
    split: str | None = None,
    channels: int = 3,
    classes: tuple[str, ...] = (),
    count: int = 0,
) -> ImageSource:
    """Images to evaluate on: `val/` of a folder, or its class folders themselves.

    Args:
        split: another sub-folder, or a split of a timm data set.
        classes: the model's class names. Where the data's are among them, images get
            the model's indices, also where some classes have no folder.
        count: how many classes the model has, for data whose classes are numbers.

    Raises:
        DataError: see `open_splits`.
    """
    mode = _mode(channels)
    if scheme_of(data):
        source = open_scheme(data, root, split or "validation", mode)
        numbers = isinstance(source, ShardImages) and source.numbered
        if numbers and len(source.class_names) <= count:
            names = classes or tuple(str(number) for number in range(count))
            return source.with_classes(names)
        return source
    if split is not None and not split.strip():
        raise DataError("--split is empty.", hint="Name a sub-folder of DATA.")
    place = _evaluation_folder(_folder(data), split)
    own = class_folders(place)
    known = bool(classes) and set(own) <= set(classes)
    return open_folder(place, classes if known else own, mode)


def open_folder(place: Path, classes: tuple[str, ...], mode: str) -> TimmImages:
    """The images of one split, none of whose class folders is empty.

    Raises:
        DataError: a class folder holds no image, or only folders.
    """
    mapping = {name: index for index, name in enumerate(classes)}
    _refuse_nested(place)
    try:
        dataset = create_dataset(
            "", root=str(place), class_map=mapping, search_split=False
        )
    except RuntimeError as error:
        raise DataError(
            f"{place} holds no image in its class folders.",
            hint="Images end in .png, .jpg or .jpeg.",
        ) from error
    source = TimmImages(dataset, classes, mode)
    counts = source.counts() or Counter()
    present = class_folders(place)
    empty = [name for name in present if not counts[mapping[name]]]
    if empty:
        raise DataError(
            f"{place}: {_count(empty, 'class')} without images ({_some(empty)}).",
            hint="Add images (.png, .jpg, .jpeg) or remove the folder.",
        )
    return source


def _refuse_nested(place: Path) -> None:
    """See that class folders hold no folders, of which timm takes some and not others.

    It follows links as well: one that leads back up would be read forty times over.

    Raises:
        DataError: one does.
    """
    for name in class_folders(place):
        for entry in os.scandir(place / name):
            if entry.is_dir() and not entry.name.startswith("."):
                raise DataError(
                    f"{entry.path} is a folder inside a class folder.",
                    hint="Class folders hold images, not folders: move or remove it.",
                )


def class_folders(place: Path) -> tuple[str, ...]:
    """The classes of a split, in timm's order: by name, numbers by value."""
    names = [e.name for e in place.iterdir() if e.is_dir() and e.name[0] != "."]
    if not names:
        raise DataError(
            f"{place} holds no class folders.", hint="Make one sub-folder a class."
        )
    return tuple(sorted(names, key=natural_key))


def training_transform(
    augment: Augment, preprocessing: Preprocessing
) -> Callable[[Image.Image], Tensor]:
    """timm's random augmentation and normalisation, image to (C, H, W).

    Raises:
        RecipeError: timm has no such policy of `auto_augment`.
    """
    side = augment.image_size
    options: dict[str, Any] = {
        "input_size": (preprocessing.input_size[0], side, side),
        "is_training": True,
        "scale": augment.crop_scale,
        "ratio": augment.crop_ratio,
        "hflip": augment.hflip,
        "color_jitter": augment.color_jitter,
        "auto_augment": augment.auto_augment or None,
        "interpolation": augment.interpolation,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "re_prob": augment.erase_prob,
        "re_mode": augment.erase_mode,
    }
    try:
        transform = create_transform(**options)
    except Exception as error:  # timm parses the text with asserts and lookups
        raise RecipeError(
            f"auto_augment={augment.auto_augment} is no policy that timm can read: "
            f"{type(error).__name__}: {error}.",
            hint="As rand-m9-mstd0.5-inc1, augmix-m3-w3, original, v0, or empty for "
            "none.",
        ) from error
    mend_posterise(transform)
    return transform


def evaluation_transform(
    preprocessing: Preprocessing,
) -> Callable[[Image.Image], Tensor]:
    """timm's resize, centre crop and normalisation, image to (C, H, W)."""
    return create_transform(
        input_size=preprocessing.input_size,
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
    )


def _mode(channels: int) -> str:
    if channels not in MODES:
        raise DataError(
            f"the model takes {channels} channels, which no image file has.",
            hint="Images have 1, 3 or 4 channels.",
        )
    return MODES[channels]


def _folder(data: str) -> Path:
    base = Path(data)
    if data.strip() and base.is_dir():
        return base
    if not data.strip():
        raise DataError(
            "DATA is empty.", hint="Name a folder; . is the one you are in."
        )
    what = "is a file, not a folder" if base.exists() else "does not exist"
    raise DataError(
        f"{data} {what}.",
        hint="DATA is a folder with train/ and val/, or a timm data set as "
        "torch/cifar10 or wds/; `fastvit data mnist DIR` makes one.",
    )


def _scheme_splits(
    data: str, root: str | None, names: tuple[str, str], mode: str
) -> Splits:
    train, val = (open_scheme(data, root, name, mode) for name in names)
    if isinstance(train, ShardImages) and isinstance(val, ShardImages):
        train, val = same_numbers(train, val)
    _same_classes(data, names, train.class_names, val.class_names)
    notes = list(getattr(train, "notes", ()))
    if isinstance(train, StreamImages):
        notes.append(
            f"{data} is read from front to back: a run that continues reads its epoch "
            "again up to where it stopped."
        )
    return Splits(train, val, train.class_names, tuple(notes))


def _evaluation_folder(base: Path, split: str | None) -> Path:
    """The sub-folder with the held-out images, or the folder itself."""
    names = _FOLDERS["val"]
    if split is not None:
        names = next((known for known in _FOLDERS.values() if split in known), (split,))
        names = (split, *names)
    found = [base / name for name in names if (base / name).is_dir()]
    if found or split is None:
        return found[0] if found else base
    has = sorted(entry.name for entry in base.iterdir() if entry.is_dir())
    raise DataError(
        f"{base} has no {split}/.",
        hint=f"It has {_some(has)}." if has else "It has no folders at all.",
    )


def _split_folder(base: Path, kind: str, asked: str) -> Path:
    """The folder of a split: that of the recipe's name, or of a usual one."""
    usual = _FOLDERS[kind]
    names = usual if asked in usual else (asked,)
    for name in names:
        if (base / name).is_dir():
            return base / name
    wanted = " or ".join(f"{name}/" for name in names)
    found = sorted(entry.name for entry in base.iterdir() if entry.is_dir())
    raise DataError(
        f"{base} has no {wanted}.",
        hint=f"It has {_some(found)}." if found else "It has no folders at all.",
    )


def _same_classes(
    data: str,
    splits: tuple[str, ...],
    train: tuple[str, ...],
    val: tuple[str, ...],
) -> None:
    if train == val:
        return
    first, second = splits
    missing = [name for name in train if name not in val]
    extra = [name for name in val if name not in train]
    said = [
        *([f"{second} lacks {_some(missing)}"] if missing else []),
        *([f"{second} has {_some(extra)} besides"] if extra else []),
    ]
    reason = ", ".join(said) or "they come in another order"
    raise DataError(
        f"{data}: {first} has {_count(train, 'class')} and {second} "
        f"{_count(val, 'class')}: {reason}.",
        hint="Both need the same classes, so that an index means one class.",
    )


def _loose(place: Path) -> list[str]:
    kinds = (".png", ".jpg", ".jpeg")
    loose = [e for e in os.scandir(place) if e.name.lower().endswith(kinds)]
    if not loose:
        return []
    return [f"{len(loose)} images in {place} lie beside the class folders: not used."]


def _count(names: Any, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{len(names)} {noun if len(names) == 1 else plural}"


def _some(names: Any) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
