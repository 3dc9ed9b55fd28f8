"""One form for every capture: no guards, no aliases, no writes, constants folded.

1. Guards (asserts on sizes) go, and with them all that only they read.
2. Aliases (identity, dropout in eval) are replaced by what they alias; a norm that
   also returns statistics is spelled as one that does not.
3. In-place ops become functional (`mutation`), and what cannot is marked.
4. What depends on parameters alone is computed, in float64, and becomes a constant.
5. Dead branches go.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, map_arg
from torch.nn.utils.parametrize import ParametrizationList

from repcompiler.facts import fetch, op_name
from repcompiler.foreign import mark_foreign_writes
from repcompiler.lift import is_hooked
from repcompiler.limits import LIMIT
from repcompiler.mutation import functionalise


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


def is_write(node: Node) -> bool:
    """Whether the node has an effect beside its value."""
    if node.meta.get("writes") or LIMIT in node.meta:
        return True  # `mutation` found that the write has to stay; or an assertion
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    schema = getattr(node.target, "_schema", None)
    name = op_name(node)
    return bool(schema is not None and schema.is_mutable) or name == "setitem"


_RANDOM = frozenset(
    "rand randn randint bernoulli normal dropout rand_like randn_like".split()
)
# What these give depends on their arguments alone.
_MADE = frozenset(
    "arange linspace logspace full zeros ones eye scalar_tensor tril_indices "
    "triu_indices".split()
)


def fold_constants(
    module: GraphModule,
    frozen: frozenset[str],
    mutated: frozenset[Node],
    baked: frozenset[str] = frozenset(),
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Replace values that depend on parameters alone, or on nothing.

    Returns their float64 values by name, and which of them no cast of the model reaches
    because no parameter is in them: what `arange` gives keeps its own dtype.
    """
    known: dict[Node, Any] = {}
    stored: dict[Node, Any] = {}  # the same on the meta device, in the model's dtypes
    cast: set[Node] = set()  # those that follow the model's dtype
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = fetch(module, str(node.target))
            if isinstance(value, Tensor) and str(node.target) not in frozen:
                own = str(node.target) not in baked
                known[node] = _as_double(value) if own else value
                cast.update([node] if own else [])
                stored[node] = torch.empty_like(value, device="meta")
        elif _foldable(node, known, module) and node not in mutated:
            result = _compute(node, known, module, _in_double)
            if result is not None:
                known[node] = result
                stored[node] = _compute(node, stored, module, _on_meta)
                follows = node.op == "call_module" or cast.intersection(
                    node.all_input_nodes
                )
                cast.update([node] if follows else [])
    exact: dict[str, Tensor] = {}
    made: set[str] = set()
    for node in list(known):
        if node.op != "get_attr" and isinstance(known[node], Tensor):
            if any(user not in known for user in node.users):
                name = _replace(module, node, known, stored[node], exact)
                made.update([] if node in cast else [name])
    return exact, frozenset(made)


def _foldable(node: Node, known: Mapping[Node, Any], module: GraphModule) -> bool:
    inputs = node.all_input_nodes
    if any(i not in known for i in inputs):
        return False
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        if isinstance(leaf, ParametrizationList):  # a weight that torch.nn.utils makes
            return not is_hooked(leaf)
        return bool(inputs) and _is_function(leaf)
    if node.op not in ("call_function", "call_method") or is_write(node):
        return False
    if not inputs:  # not what the caller is given, who may write to it
        returned = any(user.op == "output" for user in node.users)
        return op_name(node) in _MADE and not returned
    return op_name(node) not in _RANDOM


def _is_function(leaf: nn.Module) -> bool:
    """Whether it is torch's own module, and a call does nothing but compute.

    No module is in train mode, in which some are random (see `capture.require_eval`).
    """
    parts = list(leaf.modules())
    own = all(type(part).__module__.startswith("torch.nn.modules.") for part in parts)
    return own and not any(map(is_hooked, parts))


def _in_double(leaf: nn.Module) -> nn.Module:
    return leaf.double()


def _on_meta(leaf: nn.Module) -> nn.Module:
    return leaf.to("meta")


def _compute(
    node: Node,
    known: Mapping[Node, Any],
    module: GraphModule,
    convert: Callable[[nn.Module], nn.Module],
) -> Any:
    try:
        args: Any = map_arg(node.args, known.__getitem__)
        kwargs: Any = map_arg(node.kwargs, known.__getitem__)
        with torch.no_grad():
            if node.op == "call_module":
                leaf = copy.deepcopy(module.get_submodule(str(node.target)))
                return convert(leaf)(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)
    except Exception:  # left in the graph, where it runs as before
        return None


def _as_double(value: Tensor) -> Tensor:
    return value.detach().double() if value.is_floating_point() else value.detach()


# Folded weights of these stay trainable. Elsewhere (an attention's bias, say) a tensor
# that asks for a gradient would keep torch from its fastest kernel.
_WEIGHTED = frozenset(
    "conv1d conv2d conv3d linear conv_transpose1d conv_transpose2d conv_transpose3d "
    "batch_norm layer_norm mul add".split()
)


def _replace(
    module: GraphModule,
    node: Node,
    known: Mapping[Node, Any],
    like: Any,
    exact: dict[str, Tensor],
) -> str:
    """Put a constant for the node, of the dtype that the model computes (`like`).

    Returns its name.
    """
    name = f"folded_{len(exact)}"
    while hasattr(module, name):
        name += "_"
    value: Tensor = known[node]
    roots = list(_roots(node, module))
    dtype = next((r.dtype for r in roots if r.is_floating_point()), None)
    meant = isinstance(like, Tensor) and like.is_floating_point()
    stored = _narrowed(value, like.dtype if meant else dtype)
    trains = any(isinstance(r, nn.Parameter) and r.requires_grad for r in roots)
    trains = trains and any(op_name(user) in _WEIGHTED for user in node.users)
    if trains and stored.is_floating_point():
        module.register_parameter(name, nn.Parameter(stored.contiguous()))
    else:
        module.register_buffer(name, stored.contiguous())
    exact[name] = value
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
    constant.meta = copy.copy(node.meta)
    for user in list(node.users):
        if user not in known:
            user.replace_input_with(node, constant)
    return name


def _narrowed(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy in the dtype that the model computes it in, complex numbers likewise."""
    if dtype is None or not (value.is_floating_point() or value.is_complex()):
        return value.clone()
    return value.to(dtype.to_complex() if value.is_complex() else dtype)


def _roots(node: Node, module: GraphModule) -> Iterator[Tensor]:
    """The tensors of the model that a constant was computed from."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.op == "get_attr":
            yield fetch(module, str(current.target))
        elif current.op == "call_module":
            yield from module.get_submodule(str(current.target)).parameters()
        fresh = [i for i in current.all_input_nodes if i not in seen]
        seen.update(fresh)
        stack.extend(fresh)
