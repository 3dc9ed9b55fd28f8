"""Parameters and multiply-accumulates of an ONNX graph, from the sizes of its values.

onnx infers the sizes for the inputs that the graph is run on. What has none, and every
operator without multiply-accumulates, is listed with how often it occurs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

Shapes = list["tuple[int, ...] | None"]


def counts(path: str, inputs: Sequence[Any]) -> dict[str, Any]:
    """Numbers in floating-point initializers, and the MACs of one run on `inputs`.

    Operators in the branches of an `If` or the body of a `Loop` are not counted: how
    often they run is not known. Their `If` or `Loop` is listed.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    shapes = _shapes(model, [tuple(value.shape) for value in inputs])
    macs: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for node in model.graph.node:
        count = _COUNTS.get(node.op_type, _unknown)
        found = count(
            node,
            [shapes.get(name) for name in node.input],
            [shapes.get(name) for name in node.output],
        )
        if found is None:
            others[node.op_type] += 1
        else:
            macs[node.op_type] += found
    numbers = [t for t in model.graph.initializer if t.data_type in _floating(onnx)]
    return {
        "params": sum(prod(tensor.dims) for tensor in numbers),
        "ops": None,
        "macs": macs.total(),
        "macs_by_operator": dict(macs),
        "uncounted": dict(others),
    }


def _floating(onnx: Any) -> tuple[int, ...]:
    kinds = onnx.TensorProto
    return (kinds.FLOAT, kinds.DOUBLE, kinds.FLOAT16, kinds.BFLOAT16)


def _shapes(model: Any, given: list[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The sizes of every value that has known ones."""
    import onnx

    graph = model.graph
    own = {tensor.name for tensor in graph.initializer}
    fed = [value for value in graph.input if value.name not in own]
    for value, sizes in zip(fed, given):
        for dim, size in zip(value.type.tensor_type.shape.dim, sizes):
            dim.dim_value = size
    # What the file says of other values may be of other inputs.
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        known = value.type.tensor_type.HasField("shape")
        if known and all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    return found


# ---- one operator ------------------------------------------------------------------


def _unknown(node: Any, sizes: Shapes, results: Shapes) -> int | None:
    return None


def _conv(node: Any, sizes: Shapes, results: Shapes) -> int | None:
    """Every output element meets the taps of its group."""
    kernel, result = sizes[_KERNELS.get(node.op_type, 1)], results[0]
    if kernel is None or result is None:
        return None
    return prod(result) * prod(kernel[1:])


def _transposed(node: Any, sizes: Shapes, results: Shapes) -> int | None:
    """Every input element meets the taps of its group."""
    source, kernel = sizes[:2]
    if kernel is None or source is None:
        return None
    return prod(source) * prod(kernel[1:])


def _matmul(node: Any, sizes: Shapes, results: Shapes) -> int | None:
    left, result = sizes[0], results[0]
    if left is None or result is None:
        return None
    turned = any(a.name == "transA" and a.i for a in node.attribute)
    return prod(result) * left[-2 if turned else -1]


def _einsum(node: Any, sizes: Shapes, results: Shapes) -> int | None:
    """The product of the sizes of all letters; none for an ellipsis."""
    (equation,) = (a.s.decode() for a in node.attribute if a.name == "equation")
    terms = equation.replace(" ", "").split("->")[0].split(",")
    letters: dict[str, int] = {}
    for term, shape in zip(terms, sizes):
        if shape is None or len(term) != len(shape):
            return None
        letters.update(zip(term, shape))
    return prod(letters.values()) if len(terms) > 1 else None


_KERNELS = {"QLinearConv": 3}
_COUNTS: dict[str, Callable[[Any, Shapes, Shapes], int | None]] = {
    "Conv": _conv,
    "ConvInteger": _conv,
    "QLinearConv": _conv,
    "FusedConv": _conv,
    "ConvTranspose": _transposed,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "Gemm": _matmul,
    "Einsum": _einsum,
}
