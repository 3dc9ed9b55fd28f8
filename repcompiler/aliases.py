"""Which values may share memory.

Said of nodes of a graph, by the names of their ops: a view shares the memory of what it
is of, and what somebody else's code returns may share that of anything it was given.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from repcompiler.facts import op_name
from repcompiler.hooks import is_hooked

# Beside those that ATen's schemas tell of (`is_view`).
_VIEWS = frozenset(
    "view reshape _unsafe_view _reshape_alias view_as transpose permute t expand slice "
    "select unsqueeze squeeze split split_with_sizes chunk unbind unfold detach alias "
    "as_strided contiguous flatten unflatten getitem narrow movedim swapaxes swapdims "
    "to type_as float half double expand_as tensor_split getattr T "
    # In eval mode, or where there is nothing to do, these return their very argument.
    "pos positive dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout "
    "feature_alpha_dropout einsum bfloat16 type cpu cuda real conj resolve_conj "
    "resolve_neg ravel moveaxis mT adjoint diagonal unsafe_chunk unsafe_split hsplit "
    "vsplit dsplit broadcast_to atleast_1d atleast_2d atleast_3d view_as_real "
    "view_as_complex long int short byte char bool chalf pixel_shuffle "
    "pixel_unshuffle channel_shuffle sum_to_size to_dense broadcast_tensors meshgrid "
    "cfloat cdouble coalesce asarray as_tensor cartesian_prod".split()
)
_VIEW_MODULES = (
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ChannelShuffle),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)

# What these give are numbers: they share no memory with the tensor that was asked.
_QUESTIONS = frozenset(
    "size dim ndimension numel nelement stride storage_offset element_size get_device "
    "sym_size sym_numel sym_stride sym_storage_offset len".split()
)
_NUMBERS = (("shape",), ("ndim",), ("dtype",), ("device",), ("layout",))


def alias_groups(
    nodes: list[Node], module: GraphModule, writes: dict[Node, Node]
) -> dict[Node, set[Node]]:
    """The nodes that may share memory with each node."""
    groups: dict[Node, set[Node]] = {node: {node} for node in nodes}
    numbers = numbers_among(nodes)
    for node in [node for node in nodes if node not in numbers]:
        for source in set(aliased(node, module, writes)) - numbers:
            merged = groups[source] | groups[node]
            for member in merged:
                groups[member] = merged
    return groups


def numbers_among(nodes: list[Node]) -> set[Node]:
    """Sizes, strides and the like, and what is computed of them: they share no memory.

    Many views are made with one size, and a size outlives a write.
    """
    numbers: set[Node] = set()
    for node in nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        asks = op_name(node) in _QUESTIONS or (
            node.target is getattr and node.args[1:] in _NUMBERS
        )
        home = getattr(node.target, "__module__", "")
        computes = home in ("_operator", "math") or op_name(node).startswith("sym_")
        sources = node.all_input_nodes
        if asks or (computes and sources and numbers.issuperset(sources)):
            numbers.add(node)
    return numbers


def aliased(node: Node, module: GraphModule, writes: dict[Node, Node]) -> list[Node]:
    """The operands whose memory a value may share."""
    if node in writes:
        return [writes[node]]
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        plain = type(leaf).__module__.startswith("torch.nn.") and not is_hooked(leaf)
        fresh = plain and not isinstance(leaf, _VIEW_MODULES)
        return [] if fresh else node.all_input_nodes
    if node.op in ("placeholder", "get_attr", "output") or _is_result(node):
        return []
    if is_foreign(node):
        return node.all_input_nodes
    return _viewed(node) if is_view(op_name(node)) else []


def _viewed(node: Node) -> list[Node]:
    """What a view is of: its first operand, but for those that take several alike."""
    first = node.args[0] if node.args else None
    if op_name(node) == "einsum" and len(node.all_input_nodes) > 1:
        return []  # a product
    if not isinstance(first, Node):
        return node.all_input_nodes
    if op_name(node) == "getitem" and _is_gather(node.args[1]):
        return []
    return node.all_input_nodes if op_name(node) in _SEVERAL else [first]


_SEVERAL = frozenset("broadcast_tensors meshgrid cartesian_prod".split())


def _is_gather(index: Any) -> bool:
    """Whether an index holds a list or a tensor: what it finds is copied."""
    items: Any = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(item, list) or (isinstance(item, Node) and item.op == "get_attr")
        for item in items
    )


def _is_result(node: Node) -> bool:
    """Whether it is a mapping that the model returns: all writes come before it."""
    return node.target is OrderedDict and all(
        user.op == "output" or _is_result(user) for user in node.users
    )


@functools.cache
def is_view(name: str) -> bool:
    """Whether an op of that name may return its operand, or part of its memory."""
    if name in _VIEWS:
        return True
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else packet.overloads()
    schemas = [getattr(packet, overload)._schema for overload in overloads]
    return any(
        result.alias_info is not None and not schema.is_mutable
        for schema in schemas
        for result in schema.returns
    )


def is_foreign(node: Node) -> bool:
    """A function that is not torch's own may return its argument, or change it."""
    home = str(getattr(node.target, "__module__", "") or "")
    known = home.split(".")[0] in ("torch", "_operator", "math", "builtins")
    return node.op == "call_function" and bool(home) and not known
