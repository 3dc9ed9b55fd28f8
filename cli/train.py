"""`fastvit train`: train a model on a data set, and leave files that can be shipped."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fastvit_cli import options as common
from fastvit_cli.builders import ModelOptions
from fastvit_cli.card import versions
from fastvit_cli.console import Screen, open_screen
from fastvit_cli.errors import BadInput, JobFailed, Stop, disk_said, summary
from fastvit_cli.ranks import is_of_processes, joined, together

if TYPE_CHECKING:
    from fastvit_cli.trainees import Trainee

    from fastvit.data import Splits
    from fastvit.parallel import World
    from fastvit.recipes import Recipe
    from fastvit.run import Outcome

EXAMPLES = """[bold]Examples[/bold]

fastvit data mnist digits && fastvit train digits --model fastvit_t8 --recipe small

fastvit train imagenet --model fastvit_sa12 --output sa12 --fuse-at-end

torchrun --nproc-per-node 8 -m fastvit_cli train imagenet --model fastvit_sa36 \\
    --device cuda

fastvit train imagenet --model fastvit_sa12 --output sa12 --resume

fastvit train flowers --model timm:resnet18 --pretrained --recipe small --set lr=1e-4
"""

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Folder with train/ and val/ (one sub-folder a class), or a timm data "
        "set, as torch/cifar10 or hfds/NAME.",
    ),
]
ModelName = Annotated[
    str,
    typer.Option("--model", metavar="MODEL", help="fastvit_t8, timm:NAME, a factory…"),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="imagenet (default), distill, finetune-384, small, or a .toml file.",
    ),
]
Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key of the recipe; repeatable."
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="DIR", help="Folder of the run (default: runs/MODEL)."
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in the folder.")
]
FuseAtEnd = Annotated[
    bool,
    typer.Option(
        "--fuse-at-end",
        help="Fuse the best weights: fused.pt2, .onnx, and the report .json, .html.",
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="An unreadable image ends the run.")
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Write events for TensorBoard as well.")
]
DataRoot = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Where a timm data set lies."),
]
RecipeSeed = Annotated[
    int | None,
    typer.Option("--seed", help="As --set seed=N.", rich_help_panel="Model"),
]


@dataclass(frozen=True)
class Request:
    """What one run is asked for, checked as far as that needs no data."""

    data: str
    data_root: str | None
    model: str
    options: ModelOptions
    recipe: Recipe
    output: Path
    resume: bool
    strict: bool
    tensorboard: bool


def train(
    data: Data,
    model: ModelName,
    recipe: RecipeName = None,
    setting: Setting = None,
    output: Output = None,
    resume: Resume = False,
    fuse_at_end: FuseAtEnd = False,
    strict: Strict = False,
    tensorboard: TensorBoard = False,
    data_root: DataRoot = None,
    weights: common.Weights = None,
    model_arg: common.ModelArg = None,
    pretrained: common.Pretrained = False,
    seed: RecipeSeed = None,
    device: common.Device = "cpu",
    json_target: common.Json = None,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
    version: common.Version = False,
) -> None:
    """Train MODEL on DATA and keep the best weights, with all it takes to go on.

    The folder gets recipe.toml, last.pt, best.safetensors, metrics.csv, metrics.jsonl,
    curves.png and summary.html. A signal writes a checkpoint first; --resume goes on.
    """
    settings = [*(setting or []), *([] if seed is None else [f"seed={seed}"])]
    place = Path(output or f"runs/{_file_name(model)}")
    options = ModelOptions(
        args=common.parse_model_args(model_arg),
        weights=weights,
        pretrained=pretrained,
        device=device,
    )
    with joined(device) as world:
        followers = world.size > 1 and not world.leads
        screen = open_screen(
            None if followers else json_target, quiet=quiet or followers, debug=debug
        )
        request = Request(
            data=data,
            data_root=data_root,
            model=model,
            options=options,
            recipe=_recipe(recipe, settings, model, place if resume else None),
            output=place,
            resume=resume,
            strict=strict,
            tensorboard=tensorboard and world.leads,
        )
        began = time.monotonic()
        outcome = _run(request, world, screen)
    document = _document(request, outcome, time.monotonic() - began)
    with finally_emitted(screen, document):
        if world.leads and outcome.signal is None:
            _finish(request, outcome, screen)
            document["fused"] = _fuse(request, screen) if fuse_at_end else []
    if outcome.signal is not None:
        _say_stopped(request, outcome, screen)
        raise typer.Exit(128 + outcome.signal)


def _run(request: Request, world: World, screen: Screen) -> Outcome:
    """Open the data, build the model, train."""
    from fastvit_cli import train_view, trainees

    from fastvit.run import Job
    from fastvit.runfiles import check_output
    from fastvit.train import train as run_training

    def start() -> tuple[Splits, Trainee]:
        with screen.working(request.model) as stage, as_stops(starting=True):
            stage("data")
            if world.leads:
                check_output(request.output, request.resume)
            splits = open_data(request)
            stage("model")
            return splits, trainees.build(
                request.model, request.options, request.recipe, splits.class_names
            )

    splits, trainee = together(world, start)
    train_view.introduce(screen.people, request, splits, trainee, world)
    job = Job(
        recipe=request.recipe,
        splits=splits,
        preprocessing=trainee.preprocessing,
        output=request.output,
        world=world,
        resume=request.resume,
        strict=request.strict,
        describe=lambda row: described(trainee, request.recipe, row),
    )
    with (
        screen.calm(),
        train_view.listening(screen, request.tensorboard, request.output) as listener,
        as_stops(starting=False, processes=world.size),
    ):
        return run_training(trainee.model, job, listener)


def open_data(request: Request) -> Splits:
    """The two splits, read as the model's channels want.

    Raises:
        BadInput: the number of channels is none.
    """
    from fastvit.data import open_splits

    names = request.recipe.evaluation
    channels = request.options.args.get("in_chans", 3)
    if type(channels) is not int:
        raise BadInput(
            f"--model-arg in_chans={channels} is no whole number.",
            hint="Images have 1, 3 or 4 channels.",
        )
    return open_splits(
        request.data,
        root=request.data_root,
        names=(names.train_split, names.val_split),
        channels=channels,
    )


def described(trainee: Trainee, recipe: Recipe, row: dict[str, Any]) -> dict[str, str]:
    """The metadata of the weights of one epoch."""
    weights = {
        "origin": "trained",
        "recipe": recipe.name,
        "epoch": row["epoch"],
        "top1": round(row["top1"], 2),
    }
    return replace(trainee.card, weights=weights).to_metadata()


@contextmanager
def as_stops(*, starting: bool, processes: int = 1) -> Iterator[None]:
    """Errors of the library as the ends of a command.

    Raises:
        BadInput: the recipe, the data or the files are at fault.
        JobFailed: the run had to stop.
    """
    import torch

    from fastvit import errors

    at_fault = (errors.RecipeError, errors.ResumeError, errors.WeightsError)
    try:
        yield
    except errors.FastViTError as error:
        early = starting or isinstance(error, at_fault)
        kind: type[Stop] = BadInput if early else JobFailed
        raise kind(error.args[0], hint=error.hint) from error
    except torch.OutOfMemoryError as error:
        raise JobFailed(
            f"the device has too little memory: {summary(error, 120)}.",
            hint="Lower it with --set micro_batch=N; the result stays the same.",
        ) from error
    except RuntimeError as error:
        if processes == 1 or not is_of_processes(error):
            raise
        raise JobFailed(
            f"one of the {processes} processes died or cannot be reached: "
            f"{summary(error, 160)}.",
            hint="Its own message says why; continue with --resume.",
        ) from error


def _recipe(
    name: str | None, settings: list[str], model: str, folder: Path | None
) -> Recipe:
    """The recipe that is asked for: when resuming, by default the run's own.

    Raises:
        BadInput: there is none of that name, or a key or value is not right.
    """
    from fastvit.builtin import recipe_for
    from fastvit.checkpoint import recipe_of_run
    from fastvit.recipe_files import read_recipe, with_settings

    bare = model.rpartition("/")[2].partition("@")[0]
    with as_stops(starting=True):
        if name is not None and name.endswith(".toml"):
            recipe = read_recipe(name)
        else:
            own = recipe_of_run(folder) if folder and name is None else None
            recipe = own or recipe_for("imagenet" if name is None else name, bare)
        return with_settings(recipe, settings)


def _file_name(model: str) -> str:
    """MODEL as the name of a folder."""
    kept = [c if c.isalnum() or c in "_-." else "-" for c in Path(model).name]
    return "".join(kept).strip(".-") or "model"


def _document(request: Request, outcome: Outcome, seconds: float) -> dict[str, Any]:
    return {
        "schema": 1,
        "model": request.model,
        "data": request.data,
        "recipe": request.recipe.name,
        "output": str(request.output),
        "epochs": len(outcome.history),
        "complete": outcome.signal is None,
        "best": outcome.best,
        "last": outcome.history[-1] if outcome.history else None,
        "skipped": len(outcome.problems),
        "seconds": round(seconds, 2),
        "versions": versions(),
    }


def _finish(request: Request, outcome: Outcome, screen: Screen) -> None:
    """Curves, the page and the last words.

    Raises:
        JobFailed: the disk would not take them.
    """
    from fastvit_cli import train_report, train_view

    try:
        with screen.working(request.model) as stage:
            stage("curves and summary")
            train_report.write(request, outcome)
    except OSError as error:
        raise JobFailed(
            f"the training is complete; {disk_said(error)}.",
            hint="Make room, then --resume writes them and trains nothing.",
        ) from error
    train_view.conclude(screen.people, request, outcome)


def _fuse(request: Request, screen: Screen) -> list[str]:
    """The best weights, fused, beside them, with the report as JSON and HTML.

    Raises:
        JobFailed: they cannot be fused or the result is not equal; nothing is written.
    """
    from fastvit_cli import fuse

    folder = request.output
    outputs = [folder / name for name in ("fused.pt2", "fused.onnx")]
    reports = [folder / name for name in ("fused.json", "fused.html")]
    best = folder / "best.safetensors"
    job = fuse.Job(
        model=str(best),
        options=ModelOptions(),
        outputs=outputs,
        reports=reports,
        capture="auto",
        verify=True,
        dynamic_size=False,
    )
    try:
        fuse.run(job, replace(screen, json_target=None))
    except Stop as error:
        raise JobFailed(
            "the training is complete, its best weights could not be fused: "
            f"{str(error).rstrip('.')}.",
            hint=error.hint or f"Try it by hand: fastvit fuse {best}.",
        ) from error
    return [str(path) for path in (*outputs, *reports)]


@contextmanager
def finally_emitted(screen: Screen, document: dict[str, Any]) -> Iterator[None]:
    """Write the JSON after the block, however it ends: the training itself is done."""
    try:
        yield
    finally:
        screen.emit(document)


def _say_stopped(request: Request, outcome: Outcome, screen: Screen) -> None:
    assert outcome.signal is not None
    at = outcome.position
    name = signal.Signals(outcome.signal).name
    screen.progress.print(
        f"{name}: stopped after update {at.update} of epoch {at.epoch + 1}; "
        f"{request.output / 'last.pt'} holds all of it. Continue with --resume."
    )
