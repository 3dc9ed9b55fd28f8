"""`fastvit profile`: what models cost on this device, and the fastest equal form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fastvit_cli import options as common
from fastvit_cli.backends import ANY, BACKENDS
from fastvit_cli.builders import ModelOptions
from fastvit_cli.console import Screen, Stage, open_screen
from fastvit_cli.errors import BadInput, JobFailed, Stop
from fastvit_cli.files import all_or_nothing, check_writable, folder_for_files

if TYPE_CHECKING:
    from fastvit_cli.cells import Cell, Grid

EXAMPLES = """[bold]Examples[/bold]

fastvit profile fastvit_t8 --batch 1 --batch 8 --threads 2

fastvit profile fastvit_sa24 timm:caformer_s18 timm:convnext_base --backend eager

fastvit profile fastvit_t8 --dtype float32 --dtype bfloat16 --backend openvino --json -

fastvit profile fastvit_t8 --tune --threads 1 --backend eager

fastvit profile t8.onnx --backend onnxruntime --backend openvino
"""
SCHEMA = 1

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL…", help="One model or several, side by side."),
]
Batch = Annotated[
    list[int] | None,
    typer.Option(metavar="N", help="Batch size; repeatable (default: 1)."),
]
Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help=f"{', '.join(BACKENDS)}; repeatable (default: all that are here).",
    ),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help=f"{', '.join(ANY)}; repeatable (default: the model's own).",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", help="Threads of every backend (default: torch's own)."),
]
Seconds = Annotated[
    float,
    typer.Option(metavar="S", help="Time for the timing of each batch size."),
]
Layers = Annotated[
    int,
    typer.Option(metavar="N", help="Time every op, eagerly, and show the N slowest."),
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Add the plan that is fastest in each backend at the first batch size.",
    ),
]
Html = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Write the result as one page: .html."),
]
Png = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Write roofline.png, layers.png, backends.png."),
]


@dataclass(frozen=True)
class Job:
    """What one run is asked for, checked as far as that needs no model."""

    models: tuple[str, ...]
    options: ModelOptions
    batches: tuple[int, ...]
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]
    threads: int
    seconds: float
    html: Path | None = None
    layers: int = 0
    png: Path | None = None
    tune: bool = False


@dataclass
class Profile:
    """Everything that one run has measured."""

    device: dict[str, Any]
    models: list[dict[str, Any]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    advice: list[Any] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    roofline: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: dict[str, Stop] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of the command, schema version 1."""
        return {
            "schema": SCHEMA,
            "device": self.device,
            "models": self.models,
            "measurements": [cell.to_dict() for cell in self.cells],
            "recommendations": [row.to_dict() for row in self.advice],
            "roofline": self.roofline,
            "layers": self.layers,
            "notes": self.notes,
            "failed": {text: error.line for text, error in self.failed.items()},
        }


def profile(
    models: Models,
    batch: Batch = None,
    backend: Backends = None,
    dtype: Dtypes = None,
    threads: Threads = None,
    seconds: Seconds = 10.0,
    layers: Layers = 0,
    tune: Tune = False,
    html: Html = None,
    png: Png = None,
    weights: common.Weights = None,
    model_arg: common.ModelArg = None,
    pretrained: common.Pretrained = False,
    input_size: common.InputSize = None,
    seed: common.Seed = 0,
    device: common.Device = "cpu",
    json_target: common.Json = None,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
    version: common.Version = False,
) -> None:
    """Measure MODEL as loaded and fused in every backend, and say what to use here.

    Forms, backends, dtypes and batch sizes are timed against one another in one
    process; each is first compared with the model in float64.
    """
    screen = open_screen(json_target, quiet=quiet, debug=debug)
    options = common.parse_model(
        model_arg,
        weights=weights,
        pretrained=pretrained,
        input_size=input_size,
        seed=seed,
        device=device,
    )
    if weights is not None and len(models) > 1:
        raise BadInput(
            "--weights goes with one model.", hint="Write MODEL@FILE for each."
        )
    known = tuple(BACKENDS)
    job = Job(
        models=_unique("MODEL", models),
        options=options,
        batches=_positive("--batch", batch or [1]),
        backends=_choices("--backend", backend, known) or known,
        dtypes=_choices("--dtype", dtype, ANY),
        threads=common.set_threads(threads),
        seconds=_not_negative("--seconds", seconds),
        html=_page(html),
        layers=_not_negative("--layers", layers),
        png=folder_for_files(png, "--png"),
        tune=tune,
    )
    _check_apart(job, json_target)
    _run(job, screen)


def _check_apart(job: Job, json_target: str | None) -> None:
    from fastvit_cli import artefacts, plots

    pictures = [("--png", job.png / name) for name in plots.PICTURES if job.png]
    artefacts.check_apart([("--html", job.html), ("--json", json_target), *pictures])


def _unique(option: str, texts: Sequence[Any]) -> tuple[Any, ...]:
    if len(set(texts)) < len(texts):
        raise BadInput(f"a {option} is given twice.", hint="Give each once.")
    return tuple(texts)


def _positive(option: str, numbers: list[int]) -> tuple[int, ...]:
    if min(numbers) < 1:
        raise BadInput(
            f"{option} {min(numbers)} is not positive.", hint="Use 1 or more."
        )
    return _unique(option, numbers)


def _not_negative(option: str, number: Any) -> Any:
    if not 0 <= number < math.inf:
        raise BadInput(f"{option} {number} is no such number.", hint="Use 0 or more.")
    return number


def _choices(
    option: str, texts: list[str] | None, known: tuple[str, ...]
) -> tuple[str, ...]:
    for text in texts or ():
        common.parse_choice(option, text, known)
    return _unique(option, texts or ())


def _page(text: str | None) -> Path | None:
    if text is None:
        return None
    if Path(text).suffix != ".html":
        raise BadInput(f"--html {text} has another suffix.", hint="Use FILE.html.")
    check_writable(Path(text), "--html")
    return Path(text)


def _run(job: Job, screen: Screen) -> None:
    """Load and fuse every model, measure, advise; show each part once it is there."""
    from fastvit_cli import cells, profile_view, sources

    sources.check_device(job.options.device)
    out = screen.people

    @contextmanager
    def busy() -> Iterator[Stage]:
        with screen.working(", ".join(job.models)) as stage, screen.hushed():
            yield stage

    with cells.scratch_folder() as scratch:
        with busy() as stage:
            result, grids, states = _prepare(job, Path(scratch), stage)
        profile_view.models(out, result)
        for batch in job.batches:
            with busy() as stage:
                measured = cells.measure(grids, batch, job.seconds, stage)
            result.cells += measured
            profile_view.cells(out, measured)
        with busy() as stage:
            _conclude(job, result, grids, states, stage)
    profile_view.conclusion(out, result, job.layers)
    document = result.to_dict()
    _pictures(job, document)
    screen.emit(document)
    _end(result)


def _end(result: Profile) -> None:
    """Say, once all else is shown, that something could not be measured.

    Raises:
        JobFailed: no cell of a model ran, or a model's fused form is not equal.
        BadInput: one of several models could not be loaded.
    """
    timed = {cell.model for cell in result.cells if cell.timing}
    lost = next((cell for cell in result.cells if cell.model not in timed), None)
    if lost is not None:
        why = lost.skipped.rstrip(".")
        hint = "See --debug, or choose another --backend."
        if "memory" in why:
            hint = "Use a smaller --batch."
        what = f"{lost.model}: nothing of it" if timed else "nothing"
        raise JobFailed(f"{what} could be measured: {why}.", hint=hint)
    if result.failed:
        text, error = next(iter(result.failed.items()))
        raise type(error)(f"{text}: {error}", hint=error.hint)


def _pictures(job: Job, document: dict[str, Any]) -> None:
    """The page and the plots, where they were asked for."""
    from fastvit_cli import pages, plots

    if job.html is not None:
        with all_or_nothing([job.html]) as (temporary,):
            temporary.write_text(pages.profile(document), encoding="utf-8")
    if job.png is not None:
        plots.write(document, job.png)


def _prepare(
    job: Job, scratch: Path, stage: Stage
) -> tuple[Profile, list[Grid], dict[str, Any]]:
    """Every model in every form, and the state that its trace is timed from."""
    from fastvit_cli import machine, subjects

    result = Profile(machine.describe(job.options.device, job.threads))
    grids: list[Grid] = []
    states: dict[str, Any] = {}
    for text in job.models:
        stage(f"load {text}")
        try:
            made = subjects.prepare(text, job, scratch, stage)
        except Stop as error:
            if len(job.models) == 1:
                raise
            result.failed[text] = error
            result.notes.append(f"{text} is left out: {error.line.rstrip('.')}")
            continue
        if made.unequal is not None:
            result.failed[text] = made.unequal
        grids.append(made.grid)
        states[text] = made.state
        result.models.append(made.facts)
        result.notes += made.notes
    if not grids:
        raise next(iter(result.failed.values()))
    return result, grids, states


def _conclude(
    job: Job,
    result: Profile,
    grids: Sequence[Grid],
    states: dict[str, Any],
    stage: Stage,
) -> None:
    """Time every op where that is asked for, and say what to use."""
    from fastvit_cli import advice, layers

    if job.layers or job.html or job.png:
        stage("time every op")
        survey = layers.survey(grids, states, job)
        result.roofline, result.layers = survey.roofline, survey.rows
        result.notes += survey.notes
    result.notes += _notes(result)
    words = recipe_words(job.options)
    tuning = ["--tune", "--threads", str(job.threads), "--batch", str(job.batches[0])]
    result.advice = advice.advise(
        result.cells, {"fused": words, "tuned": words + tuning}
    )


def _notes(result: Profile) -> list[str]:
    """What a reader of the figures should know."""
    from fastvit_cli import cells

    notes: list[str] = []
    asked = {cell.dtype for cell in result.cells}
    if "bfloat16" in asked and not result.device["bfloat16"]:
        notes.append("this device has no bfloat16 hardware: it is emulated")
    if result.device["bfloat16"] and "bfloat16" not in asked:
        notes.append(
            "this device has bfloat16 hardware: add --dtype bfloat16 to see it"
        )
    return notes + cells.fault_notes(result.cells)


def recipe_words(options: ModelOptions) -> list[str]:
    """The options of the model as words of a command."""
    words = [f"--model-arg={key}={value}" for key, value in options.args.items()]
    if options.weights:
        words += ["--weights", options.weights]
    if options.pretrained:
        words.append("--pretrained")
    if options.input_size:
        words += ["--input-size", "x".join(map(str, options.input_size))]
    if options.seed:
        words += ["--seed", str(options.seed)]
    return words
