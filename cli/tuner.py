"""`--tune`: of the plans that compute the same, the one that is fastest here.

Three things are free: which regions are merged, in which form each conv is written, and
whether weights lie channels last. Single ops are timed (`measured`) and make a few
plans; these are timed as whole models against the default plan. The fastest is timed
once more, beside the default twice over, and is kept only if it is faster than the
default differs from itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from fastvit_cli import measured, timing
from fastvit_cli.measured import OpTimes, Setting

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

    from repcompiler import Tuning

GAIN = 0.95  # of its time, below which another form of a conv is worth its ops
LEAST_GAIN = 0.01  # of the whole: what is less is noise, however quiet the machine
FASTER_ROUNDS = 0.75  # of the rounds that a plan has to win
ROUNDS = (4, 9)  # at least: of the choice, of the confirmation
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


@dataclass(frozen=True)
class Tuned:
    """How it ended: the plan that is kept, None for the default, and the JSON of it."""

    plan: Plan | None
    document: dict[str, Any]

    @property
    def tuning(self) -> Tuning | None:
        """What the compiler is told."""
        return self.plan.tuning if self.plan else None

    @property
    def card(self) -> dict[str, Any]:
        """What a file needs to be read back: see `from_card`."""
        if self.plan is None:
            return {}
        tuning = self.plan.tuning
        return {
            "costs": self.plan.costs,
            "forms": dict(tuning.forms),
            "channels_last": tuning.channels_last,
        }


def from_card(card: Mapping[str, Any]) -> Tuning | None:
    """The tuning that a file was written with; None where there was none."""
    import repcompiler as rc

    if not card:
        return None
    return rc.Tuning(
        costs=measured.recorded(card["costs"]) if card.get("costs") else None,
        forms=card.get("forms", {}),
        channels_last=bool(card.get("channels_last")),
    )


def tune(task: Task, stage: Stage) -> Tuned:
    """Measure, choose, and hold the choice against the default.

    Raises:
        RepCompilerError: the compiler cannot take the model.
    """
    import repcompiler as rc

    start = time.perf_counter()
    times = OpTimes.opened(task.setting)
    try:
        default, others = plans(task, times, stage)
    except rc.CaptureError:
        if task.door not in ("auto", "submodules"):
            raise
        why = "the model has no graph as a whole"
        return Tuned(None, {**_unchanged(task, why), **times.counts})
    finally:
        times.save()
    facts = times.counts
    if not others:
        why = "no other plan is cheaper by the times of its ops"
        return Tuned(None, {**_unchanged(task, why), **facts})
    stage("time plans")
    plan, document = _choose(task, default, others)
    seconds = time.perf_counter() - start
    return Tuned(plan, {**document, **facts, "seconds": seconds})


def _unchanged(task: Task, why: str) -> dict[str, Any]:
    return {"kept": "default", "why": why, **asdict(task.setting), "plans": []}


# ---- plans -------------------------------------------------------------------------


def plans(task: Task, times: OpTimes, stage: Stage) -> tuple[Plan, list[Plan]]:
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
        module(*_batched(task))
    for handle in handles:
        handle.remove()
    return found


def _noise(shape: tuple[int, ...], conv: Any) -> Tensor:
    import torch

    return torch.randn(shape).to(conv.weight.device, conv.weight.dtype)


def _batched(task: Task) -> Inputs:
    from fastvit_cli.exporters import rebatch

    if task.setting.batch == 1:
        return task.inputs
    return rebatch(task.inputs, task.setting.batch)


def _signature(plan: Plan) -> object:
    """The same for plans that run the same ops in the same layout."""
    modules = tuple((name, str(m)) for name, m in plan.module.named_modules() if name)
    return plan.module.code, modules, plan.tuning.channels_last


# ---- choice ------------------------------------------------------------------------


def _choose(
    task: Task, default: Plan, others: list[Plan]
) -> tuple[Plan | None, dict[str, Any]]:
    """The fastest plan, if it is faster than the default beyond noise."""
    runs = {plan.name: _run(plan, task) for plan in (default, *others)}
    first = timing.interleave(runs, task.seconds, min_rounds=ROUNDS[0])
    ratios = {name: timing.ratio(first[name], first[default.name]) for name in runs}
    best = min(others, key=lambda plan: ratios[plan.name])
    calls = {
        "default": runs[default.name],
        "again": runs[default.name],
        "tuned": runs[best.name],
    }
    rounds = timing.interleave(calls, task.seconds, min_rounds=ROUNDS[1])
    won = _rounds_won(rounds["tuned"], rounds["default"])
    ratio = timing.ratio(rounds["tuned"], rounds["default"])
    noise = max(abs(timing.ratio(rounds["again"], rounds["default"]) - 1), LEAST_GAIN)
    better = ratio < 1 - noise and won >= FASTER_ROUNDS
    document = {
        "kept": "tuned" if better else "default",
        "why": _why(better, ratio, noise, won),
        **asdict(task.setting),
        "ratio": ratio,
        "noise": noise,
        "rounds_won": won,
        "milliseconds": {k: timing.summarise(r).median for k, r in rounds.items()},
        "plan": _plan_facts(best, default),
        "plans": [{"plan": name, "ratio": row} for name, row in ratios.items()],
    }
    return (best if better else None), document


def _run(plan: Plan, task: Task) -> Callable[[], Any]:
    import torch

    device, inputs = task.setting.device, _batched(task)
    wait = torch.cuda.synchronize if device.startswith("cuda") else None

    def run() -> Any:
        with torch.inference_mode():
            result = plan.module(*inputs)
        if wait is not None:
            wait()
        return result

    return run


def _rounds_won(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """The share of rounds in which ours was faster."""
    pairs = [(statistics.median(a), statistics.median(b)) for a, b in zip(ours, theirs)]
    return sum(a < b for a, b in pairs) / len(pairs)


def _why(better: bool, ratio: float, noise: float, won: float) -> str:
    if better:
        return "faster than the default by more than the default differs from itself"
    if ratio >= 1 - noise:
        return f"no plan gains more than the noise of {noise:.1%}"
    return f"the best plan was faster in {won:.0%} of the rounds only"


def _plan_facts(plan: Plan, default: Plan) -> dict[str, Any]:
    """What the best plan does otherwise."""
    return {
        "name": plan.name,
        "layout": LAYOUTS[plan.tuning.channels_last],
        "forms": [
            {"name": name, "form": form, "microseconds": plan.forms[name]}
            for name, form in plan.tuning.forms.items()
        ],
        "merged": sorted(plan.regions - default.regions),
        "not_merged": sorted(default.regions - plan.regions),
    }
