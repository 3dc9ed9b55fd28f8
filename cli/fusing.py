"""The compiler as `fastvit fuse` calls it: checked, and tuned where that is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastvit_cli import artefacts, backends, tuner
from fastvit_cli.console import Stage
from fastvit_cli.errors import BadInput, JobFailed
from fastvit_cli.measured import Setting
from fastvit_cli.plans import Task

if TYPE_CHECKING:
    from fastvit_cli.card import Card
    from fastvit_cli.fuse import Job
    from fastvit_cli.sources import Loaded


@dataclass(frozen=True)
class Fused:
    """What came out.

    Attributes:
        state: what the compiler's stages made, where a report shows it; None for a
            model without a graph as a whole.
        tuned: how it was tuned, if it was.
    """

    result: Any
    state: Any = None
    tuned: tuner.Tuned | None = None

    def card(self, loaded: Loaded, door: str) -> Card:
        """What a file that holds the fused form says."""
        told = loaded.card.tuning if self.tuned is None else self.tuned.card
        return replace(loaded.card, form="fused", capture=door, tuning=told)


def run(job: Job, loaded: Loaded, stage: Stage) -> Fused:
    """Fuse a model as the job says.

    Raises:
        BadInput: the model cannot be captured, does not fit its inputs, or cannot be
            tuned.
        JobFailed: the check cannot be made.
    """
    if job.tune is None:
        return Fused(*_compile(job, loaded, stage))
    tuned = tune(job, loaded, stage)
    fused = Fused(*_compile(job, loaded, stage, tuned.tuning), tuned)
    if tuned.plan is None or not job.verify or fused.result.report.equivalence.ok:
        return fused
    why = "the tuned plan is not shown to be equal"
    plain = tuner.Tuned(None, {**tuned.document, "kept": "default", "why": why})
    return Fused(*_compile(job, loaded, stage), plain)


def tune(job: Job, loaded: Loaded, stage: Stage) -> tuner.Tuned:
    """The plan that is fastest here.

    Raises:
        BadInput: the model is fused already, fixes its batch, cannot be captured, or
            does not run in the backend that is asked for.
    """
    import repcompiler as rc

    assert job.tune is not None
    if loaded.card.form == "fused":
        raise BadInput(
            f"{loaded.name} holds a fused form, whose plan was chosen with it.",
            hint="Tune the model that it was made from: fastvit fuse "
            f"{loaded.card.source} --tune.",
        )
    if job.tune.batch != 1 and not loaded.dynamic_batch:
        raise BadInput(
            f"{loaded.name} fixes its batch size.", hint="Leave --batch out."
        )
    device, told = loaded.device, job.tune
    why = backends.obstacle(told.backend, loaded.dtype, device)
    if why:
        raise BadInput(
            f"{loaded.name} cannot be tuned for {told.backend}: {why}.",
            hint="Name another --backend.",
        )
    setting = Setting(device, loaded.dtype, told.threads, told.batch, told.backend)
    dynamic = loaded.dynamic_batch
    task = Task(
        loaded.model,
        loaded.inputs,
        setting,
        job.capture,
        dynamic_batch=dynamic,
        in_order=job.certificate is not None,
        kernels=not job.outputs or bool(artefacts.companions(job.outputs)),
    )
    try:
        return tuner.tune(task, stage)
    except rc.RepCompilerError as error:
        raise _refused(loaded, error) from error


def _compile(
    job: Job, loaded: Loaded, stage: Stage, tuning: Any | None = None
) -> tuple[Any, Any]:
    """(the compiler's result, its state if one is asked for); errors as bad input."""
    import repcompiler as rc

    asked: dict[str, Any] = {"verify": job.verify, "progress": stage}
    if tuning is not None:
        asked["tuning"] = tuning
    try:
        found = _with_state(job, loaded, asked) if job.shows_graphs else None
        if found is not None:
            return found
        if job.certificate:
            asked["certify"] = True
        told = {"example_inputs": loaded.inputs, "capture": job.capture}
        result = rc.fuse(loaded.model, **told, **asked)
    except rc.RepCompilerError as error:
        raise _refused(loaded, error) from error
    if job.certificate and result.certificate is None:
        raise BadInput(
            f"{loaded.name} has no graph as a whole, and a certificate is about one.",
            hint="Leave --certificate out: each part is checked all the same.",
        )
    return result, None


def _with_state(
    job: Job, loaded: Loaded, asked: dict[str, Any]
) -> tuple[Any, Any] | None:
    """What `fuse` does where there is one graph, which it does not hand back."""
    import repcompiler as rc
    from repcompiler.certificate import certificate
    from repcompiler.compile import FuseResult, run_stages

    if job.capture == "submodules":
        return None
    try:
        state = run_stages(loaded.model, loaded.inputs, door=job.capture, **asked)
    except rc.CaptureError:  # `fuse` says so, or takes the model part by part
        return None
    assert state.rewritten is not None and state.report is not None
    proof = certificate(state) if job.certificate else None
    return FuseResult(state.rewritten.module, state.report, proof), state


def _refused(loaded: Loaded, error: Any) -> BadInput | JobFailed:
    import repcompiler as rc

    kind = JobFailed if isinstance(error, rc.VerificationError) else BadInput
    message = f"{loaded.name}: {error.args[0] if error.args else error}"
    return kind(message, hint=error.hint)
