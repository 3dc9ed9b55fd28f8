"""From MODEL to what a profile measures: forms, float64 reference and counts."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli import (
    backends,
    cells,
    irmacs,
    macs,
    onnxmacs,
    runners,
    tune_view,
    tuner,
)
from fastvit_cli.backends import TUNED_IN
from fastvit_cli.errors import BadInput, JobFailed, Stop, summary
from fastvit_cli.measured import Setting
from fastvit_cli.onnx_plans import Exports
from fastvit_cli.plans import Task

if TYPE_CHECKING:
    from fastvit_cli.profile import Job

# By form, what counts a graph that only runs.
COUNTS = {"onnx": onnxmacs.counts, "ir": irmacs.counts}


@dataclass(frozen=True)
class Made:
    """One model, ready to be measured.

    Attributes:
        facts: its JSON: parameters, MACs and ops of each form.
        state: what the compiler's stages made; None where there is nothing to fuse.
        unequal: what is wrong with its fused form, which is then not measured.
    """

    grid: cells.Grid
    facts: dict[str, Any]
    notes: list[str]
    state: Any
    unequal: JobFailed | None = None


def prepare(text: str, job: Job, scratch: Path, stage: Callable[[str], None]) -> Made:
    """Load a model and fuse it.

    A model that has no fused form is measured as it is, and a note says why.

    Raises:
        BadInput: MODEL or an option is at fault.
    """
    import torch

    runner = runners.load(text, job.options)
    card = runner.recorded or runner.card
    as_loaded = "fused" if card.form == "fused" else "train"
    if runner.form in COUNTS and runner.recorded is None:
        as_loaded = "as given"
    model = runner.model if runner.form == "module" else runner.call
    forms = {as_loaded: model if runner.model is not None else None}
    notes = [*runner.notes]
    state, unequal = None, None
    if as_loaded == "train" and runner.model is not None:
        stage(f"fuse {text}")
        try:
            forms["fused"], state = fuse(runner)
        except Stop as error:
            unequal = error if isinstance(error, JobFailed) else None
            notes.append(f"{text}: it has no fused form: {error.line.rstrip('.')}")
    tuned = _tuned(runner, job, scratch, stage) if len(forms) == 2 else {}
    own = {name: _written(runner, it) for name, it in tuned.items() if it.plan}
    if "eager" in own:
        forms["tuned"] = own.pop("eager")
    make = functools.partial(
        cells.subject_of, runner, scratch=scratch, threads=job.threads
    )
    subjects = {name: make(form) for name, form in forms.items()}
    if as_loaded == "train" and "fused" in forms:
        anew = functools.partial(_fused_in, runner)
        subjects["fused"] = replace(subjects["fused"], made_in=anew)
    if "tuned" in forms:
        anew = functools.partial(_fused_in, runner, tuning=tuned["eager"].tuning)
        subjects["tuned"] = replace(subjects["tuned"], made_in=anew)
    grid = cells.Grid(
        name=text,
        forms=subjects,
        reference=runner.in_dtype(torch.float64),
        backends=job.backends,
        dtypes=job.dtypes or (runner.dtype,),
        plans={
            backend: replace(make(form), kernels=tuned[backend].kernels)
            for backend, form in own.items()
        },
    )
    if grid.reference is None:
        notes.append(f"{text}: no float64 reference, so that no form is advised")
    for subject in grid.plans.values():
        subjects.setdefault("tuned", subject)
    documents = {backend: it.document for backend, it in tuned.items()}
    first = next(iter(documents.values()), None)
    facts = {
        "model": text,
        "input_size": list(runner.card.input_size),
        "weights": runner.card.weights,
        "forms": {name: _counts(it, runner) for name, it in subjects.items()},
        **({"tune": first, "tuned_in": documents} if first else {}),
    }
    unfused = as_loaded == "train" and "fused" not in forms  # a note says so already
    if job.tune and not tuned and not unfused:
        notes.append(f"{text}: {_untuned(len(forms) == 2)}")
    for document in documents.values():
        notes.append(f"{text}: {tune_view.sentence(document).rstrip('.')}")
    return Made(grid, facts, notes, state, unequal)


def _untuned(fusible: bool) -> str:
    if fusible:
        return "no backend here can be tuned for"
    return "only a model before fusion can be tuned"


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
        message = str(error.args[0] if error.args else error)
        raise BadInput(message, hint=error.hint) from error
    verdict = report.equivalence
    if not verdict.ok:
        raise JobFailed(
            f"what fusing gives is not shown to be equal: {verdict.verdict}.",
            hint="Run `fastvit fuse` on it for the report.",
        )
    return module, state


def _fused_in(runner: runners.Runner, dtype: Any, tuning: Any = None) -> Any:
    """The fused form of the model in another dtype, judged where it is measured.

    Raises:
        JobFailed: the model does not run in it.
    """
    import repcompiler as rc

    other = runner.in_dtype(dtype)
    if other is None:
        raise JobFailed(f"{runner.name} does not run in {dtype}.")
    return rc.fuse(other.model, other.inputs, tuning=tuning, verify=False).model


def _tuned(
    runner: runners.Runner, job: Job, scratch: Path, stage: Callable[[str], None]
) -> dict[str, tuner.Tuned]:
    """By backend, the plan that is fastest there for the first batch size.

    Backends that run torch have that of eager.
    """
    if not job.tune:
        return {}
    batch = job.batches[0] if runner.dynamic_batch else 1
    exports = Exports(Path(tempfile.mkdtemp(dir=scratch)))
    found: dict[str, tuner.Tuned] = {}
    for name in job.backends:
        home = name if name in TUNED_IN else "eager"
        if home in found or backends.obstacle(home, runner.dtype, runner.device):
            continue
        stage(f"tune {runner.name} in {home}")
        setting = Setting(runner.device, runner.dtype, job.threads, batch, home)
        more = {"dynamic_batch": runner.dynamic_batch, "exports": exports}
        task = Task(runner.model, runner.inputs, setting, **more)
        found[home] = tuner.tune(task, stage)
    return found


def _written(runner: runners.Runner, tuned: tuner.Tuned) -> Any:
    """The tuned form; whether it is equal is judged in every cell that runs it."""
    import repcompiler as rc

    told: dict[str, Any] = {"tuning": tuned.tuning, "verify": False}
    return rc.fuse(runner.model, runner.inputs, **told).model


def _counts(subject: cells.Subject, runner: runners.Runner) -> dict[str, Any]:
    """Parameters, MACs and ops of one forward pass of batch 1."""
    from repcompiler.counting import count, first_samples

    if runner.form in COUNTS:
        return COUNTS[runner.form](runner.file, runner.inputs)
    if subject.model is None:
        return {"params": None, "macs": None, "ops": None}
    params = sum(p.numel() for p in subject.model.parameters())
    ops, dispatched = count(subject.model, subject.inputs)
    row: dict[str, Any] = {"params": params, "ops": ops.total(), "macs": dispatched}
    try:
        counted = macs.count(subject.model, first_samples(subject.inputs))
    except Exception as error:  # fvcore traces, which a model may not survive
        return {**row, "macs_by_operator": None, "uncounted": summary(error, 120)}
    return {
        **row,
        "macs": counted.total,
        "macs_dispatched": dispatched,
        "macs_by_operator": counted.by_operator,
        "uncounted": counted.uncounted,
    }
