"""What somebody has measured and chosen among equal forms; nothing is measured here.

Four things are free once a graph is fused: which regions to merge (`costs`), in which
form to write a conv (`forms`), how its weights lie in memory (`channels_last`), and
what is overwritten (`in_place`). The nominal machine of `cost` decides the first, and
leaves the others alone. A `Tuning` says otherwise; what comes out is checked like any
other plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from repcompiler.affine import Diagonal, Map, Meaning, Term, Vector, Window
from repcompiler.cost import Known, Sized
from repcompiler.facts import gather
from repcompiler.forms import respell
from repcompiler.inplace import write_in_place
from repcompiler.lower import Emitter, Target
from repcompiler.rewrite import Rewritten


@dataclass(frozen=True)
class Tuning:
    """How to choose where the nominal machine is not to be trusted.

    Attributes:
        costs: microseconds of an op, None where they are not known; without it the
            nominal machine decides which regions are merged.
        forms: from the name of a conv in the fused graph to a name of `forms.FORMS`.
        channels_last: whether 4-D weights lie channels last, which convs hand on to
            what they compute. Values are the same; the backward pass of torch 2.14 on a
            CPU is not to be relied on in this layout, so that it is for inference.
        in_place: whether activations and sums overwrite what nobody else reads.
        in_order: whether every value keeps the order of its channels, as certificates
            need; forms that change it are left out.
    """

    costs: Known | None = None
    forms: Mapping[str, str] = field(default_factory=dict[str, str])
    channels_last: bool = False
    in_place: bool = False
    in_order: bool = False


def apply(
    tuning: Tuning, rewritten: Rewritten, inputs: Sequence[object] | None
) -> Rewritten:
    """The rewritten graph in the chosen forms, layout and writes, changed itself.

    Args:
        inputs: of the model; without them no shape is known, and no sum is written to
            what it reads.
    """
    replaced = respell(rewritten.module, tuning.forms, in_order=tuning.in_order)
    if tuning.in_place:
        module = rewritten.module
        held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        facts = gather(module, inputs, held, frozenset(), frozenset())
        write_in_place(module, facts)
    if tuning.channels_last:
        rewritten.module.to(memory_format=torch.channels_last)
    if not replaced:
        return rewritten
    nodes: dict[Any, tuple[str, ...]] = {}
    added: dict[Any, tuple[str, ...]] = {}
    for value, names in rewritten.nodes.items():
        pairs = zip(names, rewritten.added[value])
        found = [(n, a, replaced.get(n)) for n, a in pairs]
        nodes[value] = tuple(
            x for n, _, new in found for x in ([m.name for m in new] if new else [n])
        )
        added[value] = tuple(
            x for _, a, new in found for x in (map(_called, new) if new else [a])
        )
    return replace(rewritten, nodes=nodes, added=added)


def _called(node: Any) -> str:
    if node.op == "call_module":
        return str(node.target)
    return f"{getattr(node.target, '__name__', node.target)}"


def alone(sized: Sized, dtype: torch.dtype) -> GraphModule:
    """An op by itself, written as `lower` would, with random numbers: to be timed.

    It takes one value of `sized.shape` (any number of samples), or two for `add`.
    """
    graph = Graph()
    value = graph.placeholder("value")
    attributes: dict[str, Any] = {}

    def hold(name: str, thing: nn.Module | torch.Tensor) -> str:
        attributes[f"part_{len(attributes)}"] = thing
        return f"part_{len(attributes) - 1}"

    if sized.op == "add":
        graph.output(graph.call_function(torch.add, (value, graph.placeholder("two"))))
        return GraphModule(attributes, graph)
    map, channels = _with_random(sized)
    bias = Vector(channels, lambda: torch.randn(channels))
    axis = map.axis
    meaning = Meaning((Term(value, map),), bias, axis, channels)
    emitter = Emitter(graph, lambda node: node, hold, Target(dtype, trainable=False))
    graph.output(emitter.emit(meaning, "op"))
    return GraphModule(attributes, graph)


def _with_random(sized: Sized) -> tuple[Map, int]:
    """The map with numbers that nobody had to compose, and its output channels."""
    op, rank = sized.op, len(sized.shape)
    if isinstance(op, (str, Diagonal)):
        axis = op.axis if isinstance(op, Diagonal) and op.axis else -max(rank - 1, 1)
        size = sized.shape[axis]
        return Diagonal(axis, size, Vector(size, lambda: torch.randn(size))), size
    if isinstance(op, Window):
        shape = (op.out_channels, op.in_channels // op.groups)
        taps = tuple(a.taps for a in op.axes)
    else:
        shape = (op.in_channels, op.out_channels // op.groups)
        taps = tuple(row[4] for row in op.geometry)
    kernel = lambda: torch.randn(*shape, *taps)  # noqa: E731 - a thunk, as maps have
    return replace(op, kernel=kernel), op.out_channels
