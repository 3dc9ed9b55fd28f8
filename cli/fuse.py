"""`fastvit fuse`: fuse a model, show that the result is equal, and write it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fastvit_cli import options as common
from fastvit_cli.console import Stage, open_screen, to_json
from fastvit_cli.errors import BadInput, JobFailed

if TYPE_CHECKING:
    from fastvit_cli.sources import Loaded

EXAMPLES = """[bold]Examples[/bold]

fastvit fuse fastvit_t8 -o t8.onnx --report t8.json

fastvit fuse timm:repvgg_a0 --pretrained -o repvgg.pt2 --dynamic-size

fastvit fuse torchvision:resnet50 --dtype bfloat16 -o resnet50.safetensors

fastvit fuse net.py:build --model-arg num_classes=10 --json -
"""

DOORS = ("auto", "symbolic_trace", "export")


def fuse(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="fastvit_t8, timm:NAME, torchvision:NAME, module:callable, "
            "file.py:callable, model.pt2 or a .safetensors of this project.",
        ),
    ],
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="File to write: .pt2, .onnx or .safetensors; repeatable.",
        ),
    ] = None,
    report: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="File for the report: .json; repeatable."),
    ] = None,
    no_verify: Annotated[
        bool,
        typer.Option("--no-verify", help="Skip the check; the report says so."),
    ] = False,
    dynamic_size: Annotated[
        bool,
        typer.Option(
            "--dynamic-size", help="Dynamic height and width in .pt2 and .onnx."
        ),
    ] = False,
    capture: Annotated[
        str, typer.Option(help=f"How to get the graph: {', '.join(DOORS)}.")
    ] = "auto",
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="List every region by name.")
    ] = False,
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
    from fastvit_cli import artefacts, render, sources

    if capture not in DOORS:
        raise BadInput(
            f"--capture {capture} is not known.", hint=f"One of {', '.join(DOORS)}."
        )
    screen = open_screen(json_target, quiet=quiet, debug=debug)
    outputs, reports = artefacts.plan(output or [], report or [])
    asked = sources.ModelOptions(
        args=common.parse_model_args(model_arg),
        weights=weights,
        pretrained=pretrained,
        input_size=None if input_size is None else common.parse_size(input_size),
        seed=seed,
        device=device,
        dtype=dtype,
    )
    with screen.working(model) as stage:
        stage("load")
        loaded = sources.load(model, asked)
        artefacts.check_dtype(outputs, loaded.dtype)
        with screen.hushed():
            result = _compile(loaded, capture, not no_verify, stage)
            document = _document(loaded, result.report)
            equal = no_verify or result.report.equivalence.ok
            if equal:
                fused = _artefact(loaded, result.model, capture, dynamic_size)
                _write(fused, outputs, reports, document, stage)
    render.fusion(screen.people, loaded, result.report, document, verbose=verbose)
    screen.emit(document)
    if not equal:
        raise _not_equal(result.report.equivalence, bool(outputs or reports))


def _compile(loaded: Loaded, capture: str, verify: bool, stage: Stage) -> Any:
    """The compiler's result, with its errors as bad input.

    Raises:
        BadInput: the model cannot be captured or does not fit its inputs.
        JobFailed: the check cannot be made.
    """
    import repcompiler as rc

    try:
        return rc.fuse(
            loaded.model,
            example_inputs=loaded.inputs,
            verify=verify,
            capture=capture,
            progress=stage,
        )
    except rc.RepCompilerError as error:
        kind = JobFailed if isinstance(error, rc.VerificationError) else BadInput
        message = f"{loaded.name}: {error.args[0] if error.args else error}"
        raise kind(message, hint=error.hint) from error


def _document(loaded: Loaded, report: Any) -> dict[str, Any]:
    """The JSON of the command, schema version 1."""
    from fastvit_cli.card import versions

    rows = report.to_dict()
    card = loaded.card
    return {
        "schema": rows.pop("schema"),
        "model": loaded.name,
        "input_size": list(card.input_size),
        **rows,
        "outputs": [],
        "weights": {**card.weights, "note": card.origin},
        "versions": versions(),
    }


def _artefact(loaded: Loaded, model: Any, capture: str, dynamic_size: bool) -> Any:
    from fastvit_cli.exporters import Artefact

    return Artefact(
        model=model,
        inputs=loaded.inputs,
        card=replace(loaded.card, form="fused", capture=capture),
        dynamic_batch=loaded.dynamic_batch,
        dynamic_size=dynamic_size,
    )


def _write(
    fused: Any,
    outputs: list[Path],
    reports: list[Path],
    document: dict[str, Any],
    stage: Stage,
) -> None:
    """Write outputs and reports, all of them or none; fills in `outputs`."""
    from fastvit_cli import artefacts
    from fastvit_cli.files import all_or_nothing

    with all_or_nothing([*outputs, *reports]) as temporary:
        for path, place in zip(outputs, temporary):
            stage(f"write {path.name}")
            document["outputs"].append(artefacts.write(fused, path, place))
        for place in temporary[len(outputs) :]:
            place.write_text(to_json(document), encoding="utf-8")


def _not_equal(verdict: Any, asked_for_files: bool) -> JobFailed:
    hint = "No file was written." if asked_for_files else ""
    note = f" ({verdict.note})" if verdict.note else ""
    return JobFailed(
        f"the fused model is not shown to be equal: {verdict.verdict}{note}.", hint=hint
    )
