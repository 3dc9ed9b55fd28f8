"""One form for every capture: no guards, no aliases, no writes, constants folded.

1. Guards (asserts on sizes) go, and with them all that only they read.
2. Aliases (identity, dropout in eval) are replaced by what they alias; a norm that
   also returns statistics is spelled as one that does not.
3. In-place ops become functional (`mutation`), and what cannot is marked.
4. What depends on parameters alone is computed, and becomes a constant (`constants`).
5. Dead branches go.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repcompiler.constants import fold_constants
from repcompiler.facts import op_name
from repcompiler.foreign import mark_foreign_writes
from repcompiler.hooks import is_hooked
from repcompiler.limits import LIMIT
from repcompiler.mutation import functionalise, is_write
from repcompiler.results import own_results


@dataclass(frozen=True)
class Clean:
    """A graph in normal form, and what was learnt (see `capture.Captured`)."""

    module: GraphModule
    exact: Mapping[str, Tensor]
    frozen: frozenset[str]
    mutated: frozenset[Node]
    baked: frozenset[str]


def clean(
    module: GraphModule,
    baked: frozenset[str] = frozenset(),
    inputs: tuple[Any, ...] | None = None,
) -> Clean:
    """Bring `module` to normal form, in place; its parameters are shared, not copied.

    `baked` names constants that tracing made: no cast of the model reaches those.
    """
    drop_guards(module)
    place_operands(module)
    drop_aliases(module)
    plain_norms(module)
    mark_foreign_writes(module, inputs)
    frozen, mutated = functionalise(module)
    exact, made = fold_constants(module, frozen, mutated, baked)
    own_results(module, baked.union(exact))
    drop_dead(module)
    module.graph.lint()
    mutated &= frozenset(module.graph.nodes)
    return Clean(module, exact, frozen, mutated, baked | made)


GUARDS = frozenset(
    "_assert _assert_async _assert_scalar _assert_tensor_metadata sym_constrain_range "
    "sym_constrain_range_for_size _check _check_is_size".split()
)


def drop_guards(module: GraphModule) -> None:
    """Erase asserts; on inputs that they let pass, nothing changes."""
    for node in reversed(list(module.graph.nodes)):
        guard = node.op == "call_module" and str(node.target) == "_guards_fn"
        if guard or (node.op == "call_function" and op_name(node) in GUARDS):
            if not node.users and LIMIT not in node.meta:
                module.graph.erase_node(node)


def place_operands(module: GraphModule) -> None:
    """Put a first operand that was given by keyword in its place: `f(input=x)`."""
    for node in module.graph.nodes:
        if node.args or not isinstance(node.kwargs.get("input"), Node):
            continue
        owner: Any = node.target
        if node.op == "call_module":
            owner = type(module.get_submodule(str(node.target)))
        home = str(getattr(owner, "__module__", "") or "")
        if node.op == "call_method" or home.split(".")[0] not in ("", "torch"):
            continue
        rest = dict(node.kwargs)
        node.args = (rest.pop("input"),)
        node.kwargs = rest


_SAME_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def drop_aliases(module: GraphModule) -> None:
    """Replace nodes that return their very input by that input."""
    for node in list(module.graph.nodes):
        if _is_alias(node, module) and isinstance(node.args[0], Node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _is_alias(node: Node, module: GraphModule) -> bool:
    if not node.args:
        return False
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        if type(leaf) not in _SAME_MODULES or is_hooked(leaf):
            return False
        return type(leaf) is nn.Identity or not leaf.training
    if node.op == "call_function" and op_name(node) == "dropout":
        named = dict(zip(("input", "p", "training"), node.args)) | dict(node.kwargs)
        return named.get("training", named.get("train", True)) is False
    return False


def plain_norms(module: GraphModule) -> None:
    """Replace core ATen's norm, which returns statistics too, where none reads them."""
    aten: Any = torch.ops.aten
    for node in list(module.graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        read = [user for user in node.users if user.users or user.op == "output"]
        if any(u.target is not operator.getitem or u.args[1] for u in read):
            continue
        value, weight, bias, mean, var, momentum, eps = node.args
        args = (value, weight, bias, mean, var, False, momentum, eps, False)
        with module.graph.inserting_before(node):
            norm = module.graph.call_function(aten.batch_norm.default, args)
        norm.meta = {k: v for k, v in node.meta.items() if k != "val"}
        for user in list(node.users):
            user.replace_all_uses_with(norm)
            module.graph.erase_node(user)
        module.graph.erase_node(node)


def drop_dead(module: GraphModule) -> None:
    """Erase nodes that nothing reads, but for writes and inputs."""
    for node in reversed(list(module.graph.nodes)):
        if node.users or node.op in ("placeholder", "output") or is_write(node):
            continue
        module.graph.erase_node(node)
    module.delete_all_unused_submodules()
