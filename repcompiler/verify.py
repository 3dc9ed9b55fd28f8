"""Equality of whole models is shown, not assumed; regions come first (`region_error`).

There are two tests. `exactness`: with kernels kept in float64 it agrees with
the original in float64. `error_ratio`: in its own dtype it is at most `MAX_ERROR_RATIO`
times as far from that reference as the original was. No tolerance is tuned by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from typing import cast as typed

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from repcompiler.errors import UnsupportedInput
from repcompiler.held import Spared, undone
from repcompiler.outputs import (
    Names,
    by_tensor,
    run,
    run_watched,
    tensor_under,
    try_run,
)
from repcompiler.report import VerifyReport

EXACT = 1e-9
MAX_ERROR_RATIO = 8.0
_LOST = "an output is not finite where the original's is"

Runnable = nn.Module | torch.export.ExportedProgram


def verify(
    reference: Runnable,
    candidate: Runnable,
    inputs: Sequence[Any],
    *,
    max_error_ratio: float = MAX_ERROR_RATIO,
) -> VerifyReport:
    """Whether `candidate` is the same function as `reference`, on these inputs.

    Args:
        reference: the model to trust; it is also run in float64.
        candidate: the model to judge, in its own dtype.
        inputs: positional arguments of both.
        max_error_ratio: how many times as far from the float64 reference as the
            reference's own rounding the candidate may be.

    Raises:
        VerificationError: one of them does not run on the inputs.
        UnsupportedInput: one of them is no model.
    """
    return compare(reference, candidate, None, [tuple(inputs)], max_error_ratio)


def compare(
    reference: Runnable,
    candidate: Runnable,
    candidate64: nn.Module | None,
    batches: Sequence[tuple[Any, ...]],
    max_error_ratio: float = MAX_ERROR_RATIO,
) -> VerifyReport:
    """`verify` over several batches; with `candidate64` the exactness as well."""
    plain, wide = _runnable(reference), in_float64(_runnable(reference))
    judged = _runnable(candidate)
    state = VerifyReport(ok=True, verdict="equal", error_ratio=0.0, max_abs=0.0)
    models = _Quartet(plain, wide, judged, candidate64)
    with undone(plain, judged) as spared:
        for batch in batches:
            state = _compare_batch(models, batch, spared, state, max_error_ratio)
            final = state.exactness is None and state.error_ratio == float("inf")
            if state.verdict == "not comparable" or final:
                break
    return state


def exactness(
    captured64: nn.Module, fused64: nn.Module, batches: Sequence[tuple[Any, ...]]
) -> float:
    """Distance of two float64 graphs, relative to the first, over several batches."""
    worst = 0.0
    for batch in batches:
        double = cast(batch, torch.float64)
        pairs = zip(run(fused64, double), run(captured64, double))
        worst = max([worst, *(_distance(a, b) for a, b in pairs)])
    return worst


def max_distance(
    reference64: nn.Module, candidate64: nn.Module, batches: Sequence[tuple[Any, ...]]
) -> float | None:
    """`exactness` of any two float64 models; None where one of them does not run."""
    worst = 0.0
    for batch in batches:
        double = cast(batch, torch.float64)
        expected, found = (try_run(m, double) for m in (reference64, candidate64))
        if expected is None or found is None:
            return None
        if [t.shape for t in expected] != [t.shape for t in found]:
            return float("inf")
        worst = max([worst, *map(_distance, found, expected)])
    return worst


@dataclass(frozen=True)
class _Quartet:
    original: nn.Module
    original64: nn.Module | None
    candidate: nn.Module
    candidate64: nn.Module | None


def _compare_batch(
    models: _Quartet,
    batch: tuple[Any, ...],
    spared: Spared,
    state: VerifyReport,
    limit: float,
) -> VerifyReport:
    with spared:
        own, names = run_watched(models.original, batch)
        found = run(models.candidate, batch)
    double = cast(batch, torch.float64)
    exact = None if models.original64 is None else try_run(models.original64, double)
    if exact is not None and [t.shape for t in exact] != [t.shape for t in own]:
        exact = None  # of a view of the bits, say: nothing to compare with
    truth = own if exact is None else exact
    told = _apart(own, truth, found, models.candidate64 is not None)
    told = told or _written_apart(models, names, limit)
    if told is not None:
        return replace(state, ok=False, **told)
    ratios = [error_ratio(o, c, t) for o, c, t in zip(own, found, truth)]
    exact_so_far = state.exactness
    if models.candidate64 is not None and exact is not None:
        wide = try_run(models.candidate64, double)
        errors = [_distance(a, b) for a, b in zip(wide or (), exact)]
        exact_so_far = max([exact_so_far or 0.0, *errors]) if wide else None
    ratio = max([state.error_ratio or 0.0, *ratios])
    near = all(map(_is_near, ratios, found, truth, [limit] * len(found)))
    ok = state.ok and near and (exact_so_far or 0.0) <= EXACT
    differences = [_max_abs(a, b) for a, b in zip(found, own)]
    return replace(
        state,
        ok=ok,
        verdict="equal" if ok else "different",
        exactness=exact_so_far,
        error_ratio=ratio,
        max_abs=max([state.max_abs or 0.0, *differences]),
        top1_agreement=_agreement(own, found, state),
        samples=state.samples + _batch_size(batch),
        note=state.note if exact is not None else "no float64 reference could be run",
    )


def _apart(
    own: list[Tensor], truth: list[Tensor], found: list[Tensor], fusing: bool
) -> dict[str, Any] | None:
    """A verdict that no distance is needed for; None where distances decide."""
    if [t.shape for t in truth] != [t.shape for t in found]:
        return {"verdict": "different", "note": "output shapes differ"}
    if not any(t.numel() for t in own):
        note = "the reference returns nothing that can be compared"
        return {"verdict": "not comparable", "note": note}
    if fusing and [t.dtype for t in own] != [t.dtype for t in found]:
        return {"verdict": "different", "note": "output dtypes differ"}
    if not _finite([*own, *truth]):
        return {"verdict": "not comparable", "note": "the reference is not finite"}
    if not _finite(found):
        return {**_FINAL, "note": _LOST}
    return None


# `exactness` is unset so that nothing looks at it a second time.
_FINAL = {"verdict": "different", "exactness": None, "error_ratio": float("inf")}


def _finite(values: list[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in values if t.is_floating_point())


def _written_apart(
    models: _Quartet, written: list[Names], limit: float
) -> dict[str, Any] | None:
    """A verdict where the reference writes to what it holds, and the other does not.

    A candidate from elsewhere need not hold it (an ONNX graph has no state); a fused
    model does, or its next call reads what was there before.
    """
    for names in written:
        own, found = (
            tensor_under(models.original, names),
            tensor_under(models.candidate, names),
        )
        if own is None or not _finite([own]):
            continue
        if found is None and models.candidate64 is None:
            continue
        truth = models.original64 and tensor_under(models.original64, names)
        if truth is None or truth.shape != own.shape:
            truth = own
        if found is not None and found.shape == own.shape:
            ratio = error_ratio(own, found, truth)
            if _is_near(ratio, found, truth, limit):
                continue
        note = f"{names[0]}, which the reference writes to, holds something else"
        return {**_FINAL, "note": note}
    return None


def error_ratio(
    original: Tensor, candidate: Tensor, truth: Tensor, order: float = 2.0
) -> float:
    """‖candidate - truth‖ / max(‖original - truth‖, eps·‖truth‖), in the norm `order`.

    The 2-norm sees what is spread out; the largest element, order inf, what is in one
    place. Whole numbers are equal (0) or not (inf).
    """
    if not truth.is_floating_point():
        return 0.0 if torch.equal(candidate, truth) else float("inf")
    wide = truth.double()
    error = _norm(candidate.double() - wide, order)
    if error == 0.0:
        return 0.0
    rounding = _norm(original.double() - wide, order)
    allowed = max(rounding, torch.finfo(candidate.dtype).eps * _norm(wide, order))
    ratio = error / allowed if allowed > 0 else float("inf")
    return ratio if ratio == ratio else float("inf")


def _norm(value: Tensor, order: float) -> float:
    return float(torch.linalg.vector_norm(value, order)) if value.numel() else 0.0


def _is_near(ratio: float, candidate: Tensor, truth: Tensor, limit: float) -> bool:
    """Whether one output passes; in float64 there is no rounding to compare with."""
    if candidate.dtype is torch.float64 and truth.dtype is torch.float64:
        return ratio <= limit or _distance(candidate, truth) <= EXACT
    return ratio <= limit


def _distance(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    error, size = float((a - b).norm()), float(b.norm())
    if error == 0.0:
        return 0.0
    ratio = error / size if size > 0 else float("inf")
    return ratio if ratio == ratio else float("inf")


def _max_abs(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def _agreement(
    own: list[Tensor], found: list[Tensor], state: VerifyReport
) -> float | None:
    """Share of rows with the same largest entry, where the output looks like logits."""
    if len(own) != 1 or own[0].dim() != 2 or not own[0].is_floating_point():
        return None
    if not own[0].numel():
        return state.top1_agreement
    same = float((own[0].argmax(1) == found[0].argmax(1)).double().mean())
    before, now = state.samples, len(own[0])
    return ((state.top1_agreement or 0.0) * before + same * now) / (before + now)


def _runnable(model: Runnable) -> nn.Module:
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if isinstance(typed(object, model), nn.Module):
        return model
    raise UnsupportedInput(
        f"Cannot verify a {type(model).__name__}.",
        hint="Pass an nn.Module, an fx.GraphModule or an ExportedProgram.",
    )


def in_float64(model: nn.Module) -> nn.Module | None:
    """A copy in float64; None where the model cannot be cast."""
    try:
        twin = copy.deepcopy(model)
        tied = [names for names, _ in by_tensor(twin) if len(names) > 1]
        return _tie(twin.double(), tied)
    except Exception:  # any custom tensor may refuse; then there is none
        return None


def _tie(model: nn.Module, tied: list[Names]) -> nn.Module:
    """A cast makes two of a buffer with two names."""
    for first, *others in tied:
        if first in dict(model.named_buffers(remove_duplicate=False)):
            for name in others:
                path, _, own = name.rpartition(".")
                setattr(model.get_submodule(path), own, model.get_buffer(first))
    return model


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Inputs with their floating tensors in `dtype`."""

    def convert(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if floating else leaf

    return pytree.tree_map(convert, values)


def _batch_size(batch: tuple[Any, ...]) -> int:
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return int(leaves[0].shape[0]) if leaves and leaves[0].dim() else 1


def sample_batches(inputs: Sequence[Any], samples: int) -> list[tuple[Any, ...]]:
    """The example inputs, then noise of the same shape: `samples` in all, noise once.

    An example may hide a fault, as one that is zero or is given for two inputs.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        drawn = torch.randn(leaf.shape, generator=generator)
        return drawn.to(dtype=leaf.dtype, device=leaf.device)

    batches = [tuple(inputs)]
    for _ in range(max(1, -(-samples // max(1, _batch_size(batches[0]))) - 1)):
        batches.append(tuple(pytree.tree_map(noise, tuple(inputs))))
    return batches
