"""Models on real images: what `eval` and `predict` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastvit_cli import graphfiles
from fastvit_cli.errors import BadInput, summary

if TYPE_CHECKING:
    from fastvit_cli.runners import Runner
    from torch import Tensor

    from fastvit.config import Preprocessing

Run = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Classifier:
    """A model that gives a logit for each class, and how images reach it."""

    run: Run
    classes: int
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()


def as_classifier(loaded: Runner) -> Classifier:
    """The loaded model on batches of images.

    Raises:
        BadInput: it takes something else than images, or gives something else than
            logits (N, K).
    """
    preprocessing, notes = preprocessing_of(loaded)
    run = batched(loaded, loaded.call)
    image = loaded.inputs[0]
    logits = run(image[:1].float())
    shape = tuple(getattr(logits, "shape", ()))
    if len(shape) != 2:
        what = f"shape {shape}" if shape else f"a {type(logits).__name__}"
        raise BadInput(
            f"{loaded.name} gives {what} for one image, not a logit for each class.",
            hint="eval and predict take image classifiers.",
        )
    return Classifier(run, shape[1], preprocessing, notes)


def batched(loaded: Runner, call: Callable[..., Any]) -> Run:
    """A callable from images (N, C, H, W) in float32 to logits, of any batch size."""
    import torch

    dtype = loaded.inputs[0].dtype
    fixed = None if loaded.dynamic_batch else loaded.inputs[0].shape[0]

    def run(images: Tensor) -> Tensor:
        images = images.to(loaded.device, dtype)
        if fixed is None:
            return call(images)
        return torch.cat([_padded(call, part, fixed) for part in images.split(fixed)])

    return run


def preprocessing_of(loaded: Runner) -> tuple[Preprocessing, tuple[str, ...]]:
    """How the model's images are made, and what had to be assumed about it.

    Raises:
        BadInput: its input is no image.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from fastvit.config import Preprocessing

    known = loaded.card.preprocessing
    size = tuple(loaded.inputs[0].shape[1:])
    if len(loaded.inputs) != 1 or len(size) != 3:
        raise BadInput(
            f"{loaded.name} takes something else than one image.",
            hint="eval and predict take image classifiers.",
        )
    rgb = size[0] == 3
    assumed = {
        "mean": IMAGENET_DEFAULT_MEAN if rgb else (0.5,) * size[0],
        "std": IMAGENET_DEFAULT_STD if rgb else (0.5,) * size[0],
        "crop_pct": 0.875,
        "interpolation": "bicubic",
    }
    values = {key: known.get(key) or assumed[key] for key in assumed}
    missing = [key for key in assumed if not known.get(key)]
    said = f"{loaded.name} does not say its {', '.join(missing)}: ImageNet's are taken."
    made = Preprocessing(
        input_size=size,
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
        crop_pct=values["crop_pct"],
        interpolation=values["interpolation"],
    )
    return made, ((said,) if missing else ())


def fused(loaded: Runner) -> Run:
    """The fused form of the loaded model, checked by the compiler.

    Raises:
        BadInput: the compiler cannot take it.
    """
    import repcompiler as rc

    if loaded.model is None:
        raise BadInput(
            f"--fuse cannot rewrite {loaded.name}, which is "
            f"{graphfiles.KINDS[loaded.form]}.",
            hint="Name the model that it was made from, or leave --fuse out.",
        )
    try:
        result = rc.fuse(loaded.model, example_inputs=loaded.inputs)
    except rc.RepCompilerError as error:
        message = f"{loaded.name}: {error.args[0] if error.args else error}"
        raise BadInput(message, hint=error.hint) from error
    return batched(loaded, result.model)


def try_run(run: Run, images: Tensor, name: str) -> Tensor:
    """The logits of some images.

    Raises:
        BadInput: the model does not take them.
    """
    import torch

    try:
        with torch.no_grad():
            return run(images)
    except Exception as error:
        raise BadInput(f"{name} cannot take the images: {summary(error)}.") from error


def _padded(call: Any, images: Tensor, size: int) -> Tensor:
    """A program of a fixed batch on fewer images: the rest are copies of the last."""
    import torch

    short = size - len(images)
    if not short:
        return call(images)
    filler = images[-1:].expand(short, *images.shape[1:])
    return call(torch.cat([images, filler]))[: len(images)]
