"""Questions about sizes, asked of values that stay.

`x.shape` of a norm's output would keep the norm alive. A size question moves up to an
earlier value that has that size for certain: through ops that keep every shape; through
convs for the batch, for a constant number of channels, and for positions that the
window keeps; through concats on every axis but their own, and through pools and
resizes for what they keep whole. Where a view stands before it, the same view of the
earlier value is asked.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from repcompiler.affine import Diagonal, Window
from repcompiler.facts import Facts, op_name
from repcompiler.lift import Affine, Carry, Rules, Stack, lift

Twins = dict[tuple[Node, Node], Node]  # (a view, an earlier value) → its like of that


def settle_sizes(module: GraphModule, facts: Facts, rules: Rules) -> None:
    """Move size questions to earlier values, in place; facts follow."""
    _spell_out_likes(module, facts)
    _split_shapes(module, facts)
    twins: Twins = {}
    for node in list(module.graph.nodes):
        asked = _question(node, facts)
        if asked is None:
            continue
        value, axis = asked
        moved = _ask(value, axis, facts, rules)
        if not isinstance(moved, int):
            moved = _twin_view(module, moved[0], facts, rules, twins), axis
        if moved == (value, axis):
            continue
        _replace(module, node, moved, facts)
    for node in reversed(list(module.graph.nodes)):
        if not node.users and _is_shape(node):
            module.graph.erase_node(node)


def _is_shape(node: Node) -> bool:
    if node.op == "call_method" and node.target == "size":
        return True
    return node.op == "call_function" and (
        (node.target is getattr and node.args[1:] == ("shape",))
        or op_name(node) == "sym_size"
    )


def _spell_out_likes(module: GraphModule, facts: Facts) -> None:
    """Turn `x.reshape_as(y)` into `x.reshape(y.size(0), …)`: it only asks for sizes."""
    for node in list(module.graph.nodes):
        if op_name(node) not in ("reshape_as", "view_as") or len(node.args) != 2:
            continue
        value, like = node.args
        rank = facts.rank(like) if isinstance(like, Node) else None
        if rank is None:
            continue
        with module.graph.inserting_before(node):
            sizes = [module.graph.call_method("size", (like, i)) for i in range(rank)]
            fresh = module.graph.call_method("reshape", (value, *sizes))
        shape = facts.shape(node) or (None,) * rank
        facts.values.update(zip(sizes, shape))
        facts.values[fresh] = facts.values[node]
        fresh.meta = dict(node.meta)
        node.replace_all_uses_with(fresh)
        module.graph.erase_node(node)


def _split_shapes(module: GraphModule, facts: Facts) -> None:
    """Turn `x.shape[i]` into `x.size(i)`, and a size counted from the end likewise."""
    for node in list(module.graph.nodes):
        if not (_is_shape(node) and len(node.args) + len(node.kwargs) <= 2):
            continue
        whole = node.target is getattr or len(node.args) == 1
        if not whole or node.kwargs or op_name(node) == "sym_size":
            continue
        for user in list(node.users):
            index = user.args[1] if user.target is operator.getitem else None
            if not isinstance(index, int):
                continue
            with module.graph.inserting_before(user):
                size = module.graph.call_method("size", (node.args[0], index))
            facts.values[size] = facts.values.get(user)
            size.meta = dict(user.meta)
            user.replace_all_uses_with(size)
            module.graph.erase_node(user)


def _question(node: Node, facts: Facts) -> tuple[Node, int] | None:
    """(value, axis from the end) if the node asks for one size."""
    if not _is_shape(node) or node.target is getattr or len(node.args) != 2:
        return None
    value, index = node.args
    rank = facts.rank(value) if isinstance(value, Node) else None
    if rank is None or not isinstance(value, Node) or not isinstance(index, int):
        return None
    return value, index % rank - rank


def _ask(value: Node, axis: int, facts: Facts, rules: Rules) -> tuple[Node, int] | int:
    """The earliest value with the same size on `axis`, or the size if it is fixed.

    Not an affine value with just one reader, though, which that reader may absorb.
    """
    path = [value]
    while True:
        source = _same_size(path[-1], axis, facts, rules)
        if isinstance(source, int):
            return source
        if source is None:
            break
        path.append(source)
    return _not_absorbed(path, facts, rules), axis


def _twin_view(
    module: GraphModule, value: Node, facts: Facts, rules: Rules, twins: Twins
) -> Node:
    """The same view of an earlier value of the same shape, or else the value itself.

    `twins` holds those that there are: many questions may ask one view.
    """
    own = lift(value, facts, rules)
    if not isinstance(own, Carry) or not own.is_view:
        return value
    base = _twin_view(module, own.source, facts, rules, twins)
    if base is own.source:
        base = _earliest(own.source, facts, rules)
    if base is own.source or value.args[:1] != (own.source,):
        return value
    if (value, base) in twins:
        return twins[value, base]
    with module.graph.inserting_before(value):
        twin = module.graph.node_copy(value, lambda n: base if n is own.source else n)
    for known in (facts, *facts.elsewhere):
        if value in known.values:
            known.values[twin] = known.values[value]
    twins[value, base] = twin
    return twin


def _earliest(value: Node, facts: Facts, rules: Rules) -> Node:
    """The earliest value that a chain of norms and scales makes this one from."""
    path = [value]
    while True:
        own = lift(path[-1], facts, rules)
        if not isinstance(own, Affine) or len(own.parts) != 1 or not facts.exampled:
            break
        source, map = own.parts[0]
        if not isinstance(map, Diagonal) or not _same_shape(path[-1], source, facts):
            break
        path.append(source)
    return _not_absorbed(path, facts, rules)


def _not_absorbed(path: list[Node], facts: Facts, rules: Rules) -> Node:
    """The last of the path that does not go into the one value that reads it."""
    while len(path) > 1 and _sole_reader(path[-1]) is path[-2]:
        if not _is_affine(path[-1], facts, rules):
            break
        path.pop()
    return path[-1]


def _is_affine(node: Node, facts: Facts, rules: Rules) -> bool:
    """Whether it is an affine value, or a view of one that nobody else reads."""
    own = lift(node, facts, rules)
    if isinstance(own, Carry) and own.is_view and _sole_reader(own.source) is node:
        return _is_affine(own.source, facts, rules)
    return isinstance(own, Affine)


def _sole_reader(node: Node) -> Node | None:
    """The one node that reads the value itself and not just its size."""
    readers = [user for user in node.users if not _is_shape(user)]
    return readers[0] if len(readers) == 1 else None


def _same_size(value: Node, axis: int, facts: Facts, rules: Rules) -> Node | int | None:
    """An operand of `value` with its size on `axis`, that size if fixed, or None."""
    own = lift(value, facts, rules)
    if isinstance(own, Stack):  # its parts have one size on every axis but its own
        return own.parts[0] if axis != own.axis else None
    if isinstance(own, Carry) and own.step.computes:  # a pool keeps batch and channels
        same = own.step.axes.get(axis) == axis and not own.step.pick
        return (
            own.source if same and facts.rank(own.source) == facts.rank(value) else None
        )
    if not isinstance(own, Affine) or not facts.exampled:
        return None
    source, map = own.parts[0]
    rank = facts.rank(source)
    if rank is None or facts.rank(value) != rank:
        return None
    if isinstance(map, Window):
        if axis == map.axis and map.fixed:
            return map.out_channels
        return None if axis > map.axis and not _keeps(map, axis) else source
    for source, map in own.parts:
        if isinstance(map, Diagonal) and _same_shape(value, source, facts):
            return source
    return None


def _keeps(window: Window, axis: int) -> bool:
    own = window.axes[axis]
    return own.stride == 1 and own.tail == 0


def _same_shape(a: Node, b: Node, facts: Facts) -> bool:
    """Whether they have one shape, here and for inputs of other sizes.

    An operand of a sum may be broadcast there.
    """
    there = [(known.shape(a), known.shape(b)) for known in facts.elsewhere]
    same = all(None in pair or pair[0] == pair[1] for pair in there)
    return same and facts.shape(a) == facts.shape(b) is not None


def _replace(
    module: GraphModule, node: Node, moved: tuple[Node, int] | int, facts: Facts
) -> None:
    if isinstance(moved, int):
        for user in list(node.users):
            _substitute(user, node, moved)
        module.graph.erase_node(node)
        return
    with module.graph.inserting_before(node):
        if isinstance(node.target, torch._ops.OpOverload):
            fresh = module.graph.call_function(node.target, moved)
        else:
            fresh = module.graph.call_method("size", moved)
    facts.values[fresh] = facts.values.get(node)
    fresh.meta = dict(node.meta)
    node.replace_all_uses_with(fresh)
    module.graph.erase_node(node)


def _substitute(user: Node, node: Node, number: int) -> None:
    def swap(arg: Node) -> Any:
        return number if arg is node else arg

    user.args = torch.fx.map_arg(user.args, swap)
    user.kwargs = torch.fx.map_arg(user.kwargs, swap)
