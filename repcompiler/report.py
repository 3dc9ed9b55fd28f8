"""What was fused, what it saved, what was kept and why: values, JSON and a rich table.

Everything here is plain data. `FuseReport.to_dict` is schema version 1 of the JSON that
`fastvit fuse --json` prints; fields may be added to it, never renamed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Change:
    """A figure before and after; None where it could not be counted (no inputs)."""

    before: int | None
    after: int | None


@dataclass(frozen=True)
class OpCount:
    """ATen compute ops dispatched in one forward pass of batch 1, by type as well."""

    before: int | None
    after: int | None
    before_by_type: dict[str, int] = field(default_factory=dict[str, int])
    after_by_type: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class RegionNode:
    """One node of a region as it was: `inputs` are places in the region's list.

    `role` is `source` (given), `removed`, or `stays` (something else reads it too).
    """

    name: str
    op: str
    inputs: tuple[int, ...]
    role: str


@dataclass(frozen=True)
class Region:
    """The nodes that one rewrite replaced.

    `exactness` is the largest error of the fused kernels, in float64, relative to
    |A||x| + |b| of the same output channel; None where the region was not checked.
    `graph` is what computed the value before: its sources first, the value last.
    """

    name: str
    kind: str
    removed: tuple[str, ...]
    added: tuple[str, ...]
    exactness: float | None
    ops: Change
    params: Change
    macs: Change
    graph: tuple[RegionNode, ...] = ()


@dataclass(frozen=True)
class Kept:
    """An affine op that stayed, with the reason's code and sentence."""

    name: str
    op: str
    reason: str
    detail: str


@dataclass(frozen=True)
class PartReport:
    """A submodule of a model that has no graph as a whole.

    `door` is None where the submodule was left as it is; then `reason` says why.
    """

    name: str
    door: str | None
    reason: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """The verdict on two whole models.

    `exactness`: fused kernels kept in float64 against the float64 original (None where
    the kernels are not known). `error_ratio`: distance of the candidate from the
    float64 reference over the original's own distance. `max_abs` and `top1_agreement`
    are for people; they decide nothing. `verdict` is one of `equal`, `different`, `not
    comparable`, `regions equal` (no inputs to run the whole) and `not checked`.
    """

    ok: bool
    verdict: str
    exactness: float | None = None
    error_ratio: float | None = None
    max_abs: float | None = None
    top1_agreement: float | None = None
    samples: int = 0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; what is infinite or no number, JSON has no word for."""
        return {
            key: None if isinstance(value, float) and not isfinite(value) else value
            for key, value in vars(self).items()
        }


@dataclass(frozen=True)
class FuseReport:
    """The record of one `fuse`."""

    capture: str
    ops: OpCount
    params: Change
    macs: Change
    regions: tuple[Region, ...]
    kept: tuple[Kept, ...]
    equivalence: VerifyReport
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    parts: tuple[PartReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as schema version 1 (without the fields only a command knows)."""
        return {
            "schema": SCHEMA,
            "capture": self.capture,
            "ops": dict(vars(self.ops)),
            "params": dict(vars(self.params)),
            "macs": dict(vars(self.macs)),
            "regions": [_region_dict(region) for region in self.regions],
            "kept": [dict(vars(kept)) for kept in self.kept],
            "equivalence": self.equivalence.to_dict(),
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
            "parts": [dict(vars(part)) for part in self.parts],
        }

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)


def _region_dict(region: Region) -> dict[str, Any]:
    row = dict(vars(region))
    row.update({key: dict(vars(row[key])) for key in ("ops", "params", "macs")})
    row["graph"] = [dict(vars(node)) for node in row["graph"]]
    return row
