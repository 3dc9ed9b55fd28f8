"""Where a graph differs from its twin: operators, wiring, and every constant number.

The twin's constants are recomposed from the reference's weights in float64. A candidate
that rounds them once is within half a unit in the last place of each; what is further
off was changed. So a fault of one weight is seen that no output would show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

from repcompiler.steps import Step

# Two float64 compositions of one kernel differ by less than this part of its channel.
EXACT = 1e-12
# Two graphs are of one origin if they share this part of their steps, or lack few.
SHARED = 0.6
FEW = 6
LAYER = 2  # tensors: a fault in one layer changes its kernel and its bias


@dataclass(frozen=True)
class Difference:
    """One step that is not its twin.

    Attributes:
        step: index in the twin's list.
        place: the module it came from, and the constant where one is at fault.
        kind: `operator`, `wiring` or `numbers`.
        detail: what was found, and what was expected.
        channel: the output channel that is furthest off.
        error: the largest difference, relative to the largest number of its channel.
    """

    step: int
    place: str
    kind: str
    detail: str
    channel: int | None = None
    error: float | None = None


@dataclass(frozen=True)
class Alignment:
    """Two lists of steps side by side.

    `pairs` leads from the twin's steps to the candidate's; `shared` is how large a part
    of the longer list they are, `apart` how many steps either list has to itself.
    `composed` names the twin's constants that were rounded: those that fusing made.
    """

    pairs: Mapping[int, int]
    shared: float
    apart: int
    tensors: int
    differences: tuple[Difference, ...]
    composed: frozenset[str] = frozenset()

    @property
    def related(self) -> bool:
        """Whether the two are of one origin: most steps and most numbers are the same.

        Equal functions can be written with other numbers: a scale moved from one layer
        to the next changes many of them, and a fuser that composes in float32 rounds
        most of what it makes in another way. A fault changes few.
        """
        changed = {d.place for d in self.differences if d.kind == "numbers"}
        near = self.shared >= SHARED or self.apart <= FEW
        made = len(changed & self.composed)
        same = made <= max(len(self.composed) // 2, LAYER)
        return near and bool(self.pairs) and same and 2 * len(changed) <= self.tensors


def align(
    twin: Sequence[Step], candidate: Sequence[Step], exact: Mapping[str, Tensor]
) -> Alignment:
    """Compare two graphs step by step.

    Args:
        twin: the steps that the candidate should have.
        exact: the twin's constants in float64 by name; the twin's own where missing.
    """
    matcher = SequenceMatcher(
        None, [s.key for s in twin], [s.key for s in candidate], autojunk=False
    )
    pairs: dict[int, int] = {}
    found: list[Difference] = []
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        if tag == "equal":
            pairs.update(zip(range(a0, a1), range(b0, b1)))
        else:
            found.append(_structural(twin, candidate, (a0, a1), (b0, b1)))
    for a, b in pairs.items():
        found += _wiring(twin, candidate, a, b, pairs)
        found += _numbers(a, twin[a], candidate[b], exact)
    order = {"operator": 0, "numbers": 1, "wiring": 2}
    ranked = sorted(found, key=lambda d: (d.step, order[d.kind]))
    tensors = sum(len(twin[a].tensors) for a in pairs)
    shared = len(pairs) / max(len(twin), len(candidate), 1)
    apart = len(twin) + len(candidate) - 2 * len(pairs)
    composed = frozenset(_rounded(twin, pairs, exact))
    return Alignment(pairs, shared, apart, tensors, tuple(ranked), composed)


def _rounded(
    twin: Sequence[Step], pairs: Mapping[int, int], exact: Mapping[str, Tensor]
) -> Iterator[str]:
    """The constants of paired steps that are not their float64 form to the last bit."""
    for index in pairs:
        for name, own in twin[index].tensors.items():
            wide = exact.get(name)
            if wide is None or wide.shape != own.shape:
                continue
            if not torch.equal(own.detach().cpu().double(), wide.cpu().double()):
                yield name


def _structural(
    twin: Sequence[Step],
    candidate: Sequence[Step],
    gone: tuple[int, int],
    come: tuple[int, int],
) -> Difference:
    """Steps that one of the two lacks, or has in another form."""
    lost, new = twin[slice(*gone)], candidate[slice(*come)]
    at = gone[0]
    near = [*lost, *twin[at : at + 1], *twin[at - 1 : at]]
    named = [name for step in (*lost, *new) for name in step.tensors]
    places = [step.place for step in (*lost, *new, *near) if step.place]
    place = named[0] if named else (places[0] if places else "")
    detail = f"{_said(new) or 'nothing'} instead of {_said(lost) or 'nothing'}"
    return Difference(at, place, "operator", detail)


def _said(steps: Sequence[Step]) -> str:
    shown = [f"{_short(step.op)}{_brief(step)}" for step in steps[:3]]
    rest = f" and {len(steps) - 3} more" if len(steps) > 3 else ""
    return ", ".join(shown) + rest


def _short(op: str) -> str:
    return op.removeprefix("aten.").split(".")[0]


def _brief(step: Step) -> str:
    text = f"{step.settings}"
    kinds = {str(t.dtype).removeprefix("torch.") for t in step.tensors.values()}
    said = f" in {', '.join(sorted(kinds))}" if kinds else ""
    return (text if len(text) < 90 else text[:87] + "…") + said


def _wiring(
    twin: Sequence[Step],
    candidate: Sequence[Step],
    a: int,
    b: int,
    pairs: Mapping[int, int],
) -> Iterator[Difference]:
    expected = [pairs.get(i, i if i < 0 else None) for i in twin[a].feeds]
    if None in expected or expected == list(candidate[b].feeds):
        return
    named = next(iter(twin[a].tensors), twin[a].place)
    readers = ", ".join(
        "an input" if i < 0 else f"{candidate[i].node}" for i in candidate[b].feeds
    )
    detail = f"{_short(twin[a].op)} reads {readers}, which is another value"
    yield Difference(a, named, "wiring", detail)


def _numbers(
    index: int, twin: Step, candidate: Step, exact: Mapping[str, Tensor]
) -> Iterator[Difference]:
    pairs = zip(twin.tensors.items(), candidate.tensors.values())
    for (name, own), found in pairs:
        wide = exact.get(name)
        known = wide is not None and wide.shape == own.shape
        truth = wide if known and wide is not None else own
        yield from _compared(index, name, truth, found, roundings=0.5 if known else 1.0)


def _compared(
    index: int, name: str, truth: Tensor, found: Tensor, roundings: float
) -> Iterator[Difference]:
    """The worst number of a constant, if it is further off than its rounding."""
    truth, found = truth.detach().cpu(), found.detach().cpu()
    if not truth.is_floating_point():
        if not torch.equal(truth, found):
            yield Difference(index, name, "numbers", "whole numbers differ")
        return
    info = torch.finfo(found.dtype)
    wide, own = truth.double(), found.double()
    error = (own - wide).abs()
    largest = _per_channel(wide)
    allowed = roundings * info.eps * wide.abs() * 1.001 + EXACT * largest
    excess = (error > allowed + info.tiny) | (own.isnan() != wide.isnan())
    if not bool(excess.any()):
        return
    relative = torch.where(excess, error / largest.clamp_min(info.tiny), 0.0)
    relative = relative.nan_to_num(nan=float("inf"))
    place = [int(i) for i in torch.unravel_index(relative.argmax(), relative.shape)]
    at = tuple(place)
    count = int(excess.sum())
    detail = (
        f"{name}{place} is {float(own[at]):.9g} instead of {float(wide[at]):.9g}"
        f" ({count} of {error.numel()} numbers differ)"
    )
    channel = place[0] if place else None
    yield Difference(index, name, "numbers", detail, channel, float(relative[at]))


def _per_channel(value: Tensor) -> Tensor:
    """The largest magnitude of each output channel, broadcast over the value.

    A vector holds one number of each channel: there it is the largest of all.
    """
    if value.dim() < 2:
        return value.abs().amax().expand_as(value) if value.numel() else value.abs()
    flat = value.abs().flatten(1).amax(1)
    return flat.reshape(-1, *([1] * (value.dim() - 1))).expand_as(value)
