"""The order of a value's channels, where nobody outside can tell.

Channels may stand in any order if whoever makes or reads them has its numbers in that
order too: a conv that sums over all of them, a linear layer, a depthwise conv. What
lies between treats every channel alike. So an order can be chosen that a runtime
writes faster: the results of two depthwise convs side by side, not interleaved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repcompiler.hooks import is_hooked
from repcompiler.partial import op_name

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_POOLED = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_ALIKE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.ELU),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LeakyReLU, nn.Softplus),
    *(nn.Identity, nn.Dropout, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, *_POOLED),
)
_POOLING = frozenset(f"adaptive_avg_pool{rank}d" for rank in (1, 2, 3))
_ALIKE = _POOLING | frozenset(
    "relu relu_ relu6 gelu gelu_ silu silu_ mish sigmoid sigmoid_ tanh tanh_ elu elu_ "
    "hardswish hardswish_ hardsigmoid hardtanh leaky_relu softplus "
    "add add_ iadd sub mul mul_ imul truediv div neg abs exp sqrt square".split()
)


@dataclass
class Reordering:
    """What has to change with the order of a value's channels.

    Attributes:
        channels: how many there are.
        values: what has the new order, and how many axes each has behind its channels.
        rows, columns: layers whose outputs, whose inputs are put in that order.
    """

    channels: int
    values: dict[Node, int] = field(default_factory=dict[Node, int])
    rows: set[str] = field(default_factory=set[str])
    columns: set[str] = field(default_factory=set[str])


class _Seen(Exception):
    """The order would be seen by somebody who cannot be told."""


def reordering(start: Node, module: GraphModule) -> Reordering | None:
    """What changes with the order of the channels that a conv makes.

    None where an output would show it, or an op that is not known to treat every
    channel alike, or where a layer that has to change is used elsewhere too.
    """
    conv: Any = module.get_submodule(str(start.target))
    if not _is_own(str(start.target), conv, module):
        return None
    found = Reordering(conv.out_channels, {start: len(conv.kernel_size)})
    left = [start]
    try:
        while left:
            value = left.pop()
            for node, spatial in _around(value, start, module, found):
                if node not in found.values:
                    found.values[node] = spatial
                    left.append(node)
                elif found.values[node] != spatial:
                    return None
    except _Seen:
        return None
    return found


def reorder(module: GraphModule, change: Reordering, order: Tensor) -> None:
    """Put the numbers of layers in a new order: `order[j]` is the channel that is j-th.

    Layers keep their parameters' settings, and get tensors of their own.
    """
    for name in change.rows:
        layer = module.get_submodule(name)
        _index(layer, "weight", 0, order)
        _index(layer, "bias", 0, order)
    for name in change.columns:
        _index(module.get_submodule(name), "weight", 1, order)


def _index(layer: nn.Module, key: str, axis: int, order: Tensor) -> None:
    parameter = getattr(layer, key)
    if parameter is not None:
        chosen = parameter.detach().index_select(axis, order.to(parameter.device))
        setattr(layer, key, nn.Parameter(chosen, requires_grad=parameter.requires_grad))


# ---- who makes a value, and who reads it -------------------------------------------


def _around(
    value: Node, start: Node, module: GraphModule, found: Reordering
) -> Iterator[tuple[Node, int]]:
    """Values that have the order of this one, with the axes behind their channels."""
    if value is not start:
        yield from _made_of(value, module, found)
    for reader in value.users:
        yield from _goes_to(reader, value, module, found)


def _made_of(
    value: Node, module: GraphModule, found: Reordering
) -> Iterator[tuple[Node, int]]:
    spatial, layer = found.values[value], _layer(value, module)
    if _pool_rank(value, module) not in (None, spatial):
        raise _Seen  # its first window axis is the channels'
    if layer is None:
        before = len(_averaged(value)) or spatial
        if _flattens(value, module):
            before = found.values.get(value.all_input_nodes[0], 0)
        yield from ((source, before) for source in value.all_input_nodes)
        return
    if _outputs(layer) != found.channels or _positions(layer) != spatial:
        raise _Seen
    found.rows.add(str(value.target))
    if _is_depthwise(layer):
        yield value.all_input_nodes[0], spatial
    elif _groups(layer) != 1:
        raise _Seen


def _goes_to(
    reader: Node, value: Node, module: GraphModule, found: Reordering
) -> Iterator[tuple[Node, int]]:
    spatial, layer = found.values[value], _layer(reader, module)
    if _pool_rank(reader, module) not in (None, spatial):
        raise _Seen
    if layer is None:
        axes = _averaged(reader)
        behind = (set(range(-spatial, 0)), set(range(2, 2 + spatial)))
        if axes and axes not in behind:
            raise _Seen
        gone = (axes and not _keeps(reader)) or _flattens(reader, module)
        yield reader, 0 if gone else spatial
        return
    if _inputs(layer) != found.channels or _positions(layer) != spatial:
        raise _Seen
    if _is_depthwise(layer):
        found.rows.add(str(reader.target))
        yield reader, spatial
    elif _groups(layer) == 1:
        found.columns.add(str(reader.target))
    else:
        raise _Seen


def _layer(node: Node, module: GraphModule) -> Any:
    """The conv or linear layer that a node calls; None for what treats all alike."""
    if node.op in ("call_function", "call_method"):
        if op_name(node) in _ALIKE or _averaged(node) or _flattens(node, module):
            return None
        raise _Seen
    if node.op != "call_module":
        raise _Seen
    layer = module.get_submodule(str(node.target))
    alike = type(layer) in _ALIKE_MODULES or _flattens(node, module)
    if alike and not is_hooked(layer):
        return None
    if type(layer) not in _LAYERS or not _is_own(str(node.target), layer, module):
        raise _Seen
    return layer


def _averaged(node: Node) -> set[int]:
    """The axes that a mean is taken over; none for any other op."""
    if node.op == "call_module" or op_name(node) != "mean":
        return set()
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(axes, (tuple, list)):
        raise _Seen
    return {int(axis) for axis in axes}  # type: ignore[arg-type]


def _keeps(mean: Node) -> bool:
    keeps = mean.args[2] if len(mean.args) > 2 else mean.kwargs.get("keepdim", False)
    return bool(keeps)


def _flattens(node: Node, module: GraphModule) -> bool:
    """Whether all axes behind the channels go, each of which has one element."""
    if node.op == "call_module":
        layer: Any = module.get_submodule(str(node.target))
        if type(layer) is not nn.Flatten:
            return False
        axes = (layer.start_dim, layer.end_dim)
    elif op_name(node) == "flatten":
        given = dict(zip(("start_dim", "end_dim"), node.args[1:])) | node.kwargs
        axes = (given.get("start_dim", 0), given.get("end_dim", -1))
    else:
        return False
    source = node.all_input_nodes[0]
    return axes == (1, -1) and _is_pooled(source, module)


def _is_pooled(node: Node, module: GraphModule) -> bool:
    """Whether an op leaves one element of each axis behind the channels."""
    if node.op == "call_module":
        pool: Any = module.get_submodule(str(node.target))
        size = pool.output_size if isinstance(pool, _POOLED) else None
    elif op_name(node) in _POOLING:
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
    else:
        return bool(_averaged(node)) and _keeps(node)
    sizes: Any = size if isinstance(size, (tuple, list)) else (size,)
    return all(length == 1 for length in sizes)


def _pool_rank(node: Node, module: GraphModule) -> int | None:
    """How many axes a pool's windows have; None for any other op."""
    layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    name = op_name(node) if layer is None else type(layer).__name__
    found = re.search(r"pool(\d)d", name.lower())
    return int(found[1]) if found else None


def _is_own(name: str, layer: nn.Module, module: GraphModule) -> bool:
    """Whether one call is all that a layer and its parameters are there for."""
    calls = [n for n in module.graph.nodes if str(n.target) == name]
    read = any(
        n.op == "get_attr" and str(n.target).startswith(f"{name}.")
        for n in module.graph.nodes
    )
    own = {id(parameter) for parameter in layer.parameters()}
    named = module.named_parameters(remove_duplicate=False)
    holders = sum(id(parameter) in own for _, parameter in named)
    return len(calls) == 1 and not read and holders == len(own) and not is_hooked(layer)


def _positions(layer: Any) -> int:
    """How many axes lie behind the channels of what a layer reads and makes."""
    return len(getattr(layer, "kernel_size", ()))


def _groups(layer: Any) -> int:
    return getattr(layer, "groups", 1)


def _outputs(layer: Any) -> int:
    return layer.weight.shape[0]


def _inputs(layer: Any) -> int:
    return layer.weight.shape[1] * _groups(layer)


def _is_depthwise(layer: Any) -> bool:
    return _groups(layer) == _inputs(layer) == _outputs(layer) > 1
