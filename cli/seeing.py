"""Where two unrelated graphs part, and how small a fault their outputs would show."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastvit_cli.check_cases import Case
from fastvit_cli.comparing import Pair, outputs_of
from fastvit_cli.runners import Runner, cast

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYERS = 6  # in which one weight is changed to see what it does
STEP = 1e-3
SAME = 1e3  # roundings within which two intermediate values count as one
Values = list[tuple[str, "Tensor"]]


def first_difference(models: Pair, case: Case) -> dict[str, Any] | None:
    """The candidate's first value that the reference does not have, on one input.

    Values are matched by what they are, not by name: the last match in the order of the
    candidate is where the two still agree. None where one of them cannot be watched.
    """
    theirs, ours = _watch(models.candidate, case), _watch(models.reference, case)
    if not theirs or not ours:
        return None
    last, twin = -1, ""
    for index, (_, value) in enumerate(theirs):
        match = next((name for name, own in ours if _same(own, value)), None)
        if match is not None:
            last, twin = index, match
    if last + 1 >= len(theirs):
        return None
    name, value = theirs[last + 1]
    said = f"after {theirs[last][0]} (the reference's {twin})" if last >= 0 else ""
    return {
        "region": name,
        "region_kind": "value",
        "place": name,
        "kind": "value",
        "detail": "the first value that the reference lacks, "
        f"{said or 'at the input'}, of shape {'x'.join(map(str, value.shape))}",
    }


def _watch(model: Runner, case: Case) -> Values:
    """Every value that a model makes, by the name of its module or node."""
    import torch

    inputs = cast(case.inputs, getattr(torch, model.dtype))
    if model.model is None:
        return []
    try:
        with torch.no_grad():
            if model.form == "program":
                return _of_program(model.model, inputs)
            return _of_module(copy.deepcopy(model.model), inputs)
    except Exception:  # code of somebody else runs here; then nothing can be said
        return []


def _of_program(program: Any, inputs: Sequence[Tensor]) -> Values:
    import torch

    from repcompiler.segments import values
    from repcompiler.steps import step_nodes

    made = values(program, inputs)
    named = zip(step_nodes(program), made.values())
    return [(str(n.name), v) for n, v in named if isinstance(v, torch.Tensor)]


def _of_module(module: Any, inputs: Sequence[Tensor]) -> Values:
    import torch

    found: Values = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                found.append((name or "the output", output.detach().clone()))

        return hook

    for name, part in module.named_modules():
        part.register_forward_hook(note(name))
    module(*inputs)
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether `b` is the reference's value `a`, by the roundings of `a`."""
    import torch

    if a.shape != b.shape or not a.is_floating_point() or not b.is_floating_point():
        return False
    size = float(a.double().norm())
    allowed = SAME * torch.finfo(a.dtype).eps * max(size, 1e-30)
    return float((a.double() - b.double()).norm()) <= allowed


def smallest_change(models: Pair, case: Case, limit: float) -> dict[str, Any] | None:
    """How far one weight has to move before the outputs pass the limit.

    One weight of median size is moved by a thousandth, in layers from the first to the
    last; outputs move in proportion, to first order. None without a float64 module.
    """
    import torch

    wide, own = models.yardstick, models.own
    if wide is None or models.turned or wide.model is None:
        return None
    truth, plain = outputs_of(wide, case), outputs_of(own, case)
    if isinstance(truth, str) or isinstance(plain, str):
        return None
    eps = torch.finfo(getattr(torch, own.dtype)).eps
    noise = [
        max(float((a.double() - t).norm()), eps * float(t.norm()))
        for a, t in zip(plain, truth)
        if t.is_floating_point()
    ]
    rows = [
        {
            "layer": name,
            "relative_change": _needed(wide, weight, case, truth, noise, limit),
        }
        for name, weight in _spread(wide.model)
    ]
    if not rows:
        return None
    seen = [row["relative_change"] for row in rows if row["relative_change"]]
    return {
        "layers": rows,
        "median": statistics.median(seen) if seen else None,
        "worst": max(rows, key=lambda row: row["relative_change"] or float("inf")),
    }


def _spread(model: Any) -> list[tuple[str, Tensor]]:
    """Some weights of more than one axis, from the first layer to the last."""
    found = [(name, w) for name, w in model.named_parameters() if w.dim() > 1]
    if len(found) <= LAYERS:
        return found
    pace = (len(found) - 1) / (LAYERS - 1)
    return [found[round(index * pace)] for index in range(LAYERS)]


def _needed(
    wide: Runner,
    weight: Tensor,
    case: Case,
    truth: Sequence[Tensor],
    noise: Sequence[float],
    limit: float,
) -> float | None:
    """The relative change of a median weight that the limit lets pass just not."""
    flat = weight.detach().view(-1)
    place = int(flat.abs().argsort()[len(flat) // 2])
    before = flat[place].clone()
    flat[place] = before * (1 + STEP)
    moved = outputs_of(wide, case)
    flat[place] = before
    if isinstance(moved, str):
        return None
    pairs = [(m, t) for m, t in zip(moved, truth) if t.is_floating_point()]
    shares = [
        float((m - t).norm()) / (limit * n) for (m, t), n in zip(pairs, noise) if n > 0
    ]
    most = max(shares, default=0.0)
    return STEP / most if most > 0 else None
