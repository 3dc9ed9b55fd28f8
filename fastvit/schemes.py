"""timm's names of data sets: `torch/`, `hfds/`, `wds/`, `hfids/`, `tfds/`.

The first two give any image by its index. So do the shards of `wds/` once they are
indexed. What can only be read from front to back is a stream.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset

from fastvit.batches import ImageSource
from fastvit.errors import DataError
from fastvit.images import as_mode
from fastvit.shardlists import find_shards
from fastvit.shards import index_shards
from fastvit.streams import StreamImages

SCHEMES = ("torch", "hfds", "wds", "hfids", "tfds")
_STREAMS = ("wds", "hfids", "tfds")
_PACKAGES = {
    "hfds": ("datasets",),
    "hfids": ("datasets",),
    "tfds": ("tensorflow", "tensorflow_datasets"),
    "wds": ("webdataset",),
}


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
            return as_mode(image, self.mode), int(target)
        content, target, *_ = self._reader[index]
        with content:
            return as_mode(Image.open(content), self.mode), int(target)

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


def scheme_of(data: str) -> str:
    """The scheme of a timm data set; empty for a folder."""
    scheme, slash, _ = data.partition("/")
    known = slash and scheme.lower() in SCHEMES and not Path(data).exists()
    return scheme.lower() if known else ""


def open_scheme(data: str, root: str | None, split: str, mode: str) -> ImageSource:
    """A split of a timm data set.

    Raises:
        DataError: its library is missing, it cannot be opened or has no class names.
    """
    scheme = scheme_of(data)
    if scheme == "wds" and not _is_remote(split):
        shards = find_shards(data, _shard_folder(data, root), split)
        if shards.indexable:
            return index_shards(data, shards, mode)
    _check_packages(data, scheme)
    if scheme in _STREAMS:
        stream = StreamImages(data, root or ".", split, mode)
        dataset = _opened(data, split, lambda: stream.dataset(1, training=False))
        stream.class_names = _class_names(data, dataset)
        stream.size = _length(data, split, dataset)
        return stream
    dataset = _opened(
        data, split, lambda: create_dataset(data, root=root or ".", split=split)
    )
    _length(data, split, dataset)
    return TimmImages(dataset, _class_names(data, dataset), mode)


def _opened(data: str, split: str, make: Any) -> Any:
    try:
        return make()
    except ImportError as error:
        raise DataError(
            f"{data} needs a package that is not installed: {error}."
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{data}, split {split!r}, cannot be opened: {reason.rstrip('.')}.",
            hint="Check its name, --data-root and the split (eval: --split, train: "
            "--set val_split=NAME).",
        ) from error


def _length(data: str, split: str, dataset: Any) -> int:
    # Of a stream the length is this process's share; its reader knows the whole.
    size = getattr(getattr(dataset, "reader", None), "num_samples", len(dataset))
    if not size and scheme_of(data) in _STREAMS:
        raise DataError(
            f"{data}, split {split!r}, does not say how many images it has.",
            hint="Write it behind the pattern: 'train-{000..099}.tar.gz|128000'.",
        )
    if not size:
        raise DataError(f"{data}, split {split!r}, holds no images.")
    return size


def _check_packages(data: str, scheme: str) -> None:
    """See that what timm needs for a scheme is there, before timm prints about it.

    Raises:
        DataError: it is not.
    """
    wanted = _PACKAGES.get(scheme, ())
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(name.replace("_", "-") for name in missing)
        verb = "are" if len(missing) > 1 else "is"
        raise DataError(
            f"{data} needs {' and '.join(missing)}, which {verb} not installed.",
            hint=f"pip install {names}",
        )


def _is_remote(split: str) -> bool:
    return "://" in split or split.startswith("pipe:")


def _shard_folder(data: str, root: str | None) -> Path:
    """The folder of the shards: NAME of wds/NAME under the root, or the root itself."""
    name = data.partition("/")[2]
    below = Path(root or ".") / name
    return Path(root) if root and not below.is_dir() else below


def _class_names(data: str, dataset: Any) -> tuple[str, ...]:
    reader = getattr(dataset, "reader", None)
    mapping = getattr(reader, "class_to_idx", None) or getattr(
        dataset, "class_to_idx", None
    )
    if mapping:
        return tuple(str(k) for k in sorted(mapping, key=lambda key: mapping[key]))
    names = getattr(dataset, "classes", None) or _told_names(reader)
    if names:
        return tuple(str(name) for name in names)
    raise DataError(
        f"{data} does not say what its classes are.",
        hint="Write their names as class_names into _info.json beside the shards."
        if scheme_of(data) == "wds"
        else "",
    )


def _told_names(reader: Any) -> Any:
    features = getattr(getattr(reader, "dataset", None), "features", {})
    names = getattr(features.get("label"), "names", None)
    return names or getattr(reader, "info", {}).get("class_names")
