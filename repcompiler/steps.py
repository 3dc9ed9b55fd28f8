"""A program as a list of steps, whatever it was read from: what two graphs share.

A step is one operator with everything that is written in the graph itself: its name,
its settings, its constant tensors and which steps feed it. Two graphs of one origin
have the same steps in the same order, so that lists of steps are enough to compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node


@dataclass(frozen=True)
class Step:
    """One operator of a graph.

    Attributes:
        op: the operator's name.
        settings: every argument that is neither a tensor of the model nor a value.
        tensors: the constants that it reads, by their name in the model.
        feeds: the steps that it reads, by index; inputs of the graph are below zero.
        place: the module that it came from, '' where that is not known.
        node: its name in the graph.
    """

    op: str
    settings: str
    tensors: Mapping[str, Tensor] = field(compare=False)
    feeds: tuple[int, ...] = field(compare=False)
    place: str = field(default="", compare=False)
    node: str = field(default="", compare=False)

    @property
    def key(self) -> tuple[str, str, tuple[Any, ...]]:
        """What must be the same in a twin: operator, settings, shapes and dtypes."""
        kinds = tuple((tuple(t.shape), str(t.dtype)) for t in self.tensors.values())
        return (self.op, self.settings, kinds)


def as_program(
    model: nn.Module | ExportedProgram,
    inputs: Sequence[Tensor],
    free: Sequence[Sequence[int]] = (),
) -> ExportedProgram:
    """A model in ATen operators; a program is taken as it is.

    Args:
        free: the axes of each input that may have any size.

    Raises:
        RuntimeError or whatever else torch.export raises: it cannot be exported.
    """
    if isinstance(model, ExportedProgram):
        return model
    shapes = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in free)
    return torch.export.export(model, tuple(inputs), dynamic_shapes=shapes or None)


def program_steps(program: ExportedProgram) -> list[Step]:
    """The steps of an exported program."""
    constants = constants_of(program)
    inputs = user_inputs(program)
    numbers = {node: -1 - index for index, node in enumerate(inputs)}
    steps: list[Step] = []
    for node in step_nodes(program):
        steps.append(_step(node, numbers, constants))
        numbers[node] = len(steps) - 1
    return steps


def constants_of(program: ExportedProgram) -> dict[str, tuple[str, Tensor]]:
    """Name in the model, and tensor, of each placeholder that holds a constant."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    held: dict[str, Any] = {**program.state_dict, **program.constants}
    return {node: (name, held[name]) for node, name in names.items()}


def step_nodes(program: ExportedProgram) -> list[Node]:
    """The nodes that are steps, in order: no inputs, and no guards of the exporter."""
    return [
        node
        for node in program.graph.nodes
        if node.op in ("call_function", "output")
        and not any(word in str(node.target) for word in ("assert", "guards"))
    ]


def user_inputs(program: ExportedProgram) -> list[Node]:
    """The placeholders that the caller fills."""
    held = constants_of(program)
    nodes = program.graph.nodes
    return [n for n in nodes if n.op == "placeholder" and n.name not in held]


def _step(
    node: Node,
    numbers: Mapping[Node, int],
    constants: Mapping[str, tuple[str, Tensor]],
) -> Step:
    tensors: dict[str, Tensor] = {}
    feeds: list[int] = []

    def written(arg: Any) -> str:
        if isinstance(arg, Node):
            if arg.name in constants:
                name, tensor = constants[arg.name]
                tensors[name] = tensor
                return "tensor"
            feeds.append(numbers.get(arg, len(numbers)))
            return "value"
        if isinstance(arg, (list, tuple)):
            return f"[{', '.join(map(written, arg))}]"
        if isinstance(arg, Mapping):
            return f"{{{', '.join(f'{k}={written(v)}' for k, v in arg.items())}}}"
        if isinstance(arg, torch.device):
            return "device"
        return repr(arg)

    settings = written(node.args) + (written(node.kwargs) if node.kwargs else "")
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    place = next(reversed(stack.values()))[0] if stack else ""
    return Step(
        str(node.target),
        settings,
        tensors,
        tuple(feeds),
        place.split("@")[0],
        node.name,
    )
