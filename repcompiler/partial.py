"""What an op says of its value by itself, where no example input gives a shape.

Convs, linear layers and norms fix the rank and the channels of what they make, in a
batched layout as `nn.BatchNormNd` asks for. All else is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

Shape = tuple[int | None, ...]


class Unknown:
    """A value of which nothing is known."""


UNKNOWN = Unknown()


@dataclass(frozen=True)
class Partial:
    """A tensor of which only rank, channels and perhaps dtype are known."""

    shape: Shape
    dtype: torch.dtype | None = None


_KNOWN_HOMES = ("torch", "_operator", "math", "builtins")


def op_name(node: Node) -> str:
    """A short name of what a node does: `conv2d`, `batch_norm`, `add`, …

    Only torch's and Python's own functions have a short name: somebody else's `relu`
    may do anything, and goes by its full path. So does an op of another library.
    """
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
        return name.split("::")[1] if is_own(target) else name
    if isinstance(target, str):
        return target
    name = str(getattr(target, "__name__", target))
    return name if is_own(target) else f"{_home(target)}.{name}"


def is_own(target: Any) -> bool:
    """Whether a function is one of torch's or of Python's."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[0] in ("aten", "prims")
    return _home(target).split(".")[0] in _KNOWN_HOMES


def _home(target: Any) -> str:
    return str(getattr(target, "__module__", None) or "torch")


_WEIGHTED = frozenset("conv1d conv2d conv3d linear".split())
_BINARY = frozenset("add sub mul add_ iadd isub imul truediv".split())


def partial(node: Node, module: nn.Module | None, args: Any) -> Any:
    """Rank and channels where the op itself fixes them; `module`: what it calls."""
    if module is not None:
        return _partial_module(module, args)
    if op_name(node) in _WEIGHTED:
        return _partial_weight(op_name(node), args)
    return _partial_binary(args) if op_name(node) in _BINARY else UNKNOWN


def _partial_module(module: nn.Module, args: Any) -> Any:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        free = (None,) * len(module.kernel_size)
        return Partial((None, module.out_channels, *free), module.weight.dtype)
    if type(module) is nn.Linear:
        return _with_last(args[0], module.out_features, module.weight.dtype)
    ranks: dict[type[nn.Module], int] = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
    rank = ranks.get(type(module))
    if rank is not None:
        features = int(getattr(module, "num_features"))
        return Partial((None, features, *(None,) * (rank - 2)))
    if isinstance(module, nn.MaxPool2d) and isinstance(args[0], Partial):
        return Partial((*args[0].shape[:2], None, None), args[0].dtype)
    return UNKNOWN


def _partial_weight(name: str, args: Any) -> Any:
    weight = args[1] if len(args) > 1 else None
    if not isinstance(weight, Tensor):
        return UNKNOWN
    if name == "linear":
        return _with_last(args[0], weight.shape[0], weight.dtype)
    return Partial((None, weight.shape[0], *(None,) * (weight.dim() - 2)), weight.dtype)


def _with_last(value: Any, size: int, dtype: torch.dtype) -> Any:
    if not isinstance(value, (Tensor, Partial)):
        return UNKNOWN
    return Partial((*value.shape[:-1], size), dtype)


def _partial_binary(args: Any) -> Any:
    """A sum or product of operands of the same known rank and channels, or a number."""
    if any(isinstance(arg, Unknown) for arg in args[:2]):
        return UNKNOWN
    tensors = [arg for arg in args[:2] if isinstance(arg, (Tensor, Partial))]
    if not tensors:
        return UNKNOWN
    widest = max(tensors, key=lambda arg: (len(arg.shape), isinstance(arg, Partial)))
    for arg in tensors:
        padded = (1,) * (len(widest.shape) - len(arg.shape)) + tuple(arg.shape)
        for mine, other in zip(padded, widest.shape):
            if mine not in (1, other):
                return UNKNOWN
    return widest
