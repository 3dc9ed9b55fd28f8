"""What is known about a model beside its tensors; every artefact carries it.

The card travels as text: safetensors metadata, ONNX metadata_props, or an extra file of
a .pt2. Keys are stable: a file written today must load in later versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

DISTRIBUTION = "fastvit-repcompiler"
FORMAT = f"{DISTRIBUTION}/1"


@dataclass(frozen=True)
class Card:
    """The record of one model.

    Attributes:
        source: the MODEL that its factory is named by.
        preprocessing: `input_size`, and where known `mean`, `std`, `crop_pct` and
            `interpolation`.
        args: the factory's arguments.
        weights: `origin` (random, pretrained, trained, file, factory or program), with
            the `file`, the `seed`, or the `recipe`, `epoch` and `top1`.
        class_names: by output index; empty where not known.
        form: `train`, or `fused` for what the compiler made.
        capture: the door that the fused form came through.
        tuning: what `fuse --tune` chose (`tuner.from_card`); empty where it did not.
    """

    source: str
    preprocessing: dict[str, Any]
    args: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    form: str = "train"
    capture: str = "auto"
    tuning: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def input_size(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return tuple(self.preprocessing["input_size"])

    @property
    def origin(self) -> str:
        """Where the weights come from, in words for people."""
        return ORIGINS[self.weights["origin"]].format_map(_Blank(self.weights))

    def to_metadata(self, **more: Any) -> dict[str, str]:
        """The card as texts by key; `more` joins the versions."""
        tuned = {"tuning": json.dumps(self.tuning)} if self.tuning else {}
        return {
            **tuned,
            "format": FORMAT,
            "source": self.source,
            "model_args": json.dumps(self.args),
            "form": self.form,
            "capture": self.capture,
            "weights": self.weights["origin"],
            "weights_detail": json.dumps({**self.weights, "note": self.origin}),
            "preprocessing": json.dumps(self.preprocessing),
            "class_names": json.dumps(self.class_names),
            "versions": json.dumps(versions(**more)),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Card:
        """The card that `to_metadata` wrote.

        Raises:
            ValueError: the metadata is another program's, or damaged.
        """
        if metadata.get("format") != FORMAT:
            raise ValueError(f"it does not say format {FORMAT!r}")
        try:
            return cls(
                source=metadata["source"],
                preprocessing=json.loads(metadata["preprocessing"]),
                args=json.loads(metadata["model_args"]),
                weights=json.loads(metadata["weights_detail"]),
                class_names=tuple(json.loads(metadata["class_names"])),
                form=metadata["form"],
                capture=metadata["capture"],
                tuning=_tuning(metadata.get("tuning", "{}")),
            )
        except KeyError as error:
            raise ValueError(f"it lacks {error}") from error


def _tuning(text: str) -> dict[str, Any]:
    """What a file says of its tuning.

    Raises:
        ValueError: it is damaged.
    """
    found = json.loads(text)
    if isinstance(found, dict):
        costs, forms = (found.get(key, {}) for key in ("costs", "forms"))
        kernels = found.get("kernels", [])
        named = isinstance(kernels, list) and all(type(it) is str for it in kernels)
        if named and _is_table(costs, (int, float)) and _is_table(forms, (str,)):
            return found
    raise ValueError("its tuning is damaged")


def _is_table(found: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(found, dict) and all(type(v) in kinds for v in found.values())


ORIGINS = {
    "random": "random weights (seed {seed})",
    "pretrained": "pretrained weights",
    "trained": "weights of epoch {epoch}, recipe {recipe}, top-1 {top1} %",
    "file": "weights from {file}",
    "factory": "weights as the factory left them: random unless it loads its own",
    "program": "weights of the exported program",
}


class _Blank(dict[str, Any]):
    """A mapping that says ? for what it does not hold."""

    def __missing__(self, key: str) -> str:
        return "?"


def package_version(name: str = DISTRIBUTION) -> str:
    """The version of an installed package, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def versions(**more: Any) -> dict[str, Any]:
    """The versions that an artefact, or a result, was made with."""
    names = (DISTRIBUTION, "torch", "timm")
    return {**{name: package_version(name) for name in names}, **more}
