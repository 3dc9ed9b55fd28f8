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
            target = node.target if called is None else _said(called)
            if node.op == "call_function" and not is_own(target):
                raise _Unsaid
            key = node.op, target, _frozen(args), _frozen(kwargs)
        except _Unsaid:
            return _run(node, called, args, kwargs)
        if key not in self.made:
            self.made[key] = _run(node, called, args, kwargs)
        return self.made[key]


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
    if type(module) not in _SAID or is_hooked(module):
        raise _Unsaid
    return type(module), module.extra_repr(), *map(_frozen, module.parameters())


def _frozen(value: Any) -> Hashable:
    kind: type[Any] = type(value)
    if kind in (Tensor, nn.Parameter):
        return Tensor, value.shape, value.stride(), value.dtype, value.device.type
    if kind in _PLAIN or isinstance(value, _NAMED):
        return kind, value
    if kind in (tuple, list, torch.Size, immutable_list):
        return tuple, *map(_frozen, value)
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
