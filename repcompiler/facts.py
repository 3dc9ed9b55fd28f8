"""What is known of every value before anything runs: shape, dtype, constant or not.

With example inputs each node is evaluated on the meta device, one op at a time, which
costs microseconds and no memory. A batch of one is widened to two, so that a channel
axis folded into the batch cannot be mistaken for one that was kept. Without example
inputs a few rules give the rank and the channels where an op fixes them (a batched
layout, as `nn.BatchNormNd` asks for); all else is unknown, and unknown is never
guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, map_arg
from torch.utils import _pytree as pytree

Shape = tuple[int | None, ...]


class Unknown:
    """A value of which nothing is known."""


UNKNOWN = Unknown()


@dataclass(frozen=True)
class Partial:
    """A tensor of which only rank, channels and perhaps dtype are known."""

    shape: Shape
    dtype: torch.dtype | None = None


@dataclass
class Facts:
    """Facts of one graph; `values`: meta tensors, numbers, `Partial` or `UNKNOWN`."""

    module: GraphModule
    exact: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    values: dict[Node, Any] = field(default_factory=dict[Node, Any])
    frozen: frozenset[str] = frozenset()
    baked: frozenset[str] = frozenset()
    exampled: bool = False

    def shape(self, node: Node) -> Shape | None:
        """The shape, None where unknown, with None for a size that is unknown."""
        value = self.values.get(node, UNKNOWN)
        return tuple(value.shape) if isinstance(value, (Tensor, Partial)) else None

    def dtype(self, node: Node) -> torch.dtype | None:
        """The dtype, None where unknown."""
        value = self.values.get(node, UNKNOWN)
        return value.dtype if isinstance(value, (Tensor, Partial)) else None

    def rank(self, node: Node) -> int | None:
        """The number of axes, None where unknown."""
        shape = self.shape(node)
        return None if shape is None else len(shape)

    def size(self, node: Node, axis: int) -> int | None:
        """The size on `axis`, counted from the end; None where unknown or absent."""
        shape = self.shape(node)
        return None if shape is None or -axis > len(shape) else shape[axis]

    def constant(self, arg: object) -> Tensor | None:
        """The tensor behind an argument that no input and no write can change."""
        if isinstance(arg, (int, float)) and not isinstance(arg, bool):
            return torch.tensor(arg, dtype=torch.float64)
        if isinstance(arg, Tensor):
            return arg
        if not isinstance(arg, Node) or arg.op != "get_attr":
            return None
        name = str(arg.target)
        if name in self.frozen:
            return None
        value = self.exact.get(name)
        value = fetch(self.module, name) if value is None else value
        return value if isinstance(value, Tensor) else None

    def submodule(self, node: Node) -> nn.Module:
        """The module that a `call_module` node calls."""
        return self.module.get_submodule(str(node.target))


def fetch(root: nn.Module, target: str) -> Any:
    """The attribute at a dotted path."""
    value: Any = root
    for name in target.split("."):
        value = getattr(value, name)
    return value


def gather(
    module: GraphModule,
    example_inputs: Sequence[object] | None,
    exact: Mapping[str, Tensor],
    frozen: frozenset[str],
    baked: frozenset[str],
) -> Facts:
    """Facts of every node of `module`, by evaluation on meta tensors where possible."""
    facts = Facts(module, exact, {}, frozen, baked, exampled=example_inputs is not None)
    given = iter(_widened(example_inputs) if example_inputs is not None else ())
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                facts.values[node] = next(given, _default(node))
            else:
                facts.values[node] = _evaluate(node, facts)
    return facts


def _default(node: Node) -> object:
    return node.args[0] if node.args else UNKNOWN


def _widened(inputs: Sequence[object]) -> list[object]:
    leaves = [
        leaf for leaf in pytree.tree_leaves(list(inputs)) if isinstance(leaf, Tensor)
    ]
    single = bool(leaves) and all(
        leaf.dim() > 1 and leaf.shape[0] == 1 for leaf in leaves
    )

    def to_meta(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = (2, *leaf.shape[1:]) if single else leaf.shape
        return torch.empty(shape, dtype=leaf.dtype, device="meta")

    return [pytree.tree_map(to_meta, value) for value in inputs]


_OPERANDS = ("input", "weight", "other")


def _evaluate(node: Node, facts: Facts) -> Any:
    if node.op == "get_attr":
        value = fetch(facts.module, str(node.target))
        return _to_meta(value) if isinstance(value, Tensor) else value
    if node.op == "output":
        return UNKNOWN
    known: Any = map_arg(node.args, lambda n: facts.values.get(n, UNKNOWN))
    named: Any = map_arg(node.kwargs, lambda n: facts.values.get(n, UNKNOWN))
    leaves = pytree.tree_leaves((known, named))
    operands = (*known, *(named[key] for key in _OPERANDS if key in named))
    first = operands[0] if operands else UNKNOWN
    if _keeps_shape(node, facts) and isinstance(first, (Tensor, Partial)):
        return first
    if any(isinstance(leaf, (Unknown, Partial)) for leaf in leaves):
        return _partial(node, facts, operands)
    result = _run(node, facts, known, named)
    return UNKNOWN if _rank_hangs_on_sizes(node, first, result) else result


def _rank_hangs_on_sizes(node: Node, before: Any, after: Any) -> bool:
    """A squeeze that finds no axis of size one here will find one in another input."""
    if op_name(node) != "squeeze" or not isinstance(before, Tensor):
        return False
    return isinstance(after, Tensor) and after.dim() == before.dim()


def shape_of(node: Node, facts: Facts, changed: Mapping[Node, Shape]) -> Shape | None:
    """The shape of a node where some operands have other shapes; None if it fails."""

    def value(arg: Node) -> Any:
        known = facts.values.get(arg, UNKNOWN)
        if arg in changed and isinstance(known, Tensor):
            return known.new_empty(tuple(size or 0 for size in changed[arg]))
        return known

    args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
    result = _run(node, facts, args, kwargs)
    return tuple(result.shape) if isinstance(result, Tensor) else None


def _run(node: Node, facts: Facts, args: Any, kwargs: Any) -> Any:
    try:
        if node.op == "call_module":
            return _run_module(facts.submodule(node), args, kwargs)
        if node.op == "call_method":
            owner, *rest = args
            result = getattr(owner, str(node.target))(*rest, **kwargs)
        else:
            assert callable(node.target)
            result = node.target(*args, **kwargs)
        return pytree.tree_map(_to_meta, result)
    except Exception:  # any op may refuse meta tensors; then it is unknown
        return UNKNOWN


def _run_module(module: nn.Module, args: Any, kwargs: Any) -> Any:
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    meta = {name: _to_meta(tensor) for name, tensor in tensors.items()}
    return torch.func.functional_call(module, meta, args, kwargs)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor) and value.device.type != "meta":
        return torch.empty_like(value, device="meta")
    return value


_ELEMENTWISE_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.LeakyReLU,
    nn.ELU,
    nn.Mish,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
)
_ELEMENTWISE_NAMES = frozenset(
    "relu relu_ relu6 gelu silu silu_ sigmoid sigmoid_ tanh hardswish hardswish_ "
    "hardsigmoid leaky_relu leaky_relu_ elu mish dropout batch_norm layer_norm "
    "group_norm neg".split()
)


def _keeps_shape(node: Node, facts: Facts) -> bool:
    if node.op == "call_module":
        return type(facts.submodule(node)) in _ELEMENTWISE_MODULES
    return op_name(node) in _ELEMENTWISE_NAMES


_KNOWN_HOMES = ("torch", "_operator", "math", "builtins")


def op_name(node: Node) -> str:
    """A short name of what a node does: `conv2d`, `batch_norm`, `add`, …

    Only torch's and Python's own functions have a short name: somebody else's `relu`
    may do anything, and goes by its full path. So does an op of another library.
    """
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        library, name = target._schema.name.split("::")
        return name if library in ("aten", "prims") else target._schema.name
    if isinstance(target, str):
        return target
    name = str(getattr(target, "__name__", target))
    home = str(getattr(target, "__module__", None) or "torch")
    return name if home.split(".")[0] in _KNOWN_HOMES else f"{home}.{name}"


def _partial(node: Node, facts: Facts, args: Any) -> Any:
    """Rank and channels where the op itself fixes them."""
    known: Callable[[], Any] | None = None
    if node.op == "call_module":
        module = facts.submodule(node)
        known = lambda: _partial_module(module, args)  # noqa: E731
    elif op_name(node) in ("conv1d", "conv2d", "conv3d", "linear"):
        known = lambda: _partial_weight(op_name(node), args)  # noqa: E731
    elif op_name(node) in (
        "add",
        "sub",
        "mul",
        "add_",
        "iadd",
        "isub",
        "imul",
        "truediv",
    ):
        known = lambda: _partial_binary(args)  # noqa: E731
    return known() if known is not None else UNKNOWN


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
    shapes = {len(arg.shape): arg for arg in tensors}
    widest = shapes[max(shapes)]
    for arg in tensors:
        padded = (1,) * (len(widest.shape) - len(arg.shape)) + tuple(arg.shape)
        for mine, other in zip(padded, widest.shape):
            if mine not in (1, other):
                return UNKNOWN
    return widest
