"""From MODEL to what a profile measures: forms, float64 reference and counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli import cells, macs, runners, tune_view, tuner
from fastvit_cli.errors import BadInput, JobFailed, summary
from fastvit_cli.measured import Setting
from fastvit_cli.plans import Task

if TYPE_CHECKING:
    from fastvit_cli.profile import Job


@dataclass(frozen=True)
class Made:
    """One model, ready to be measured.

    Attributes:
        facts: its JSON: parameters, MACs and ops of each form.
        state: what the compiler's stages made; None where there is nothing to fuse.
    """

    grid: cells.Grid
    facts: dict[str, Any]
    notes: list[str]
    state: Any


def prepare(text: str, job: Job, scratch: Path, stage: Callable[[str], None]) -> Made:
    """Load a model and fuse it.

    Raises:
        BadInput: MODEL or an option is at fault.
        JobFailed: its fused form is not equal.
    """
    import torch

    runner = runners.load(text, job.options)
    card = runner.recorded or runner.card
    as_loaded = "fused" if card.form == "fused" else "train"
    if runner.form == "onnx" and runner.recorded is None:
        as_loaded = "as given"
    model = runner.model if runner.form == "module" else runner.call
    forms = {as_loaded: model if runner.model is not None else None}
    notes = [*runner.notes]
    state = None
    if as_loaded == "train" and runner.model is not None:
        stage(f"fuse {text}")
        forms["fused"], state = fuse(runner)
    tunable = job.tune and len(forms) == 2
    tuned = _tuned(runner, job, stage) if tunable else None
    if tuned is not None and tuned.plan is not None:
        forms["tuned"] = _written(runner, tuned)
    subjects = {
        name: cells.subject_of(runner, form, scratch, job.threads)
        for name, form in forms.items()
    }
    grid = cells.Grid(
        name=text,
        forms=subjects,
        reference=runner.in_dtype(torch.float64),
        backends=job.backends,
        dtypes=job.dtypes or (runner.dtype,),
    )
    if grid.reference is None:
        notes.append(f"{text}: no float64 reference, so that no form is advised")
    facts = {
        "model": text,
        "input_size": list(runner.card.input_size),
        "weights": runner.card.weights,
        "forms": {name: _counts(subject) for name, subject in subjects.items()},
        **({"tune": tuned.document} if tuned else {}),
    }
    if job.tune and tuned is None:
        notes.append(f"{text}: only a model before fusion can be tuned")
    elif tuned is not None:
        notes.append(f"{text}: {tune_view.sentence(tuned.document).rstrip('.')}")
    return Made(grid, facts, notes, state)


def fuse(runner: runners.Runner) -> tuple[Any, Any]:
    """(fused form, shown to be equal; the stages' state, None without one graph).

    Raises:
        BadInput: the compiler cannot take the model.
        JobFailed: the result is not equal.
    """
    import repcompiler as rc
    from repcompiler.compile import run_stages

    state = None
    try:
        try:
            state = run_stages(runner.model, runner.inputs)
            module, report = state.rewritten.module, state.report
        except rc.CaptureError:  # no graph as a whole: fused in parts, or refused
            result = rc.fuse(runner.model, runner.inputs)
            module, report = result.model, result.report
    except rc.RepCompilerError as error:
        message = f"{runner.name}: {error.args[0] if error.args else error}"
        raise BadInput(message, hint=error.hint) from error
    verdict = report.equivalence
    if not verdict.ok:
        raise JobFailed(
            f"{runner.name}: the fused form is not shown to be equal: "
            f"{verdict.verdict}.",
            hint="Run `fastvit fuse` on it for the report.",
        )
    return module, state


def _tuned(
    runner: runners.Runner, job: Job, stage: Callable[[str], None]
) -> tuner.Tuned:
    """The plan that is fastest here, for the first batch size that is asked for."""
    batch = job.batches[0] if runner.dynamic_batch else 1
    setting = Setting(runner.device, runner.dtype, job.threads, batch)
    return tuner.tune(Task(runner.model, runner.inputs, setting), stage)


def _written(runner: runners.Runner, tuned: tuner.Tuned) -> Any:
    """The tuned form; whether it is equal is judged in every cell that runs it."""
    import repcompiler as rc

    told: dict[str, Any] = {"tuning": tuned.tuning, "verify": False}
    return rc.fuse(runner.model, runner.inputs, **told).model


def _counts(subject: cells.Subject) -> dict[str, Any]:
    """Parameters, MACs and ops of one forward pass of batch 1."""
    from repcompiler.counting import count

    if subject.model is None:
        return {"params": None, "macs": None, "ops": None}
    params = sum(p.numel() for p in subject.model.parameters())
    ops, dispatched = count(subject.model, subject.inputs)
    row: dict[str, Any] = {"params": params, "ops": ops.total(), "macs": dispatched}
    try:
        counted = macs.count(subject.model, subject.inputs)
    except Exception as error:  # fvcore traces, which a model may not survive
        return {**row, "macs_by_operator": None, "uncounted": summary(error, 120)}
    return {
        **row,
        "macs": counted.total,
        "macs_dispatched": dispatched,
        "macs_by_operator": counted.by_operator,
        "uncounted": counted.uncounted,
    }
