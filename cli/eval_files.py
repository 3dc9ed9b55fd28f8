"""`--results` of `fastvit eval`: its files, by suffix."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli.console import to_json
from fastvit_cli.errors import BadInput
from fastvit_cli.files import all_or_nothing, check_writable

if TYPE_CHECKING:
    from fastvit.batches import ImageSource
    from fastvit.evaluate import Evaluation

SUFFIXES = (".csv", ".json")
FIGURES = ("top1", "top5", "loss", "images", "images_per_second")


def plan(texts: list[str]) -> list[Path]:
    """The files for results, each of which can be written.

    Raises:
        BadInput: a suffix is not known, or a place is not writable or named twice.
    """
    files = [Path(text) for text in texts]
    for index, path in enumerate(files):
        if path.resolve() in [other.resolve() for other in files[:index]]:
            raise BadInput(f"--results {path} is given twice.", hint="Give it once.")
        check_writable(path, "--results")
        if path.suffix not in SUFFIXES:
            raise BadInput(
                f"--results {path}: {path.suffix!r} says no format.",
                hint=f"Use {' or '.join(SUFFIXES)}.",
            )
    return files


def write(
    files: list[Path], document: dict[str, Any], images: ImageSource, found: Evaluation
) -> None:
    """Write the results, all files or none."""
    with all_or_nothing(files) as temporary:
        for path, place in zip(files, temporary):
            if path.suffix == ".json":
                whole = {**document, "predictions": _predictions(images, found)}
                place.write_text(to_json(whole), encoding="utf-8")
            else:
                _write_csv(place, document)


def _write_csv(place: Path, document: dict[str, Any]) -> None:
    """A line for each form, as timm's results files have for each model."""
    rows = [{"model": document["model"], "form": "model", **document}]
    if "fused" in document:
        rows.append({**rows[0], "form": "fused", **document["fused"]})
    names = ["model", "form", "data", *FIGURES]
    if "calibration_error" in document:
        names.append("calibration_error")
    with place.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _predictions(images: ImageSource, found: Evaluation) -> list[dict[str, Any]]:
    """One entry an image: its class, and what each form says."""
    plain = found.forms["model"]
    names = images.class_names
    rows: list[dict[str, Any]] = [
        {"image": images.name(index), "class": class_name(names, target)}
        for index, target in zip(plain.indices.tolist(), plain.targets.tolist())
    ]
    for form, said in found.forms.items():
        key = "" if form == "model" else f"{form}_"
        pairs = zip(rows, said.predicted.tolist(), said.confidence.tolist())
        for row, predicted, confidence in pairs:
            row[f"{key}predicted"] = class_name(names, predicted)
            row[f"{key}confidence"] = confidence
    return rows


def class_name(names: tuple[str, ...], index: int) -> str:
    """The class's name, or its index where it has none."""
    return names[index] if index < len(names) else str(index)
