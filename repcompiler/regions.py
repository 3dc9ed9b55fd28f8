"""Regions: the nodes that one rewrite replaces, their name, kind and two forms."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from repcompiler.affine import Meaning, Transposed, Window
from repcompiler.facts import Facts, fetch
from repcompiler.lift import NORMS, Affine, Lifted, op_label
from repcompiler.lower import Emitter, Target
from repcompiler.select import between, unread


@dataclass(frozen=True)
class Rewrite:
    """One value that will be computed from its chosen meaning.

    `nodes` is what computed it before, back to the sources, in topological order;
    `unread` what they read beside, of which nothing reaches the value.
    """

    value: Node
    meaning: Meaning
    nodes: tuple[Node, ...]
    name: str
    kind: str
    unread: tuple[Node, ...] = ()

    @property
    def sources(self) -> tuple[Node, ...]:
        """What the region reads."""
        return (*self.meaning.sources, *self.unread)


def rewrites(
    graph: Graph,
    chosen: Mapping[Node, Meaning],
    lifted: Mapping[Node, Lifted],
    facts: Facts,
) -> tuple[Rewrite, ...]:
    """The chosen values as regions, in topological order."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    found: list[Rewrite] = []
    for value in sorted(chosen, key=order.__getitem__):
        meaning = chosen[value]
        nodes = tuple(sorted(between(value, meaning, lifted), key=order.__getitem__))
        main = [node for node in nodes if _is_conv(node, lifted)]
        name = _name(nodes, main)
        kind = _kind(meaning, nodes, main, facts)
        idle = unread(nodes, meaning, lifted)
        found.append(Rewrite(value, meaning, nodes, name, kind, idle))
    return tuple(found)


def _is_conv(node: Node, lifted: Mapping[Node, Lifted]) -> bool:
    own = lifted[node]
    if not isinstance(own, Affine) or own.weightless:
        return False
    return any(isinstance(map, (Window, Transposed)) for _, map in own.parts)


def module_path(node: Node) -> str:
    """The dotted path of the module a node came from, '' for the root."""
    if node.op == "call_module":
        return str(node.target)
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.split("@")[0]


def _name(nodes: tuple[Node, ...], main: list[Node]) -> str:
    """The place of the one conv in it, else the deepest place that holds all of it."""
    if len(main) == 1 and module_path(main[0]):
        return module_path(main[0])
    paths = [path.split(".") for node in nodes if (path := module_path(node))]
    common: list[str] = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or "fused"


def _kind(
    meaning: Meaning, nodes: tuple[Node, ...], main: list[Node], facts: Facts
) -> str:
    """A name that a person knows, from what the region held."""
    ops = [op_label(node, facts) for node in nodes]
    norms = any(op in NORMS for op in ops)
    sums = ops.count("add") + ops.count("sub")
    maps = [term.map for term in meaning.terms]
    joined = sums > len(meaning.terms) - 1
    if len(main) > 1 and joined:
        if "sub" in ops and any(_depthwise(map) for map in maps):
            return "repmixer"
        return "multi_branch_conv"
    if joined and len(main) == 1:
        large = any(_depthwise(map) for map in maps)
        return "cpe" if large and not norms else "skip"
    if norms and main:
        linear = isinstance(maps[0], Window) and not maps[0].axes
        return "bn_linear" if linear else "conv_bn"
    if main and "mul" in ops:
        return "layer_scale"
    return "affine"


def _depthwise(map: object) -> bool:
    return isinstance(map, Window) and map.groups == map.in_channels > 1


# ---- the two forms of a region, on their own --------------------------------------


def original_form(rewrite: Rewrite, module: GraphModule, facts: Facts) -> GraphModule:
    """What the region computed before, in float64, as a function of its sources."""
    graph = Graph()
    env: dict[Node, Any] = {
        source: graph.placeholder(f"source_{index}")
        for index, source in enumerate(rewrite.sources)
    }
    attributes: dict[str, Any] = {}
    memo: dict[int, Any] = {}

    def resolve(node: Node) -> Any:
        if node not in env:
            env[node] = _outside(node, graph, module, facts, attributes)
        return env[node]

    for node in rewrite.nodes:
        env[node] = graph.node_copy(node, resolve)
        if node.op == "call_module":
            leaf = copy.deepcopy(module.get_submodule(str(node.target)), memo)
            attributes[str(node.target)] = leaf.double().cpu()
    graph.output(env[rewrite.value])
    return GraphModule(assemble(attributes), graph)


def _outside(
    node: Node,
    graph: Graph,
    module: GraphModule,
    facts: Facts,
    attributes: dict[str, Any],
) -> Any:
    """The counterpart of an argument from outside: a constant, or a known size."""
    if node.op == "get_attr":
        name = str(node.target)
        value = facts.exact.get(name)
        value = fetch(module, name) if value is None else value
        if isinstance(value, Tensor):
            floating = value.is_floating_point() and name not in facts.baked
            value = value.detach().cpu().to(torch.float64 if floating else value.dtype)
        attributes[name] = value
        return graph.get_attr(name)
    return facts.values[node]


def fused_form(rewrite: Rewrite, module: GraphModule, facts: Facts) -> GraphModule:
    """What replaces the region, in float64, as a function of its sources."""
    graph = Graph()
    env: dict[Node, Any] = {
        source: graph.placeholder(f"source_{index}")
        for index, source in enumerate(rewrite.sources)
    }
    attributes: dict[str, Any] = {}

    def hold(name: str, thing: nn.Module | Tensor) -> str:
        unique = f"part_{len(attributes)}"
        attributes[unique] = thing
        return unique

    def value_of(node: Node) -> Any:
        return env[node] if node in env else facts.values[node]

    emitter = Emitter(graph, value_of, hold, Target(trainable=False))
    graph.output(emitter.emit(rewrite.meaning, rewrite.name))
    for node in graph.nodes:  # a pool or a resize that the meaning runs through
        if node.op == "call_module" and str(node.target) not in attributes:
            leaf = module.get_submodule(str(node.target))
            attributes[str(node.target)] = copy.deepcopy(leaf).double().cpu()
    return GraphModule(attributes, graph)


def assemble(attributes: Mapping[str, Any]) -> nn.Module:
    """A module with these attributes at these dotted paths.

    A parameter may be read beside the module that owns it; then it is there already.
    """
    root = nn.Module()
    for name in sorted(attributes, key=lambda name: name.count(".")):
        *path, field = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                setattr(place, part, nn.Module())
            place = getattr(place, part)
        if isinstance(place, nn.Module) and not hasattr(place, field):
            _attach(place, field, attributes[name])
    return root


def _attach(place: nn.Module, field: str, value: Any) -> None:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        place.register_buffer(field, value)
    else:
        setattr(place, field, value)
