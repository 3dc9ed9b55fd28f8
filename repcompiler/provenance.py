"""The model that a fused candidate should be, recomposed from its reference's weights.

`twins` gives the forms that a candidate of one origin can have: the reference itself,
and its fused form, with every constant in float64 beside the one that is rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from repcompiler.capture import Model
from repcompiler.compile import run_stages
from repcompiler.report import Kept, Region
from repcompiler.rewrite import rewrite
from repcompiler.tuning import Tuning, apply


@dataclass(frozen=True)
class Twin:
    """What a candidate should be.

    Attributes:
        form: `train` (the reference itself) or `fused`.
        model: it, in the reference's dtype.
        exact: its parameters and buffers in float64, by name.
        regions: what was fused, each shown to equal the original in float64.
        kept: affine ops that stayed, with the reason.
    """

    form: str
    model: nn.Module
    exact: Mapping[str, Tensor]
    regions: tuple[Region, ...] = ()
    kept: tuple[Kept, ...] = ()

    def region_of(self, name: str) -> Region | None:
        """The region that a constant, or a module, of this model belongs to."""
        for region in self.regions:
            for part in region.added:
                if name == part or name.startswith(f"{part}."):
                    return region
        return None


def twins(
    reference: Model,
    inputs: Sequence[Tensor],
    *,
    capture: str = "auto",
    tuning: Tuning | None = None,
) -> Iterator[Twin]:
    """The reference's fused form, tuned as told, then the reference as it is.

    Raises:
        RepCompilerError: the reference cannot be captured.
    """
    told: dict[str, Any] = {"door": capture, "tuning": tuning}
    state = run_stages(reference, tuple(inputs), stop_after="lower", **told)
    assert state.facts is not None
    wide = rewrite(state.graph_module, state.regions, state.facts, dtype=torch.float64)
    wide = apply(state.tuning, wide, inputs)
    run_report(state)
    assert state.rewritten is not None and state.report is not None
    yield Twin(
        form="fused",
        model=state.rewritten.module,
        exact=state_of(wide.module),
        regions=state.report.regions,
        kept=state.report.kept,
    )
    yield plain_twin(reference)


def plain_twin(reference: Model) -> Twin:
    """The reference as it is."""
    module = reference
    if isinstance(module, ExportedProgram):
        module = module.module()
    return Twin("train", module, state_of(copy.deepcopy(module).double()))


def run_report(state: Any) -> None:
    """Fill in the report of a pipeline that stopped before its last stages."""
    from repcompiler.record import make_report

    state.report = make_report(state)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those outside of the state dict as well."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in tensors}
