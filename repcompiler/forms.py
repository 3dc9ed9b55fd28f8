"""Other forms of one conv: more ops that compute the same, for runtimes that are slow.

A fused graph has the fewest ops, and a runtime may have a slow kernel for one of them:
torch's CPU kernel takes several times as long for a depthwise conv with k outputs per
channel as for k depthwise convs. `FORMS` is the table of what else such a conv can be;
`respell` writes the forms that somebody has chosen (a `Tuning`) into a graph. Kernels
are cut and put in order, never computed with, so that every number is the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from repcompiler.hooks import is_hooked
from repcompiler.reorder import reorder, reordering

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Form:
    """One way to write a conv.

    Attributes:
        sentence: what it is, for people.
        fits: whether a conv can be written so.
        parts: the convs that take its place, with its numbers.
        emit: from (graph, the conv, one call of each part as a function of its input,
            the input) to the node of the result.
        order: where the result has its channels in another order, the channel that is
            j-th in it, for each j. Only for convs of which nobody sees the order.
    """

    sentence: str
    fits: Callable[[Conv], bool]
    parts: Callable[[Conv], list[Conv]]
    emit: Callable[[Writer, Conv, Node], Node]
    order: Callable[[Conv], torch.Tensor] | None = None


@dataclass(frozen=True)
class Writer:
    """Emits calls into a graph: of functions, and of the parts of one conv."""

    graph: Graph
    names: tuple[str, ...]
    added: list[Node]

    def call(self, function: Callable[..., Any], *args: Any) -> Node:
        """A function's result."""
        return self._kept(self.graph.call_function(function, args))

    def part(self, index: int, value: Node) -> Node:
        """One of the convs on a value."""
        return self._kept(self.graph.call_module(self.names[index], (value,)))

    def _kept(self, node: Node) -> Node:
        self.added.append(node)
        return node


# ---- depthwise, k outputs for each channel ------------------------------------------


def _multiplies(conv: Conv) -> bool:
    return conv.groups == conv.in_channels > 1 and conv.out_channels > conv.in_channels


def _per_output(conv: Conv) -> list[Conv]:
    """k depthwise convs: output c·k + i of the one is output c of the i-th."""
    times = conv.out_channels // conv.in_channels
    return [_with_rows(conv, slice(i, None, times)) for i in range(times)]


def _emit_stacked(to: Writer, conv: Conv, value: Node) -> Node:
    rank = len(conv.kernel_size)
    values = [to.part(index, value) for index in range(len(to.names))]
    stacked = to.call(torch.stack, values, -(rank + 1))
    return to.call(torch.flatten, stacked, -(rank + 2), -(rank + 1))


def _emit_stacked_last(to: Writer, conv: Conv, value: Node) -> Node:
    # Not by movedim: torch's older ONNX exporter (2.14.1) writes negative axes into a
    # Transpose, which takes none, and the number of axes in front is not known here.
    pairs = [(axis, axis + 1) for axis in range(-(len(conv.kernel_size) + 1), -1)]

    def swap(moved: Node, swaps: Iterable[tuple[int, int]]) -> Node:
        for pair in swaps:
            moved = to.call(torch.transpose, moved, *pair)
        return moved

    calls = (to.part(index, value) for index in range(len(to.names)))
    stacked = to.call(torch.stack, [swap(call, pairs) for call in calls], -1)
    return swap(to.call(torch.flatten, stacked, -2), reversed(pairs))


def _emit_concatenated(to: Writer, conv: Conv, value: Node) -> Node:
    values = [to.part(index, value) for index in range(len(to.names))]
    return to.call(torch.cat, values, -(len(conv.kernel_size) + 1))


def _by_output(conv: Conv) -> torch.Tensor:
    """First the channels' first outputs, then their second ones, and so on."""
    times = conv.out_channels // conv.in_channels
    return torch.arange(conv.out_channels).reshape(-1, times).t().flatten()


def _widened(conv: Conv) -> list[Conv]:
    """A depthwise conv with one output per channel of an input repeated k times."""
    return [_like(conv, conv.weight, conv.bias, groups=conv.out_channels)]


def _emit_repeated(to: Writer, conv: Conv, value: Node) -> Node:
    times = conv.out_channels // conv.in_channels
    axis = -(len(conv.kernel_size) + 1)
    return to.part(0, to.call(torch.repeat_interleave, value, times, axis))


# ---- pointwise with a stride --------------------------------------------------------


def _skips(conv: Conv) -> bool:
    plain = all(size == 1 for size in conv.kernel_size)
    unpadded = all(width == 0 for width in conv.padding)
    return plain and unpadded and any(step > 1 for step in conv.stride)


def _unstrided(conv: Conv) -> list[Conv]:
    ones = (1,) * len(conv.stride)
    return [_like(conv, conv.weight, conv.bias, groups=conv.groups, stride=ones)]


def _emit_sliced(to: Writer, conv: Conv, value: Node) -> Node:
    steps = (slice(None, None, step) for step in conv.stride)
    return to.part(0, to.call(operator.getitem, value, (Ellipsis, *steps)))


FORMS: dict[str, Form] = {
    "stacked": Form(
        "one depthwise conv for each output of a channel, stacked",
        _multiplies,
        _per_output,
        _emit_stacked,
    ),
    "stacked_last": Form(
        "the same, stacked behind the last axis, which keeps channels last",
        _multiplies,
        _per_output,
        _emit_stacked_last,
    ),
    "concatenated": Form(
        "one depthwise conv for each output of a channel, side by side",
        _multiplies,
        _per_output,
        _emit_concatenated,
        _by_output,
    ),
    "repeated": Form(
        "a depthwise conv of the channels repeated",
        _multiplies,
        _widened,
        _emit_repeated,
    ),
    "sliced": Form(
        "the positions that a strided pointwise conv reads, then the conv",
        _skips,
        _unstrided,
        _emit_sliced,
    ),
}


# ---- choosing and writing -----------------------------------------------------------


def alternatives(
    module: GraphModule, *, in_order: bool = False
) -> dict[str, tuple[str, ...]]:
    """For each conv of a graph that can be written otherwise, the names of the ways.

    With `in_order`, without those that change the order of channels.
    """
    found: dict[str, tuple[str, ...]] = {}
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for node in module.graph.nodes:
        conv = _plain_conv(node, module)
        if conv is None or any(r.startswith(f"{node.target}.") for r in read):
            continue
        fitting = [name for name, form in FORMS.items() if form.fits(conv)]
        ordering = any(map(_orders, fitting))
        if ordering and (in_order or reordering(node, module) is None):
            fitting = [name for name in fitting if not _orders(name)]
        if fitting:
            found[str(node.target)] = tuple(fitting)
    return found


def respell(
    module: GraphModule, forms: Mapping[str, str], *, in_order: bool = False
) -> dict[str, tuple[Node, ...]]:
    """Write convs of a graph in other forms, in place.

    Args:
        module: what `rewrite` built.
        forms: name of a conv → a name of `FORMS`; a conv that is not there, or that
            has no such form, stays as it is.
        in_order: whether every value keeps the order of its channels.

    Returns:
        For each node replaced, by name, the nodes in its place; the last has its value.
    """
    if not forms:  # the default plan, which need not know what could be
        return {}
    possible = alternatives(module, in_order=in_order)
    replaced: dict[str, tuple[Node, ...]] = {}
    # Those that change other layers come first, before these are written otherwise.
    for name, form in sorted(forms.items(), key=lambda item: not _orders(item[1])):
        if form not in possible.get(name, ()):
            continue
        conv: Any = module.get_submodule(name)
        calls = [n for n in module.graph.nodes if str(n.target) == name]
        if (order := FORMS[form].order) is not None:
            change = reordering(calls[0], module)
            if change is None:  # another form was in the way
                continue
            reorder(module, change, order(conv))
        replaced |= _write(module, name, FORMS[form])
    if replaced:
        module.graph.lint()
        module.recompile()
    return replaced


def _write(module: GraphModule, name: str, form: Form) -> dict[str, tuple[Node, ...]]:
    """Put a form in the place of every call of a conv."""
    conv: Any = module.get_submodule(name)
    calls = [n for n in module.graph.nodes if str(n.target) == name]
    parts = form.parts(conv)
    module.set_submodule(name, nn.ModuleList(parts))
    names = tuple(f"{name}.{index}" for index in range(len(parts)))
    return {call.name: _replace(call, conv, names, form) for call in calls}


def _orders(form: str) -> bool:
    return form in FORMS and FORMS[form].order is not None


def _replace(
    node: Node, conv: Conv, names: tuple[str, ...], form: Form
) -> tuple[Node, ...]:
    graph = node.graph
    with graph.inserting_before(node):
        writer = Writer(graph, names, [])
        value = form.emit(writer, conv, node.all_input_nodes[0])
    for added in writer.added:
        added.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    node.replace_all_uses_with(value)
    graph.erase_node(node)
    return tuple(writer.added)


def _plain_conv(node: Node, module: GraphModule) -> Conv | None:
    """The conv that a node calls, with nothing around it that a copy would lose."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    conv = module.get_submodule(str(node.target))
    known = type(conv) in CONVS and not is_hooked(conv)
    return conv if known and isinstance(conv.padding, tuple) else None  # type: ignore[return-value]


def _with_rows(conv: Conv, rows: slice) -> Conv:
    bias = None if conv.bias is None else conv.bias[rows]
    return _like(conv, conv.weight[rows], bias, groups=conv.in_channels)


def _like(
    conv: Conv,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    groups: int,
    stride: tuple[int, ...] | None = None,
) -> Conv:
    """A conv of the same geometry with other numbers."""
    made: Any = type(conv)(
        weight.shape[1] * groups,
        weight.shape[0],
        conv.kernel_size,  # type: ignore[arg-type]
        stride=stride or conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=False,
        padding_mode=conv.padding_mode,
        device="meta",
    )
    trained = conv.weight.requires_grad
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained)
    return made.eval()


def alone(conv: Conv, form: str) -> GraphModule:
    """A conv by itself, in a form of `FORMS` or, under any other name, as it is.

    A form that has an order of channels keeps it: nobody is there to take it back.
    """
    graph = Graph()
    value = graph.placeholder("value")
    graph.output(graph.call_module("conv", (value,)))
    module = GraphModule({"conv": conv}, graph)
    if form in FORMS and FORMS[form].fits(conv):
        _write(module, "conv", FORMS[form])
        module.recompile()
    return module
