"""An ONNX graph as a list of steps, to be compared with its twin (see `steps`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli.errors import BadInput, summary

if TYPE_CHECKING:
    from torch import Tensor

    from repcompiler.steps import Step


def read(path: str | Path) -> Any:
    """The graph in a file, as onnx has it.

    Raises:
        BadInput: it cannot be read.
    """
    import onnx

    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf's, onnx's and the file system's own kinds
        raise BadInput(f"{path} cannot be read: {summary(error)}.") from error


def onnx_steps(model: Any) -> list[Step]:
    """The nodes of a graph, constants by the name of their initialiser."""
    from repcompiler.steps import Step

    constants = constants_of(model.graph)
    inputs = [v.name for v in model.graph.input if v.name not in constants]
    numbers = {name: -1 - index for index, name in enumerate(inputs)}
    steps: list[Step] = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            continue
        tensors = {name: constants[name] for name in node.input if name in constants}
        roles = [
            "tensor" if n in constants else "value" if n else "" for n in node.input
        ]
        feeds = tuple(
            numbers.get(name, len(steps))
            for name in node.input
            if name and name not in constants
        )
        settings = ", ".join([*roles, *sorted(map(_setting, node.attribute))])
        place = _place(node)
        steps.append(
            Step(node.op_type, f"({settings})", tensors, feeds, place, node.name)
        )
        numbers.update({name: len(steps) - 1 for name in node.output})
    return steps


def twin_graph(model: Any, inputs: tuple[Tensor, ...], declared: Any) -> Any:
    """The graph that this project's exporter makes of a module for a declared size."""
    import torch
    from fastvit_cli.exporters import AXES, rebatch

    free = [[axis for axis, size in enumerate(s) if size is None] for s in declared]
    dynamic = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(axes, dynamic) for axes in free)
    if free and 0 in free[0]:
        inputs = rebatch(inputs, 2)
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    names = {
        axis: torch.export.Dim(AXES.get(axis, f"size_{axis}")) for axis in range(9)
    }
    exported = torch.onnx.export(
        program,
        dynamo=True,
        dynamic_shapes=tuple({axis: names[axis] for axis in axes} for axes in free),
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    return exported.model_proto


def constants_of(graph: Any) -> dict[str, Tensor]:
    """Every constant tensor of a graph, by name."""
    import torch
    from onnx import numpy_helper

    found = {value.name: value for value in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            found[node.output[0]] = node.attribute[0].t
    arrays = {name: numpy_helper.to_array(value) for name, value in found.items()}
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def _setting(attribute: Any) -> str:
    import onnx

    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == onnx.AttributeProto.GRAPH:
        value = [str(node.op_type) for node in value.node]
    elif attribute.type == onnx.AttributeProto.TENSOR:
        value = onnx.numpy_helper.to_array(value).tolist()
    return f"{attribute.name}={value!r}"


def _place(node: Any) -> str:
    """The innermost module in the exporter's note on where a node came from."""
    for entry in node.metadata_props:
        if entry.key == "namespace":
            places = [part.split(": ")[0] for part in entry.value.split("/")[:-1]]
            return next((place for place in reversed(places) if place), "")
    return ""
