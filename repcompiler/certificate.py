"""What `fuse` claims about each region, in a form that other code can check.

For each region: the nodes of the captured graph that it replaced, the ops that it put
in their place, the fingerprints of every number on either side, the exactness found,
and a bound on the rounding error. `certify` checks it from the two models and knows
nothing of how the compiler got there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from repcompiler.certify import FORMAT, digest, fingerprint
from repcompiler.certops import FUNCTIONS, bound_of
from repcompiler.facts import fetch
from repcompiler.operators import PADS
from repcompiler.regions import Rewrite, fused_form
from repcompiler.state import State

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def certificate(state: State) -> dict[str, Any]:
    """The certificate of a finished pipeline."""
    assert state.captured is not None and state.equivalence is not None
    document: dict[str, Any] = {
        "format": FORMAT,
        "capture": state.captured.door,
        "sizes": _sizes(state),
        "regions": [_region(region, state) for region in state.regions],
        "equivalence": state.equivalence.to_dict(),
    }
    return {**document, "digest": digest(document)}


def _sizes(state: State) -> list[list[int | None]]:
    """The sizes of the inputs that sizes in layout ops follow from."""
    assert state.facts is not None
    nodes = [n for n in state.graph_module.graph.nodes if n.op == "placeholder"]
    return [list(state.facts.shape(node) or ()) for node in nodes]


def _region(region: Rewrite, state: State) -> dict[str, Any]:
    assert state.facts is not None
    sizes = [state.facts.shape(source) for source in region.meaning.sources]
    known = [[n for n in size if n is not None] for size in sizes if size is not None]
    ranks = [-1 if size is None else len(size) for size in sizes]
    tensors = _added(region, state)
    dtype = next((t.dtype for t in tensors.values()), torch.float32)
    bound = None
    try:
        ops = _ops(region, state) if list(map(len, known)) == ranks else None
        if ops is not None:
            bound = bound_of(ops, tensors, dtype, known)
    except (NotImplementedError, ValueError):
        ops = None  # sizes known at run time only, or too large to run again
    return {
        "name": region.name,
        "kind": region.kind,
        "reference": {
            "value": region.value.name,
            "sources": [source.name for source in region.meaning.sources],
            "nodes": [node.name for node in region.nodes],
            "tensors": {
                k: fingerprint(v) for k, v in _originals(region, state).items()
            },
        },
        "candidate": {
            "ops": ops,
            "tensors": {name: fingerprint(value) for name, value in tensors.items()},
        },
        "axis": region.meaning.axis,
        "dtype": str(dtype).removeprefix("torch."),
        "exactness": state.exactness.get(region.value),
        "bound": bound,
    }


def _originals(region: Rewrite, state: State) -> dict[str, Tensor]:
    """Every tensor of the captured graph that the region's nodes read."""
    module = state.graph_module
    found: dict[str, Tensor] = {}
    for node in region.nodes:
        if node.op == "call_module":
            leaf = module.get_submodule(str(node.target))
            for name, value in leaf.state_dict().items():
                found[f"{node.target}.{name}"] = value
        for source in node.all_input_nodes:
            value = fetch(module, str(source.target)) if source.op == "get_attr" else 0
            if isinstance(value, Tensor):
                found[str(source.target)] = value
    return found


def _added(region: Rewrite, state: State) -> dict[str, Tensor]:
    """The tensors that the region put into the fused model, by their name there."""
    assert state.rewritten is not None
    fused = state.rewritten.module
    nodes = {node.name: node for node in fused.graph.nodes}
    found: dict[str, Tensor] = {}
    for name in state.rewritten.nodes[region.value]:
        target = str(nodes[name].target)
        if nodes[name].op == "get_attr":
            found[target] = fetch(fused, target)
        elif nodes[name].op == "call_module":
            held = fused.get_submodule(target).state_dict()
            found |= {f"{target}.{key}": value for key, value in held.items()}
    return found


def _ops(region: Rewrite, state: State) -> list[dict[str, Any]]:
    """What replaces the region, op by op; operands are `s0` (source) or `o0` (op).

    Raises:
        NotImplementedError: an argument is no plain value.
    """
    assert state.facts is not None and state.rewritten is not None
    form = fused_form(region, state.graph_module, state.facts)
    nodes = [n for n in form.graph.nodes if n.op not in ("placeholder", "output")]
    names = state.rewritten.added[region.value]
    if len(nodes) != len(names) or region.unread:
        raise NotImplementedError
    labels = {
        node: f"s{index}"
        for index, node in enumerate(
            n for n in form.graph.nodes if n.op == "placeholder"
        )
    }
    ops: list[dict[str, Any]] = []
    for node, name in zip(nodes, names):
        ops.append(_op(node, name, form, labels))
        labels[node] = f"o{len(ops) - 1}"
    return ops


def _op(
    node: Node, name: str, form: GraphModule, labels: Mapping[Node, str]
) -> dict[str, Any]:
    if node.op == "get_attr":
        return {"op": "constant", "constant": name}
    args = [_plain(arg, labels) for arg in node.args]
    kwargs = {key: _plain(value, labels) for key, value in node.kwargs.items()}
    if node.op == "call_module":
        return _layer(form.get_submodule(str(node.target)), name, args)
    target = _function_name(node)
    if target not in FUNCTIONS:
        raise NotImplementedError
    return {"op": target, "args": args, "kwargs": kwargs}


def _function_name(node: Node) -> str:
    """The name that torch, the method and ATen have in common."""
    if isinstance(node.target, OpOverload):
        return node.target.overloadpacket.__name__
    return str(getattr(node.target, "__name__", node.target))


def _layer(layer: nn.Module, name: str, args: list[Any]) -> dict[str, Any]:
    pooled = _weightless(layer, args)
    if pooled is not None:
        return pooled
    row: dict[str, Any] = {"args": args, "weight": f"{name}.weight", "bias": None}
    if getattr(layer, "bias", None) is not None:
        row["bias"] = f"{name}.bias"
    if isinstance(layer, nn.Linear):
        return {"op": "linear", **row}
    if not isinstance(layer, (*_CONVS, *_TRANSPOSED)):
        raise NotImplementedError
    spread = isinstance(layer, _TRANSPOSED)
    row |= {
        "op": f"conv{'_transpose' if spread else ''}{layer.weight.dim() - 2}d",
        "stride": list(layer.stride),
        "padding": [int(p) for p in layer.padding],
        "dilation": list(layer.dilation),
        "groups": layer.groups,
        "mode": layer.padding_mode,
    }
    if spread:
        row["output_padding"] = list(layer.output_padding)
    return row


def _weightless(layer: nn.Module, args: list[Any]) -> dict[str, Any] | None:
    """A layout op, a mean or a resize that is written as a module."""
    rest: list[Any] | None = None
    kwargs: dict[str, Any] = {}
    name = type(layer).__name__
    if isinstance(layer, nn.Flatten):
        name, rest = "flatten", [layer.start_dim, layer.end_dim]
    elif isinstance(layer, nn.Unflatten):
        name, rest = "unflatten", [layer.dim, list(layer.unflattened_size)]
    elif isinstance(layer, _ADAPTIVE):
        name, rest = f"adaptive_avg_pool{name[-2]}d", [_plain(layer.output_size, {})]
    elif isinstance(layer, nn.Upsample):
        name, rest = "interpolate", []
        keys = ("size", "scale_factor", "mode", "align_corners")
        kwargs = {key: _plain(getattr(layer, key), {}) for key in keys}
    elif type(layer) in PADS:
        kwargs = PADS[type(layer)](layer)
        name, rest = "pad", [_plain(kwargs.pop("pad"), {})]
    if rest is None:
        return None
    return {"op": name, "args": [*args, *rest], "kwargs": kwargs}


def _plain(arg: Any, labels: Mapping[Node, str]) -> Any:
    if isinstance(arg, Node):
        if arg not in labels:
            raise NotImplementedError
        return labels[arg]
    if isinstance(arg, (list, tuple)):
        return [_plain(item, labels) for item in arg]
    if arg is None or isinstance(arg, (int, float, str)):
        return arg
    raise NotImplementedError
