"""Activations and sums that write to what they read, where nobody can tell.

What an op overwrites has to be made by an op that returns new memory and keeps no copy
of it for the backward pass, and nobody else may read it. Capture makes writes
functional (`mutation`), which costs the memory that they saved: `restore_writes` gives
them back. `write_in_place` puts writes where there were none, too. That is for tuned
plans only, because a hook that keeps the output of a conv sees it change.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from repcompiler.facts import Facts
from repcompiler.hooks import is_hooked
from repcompiler.mutation import OVERWROTE
from repcompiler.partial import op_name

_FRESH_MODULES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)
_FRESH = frozenset("conv1d conv2d conv3d convolution linear add sub batch_norm".split())
_ATEN = torch.ops.aten
# What computes the same in place. GELU has no flag in torch, but an op in ATen.
_WRITING: Mapping[Any, Any] = {
    torch.relu: torch.relu_,
    F.gelu: _ATEN.gelu_.default,
    _ATEN.relu.default: _ATEN.relu_.default,
    _ATEN.gelu.default: _ATEN.gelu_.default,
    _ATEN.silu.default: _ATEN.silu_.default,
    _ATEN.hardswish.default: _ATEN.hardswish_.default,
}
_FLAGGED = (F.relu, F.relu6, F.silu, F.hardswish, F.leaky_relu, F.elu, F.mish)
_FLAGGED_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Mish),
)
_ADDING: Mapping[Any, Any] = {
    operator.add: operator.iadd,
    torch.add: operator.iadd,
    _ATEN.add.Tensor: _ATEN.add_.Tensor,
}


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
    return isinstance(source, Node) and _is_private(source, node, modules)


def _is_private(source: Node, node: Node, modules: Mapping[str, Any]) -> bool:
    """Whether only `node` reads `source`, once, and its memory is nobody else's."""
    operands = tree_leaves((node.args, node.kwargs))
    if sum(source is x for x in operands) != 1:
        return False
    return list(source.users) == [node] and _is_fresh(source, modules)


# ---- new writes --------------------------------------------------------------------


def write_in_place(module: GraphModule, facts: Facts) -> int:
    """Let activations and sums overwrite what nobody else reads, in place.

    Args:
        module: a rewritten graph; of its modules flags are changed.
        facts: of this graph, for which a sum has to have the shape and dtype of what it
            overwrites at every size that was tried.

    Returns:
        How many ops write now that did not.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    calls: dict[str, list[Node]] = defaultdict(list)
    count = 0
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            calls[str(node.target)].append(node)
        elif node.op == "call_function":
            count += _activate(node, modules) or _accumulate(node, modules, facts)
    for name, nodes in calls.items():
        if all(_reads_private(node, modules) for node in nodes):
            count += _activate_module(modules[name], nodes)
    if count:
        module.graph.lint()
        module.recompile()
    return count


def _reads_private(node: Node, modules: Mapping[str, Any]) -> bool:
    source = node.args[0] if node.args else None
    return isinstance(source, Node) and _is_private(source, node, modules)


def _activate(node: Node, modules: Mapping[str, Any]) -> bool:
    """Turn a call of an activation into one that writes, if that may be."""
    flagged = node.target in _FLAGGED and len(node.args) == 1
    if not (flagged or node.target in _WRITING) or not _reads_private(node, modules):
        return False
    if not flagged:
        node.target = _WRITING[node.target]
    elif node.kwargs.get("inplace"):
        return False
    else:
        node.kwargs = {**node.kwargs, "inplace": True}
    return True


def _activate_module(leaf: Any, nodes: list[Node]) -> int:
    """The same for all calls of one module; returns their number."""
    if is_hooked(leaf) or getattr(leaf, "inplace", False):
        return 0
    if type(leaf) in _FLAGGED_MODULES:
        leaf.inplace = True
        return len(nodes)
    if type(leaf) is not nn.GELU:
        return 0
    for node in nodes:
        node.op, node.target = "call_function", _ATEN.gelu_.default
        node.kwargs = {"approximate": leaf.approximate}
    return len(nodes)


def _accumulate(node: Node, modules: Mapping[str, Any], facts: Facts) -> bool:
    """Turn a sum into one that is added to an operand, if that may be."""
    if node.target not in _ADDING or len(node.args) != 2 or node.kwargs:
        return False
    first, second = node.args
    for target, other in ((first, second), (second, first)):
        if not isinstance(target, Node) or not isinstance(other, Node):
            return False
        if _is_private(target, node, modules) and _is_as(target, node, facts):
            node.args, node.target = (target, other), _ADDING[node.target]
            return True
    return False


def _is_as(target: Node, result: Node, facts: Facts) -> bool:
    """Whether a value has the shape and dtype of the sum that it is an operand of."""

    def form(node: Node, known: Facts) -> Any:
        shape = known.shape(node)
        return None if shape is None else (shape, known.dtype(node))

    return all(
        form(target, known) is not None and form(target, known) == form(result, known)
        for known in (facts, *facts.elsewhere)
    )


def _is_fresh(node: Node, modules: Mapping[str, Any]) -> bool:
    """Whether the op returns memory of its own, which no gradient needs again."""
    if node.op == "call_module":
        maker = modules[str(node.target)]
        return isinstance(maker, _FRESH_MODULES) and not is_hooked(maker)
    known = node.op == "call_function" and op_name(node) in _FRESH
    return known and "out" not in node.kwargs
