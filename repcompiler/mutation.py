"""In-place ops made functional, where that is provably the same.

After `y = relu_(x)`, every later reader of x reads y. That is the whole story unless
another alias of x (a view of it, or what it is a view of) is read after the write; then
the write stays, and the whole alias class is marked, so that no map is moved across it.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from repcompiler.aliases import alias_groups, is_foreign
from repcompiler.facts import Facts, op_name
from repcompiler.hooks import is_hooked
from repcompiler.limits import LIMIT

_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}
# In a node's `meta`: the operands that a call of somebody else's writes to.
OVERWRITES = "overwrites"
# In a node's `meta`: that it overwrote its first argument, and how (`Overwrote`).
OVERWROTE = "overwrote"


@dataclass(frozen=True)
class Overwrote:
    """How an op was called that overwrote its first argument, and how it is now.

    The same targets before and after mean that a flag, ``inplace``, was cleared.
    """

    before: Any
    after: Any


def functionalise(module: GraphModule) -> tuple[frozenset[str], frozenset[Node]]:
    """Make writes functional, in place; returns what is still written: names, nodes."""
    nodes = list(module.graph.nodes)
    writes = {node: target for node in nodes if (target := written(node, module))}
    effects = {node: node.all_input_nodes for node in nodes if _acts(node, module)}
    effects |= {n: wrote for n in nodes if (wrote := n.meta.get(OVERWRITES))}
    effects |= {n: wrote for n in nodes if (wrote := _written_in_lists(n))}
    if not writes and not effects:
        return frozenset(), frozenset()
    order = {node: index for index, node in enumerate(nodes)}
    groups = alias_groups(nodes, module, writes)
    pinned: set[Node] = set()
    for node, targets in effects.items():
        node.meta["writes"] = True
        pinned |= {node}.union(*(groups[target] for target in targets))
    for node, target in writes.items():
        if not _undo(module, node, target, groups[target], order):
            node.meta["writes"] = True
            pinned |= groups[target] | {node}
    for node in [n for n in pinned if n in writes and n.op == "call_module"]:
        pinned |= {
            n for n in nodes if n.op == "call_module" and n.target == node.target
        }
    owners = {
        str(node.target).rpartition(".")[0] for node in pinned if node.op == "get_attr"
    }
    pinned |= {n for n in nodes if n.op == "call_module" and str(n.target) in owners}
    readers = {user for node in pinned for user in node.users}
    frozen = {str(node.target) for node in pinned if node.op == "get_attr"}
    return frozenset(frozen), frozenset(pinned | readers)


def written(node: Node, module: GraphModule) -> Node | None:
    """The node whose value this node overwrites, or None."""
    first = node.args[0] if node.args else None
    if node.op == "call_module":
        inplace = getattr(module.get_submodule(str(node.target)), "inplace", False)
        return first if inplace is True and isinstance(first, Node) else None
    if node.op not in ("call_function", "call_method"):
        return None
    out = node.kwargs.get("out")
    if isinstance(out, Node):
        return out
    return first if _is_inplace(node) and isinstance(first, Node) else None


def is_write(node: Node) -> bool:
    """Whether the node has an effect beside its value."""
    if node.meta.get("writes") or LIMIT in node.meta:
        return True  # `mutation` found that the write has to stay; or an assertion
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    schema = getattr(node.target, "_schema", None)
    name = op_name(node)
    return bool(schema is not None and schema.is_mutable) or name == "setitem"


def written_names(module: GraphModule) -> set[str]:
    """The tensors of the module that its graph writes to, by name."""
    nodes = list(module.graph.nodes)
    writes = {node: target for node in nodes if (target := written(node, module))}
    targets = {*writes.values(), *(t for n in nodes for t in _written_in_lists(n))}
    groups = alias_groups(nodes, module, writes) if targets else {}
    members = {member for target in targets for member in groups[target]}
    return {str(member.target) for member in members if member.op == "get_attr"}


def _written_in_lists(node: Node) -> list[Node]:
    """What an op overwrites that takes lists of tensors (`_foreach_add_`)."""
    first = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(first, (list, tuple)):
        return []
    values = [item for item in first if isinstance(item, Node)]
    return values if values and _is_inplace(node) else []


def _is_inplace(node: Node) -> bool:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    name = op_name(node)
    if target in _OPERATORS or target is operator.setitem:
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    return node.op == "call_function" and _asks_in_place(node)


def _asks_in_place(node: Node) -> bool:
    """Whether it is given `inplace=True`, by name or by place."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is True
    assert callable(node.target)
    given = dict(zip(_names(node.target), node.args)).get("inplace")
    return isinstance(given, int) and bool(given)


@lru_cache(maxsize=1024)
def _names(target: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments that a function takes by place."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return ()
    by_place = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    return tuple(p.name for p in parameters if p.kind in by_place)


def _acts(node: Node, module: GraphModule) -> bool:
    """Whether a call of somebody else's code is there for what it does, not returns.

    Its result is not read, so it writes to its arguments, as far as anybody can tell.
    """
    if node.users or not node.all_input_nodes:
        return False
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        return is_hooked(leaf) or not type(leaf).__module__.startswith("torch.nn.")
    return is_foreign(node)


def _undo(
    module: GraphModule,
    node: Node,
    target: Node,
    group: set[Node],
    order: dict[Node, int],
) -> bool:
    """Turn one write into a value that later readers read; False if that differs."""
    now = order[node]
    late = {
        n
        for n in group
        if n is not target and order[n] < now and _read_after(n, now, order)
    }
    kept = any(n.op == "get_attr" for n in group)  # what is written outlives the call
    if late or kept or "out" in node.kwargs:
        return False
    before = node.target
    if not _make_functional(module, node):
        return False
    for user in list(target.users):
        if user is not node and order[user] > now:
            user.replace_input_with(target, node)
    node.meta[OVERWROTE] = Overwrote(before, node.target)
    return True


def keep_dtypes(module: GraphModule, facts: Facts) -> bool:
    """Cast what overwrote a value of another dtype; whether there was any.

    ``y += p`` keeps the dtype of y, where ``y + p`` takes the wider one.
    """
    changed = False
    for node in list(module.graph.nodes):
        target = node.args[0] if node.meta.get(OVERWROTE) and node.args else None
        if not isinstance(target, Node):
            continue
        own, kept = facts.dtype(node), facts.dtype(target)
        if own is None or kept is None or own is kept:
            continue
        with module.graph.inserting_after(node):
            cast = module.graph.call_method("type_as", (node, target))
        for user in [user for user in node.users if user is not cast]:
            user.replace_input_with(node, cast)
        facts.values[cast] = facts.values[target]
        changed = True
    return changed


def _read_after(node: Node, now: int, order: dict[Node, int]) -> bool:
    return any(order[user] > now for user in node.users)


def _make_functional(module: GraphModule, node: Node) -> bool:
    target: Any = node.target
    if node.op == "call_module":
        return _copy_without_inplace(module, str(target))
    if target in _OPERATORS:
        node.target = _OPERATORS[target]
    elif node.op == "call_method":
        name = str(target)[:-1]
        if (
            not name.isidentifier()
            or name in _OVERWRITES
            or not hasattr(torch.Tensor, name)
        ):
            return False
        node.target = name
    elif isinstance(target, torch._ops.OpOverload):
        return _functional_overload(node, target)
    elif node.kwargs.get("inplace") is True:
        node.kwargs = {**node.kwargs, "inplace": False}
    elif _asks_in_place(node):
        names = _names(target)
        if len(node.args) > len(names):
            return False
        place = names.index("inplace")
        named = dict(zip(names[place:], node.args[place:]))
        node.args = node.args[:place]
        node.kwargs = {**node.kwargs, **named, "inplace": False}
    else:
        return _functional_name(node, target)
    return True


# What these leave behind does not depend on what they overwrite, or has another shape.
_OVERWRITES = frozenset(
    "copy fill zero set resize uniform normal random requires_grad".split()
)


def _copy_without_inplace(module: GraphModule, target: str) -> bool:
    twin = copy.copy(module.get_submodule(target))
    setattr(twin, "inplace", False)
    module.set_submodule(target, twin)
    return True


def _functional_overload(node: Node, target: torch._ops.OpOverload) -> bool:
    name = target._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, name.rstrip("_"), None)
    functional = getattr(packet, target._overloadname, None)
    if name.rstrip("_") in _OVERWRITES or functional is None or not name.endswith("_"):
        return False
    node.target = functional
    return True


def _functional_name(node: Node, target: Any) -> bool:
    name = op_name(node).rstrip("_")
    functional = getattr(torch, name, None) or getattr(nn.functional, name, None)
    if target is operator.setitem or functional is None or name in _OVERWRITES:
        return False
    node.target = functional
    return True
