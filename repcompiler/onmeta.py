"""One op at a time on the meta device: what it returns, as far as sizes say.

Nets repeat their blocks, and every graph is evaluated for several sizes of its inputs.
What torch's own ops return for the same sizes and settings is therefore kept.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from repcompiler.hooks import is_hooked
from repcompiler.partial import UNKNOWN, is_own, op_name

# Modules whose `extra_repr` says all that decides their result's size.
_SAID = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.AdaptiveAvgPool2d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_PLAIN = (bool, int, float, str, type(None), type(Ellipsis))
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Unsaid(Exception):
    """A call that depends on more than sizes and plain values."""


@dataclass
class MetaRuns:
    """Runs the ops of a graph on meta tensors; the same call is run once."""

    made: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any])

    def run(self, node: Node, called: nn.Module | None, args: Any, kwargs: Any) -> Any:
        """What the node returns for these arguments; `UNKNOWN` where meta has none.

        `called`: the module of a `call_module` node.
        """
        try:
            key = _key(node, called, args, kwargs)
        except _Unsaid:
            return _run(node, called, args, kwargs)
        if key in self.made:
            return pytree.tree_map(_again, self.made[key])
        result = _run(node, called, args, kwargs)
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        made = [v for v in pytree.tree_leaves(result) if isinstance(v, Tensor)]
        if all(_is_plain(v) and id(v) not in given for v in made):
            self.made[key] = pytree.tree_map(_again, result)
        return result


def _is_plain(value: Tensor) -> bool:
    """Whether shape, strides and dtype say all of it."""
    return (
        type(value) is Tensor
        and value.layout is torch.strided
        and not (value.is_nested or value.is_quantized)
    )


def _again(value: Any) -> Any:
    """Another tensor like it: what is written to one of two calls stays with that."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device="meta"
    )


def _key(node: Node, called: nn.Module | None, args: Any, kwargs: Any) -> Hashable:
    """All that the result depends on; a call that writes has an effect beside it."""
    own = node.op != "call_function" or is_own(node.target)
    name = op_name(node)
    writes = name.endswith("_") and not name.endswith("__")
    if not own or writes or "out" in kwargs:
        raise _Unsaid
    target = node.target if called is None else _said(called)
    return node.op, target, _frozen(args), _frozen(kwargs)


def _run(node: Node, called: nn.Module | None, args: Any, kwargs: Any) -> Any:
    args, kwargs = _on_meta(node, args), _on_meta(node, kwargs)
    try:
        if called is not None:
            return _run_module(called, args, kwargs)
        if node.op == "call_method":
            owner, *rest = args
            result = getattr(owner, str(node.target))(*rest, **kwargs)
        else:
            assert callable(node.target)
            result = node.target(*args, **kwargs)
        return pytree.tree_map(to_meta, result)
    except Exception:  # any op may refuse meta tensors; then it is unknown
        return UNKNOWN


def to_meta(value: Any) -> Any:
    """A tensor without its numbers; any other value as it is."""
    if isinstance(value, Tensor) and value.device.type != "meta":
        return torch.empty_like(value, device="meta")
    return value


def _said(module: nn.Module) -> Hashable:
    plain = getattr(module, "padding_mode", "zeros") == "zeros"
    if type(module) not in _SAID or is_hooked(module) or not plain:
        raise _Unsaid
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return type(module), module.extra_repr(), _frozen(tensors)


def _frozen(value: Any) -> Hashable:
    kind: type[Any] = type(value)
    if kind in (Tensor, nn.Parameter):
        return Tensor, value.shape, value.stride(), value.dtype, value.device.type
    if kind in _PLAIN or isinstance(value, _NAMED):
        return kind, value
    if kind in (tuple, torch.Size):
        return tuple, *map(_frozen, value)
    if kind in (list, immutable_list):  # as an index it means something else
        return list, *map(_frozen, value)
    if kind in (dict, immutable_dict):
        return dict, *((name, _frozen(item)) for name, item in value.items())
    if kind is slice:
        return slice, *map(_frozen, (value.start, value.stop, value.step))
    raise _Unsaid


def _on_meta(node: Node, args: Any) -> Any:
    """The arguments with every device that they name replaced: all values are there."""
    meta, moves = torch.device("meta"), op_name(node) == "to"

    def replaced(leaf: Any) -> Any:
        named = moves and isinstance(leaf, str)
        return meta if named or isinstance(leaf, torch.device) else leaf

    found = pytree.tree_map(replaced, args)
    if isinstance(found, dict) and isinstance(found.get("device"), str):
        return {**found, "device": meta}
    return found


def _run_module(module: nn.Module, args: Any, kwargs: Any) -> Any:
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    meta = {name: to_meta(tensor) for name, tensor in tensors.items()}
    return torch.func.functional_call(module, meta, args, kwargs)
