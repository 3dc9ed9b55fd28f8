"""Which archives a split of a WebDataset is made of."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit.errors import DataError

_INFO = ("_info.json", "info.json")  # timm's, beside the shards
_SYNONYMS = (("train", "training"), ("val", "validation", "valid", "eval"))


@dataclass(frozen=True)
class Shards:
    """The archives of one split.

    Attributes:
        label: the field of the .json that has the class; empty where .cls has it.
        class_names: where the data set's information has them.
    """

    paths: tuple[Path, ...]
    label: str = ""
    class_names: tuple[str, ...] = ()

    @property
    def indexable(self) -> bool:
        """Whether all of them can be read at any place: none is compressed."""
        return all(_start(path, 2) != b"\x1f\x8b" for path in self.paths)


def find_shards(data: str, folder: Path, split: str) -> Shards:
    """The archives of a split, by what the folder says of itself.

    In this order: `split` is a pattern, as `train-{000..099}.tar`; `_info.json` has
    the split, as timm writes it; a sub-folder or archives have its name.

    Raises:
        DataError: there are none, or some of them are missing.
    """
    if not folder.is_dir():
        raise DataError(
            f"{data}: {folder} is no folder.",
            hint="--data-root is the folder of the shards, and DATA wds/.",
        )
    info = _read_info(folder)
    described = _same_name(split, info.get("splits", {}))
    names = tuple(str(name) for name in info.get("class_names", ()))
    label = ""
    if ".tar" in split or ".." in split:
        paths = _matching(folder, split.partition("|")[0])
    elif described:
        known = info["splits"][described]
        paths = [folder / name for name in known["filenames"]]
        label = known.get("alt_label", "")
    else:
        paths = _named_after(folder, split)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{data}, split {split!r}: {len(missing)} of {len(paths)} shards are not "
            f"there, the first is {missing[0]}.",
            hint="Copy them, or name the split as a pattern: train-{000..099}.tar.",
        )
    if not paths:
        raise DataError(
            f"{data}, split {split!r}: {_found(folder)}.",
            hint="Name it as a pattern (eval: --split, train: --set val_split=…), as "
            "'val-{00..09}.tar'.",
        )
    return Shards(tuple(paths), label, names)


def _read_info(folder: Path) -> dict[str, Any]:
    for path in (folder / name for name in _INFO):
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                return found if isinstance(found, dict) else {}
            except ValueError as error:
                raise DataError(f"{path} is not JSON: {error}.") from error
    return {}


def _same_name(split: str, known: Any) -> str:
    """The key among `known` that means the split; empty for none."""
    return next((name for name in _meanings(split) if name in known), "")


def _meanings(split: str) -> tuple[str, ...]:
    others = next((names for names in _SYNONYMS if split in names), ())
    return (split, *(name for name in others if name != split))


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Archives by a pattern with {000..099}, {a,b} and *."""
    found: list[Path] = []
    for name in expanded(pattern):
        wild = any(sign in name for sign in "*?[")
        found += sorted(folder.glob(name)) if wild else [folder / name]
    return found


def _named_after(folder: Path, split: str) -> list[Path]:
    for name in _meanings(split):
        inside = sorted((folder / name).glob("*.tar*")) if name else []
        word = re.compile(rf"(?:^|[^a-z]){re.escape(name)}(?:[^a-z]|$)", re.IGNORECASE)
        beside = [p for p in sorted(folder.glob("*.tar*")) if word.search(p.name)]
        if inside or beside:
            return inside or beside
    return []


def _found(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.tar*"))
    if not names:
        return f"{folder} holds no shards (.tar)"
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"none of {', '.join(names[:3])}{rest} in {folder} is of it"


def expanded(pattern: str) -> list[str]:
    """The names that `{000..003}` and `{a,b}` in a pattern stand for, in order."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        return [pattern]
    if found[3] is not None:
        parts = found[3].split(",")
    else:
        low, high, width = int(found[1]), int(found[2]), len(found[1])
        parts = [f"{number:0{width}d}" for number in range(low, high + 1)]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [f"{head}{part}{rest}" for part in parts for rest in expanded(tail)]


def _start(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)
