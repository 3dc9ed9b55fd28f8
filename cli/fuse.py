"""`fastvit fuse`: fuse a model, show that the result is equal, and write it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fastvit_cli import artefacts, pages
from fastvit_cli import options as common
from fastvit_cli.backends import TUNED_IN
from fastvit_cli.builders import ModelOptions
from fastvit_cli.card import versions
from fastvit_cli.console import Screen, Stage, open_screen, to_json
from fastvit_cli.errors import BadInput, JobFailed
from fastvit_cli.files import all_or_nothing, check_writable

if TYPE_CHECKING:
    from fastvit_cli.fusing import Fused
    from fastvit_cli.sources import Loaded

EXAMPLES = """[bold]Examples[/bold]

fastvit fuse fastvit_t8 -o t8.onnx --report t8.json

fastvit fuse timm:repvgg_a0 --pretrained -o repvgg.pt2 --dynamic-size

fastvit fuse torchvision:resnet50 --dtype bfloat16 -o resnet50.safetensors

fastvit fuse net.py:build --model-arg num_classes=10 --json -

fastvit fuse fastvit_t8 --tune --threads 2 -o t8.pt2   [dim]# fastest plan here[/dim]

fastvit fuse fastvit_t8 --tune --backend openvino -o t8.xml
"""

DOORS = ("auto", "symbolic_trace", "export", "submodules")


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="fastvit_t8, timm:NAME, torchvision:NAME, module:callable, "
        "file.py:callable, model.pt2 or a .safetensors of this project.",
    ),
]
Output = Annotated[
    list[str] | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="File to write: .pt2, .onnx, .xml (OpenVINO) or .safetensors; repeatable.",
    ),
]
Report = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE", help="File for the report: .json or .html; repeatable."
    ),
]
Certificate = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Write what `check --certificate` can re-verify, region by region.",
    ),
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Skip the check; the report says so.")
]
DynamicSize = Annotated[
    bool,
    typer.Option(
        "--dynamic-size", help="Dynamic height and width in .pt2, .onnx and .xml."
    ),
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune", help="Time equal plans on this device and take the fastest."
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Runtime that --tune is for: {', '.join(TUNED_IN)} (default: eager).",
    ),
]
Batch = Annotated[
    int | None, typer.Option(metavar="N", help="Batch size for --tune (default: 1).")
]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", help="Threads for --tune (default: torch's own)."),
]
Capture = Annotated[
    str, typer.Option(help=f"How to get the graph: {', '.join(DOORS)}.")
]


@dataclass(frozen=True)
class Job:
    """What one run is asked for, checked as far as that needs no model."""

    model: str
    options: ModelOptions
    outputs: list[Path]
    reports: list[Path]
    capture: str
    verify: bool
    dynamic_size: bool
    certificate: Path | None = None
    tune: TuneOptions | None = None

    @property
    def shows_graphs(self) -> bool:
        """Whether a page is to show each region, which takes the graph from before."""
        return any(path.suffix == ".html" for path in self.reports)


@dataclass(frozen=True)
class TuneOptions:
    """What `--tune` measures with."""

    batch: int
    threads: int
    backend: str = "eager"


def fuse(
    model: Model,
    output: Output = None,
    report: Report = None,
    certificate: Certificate = None,
    no_verify: NoVerify = False,
    dynamic_size: DynamicSize = False,
    capture: Capture = "auto",
    tune: Tune = False,
    backend: Backend = None,
    batch: Batch = None,
    threads: Threads = None,
    verbose: common.Verbose = False,
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
    """Fuse MODEL into fewer ops, show that it computes the same, and write it.

    Nothing is written when the fused model is not equal (exit code 1).
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
    door = common.parse_choice("--capture", capture, DOORS)
    outputs, reports = artefacts.plan(output or [], report or [])
    artefacts.check_apart(
        [("--certificate", certificate), ("--json", json_target)]
        + [("--output", it) for it in (*outputs, *artefacts.companions(outputs))]
        + [("--report", path) for path in reports]
    )
    job = Job(
        model=model,
        options=options,
        outputs=outputs,
        reports=reports,
        capture=door,
        verify=not no_verify,
        dynamic_size=dynamic_size,
        certificate=_certificate(certificate, no_verify),
        tune=_tune(tune, backend, batch, threads),
    )
    run(job, screen, verbose=verbose)


def _certificate(text: str | None, no_verify: bool) -> Path | None:
    if text is None:
        return None
    if no_verify:
        raise BadInput(
            "--certificate and --no-verify exclude each other.",
            hint="A certificate holds what the check found.",
        )
    check_writable(Path(text), "--certificate")
    return Path(text)


def _tune(
    wanted: bool, backend: str | None, batch: int | None, threads: int | None
) -> TuneOptions | None:
    numbers = {"--batch": batch, "--threads": threads}
    for option, value in numbers.items():
        if value is not None and value < 1:
            raise BadInput(f"{option} {value} is not positive.", hint="Use 1 or more.")
    for option, given in {"--backend": backend, **numbers}.items():
        if given is not None and not wanted:
            raise BadInput(
                f"{option} says what --tune measures with.", hint="Add --tune."
            )
    if not wanted:
        return None
    common.parse_choice("--backend", backend, TUNED_IN)
    return TuneOptions(batch or 1, common.set_threads(threads), backend or "eager")


def run(job: Job, screen: Screen, *, verbose: bool = False) -> None:
    """Load, compile, write, and show.

    Raises:
        JobFailed: the fused model is not equal.
    """
    from fastvit_cli import fusing, render, savings, sources

    with screen.working(job.model) as stage:
        stage("load")
        loaded = sources.load(job.model, job.options)
        artefacts.check_dtype(job.outputs, loaded.dtype)
        with screen.hushed():
            fused = fusing.run(job, loaded, stage)
            report = fused.result.report
            document = _document(loaded, fused)
            verdict = report.equivalence
            equal = verdict.ok or not job.verify
            if equal and fused.state is not None:
                stage("time every op")
                savings.fill_in(document, loaded, fused.state)
            if equal:
                _write(job, loaded, fused, document, stage)
    render.fusion(screen.people, loaded, report, document, verbose=verbose)
    screen.emit(document)
    if not equal:
        note = f" ({verdict.note})" if verdict.note else ""
        raise JobFailed(
            f"the fused model is not shown to be equal: {verdict.verdict}{note}.",
            hint="No file was written." if job.outputs or job.reports else "",
        )


def _document(loaded: Loaded, fused: Fused) -> dict[str, Any]:
    """The JSON of the command, schema version 1."""
    rows = fused.result.report.to_dict()
    card = loaded.card
    tuned = {"tune": fused.tuned.document} if fused.tuned else {}
    return {
        "schema": rows.pop("schema"),
        "model": loaded.name,
        "input_size": list(card.input_size),
        **rows,
        **tuned,
        "outputs": [],
        "weights": {**card.weights, "note": card.origin},
        "versions": versions(),
    }


def _write(
    job: Job, loaded: Loaded, fused: Fused, document: dict[str, Any], stage: Stage
) -> None:
    """Write outputs, reports and certificate, all or none; fills in `outputs`.

    Raises:
        JobFailed, BadInput: see `artefacts.write`.
    """
    result = fused.result
    artefact = artefacts.Artefact(
        model=result.model,
        inputs=loaded.inputs,
        card=fused.card(loaded, job.capture),
        dynamic_batch=loaded.dynamic_batch,
        dynamic_size=job.dynamic_size,
    )
    proofs = [job.certificate] if job.certificate else []
    # Weights are renamed before the graph that needs them.
    files = [*artefacts.companions(job.outputs), *job.outputs, *job.reports, *proofs]
    with all_or_nothing(files) as temporary:
        places = dict(zip(files, temporary))
        for path in job.outputs:
            stage(f"write {path.name}")
            document["outputs"].append(artefacts.write(artefact, path, places[path]))
        for path in proofs:
            text = json.dumps(result.certificate, indent=1) + "\n"
            places[path].write_text(text, encoding="utf-8")
        for path in job.reports:
            html = path.suffix == ".html"
            text = pages.fusion(document, result.report) if html else to_json(document)
            places[path].write_text(text, encoding="utf-8")
