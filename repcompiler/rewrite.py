"""The rewritten graph as a module: regions put in, dead nodes out, names settled."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from repcompiler.facts import Facts, fetch, parameters_of
from repcompiler.inplace import restore_writes
from repcompiler.lower import CHANNELS_LAST, Emitter, Target
from repcompiler.mutation import is_write
from repcompiler.opening import Opened, close_norms
from repcompiler.regions import Rewrite, assemble


@dataclass(frozen=True)
class Rewritten:
    """The new module, and for each region the names of what was put in.

    `nodes` are the names in its graph, `added` what they call.
    """

    module: GraphModule
    added: Mapping[Node, tuple[str, ...]]
    removed: frozenset[Node]
    nodes: Mapping[Node, tuple[str, ...]]


def rewrite(
    module: GraphModule,
    regions: Sequence[Rewrite],
    facts: Facts,
    *,
    opened: Mapping[Node, Opened] | None = None,
    dtype: torch.dtype | None = None,
) -> Rewritten:
    """A new module in which each region's value is computed from its meaning.

    Nothing of `module` is changed or shared: what stays is copied. With `dtype` the
    whole is in that dtype (float64 for verification), otherwise in that of its layers.
    """
    draft = _copy_graph(module)
    for region in regions:
        tensors = [t for node in region.nodes for t in parameters_of(node, module)]
        _insert(draft, region, tensors, _target(region, tensors, facts, dtype))
    _drop_dead(draft.graph)
    close_norms(draft.graph, opened or {}, draft.twins)
    _drop_dead(draft.graph)
    _relax_views(draft)
    names = _settle_names(draft.graph, draft.fresh)
    attributes = _copied(draft.graph, module, facts, dtype)
    attributes.update({name: draft.fresh[key] for key, name in names.items()})
    restore_writes(draft.graph, attributes)
    built = GraphModule(assemble(attributes), draft.graph, type(module).__name__)
    living = set(draft.graph.nodes)
    added = {
        value: tuple(_describe(node) for node in nodes if node in living)
        for value, nodes in draft.emitted.items()
    }
    named = {
        value: tuple(node.name for node in nodes if node in living)
        for value, nodes in draft.emitted.items()
    }
    gone = (n for n, twin in draft.twins.items() if twin not in living)
    return Rewritten(built, added, frozenset((*gone, *draft.emitted)), named)


# The parameters that a region computes with, by identity and in order.
Origin = tuple[int, ...]


@dataclass
class _Draft:
    """The graph under way, in which new modules have provisional names.

    Attributes:
        twins: from nodes of the captured graph to what computes their value here.
        fresh: new modules and tensors by provisional name.
        emitted: for each region's value, the nodes put in.
        begun: see `Emitter`.
        made_of: provisional names of what was made, by the parameters it was made of.
    """

    graph: Graph
    twins: dict[Node, Node]
    fresh: dict[str, nn.Module | Tensor]
    emitted: dict[Node, list[Node]]
    begun: dict[object, Node] = field(default_factory=dict[object, Node])
    made_of: dict[Origin, list[str]] = field(default_factory=dict[Origin, list[str]])

    def hold(self, origin: Origin, name: str, thing: nn.Module | Tensor) -> str:
        """Keep a new module or tensor; returns its provisional name.

        A layer that a model calls twice is made of the same parameters both times: it
        stays one layer, with one set of weights to store and to train.
        """
        twins = self.made_of.setdefault(origin, [])
        for key in twins if origin else ():
            if _same(self.fresh[key], thing):
                return key
        key = f"{name}#{len(self.fresh)}"
        self.fresh[key] = thing
        twins.append(key)
        return key


def _same(one: nn.Module | Tensor, other: nn.Module | Tensor) -> bool:
    """Whether two new things do the same, number by number."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        pairs: list[tuple[Any, Any]] = [(one, other)]
    elif repr(one) == repr(other):  # its kind and its geometry
        pairs = list(zip(one.state_dict().values(), other.state_dict().values()))
    else:
        return False
    return all(type(a) is type(b) and _same_numbers(a, b) for a, b in pairs)


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    like = (one.dtype, one.device, one.shape) == (
        other.dtype,
        other.device,
        other.shape,
    )
    return like and torch.equal(one, other)


def _copy_graph(module: GraphModule) -> _Draft:
    graph = Graph()
    twins: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, twins))
    graph._codegen = copy.deepcopy(module.graph._codegen)
    return _Draft(graph, twins, {}, {})


def _insert(
    draft: _Draft, region: Rewrite, tensors: Sequence[Tensor], target: Target
) -> None:
    """Compute a region's value from its meaning, and lead its readers there."""
    twin = draft.twins[region.value]
    hold = partial(draft.hold, tuple(map(id, tensors)))
    with draft.graph.inserting_before(twin):
        value_of = draft.twins.__getitem__
        emitter = Emitter(draft.graph, value_of, hold, target, draft.begun)
        value = emitter.emit(region.meaning, region.name)
    for node in emitter.added:
        node.meta.setdefault("nn_module_stack", twin.meta.get("nn_module_stack"))
    twin.replace_all_uses_with(value)
    draft.twins[region.value] = value
    draft.emitted[region.value] = emitter.added


def _target(
    region: Rewrite,
    tensors: Sequence[Tensor],
    facts: Facts,
    dtype: torch.dtype | None,
) -> Target:
    """The dtype, device and so on of the parameters that the region had."""
    floating = [t for t in tensors if t.is_floating_point()]
    known = facts.dtype(region.value)
    own = known or (floating[0].dtype if floating else torch.float32)
    device = floating[0].device if floating else torch.device("cpu")
    trainable = any(t.requires_grad for t in floating)
    return Target(
        dtype or own, device, trainable, any(map(_is_channels_last, floating))
    )


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether a kernel was laid out so; one that may be either says nothing."""
    layout = CHANNELS_LAST.get(tensor.dim())
    if layout is None or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=layout)


def _drop_dead(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            if not is_write(node):
                graph.erase_node(node)


def _relax_views(draft: _Draft) -> None:
    """A view becomes a reshape, which is the same wherever the view works.

    A fused op may lay its result out in memory in another way than the op that it
    replaces, and then a view may fail. Writes through views need the view itself.
    """
    nodes = list(draft.graph.nodes)
    if not draft.emitted or any(map(is_write, nodes)):
        return
    for node in nodes:
        if node.kwargs or any(isinstance(arg, torch.dtype) for arg in node.args):
            continue
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def _settle_names(graph: Graph, fresh: Mapping[str, Any]) -> dict[str, str]:
    """Final names: the place a module came from, or a child of it if that is taken."""
    taken = _Taken()
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and str(node.target) not in fresh:
            taken.add(str(node.target))
    names: dict[str, str] = {}
    for node in graph.nodes:
        key = str(node.target)
        if key in fresh and key not in names:
            names[key] = _free_name(key.split("#")[0], taken)
            taken.add(names[key])
        if key in names:
            node.target = names[key]
    return names


class _Taken:
    """Dotted names that are given, and what they are inside of."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names: set[str] = set()
        self.inside: set[str] = set()
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """Give a name."""
        self.names.add(name)
        self.inside.update(_outer(name))

    def clashes(self, name: str) -> bool:
        """Whether a name is given, is inside of one that is, or has one inside."""
        return name in self.inside or not self.names.isdisjoint((name, *_outer(name)))


def _outer(name: str) -> Iterator[str]:
    """`a` and `a.b` of `a.b.c`."""
    return itertools.accumulate(name.split(".")[:-1], "{}.{}".format)


def _free_name(wanted: str, taken: _Taken) -> str:
    """`wanted`, a child of it, or a sibling of it, whichever clashes with nothing."""
    return next(name for name in _proposals(wanted) if not taken.clashes(name))


def _proposals(wanted: str) -> Iterator[str]:
    """Names that say where they belong; without end, the last ones at the root."""
    parts = [part for part in wanted.split(".") if part]
    yield ".".join(parts)
    for attempt in itertools.count():
        suffix = f"fused_{attempt}" if attempt else "fused"
        yield ".".join([*parts, suffix])
        for depth in range(len(parts) - 1, -1, -1):
            yield ".".join([*parts[:depth], "_".join([*parts[depth:], suffix])])


def _copied(
    graph: Graph, module: GraphModule, facts: Facts, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Copies of what the graph still refers to, with ties among them kept."""
    memo: dict[int, Any] = {}
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        name = str(node.target)
        try:
            value = fetch(module, name)
        except AttributeError:
            continue  # a new one, which the caller adds
        if name not in found:
            found[name] = copy.deepcopy(value, memo)
    if dtype is not None:
        for name, value in found.items():
            if isinstance(value, nn.Module):
                value.to(dtype)
            elif name in facts.baked:
                continue
            elif isinstance(value, Tensor) and value.is_floating_point():
                exact = facts.exact.get(name, value)
                found[name] = exact.detach().to(value.device, dtype)
    return found


def _describe(node: Node) -> str:
    kind = {"call_module": "", "get_attr": ""}.get(node.op)
    if kind is not None:
        return str(node.target)
    return f"{getattr(node.target, '__name__', node.target)}"
