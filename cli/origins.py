"""What a candidate should be, where it comes from the reference: op by op.

The reference is fused again and its constants recomposed in float64; the candidate is
read as a list of steps and laid beside it. That sees what no output would show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastvit_cli import onnxsteps, tuner
from fastvit_cli.exporters import rebatch
from fastvit_cli.runners import Runner

if TYPE_CHECKING:
    from torch import Tensor

    from repcompiler.differences import Alignment, Difference
    from repcompiler.provenance import Twin
    from repcompiler.steps import Step

ROUNDINGS = 8  # of w·γ/√(σ² + ε) and (b - μ)·γ/√(σ² + ε) + β, one after another
Beside = tuple["Alignment", "tuple[Difference, ...]", "list[Step]"]


@dataclass(frozen=True)
class Origin:
    """The candidate beside the form of the reference that it is nearest to.

    Attributes:
        form: `fused` or `train`.
        related: whether it has that form, so that the differences decide.
        shared: how large a part of its ops are the candidate's, in order.
        steps, tensors: how many were compared.
        differences: what is not as it should be, in the order of the graph.
        regions: names of what was fused, in the fused form.
        kept: affine ops that stayed, with the reason.
        numbers: name of the constant that differs first, as it should be, as it is.
    """

    form: str
    related: bool
    shared: float
    steps: int
    tensors: int
    differences: tuple[dict[str, Any], ...]
    regions: tuple[str, ...]
    kept: tuple[dict[str, Any], ...]
    numbers: tuple[str, Tensor, Tensor] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, without tensors."""
        return {key: value for key, value in vars(self).items() if key != "numbers"}

    @property
    def equal(self) -> bool:
        """Whether every step and every number is as it should be."""
        return self.related and not self.differences


def trace(reference: Runner, candidate: Runner) -> Origin | None:
    """The candidate beside its twin; None where none can be made.

    Needs a reference that torch can read, one dtype, and a candidate whose ops have
    names that are known: OpenVINO takes them apart into its own.
    """
    if reference.model is None or reference.dtype != candidate.dtype:
        return None
    if candidate.form == "ir":
        return None
    best: tuple[Twin, Beside] | None = None
    for twin in _twins(reference, candidate):
        try:
            found = _beside(twin, reference, candidate)
        except Exception:  # a model of either side that torch cannot export
            continue
        if best is None or found[0].shared > best[1][0].shared:
            best = (twin, found)
        if found[0].shared == 1.0 and found[0].related:
            break
    return None if best is None else _origin(best[0], *best[1])


def _twins(reference: Runner, candidate: Runner) -> Any:
    from repcompiler.provenance import plain_twin, twins

    recorded = candidate.recorded
    yield_fused = recorded is None or recorded.form == "fused"
    if not yield_fused:
        yield plain_twin(reference.model)
    try:
        door = recorded.capture if recorded else "auto"
        tuning = tuner.from_card(recorded.tuning) if recorded else None
        told = {"capture": door, "tuning": tuning}
        yield from twins(reference.model, reference.inputs, **told)
    except Exception:  # what cannot be captured, or a program's own guards
        yield plain_twin(reference.model)


def _beside(twin: Twin, reference: Runner, candidate: Runner) -> Beside:
    from repcompiler.differences import align
    from repcompiler.segments import confirmed
    from repcompiler.steps import as_program, program_steps

    if candidate.form == "onnx":
        graph = onnxsteps.twin_graph(twin.model, reference.inputs, candidate.declared)
        theirs = onnxsteps.onnx_steps(onnxsteps.read(candidate.file))
        found = align(onnxsteps.onnx_steps(graph), theirs, twin.exact)
        ours = candidate.recorded is not None
        sure = [d for d in found.differences if ours or d.kind == "numbers"]
        return found, _beyond_rounding(sure, found, candidate), theirs
    free = [
        [axis for axis, size in enumerate(sizes) if size is None]
        for sizes in candidate.declared or ()
    ]
    batch = 2 if free and 0 in free[0] else None
    inputs = rebatch(reference.inputs, batch) if batch else reference.inputs
    mine = as_program(twin.model, inputs, free)
    other = as_program(candidate.model, inputs)
    theirs = program_steps(other)
    found = align(program_steps(mine), theirs, twin.exact)
    sure = confirmed(found, mine, other, inputs)
    return found, _beyond_rounding(sure, found, candidate), theirs


def _beyond_rounding(
    found: Sequence[Difference], alignment: Alignment, candidate: Runner
) -> tuple[Difference, ...]:
    """Without what another tool may lose that composes in the candidate's own dtype.

    torch's ONNX exporter merges conv and norm so; a net of one such layer is no proof
    of another fuser, its roundings no fault. This project's files are rounded once.
    """
    import torch

    if candidate.recorded is not None:
        return tuple(found)
    reach = ROUNDINGS * torch.finfo(getattr(torch, candidate.dtype)).eps

    def rounded(difference: Difference) -> bool:
        made = difference.place in alignment.composed
        return made and difference.error is not None and difference.error <= reach

    return tuple(difference for difference in found if not rounded(difference))


def _origin(
    twin: Twin,
    alignment: Alignment,
    differences: tuple[Difference, ...],
    theirs: list[Step],
) -> Origin:
    rows: list[dict[str, Any]] = []
    for difference in differences:
        region = twin.region_of(difference.place)
        name = region.name if region else _module(difference.place, twin)
        kind = region.kind if region else "op that stayed"
        rows.append({"region": name, "region_kind": kind, **asdict(difference)})
    return Origin(
        form=twin.form,
        related=alignment.related,
        shared=alignment.shared,
        steps=len(alignment.pairs),
        tensors=alignment.tensors,
        differences=tuple(rows),
        regions=tuple(region.name for region in twin.regions),
        kept=tuple(dict(vars(kept)) for kept in twin.kept),
        numbers=_numbers(twin, alignment, differences, theirs),
    )


def _numbers(
    twin: Twin,
    alignment: Alignment,
    differences: tuple[Difference, ...],
    theirs: list[Step],
) -> tuple[str, Tensor, Tensor] | None:
    for difference in differences:
        if difference.kind != "numbers" or difference.place not in twin.exact:
            continue
        step = theirs[alignment.pairs[difference.step]]
        wanted = twin.exact[difference.place]
        found = [t for t in step.tensors.values() if t.shape == wanted.shape]
        if found:
            return difference.place, wanted, found[0].detach()
    return None


def _module(place: str, twin: Twin) -> str:
    """The module that a constant's name, or a place, belongs to."""
    if place in twin.exact:
        return place.rpartition(".")[0] or place
    return place or "(root)"
