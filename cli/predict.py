"""`fastvit predict`: the most likely classes of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fastvit_cli import options as common
from fastvit_cli.card import versions
from fastvit_cli.console import open_screen
from fastvit_cli.errors import BadInput

if TYPE_CHECKING:
    from fastvit_cli.judging import Classifier
    from torch import Tensor

EXAMPLES = """[bold]Examples[/bold]

fastvit predict runs/fastvit_t8/best.safetensors digits/val/3/*.png

fastvit predict sa12.onnx cat.jpg --top 3

fastvit predict timm:fastvit_sa12 cat.jpg --pretrained --json -
"""


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Any MODEL.")],
    image: Annotated[
        list[str], typer.Argument(metavar="IMAGE…", help="Image files, one or more.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes for each image.")] = 5,
    weights: common.Weights = None,
    model_arg: common.ModelArg = None,
    pretrained: common.Pretrained = False,
    input_size: common.InputSize = None,
    seed: common.Seed = 0,
    device: common.Device = "cpu",
    dtype: common.Dtype = None,
    json_target: common.Json = None,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
    version: common.Version = False,
) -> None:
    """Show the classes that MODEL finds most likely for each IMAGE.

    Images are resized, cropped and normalised as the model's file says.
    """
    from fastvit_cli import eval_view, judging, runners

    screen = open_screen(json_target, quiet=quiet, debug=debug)
    options = common.parse_model(
        model_arg,
        weights=weights,
        pretrained=pretrained,
        input_size=input_size,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    with screen.working(model) as stage:
        stage("load")
        loaded = runners.load(model, options)
        classifier = judging.as_classifier(loaded)
        stage("predict")
        pictures, unreadable = read_all(image, classifier)
        rows = [
            {"image": name, "top": _likely(classifier, pixels, loaded, top)}
            for name, pixels in pictures
        ]
    for note in (*loaded.notes, *classifier.notes):
        screen.people.print(f"Note: {note}", style="yellow")
    if loaded.card.weights["origin"] == "random":
        screen.people.print("Note: the weights are random.", style="yellow")
    if rows:
        eval_view.predictions(screen.people, rows)
    if len(unreadable) > 1:  # one alone is named by the error
        eval_view.unreadable(screen.people, unreadable)
    screen.emit(
        {
            "schema": 1,
            "model": loaded.name,
            "input_size": list(loaded.card.input_size),
            "predictions": rows,
            "unreadable": unreadable,
            "versions": versions(),
        }
    )
    if unreadable:
        first = unreadable[0]
        rest = f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        raise BadInput(
            f"{first['image']}{rest} cannot be read: {first['reason']}.",
            hint="The other images were predicted." if rows else "Name image files.",
        )


def read_all(
    names: list[str], classifier: Classifier
) -> tuple[list[tuple[str, Tensor]], list[dict[str, str]]]:
    """Each image as the model takes it (C, H, W), and those that cannot be read."""
    from PIL import Image

    from fastvit.data import MODES, evaluation_transform
    from fastvit.images import as_mode, why_unreadable

    transform = evaluation_transform(classifier.preprocessing)
    mode = MODES.get(classifier.preprocessing.input_size[0], "RGB")
    good: list[tuple[str, Any]] = []
    bad: list[dict[str, str]] = []
    for name in names:
        try:
            with Image.open(Path(name)) as picture:
                good.append((name, transform(as_mode(picture, mode))))
        except Exception as error:  # decoders raise whatever damage leads them to
            bad.append({"image": name, "reason": why_unreadable(error)})
    return good, bad


def _likely(
    classifier: Classifier, pixels: Tensor, loaded: Any, top: int
) -> list[dict[str, Any]]:
    from fastvit_cli import judging

    logits = judging.try_run(classifier.run, pixels[None], loaded.name)[0]
    likely = logits.float().softmax(0).topk(min(top, classifier.classes))
    names = loaded.card.class_names
    return [
        {
            "class": names[index] if index < len(names) else str(index),
            "index": index,
            "probability": probability,
        }
        for probability, index in zip(likely.values.tolist(), likely.indices.tolist())
    ]
