"""Activations that worked in place work in place again in the rewritten graph.

Capture makes writes functional (`mutation`), which costs the memory that they saved. An
op gets its write back where nobody can tell: what it overwrites was made by an op that
returns new memory and keeps no copy of it for the backward pass, and nobody else reads
it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from repcompiler.lift import is_hooked
from repcompiler.mutation import OVERWROTE
from repcompiler.partial import op_name

_FRESH_MODULES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)
_FRESH = frozenset("conv1d conv2d conv3d convolution linear add sub batch_norm".split())


def restore_writes(graph: Graph, modules: Mapping[str, Any]) -> None:
    """Make ops write to what they read, where they did before capture.

    Args:
        graph: of the model to be, in which `mutation` marked the ops.
        modules: what the graph's names stand for; of these a flag is changed.
    """
    calls: dict[str, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
        elif _may_write(node, modules):
            _write(node)
    for name, nodes in calls.items():
        if all(_may_write(node, modules) for node in nodes):
            modules[name].inplace = True


def _write(node: Node) -> None:
    record = node.meta[OVERWROTE]
    if record.before is record.after:
        node.kwargs = {**node.kwargs, "inplace": True}
    node.target = record.before


def _may_write(node: Node, modules: Mapping[str, Any]) -> bool:
    """Whether the op wrote before, and now nobody else sees what it would overwrite."""
    record = node.meta.get(OVERWROTE)
    source = node.args[0] if node.args else None
    if record is None or record.after is not node.target:
        return False
    operands = tree_leaves((node.args, node.kwargs))
    if not isinstance(source, Node) or sum(source is x for x in operands) != 1:
        return False
    return list(source.users) == [node] and _is_fresh(source, modules)


def _is_fresh(node: Node, modules: Mapping[str, Any]) -> bool:
    """Whether the op returns memory of its own, which no gradient needs again."""
    if node.op == "call_module":
        maker = modules[str(node.target)]
        return isinstance(maker, _FRESH_MODULES) and not is_hooked(maker)
    known = node.op == "call_function" and op_name(node) in _FRESH
    return known and "out" not in node.kwargs
