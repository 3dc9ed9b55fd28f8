"""What two models return around the tensors: names, containers and plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastvit_cli.check_cases import Case
from fastvit_cli.comparing import Pair
from fastvit_cli.errors import one_line
from fastvit_cli.runners import cast


def other_structure(models: Pair, case: Case, limit: float) -> str:
    """How what the two return is put together differently, tensors aside.

    Graphs of a runtime return a flat list whatever they were exported from.
    """
    import torch

    pair = (models.own, models.candidate)
    if any(model.model is None or not model.takes(case.inputs) for model in pair):
        return ""
    found: list[Any] = []
    for model in pair:
        inputs = cast(case.inputs, getattr(torch, model.dtype))
        try:
            returned = model(*(value.clone().to(model.device) for value in inputs))
        except (Exception, SystemExit):  # what does not run is told by its case
            return ""
        found.append(_layout(returned))
    near = limit * torch.finfo(getattr(torch, models.candidate.dtype)).eps
    if _alike(*found, near):
        return ""
    shown = [one_line(str(layout), 100) for layout in found]
    return f"it returns {shown[1]} instead of {shown[0]}"


def _layout(value: Any) -> Any:
    """Lists and dictionaries with the plain values in them, and a word for the rest."""
    if isinstance(value, Mapping):
        return {str(key): _layout(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_layout(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return "tensor" if hasattr(value, "is_floating_point") else "object"


def _alike(a: Any, b: Any, near: float) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k], near) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_alike(x, y, near) for x, y in zip(a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=near) or (a != a and b != b)
    return type(a) is type(b) and a == b
