"""Who owns what a model returns.

A caller may write to a result. Where the model makes it anew in every call, a constant
that stands for it must not be handed out, and a copy that the model took stays one.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from repcompiler.facts import op_name
from repcompiler.mutation import aliased


def own_results(module: GraphModule, made: Set[str]) -> frozenset[int]:
    """Places among the results of what is new memory in every call of the model.

    `made`: the names of tensors that stand for what the model computes. What an op
    gives is new anyway, unless the op goes: a `clone` does.
    """
    return frozenset(
        place
        for place, result in _results(module)
        if any(
            str(node.target) in made if node.op == "get_attr" else _copies(node)
            for node in _behind(result, module)
        )
    )


def copy_results(module: GraphModule, places: Set[int]) -> None:
    """Return copies at these places, where memory might be shared, in place."""
    results = dict(_results(module))
    shared = {place: _behind(result, module) for place, result in results.items()}
    changed = False
    for place in places & set(results):
        lasting = any(node.op in ("get_attr", "placeholder") for node in shared[place])
        twice = any(shared[place] & shared[other] for other in shared if other != place)
        if lasting or twice:
            _copy(module, place)
            changed = True
    if changed:
        module.recompile()


def _results(module: GraphModule) -> Iterator[tuple[int, Node]]:
    output = next(node for node in module.graph.nodes if node.op == "output")
    for place, leaf in enumerate(pytree.tree_leaves(output.args)):
        if isinstance(leaf, Node):
            yield place, leaf


def _behind(node: Node, module: GraphModule) -> set[Node]:
    """A value and all that it may be, or be a view or a copy of."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        near = current.all_input_nodes if _copies(current) else []
        fresh = [n for n in (*near, *aliased(current, module, {})) if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return seen


def _copies(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and op_name(node) == "clone"


def _copy(module: GraphModule, place: int) -> None:
    output = next(node for node in module.graph.nodes if node.op == "output")
    leaves, spec = pytree.tree_flatten(output.args)
    with module.graph.inserting_before(output):
        clone = module.graph.call_method("clone", (leaves[place],))
    clone.meta = dict(leaves[place].meta)
    leaves[place] = clone
    output.args = pytree.tree_unflatten(leaves, spec)
