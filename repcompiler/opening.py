"""Norms opened: the scale and shift of a LayerNorm are a map behind it.

    layer_norm(x, γ, β) = γ · layer_norm(x) + β

The norm itself is no affine map, but what it multiplies and adds is, and the linear
layers that read it take that in. A norm is opened only where every reader is such a
layer; where one did not take it in after all, `closed` puts the norm back as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

from repcompiler.facts import op_name, parameters_of
from repcompiler.hooks import is_hooked


@dataclass(frozen=True)
class Opened:
    """A norm that was opened: what it was, and the nodes that stand for it now."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    nodes: tuple[Node, ...]


def open_norms(module: GraphModule, mutated: Set[Node]) -> dict[Node, Opened]:
    """Open every LayerNorm that linear layers alone read, in place; value → norm."""
    found: dict[Node, Opened] = {}
    for node in list(module.graph.nodes):
        parts = None if node in mutated else _parts(node, module)
        if parts is not None and all(_takes_scale(u, node, module) for u in node.users):
            value, opened = _open(node, module.graph, *parts)
            found[value] = opened
    return found


def _parts(node: Node, module: GraphModule) -> tuple[Any, Any, Any, float] | None:
    """(normalised shape, weight, bias, eps) of a LayerNorm over one axis."""
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        if type(leaf) is not nn.LayerNorm or is_hooked(leaf):
            return None
        names = [f"{node.target}.{name}" for name in ("weight", "bias")]
        held = [n for n in names if getattr(leaf, n.rpartition(".")[2]) is not None]
        weight, bias = (name if name in held else None for name in names)
        parts = (leaf.normalized_shape, weight, bias, leaf.eps)
    elif node.op == "call_function" and op_name(node) == "layer_norm":
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        given = dict(zip(names, node.args)) | dict(node.kwargs)
        shape, weight, bias = (given.get(name) for name in names[1:4])
        parts = (shape, weight, bias, given.get("eps", 1e-5))
    else:
        return None
    shape, weight, bias, eps = parts
    if not isinstance(eps, float):
        return None
    constants = [p for p in (weight, bias) if p is not None]
    if not constants or not isinstance(shape, (tuple, list)) or len(shape) != 1:
        return None
    if any(isinstance(c, Node) and c.op != "get_attr" for c in constants):
        return None
    return tuple(shape), weight, bias, eps


def _takes_scale(user: Node, value: Node, module: GraphModule) -> bool:
    """Whether the reader is a linear layer on the value's last axis, of one dtype.

    A norm computes in its input's dtype, whatever that of its parameters; by hand, the
    result would be in the wider of the two.
    """
    if len({t.dtype for n in (value, user) for t in parameters_of(n, module)}) != 1:
        return False
    if user.args[:1] != (value,) or user.all_input_nodes.count(value) != 1:
        return False
    if user.op == "call_module":
        leaf = module.get_submodule(str(user.target))
        return type(leaf) is nn.Linear and not is_hooked(leaf)
    if user.op != "call_function" or op_name(user) != "linear":
        return False
    rest = [arg for arg in user.all_input_nodes if arg is not value]
    return all(arg.op == "get_attr" for arg in rest)


def _open(
    node: Node, graph: Graph, shape: Any, weight: Any, bias: Any, eps: float
) -> tuple[Node, Opened]:
    def constant(part: Any) -> Node:
        return part if isinstance(part, Node) else graph.get_attr(str(part))

    with graph.inserting_before(node):
        core = graph.call_function(F.layer_norm, (node.args[0], shape), {"eps": eps})
        nodes = [core]
        if weight is not None:
            nodes.append(graph.call_function(torch.mul, (core, constant(weight))))
        if bias is not None:
            nodes.append(graph.call_function(torch.add, (nodes[-1], constant(bias))))
    for made in nodes:
        made.meta = {k: v for k, v in node.meta.items() if k != "val"}
    opened = Opened(node.op, node.target, node.args, dict(node.kwargs), tuple(nodes))
    node.replace_all_uses_with(nodes[-1])
    graph.erase_node(node)
    return nodes[-1], opened


def close_norms(
    graph: Graph, opened: Mapping[Node, Opened], twins: Mapping[Node, Node]
) -> None:
    """Put back the norms whose scale or shift is still computed in `graph`.

    `twins`: from nodes of the captured graph to what computes their value here.
    """
    alive = set(graph.nodes)
    for value, norm in opened.items():
        twin = twins[value]
        if twin not in alive:
            continue
        args, kwargs = torch.fx.map_arg(
            (norm.args, dict(norm.kwargs)), lambda n: twins[n]
        )
        with graph.inserting_before(twin):
            closed = graph.create_node(norm.op, norm.target, args, kwargs)
        closed.meta = dict(twin.meta)
        twin.replace_all_uses_with(closed)
