"""Who owns what a model returns.

A caller may write to a result. Where the model makes it anew in every call, a constant
that stands for it must not be handed out, and a copy that the model took stays one.
"""

from __future__ import annotations

from collections.abc import Set

from torch.fx import GraphModule, Node

from repcompiler.aliases import aliased, numbers_among
from repcompiler.facts import op_name

# In the `meta` of a `clone`: that it is not the same as what it is given.
OWN = "own"


def own_results(module: GraphModule, made: Set[str]) -> None:
    """Mark the copies that a model returns, and copy constants that it returns.

    `made`: the names of tensors that stand for what the model computes in every call.
    """
    numbers = numbers_among(list(module.graph.nodes))
    output = next(node for node in module.graph.nodes if node.op == "output")
    seen, stack = {output}, [output]
    while stack:
        reader = stack.pop()
        for node in _handed_on(reader, module):
            if node in numbers:
                continue
            if _copies(node):
                node.meta[OWN] = True
            elif node.op == "get_attr" and str(node.target) in made:
                _copy_for(reader, node)
            elif node not in seen:
                seen.add(node)
                stack.append(node)


def _handed_on(node: Node, module: GraphModule) -> list[Node]:
    """The operands that a value is, holds, or is a view of."""
    holds = node.op == "output" or isinstance(node.target, type)
    return node.all_input_nodes if holds else aliased(node, module, {})


def _copies(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and op_name(node) == "clone"


def _copy_for(reader: Node, constant: Node) -> None:
    with constant.graph.inserting_before(reader):
        clone = constant.graph.call_method("clone", (constant,))
    clone.meta = {**constant.meta, OWN: True}
    reader.replace_input_with(constant, clone)
