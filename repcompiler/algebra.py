"""Add, chain and scale affine maps; every function says exactly when that is exact.

    add      (A + B) x        union of the taps, groups to their gcd
    compose  A (B x + b)      taps convolved, bias summed over the taps

Results are maps, or a `Refusal` with the reason. Geometry is decided at once; the
numbers stay thunks (`kernels`) until a plan has been chosen.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch

from repcompiler import kernels
from repcompiler.affine import (
    POINT,
    Axis,
    Diagonal,
    Map,
    Refusal,
    Transposed,
    Vector,
    Window,
)
from repcompiler.reasons import Reason
from repcompiler.vectors import add_vectors, constant, scale_vectors


def as_window(diagonal: Diagonal, like: Window) -> Window | Refusal:
    """A diagonal map as a depthwise window of one tap, on the axes of `like`."""
    channels = like.in_channels
    if diagonal.channels not in (None, channels):
        return Refusal(Reason.CHANNEL_MISMATCH)
    scale, spatial = diagonal.scale, len(like.axes)
    return Window(
        axis=like.axis,
        in_channels=channels,
        out_channels=channels,
        groups=channels,
        axes=(POINT,) * spatial,
        mode="zeros",
        kernel=lambda: kernels.diagonal_kernel(
            None if scale is None else scale.value(), channels, spatial
        ),
        fixed=_fixes(scale),
    )


def _fixes(scale: Vector | None) -> bool:
    """Whether a scale proves the number of channels."""
    return scale is not None and scale.size is not None


def add(a: Map, b: Map) -> Map | Refusal:
    """(a + b) x, exact for every input size.

    1. Both act on the same axis, from the same channels to the same channels.
    2. Windows have the same stride and the same tail, so that their sizes always agree.
    3. Where both windows leave the input, they pad in the same way; where one does, the
       union pads that way and the other's taps stay inside.
    4. Transposed convs have the same geometry and groups.
    """
    if isinstance(a, Diagonal) and isinstance(b, Diagonal):
        return _add_diagonals(a, b)
    if isinstance(a, Transposed) or isinstance(b, Transposed):
        return _add_transposed(a, b)
    if isinstance(a, Diagonal):
        assert isinstance(b, Window)
        promoted = _promote(a, b)
        return promoted if isinstance(promoted, Refusal) else add(promoted, b)
    if isinstance(b, Diagonal):
        promoted = _promote(b, a)
        return promoted if isinstance(promoted, Refusal) else add(a, promoted)
    return _add_windows(a, b)


def same_size(a: Map, b: Map) -> bool:
    """Whether the outputs of two maps of one value have one size, whatever its own."""
    return _growth(a) == _growth(b)


def _growth(map: Map) -> tuple[tuple[int, int], ...]:
    """Per axis (stride, what it adds), the stride of a transposed map below zero.

    Empty where every position stays where it is.
    """
    if isinstance(map, Diagonal):
        return ()
    if isinstance(map, Window):
        rows = tuple((axis.stride, axis.tail) for axis in map.axes)
    else:
        rows = tuple(
            (1 if stride == 1 else -stride, extra + dilation * (taps - 1) - 2 * pad)
            for stride, pad, extra, dilation, taps in map.geometry
        )
    return () if all(row == (1, 0) for row in rows) else rows


def _promote(diagonal: Diagonal, window: Window) -> Window | Refusal:
    if diagonal.axis not in (None, window.axis):
        return Refusal(Reason.AXIS_MISMATCH)
    if window.in_channels != window.out_channels:
        return Refusal(Reason.CHANNEL_MISMATCH)
    return as_window(diagonal, window)


def _add_diagonals(a: Diagonal, b: Diagonal) -> Diagonal | Refusal:
    axes = {axis for axis in (a.axis, b.axis) if axis is not None}
    sizes = {size for size in (a.channels, b.channels) if size is not None}
    if len(axes) > 1:
        return Refusal(Reason.AXIS_MISMATCH)
    if len(sizes) > 1:
        return Refusal(Reason.CHANNEL_MISMATCH)
    one = constant(1.0)
    scale = add_vectors(a.scale or one, b.scale or one)
    return Diagonal(axes.pop() if axes else None, sizes.pop() if sizes else None, scale)


def _add_transposed(a: Map, b: Map) -> Map | Refusal:
    if not (isinstance(a, Transposed) and isinstance(b, Transposed)) or a != b:
        return Refusal(Reason.TRANSPOSED)  # 4
    return replace(a, kernel=lambda: a.kernel() + b.kernel())


def _add_windows(a: Window, b: Window) -> Window | Refusal:
    if a.axis != b.axis:  # 1
        return Refusal(Reason.AXIS_MISMATCH)
    if (a.in_channels, a.out_channels) != (b.in_channels, b.out_channels):
        return Refusal(Reason.CHANNEL_MISMATCH)
    if any(x.stride != y.stride for x, y in zip(a.axes, b.axes)):  # 2
        return Refusal(Reason.STRIDE_MISMATCH)
    if any(x.tail != y.tail for x, y in zip(a.axes, b.axes)):
        return Refusal(Reason.SIZE_MISMATCH)
    if a.pads and b.pads and a.mode != b.mode:  # 3
        return Refusal(Reason.PADDING_MODE)
    axes = tuple(map(_union, a.axes, b.axes))
    groups = gcd(a.groups, b.groups)
    return Window(
        axis=a.axis,
        in_channels=a.in_channels,
        out_channels=a.out_channels,
        groups=groups,
        axes=axes,
        mode=a.mode if a.pads else b.mode,
        kernel=lambda: sum(
            (
                kernels.place(
                    kernels.regroup(x.kernel(), x.groups, groups), x.axes, axes
                )
                for x in (a, b)
            ),
            start=torch.zeros((), dtype=torch.float64),
        ),
        fixed=a.fixed or b.fixed,
    )


def _union(a: Axis, b: Axis) -> Axis:
    first, last = min(a.first, b.first), max(a.last, b.last)
    step = gcd(a.spacing, b.spacing, a.first - b.first) or 1
    return Axis(
        a.stride, first, step, (last - first) // step + 1, pad_high=a.tail + last
    )


def compose(second: Map, first: Map, *, biased: bool) -> Map | Refusal:
    """second(first x), exact for every input size.

    `biased`: whether a constant is added between the two. Conditions:
    1. Both act on the same axis, and the channels between them agree.
    2. Where `second` pads with zeros it must find zeros: no bias, and per axis
       low:  the first's last offset is below its stride;
       high: the first's pad_high is at least its span - 1.
    3. Where `second` pads in another mode, the first is pointwise. (Two circular
       windows would compose, but the wider pad fails on inputs that each alone takes.)
    4. A transposed conv composes with diagonal and pointwise maps on either side; a
       bias before it passes only if it is pointwise itself.
    """
    if _is_identity(second) or _is_identity(first):
        stopped = _stops_constant(second) if biased else None
        return stopped or _with_identity(second, first)
    if isinstance(second, Diagonal):
        return _scale_outputs(second, first)
    if first.axis not in (None, second.axis):  # 1
        return Refusal(Reason.AXIS_MISMATCH)
    if first.channels not in (None, second.in_channels):
        return Refusal(Reason.CHANNEL_MISMATCH)
    if isinstance(second, Transposed):
        return _before_transposed(second, first, biased)
    if isinstance(first, Transposed):
        return _after_transposed(second, first)
    border = check_border(second, first, biased)
    if border is not None:
        return border
    if isinstance(first, Diagonal):
        return _scale_inputs(second, first)
    return _compose_windows(second, first)


def _is_identity(map: Map) -> bool:
    return isinstance(map, Diagonal) and map.is_identity


def _stops_constant(second: Map) -> Refusal | None:
    """Conditions 2 and 4, for a constant alone."""
    if isinstance(second, Window) and second.pads and second.mode == "zeros":
        return Refusal(Reason.PADDED_BORDER)
    if isinstance(second, Transposed) and not second.local:
        return Refusal(Reason.TRANSPOSED)
    return None


def _with_identity(second: Map, first: Map) -> Map | Refusal:
    if _is_identity(second):
        return first
    inputs = second.channels if isinstance(second, Diagonal) else second.in_channels
    if None not in (inputs, first.channels) and inputs != first.channels:
        return Refusal(Reason.CHANNEL_MISMATCH)
    if isinstance(first, Diagonal) and isinstance(second, Diagonal):
        return replace(second, channels=second.channels or first.channels)
    return second


def check_border(
    second: Window, first: Diagonal | Window, biased: bool
) -> Refusal | None:
    """Conditions 2 and 3 of `compose`: the border comes out the same for every size."""
    if not second.pads:
        return None
    if second.mode != "zeros":
        local = isinstance(first, Diagonal) or first.pointwise
        return None if local else Refusal(Reason.PADDED_BORDER)
    if biased or (isinstance(first, Window) and not _zero_outside(second, first)):
        return Refusal(Reason.PADDED_BORDER)
    return None


def _zero_outside(second: Window, first: Window) -> bool:
    """Whether the first, read where the second pads, only reads its own zeros."""
    return first.mode == "zeros" and all(
        (a.pad_low <= 0 or b.last < b.stride)
        and (a.pad_high <= 0 or b.pad_high >= b.span - 1)
        for a, b in zip(second.axes, first.axes)
    )


def _scale_outputs(second: Diagonal, first: Map) -> Map | Refusal:
    if isinstance(first, Diagonal):
        if None not in (second.axis, first.axis) and second.axis != first.axis:
            return Refusal(Reason.AXIS_MISMATCH)
        if None not in (second.channels, first.channels):
            if second.channels != first.channels:
                return Refusal(Reason.CHANNEL_MISMATCH)
        return Diagonal(
            first.axis if second.axis is None else second.axis,
            first.channels if second.channels is None else second.channels,
            scale_vectors(second.scale, first.scale),
        )
    scale = second.scale
    assert scale is not None
    if second.axis not in (None, first.axis):  # 1
        return Refusal(Reason.AXIS_MISMATCH)
    if scale.size not in (None, first.out_channels):
        return Refusal(Reason.CHANNEL_MISMATCH)
    if isinstance(first, Window):
        return replace(
            first,
            kernel=lambda: kernels.scale_outputs(first.kernel(), scale.value()),
            fixed=first.fixed or _fixes(scale),
        )
    return replace(first, kernel=lambda: _scale_transposed(first, scale))


def _scale_transposed(first: Transposed, scale: Vector) -> torch.Tensor:
    """Output channels are on weight axis 1, and count within their group."""
    kernel = first.kernel()
    blocks = kernel.reshape(first.groups, -1, *kernel.shape[1:])
    vector = torch.ones(first.out_channels, dtype=torch.float64) * scale.value()
    factors = vector.reshape(first.groups, 1, -1, *([1] * (kernel.dim() - 2)))
    return (blocks * factors).reshape(kernel.shape)


def _scale_inputs(second: Window, first: Diagonal) -> Window:
    scale = first.scale
    assert scale is not None
    return replace(
        second,
        kernel=lambda: kernels.scale_inputs(
            second.kernel(), scale.value(), second.groups
        ),
        fixed=second.fixed or _fixes(scale),
    )


def _compose_windows(second: Window, first: Window) -> Window | Refusal:
    axes = tuple(map(_chain, second.axes, first.axes))
    groups = gcd(second.groups, first.groups)
    mode = first.mode if first.pads else second.mode
    if mode != "zeros" and any(min(a.pad_low, a.pad_high) < 0 for a in axes):
        return Refusal(Reason.PADDING_MODE)
    return Window(
        axis=second.axis,
        in_channels=first.in_channels,
        out_channels=second.out_channels,
        groups=groups,
        axes=axes,
        mode=mode if any(axis.pads for axis in axes) else "zeros",
        kernel=lambda: kernels.compose(second, first, axes, groups),
        fixed=second.fixed or first.fixed,
    )


def _chain(second: Axis, first: Axis) -> Axis:
    start = first.stride * second.first + first.first
    last = first.stride * second.last + first.last
    step = gcd(first.stride * second.spacing, first.spacing) or 1
    tail = first.tail + first.stride * second.tail
    return Axis(
        stride=first.stride * second.stride,
        first=start,
        step=step,
        taps=(last - start) // step + 1,
        pad_high=tail + last,
    )


def _before_transposed(second: Transposed, first: Map, biased: bool) -> Map | Refusal:
    if isinstance(first, Transposed) or (biased and not second.local):  # 4
        return Refusal(Reason.TRANSPOSED)
    if isinstance(first, Diagonal):
        scale = first.scale
        assert scale is not None
        return replace(second, kernel=lambda: _scale_rows(second, scale))
    if not first.pointwise or first.groups != 1 or second.groups != 1:
        return Refusal(Reason.TRANSPOSED)
    return replace(
        second,
        in_channels=first.in_channels,
        kernel=lambda: torch.einsum(
            "mo...,mi->io...", second.kernel(), first.kernel().flatten(1)
        ),
    )


def _scale_rows(second: Transposed, scale: Vector) -> torch.Tensor:
    return kernels.scale_outputs(second.kernel(), scale.value())


def _after_transposed(second: Window, first: Transposed) -> Map | Refusal:
    if not second.pointwise or second.groups != 1 or first.groups != 1:
        return Refusal(Reason.TRANSPOSED)
    return replace(
        first,
        out_channels=second.out_channels,
        kernel=lambda: torch.einsum(
            "im...,om->io...", first.kernel(), second.kernel().flatten(1)
        ),
    )


def push_bias(second: Map, bias: Vector | None) -> Vector | None:
    """What `second` makes of a constant; ask `compose` first whether it may pass."""
    if bias is None or _is_identity(second):
        return bias
    if isinstance(second, Diagonal):
        return scale_vectors(second.scale, bias)
    if isinstance(second, Window):
        return Vector(
            second.out_channels,
            lambda: kernels.apply_to_constant(second, bias.value()),
            dear=True,
        )
    return Vector(
        second.out_channels, lambda: _local_transposed(second, bias), dear=True
    )


def _local_transposed(second: Transposed, bias: Vector) -> torch.Tensor:
    kernel = second.kernel().flatten(1)
    vector = torch.ones(second.in_channels, dtype=torch.float64) * bias.value()
    blocks = kernel.reshape(second.groups, -1, kernel.shape[1])
    inputs = vector.reshape(second.groups, 1, -1)
    return torch.bmm(inputs, blocks).reshape(-1)
