"""The plans that compute the same and may be faster here, as times of single ops say.

At most eight: for each layout of the weights, the default's regions or those that
measured costs choose, and each with every conv as it is or in its fastest form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastvit_cli import measured
from fastvit_cli.measured import OpTimes, Setting

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

    from repcompiler import Tuning

GAIN = 0.95  # of its time, below which another form of a conv is worth its ops
LAYOUTS = {False: "contiguous", True: "channels last"}
Stage = Callable[[str], None]
Inputs = tuple["Tensor", ...]


@dataclass(frozen=True)
class Task:
    """What is to be tuned, and for what.

    Attributes:
        door: how the compiler gets the graph.
        batch: samples of one call; 1 where the model fixes its batch.
        seconds: for each of the two timings of whole models.
    """

    model: Any
    inputs: Inputs
    setting: Setting
    door: str = "auto"
    seconds: float = 3.0


@dataclass(frozen=True)
class Plan:
    """One way to compute the model.

    Attributes:
        words: what it does otherwise than the default, for people.
        regions: what is merged, by place and kind.
        costs: microseconds that the choice of regions went by; empty if nominal.
    """

    words: tuple[str, ...]
    tuning: Tuning
    module: GraphModule
    regions: frozenset[str]
    forms: dict[str, dict[str, float]] = field(default_factory=dict[str, Any])
    costs: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def name(self) -> str:
        """The plan in a few words."""
        return ", ".join(self.words) or "default"


def candidates(task: Task, times: OpTimes, stage: Stage) -> tuple[Plan, list[Plan]]:
    """(the default, the other plans that the times of single ops suggest)."""
    import repcompiler as rc

    stage("fuse by nominal costs")
    default = _plan(task, (), rc.Tuning())
    found: dict[object, Plan] = {_signature(default): default}
    for channels_last, layout in LAYOUTS.items():
        stage(f"time ops, {layout}")
        words = (layout,) if channels_last else ()
        costs = times.costs(channels_last=channels_last)
        plain = _plan(task, words, rc.Tuning(channels_last=channels_last))
        merged = _measured_plan(task, words, costs, plain)
        for plan in (plain, _respelled(task, plain, times), merged):
            found.setdefault(_signature(plan), plan)
        respelled = _respelled(task, merged, times)
        found.setdefault(_signature(respelled), respelled)
    return default, [plan for plan in found.values() if plan is not default]


def _plan(task: Task, words: tuple[str, ...], tuning: Tuning, **more: Any) -> Plan:
    from repcompiler.compile import run_stages

    state = run_stages(
        task.model,
        task.inputs,
        verify=False,
        door="auto" if task.door == "submodules" else task.door,
        stop_after="lower",
        tuning=tuning,
    )
    assert state.rewritten is not None
    regions = frozenset(
        f"{r.name or '(root)'}: {r.kind}, {len(r.nodes)} nodes" for r in state.regions
    )
    return Plan(words, tuning, state.rewritten.module, regions, **more)


def _measured_plan(
    task: Task, words: tuple[str, ...], costs: measured.Costs, plain: Plan
) -> Plan:
    """The regions that measured costs choose; the default's where they agree."""
    import repcompiler as rc

    last = plain.tuning.channels_last
    found = _plan(task, words, rc.Tuning(costs=costs, channels_last=last))
    if _signature(found) == _signature(plain):
        return plain
    words = ("regions by measured costs", *words)
    return Plan(words, found.tuning, found.module, found.regions, costs=costs.used)


def _respelled(task: Task, plan: Plan, times: OpTimes) -> Plan:
    """The plan with each conv in the form that is fastest by itself."""
    import repcompiler as rc

    last = plan.tuning.channels_last
    rows = forms_by_time(task, plan.module, times, channels_last=last)
    forms = {name: min(row, key=row.__getitem__) for name, row in rows.items()}
    if not forms:
        return plan
    tuning = rc.Tuning(plan.tuning.costs, forms, last)
    words = (_counted(forms), *plan.words)
    return _plan(task, words, tuning, forms=rows, costs=plan.costs)


def _counted(forms: Mapping[str, str]) -> str:
    many = f"{len(forms)} conv{'s' if len(forms) != 1 else ''}"
    return f"{many} {' or '.join(sorted(set(forms.values())))}".replace("_", " ")


def forms_by_time(
    task: Task, module: GraphModule, times: OpTimes, *, channels_last: bool
) -> dict[str, dict[str, float]]:
    """For each conv that gains by another form: microseconds of every form of it."""
    from repcompiler import forms

    found: dict[str, dict[str, float]] = {}
    possible = forms.alternatives(module)
    shapes = _shapes(module, task, tuple(possible))
    for name, names in possible.items():
        conv: Any = module.get_submodule(name)
        row: dict[str, float] = {}
        for form in ("as one conv", *names):
            layout = LAYOUTS[channels_last]
            key = f"{conv} {form} on {shapes[name]}, {layout}"
            alone = forms.alone(conv, form)
            inputs = [_noise(shapes[name], conv)]
            make = lambda m=alone, x=inputs: measured.caller(  # noqa: E731
                m, x, task.setting.device, channels_last=channels_last
            )
            row[form] = times.microseconds(key, make)
        if min(row.values()) < GAIN * row["as one conv"]:
            found[name] = row
    return found


def _shapes(
    module: GraphModule, task: Task, names: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """What the named convs read."""
    import torch

    found: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            found.setdefault(name, tuple(args[0].shape))

        return hook

    handles = [
        module.get_submodule(name).register_forward_pre_hook(note(name))
        for name in names
    ]
    with torch.inference_mode():
        module(*batched(task))
    for handle in handles:
        handle.remove()
    return found


def _noise(shape: tuple[int, ...], conv: Any) -> Tensor:
    import torch

    return torch.randn(shape).to(conv.weight.device, conv.weight.dtype)


def batched(task: Task) -> Inputs:
    from fastvit_cli.exporters import rebatch

    if task.setting.batch == 1:
        return task.inputs
    return rebatch(task.inputs, task.setting.batch)


def _signature(plan: Plan) -> object:
    """The same for plans that run the same ops in the same layout."""
    modules = tuple((name, str(m)) for name, m in plan.module.named_modules() if name)
    return plan.module.code, modules, plan.tuning.channels_last


def writing(task: Task, plan: Plan) -> Plan | None:
    """The plan with writes in place; None where there is nothing to write to."""
    tuning = replace(plan.tuning, in_place=True)
    words = (*plan.words, "in place")
    found = _plan(task, words, tuning, forms=plan.forms, costs=plan.costs)
    return found if _signature(found) != _signature(plan) else None
