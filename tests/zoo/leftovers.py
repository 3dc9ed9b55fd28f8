"""What a fused graph still holds that a neighbour might have taken in.

Read from the graph alone, with torch alone: nothing here knows the compiler, so that
what the compiler overlooks is not overlooked here for the same cause. An entry is

* a batch norm or per-channel multiply whose only producer is a conv or linear that
  nothing else reads;
* a batch norm all of whose readers are convs without padding, or linear layers;
* a conv or linear fed by an unpadded one that nothing else reads, where one op for both
  would take no more multiplications;

unless the report's `kept` gives a reason for the op.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

aten: Any = torch.ops.aten
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORM_CALLS = {F.batch_norm, torch.batch_norm, aten.batch_norm.default}
CONV_CALLS = {F.conv1d, F.conv2d, F.conv3d} | {
    getattr(getattr(aten, f"conv{rank}d"), overload)
    for rank in (1, 2, 3)
    for overload in ("default", "padding")
}
LINEAR_CALLS = {F.linear, aten.linear.default}
MULTIPLIES = {operator.mul, torch.mul, aten.mul.Tensor, "mul", operator.truediv}
MULTIPLIES |= {torch.div, aten.div.Tensor, "div"}
# The same value; a reader of it reads what stands before it.
SAME = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Conv:
    """A conv, or a linear layer (no taps), as far as its shape goes."""

    inputs: int
    outputs: int
    groups: int
    taps: tuple[int, ...]
    stride: tuple[int, ...]
    padded: bool

    @property
    def axis(self) -> int:
        """Where its channels are, from the end."""
        return -(len(self.taps) + 1)

    @property
    def weights(self) -> int:
        """Multiplications per output position."""
        return self.outputs * (self.inputs // self.groups) * prod(self.taps)


def leftovers(model: nn.Module, kept: Iterable[Any] = ()) -> list[str]:
    """One line for each op that stayed without a reason.

    Args:
        model: a fused model; where it is no graph, its children that are.
        kept: the report's entries, as objects or as dicts, with `name` and `op`.
    """
    reasons = {_entry(item) for item in kept}
    found: list[str] = []
    for prefix, graph in _graphs(model):
        for node in graph.graph.nodes:
            for kind, why in _complaints(node, graph):
                if not _explained(node, prefix, kind, reasons):
                    found.append(f"{prefix}{_names(node)[0]}: {kind} {why}")
    return found


def _entry(item: Any) -> tuple[str, str]:
    if isinstance(item, dict):
        return item["name"], item["op"]
    return item.name, item.op


def _graphs(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(model, fx.GraphModule):
        yield prefix, model
        return
    for name, child in model.named_children():
        yield from _graphs(child, f"{prefix}{name}.")


def _names(node: fx.Node) -> list[str]:
    """The names that a report may call the node by."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(row[0]).split("@")[0] for row in list(stack.values())[-1:]]
    own = [str(node.target)] if node.op == "call_module" else []
    return [name for name in (*own, *paths, node.name) if name]


def _explained(
    node: fx.Node, prefix: str, kind: str, reasons: set[tuple[str, str]]
) -> bool:
    names = {form for name in _names(node) for form in (name, prefix + name)}
    kinds = {"multiply": ("mul", "div"), "norm": ("batch_norm",)}.get(kind, (kind,))
    return any(name in names and op.startswith(kinds) for name, op in reasons)


def _complaints(node: fx.Node, graph: fx.GraphModule) -> Iterator[tuple[str, str]]:
    if is_norm(node, graph):
        made_by = _sole_producer(node, graph)
        if made_by is not None and made_by.axis in (None, _norm_axis(made_by)):
            yield "norm", "after a conv or linear that nothing else reads"
        elif _all_readers_take(node, graph):
            yield "norm", "read by unpadded convs and linear layers alone"
    elif _is_multiply(node, graph):
        made_by = _sole_producer(node, graph)
        if made_by is not None and _wide_axis(node, graph) in (None, made_by.axis):
            yield "multiply", "after a conv or linear that nothing else reads"
    second = shape_of(node, graph)
    first = None if second is None else _sole_producer(node, graph)
    if second is not None and first is not None and not first.padded:
        if first.axis == second.axis and _cheap(second, first):
            yield "linear" if not second.taps else "conv", "after an unpadded one"


def _cheap(second: Conv, first: Conv) -> bool:
    """Whether one op for both takes no more multiplications than the two."""
    taps = [a + s * (b - 1) for a, b, s in zip(first.taps, second.taps, first.stride)]
    inner = first.inputs // gcd(first.groups, second.groups)
    merged = second.outputs * inner * prod(taps)
    return merged <= second.weights + first.weights * prod(second.stride)


# ---- what a node is ----------------------------------------------------------------


def _argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    if len(node.args) > place:
        return node.args[place]
    return node.kwargs.get(name, default)


def _module(node: fx.Node, graph: fx.GraphModule) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _tensor(value: Any, graph: fx.GraphModule) -> Tensor | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found: Any = graph
    for part in str(value.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, Tensor) else None


def is_norm(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether the node is a batch norm with stored statistics."""
    module = _module(node, graph)
    if module is not None:
        return isinstance(module, NORMS) and module.running_mean is not None
    statistics = _argument(node, 1, "running_mean")
    return node.target in NORM_CALLS and isinstance(statistics, fx.Node)


def _is_multiply(node: fx.Node, graph: fx.GraphModule) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target not in MULTIPLIES or len(node.args) != 2:
        return False
    constants = [not isinstance(arg, fx.Node) for arg in node.args]
    constants = [
        plain or _tensor(arg, graph) is not None
        for plain, arg in zip(constants, node.args)
    ]
    return sum(constants) == 1 and _wide_axis(node, graph) != 0


def _wide_axis(node: fx.Node, graph: fx.GraphModule) -> int | None:
    """The one axis of the constant that is not of size 1; 0 where there are more."""
    tensor = next((t for a in node.args if (t := _tensor(a, graph)) is not None), None)
    if tensor is None:
        return None
    wide = [axis - tensor.dim() for axis, n in enumerate(tensor.shape) if n != 1]
    return None if not wide else wide[0] if len(wide) == 1 else 0


def _norm_axis(made_by: Conv) -> int | None:
    """A norm acts on axis 1; after a linear that is the last one in rank 2 alone."""
    return made_by.axis if made_by.taps else None


def shape_of(node: fx.Node, graph: fx.GraphModule) -> Conv | None:
    """The node as a conv or linear layer with constant weights, or None."""
    module = _module(node, graph)
    if isinstance(module, nn.Linear):
        return Conv(module.in_features, module.out_features, 1, (), (), False)
    if isinstance(module, CONVS):
        padded = module.padding != "valid" and any(module.padding)
        rows = module.in_channels, module.out_channels, module.groups
        return Conv(
            *rows,
            _reach(module.kernel_size, module.dilation),
            tuple(module.stride),
            padded,
        )
    weight = _tensor(_argument(node, 1, "weight"), graph)
    if weight is None or weight.dim() < 2 or node.op != "call_function":
        return None  # a linear layer of a vector is a dot product
    if node.target in LINEAR_CALLS:
        return Conv(weight.shape[1], weight.shape[0], 1, (), (), False)
    if node.target not in CONV_CALLS:
        return None
    spatial = weight.dim() - 2
    stride, padding, dilation = (
        _argument(node, place, name, default)
        for place, name, default in (
            (3, "stride", 1),
            (4, "padding", 0),
            (5, "dilation", 1),
        )
    )
    groups = _argument(node, 6, "groups", 1)
    padded = padding != "valid" and (padding == "same" or any(_each(padding, spatial)))
    taps = _reach(weight.shape[2:], _each(dilation, spatial))
    rows = weight.shape[1] * groups, weight.shape[0], groups
    return Conv(*rows, taps, _each(stride, spatial), padded)


def _each(value: Any, spatial: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * spatial if len(values) == 1 else values


def _reach(taps: Iterable[int], dilation: Iterable[int]) -> tuple[int, ...]:
    """Taps as the kernel of a conv without dilation."""
    return tuple(d * (k - 1) + 1 for k, d in zip(taps, dilation))


# ---- who reads what ----------------------------------------------------------------


def _sole_producer(node: fx.Node, graph: fx.GraphModule) -> Conv | None:
    """The conv or linear whose value this node alone reads, through no-ops."""
    value = next((n for n in node.all_input_nodes if n.op != "get_attr"), None)
    while value is not None and len(value.users) == 1:
        if isinstance(_module(value, graph), SAME):
            value = value.all_input_nodes[0]
            continue
        return shape_of(value, graph)
    return None


def _all_readers_take(node: fx.Node, graph: fx.GraphModule) -> bool:
    readers = [shape_of(user, graph) for user in node.users]
    return bool(readers) and all(r is not None and not r.padded for r in readers)
