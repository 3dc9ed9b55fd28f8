"""The rules for average pools and pads: windows without weights of their own."""

from __future__ import annotations

import torch
from torch.fx import Node

from repcompiler.affine import Axis, Step, Window
from repcompiler.lift import Affine, Carry, Lifted, Op, Opaque
from repcompiler.reasons import Reason
from repcompiler.rules import per_axis, same_float, static


def avg_pool(op: Op) -> Lifted:
    """A depthwise conv of equal taps, where every window divides by the same number.

    Where every window divides by as many numbers as it reads, its weights sum to one,
    and maps that act on one channel at a time pass through it, as through a mean.
    """
    spatial = int(op.args["spatial"])
    channels = op.facts.size(op.node, -(spatial + 1))
    kernel = op.get("kernel_size")
    stride = op.get("stride") or kernel
    padding = op.get("padding", 0)
    override = op.get("divisor_override")
    if not isinstance(op.input, Node) or not static(kernel, stride, padding, override):
        return Opaque()
    if channels is None or not same_float(op, op.input):
        return Opaque(Reason.UNKNOWN_SHAPE)
    taps, strides, pads = (per_axis(v, spatial) for v in (kernel, stride, padding))
    bordered = any(pad > 0 for pad in pads) and op.get("count_include_pad", True)
    averages = not bordered and not override
    axis = -(spatial + 1)
    step = Step(op.node, {axis: axis}, computes=True) if averages else None
    if op.get("ceil_mode", False) or (any(pads) and not bordered):
        return Carry(op.input, step) if step else Opaque(Reason.CEIL_OR_COUNT)
    divisor = override or int(torch.tensor(taps).prod())
    axes = tuple(Axis(s, -p, 1, k, p) for s, p, k in zip(strides, pads, taps))
    return Affine(
        ((op.input, _depthwise(spatial, channels, axes, 1.0 / divisor, "zeros")),),
        None,
        axis,
        channels,
        weightless=True,
        step=step,
    )


def pad(op: Op) -> Lifted:
    """Zeros (or a mirrored, repeated or wrapped border) around the last axes.

    Read as a window over all positions, as the conv beside it is. A pad that reaches
    the channels, or has no batch before them, is none.
    """
    widths = op.get("pad")
    if isinstance(widths, int):
        widths = (widths,) * (2 * int(op.get("spatial", 0)))
    mode = str(op.get("mode", "constant")).replace("constant", "zeros")
    value = op.get("value", 0)
    if not isinstance(op.input, Node) or not widths or not static(widths, value):
        return Opaque()
    if value != 0:
        return Opaque(Reason.PADDED_BORDER)
    rank = op.facts.rank(op.input)
    spatial = 0 if rank is None else rank - 2
    channels = op.facts.size(op.node, -(spatial + 1))
    if channels is None or not same_float(op, op.input):
        return Opaque(Reason.UNKNOWN_SHAPE)
    pairs = list(zip(widths[::2], widths[1::2]))[::-1]
    pairs = [(0, 0)] * (spatial - len(pairs)) + pairs
    if len(pairs) > spatial or spatial > 3:
        return Opaque()
    if mode != "zeros" and any(width < 0 for pair in pairs for width in pair):
        return Opaque(Reason.PADDING_MODE)
    axes = tuple(Axis(1, -low, 1, 1, high) for low, high in pairs)
    map = _depthwise(spatial, channels, axes, 1.0, mode)
    return Affine(((op.input, map),), None, -(spatial + 1), channels, weightless=True)


def _depthwise(
    spatial: int, channels: int, axes: tuple[Axis, ...], value: float, mode: str
) -> Window:
    shape = (channels, 1, *(axis.taps for axis in axes))
    return Window(
        axis=-(spatial + 1),
        in_channels=channels,
        out_channels=channels,
        groups=channels,
        axes=axes,
        mode=mode if any(axis.pads for axis in axes) else "zeros",
        kernel=lambda: torch.full(shape, value, dtype=torch.float64),
        fixed=False,
    )
