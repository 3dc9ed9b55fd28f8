"""`--tune`: of the plans that compute the same, the one that is fastest here.

Four things are free in eager torch: which regions are merged, in which form each conv
is written, whether weights lie channels last, and whether ops overwrite what nobody
else reads; in other runtimes it is the forms of convs, and in OpenVINO the kernels that
run them (`onnx_plans`).
Single ops are timed (`measured`) and make a few plans; these are timed as whole models
against the default plan. The fastest is timed once more, with writes in place and
without, beside the default twice over, and is kept only if it is faster than the
default differs from itself.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli import measured, onnx_plans, plans, timing
from fastvit_cli.measured import OpTimes
from fastvit_cli.onnx_plans import Exports
from fastvit_cli.plan_runs import Runs
from fastvit_cli.plans import LAYOUTS, Candidates, Plan, Stage, Task

if TYPE_CHECKING:
    from repcompiler import Tuning

LEAST_GAIN = 0.02  # of the whole: what is less is noise, however quiet the machine
SURE = 2.0  # standard errors
FASTER_ROUNDS = 0.75  # of the rounds that a plan has to win
ROUNDS = (4, 9)  # at least: of the choice, of the confirmation
NEAR = (1.05, 2)  # times the best plan, and how many, whose kernels are tried
SILENT = "only an .xml says which kernels OpenVINO is to run, and none is written"


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
    def kernels(self) -> tuple[str, ...]:
        """Kinds of convs that OpenVINO is told to run in its direct kernels."""
        return self.plan.kernels if self.plan else ()

    @property
    def card(self) -> dict[str, Any]:
        """What a file needs to be read back: see `from_card`."""
        if self.plan is None:
            return {}
        tuning = self.plan.tuning
        return {
            "backend": self.document["backend"],
            "costs": self.plan.costs,
            "forms": dict(tuning.forms),
            "channels_last": tuning.channels_last,
            "in_place": tuning.in_place,
            **({"kernels": list(self.kernels)} if self.kernels else {}),
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
    with tempfile.TemporaryDirectory(prefix="fastvit-tune-") as folder:
        if task.exports is None:
            task = replace(task, exports=Exports(Path(folder)))
        try:
            found = _candidates(task, times, stage)
        except rc.CaptureError:
            if task.door not in ("auto", "submodules"):
                raise
            why = "the model has no graph as a whole"
            plan, document, left_out = None, _unchanged(task, why), {}
        else:
            plan, document = _chosen(task, found, stage)
            left_out = found.left_out
        finally:
            times.save()
    if task.setting.backend == "openvino" and not task.kernels:
        left_out = {**left_out, "direct kernels": SILENT}
    document |= {"plans": document.get("plans", []), **times.counts}
    document["left_out"] = [{"plan": p, "why": why} for p, why in left_out.items()]
    document["seconds"] = time.perf_counter() - start
    return Tuned(plan, document)


def _candidates(task: Task, times: OpTimes, stage: Stage) -> Candidates:
    eager = task.setting.backend == "eager"
    return (plans if eager else onnx_plans).candidates(task, times, stage)


def _chosen(
    task: Task, found: Candidates, stage: Stage
) -> tuple[Plan | None, dict[str, Any]]:
    """(the plan that beats the default, if one does, how that was found)."""
    runs = Runs(task, found.default)
    stage("time plans")
    best, ratios = _fastest(runs, found.others)
    if best is not None and task.setting.backend == "openvino" and task.kernels:
        stage("time kernels")
        best = _in_best_kernels(runs, best, found.others, ratios)
    finals = [] if best is None else _finalists(runs, best)
    found.left_out |= runs.refused
    if best is None:
        why = f"{task.setting.backend} does not run the default plan"
        return None, _unchanged(task, why)
    rows = [{"plan": name, "ratio": ratio} for name, ratio in ratios.items()]
    if not finals:
        faster = "no other plan was faster"
        why = faster if len(rows) > 1 else _no_other(task, found)
        return None, {**_unchanged(task, why), "plans": rows}
    stage("confirm")
    plan, document = _confirm(runs, finals)
    return plan, {**document, "plans": rows}


def _no_other(task: Task, found: Candidates) -> str:
    """Why there was nothing to time the default against."""
    if found.left_out:
        return "no other plan could be timed"
    if task.setting.backend != "eager":
        return "no conv has another form that is near it in time"
    return "no other plan is cheaper by the times of its ops"


def _unchanged(task: Task, why: str) -> dict[str, Any]:
    return {"kept": "default", "why": why, **asdict(task.setting)}


# ---- choice ------------------------------------------------------------------------


def _fastest(runs: Runs, others: list[Plan]) -> tuple[Plan | None, dict[str, float]]:
    """(the fastest plan, the time of each by name over that of the default).

    None if the default does not run.
    """
    default = runs.default
    if not others:
        return default, {}
    calls = runs.of((default, *others))
    if default.name not in calls:
        return None, {}
    rounds = timing.interleave(calls, runs.task.seconds, min_rounds=ROUNDS[0])
    ratios = {name: timing.ratio(rounds[name], rounds[default.name]) for name in calls}
    ran = [plan for plan in (default, *others) if plan.name in ratios]
    return min(ran, key=lambda plan: ratios[plan.name]), ratios


def _in_best_kernels(
    runs: Runs, best: Plan, others: list[Plan], ratios: dict[str, float]
) -> Plan | None:
    """The fastest of the plans near the best, in any kernels; None if none runs.

    With other kernels another plan may be the fastest: those for blocks of channels
    have no cheap way to interleave them. `ratios` gets what was timed.
    """
    if best.name not in runs.of((best,)):
        return None
    limit = NEAR[0] * ratios.get(best.name, 1.0)
    near = [p for p in (runs.default, *others) if ratios.get(p.name, math.inf) <= limit]
    near = sorted(near, key=lambda plan: ratios[plan.name])[: NEAR[1]] or [best]
    told = [it for plan in near for it in onnx_plans.in_kernels(runs.task, plan)]
    if not told:
        return best
    again = [plan for plan in near if plan is not runs.default]
    fastest, found = _fastest(runs, [*again, *told])
    ratios |= {**found, **ratios}
    return fastest or best


def _finalists(runs: Runs, best: Plan) -> list[Plan]:
    """The best plan, if it is not the default, and the same with writes in place."""
    found = [] if best is runs.default else [best]
    if runs.task.setting.backend == "eager":
        writing = plans.writing(runs.task, best)
        found += [writing] if writing else []
    return found


def _confirm(runs: Runs, finals: list[Plan]) -> tuple[Plan | None, dict[str, Any]]:
    """The faster of the last plans, if it beats the default beyond noise."""
    task, default = runs.task, runs.default
    calls = runs.of((default, *finals))
    calls["again"] = calls["default"]
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
        "kernels": list(plan.kernels),
        "forms": [
            {"name": name, "form": form, "microseconds": plan.forms[name]}
            for name, form in plan.tuning.forms.items()
        ],
        "merged": sorted(plan.regions - default.regions),
        "not_merged": sorted(default.regions - plan.regions),
    }
