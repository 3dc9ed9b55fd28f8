"""Two models on the same inputs: are they the same function, and how is that known?

The yardstick is a float64 form of the reference, else one of the candidate, else the
reference itself. Rounding is measured, not assumed: how far the reference's own dtype
is from the yardstick, and, where that says too little, how far its outputs move when
its inputs move by one rounding. The candidate may be `limit` times as far, in the
2-norm and in the largest element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastvit_cli.check_cases import Case
from fastvit_cli.errors import summary
from fastvit_cli.runners import Runner, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DRAWS = 3  # of inputs moved by one rounding
TOP = 5


@dataclass(frozen=True)
class Finding:
    """What one case showed.

    Attributes:
        verdict: `equal`, `different`, `not comparable` or `skipped`.
        error_ratio: the larger of the two norms' ratios.
        worst: output, index, and both values of the element that is furthest off.
    """

    case: str
    shape: tuple[int, ...]
    verdict: str
    error_ratio: float | None = None
    max_abs: float | None = None
    top1: float | None = None
    top5: float | None = None
    worst: dict[str, Any] | None = None
    note: str = ""

    @property
    def rows(self) -> int:
        """How many samples the case held."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class Pair:
    """Reference and candidate, with what judges them.

    Attributes:
        yardstick: a float64 form of one of the two, or None.
        own: the reference in the candidate's dtype, whose rounding is the measure.
        turned: whether the yardstick is the candidate's, so that roles are swapped.
    """

    reference: Runner
    candidate: Runner
    yardstick: Runner | None
    own: Runner
    turned: bool

    @property
    def how(self) -> str:
        """The yardstick in words."""
        if self.yardstick is None:
            return "the reference as it is, with inputs moved by one rounding"
        return f"the {'candidate' if self.turned else 'reference'} in float64"


def pair(reference: Runner, candidate: Runner) -> Pair:
    """The two models with the best yardstick that can be run."""
    import torch

    own = reference
    if candidate.dtype != reference.dtype:
        own = reference.in_dtype(getattr(torch, candidate.dtype)) or reference
    wide = reference.in_dtype(torch.float64)
    if wide is not None:
        return Pair(reference, candidate, wide, own, turned=False)
    wide = candidate.in_dtype(torch.float64)
    return Pair(reference, candidate, wide, own, turned=wide is not None)


def in_terms_of(reference: Runner, candidate: Runner) -> Runner:
    """The candidate with the reference's dtype, where it takes that and gives it back.

    A model's dtype is that of its first weight, which may be the odd one out.
    """
    import torch

    if candidate.dtype == reference.dtype or candidate.model is None:
        return candidate
    inputs = cast(candidate.inputs, getattr(torch, reference.dtype))
    told = replace(candidate, dtype=reference.dtype, inputs=inputs)
    case = Case("example", inputs)
    own, found = outputs_of(reference, case), outputs_of(told, case)
    if isinstance(own, str) or isinstance(found, str) or _misfit(own, found):
        return candidate
    return told


def unrepeatable(model: Runner, case: Case, limit: float) -> str:
    """Why one input has no one output; empty if it has.

    What a model draws at random, or remembers, would pass for its rounding.
    """
    first, again = outputs_of(model, case), outputs_of(model, case)
    if isinstance(first, str) or isinstance(again, str) or not first:
        return ""
    if not _misfit(first, again):
        judged = _judge(Finding(case.name, (), "equal"), first, again, first, limit)
        if judged.verdict != "different":
            return ""
    return (
        "the reference gives another output when it is run again on the same input: "
        "it draws at random, or keeps a state"
    )


def compare(models: Pair, case: Case, limit: float) -> Finding:
    """Run both on one case and judge."""
    shape = tuple(case.inputs[0].shape)
    base = Finding(case.name, shape, "equal")
    for role, model in (("reference", models.own), ("candidate", models.candidate)):
        if not model.takes(case.inputs):
            note = f"the {role} was written for other sizes"
            return replace(base, verdict="skipped", note=note)
    own = outputs_of(models.own, case)
    if isinstance(own, str):
        verdict = "not comparable" if case.strict else "skipped"
        return replace(base, verdict=verdict, note=f"the reference does not run: {own}")
    if not own:
        note = "the reference returns no tensor"
        return replace(base, verdict="not comparable", note=note)
    found = outputs_of(models.candidate, case)
    if isinstance(found, str):
        return _not_run(base, models.candidate, case, found)
    problem = _misfit(own, found)
    if problem:
        return replace(base, verdict="different", note=problem)
    truth = own
    if models.yardstick is not None:
        wide = outputs_of(models.yardstick, case)
        truth = own if isinstance(wide, str) else wide
    measured, judged = (found, own) if models.turned else (own, found)
    finding = _judge(base, measured, judged, truth, limit)
    doubtful = finding.verdict == "different" and not finding.note
    if doubtful or (truth is own and finding.error_ratio):
        finding = _with_moved_inputs(models, case, (own, found, truth), finding, limit)
    return _with_agreement(finding, own, found)


def _not_run(base: Finding, candidate: Runner, case: Case, why: str) -> Finding:
    """A candidate that refuses a case; one captured at one size may refuse others."""
    if candidate.may_refuse(case.inputs):
        note = f"the candidate was captured at another size and refuses this one: {why}"
        return replace(base, verdict="skipped", note=note)
    note = f"the candidate does not run: {why}"
    return replace(base, verdict="different", note=note)


def outputs_of(model: Runner, case: Case) -> list[Tensor] | str:
    """The tensors that a model gives for a case, or why it gives none."""
    import torch

    inputs = cast(case.inputs, getattr(torch, model.dtype))
    try:
        # Copies: a model may write to its inputs.
        return model.tensors(*(value.clone().to(model.device) for value in inputs))
    except (Exception, SystemExit) as error:  # code of somebody else runs here
        return summary(error, 160)


def _misfit(own: Sequence[Tensor], found: Sequence[Tensor]) -> str:
    """What makes the outputs incomparable, or nothing."""
    if len(own) != len(found):
        return f"{len(found)} output tensors instead of {len(own)}"
    for index, (a, b) in enumerate(zip(own, found)):
        if a.shape != b.shape:
            return f"output {index} has shape {_size(b)} instead of {_size(a)}"
        if a.dtype != b.dtype:
            return f"output {index} is {_name(b)} instead of {_name(a)}"
    return ""


def _size(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "()"


def _name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _judge(
    base: Finding,
    own: Sequence[Tensor],
    found: Sequence[Tensor],
    truth: Sequence[Tensor],
    limit: float,
) -> Finding:
    from repcompiler.outputs import plain
    from repcompiler.verify import error_ratio

    ratio, largest, compared = 0.0, 0.0, 0
    worst: dict[str, Any] | None = None
    for index, (a, b, t) in enumerate(zip(own, found, truth)):
        a, b, t = plain(a), plain(b), plain(t)
        keep, problem = _comparable(a, b, t)
        if problem:
            note = f"output {index}: {problem}"
            return replace(base, verdict="different", error_ratio=math.inf, note=note)
        compared += int(keep.sum())
        a, b, t = (value.masked_fill(~keep, 0) for value in (a, b, t))
        both = max(error_ratio(a, b, t), error_ratio(a, b, t, math.inf))
        distance = (b.double() - t.double()).abs()
        largest = max(largest, float(distance.max()) if distance.numel() else 0.0)
        if both > ratio or worst is None:
            worst = _worst(index, distance, b, t)
        ratio = max(ratio, both)
    if not compared and any(value.numel() for value in truth):
        note = "the reference gives no finite number"
        return replace(base, verdict="not comparable", note=note)
    verdict = "equal" if ratio <= limit else "different"
    return replace(
        base, verdict=verdict, error_ratio=ratio, max_abs=largest, worst=worst
    )


def _comparable(a: Tensor, b: Tensor, t: Tensor) -> tuple[Tensor, str]:
    """Where finite numbers are to be compared, and what is wrong with the others.

    Where the reference overflows in its own dtype only, a fused model need not.
    """
    import torch

    if not t.is_floating_point():
        return torch.ones_like(t, dtype=torch.bool), ""
    keep = a.isfinite() & t.isfinite()
    if bool((keep & ~b.isfinite()).any()):
        return keep, "not finite where the reference is"
    wild = ~a.isfinite() & ~t.isfinite()
    if not bool(torch.equal(_kind(b)[wild], _kind(t)[wild])):
        return keep, "NaN and infinity are not where the reference has them"
    return keep, ""


def _kind(value: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 and 3 the infinities."""
    kind = value.isnan().int()
    kind[value.isposinf()] = 2
    kind[value.isneginf()] = 3
    return kind


def _worst(index: int, distance: Tensor, b: Tensor, t: Tensor) -> dict[str, Any] | None:
    import torch

    if not distance.numel():
        return None
    place = torch.unravel_index(distance.argmax(), distance.shape)
    where = tuple(int(i) for i in place)
    return {
        "output": index,
        "index": list(where),
        "reference": float(t[where]),
        "candidate": float(b[where]),
    }


def _with_moved_inputs(
    models: Pair,
    case: Case,
    outputs: tuple[Sequence[Tensor], ...],
    finding: Finding,
    limit: float,
) -> Finding:
    """Judge again by how far the reference moves with its inputs' last digit.

    A single distance from the yardstick may be small by luck; and where the model
    magnifies, a difference of that size says nothing.
    """
    import torch

    own, found, truth = outputs
    dtype = getattr(torch, models.own.dtype)
    generator = torch.Generator().manual_seed(0)
    best = finding
    for _ in range(DRAWS):
        moved = outputs_of(models.own, _moved(case, dtype, generator))
        if isinstance(moved, str) or _misfit(own, moved):
            return finding
        again = _judge(
            Finding(case.name, finding.shape, "equal"), moved, found, truth, limit
        )
        if again.error_ratio is None or again.note:
            continue
        if best.error_ratio is None or again.error_ratio < best.error_ratio:
            best = replace(finding, error_ratio=again.error_ratio)
    if best is finding:
        return finding
    equal = (best.error_ratio or 0.0) <= limit
    note = "" if truth is own else "judged by inputs moved by one rounding"
    return replace(best, verdict="equal" if equal else "different", note=note)


def _moved(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Case:
    import torch

    eps = torch.finfo(dtype).eps

    def move(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        signs = torch.randint(-1, 2, value.shape, generator=generator)
        return value * (1 + eps * signs).to(value.dtype)

    return replace(case, inputs=tuple(move(value) for value in case.inputs))


def _with_agreement(
    finding: Finding, own: Sequence[Tensor], found: Sequence[Tensor]
) -> Finding:
    """Top-1 and top-5, where the output looks like logits; they decide nothing."""
    import torch

    from repcompiler.outputs import plain

    if len(own) != 1 or own[0].dim() != 2 or not own[0].is_floating_point():
        return finding
    a, b = plain(own[0]), plain(found[0])
    if a.shape[1] < 2:
        return finding
    top1 = float((a.argmax(1) == b.argmax(1)).double().mean())
    top5 = None
    if a.shape[1] > TOP:
        best = [value.topk(TOP, dim=1).indices.sort(dim=1).values for value in (a, b)]
        top5 = float(torch.eq(*best).all(1).double().mean())
    return replace(finding, top1=top1, top5=top5)
