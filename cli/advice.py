"""One line of advice: what to ship on this device, and the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit_cli.backends import BACKENDS, TUNED_IN
from fastvit_cli.cells import Cell

Options = Mapping[str, Sequence[str]]

TIE = 0.02  # closer than this, or than their spread, the simpler backend is advised


@dataclass(frozen=True)
class Advice:
    """The cell that is advised, and what it is compared with: eager, as loaded."""

    cell: Cell
    baseline: Cell
    command: str
    usage: str

    @property
    def speed_up(self) -> float:
        """How many times as fast as the baseline."""
        assert self.cell.timing and self.baseline.timing
        return self.baseline.timing.median / self.cell.timing.median

    @property
    def sentence(self) -> str:
        """The advice in one line."""
        cell, timing = self.cell, self.cell.timing
        assert timing is not None
        start = (
            f"{cell.model}, batch {cell.batch}: on this device use the {cell.form} form"
        )
        gain = (
            "no faster than"
            if self.speed_up < 1.03
            else f"{self.speed_up:.2f}x as fast as"
        )
        return (
            f"{start} in {cell.backend}, {cell.dtype}: {timing.median:.4g} ms, {gain} "
            f"{self.baseline.form} {self.baseline.backend} {self.baseline.dtype}, "
            f"{self._equality}"
        )

    @property
    def _equality(self) -> str:
        ratio = f"error ratio {self.cell.error_ratio:.2g}"
        if self.cell.dtype == self.baseline.dtype:
            return f"equal to it ({ratio})"
        distance = f"{self.cell.distance:.1e} from the float64 reference"
        return f"as exact as {self.cell.dtype} allows ({distance}, {ratio})"

    def to_dict(self) -> dict[str, Any]:
        """The advice by JSON names."""
        keys = ("model", "batch", "form", "backend", "dtype")
        return {
            **{key: getattr(self.cell, key) for key in keys},
            "milliseconds": self.cell.timing.median if self.cell.timing else None,
            "speed_up": self.speed_up,
            "over": {
                k: getattr(self.baseline, k) for k in ("form", "backend", "dtype")
            },
            "error_ratio": self.cell.error_ratio,
            "command": self.command,
            "usage": self.usage,
            "sentence": self.sentence,
        }


def advise(cells: Sequence[Cell], options: Options) -> list[Advice]:
    """Advice for each model and batch size, and for each dtype where it gains.

    `options`: by form, the options with which `fastvit fuse` makes it.

    Only cells that were shown equal are considered. The first dtype is the model's own;
    another dtype is advised beside it, never instead: it rounds more.
    """
    found: list[Advice] = []
    for model, batch in dict.fromkeys((c.model, c.batch) for c in cells):
        rows = [c for c in cells if (c.model, c.batch) == (model, batch) and c.timing]
        baseline = _baseline(rows)
        if baseline is None:
            continue
        best = float("inf")
        for dtype in dict.fromkeys(c.dtype for c in rows):
            pick = _fastest(c for c in rows if c.equal and c.dtype == dtype)
            if pick is None or pick.timing.median > best * (1 - TIE):
                continue
            best = pick.timing.median
            found.append(Advice(pick, baseline, *_recipe(pick, options)))
    return found


def _baseline(rows: Sequence[Cell]) -> Cell | None:
    """The model as loaded, in eager mode; where that cannot run, its first cell."""
    first = [c for c in rows if c.form == rows[0].form and c.dtype == rows[0].dtype]
    return next((c for c in first if c.backend == "eager"), next(iter(first), None))


def _fastest(rows: Iterable[Cell]) -> Any:
    """The fastest; among those that are as fast within noise, the simplest."""
    rows = list(rows)
    if not rows:
        return None
    best = min(rows, key=lambda c: c.timing.median)
    noise = max(TIE, best.timing.spread / 2)
    tied = [c for c in rows if c.timing.median <= best.timing.median * (1 + noise)]
    order = list(BACKENDS)
    return min(tied, key=lambda c: (c.form != best.form, order.index(c.backend)))


def _recipe(cell: Cell, options: Options) -> tuple[str, str]:
    """The command that writes what the cell ran, and how to run that."""
    backend = BACKENDS[cell.backend]
    stem = Path(cell.model.split("@")[0].replace(":", "_")).stem
    if cell.model.endswith(backend.artefact):  # it is that file already
        return "", backend.usage.replace("FILE", repr(cell.model))
    file = f"{stem}-{cell.form}{backend.artefact}"
    words = ["fastvit", "fuse", cell.model, "-o", file, *options.get(cell.form, ())]
    if cell.form == "tuned" and cell.backend in TUNED_IN:
        words += ["--backend", cell.backend]
    usage = backend.usage
    if cell.dtype != "float32" and backend.artefact == ".pt2":
        words += ["--dtype", cell.dtype]
    elif cell.dtype == "bfloat16":
        usage = usage.replace("'f32'", "'bf16'")
    if cell.form not in options:
        return "", usage.replace("FILE", repr(f"{stem}{backend.artefact}"))
    return shlex.join(words), usage.replace("FILE", repr(file))
