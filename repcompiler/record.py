"""From the state of a finished pipeline to the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repcompiler.affine import Diagonal, Refusal, Transposed, Window
from repcompiler.counting import LAYOUT_OPS, count
from repcompiler.facts import op_name
from repcompiler.lift import NORMS, Affine, Carry, Opaque, Stack, op_label
from repcompiler.reasons import Reason
from repcompiler.regions import Rewrite, module_path
from repcompiler.report import (
    Change,
    FuseReport,
    Kept,
    OpCount,
    Region,
    RegionNode,
    VerifyReport,
)
from repcompiler.state import State


def make_report(state: State) -> FuseReport:
    """Everything the pipeline learnt, as plain data."""
    assert state.captured is not None and state.rewritten is not None
    model = state.model
    module = (
        model.module() if isinstance(model, torch.export.ExportedProgram) else model
    )
    before, macs_before = count(module, state.inputs)
    after, macs_after = count(state.rewritten.module, state.inputs)
    known = state.inputs is not None
    built = {node.name: node for node in state.rewritten.module.graph.nodes}
    seconds = dict(state.seconds)
    stages = ("lift", "compose", "select", "lower")
    seconds["fuse"] = sum(seconds.get(stage, 0.0) for stage in stages)
    return FuseReport(
        capture=state.captured.door,
        ops=OpCount(
            before.total() if known else None,
            after.total() if known else None,
            dict(before.most_common()),
            {"convolution": 0, "batch_norm": 0, **dict(after.most_common())},
        ),
        params=Change(_parameters(module), _parameters(state.rewritten.module)),
        macs=Change(macs_before if known else None, macs_after if known else None),
        regions=tuple(_region(region, built, state) for region in state.regions),
        kept=tuple(_kept(state)),
        equivalence=state.equivalence or VerifyReport(False, "not checked"),
        seconds=seconds,
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- regions -----------------------------------------------------------------------


def _region(region: Rewrite, built: Mapping[str, Node], state: State) -> Region:
    assert state.rewritten is not None
    gone = [n for n in region.nodes if n in state.rewritten.removed]
    added = state.rewritten.added[region.value]
    calls = [built[n] for n in state.rewritten.nodes[region.value] if n in built]
    return Region(
        name=region.name,
        kind=region.kind,
        removed=tuple(node_name(node, state) for node in gone),
        added=added,
        exactness=state.exactness.get(region.value),
        ops=Change(sum(_computes(n, state) for n in gone), sum(map(_runs, calls))),
        params=Change(_node_parameters(gone, state), _added_parameters(region, state)),
        macs=Change(_node_macs(gone, state), _meaning_macs(region, state)),
        graph=_graph(region, set(gone), state),
    )


def _runs(node: Node) -> bool:
    """Whether an op that was added computes: views and what is only read do not."""
    if node.op == "call_module":
        return True
    return node.op.startswith("call_") and op_name(node) not in VIEWS


# Of the names of `counting` and of torch, those that a rewrite may add.
VIEWS = LAYOUT_OPS | frozenset(
    "narrow getitem flatten movedim moveaxis swapaxes swapdims size".split()
)


def _graph(region: Rewrite, gone: set[Node], state: State) -> tuple[RegionNode, ...]:
    """What computed the region's value before: sources, then nodes in order."""
    assert state.facts is not None
    nodes = (*region.meaning.sources, *region.nodes)
    places = {node: place for place, node in enumerate(nodes)}
    rows: list[RegionNode] = []
    for node in nodes:
        source = node not in region.nodes
        inputs = (
            ()
            if source
            else tuple(places[i] for i in node.all_input_nodes if i in places)
        )
        role = "source" if source else "removed" if node in gone else "stays"
        name = module_path(node) or node.name
        rows.append(RegionNode(name, op_label(node, state.facts), inputs, role))
    return tuple(rows)


def node_name(node: Node, state: State) -> str:
    """`path: op` of a node, for people."""
    assert state.facts is not None
    path = module_path(node)
    label = op_label(node, state.facts)
    return f"{path}: {label}" if path else label


def _computes(node: Node, state: State) -> bool:
    assert state.composed is not None
    own = state.composed.lifted.get(node)
    if isinstance(own, Carry):  # a pool or a resize is an op, a view is none
        return own.step.computes
    known = isinstance(own, (Affine, Stack))
    return known and node not in state.parts_of_norms


def _node_parameters(nodes: Iterable[Node], state: State) -> int:
    seen: dict[int, Tensor] = {}
    module = state.graph_module
    for node in nodes:
        if node.op == "call_module":
            leaf = module.get_submodule(str(node.target))
            seen.update((id(p), p) for p in leaf.parameters())
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                value = _attribute(module, str(source.target))
                if isinstance(value, nn.Parameter):
                    seen[id(value)] = value
    return sum(parameter.numel() for parameter in seen.values())


def _attribute(module: GraphModule, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _added_parameters(region: Rewrite, state: State) -> int:
    assert state.rewritten is not None
    module = state.rewritten.module
    total = 0
    for name in state.rewritten.added[region.value]:
        try:
            value = _attribute(module, name)
        except AttributeError:
            continue
        if isinstance(value, nn.Module):
            total += _parameters(value)
        elif isinstance(value, Tensor):
            total += value.numel()
    return total


def _node_macs(nodes: Iterable[Node], state: State) -> int | None:
    assert state.composed is not None and state.facts is not None
    total = 0
    for node in nodes:
        own = state.composed.lifted.get(node)
        if isinstance(own, Affine) and not own.weightless:
            for _, map in own.parts:
                if isinstance(map, Diagonal):
                    continue
                up = isinstance(map, Transposed)
                size = _size(node.all_input_nodes[0] if up else node, state)
                if size is None:
                    return None
                total += _macs(map, size)
    return total


def _macs(map: Window | Transposed, size: int) -> int:
    """MACs of a map with so many outputs, of a transposed one so many inputs."""
    channels = map.in_channels if isinstance(map, Transposed) else map.out_channels
    return size // channels * map.weights


def _meaning_macs(region: Rewrite, state: State) -> int | None:
    assert state.facts is not None
    total = 0
    for term in region.meaning.terms:
        map = term.map
        if isinstance(map, Diagonal):
            continue
        # The value where the map's own outputs, or a transposed map's inputs, are seen.
        at = term.after[0].node.all_input_nodes[0] if term.after else region.value
        if isinstance(map, Transposed):
            at = term.before[-1].node if term.before else term.source
        size, shape = _size(at, state), state.facts.shape(at)
        if size is None or shape is None:
            return None
        channels = shape[map.axis] if -map.axis <= len(shape) else None
        own = map.in_channels if isinstance(map, Transposed) else map.out_channels
        total += _macs(map, size // (channels or own) * own)
    return total


def _size(node: Node, state: State) -> int | None:
    """Numbers in the value for one sample; None without example inputs."""
    assert state.facts is not None
    shape = state.facts.shape(node)
    if shape is None or None in shape:
        return None
    return math.prod(size or 0 for size in shape[1:])


# ---- kept --------------------------------------------------------------------------

_TRANSPOSED = [
    f"{name}{n}d" for name in ("convtranspose", "conv_transpose") for n in (1, 2, 3)
]
_CONVS = ("conv1d", "conv2d", "conv3d", *_TRANSPOSED, "linear")
_ACCOUNTED = (*NORMS, "mul", "div", *_CONVS)


def _kept(state: State) -> Iterable[Kept]:
    """Affine ops that stayed next to something affine, and norms."""
    assert state.composed is not None and state.facts is not None
    assert state.rewritten is not None
    undone = {
        n: _why_undone(region, state) for region in state.undone for n in region.nodes
    }
    for node in state.graph_module.graph.nodes:
        if node in state.rewritten.removed or node.op in ("get_attr", "placeholder"):
            continue
        if node in state.parts_of_norms:
            continue
        label = op_label(node, state.facts)
        reason = _reason(node, label, undone, state)
        if reason is not None:
            name = module_path(node) or node.name
            yield Kept(name, label, reason.code, reason.sentence)
    yield from _kept_apart(state)


def _kept_apart(state: State) -> Iterable[Kept]:
    """Fused convs and linear layers that stayed apart from the affine op before them.

    Each stands for the ops it replaced, and goes by the name of its region.
    """
    assert state.composed is not None and state.facts is not None
    for region in state.regions:
        labels = [op_label(node, state.facts) for node in region.nodes]
        label = next((name for name in labels if name in _CONVS), None)
        if label is None or not any(
            isinstance(state.composed.lifted.get(source), Affine)
            for source in region.meaning.sources
        ):
            continue
        reason = _why_apart(region, state)
        if reason is not None:
            yield Kept(region.name, label, reason.code, reason.sentence)


def _why_apart(region: Rewrite, state: State) -> Reason | None:
    """What refused the source's own meaning, else why the plan does without it."""
    assert state.composed is not None and state.selected is not None
    for source in region.meaning.sources:
        if len(source.users) > 1 and source in state.selected.live:
            return Reason.OTHER_READER
    refusals = [r for n in region.nodes for r in state.composed.refusals.get(n, ())]
    refused = _first_refusal(refusals)
    dearer = any(node in state.selected.dearer for node in region.nodes)
    return refused or (Reason.DEARER if dearer else None)


def _why_undone(region: Rewrite, state: State) -> Reason:
    """Not equal, or nothing to check it on: without inputs no sizes may be known."""
    blind = state.facts is not None and not state.facts.exampled
    unrun = state.exactness[region.value] is None
    return Reason.UNKNOWN_SHAPE if blind and unrun else Reason.NOT_EQUAL


def _reason(
    node: Node, label: str, undone: Mapping[Node, Reason], state: State
) -> Reason | None:
    assert state.composed is not None and state.selected is not None
    own = state.composed.lifted.get(node, Opaque(Reason.MUTATED))
    norm = label in NORMS
    if node in undone:
        return undone[node]
    if isinstance(own, Opaque):
        known = state.facts is not None and state.facts.dtype(node)
        accounted = label in _ACCOUNTED and bool(norm or known or not state.inputs)
        told = accounted or own.reason in (Reason.HOOKED, Reason.CEIL_OR_COUNT)
        return own.reason if told else None
    refused = _first_refusal(state.composed.refusals.get(node, ()))
    if label in ("add", "sub"):  # branches of one source that could not be one
        return refused
    if label not in _ACCOUNTED or not isinstance(own, Affine):
        return None
    if refused is not None:
        return refused
    if node in state.selected.dearer:
        return _why_dearer(node, own, state)
    if not (norm or label in ("mul", "div")):
        return None
    return _refused_by_reader(node, state) or Reason.NO_NEIGHBOUR


def _first_refusal(refusals: Sequence[Refusal]) -> Reason | None:
    """The first that no example input would lift, else the first."""
    found = [refusal.reason for refusal in refusals]
    firm = [reason for reason in found if reason is not Reason.UNKNOWN_SHAPE]
    return next(iter(firm + found), None)


def _refused_by_reader(value: Node, state: State) -> Reason | None:
    """Why a reader of the value, or of a view of it, would not take it in."""
    assert state.composed is not None
    for user in value.users:
        for refusal in state.composed.refusals.get(user, ()):
            if value in refusal.nodes:
                return refusal.reason
        if isinstance(state.composed.lifted.get(user), Carry):
            found = _refused_by_reader(user, state)
            if found is not None:
                return found
    return None


def _why_dearer(node: Node, own: Affine, state: State) -> Reason:
    """Another reader needs the value in between, or merging costs more by itself."""
    assert state.selected is not None
    for source, _ in own.parts:
        if len(source.users) > 1 and source in state.selected.live:
            return Reason.OTHER_READER
    return Reason.DEARER
