"""`fastvit eval`: how good a model is on held-out images, fused and not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fastvit_cli import eval_files
from fastvit_cli import options as common
from fastvit_cli.builders import ModelOptions
from fastvit_cli.card import versions
from fastvit_cli.console import Screen, open_screen
from fastvit_cli.errors import BadInput, JobFailed

if TYPE_CHECKING:
    from fastvit_cli.judging import Classifier
    from fastvit_cli.runners import Runner

    from fastvit.batches import ImageSource
    from fastvit.evaluate import Evaluation, Predictions

EXAMPLES = """[bold]Examples[/bold]

fastvit eval digits --model runs/fastvit_t8/best.safetensors --fuse

fastvit eval imagenet --model timm:fastvit_sa12 --pretrained --results sa12.csv

fastvit eval imagenet/val --model sa12.onnx --batch 64 --calibration --json -
"""

PAIRS = 10  # of classes that are mistaken for each other, in the summary

ModelName = Annotated[
    str,
    typer.Option(
        "--model", metavar="MODEL", help="Any MODEL, .pt2, .onnx and .xml too."
    ),
]
Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Folder with val/ or with one sub-folder a class, or a timm data set.",
    ),
]
Fuse = Annotated[
    bool, typer.Option("--fuse", help="Evaluate the fused form beside it.")
]
Results = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="Write figures as .csv, or everything with each image as .json.",
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Images a batch.")]
Workers = Annotated[
    int, typer.Option(min=0, max=256, help="Processes that read images.")
]
Calibration = Annotated[
    bool, typer.Option("--calibration", help="Expected calibration error as well.")
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Sub-folder of DATA, or split of a timm data set (default: val, "
        "validation).",
    ),
]
DataRoot = Annotated[
    str | None, typer.Option(metavar="DIR", help="Where a timm data set lies.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="An unreadable image ends the evaluation.")
]


@dataclass(frozen=True)
class Request:
    """What is to be evaluated on what."""

    data: str
    model: str
    options: ModelOptions
    fuse: bool
    batch: int
    workers: int
    calibration: bool
    split: str | None
    data_root: str | None
    strict: bool


def evaluate(
    data: Data,
    model: ModelName,
    fuse: Fuse = False,
    results: Results = None,
    batch: Batch = 32,
    workers: Workers = 0,
    calibration: Calibration = False,
    split: Split = None,
    data_root: DataRoot = None,
    strict: Strict = False,
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
    """Evaluate MODEL on the held-out images of DATA.

    With --fuse both forms see the same batches; exit code 1 if they give another class
    for any image.
    """
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
    files = eval_files.plan(results or [])
    request = Request(
        data,
        model,
        options,
        fuse,
        batch,
        workers,
        calibration,
        split,
        data_root,
        strict,
    )
    _run(request, files, screen)


def _run(request: Request, files: list[Path], screen: Screen) -> None:
    """Load, evaluate, show, write.

    Raises:
        JobFailed: the fused form gives another class for some image.
    """
    from fastvit_cli import eval_view, judging, runners
    from fastvit_cli.train import as_stops

    with screen.working(request.model) as stage, as_stops(starting=True):
        stage("load")
        loaded = runners.load(request.model, request.options)
        classifier = judging.as_classifier(loaded)
        images = _images(request, loaded, classifier)
        forms = {"model": classifier.run}
        if request.fuse:
            stage("fuse")
            with screen.hushed():
                forms["fused"] = judging.fused(loaded)
        found = _evaluate(request, forms, images, classifier, stage)
    document = _document(request, loaded, images, found)
    notes = (*loaded.notes, *classifier.notes, *_shortfall(images, found))
    eval_view.show(screen.people, loaded, notes, found, document)
    eval_files.write(files, document, images, found)
    screen.emit(document)
    different = _disagreements(found)
    if different:
        raise JobFailed(
            f"the fused form gives another class for {different} of "
            f"{document['images']} images.",
            hint="Compare the two with fastvit check.",
        )


def _images(request: Request, loaded: Runner, classifier: Classifier) -> ImageSource:
    """The images, with the model's class indices.

    Raises:
        BadInput: the data's classes are not the model's.
    """
    from fastvit.data import open_for_evaluation

    names = loaded.card.class_names
    images = open_for_evaluation(
        request.data,
        root=request.data_root,
        split=request.split,
        channels=classifier.preprocessing.input_size[0],
        classes=names,
        count=classifier.classes,
    )
    theirs = images.class_names
    if theirs == names:
        return images
    shared = set(theirs) & set(names)
    if shared:
        extra = [name for name in theirs if name not in names][:5]
        problem = (
            f"has classes that the model lacks: {', '.join(extra)}"
            if extra
            else "has its classes in another order"
        )
        raise BadInput(
            f"{request.data} {problem}.",
            hint=f"The model's are {', '.join(names[:5])}…",
        )
    if len(theirs) != classifier.classes:
        raise BadInput(
            f"{request.data} has {len(theirs)} classes, {loaded.name} "
            f"{classifier.classes}.",
            hint="Name the data that it was trained for, or give --model-arg "
            f"num_classes={len(theirs)} and the weights for them.",
        )
    return images


def _evaluate(
    request: Request,
    forms: dict[str, Any],
    images: ImageSource,
    classifier: Classifier,
    stage: Any,
) -> Evaluation:
    import torch

    from fastvit.batches import EvaluationImages
    from fastvit.data import evaluation_transform
    from fastvit.evaluate import evaluate as run
    from fastvit.loaders import evaluation_loader

    device = torch.device(request.options.device)
    transform = evaluation_transform(classifier.preprocessing)
    batches = evaluation_loader(
        EvaluationImages(images, transform, strict=request.strict),
        request.batch,
        request.workers,
        device,
    )

    def progress(done: int) -> bool:
        stage(f"{done} of {len(images)} images")
        return True

    found = run(forms, batches, device, progress=progress, warm_up=True)
    assert found is not None
    if not found.forms["model"].images:
        raise BadInput(f"none of the {len(images)} images could be read.")
    return found


def figures(said: Predictions) -> dict[str, Any]:
    """The figures of one form, as the JSON has them; shares in per cent."""
    return {name: getattr(said, name) for name in eval_files.FIGURES}


def confused(said: Predictions, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Pairs of classes that were mistaken most often."""
    counts = said.confusion()
    counts.fill_diagonal_(0)
    values, places = counts.flatten().topk(min(PAIRS, counts.numel()))
    return [
        {
            "class": eval_files.class_name(names, place // said.classes),
            "predicted": eval_files.class_name(names, place % said.classes),
            "count": count,
        }
        for count, place in zip(values.tolist(), places.tolist())
        if count
    ]


def _document(
    request: Request, loaded: Runner, images: ImageSource, found: Evaluation
) -> dict[str, Any]:
    from fastvit.evaluate import agreement

    plain = found.forms["model"]
    document: dict[str, Any] = {
        "schema": 1,
        "model": loaded.name,
        "data": request.data,
        "input_size": list(loaded.card.input_size),
        "batch": request.batch,
        **figures(plain),
        "skipped": [{"image": p.name, "reason": p.reason} for p in found.problems],
        "confused": confused(plain, images.class_names),
    }
    if request.calibration:
        document["calibration_error"] = plain.calibration_error()
    if "fused" in found.forms:
        other = found.forms["fused"]
        document["fused"] = figures(other)
        if request.calibration:
            document["fused"]["calibration_error"] = other.calibration_error()
        document["agreement"] = agreement(plain, other)
    weights = {**loaded.card.weights, "note": loaded.card.origin}
    return {**document, "weights": weights, "versions": versions()}


def _disagreements(found: Evaluation) -> int:
    if "fused" not in found.forms:
        return 0
    one, other = found.forms["model"], found.forms["fused"]
    return int((one.predicted != other.predicted).sum())


def _shortfall(images: ImageSource, found: Evaluation) -> tuple[str, ...]:
    """A word where a stream gave fewer images than it says that it has."""
    seen = found.forms["model"].images + len(found.problems)
    if seen == len(images):
        return ()
    return (f"the data set says it has {len(images)} images, and gave {seen}.",)
