"""The graph after each stage, in a short stable text, for goldens and for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node, map_arg

from repcompiler.affine import Axis, Diagonal, Map, Meaning, Term, Transposed, Window
from repcompiler.facts import op_name
from repcompiler.lift import Affine, Alias, Bundle, Carry, Lifted, Stack
from repcompiler.state import State


def describe(state: State, stage: str) -> str:
    """What `stage` produced, one line a value."""
    return "\n".join(_WRITERS[stage](state)) + "\n"


def _captured(state: State) -> list[str]:
    return _graph(state.graph_module)


def _fused(state: State) -> list[str]:
    assert state.rewritten is not None
    return _graph(state.rewritten.module)


def _graph(module: GraphModule) -> list[str]:
    return [line for node in module.graph.nodes if (line := _node(node, module))]


def _node(node: Node, module: GraphModule) -> str:
    """`%name = op(args)`; constants are named where they are read."""
    if node.op == "get_attr":
        return ""
    if node.op == "placeholder":
        return f"%{node.name} = input"
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    given = [_argument(arg) for arg in node.args]
    given += [f"{key}={_argument(arg)}" for key, arg in node.kwargs.items()]
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        return f"%{node.name} = {leaf_text(leaf)} @{node.target} ({', '.join(given)})"
    return f"%{node.name} = {op_name(node)}({', '.join(given)})"


def leaf_text(leaf: nn.Module) -> str:
    """The class, and for convs and linear layers their geometry."""
    name = type(leaf).__name__
    if isinstance(leaf, nn.Linear):
        return f"{name}[{leaf.in_features}→{leaf.out_features}]"
    if not isinstance(leaf, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return name
    groups = f" /{leaf.groups}" if leaf.groups > 1 else ""
    taps = "x".join(str(size) for size in leaf.kernel_size)
    text = f"{name}[{leaf.in_channels}→{leaf.out_channels}{groups} {taps}"
    for letter, values, usual in (
        ("s", leaf.stride, 1),
        ("d", leaf.dilation, 1),
        ("p", leaf.padding, 0),
    ):
        if any(value != usual for value in values):
            text += f" {letter}{','.join(str(value) for value in values)}"
    return text + "]"


def _argument(arg: Any) -> str:
    def name(node: Node) -> str:
        return f"@{node.target}" if node.op == "get_attr" else f"%{node.name}"

    return str(map_arg(arg, name)).replace("'", "")


def _lifted(state: State) -> list[str]:
    assert state.lifted is not None
    rows = ((node, _meaning_of(own)) for node, own in state.lifted.items())
    return [f"%{node.name} = {text}" for node, text in rows if text]


def _meaning_of(own: Lifted) -> str:
    if isinstance(own, Affine):
        parts = [f"{map_text(map)} %{source.name}" for source, map in own.parts]
        return " + ".join([*parts, *(["b"] if own.bias is not None else [])])
    if isinstance(own, Carry):
        return f"view %{own.source.name}"
    if isinstance(own, Stack):
        return f"[{'; '.join(f'%{part.name}' for part in own.parts)}]"
    if isinstance(own, Bundle):
        return f"blocks of %{own.source.name}"
    if isinstance(own, Alias):
        return f"%{own.source.name}"
    return f"kept: {own.reason.code}" if own.reason is not None else ""


def _composed(state: State) -> list[str]:
    assert state.composed is not None
    return [
        f"%{node.name} = {meaning_text(meaning)}"
        for node, meanings in state.composed.candidates.items()
        for meaning in meanings
    ]


def _selected(state: State) -> list[str]:
    return [
        f"{region.name} ({region.kind}): "
        f"%{region.value.name} = {meaning_text(region.meaning)}"
        for region in state.regions
    ]


def meaning_text(meaning: Meaning) -> str:
    """`conv[8→8 /8 3x3 p1] %x + %y + b`"""
    parts = [_term(term) for term in meaning.terms]
    return " + ".join([*parts, *(["b"] if meaning.bias is not None else [])])


def _term(term: Term) -> str:
    views = [f"%{step.node.name}·" for step in (*term.after[::-1],)]
    before = [f"·%{step.node.name}" for step in (*term.before[::-1],)]
    rows = f"[{term.rows.start}:{term.rows.stop}] = " if term.rows else ""
    map = f"{''.join(views)}{map_text(term.map)}{''.join(before)}"
    return f"{rows}{map} %{term.source.name}"


def map_text(map: Map) -> str:
    """A map's geometry, without its numbers."""
    if isinstance(map, Diagonal):
        return "1" if map.is_identity else f"scale[{map.channels or 'all'}]"
    groups = f" /{map.groups}" if map.groups > 1 else ""
    channels = f"{map.in_channels}→{map.out_channels}{groups}"
    if isinstance(map, Transposed):
        return f"transposed[{channels} {'x'.join(str(g[4]) for g in map.geometry)}]"
    return f"{'conv' if map.axes else 'linear'}[{channels}{_window(map)}]"


def _window(map: Window) -> str:
    if not map.axes:
        return ""
    fields: list[tuple[str, Callable[[Axis], object], object]] = [
        ("s", lambda a: a.stride, 1),
        ("d", lambda a: a.step, 1),
        ("p", lambda a: a.pad_low if a.pad_low == a.pad_high else _pads(a), 0),
    ]
    text = " " + "x".join(str(axis.taps) for axis in map.axes)
    for letter, read, usual in fields:
        values = [read(axis) for axis in map.axes]
        if any(value != usual for value in values):
            same = len(set(map_values := [str(v) for v in values])) == 1
            text += f" {letter}" + (map_values[0] if same else ",".join(map_values))
    return text + ("" if map.mode == "zeros" else f" {map.mode}")


def _pads(axis: Axis) -> str:
    return f"({axis.pad_low},{axis.pad_high})"


_WRITERS: dict[str, Callable[[State], list[str]]] = {
    "capture": _captured,
    "lift": _lifted,
    "compose": _composed,
    "select": _selected,
    "lower": _fused,
}
