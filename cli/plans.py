"""The plans that compute the same and may be faster here, as times of single ops say.

At most eight in eager torch: for each layout of the weights, the default's regions or
those that measured costs choose, and each with every conv as it is or in its fastest
form. Forms come first, because they are few and gain most: the time for timing ops may
be up before the last regions are priced. `onnx_plans` has the plans for other runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastvit_cli import measured
from fastvit_cli.measured import OpTimes, Setting

if TYPE_CHECKING:
    from fastvit_cli.onnx_plans import Exports
    from torch import Tensor
    from torch.fx import GraphModule

    from repcompiler import Tuning

GAIN = 0.95  # of its time, below which another form of a conv is worth its ops
PLAIN = "as one conv"  # the form that a conv has by default
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
        regions: whether measured costs may choose other regions; it takes longest.
        dynamic_batch: whether the model takes any number of samples.
        exports: ONNX files of the model's plans, for who tunes it more than once.
        in_order: whether every value keeps the order of its channels.
        kernels: whether what is written can say which kernels run it: a file of
            OpenVINO's own can, an ONNX graph cannot.
    """

    model: Any
    inputs: Inputs
    setting: Setting
    door: str = "auto"
    seconds: float = 3.0
    regions: bool = True
    dynamic_batch: bool = True
    exports: Exports | None = None
    in_order: bool = False
    kernels: bool = True


@dataclass(frozen=True)
class Plan:
    """One way to compute the model.

    Attributes:
        words: what it does otherwise than the default, for people.
        regions: what is merged, by place and kind.
        costs: microseconds that the choice of regions went by; empty if nominal.
        kernels: kinds of convs that the runtime runs in its direct kernels.
    """

    words: tuple[str, ...]
    tuning: Tuning
    module: GraphModule
    regions: frozenset[str]
    forms: dict[str, dict[str, float]] = field(default_factory=dict[str, Any])
    costs: dict[str, float] = field(default_factory=dict[str, float])
    kernels: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The plan in a few words."""
        return ", ".join(self.words) or "default"


@dataclass
class Candidates:
    """The default, and what single ops say about the others.

    Attributes:
        others: plans to be timed as whole models.
        left_out: by what it does, why a plan is not among them.
    """

    default: Plan
    others: list[Plan] = field(default_factory=list[Plan])
    left_out: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, plan: Plan) -> None:
        """Take a plan in, unless it runs what another one does."""
        known = {signature(other) for other in (self.default, *self.others)}
        if signature(plan) not in known:
            self.others.append(plan)


def candidates(task: Task, times: OpTimes, stage: Stage) -> Candidates:
    """The default, and the other plans that the times of single ops suggest."""
    import repcompiler as rc

    stage("fuse by nominal costs")
    found = Candidates(make(task, (), rc.Tuning()))
    plains: dict[bool, Plan] = {}
    for last, layout in LAYOUTS.items():
        stage(f"time forms of convs, {layout}")
        words = (layout,) if last else ()
        plains[last] = make(task, words, rc.Tuning(channels_last=last))
        found.add(plains[last])
        found.add(_respelled(task, plains[last], times))
    for last, layout in LAYOUTS.items() if task.regions else ():
        stage(f"time ops, {layout}")
        costs = times.costs(channels_last=last)
        merged = _measured_plan(task, costs, plains[last])
        if not costs.complete:  # never choose between measured and nominal times
            found.left_out[f"regions by measured costs, {layout}"] = time_is_up()
            continue
        found.add(merged)
        found.add(_respelled(task, merged, times))
    return found


def time_is_up() -> str:
    """Why ops were not timed, and plans that need their times not made."""
    return f"the {measured.BUDGET:g} s for timing ops were up"


def make(task: Task, words: tuple[str, ...], tuning: Tuning, **more: Any) -> Plan:
    """The plan that the compiler makes of a tuning."""
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


def _measured_plan(task: Task, costs: measured.Costs, plain: Plan) -> Plan:
    """The regions that measured costs choose; the default's where they agree."""
    import repcompiler as rc

    last = plain.tuning.channels_last
    found = make(task, (), rc.Tuning(costs=costs, channels_last=last))
    if signature(found) == signature(plain):
        return plain
    words = ("regions by measured costs", *plain.words)
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
    words = (counted(forms), *plan.words)
    return make(task, words, tuning, forms=rows, costs=plan.costs)


def counted(forms: Mapping[str, str]) -> str:
    many = f"{len(forms)} conv{'s' if len(forms) != 1 else ''}"
    return f"{many} {' or '.join(sorted(set(forms.values())))}".replace("_", " ")


def forms_by_time(
    task: Task, module: GraphModule, times: OpTimes, *, channels_last: bool
) -> dict[str, dict[str, float]]:
    """For each conv that gains by another form: microseconds of every form of it.

    A conv of which some form was not timed stays as it is.
    """
    from repcompiler import forms

    found: dict[str, dict[str, float]] = {}
    possible = forms.alternatives(module, in_order=task.in_order)
    shapes = shapes_read(module, task, tuple(possible))
    for name, names in possible.items():
        conv: Any = module.get_submodule(name)
        row: dict[str, float | None] = {}
        for form in (PLAIN, *names):
            layout = LAYOUTS[channels_last]
            key = f"{conv} {form} on {shapes[name]}, {layout}"
            alone = forms.alone(conv, form)
            inputs = [noise(shapes[name], conv)]
            call = lambda m=alone, x=inputs: measured.caller(  # noqa: E731
                m, x, task.setting.device, channels_last=channels_last
            )
            row[form] = times.microseconds(key, call)
        known = {form: time for form, time in row.items() if time is not None}
        if len(known) == len(row) and gains(known):
            found[name] = known
    return found


def gains(row: Mapping[str, float]) -> bool:
    """Whether the fastest form of a conv is worth its ops."""
    return min(row.values()) < GAIN * row[PLAIN]


def shapes_read(
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


def noise(shape: tuple[int, ...], conv: Any) -> Tensor:
    import torch

    return torch.randn(shape).to(conv.weight.device, conv.weight.dtype)


def batched(task: Task) -> Inputs:
    """The inputs of one call, of the batch size that is tuned for."""
    from fastvit_cli.exporters import rebatch

    if task.setting.batch == 1:
        return task.inputs
    return rebatch(task.inputs, task.setting.batch)


def signature(plan: Plan) -> object:
    """The same for plans that run the same ops in the same layout."""
    modules = tuple((name, str(m)) for name, m in plan.module.named_modules() if name)
    return plan.module.code, modules, plan.tuning.channels_last


def writing(task: Task, plan: Plan) -> Plan | None:
    """The plan with writes in place; None where there is nothing to write to."""
    tuning = replace(plan.tuning, in_place=True)
    words = (*plan.words, "in place")
    found = make(task, words, tuning, forms=plan.forms, costs=plan.costs)
    return found if signature(found) != signature(plan) else None
