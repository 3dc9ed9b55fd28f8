"""The yardstick for a model that decides by its own rounding.

A top-k or a threshold takes another turn for another rounding; then one run of the
original says little about how far its roundings reach. What says more is how far its
output moves when its inputs and weights move by a few roundings: a result that is exact
for data so near is as good as any (backward error; Higham, *Accuracy and Stability of
Numerical Algorithms*, section 1.5). Few are `MAX_ERROR_RATIO`: where nothing takes
another turn, that moves the output by as many times its own rounding, which is what
every other model is allowed.

A graph that casts values to a narrower dtype itself rounds in float64 too: `widened` is
the same graph without those casts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from repcompiler.held import left_as_found
from repcompiler.outputs import run
from repcompiler.report import VerifyReport
from repcompiler.verify import EXACT, MAX_ERROR_RATIO, cast, in_float64

DRAWS = 16
# Of a model that magnifies its rounding, three digits have to be left to compare.
MOST_MAGNIFIED = 1e-3
_MOVES = f"moves as far when inputs and weights move by {MAX_ERROR_RATIO:g} roundings"


def against_nearby(
    original: nn.Module,
    candidate: nn.Module,
    batches: Sequence[tuple[Any, ...]],
    verdict: VerifyReport,
) -> VerifyReport:
    """A second look at a `different` whose kernels, kept in float64, are exact.

    It becomes `equal` where, on every batch, each output is no farther from the float64
    reference than the original's own for data moved by `MAX_ERROR_RATIO` roundings. The
    report's `error_ratio` stays what it was.
    """
    unsure = verdict.verdict == "different" and verdict.exactness is not None
    reference = in_float64(original) if unsure else None
    if reference is None or (verdict.exactness or 0.0) > EXACT:
        return verdict
    if not _passes(original, candidate, reference, batches):
        return verdict
    note = f"the model decides by its own rounding: its output {_MOVES}"
    return replace(verdict, ok=True, verdict="equal", note=note)


def against_nearby64(
    original: nn.Module,
    candidate: nn.Module,
    candidate64: nn.Module,
    batches: Sequence[tuple[Any, ...]],
    verdict: VerifyReport,
) -> VerifyReport:
    """Judge by what float64 can tell, where the model magnifies even its roundings.

    Each region was compared by itself, to 1e-9 of what it adds up, so no fault hides
    behind what comes after it. Where the output has no digits left, nothing is told.
    Its own dtype then has none either, and is looked at only where float64 has some.
    """
    reference = in_float64(original)
    if reference is None or not is_as_near(original, candidate64, batches):
        return verdict
    note = f"the model magnifies its own rounding: in float64 its output {_MOVES}"
    if (verdict.exactness or 0.0) > MOST_MAGNIFIED:
        note += ", and no digits are left to compare; each region is equal by itself"
        return replace(verdict, verdict="not comparable", note=note)
    within = (verdict.error_ratio or 0.0) <= MAX_ERROR_RATIO
    if not within and not _passes(original, candidate, reference, batches):
        return verdict
    return replace(verdict, ok=True, verdict="equal", note=note)


def is_as_near(
    original: nn.Module, candidate: nn.Module, batches: Sequence[tuple[Any, ...]]
) -> bool:
    """Whether a float64 candidate is as near as the original is for data so near.

    Both in float64: where ties are exact, as between scores that are all 1, even its
    roundings decide. Not a proof by itself, as an output that jumps may hide anything:
    what was replaced has to be compared without what decides.
    """
    reference = in_float64(original)
    wide = [cast(batch, torch.float64) for batch in batches]
    return reference is not None and _passes(reference, candidate, reference, wide)


def _passes(
    original: nn.Module,
    candidate: nn.Module,
    reference: nn.Module,
    batches: Sequence[tuple[Any, ...]],
) -> bool:
    """Whether on every batch the candidate errs no more than the original, moved."""
    with left_as_found(original, candidate, reference):
        ratios = [_ratio(original, candidate, reference, batch) for batch in batches]
    return max(ratios, default=float("inf")) <= 1.0


def _ratio(
    original: nn.Module,
    candidate: nn.Module,
    reference: nn.Module,
    batch: tuple[Any, ...],
) -> float:
    """Error of the candidate over the largest of the original's, its data moved.

    Above 1 it is exact. At or below, the candidate passes, and there may be less to it.
    """
    truth = run(reference, cast(batch, torch.float64))
    found = run(candidate, batch)
    missed = _errors(found, truth)
    allowed = [*map(_rounding, found, truth)]
    share = float("inf")
    for model, inputs in _moved(original, batch):
        allowed = [*map(max, allowed, _errors(run(model, inputs), truth))]
        share = max(map(_share, missed, allowed), default=0.0)
        if share <= 1.0:  # more draws only allow more
            break
    return share


def _share(error: float, allowed: float) -> float:
    if error == 0.0 or allowed == float("inf"):
        return 0.0  # the original's own output takes another shape
    return error / allowed if allowed else float("inf")


def _errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Distance of each output; outputs of another shape, or no number, are far away."""
    if [t.shape for t in found] != [t.shape for t in truth]:
        return [float("inf")] * len(truth)
    distances = [float((a.double() - b.double()).norm()) for a, b in zip(found, truth)]
    return [d if d == d else float("inf") for d in distances]


def _rounding(found: Tensor, truth: Tensor) -> float:
    """One rounding of the output itself."""
    eps = torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
    return eps * float(truth.double().norm())


def _moved(
    original: nn.Module, batch: tuple[Any, ...]
) -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    """The model and its inputs as they are, then copies with each number moved."""
    yield original, batch
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        twin = copy.deepcopy(original)
        with torch.no_grad():
            for tensor in (*twin.parameters(), *twin.buffers()):
                tensor.copy_(_nudged(tensor, generator))
        yield twin, _nudged(batch, generator)


def _nudged(values: Any, generator: torch.Generator) -> Any:
    """Each floating number `MAX_ERROR_RATIO` roundings up or down."""

    def nudge(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        signs = torch.randint(0, 2, leaf.shape, generator=generator) * 2 - 1
        step = MAX_ERROR_RATIO * torch.finfo(leaf.dtype).eps
        return leaf * (1 + step * signs.to(leaf))

    return pytree.tree_map(nudge, values)


_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = ("float", "half", "bfloat16")


def widened(module: nn.Module) -> nn.Module:
    """A copy of a float64 graph that casts no value to a narrower floating dtype."""
    wide = copy.deepcopy(module)
    if not isinstance(wide, GraphModule):
        return wide

    def widen(arg: Any) -> Any:
        narrow = isinstance(arg, torch.dtype) and arg in _NARROW
        return torch.float64 if narrow else arg

    for node in wide.graph.nodes:
        dtypes = [
            isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())
        ]
        if any(dtypes):
            node.args = tuple(map(widen, node.args))
            node.kwargs = {k: widen(v) for k, v in node.kwargs.items()}
        if node.op == "call_method" and node.target in _CASTS:
            node.target = "double"
    wide.recompile()
    return wide
