"""Plans as whole models: run in the backend that they are tuned for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastvit_cli import backends, cells, plans
from fastvit_cli.errors import JobFailed, summary
from fastvit_cli.plans import Plan, Task

if TYPE_CHECKING:
    from torch import Tensor

Call = Callable[[], Any]


@dataclass
class Runs:
    """What runs each plan once, prepared once.

    Attributes:
        refused: by name of a plan, why the runtime is not asked for it again.
    """

    task: Task
    default: Plan
    refused: dict[str, str] = field(default_factory=dict[str, str])
    _made: dict[str, Call] = field(default_factory=dict[str, Call])
    _own: list[Tensor] = field(default_factory=list["Tensor"])

    def of(self, some: Iterable[Plan]) -> dict[str, Call]:
        """By name, what runs the plans that the backend takes."""
        for plan in some:
            if plan.name in self._made or plan.name in self.refused:
                continue
            try:
                self._made[plan.name] = self._prepared(plan)
            except Exception as error:  # a runtime may refuse in any way
                self.refused[plan.name] = summary(error, 160)
        return {p.name: self._made[p.name] for p in some if p.name in self._made}

    def _prepared(self, plan: Plan) -> Call:
        inputs = plans.batched(self.task)
        if self.task.setting.backend == "eager":
            return backends.plain(plan.module, inputs, self.task.setting.device)
        assert self.task.exports is not None
        told = (plans.signature(plan), plan.module, self.task.inputs, self.task)
        subject = replace(self.task.exports.subject(*told), kernels=plan.kernels)
        run = backends.BACKENDS[self.task.setting.backend].prepare(subject, inputs)
        found = cells.flat(run())
        if plan is self.default:
            self._own = found
        elif self._distance(found) > cells.MAX_ERROR_RATIO:
            raise JobFailed(f"{self.task.setting.backend} computes something else")
        return run

    def _distance(self, found: list[Tensor]) -> float:
        """How many times as far from float64 as the default in the same runtime."""
        if self._truth is None:
            return 0.0
        if [t.shape for t in found] != [t.shape for t in self._truth]:
            return float("inf")
        dtype = self.task.setting.dtype
        rows = zip(found, self._own, self._truth)
        return max(cells.errors(*row, dtype)[0] for row in rows)

    @cached_property
    def _truth(self) -> list[Tensor] | None:
        """What the default plan computes in float64: its numbers are every plan's."""
        import torch

        module = copy.deepcopy(self.default.module).double()
        given = plans.batched(self.task)
        inputs = [x.double() if x.is_floating_point() else x for x in given]
        try:
            with torch.inference_mode():
                return cells.flat(module(*inputs))
        except RuntimeError:  # it holds to a dtype; the file is compared all the same
            return None
