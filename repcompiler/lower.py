"""Build what was chosen: kernels, modules and the rewritten graph.

The only stage that builds or mutates anything. A meaning becomes ordinary convs, linear
layers and sums: trainable, exportable, quantisable. Kernels are computed in float64 and
rounded once, to the dtype of the layer they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from repcompiler import blocks, kernels
from repcompiler.affine import (
    Axis,
    Diagonal,
    Meaning,
    Step,
    Term,
    Transposed,
    Window,
)
from repcompiler.cost import needs_pad

Holder = Callable[[str, nn.Module | Tensor], str]
ValueOf = Callable[[Node], Any]

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_PAD_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by rank


@dataclass(frozen=True)
class Target:
    """The dtype, device, gradient setting and memory format of new parameters."""

    dtype: torch.dtype = torch.float64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    trainable: bool = True
    channels_last: bool = False


@dataclass
class Emitter:
    """Emits meanings into a graph.

    Attributes:
        graph: where nodes go, at the current insertion point.
        value_of: from a node of the captured graph to its counterpart in `graph`.
        hold: registers a module or tensor under about this name; returns its real name.
        target: dtype and device of new parameters.
        begun: what was done to sources before a map, by source and steps, which other
            meanings can go on from.
    """

    graph: Graph
    value_of: ValueOf
    hold: Holder
    target: Target
    begun: dict[object, Node] = field(default_factory=dict[object, Node])
    added: list[Node] = field(default_factory=list[Node])

    def emit(self, meaning: Meaning, name: str) -> Node:
        """The node that computes `meaning`; new modules are named after `name`."""
        parts, whole = blocks.partition(meaning)
        if not parts:
            return self._sum(meaning, name)
        values = [self._sum(part, name) for part in parts]
        total = self._call(torch.cat, (values, meaning.axis))
        for term in whole:
            part = self._term(term, None, meaning, name)
            total = self._call(torch.add, (total, part))
        return total

    def _sum(self, meaning: Meaning, name: str) -> Node:
        bias = None if meaning.bias is None else meaning.bias.value()
        bearer = _bias_bearer(meaning)
        parts: list[Node] = []
        for term in meaning.terms:
            own = bias if term is bearer else None
            parts.append(self._term(term, own, meaning, name))
        total = parts[0]
        for part in parts[1:]:
            total = self._call(torch.add, (total, part))
        if bias is not None and bearer is None:
            total = self._shift(total, bias, meaning, name)
        return total

    def _term(
        self, term: Term, bias: Tensor | None, meaning: Meaning, name: str
    ) -> Node:
        value = self._begin(term)
        if isinstance(term.map, Diagonal):
            value = self._diagonal(term.map, value, bias, meaning, name)
        elif isinstance(term.map, Window):
            value = self._window(term.map, value, bias, name)
        else:
            module = transposed_module(term.map, bias, self.target)
            value = self._module(name, module, value)
        for step in term.after:
            value = self._step(step, value)
        return value

    def _begin(self, term: Term) -> Node:
        """The source, and the steps before the map; done once for all that need it."""
        value = cast(Node, self.value_of(term.source))
        for place, step in enumerate(term.before, start=1):
            key = (term.source, term.before[:place])
            if key not in self.begun:
                self.begun[key] = self._step(step, value)
            elif self.begun[key] not in self.added:
                self.added.append(self.begun[key])
            value = self.begun[key]
        return value

    def _window(
        self, window: Window, value: Node, bias: Tensor | None, name: str
    ) -> Node:
        if needs_pad(window) and not _module_pads(window):
            for widths in pads_of(window.axes):
                value = self._call(F.pad, (value, widths, _PAD_MODES[window.mode]))
        return self._module(name, window_module(window, bias, self.target), value)

    def _diagonal(
        self,
        map: Diagonal,
        value: Node,
        bias: Tensor | None,
        meaning: Meaning,
        name: str,
    ) -> Node:
        if map.scale is None:
            return value
        axis = map.axis if map.axis is not None else meaning.axis
        scale = self._vector(map.scale.value(), axis, f"{name}.scale")
        if bias is None:
            return self._call(torch.mul, (value, scale))
        shift = self._vector(bias, axis, f"{name}.bias")
        return self._call(torch.addcmul, (shift, value, scale))

    def _shift(self, value: Node, bias: Tensor, meaning: Meaning, name: str) -> Node:
        shift = self._vector(bias, meaning.axis, f"{name}.bias")
        return self._call(torch.add, (value, shift))

    def _vector(self, vector: Tensor, axis: int | None, name: str) -> Node:
        """A constant that lines up with the channel axis."""
        if vector.dim() and axis is not None:
            vector = vector.reshape(-1, *([1] * (-axis - 1)))
        tensor = parameter(vector, self.target)
        return self._track(self.graph.get_attr(self.hold(name, tensor)))

    def _module(self, name: str, module: nn.Module, value: Node) -> Node:
        return self._track(self.graph.call_module(self.hold(name, module), (value,)))

    def _step(self, step: Step, value: Node) -> Node:
        if step.pick is not None:
            axis, block = step.pick
            return self._call(torch.narrow, (value, axis, block.start, block.size))
        args = (value, *(self._translate(arg) for arg in step.node.args[1:]))
        kwargs = {key: self._translate(arg) for key, arg in step.node.kwargs.items()}
        return self._track(
            self.graph.create_node(step.node.op, step.node.target, args, kwargs)
        )

    def _translate(self, arg: Any) -> Any:
        return torch.fx.map_arg(arg, self.value_of)

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        return self._track(self.graph.call_function(function, args))

    def _track(self, node: Node) -> Node:
        self.added.append(node)
        return node


def pads_of(axes: Sequence[Axis]) -> list[list[int]]:
    """The arguments of `F.pad`, the last axis first.

    What is added at one end and cut at the other is added first: `F.pad` cuts first,
    and a small input may have too little then.
    """
    widths = [w for axis in reversed(axes) for w in (axis.pad_low, axis.pad_high)]
    if any(axis.pad_low * axis.pad_high < 0 for axis in axes):
        return [[max(w, 0) for w in widths], [min(w, 0) for w in widths]]
    return [widths] if any(widths) else []


def _bias_bearer(meaning: Meaning) -> Term | None:
    """The term whose op takes the bias for free: a conv, else a per-channel scale."""
    scales: list[Term] = []
    for term in meaning.terms:
        if not isinstance(term.map, Diagonal):
            return term
        if not term.map.is_identity:
            scales.append(term)
    return scales[0] if scales else None


def parameter(tensor: Tensor, target: Target) -> nn.Parameter:
    """The tensor rounded once, to the target's dtype, as a parameter of its own.

    A kernel may be a weight of the model itself, untouched; it is never shared.
    """
    rounded = tensor.to(dtype=target.dtype, device=target.device, copy=True)
    layout = torch.contiguous_format
    if target.channels_last:
        layout = CHANNELS_LAST.get(rounded.dim(), layout)
    laid_out = rounded.contiguous(memory_format=layout)
    return nn.Parameter(laid_out, requires_grad=target.trainable)


def _module_pads(window: Window) -> bool:
    """Whether nn.ConvNd can pad this way by itself: the same on both sides."""
    return all(axis.pad_low == axis.pad_high >= 0 for axis in window.axes)


def window_module(window: Window, bias: Tensor | None, target: Target) -> nn.Module:
    """An nn.ConvNd, or an nn.Linear where there are no spatial axes."""
    bias = None if bias is None else bias.expand(window.out_channels)
    if not window.axes:
        dense = kernels.regroup(window.kernel(), window.groups, 1)
        linear = _empty(nn.Linear, window.in_channels, window.out_channels)
        return _fill(linear, dense, bias, target)
    padding = [0] * len(window.axes)
    if _module_pads(window):
        padding = [axis.pad_low for axis in window.axes]
    module = _empty(
        _CONVS[len(window.axes)],
        window.in_channels,
        window.out_channels,
        kernel_size=[axis.taps for axis in window.axes],
        stride=[axis.stride for axis in window.axes],
        padding=padding,
        dilation=[axis.step for axis in window.axes],
        groups=window.groups,
        padding_mode=window.mode if any(padding) else "zeros",
    )
    return _fill(module, window.kernel(), bias, target)


def transposed_module(
    map: Transposed, bias: Tensor | None, target: Target
) -> nn.Module:
    """An nn.ConvTransposeNd."""
    columns = [list(column) for column in zip(*map.geometry)]
    stride, padding, output_padding, dilation, taps = columns
    module = _empty(
        _TRANSPOSED[len(map.geometry)],
        map.in_channels,
        map.out_channels,
        kernel_size=taps,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        groups=map.groups,
        dilation=dilation,
    )
    bias = None if bias is None else bias.expand(map.out_channels)
    return _fill(module, map.kernel(), bias, target)


def _empty(kind: Callable[..., nn.Module], *args: Any, **settings: Any) -> nn.Module:
    """A module without storage, so that no initialiser draws or touches numbers."""
    pairs = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    with torch.device("meta"):
        return kind(*args, bias=False, **pairs)


def _fill(
    module: nn.Module, weight: Tensor, bias: Tensor | None, target: Target
) -> nn.Module:
    module.register_parameter("weight", parameter(weight, target))
    given = None if bias is None else parameter(bias, target)
    module.register_parameter("bias", given)
    return module.eval()
