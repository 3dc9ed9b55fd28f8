"""One line of advice: what to ship on this device, and the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit_cli.backends import BACKENDS, TUNED_IN
from fastvit_cli.cells import Cell
from fastvit_cli.irgraphs import SUFFIX

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
        start += f" in {cell.backend}, {cell.dtype}: {timing.median:.4g} ms"
        if cell is self.baseline:
            return f"{start}; nothing that is equal is faster"
        return (
            f"{start}, {gain} {self.baseline.form} {self.baseline.backend} "
            f"{self.baseline.dtype}, {self._equality}"
        )

    @property
    def note(self) -> str:
        """What a reader should know of the command; empty where it just does so."""
        if self.cell.form != "tuned":
            return ""
        return "the command tunes again: of plans within noise it may choose another"

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
            "note": self.note,
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
            equal = [c for c in rows if c.equal and c.dtype == dtype]
            pick = _fastest(equal, options)
            if pick is None or pick.timing.median > best * (1 - TIE):
                continue
            best = pick.timing.median
            found.append(Advice(pick, baseline, *_recipe(pick, options)))
    return found


def _baseline(rows: Sequence[Cell]) -> Cell | None:
    """The model as loaded, in eager mode; where that cannot run, its first cell."""
    first = [c for c in rows if c.form == rows[0].form and c.dtype == rows[0].dtype]
    return next((c for c in first if c.backend == "eager"), next(iter(first), None))


def _fastest(rows: Sequence[Cell], options: Options) -> Any:
    """The fastest; among those that are as fast within noise, the simplest.

    A graph of a runtime that a command here makes is simpler than one to be exported.
    """
    if not rows:
        return None
    best = min(rows, key=lambda c: c.timing.median)
    noise = max(TIE, best.timing.spread / 2)
    tied = [c for c in rows if c.timing.median <= best.timing.median * (1 + noise)]
    order = list(BACKENDS)

    def effort(cell: Cell) -> tuple[bool, bool, int]:
        graph = BACKENDS[cell.backend].artefact == ".onnx"
        by_hand = graph and cell.form not in options and len(options) > 0
        return by_hand, cell.form != best.form, order.index(cell.backend)

    return min(tied, key=effort)


def _recipe(cell: Cell, options: Options) -> tuple[str, str]:
    """The command that writes what the cell ran, and how to run that."""
    backend = BACKENDS[cell.backend]
    suffix = SUFFIX if cell.kernels else backend.artefact
    if cell.model.endswith((backend.artefact, SUFFIX)):  # it is that file already
        return "", backend.usage.replace("FILE", repr(cell.model))
    if cell.form not in options:
        return "", _as_it_is(cell)
    file = f"{stem(cell.model)}-{cell.form}{suffix}"
    words = ["fastvit", "fuse", cell.model, "-o", file, *options[cell.form]]
    if cell.form == "tuned" and cell.backend in TUNED_IN:
        words += ["--backend", cell.backend]
    if cell.dtype != "float32" and suffix == ".pt2":
        words += ["--dtype", cell.dtype]
    return shlex.join(words), _in_dtype(cell).replace("FILE", repr(file))


def _in_dtype(cell: Cell) -> str:
    """How the backend is told of the dtype, where that is not in the file."""
    usage = BACKENDS[cell.backend].usage
    return usage.replace("'f32'", "'bf16'") if cell.dtype == "bfloat16" else usage


def _as_it_is(cell: Cell) -> str:
    """How to run the model as it was loaded: no command here writes it to a file."""
    usage = _in_dtype(cell)
    if BACKENDS[cell.backend].artefact == ".onnx":
        file = repr(f"{stem(cell.model)}.onnx")
        export = f"torch.onnx.export(model, inputs, {file}, dynamo=True)"
        return f"{export}; {usage.replace('FILE', file)}"
    model = "model.eval()"
    if cell.dtype != "float32":
        model += f".to(torch.{cell.dtype})"
    return usage.replace("torch.export.load(FILE).module()", model)


def stem(model: str) -> str:
    """A file's name for MODEL, that tells two models of one file apart."""
    name, _, weights = model.partition("@")
    file, python, factory = name.rpartition(".py:")
    path = Path(name)
    if python:
        found = f"{Path(file).name}-{factory}"
    elif path.suffix in (".pt2", ".safetensors", ".onnx", ".xml"):
        found = f"{path.stem}-{path.suffix[1:]}"
    else:
        found = name.replace(":", "_").replace("/", "_")
    return f"{found}-{Path(weights).name.split('.')[0]}" if weights else found
