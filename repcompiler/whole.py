"""A model of which only parts were captured: put together, compared, reported."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from repcompiler.counting import count
from repcompiler.errors import CaptureError, VerificationError
from repcompiler.held import left_as_found
from repcompiler.nearby import is_as_near
from repcompiler.parts import (
    Opened,
    Pipeline,
    Search,
    assemble,
    assemble_wide,
    open_parts,
)
from repcompiler.reasons import Reason
from repcompiler.report import (
    Change,
    FuseReport,
    Kept,
    OpCount,
    PartReport,
    Region,
    VerifyReport,
)
from repcompiler.verify import EXACT, compare, in_float64, max_distance, sample_batches

DOOR = "submodules"


def fuse_parts(
    model: nn.Module,
    inputs: tuple[Any, ...],
    pipeline: Pipeline,
    *,
    check: bool,
    samples: int,
    why: str,
) -> tuple[nn.Module, FuseReport]:
    """A copy of `model` with the submodules that could be captured fused.

    Args:
        model: in eval mode; it is not changed.
        inputs: positional example inputs.
        pipeline: fuses one submodule on example inputs of its own.
        check: compare the copy with the model as a whole.
        samples: how many inputs to compare them on.
        why: the reason that the model as a whole could not be captured.

    Raises:
        CaptureError: no submodule could be captured either.
    """
    start = time.perf_counter()
    found = open_parts(model, inputs, pipeline)
    if not found.opened and not found.idle:
        raise CaptureError(why, hint=_hint(found))
    searched = time.perf_counter() - start
    start = time.perf_counter()
    batches = sample_batches(inputs, samples)
    result, verdict = _settle(model, found, batches, check)
    compared = time.perf_counter() - start
    seconds = _seconds(found, searched, compared)
    report = _report(model, result, inputs, found, verdict, seconds)
    return result, replace(report, notes=(why, *report.notes))


def _hint(found: Search) -> str:
    told = [f"{path}: {reason}" for path, reason in list(found.left.items())[:3]]
    return " ".join(["No submodule could be captured either.", *told])


def _settle(
    model: nn.Module,
    found: Search,
    batches: Sequence[tuple[Any, ...]],
    check: bool,
) -> tuple[nn.Module, VerifyReport]:
    """The copy with every part with which it is the same function."""
    if not check:
        verdict = VerifyReport(False, "not checked", note="verify=False")
        return assemble(model, found.opened), verdict
    result, verdict = _attempt(model, found.opened, batches)
    if verdict.ok or verdict.verdict == "not comparable":
        return result, verdict
    good: list[Opened] = []
    for opened in found.opened:
        if _attempt(model, [opened], batches)[1].ok:
            good.append(opened)
        else:
            found.left[opened.path] = "with it fused, the model as a whole differs"
    found.opened = good
    return _attempt(model, good, batches)


def _attempt(
    model: nn.Module, opened: Sequence[Opened], batches: Sequence[tuple[Any, ...]]
) -> tuple[nn.Module, VerifyReport]:
    result, wide = assemble(model, opened), assemble_wide(model, opened)
    try:
        verdict = compare(model, result, wide, batches)
    except VerificationError as error:
        if len(batches) > 1:  # noise may be no input for this model
            return _attempt(model, opened, batches[:1])
        return result, VerifyReport(False, "different", note=str(error))
    if verdict.verdict == "different" and wide is not None:
        verdict = _in_float64_alone(model, wide, batches, verdict)
    return result, verdict


def _in_float64_alone(
    model: nn.Module,
    wide: nn.Module,
    batches: Sequence[tuple[Any, ...]],
    verdict: VerifyReport,
) -> VerifyReport:
    """Judge in float64, where a model's own decisions turn on its rounding.

    A top-k or a threshold takes another turn for another rounding, so that outputs in
    the model's dtype jump. In float64 both take the same turns, but for exact ties. The
    parts decide nothing, and each was compared by itself before.
    """
    reference = in_float64(model)
    if reference is None:
        return verdict
    with left_as_found(wide):
        error = max_distance(reference, wide, batches)
    if error is not None and error <= EXACT:
        note = "the model decides by its own rounding: it was compared in float64 alone"
        return replace(verdict, ok=True, verdict="equal", exactness=error, note=note)
    if error is None or not is_as_near(model, wide, batches):
        return verdict
    note = (
        "the model decides by its own rounding in float64 as well: each part was "
        "compared by itself, the whole with the model for data moved by 8 roundings"
    )
    return replace(verdict, ok=True, verdict="equal", exactness=None, note=note)


def _seconds(found: Search, searched: float, compared: float) -> dict[str, float]:
    total: dict[str, float] = {}
    for report in _reports(found):
        for stage, spent in report.seconds.items():
            total[stage] = total.get(stage, 0.0) + spent
    stages = ("capture", "fuse", "verify", "report")
    known = sum(total.get(stage, 0.0) for stage in stages)
    total["capture"] = total.get("capture", 0.0) + max(0.0, searched - known)
    total["verify"] = total.get("verify", 0.0) + compared
    return total


def _reports(found: Search) -> Iterator[FuseReport]:
    yield from (opened.report for opened in found.opened)
    yield from found.idle.values()


# ---- the report --------------------------------------------------------------------


def _report(
    model: nn.Module,
    result: nn.Module,
    inputs: tuple[Any, ...],
    found: Search,
    verdict: VerifyReport,
    seconds: dict[str, float],
) -> FuseReport:
    before, macs_before = count(model, inputs)
    after, macs_after = count(result, inputs)
    parts = [(o.path, o.report) for o in found.opened] + list(found.idle.items())
    return FuseReport(
        capture=DOOR,
        ops=OpCount(
            before.total(),
            after.total(),
            dict(before.most_common()),
            {"convolution": 0, "batch_norm": 0, **dict(after.most_common())},
        ),
        params=Change(_parameters(model), _parameters(result)),
        macs=Change(macs_before, macs_after),
        regions=tuple(
            _moved(region, path) for path, r in parts for region in r.regions
        ),
        kept=(
            *(replace(k, name=f"{p}.{k.name}") for p, r in parts for k in r.kept),
            *_kept_outside(model, [path for path, _ in parts]),
        ),
        equivalence=verdict,
        seconds=seconds,
        notes=tuple(f"{p}: {note}" for p, r in parts for note in r.notes),
        parts=(
            *(PartReport(path, report.capture) for path, report in parts),
            *(PartReport(path, None, why) for path, why in found.left.items()),
        ),
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _moved(region: Region, path: str) -> Region:
    return replace(region, name=f"{path}.{region.name}")


def _kept_outside(model: nn.Module, paths: Sequence[str]) -> Iterator[Kept]:
    """The norms that no captured part holds."""
    inside = {id(m) for path in paths for m in model.get_submodule(path).modules()}
    for name, module in model.named_modules():
        statistics = isinstance(getattr(module, "running_mean", None), Tensor)
        if statistics and id(module) not in inside:
            reason = Reason.NOT_CAPTURED
            yield Kept(name, "batch_norm", reason.code, reason.sentence)
