"""Parameters and multiply-accumulates of an OpenVINO graph, from its values' sizes.

What has no formula here is listed with how often it occurs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from fastvit_cli import irgraphs

if TYPE_CHECKING:
    from torch import Tensor


def counts(path: str, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Numbers in floating-point constants, and the MACs of one run on `inputs`."""
    graph = irgraphs.read(path)
    graph.reshape({i: list(value.shape) for i, value in enumerate(inputs)})
    macs: Counter[str] = Counter()
    others: Counter[str] = Counter()
    params = 0
    for op in graph.get_ordered_ops():
        name = op.get_type_name()
        if _open(op):  # its sizes follow from values
            others[name] += 1
        elif name == "Constant":
            real = op.get_element_type().is_real()
            params += prod(op.output(0).get_shape()) if real else 0
        elif irgraphs.weight_of(op):
            _, _, own, *kernel = irgraphs.weight_of(op)
            macs[name] += prod(op.output(0).get_shape()) * own * prod(kernel)
        elif name == "MatMul":
            first = op.input(0).get_shape()
            depth = first[-2 if op.get_attributes()["transpose_a"] else -1]
            macs[name] += prod(op.output(0).get_shape()) * depth
        elif name not in ("Parameter", "Result"):
            others[name] += 1
    return {
        "params": params,
        "ops": None,
        "macs": macs.total(),
        "macs_by_operator": dict(macs),
        "uncounted": dict(others),
    }


def _open(op: Any) -> bool:
    """Whether an op reads or writes a value without sizes, or one of no axis."""
    values = [*op.inputs(), *op.outputs()]
    shapes = [value.get_partial_shape() for value in values]
    if any(shape.is_dynamic for shape in shapes):
        return True
    return op.get_type_name() == "MatMul" and any(len(it) < 2 for it in shapes[:2])
