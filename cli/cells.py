"""The cells of a profile: every form in every backend, dtype and batch size.

Each cell is prepared, judged against the float64 reference, and then all cells of one
batch size are timed against one another. One that cannot run says why; that one does
not stop the others.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli import backends, irgraphs, timing
from fastvit_cli.backends import BACKENDS, TUNED_IN, Subject
from fastvit_cli.errors import Stop, summary

if TYPE_CHECKING:
    from fastvit_cli.runners import Runner
    from torch import Tensor

MUCH = 0.1  # of the processor's time, for the kernel: it is said why
MAX_ERROR_RATIO = 8.0  # the compiler's own limit for a form to count as equal


@dataclass
class Cell:
    """One form, in one backend, dtype and batch size.

    Attributes:
        error_ratio: distance from the float64 reference over that of the model as
            loaded, run eagerly in the same dtype; None without a reference.
        distance: ‖output - reference‖ / ‖reference‖.
        memory: bytes at the peak, weights included; None where it is not known.
        faults: page faults of a run, where the system counts them.
        kernels: kinds of convs that run in OpenVINO's direct kernels.
        skipped: why there is no timing.
    """

    model: str
    form: str
    backend: str
    dtype: str
    batch: int
    timing: timing.Timing | None = None
    rounds: list[list[float]] = field(default_factory=list)
    error_ratio: float | None = None
    distance: float | None = None
    memory: int | None = None
    faults: timing.Faults | None = None
    skipped: str = ""
    kernels: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether it was shown to compute the model, for its dtype."""
        return self.error_ratio is not None and self.error_ratio <= MAX_ERROR_RATIO

    def to_dict(self) -> dict[str, Any]:
        """The cell by JSON names."""
        figures = self.timing.to_dict() if self.timing else {}
        return {
            **{k: getattr(self, k) for k in ("model", "form", "backend", "dtype")},
            "batch": self.batch,
            **figures,
            "peak_bytes": self.memory,
            "page_faults": self.faults and self.faults.count,
            "kernel_share": self.faults and self.faults.share,
            "error_ratio": self.error_ratio,
            "distance": self.distance,
            "equal": self.equal,
            "kernels": list(self.kernels),
            "skipped": self.skipped or None,
        }


@dataclass(frozen=True)
class Grid:
    """What is to be measured of one model.

    Attributes:
        forms: name → subject; the first is the model as it was loaded. `tuned` is
            the plan for eager torch, which the backends without a plan of their own
            run as well.
        plans: backend → the plan that was tuned in it, for those that take ONNX graphs.
        reference: the model in float64, where that runs.
    """

    name: str
    forms: dict[str, Subject]
    reference: Runner | None
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]
    plans: dict[str, Subject] = field(default_factory=dict[str, Subject])

    def cells(self, batch: int) -> Iterator[Cell]:
        """The cells of one batch size, not yet measured."""
        for dtype in self.dtypes:
            for form in dict.fromkeys(
                (*self.forms, *(["tuned"] if self.plans else []))
            ):
                for backend in self.backends:
                    subject = self.subject(form, backend)
                    if subject is not None:
                        told = (self.name, form, backend, dtype, batch)
                        yield Cell(*told, kernels=subject.kernels)

    def subject(self, form: str, backend: str) -> Subject | None:
        """What a backend runs; None where a backend keeps the default plan."""
        if form == "tuned" and backend in TUNED_IN and backend != "eager":
            return self.plans.get(backend)
        return self.forms.get(form)


def measure(
    grids: Sequence[Grid], batch: int, seconds: float, stage: Callable[[str], None]
) -> list[Cell]:
    """All cells of one batch size, prepared and judged one by one, timed together."""
    cells: list[Cell] = []
    runs: dict[int, Callable[[], Any]] = {}
    count = sum(1 for grid in grids for _ in grid.cells(batch))
    for grid in grids:
        judge = Judge(grid, batch)
        for cell in grid.cells(batch):
            where = f"{cell.model}, {cell.form}, {cell.backend}, batch {batch}"
            stage(f"prepare {len(cells) + 1} of {count}: {where}")
            run = _prepare(grid, cell, judge)
            if run is not None:
                runs[len(cells)] = run
            cells.append(cell)
    stage(f"time batch {batch}")
    for index, rounds in timing.interleave(runs, seconds).items():
        cells[index].rounds = rounds
        cells[index].timing = timing.summarise(rounds)
        cells[index].faults = timing.page_faults(runs[index])
    return cells


def _prepare(grid: Grid, cell: Cell, judge: Judge) -> Callable[[], Any] | None:
    """What runs the cell; fills in its accuracy and memory, or why it cannot run."""
    backend = BACKENDS[cell.backend]
    subject = grid.subject(cell.form, cell.backend)
    assert subject is not None
    cell.skipped = _obstacle(backend, cell, subject)
    if cell.skipped:
        return None
    try:
        backends.load_runtime(cell.backend)
        subject = judge.cast(subject, cell.dtype)
        if cell.backend in ("onnxruntime", "openvino"):
            subject.onnx  # noqa: B018 - exporting is not part of what running needs
        inputs = backends.of_batch(subject, cell.batch)
        prepare = functools.partial(backend.prepare, subject, inputs)
        (run, output), grown = timing.peak_growth(
            lambda: _first_run(prepare), subject.device
        )
        cell.error_ratio, cell.distance = judge.judge(cell.dtype, output)
    except Stop as error:
        cell.skipped = str(error)
        return None
    except Exception as error:  # a runtime may refuse in any way
        cell.skipped = summary(error, 160)
        return None
    if grown is not None:
        cell.memory = grown + (_weight_bytes(subject) if backend.holds_model else 0)
    return run


def _first_run(prepare: Callable[[], Any]) -> tuple[Any, Any]:
    run = prepare()
    return run, flat(run())


def _obstacle(backend: backends.Backend, cell: Cell, subject: Subject) -> str:
    why = backends.obstacle(cell.backend, cell.dtype, subject.device)
    if why:
        return why
    if subject.model is None and backend.holds_model:
        return "a graph of a runtime does not run in torch"
    if subject.file.endswith(irgraphs.SUFFIX) and cell.backend != "openvino":
        return "an OpenVINO graph runs in OpenVINO only"
    if subject.model is None and cell.dtype != subject.dtype:
        return f"a graph in {subject.dtype} cannot be cast to {cell.dtype}"
    if cell.batch != 1 and not subject.dynamic_batch:
        return "the file fixes its batch size"
    return ""


def _weight_bytes(subject: Subject) -> int:
    tensors = [*subject.model.parameters(), *subject.model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


class Judge:
    """Outputs at one batch size against the float64 reference."""

    def __init__(self, grid: Grid, batch: int) -> None:
        self.grid = grid
        self.batch = batch
        self._cast: dict[tuple[int, str], Subject] = {}
        self._own: dict[str, list[Tensor]] = {}

    def cast(self, subject: Subject, dtype: str) -> Subject:
        """A form in a dtype, cast once."""
        key = (id(subject), dtype)  # the grid holds it for as long as this lives
        if key not in self._cast:
            self._cast[key] = backends.in_dtype(subject, dtype)
        return self._cast[key]

    @functools.cached_property
    def truth(self) -> list[Tensor] | None:
        """The reference's outputs, from the same numbers that the cells get."""
        if self.grid.reference is None:
            return None
        first = next(iter(self.grid.forms.values()))
        inputs = [x.double() if x.is_floating_point() else x for x in first.inputs]
        inputs = backends.of_batch(replace(first, inputs=tuple(inputs)), self.batch)
        return flat(self.grid.reference(*inputs))

    def judge(self, dtype: str, output: list[Tensor]) -> tuple[Any, Any]:
        """(error ratio, distance) of an output; None each without a reference."""
        if self.truth is None:
            return None, None
        if [t.shape for t in output] != [t.shape for t in self.truth]:
            return float("inf"), float("inf")
        own = self._original(dtype)
        rows = [errors(*row, dtype) for row in zip(output, own, self.truth)]
        return max(row[0] for row in rows), max(row[1] for row in rows)

    def _original(self, dtype: str) -> list[Tensor]:
        if dtype not in self._own:
            subject = self.cast(next(iter(self.grid.forms.values())), dtype)
            run = backends.eager(subject, backends.of_batch(subject, self.batch))
            self._own[dtype] = flat(run())
        return self._own[dtype]


def errors(
    found: Tensor, own: Tensor, truth: Tensor, dtype: str
) -> tuple[float, float]:
    """‖found - truth‖ over max(‖own - truth‖, eps·‖truth‖), and over ‖truth‖."""
    import torch

    if not truth.is_floating_point():
        wrong = 0.0 if torch.equal(found, truth) else float("inf")
        return wrong, wrong
    error, size = float((found.double() - truth).norm()), float(truth.norm())
    rounding = float((own.double() - truth).norm())
    allowed = max(rounding, torch.finfo(getattr(torch, dtype)).eps * size)
    if error == 0.0:
        return 0.0, 0.0
    known = error == error and allowed > 0
    return (error / allowed, error / size) if known else (float("inf"), float("inf"))


def flat(output: Any) -> list[Tensor]:
    """The tensors of an output, whichever runtime made them, on the CPU."""
    import torch
    from torch.utils import _pytree as pytree

    leaves = [torch.as_tensor(leaf) for leaf in pytree.tree_leaves(output)]
    return [leaf.detach().cpu().clone() for leaf in leaves]


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Where exported graphs go for the time of one profile."""
    return tempfile.TemporaryDirectory(prefix="fastvit-profile-")


def subject_of(runner: Runner, model: Any, scratch: Path, threads: int) -> Subject:
    """A form of a loaded model as a subject."""
    return Subject(
        model=model,
        inputs=runner.inputs,
        card=runner.card,
        dtype=runner.dtype,
        device=runner.device,
        threads=threads,
        scratch=scratch,
        dynamic_batch=runner.dynamic_batch,
        file=runner.file,
    )


def fault_notes(cells: Sequence[Cell]) -> list[str]:
    """Where the kernel takes the most time, if it is much, and how glibc is told."""
    seen = [(c.faults, c) for c in cells if c.faults and c.faults.count >= 1]
    faults, worst = max(seen, key=lambda row: row[0].share, default=(None, None))
    if not faults or not worst or faults.share < MUCH or sys.platform != "linux":
        return []
    words = " ".join(f"{name}={told}" for name, (_, told) in timing.KEPT.items())
    return [
        f"{worst.model}, {worst.form}, {worst.backend}, batch {worst.batch}: "
        f"{faults.count:,.0f} page faults a run, and the kernel takes "
        f"{faults.share:.0%} of the processor's time; with {words} in the "
        "environment glibc keeps what is freed"
    ]
