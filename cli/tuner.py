"""`--tune`: of the plans that compute the same, the one that is fastest here.

Four things are free: which regions are merged, in which form each conv is written,
whether weights lie channels last, and whether ops overwrite what nobody else reads.
Single ops are timed (`measured`) and make a few plans; these are timed as whole models
against the default plan. The fastest is timed once more, with writes in place and
without, beside the default twice over, and is kept only if it is faster than the
default differs from itself.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastvit_cli import measured, plans, timing
from fastvit_cli.measured import OpTimes
from fastvit_cli.plans import LAYOUTS, Plan, Stage, Task

if TYPE_CHECKING:
    from repcompiler import Tuning

LEAST_GAIN = 0.02  # of the whole: what is less is noise, however quiet the machine
SURE = 2.0  # standard errors
FASTER_ROUNDS = 0.75  # of the rounds that a plan has to win
ROUNDS = (4, 9)  # at least: of the choice, of the confirmation


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
            "in_place": tuning.in_place,
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
        in_place=bool(card.get("in_place")),
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
        default, others = plans.candidates(task, times, stage)
    except rc.CaptureError:
        if task.door not in ("auto", "submodules"):
            raise
        why = "the model has no graph as a whole"
        return Tuned(None, {**_unchanged(task, why), **times.counts})
    finally:
        times.save()
    stage("time plans")
    best, ratios = _fastest(task, default, others)
    finals = _finalists(task, default, best)
    if not finals:
        why = "no other plan is cheaper by the times of its ops"
        return Tuned(None, {**_unchanged(task, why), **times.counts})
    stage("confirm")
    plan, document = _confirm(task, default, finals)
    rows = [{"plan": name, "ratio": ratio} for name, ratio in ratios.items()]
    seconds = time.perf_counter() - start
    whole = {**document, "plans": rows, **times.counts, "seconds": seconds}
    return Tuned(plan, whole)


def _unchanged(task: Task, why: str) -> dict[str, Any]:
    return {"kept": "default", "why": why, **asdict(task.setting), "plans": []}


# ---- choice ------------------------------------------------------------------------


def _fastest(
    task: Task, default: Plan, others: list[Plan]
) -> tuple[Plan, dict[str, float]]:
    """(the fastest plan, the time of each by name over that of the default)."""
    if not others:
        return default, {}
    every = (default, *others)
    runs = {plan.name: _run(plan, task) for plan in every}
    rounds = timing.interleave(runs, task.seconds, min_rounds=ROUNDS[0])
    ratios = {name: timing.ratio(rounds[name], rounds[default.name]) for name in runs}
    return min(every, key=lambda plan: ratios[plan.name]), ratios


def _finalists(task: Task, default: Plan, best: Plan) -> list[Plan]:
    """The best plan, if it is not the default, and the same with writes in place."""
    found = (None if best is default else best, plans.writing(task, best))
    return [plan for plan in found if plan is not None]


def _confirm(
    task: Task, default: Plan, finals: list[Plan]
) -> tuple[Plan | None, dict[str, Any]]:
    """The faster of the last plans, if it beats the default beyond noise."""
    run = _run(default, task)
    calls = {"default": run, "again": run}
    calls |= {plan.name: _run(plan, task) for plan in finals}
    rounds = timing.interleave(calls, task.seconds, min_rounds=ROUNDS[1])
    ratios = {name: timing.ratio(rounds[name], rounds["default"]) for name in calls}
    best = min(finals, key=lambda plan: ratios[plan.name])
    won = _rounds_won(rounds[best.name], rounds["default"])
    ratio, noise = ratios[best.name], _noise(rounds, ratios["again"], best.name)
    better = ratio < 1 - noise and won >= FASTER_ROUNDS
    times = {name: timing.summarise(row).median for name, row in rounds.items()}
    document = {
        "kept": "tuned" if better else "default",
        "why": _why(better, ratio, noise, won),
        **asdict(task.setting),
        "ratio": ratio,
        "noise": noise,
        "rounds_won": won,
        "milliseconds": {
            "default": times["default"],
            "again": times["again"],
            "tuned": times[best.name],
        },
        "confirmed": [{"plan": p.name, "ratio": ratios[p.name]} for p in finals],
        "plan": _plan_facts(best, default),
    }
    return (best if better else None), document


def _run(plan: Plan, task: Task) -> Callable[[], Any]:
    import torch

    device, inputs = task.setting.device, plans.batched(task)
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


def _noise(rounds: Mapping[str, list[list[float]]], again: float, best: str) -> float:
    """By how much the ratio of two equal plans may be off 1.

    The largest of how far the default is from itself, of what is uncertain about the
    ratio (`SURE` standard errors of a median, from the median absolute deviation of the
    rounds), and of `LEAST_GAIN`.
    """
    pairs = zip(rounds[best], rounds["default"])
    ratios = [statistics.median(a) / statistics.median(b) for a, b in pairs]
    middle = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(ratio - middle) for ratio in ratios)
    error = 1.2533 * deviation / math.sqrt(len(ratios))
    return max(abs(again - 1), SURE * error, LEAST_GAIN)


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
        "in_place": plan.tuning.in_place,
        "forms": [
            {"name": name, "form": form, "microseconds": plan.forms[name]}
            for name, form in plan.tuning.forms.items()
        ],
        "merged": sorted(plan.regions - default.regions),
        "not_merged": sorted(default.regions - plan.regions),
    }
