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
from fastvit.recipes import Augment

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
SCHEMES = ("hfds", "torch")  # any image by its index
STREAMS = ("wds", "tfds", "hfids")  # one after the other
_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid")}
_LISTED = 5


@dataclass(frozen=True)
class Splits:
    """What is trained on and what is held out, with the same classes in one order."""

    train: ImageSource
    val: ImageSource
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


class TimmImages:
    """A data set of timm or torchvision whose images can be asked for by index.

    Args:
        mode: Pillow's name of the channels, as RGB.
    """

    def __init__(self, dataset: Any, class_names: tuple[str, ...], mode: str) -> None:
        self.dataset = dataset
        self.class_names = class_names
        self.mode = mode
        self._reader = getattr(dataset, "reader", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image, all of it decoded, and its class."""
        if self._reader is None:  # torchvision's give images
            image, target = self.dataset[index]
            return image.convert(self.mode), int(target)
        content, target, *_ = self._reader[index]
        with content:
            return Image.open(content).convert(self.mode), int(target)

    def name(self, index: int) -> str:
        """The path of the image, or its index."""
        if hasattr(self._reader, "samples"):
            return self._reader.filename(index, absolute=True)
        return f"image {index}"

    def counts(self) -> Counter[int] | None:
        """Images of each class, where that is known without reading them."""
        samples = getattr(self._reader, "samples", None)
        if samples is None:
            return None
        return Counter(int(target) for _, target in samples)


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
        train, val = (open_scheme(data, root, name, mode) for name in names)
        _same_classes(data, names, train.class_names, val.class_names)
        return Splits(train, val, train.class_names)
    base = _folder(data)
    places = [_split_folder(base, kind) for kind in ("train", "val")]
    classes = class_folders(places[0])
    theirs = class_folders(places[1])
    _same_classes(data, (places[0].name, places[1].name), classes, theirs)
    sources = [open_folder(place, classes, mode) for place in places]
    return Splits(*sources, classes, tuple(n for p in places for n in _loose(p)))


def open_for_evaluation(
    data: str,
    *,
    root: str | None = None,
    split: str = "validation",
    channels: int = 3,
    classes: tuple[str, ...] = (),
) -> TimmImages:
    """Images to evaluate on: `val/` of a folder, or its class folders themselves.

    Args:
        classes: the model's class names. Where the data's are among them, images get
            the model's indices, also where some classes have no folder.

    Raises:
        DataError: see `open_splits`.
    """
    mode = _mode(channels)
    if scheme_of(data):
        return open_scheme(data, root, split, mode)
    base = _folder(data)
    found = [base / name for name in _FOLDERS["val"] if (base / name).is_dir()]
    place = found[0] if found else base
    own = class_folders(place)
    known = bool(classes) and set(own) <= set(classes)
    return open_folder(place, classes if known else own, mode)


def open_folder(place: Path, classes: tuple[str, ...], mode: str) -> TimmImages:
    """The images of one split, none of whose class folders is empty.

    Raises:
        DataError: a class folder holds no image, or only folders.
    """
    mapping = {name: index for index, name in enumerate(classes)}
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
        deep = any(entry.is_dir() for entry in (place / empty[0]).iterdir())
        raise DataError(
            f"{place}: {_count(empty, 'class')} without images ({_some(empty)}).",
            hint="Class folders hold images, not folders."
            if deep
            else "Add images (.png, .jpg, .jpeg) or remove the folder.",
        )
    return source


def open_scheme(data: str, root: str | None, split: str, mode: str) -> TimmImages:
    """A split of a timm data set.

    Raises:
        DataError: its library is missing, it cannot be opened or has no class names.
    """
    scheme = scheme_of(data)
    if scheme in STREAMS:
        raise DataError(
            f"{data} can only be read from front to back, so that a run could not be "
            "resumed at the image where it stopped.",
            hint=f"Use {' or '.join(f'{name}/…' for name in SCHEMES)}, or folders.",
        )
    try:
        dataset: Any = create_dataset(data, root=root or ".", split=split)
        size = len(dataset)
    except ImportError as error:
        raise DataError(
            f"{data} needs a package that is not installed: {error}."
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{data}, split {split!r}, cannot be opened: {reason.rstrip('.')}.",
            hint="Check its name, --data-root and the splits (--set val_split=NAME).",
        ) from error
    if not size:
        raise DataError(f"{data}, split {split!r}, holds no images.")
    return TimmImages(dataset, _class_names(data, dataset), mode)


def scheme_of(data: str) -> str:
    """The scheme of a timm data set; empty for a folder."""
    scheme, slash, _ = data.partition("/")
    known = slash and scheme.lower() in (*SCHEMES, *STREAMS) and not Path(data).exists()
    return scheme.lower() if known else ""


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
        return create_transform(**options)
    except Exception as error:  # timm parses the text with asserts and lookups
        raise RecipeError(
            f"auto_augment={augment.auto_augment} is no policy that timm can read: "
            f"{type(error).__name__}: {error}.",
            hint="As rand-m9-mstd0.5-inc1, augmix-m3-w3, original, v0, or empty for "
            "none.",
        ) from error


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
    if base.is_dir():
        return base
    what = "is a file, not a folder" if base.exists() else "does not exist"
    raise DataError(
        f"{data} {what}.",
        hint="DATA is a folder with train/ and val/, or a timm data set as "
        "torch/cifar10; `fastvit data mnist DIR` makes one.",
    )


def _split_folder(base: Path, kind: str) -> Path:
    for name in _FOLDERS[kind]:
        if (base / name).is_dir():
            return base / name
    wanted = " or ".join(f"{name}/" for name in _FOLDERS[kind])
    found = sorted(entry.name for entry in base.iterdir() if entry.is_dir())
    raise DataError(
        f"{base} has no {wanted}.",
        hint=f"It has {_some(found)}." if found else "It has no folders at all.",
    )


def _class_names(data: str, dataset: Any) -> tuple[str, ...]:
    reader = getattr(dataset, "reader", None)
    mapping = getattr(reader, "class_to_idx", None) or getattr(
        dataset, "class_to_idx", None
    )
    if mapping:
        return tuple(str(k) for k in sorted(mapping, key=lambda key: mapping[key]))
    names = getattr(dataset, "classes", None)
    if names:
        return tuple(str(name) for name in names)
    features = getattr(getattr(reader, "dataset", None), "features", {})
    names = getattr(features.get("label"), "names", None)
    if names:
        return tuple(names)
    raise DataError(f"{data} does not say what its classes are.")


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
