"""Plans for a runtime that takes a graph: what is free there are forms of convs.

Such a runtime lays out weights, writes in place and merges ops as it likes, and to
export and load every op of a model would take longer than it can gain. So regions are
those of the default plan, and forms of convs are timed: all are exported as one graph,
which is cut apart, because exporting has a price of its own that is paid once.

OpenVINO can also be told which kernels to run convs with (`irgraphs`); every mix of
kinds of convs is tried on the plans that are near the fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli import irgraphs, plans
from fastvit_cli.backends import BACKENDS, Subject
from fastvit_cli.card import Card
from fastvit_cli.errors import summary
from fastvit_cli.plans import PLAIN, Candidates, Plan, Stage, Task

if TYPE_CHECKING:
    from fastvit_cli.measured import Call, OpTimes
    from torch import Tensor

HOPELESS = 1.5  # times the convs as they are: too slow to be tried in the whole model
FORMS = "forms"  # the key of the graph that holds every form of every conv
CARD = Card("the plan", {"input_size": []}, weights={"origin": "random", "seed": 0})
Row = dict[str, float]


@dataclass(frozen=True)
class Exports:
    """ONNX files of one model's plans, each written once for all runtimes."""

    folder: Path
    files: dict[object, Path] = field(default_factory=dict[object, Path])

    def subject(self, key: object, model: Any, inputs: plans.Inputs, task: Task) -> Any:
        """A graph as a backend takes it, with its file.

        Raises:
            JobFailed: it cannot be exported.
        """
        setting = task.setting
        made = Subject(
            model=model,
            inputs=inputs,
            card=CARD,
            dtype=setting.dtype,
            device=setting.device,
            threads=setting.threads,
            scratch=self.folder,
            dynamic_batch=task.dynamic_batch,
            file=str(self.files.get(key, "")),
        )
        self.files[key] = made.onnx
        return replace(made, file=str(made.onnx))  # written once, whoever asks again


def candidates(task: Task, times: OpTimes, stage: Stage) -> Candidates:
    """The default; each conv in its fastest form; all convs in one form."""
    import repcompiler as rc

    stage("fuse by nominal costs")
    found = Candidates(plans.make(task, (), rc.Tuning()))
    stage(f"time forms of convs in {task.setting.backend}")
    rows = _rows(task, found, times)
    best = {name: min(row, key=row.__getitem__) for name, row in rows.items()}
    chosen = [{name: best[name] for name, row in rows.items() if plans.gains(row)}]
    for form in dict.fromkeys(form for row in rows.values() for form in row):
        fitting = {name: form for name, row in rows.items() if form in row}
        took, own = (sum(rows[n][it] for n in fitting) for it in (form, PLAIN))
        if form != PLAIN and took < HOPELESS * own:
            chosen.append(fitting)
    for forms in filter(None, chosen):
        words, tuning = (plans.counted(forms),), rc.Tuning(forms=forms)
        found.add(plans.make(task, words, tuning, forms=rows))
    return found


def in_kernels(task: Task, plan: Plan) -> list[Plan]:
    """The plan with each mix of kinds of its convs in OpenVINO's direct kernels."""
    assert task.exports is not None
    file = task.exports.files[plans.signature(plan)]  # it has been run
    kinds = irgraphs.kinds_in(irgraphs.core().read_model(file))
    return [
        replace(plan, kernels=mix, words=(*plan.words, _in_words(mix)))
        for count in range(1, len(kinds) + 1)
        for mix in combinations(kinds, count)
    ]


def _in_words(kinds: tuple[str, ...]) -> str:
    return f"{' and '.join(kinds)} convs in direct kernels"


def _rows(task: Task, found: Candidates, times: OpTimes) -> dict[str, Row]:
    """By conv that can be written otherwise: the microseconds of its forms."""
    from repcompiler import forms

    module = found.default.module
    possible = forms.alternatives(module, in_order=task.in_order)
    if not possible:
        return {}
    singles = Singles.of(task, module, possible)
    rows: dict[str, Row] = {}
    for name, names in possible.items():
        row: Row = {}
        for form in (PLAIN, *names):
            if form in found.left_out:
                continue
            try:
                time = singles.microseconds(name, form, times)
            except Exception as error:  # a runtime may refuse in any way
                found.left_out[form] = summary(error, 160)
                continue
            if time is not None:
                row[form] = time
        if PLAIN in row and len(row) > 1:
            rows[name] = row
    if times.missed:
        found.left_out["forms of some convs"] = plans.time_is_up()
    return rows


@dataclass(frozen=True)
class Singles:
    """Convs by themselves in every form; those of one geometry are one.

    Attributes:
        exports: where their graph goes.
        keys: by name of a conv, its geometry and what it reads.
        convs, shapes: by key, the conv and the whole shape of what it reads.
        names: by key, its forms.
    """

    task: Task
    exports: Exports
    keys: dict[str, str]
    convs: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    names: dict[str, tuple[str, ...]]

    @classmethod
    def of(
        cls, task: Task, module: Any, possible: Mapping[str, tuple[str, ...]]
    ) -> Singles:
        """The convs of a graph."""
        assert task.exports is not None
        read = plans.shapes_read(module, task, tuple(possible))
        keys = {n: f"{module.get_submodule(n)} on {read[n][1:]}" for n in possible}
        return cls(
            task=task,
            exports=task.exports,
            keys=keys,
            convs={keys[n]: module.get_submodule(n) for n in possible},
            shapes={keys[n]: read[n] for n in possible},
            names={keys[n]: (PLAIN, *forms) for n, forms in possible.items()},
        )

    def microseconds(self, name: str, form: str, times: OpTimes) -> float | None:
        """The time of a form; None where the time for it is up."""
        key = self.keys[name]
        return times.microseconds(f"{form}, {key}", lambda: self._call(key, form))

    def _call(self, key: str, form: str) -> Call:
        import onnx
        import torch

        index = self.order.index((key, form))
        graph = self.extractor.model.graph
        ends = ([graph.input[index].name], [graph.output[index].name])
        part = self.extractor.extract_model(*ends)
        path = self.exports.folder / f"form-{index}.onnx"
        onnx.save(part, str(path))
        setting, value = self.task.setting, torch.randn(self.shapes[key])
        subject = Subject(
            model=None,  # type: ignore[arg-type] - the file is all there is
            inputs=(value,),
            card=CARD,
            dtype=setting.dtype,
            device=setting.device,
            threads=setting.threads,
            file=str(path),
        )
        run: Callable[[], Any] = BACKENDS[setting.backend].prepare(subject, (value,))
        return run

    @cached_property
    def order(self) -> list[tuple[str, str]]:
        """Geometry and form, as the inputs and outputs of the graph have them."""
        return [(key, form) for key, forms in self.names.items() for form in forms]

    @cached_property
    def extractor(self) -> Any:
        """What cuts the graph of all forms apart."""
        import onnx.utils

        if FORMS not in self.exports.files:
            module, values = self._together()
            plan = replace(self.task, dynamic_batch=True)
            self.exports.subject(FORMS, module, values, plan)
        return onnx.utils.Extractor(onnx.load(str(self.exports.files[FORMS])))

    def _together(self) -> tuple[Any, tuple[Tensor, ...]]:
        """(a graph that runs every form side by side, what it reads)."""
        import torch
        from torch.fx import Graph, GraphModule

        from repcompiler.forms import alone

        graph = Graph()
        places = [graph.placeholder(f"value_{i}") for i in range(len(self.order))]
        parts = {
            f"form_{i}": alone(self.convs[key], form)
            for i, (key, form) in enumerate(self.order)
        }
        calls = [graph.call_module(n, (place,)) for n, place in zip(parts, places)]
        graph.output(tuple(calls))
        dtype = getattr(torch, self.task.setting.dtype)
        sizes = [(1, *self.shapes[key][1:]) for key, _ in self.order]
        values = tuple(torch.randn(size).to(dtype) for size in sizes)
        return GraphModule(parts, graph).eval(), values
