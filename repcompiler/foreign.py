"""Which arguments a function of somebody else's writes to.

A call that `fx.wrap` keeps whole may change its arguments in place, and no graph shows
it. With example inputs the graph is run once and each tensor's version counter tells;
without any, such a call is taken to write to all that it is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from repcompiler.aliases import is_foreign
from repcompiler.mutation import OVERWRITES
from repcompiler.operators import RULES
from repcompiler.trees import copied


def mark_foreign_writes(module: GraphModule, inputs: tuple[Any, ...] | None) -> None:
    """Note on each foreign call which of its operands it writes to."""
    calls = [node for node in module.graph.nodes if is_foreign(node)]
    calls = [node for node in calls if _path(node) not in RULES]
    if not calls:
        return
    for node in calls:
        node.meta[OVERWRITES] = node.all_input_nodes
    if inputs is None:
        return
    watch = _Watch(module)
    try:
        with torch.no_grad():
            watch.run(*copied(inputs))
    except Exception:  # then nothing is known of them
        return
    for node in calls:
        node.meta[OVERWRITES] = watch.written.get(node, [])


def _path(node: Node) -> str:
    target: Any = node.target
    return f"{target.__module__}.{getattr(target, '__name__', '')}"


class _Watch(fx.Interpreter):
    """Runs a graph and sees which operands of a foreign call change."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.written: dict[Node, list[Node]] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node; compare the versions of what it reads around a foreign call."""
        if not is_foreign(n):
            return super().run_node(n)
        before = {source: self._versions(source) for source in n.all_input_nodes}
        result = super().run_node(n)
        self.written[n] = [s for s, seen in before.items() if self._versions(s) != seen]
        return result

    def _versions(self, node: Node) -> list[int]:
        leaves = pytree.tree_leaves(self.env.get(node))
        return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
