"""WebDataset shards as images that can be asked for by index.

A shard is a tar archive whose files belong together by the name before their first
dot: `0007.jpg` and `0007.cls` are one sample. timm reads shards from front to back; an
index of where each image lies in its archive, made once, gives any image at any time,
so that such a run continues bit for bit as one on folders does.

Format: Aizman et al., "High performance I/O for large scale deep learning", 2019.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastvit.errors import DataError
from fastvit.images import as_mode
from fastvit.shardlists import Shards

IMAGES = ("jpg", "jpeg", "png", "webp")
_SAMPLE = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_ABSENT = -1


class _Row(NamedTuple):
    """Where a sample's image lies; -1 for what it lacks."""

    shard: int
    offset: int
    size: int
    target: int


@dataclass(frozen=True)
class ShardImages:
    """The samples of a split by index, in the order of the archives.

    Attributes:
        mode: Pillow's name of the channels, as RGB.
        numbered: whether the classes have no names but their numbers.
    """

    shards: Shards
    keys: tuple[str, ...]
    rows: NDArray[np.int64]  # (N, 4), see `_Row`
    class_names: tuple[str, ...]
    mode: str
    numbered: bool = True
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image, all of it decoded, and its class."""
        row = _Row(*self.rows[index].tolist())
        if row.size == _ABSENT:
            raise DataError(f"the sample has no image ({', '.join(IMAGES)})")
        if row.target == _ABSENT:
            raise DataError("the sample has no class")
        with self.shards.paths[row.shard].open("rb") as file:
            file.seek(row.offset)
            content = io.BytesIO(file.read(row.size))
        with Image.open(content) as image:
            return as_mode(image, self.mode), row.target

    def name(self, index: int) -> str:
        """The archive and the sample in it."""
        return f"{self.shards.paths[self.rows[index][0]]}:{self.keys[index]}"

    def with_classes(self, names: tuple[str, ...]) -> ShardImages:
        """The same images as some of these classes, by their numbers."""
        return replace(self, class_names=names)


def index_shards(data: str, shards: Shards, mode: str) -> ShardImages:
    """Find every sample: the headers of the archives and the labels are read.

    Raises:
        DataError: an archive is damaged, holds no sample, or no sample has a class.
    """
    keys: list[str] = []
    rows: list[_Row] = []
    unlabelled = 0
    for number, path in enumerate(shards.paths):
        before = len(rows)
        for key, row in _samples(path, number, shards.label):
            keys.append(key)
            rows.append(row)
            unlabelled += row.target == _ABSENT
        if len(rows) == before:
            raise DataError(
                f"{path} holds no samples.",
                hint="A shard has files as 0001.jpg beside 0001.cls.",
            )
    if unlabelled == len(rows):
        where = f"a {shards.label!r} in its .json" if shards.label else "a .cls"
        raise DataError(
            f"{data}: none of the {len(rows)} samples has {where}.",
            hint="The class is a whole number from 0 on, in KEY.cls beside KEY.jpg.",
        )
    table = np.array(rows, dtype=np.int64)
    highest = int(table[:, 3].max())
    names = shards.class_names or tuple(str(k) for k in range(highest + 1))
    if highest >= len(names):
        raise DataError(
            f"{data} has class {highest}, and {len(names)} names of classes.",
            hint="Mend class_names in _info.json.",
        )
    return ShardImages(
        shards, tuple(keys), table, names, mode, numbered=not shards.class_names
    )


def same_numbers(
    train: ShardImages, val: ShardImages
) -> tuple[ShardImages, ShardImages]:
    """Both splits with the classes of the one that has more, where they are numbers."""
    if not (train.numbered and val.numbered):
        return train, val
    names = max(train.class_names, val.class_names, key=len)
    lacking = sorted(set(range(len(names))) - set(train.rows[:, 3].tolist()))
    shown = ", ".join(str(label) for label in lacking[:5])
    notes = (f"{len(lacking)} classes have no training images ({shown}…).",)
    return (
        replace(train, class_names=names, notes=notes if lacking else ()),
        val.with_classes(names),
    )


class _File(NamedTuple):
    """A file of a sample; `content` only of what says the class."""

    key: str
    kind: str
    offset: int
    size: int
    content: bytes | None


def _samples(path: Path, number: int, label: str) -> Iterator[tuple[str, _Row]]:
    """Each sample of an archive and where its image is.

    Raises:
        DataError: the archive is damaged, or a class is no number.
    """
    empty = _Row(number, 0, _ABSENT, _ABSENT)
    for key, files in itertools.groupby(_files(path, label), lambda file: file.key):
        row = empty
        for file in files:
            if file.content is not None:
                row = row._replace(target=_target(path, file, label))
            elif file.kind in IMAGES and row.size == _ABSENT:
                row = row._replace(offset=file.offset, size=file.size)
        yield key, row


def _files(path: Path, label: str) -> Iterator[_File]:
    """The files of an archive that belong to samples."""
    count, says_class = 0, "json" if label else "cls"
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # or it keeps them all
                found = _SAMPLE.fullmatch(member.name)
                if not member.isreg() or found is None:
                    continue
                kind, count = found[2].lower(), count + 1
                file = archive.extractfile(member) if kind == says_class else None
                content = file.read() if file else None
                yield _File(found[1], kind, member.offset_data, member.size, content)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} is no whole tar archive: {error}, after {count} files.",
            hint="Copy it again, and compare its size with the original's.",
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _target(path: Path, file: _File, label: str) -> int:
    """The class that a .cls or .json says; negative for none, as timm has it."""
    assert file.content is not None
    said: Any = file.content.decode(errors="replace").strip()
    try:
        if label:
            said = json.loads(said)
            for part in label.split("/"):  # timm writes nested fields so
                said = said[part]
        return max(int(said), _ABSENT)
    except (ValueError, TypeError, KeyError) as error:
        where = f"{label!r} of " if label else ""
        raise DataError(
            f"{path}: {where}{file.key}.{file.kind} is {str(said)[:40]!r}, a class as "
            "a whole number was expected.",
            hint="Number the classes from 0 on.",
        ) from error
