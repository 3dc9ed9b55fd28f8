"""`fastvit check`: are these two models the same function, and if not, where not?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fastvit_cli import options as common
from fastvit_cli.builders import ModelOptions
from fastvit_cli.card import versions
from fastvit_cli.console import Screen, Stage, open_screen
from fastvit_cli.errors import BadInput, JobFailed, Stop
from fastvit_cli.files import check_writable, folder_for_files

if TYPE_CHECKING:
    from fastvit_cli.check_cases import Case
    from fastvit_cli.checking import Outcome
    from fastvit_cli.runners import Runner

EXAMPLES = """[bold]Examples[/bold]

fastvit check fastvit_t8 t8.onnx

fastvit check timm:repvgg_a0@best.pth fused.safetensors --data images/

fastvit check net.py:build net.onnx --junit check.xml --sarif check.sarif --quiet

fastvit check net.py:build fused.pt2 --repro repro/
fastvit check net.py:build fused.pt2 --replay repro/inputs.safetensors
"""

HELP = "Any MODEL: fastvit_t8, timm:NAME, file.py:callable, .pt2, .onnx, .xml, …"
Reference = Annotated[str, typer.Argument(metavar="REFERENCE", help=HELP)]
Candidate = Annotated[
    str, typer.Argument(metavar="CANDIDATE", help="Any MODEL; MODEL@FILE has weights.")
]
Samples = Annotated[
    int,
    typer.Option(min=1, max=10_000, help="Noise inputs, beside those made to fail."),
]
MaxErrorRatio = Annotated[
    float | None,
    typer.Option(
        metavar="K",
        help="How many times the reference's own rounding is allowed (default: 8).",
    ),
]
Data = Annotated[
    str | None, typer.Option(metavar="DIR", help="Compare on images in DIR as well.")
]
Certificate = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Re-verify what `fuse --certificate` wrote, by region."
    ),
]
Junit = Annotated[
    str | None, typer.Option(metavar="FILE", help="Write JUnit XML, one case an input.")
]
Sarif = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Write SARIF, which annotates pull requests."),
]
Replay = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Compare on inputs that --repro saved, only."),
]
Repro = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", help="When different: save the inputs and a script there."
    ),
]


@dataclass(frozen=True)
class Job:
    """What one run is asked for, checked as far as that needs no model."""

    reference: str
    candidate: str
    options: ModelOptions
    samples: int
    limit: float | None
    data: str | None = None
    certificate: str | None = None
    replay: str | None = None
    repro: Path | None = None
    junit: Path | None = None
    sarif: Path | None = None


def check(
    reference: Reference,
    candidate: Candidate,
    samples: Samples = 4,
    max_error_ratio: MaxErrorRatio = None,
    data: Data = None,
    certificate: Certificate = None,
    junit: Junit = None,
    sarif: Sarif = None,
    replay: Replay = None,
    repro: Repro = None,
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
    """Decide whether CANDIDATE is the same function as REFERENCE, and say how.

    Exit code 0 means equal, 1 different, 2 that the question cannot be asked.
    """
    screen = open_screen(json_target, quiet=quiet, debug=debug)
    options = common.parse_model(
        model_arg,
        pretrained=pretrained,
        input_size=input_size,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    if max_error_ratio is not None and not max_error_ratio > 0:
        raise BadInput(
            f"--max-error-ratio {max_error_ratio:g} is not above 0.",
            hint="8 is the default; 1 allows no more than the reference's rounding.",
        )
    if replay and data:
        raise BadInput("--replay and --data exclude each other.", hint="Give one.")
    job = Job(
        reference=reference,
        candidate=candidate,
        options=options,
        samples=samples,
        limit=max_error_ratio,
        data=data,
        certificate=certificate,
        replay=replay,
        repro=folder_for_files(repro, "--repro"),
        junit=_file(junit, "--junit", (reference, candidate)),
        sarif=_file(sarif, "--sarif", (reference, candidate)),
    )
    _run(job, screen)


def _file(text: str | None, option: str, models: tuple[str, ...]) -> Path | None:
    if text is None:
        return None
    if Path(text).resolve() in [Path(model).resolve() for model in models]:
        raise BadInput(
            f"{option} {text} would be written over a model that is compared.",
            hint="Name another file.",
        )
    check_writable(Path(text), option)
    return Path(text)


def _run(job: Job, screen: Screen) -> None:
    """Load, compare, write, show.

    Raises:
        JobFailed: the two are not the same function.
    """
    from fastvit_cli import check_files, check_view

    try:
        with screen.working("check") as stage:
            outcome, cases = _outcome(job, screen, stage)
    except Stop as error:
        check_files.write_refusal(job, error)
        raise
    written = check_files.write(job, outcome, cases)
    document = _document(job, outcome, written)
    check_view.show(screen.people, job, outcome, written)
    screen.emit(document)
    if not outcome.ok:
        hint = "" if job.repro else "--repro DIR saves the inputs and a script."
        raise JobFailed(check_view.in_one_line(job, outcome), hint=hint)


def _outcome(job: Job, screen: Screen, stage: Stage) -> tuple[Outcome, list[Case]]:
    from fastvit_cli import checking, comparing

    stage(f"load {job.reference}")
    reference = _load(job.reference, job.options)
    stage(f"load {job.candidate}")
    candidate = _load(job.candidate, _for_candidate(job.options, reference))
    candidate = comparing.in_terms_of(reference, candidate)
    certificate = None
    if job.certificate:
        from fastvit_cli import certificates

        certificate = certificates.read(job.certificate)
    with screen.hushed():
        cases = _cases(job, reference, candidate)
        outcome = checking.decide(reference, candidate, cases, job.limit, stage)
        if certificate is not None:
            stage("certificate")
            found = certificates.verify(certificate, reference, candidate)
            outcome = replace(outcome, certificate=found)
    return outcome, cases


def _load(text: str, options: ModelOptions) -> Runner:
    """A model; the options of factories reach those that have one.

    Raises:
        BadInput: see `runners.load`.
    """
    from fastvit_cli import runners, sources

    bare, _ = sources.split_weights(text, options)
    if sources.classify(bare) in ("program", "onnx", "ir", "artefact"):
        options = replace(options, args={}, pretrained=False)
    return runners.load(text, options)


def _for_candidate(options: ModelOptions, reference: Runner) -> ModelOptions:
    """The reference's size, so that the two are asked the same thing."""
    size = tuple(reference.inputs[0].shape[1:])
    wanted = len(size) > 0 and reference.inputs[0].is_floating_point()
    if options.input_size is not None or not wanted or len(reference.inputs) != 1:
        return options
    return replace(options, input_size=size)


def _cases(job: Job, reference: Runner, candidate: Runner) -> list[Case]:
    from fastvit_cli import check_cases

    if job.replay:
        return check_cases.replay(job.replay)
    maker = check_cases.maker_of(reference, candidate)
    cases = check_cases.make(maker, job.samples, job.options.seed)
    if job.data:
        cases += check_cases.from_images(job.data, maker, job.samples)
    return cases


def _document(job: Job, outcome: Outcome, written: list[str]) -> dict[str, Any]:
    """The JSON of the command, schema version 1."""
    return {
        "schema": 1,
        "reference": job.reference,
        "candidate": job.candidate,
        **outcome.to_dict(),
        "files": written,
        "versions": versions(),
    }
