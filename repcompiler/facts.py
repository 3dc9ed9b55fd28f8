"""What is known of every value before anything runs: shape, dtype, constant or not.

With example inputs each node is evaluated on the meta device, one op at a time, which
costs microseconds and no memory. A batch of one is widened to two, so that a channel
axis folded into the batch cannot be mistaken for one that was kept. Without example
inputs a few rules give the rank and the channels where an op fixes them (a batched
layout, as `nn.BatchNormNd` asks for); all else is unknown, and unknown is never
guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, map_arg
from torch.utils import _pytree as pytree

from repcompiler.onmeta import MetaRuns, to_meta
from repcompiler.partial import UNKNOWN, Partial, Shape, Unknown, op_name, partial


@dataclass
class Facts:
    """Facts of one graph; `values`: meta tensors, numbers, `Partial` or `UNKNOWN`.

    `elsewhere`: the same for inputs of other sizes, as far as the model takes them.
    `samples`: how many samples the inputs hold here.
    `runs`: what evaluates the ops, shared with the facts for other sizes.
    """

    module: GraphModule
    exact: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    values: dict[Node, Any] = field(default_factory=dict[Node, Any])
    frozen: frozenset[str] = frozenset()
    baked: frozenset[str] = frozenset()
    exampled: bool = False
    elsewhere: tuple[Facts, ...] = ()
    samples: int = 1
    runs: MetaRuns = field(default_factory=MetaRuns)

    def shape(self, node: Node) -> Shape | None:
        """The shape, None where unknown, with None for a size that is unknown."""
        value = self.values.get(node, UNKNOWN)
        return tuple(value.shape) if isinstance(value, (Tensor, Partial)) else None

    def dtype(self, node: Node) -> torch.dtype | None:
        """The dtype, None where unknown; an exported graph says it of every tensor."""
        value = self.values.get(node, UNKNOWN)
        if not isinstance(value, (Tensor, Partial)):
            value = node.meta.get("val")
        return value.dtype if isinstance(value, (Tensor, Partial)) else None

    def rank(self, node: Node) -> int | None:
        """The number of axes, None where unknown."""
        shape = self.shape(node)
        return None if shape is None else len(shape)

    def size(self, node: Node, axis: int) -> int | None:
        """The size on `axis`, counted from the end; None where unknown or absent."""
        shape = self.shape(node)
        return None if shape is None or -axis > len(shape) else shape[axis]

    def lasting_size(self, node: Node, axis: int) -> int | None:
        """The size on `axis`, if inputs of other sizes do not change it.

        A size that follows the input's may be one there, and then a constant that
        lines up with it broadcasts the value. The channels of an image are given.
        """
        size = self.size(node, axis)
        others = (facts.size(node, axis) for facts in self.elsewhere)
        return size if all(other in (None, size) for other in others) else None

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


def parameters_of(node: Node, module: GraphModule) -> Iterator[Tensor]:
    """What a node computes with: its module's parameters, and tensors that it reads."""
    if node.op == "call_module":
        yield from module.get_submodule(str(node.target)).parameters()
    for source in node.all_input_nodes:
        value = fetch(module, str(source.target)) if source.op == "get_attr" else None
        if isinstance(value, Tensor):
            yield value


def gather(
    module: GraphModule,
    example_inputs: Sequence[object] | None,
    exact: Mapping[str, Tensor],
    frozen: frozenset[str],
    baked: frozenset[str],
) -> Facts:
    """Facts of every node of `module`, by evaluation on meta tensors where possible."""
    exampled = example_inputs is not None
    facts = Facts(module, exact, {}, frozen, baked, exampled=exampled)
    inputs = _widened(example_inputs) if example_inputs is not None else []
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if _is_batch(leaf)]
    facts.samples = sizes[0] if sizes else 1
    _fill(facts, inputs)
    for other in (*_rebatched(inputs), *_enlarged(inputs)):
        facts.elsewhere += (_shadow(facts, other),)
    if facts.elsewhere and _lost(facts, facts.elsewhere[-1]):
        facts.elsewhere += tuple(_shadow(facts, o) for o in _one_by_one(inputs))
    return facts


def _shadow(facts: Facts, inputs: Sequence[object]) -> Facts:
    """The facts for other inputs."""
    made = replace(facts, values={}, elsewhere=())
    _fill(made, inputs)
    return made


def _lost(facts: Facts, shadow: Facts) -> bool:
    """Whether a value that has a shape has none for the other sizes."""
    return any(shadow.shape(n) is None for n in facts.values if facts.shape(n))


@torch.no_grad()
def _fill(facts: Facts, inputs: Sequence[object]) -> None:
    given = iter(inputs)
    for node in facts.module.graph.nodes:
        if node.op == "placeholder":
            facts.values[node] = next(given, _default(node))
        else:
            facts.values[node] = _evaluate(node, facts)


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


def _rebatched(inputs: Sequence[object]) -> list[list[object]]:
    """The inputs with one sample, and with more than there were.

    A constant may happen to be as long as the batch.
    """
    if not any(_is_batch(leaf) for leaf in pytree.tree_leaves(inputs)):
        return []
    return [_scaled(inputs, {0: factor}) for factor in (0, 3)]


def _enlarged(inputs: Sequence[object]) -> list[list[object]]:
    """The inputs with the axes behind the channels enlarged, if they have any.

    All alike, for models that take squares only, and each by another factor; and by
    one, which two strided windows may tell apart. Which axis of three holds the
    channels is not known: each of the two is enlarged. Of several inputs each may be
    broadcast against the others: its sizes are one then.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if _is_tensor(leaf)]
    ranks = {leaf.dim() for leaf in tensors}
    found: list[list[object]] = []
    if len(tensors) > 1:
        found += [_scaled(inputs, {0: 0, 2: 0, 3: 0, 4: 0}, only=t) for t in tensors]
    if max(ranks, default=0) > 2:
        found.append(_scaled(inputs, {2: 2, 3: 2, 4: 2}))
    if 3 in ranks:
        found.append(_scaled(inputs, {1: 2}, rank=3))
    if max(ranks, default=0) > 2:
        found.append(_scaled(inputs, {}, more=1))
    if max(ranks, default=0) > 3:
        found.append(_scaled(inputs, {2: 2, 3: 3, 4: 5}))
    return found


def _one_by_one(inputs: Sequence[object]) -> list[list[object]]:
    """Each axis behind the channels alone: a model may fix one and leave another."""
    ranks = [leaf.dim() for leaf in pytree.tree_leaves(inputs) if _is_tensor(leaf)]
    axes = range(2, max(ranks, default=0))
    return [_scaled(inputs, {axis: 2}) for axis in axes] if len(axes) > 1 else []


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def _is_batch(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 1


def _scaled(
    inputs: Sequence[object],
    factors: Mapping[int, int],
    rank: int | None = None,
    only: Tensor | None = None,
    more: int = 0,
) -> list[object]:
    """Inputs whose axes are longer by these factors; by none, they are one.

    `more`: by how many those behind the channels are longer.
    """

    def scale(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or rank not in (None, leaf.dim()):
            return leaf
        if only is not None and leaf is not only:
            return leaf
        sizes = [
            (factors.get(a, 1) * size or 1) + (more if a > 1 else 0)
            for a, size in enumerate(leaf.shape)
        ]
        return leaf.new_empty(sizes)

    return [pytree.tree_map(scale, value) for value in inputs]


_OPERANDS = ("input", "weight", "other")


def _evaluate(node: Node, facts: Facts) -> Any:
    if node.op == "get_attr":
        value = fetch(facts.module, str(node.target))
        return to_meta(value) if isinstance(value, Tensor) else value
    if node.op == "output":
        return UNKNOWN
    known: Any = map_arg(node.args, lambda n: facts.values.get(n, UNKNOWN))
    named: Any = map_arg(node.kwargs, lambda n: facts.values.get(n, UNKNOWN))
    leaves = pytree.tree_leaves((known, named))
    operands = (*known, *(named[key] for key in _OPERANDS if key in named))
    first = operands[0] if operands else UNKNOWN
    called = facts.submodule(node) if node.op == "call_module" else None
    if _keeps_shape(node, called) and isinstance(first, (Tensor, Partial)):
        return first if _takes(node, called, first.shape) else UNKNOWN
    if any(isinstance(leaf, (Unknown, Partial)) for leaf in leaves):
        return partial(node, called, operands)
    result = facts.runs.run(node, called, known, named)
    return UNKNOWN if _rank_hangs_on_sizes(node, first, result) else result


def _rank_hangs_on_sizes(node: Node, before: Any, after: Any) -> bool:
    """A squeeze that finds no axis of size one here will find one in another input."""
    if op_name(node) != "squeeze" or not isinstance(before, Tensor):
        return False
    return isinstance(after, Tensor) and after.dim() == before.dim()


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
    "group_norm neg cpu cuda".split()
)


def _takes(node: Node, called: Any, shape: Sequence[int | None]) -> bool:
    """Whether a norm has as many weights as the value has channels, where both show."""
    if called is not None:
        last = getattr(called, "normalized_shape", ())
        channels = getattr(
            called, "num_features", getattr(called, "num_channels", None)
        )
    else:
        given = (
            node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
        )
        last = given if op_name(node) == "layer_norm" else ()
        channels = None
    known = last if isinstance(last, (tuple, list)) else ()
    trailing = shape[len(shape) - len(known) :] if known else ()
    pairs = [*zip(known, trailing)]
    pairs += [(channels, shape[1])] if channels and len(shape) > 1 else []
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _keeps_shape(node: Node, called: nn.Module | None) -> bool:
    if called is not None:
        return type(called) in _ELEMENTWISE_MODULES
    return op_name(node) in _ELEMENTWISE_NAMES
