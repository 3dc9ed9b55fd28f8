"""Reports made by hand, and what lies in a folder."""

from __future__ import annotations

from pathlib import Path

from repcompiler.report import (
    Change,
    FuseReport,
    Kept,
    OpCount,
    Region,
    VerifyReport,
)

EQUAL = VerifyReport(
    True,
    "equal",
    exactness=1e-13,
    error_ratio=1.1,
    max_abs=1e-6,
    top1_agreement=1.0,
    samples=8,
)
DIFFERENT = VerifyReport(False, "different", error_ratio=1e6, max_abs=2.0, samples=8)


def make_region(name: str, kind: str = "conv_bn", exactness: float | None = 1e-15):
    """A region of two nodes that became one."""
    change = Change(2, 1)
    nodes = (f"{name}.conv", f"{name}.norm")
    return Region(name, kind, nodes, (name,), exactness, change, change, change)


def make_report(
    verdict: VerifyReport = EQUAL,
    regions: tuple[Region, ...] = (make_region("stem"), make_region("head", "skip")),
    kept: tuple[Kept, ...] = (Kept("head", "linear", "dearer", "it costs more"),),
) -> FuseReport:
    """A report with figures that differ from each other."""
    return FuseReport(
        capture="symbolic_trace",
        ops=OpCount(50, 20, {"convolution": 9, "batch_norm": 9}, {"convolution": 8}),
        params=Change(4_026_232, 3_990_000),
        macs=Change(700_000_000, 687_000_000),
        regions=regions,
        kept=kept,
        equivalence=verdict,
        seconds={"capture": 0.1, "fuse": 0.2, "verify": 0.3},
    )


def names(folder: Path) -> set[str]:
    """What lies in a folder, hidden files as well, caches left out."""
    found = {path.name for path in folder.iterdir()}
    return found - {"__pycache__"}
