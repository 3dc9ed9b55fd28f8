"""Makers of pools, pads, resizes and layout ops for a given shape; see `pieces`."""

from __future__ import annotations

from math import prod
from typing import Any

import torch.nn.functional as F
from hypothesis import strategies as st
from pieces import Call, Draw, Maker, Shape, X, aten, few
from torch import nn

# ---- pooling, padding, resizing -----------------------------------------------------


def _pool_settings(draw: Draw, shape: Shape) -> dict[str, Any]:
    spatial = len(shape) - 2
    taps = [min(few(draw, 1, 2, 3), size) for size in shape[2:]]
    pads = [few(draw, 0, k // 2) for k in taps]
    settings: dict[str, Any] = {
        "kernel_size": taps,
        "stride": [few(draw, 1, 2) for _ in range(spatial)],
        "padding": pads,
        "ceil_mode": few(draw, False, False, True),
        "count_include_pad": few(draw, True, True, False),
    }
    if spatial > 1:
        settings["divisor_override"] = few(draw, None, None, 3)
    return settings


def make_pool(kind: Any) -> Maker:
    """nn.AvgPoolNd."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        settings = _pool_settings(draw, shape)
        names = ("kernel_size", "stride", "padding")
        tuples = {name: tuple(settings[name]) for name in names}
        return kind(**{**settings, **tuples})

    return make


def make_pool_call(target: Any) -> Maker:
    """F.avg_poolNd and its overload: all arguments, or the kernel alone."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        settings = _pool_settings(draw, shape)
        if draw(st.booleans()):
            return Call(target, X, settings["kernel_size"])
        return Call(target, X, *settings.values())

    return make


def _pad_widths(draw: Draw, shape: Shape, mode: str, axes: int = 0) -> list[int]:
    low = -1 if mode == "constant" and min(shape[2:]) > 2 else 0
    spatial = len(shape) - 2
    if not axes:
        axes = draw(st.integers(1, spatial)) if mode == "constant" else spatial
    high = 2 if mode == "constant" else min(2, min(shape[2:]) - 1)
    return [draw(st.integers(low, high)) for _ in range(2 * axes)]


def make_pad(target: Any) -> Maker:
    """F.pad and its overload, in each mode."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        mode = few(draw, "constant", "constant", "reflect", "replicate", "circular")
        return Call(target, X, _pad_widths(draw, shape, mode), mode)

    return make


def make_constant_pad(draw: Draw, shape: Shape) -> nn.Module:
    """aten.constant_pad_nd, with zero and with another value."""
    widths = _pad_widths(draw, shape, "constant")
    return Call(aten.constant_pad_nd.default, X, widths, few(draw, 0, 0, 0.5))


PADDING_MODES = {"Reflection": "reflect", "Replication": "replicate"}


def make_pad_module(kind: Any) -> Maker:
    """A pad module with one width for all sides, or one for each."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        name = kind.__name__.split("Pad")[0]
        mode = "circular" if name == "Circular" else PADDING_MODES.get(name, "constant")
        widths = _pad_widths(draw, shape, mode, len(shape) - 2)
        value = [few(draw, 0.0, 0.0, 0.5)] if name == "Constant" else []
        return kind(few(draw, tuple(widths), max(0, min(widths))), *value)

    return make


def _resize_mode(shape: Shape) -> str:
    return {3: "linear", 4: "bilinear", 5: "trilinear"}[len(shape)]


def make_interpolate(draw: Draw, shape: Shape) -> nn.Module:
    """F.interpolate to a size or by a factor, in linear and other modes."""
    mode = few(draw, "nearest", "nearest", "area", _resize_mode(shape), "nearest-exact")
    if draw(st.booleans()):
        factor = few(draw, 2, 1.5, 0.5 if min(shape[2:]) > 1 else 3)
        return Call(F.interpolate, X, scale_factor=factor, mode=mode)
    return Call(F.interpolate, X, [size + 1 for size in shape[2:]], mode=mode)


def make_upsample(draw: Draw, shape: Shape) -> nn.Module:
    """nn.Upsample."""
    return nn.Upsample(
        scale_factor=few(draw, 2, 3), mode=few(draw, "nearest", _resize_mode(shape))
    )


# ---- layout -------------------------------------------------------------------------


def make_transpose(target: Any) -> Maker:
    """Two axes swapped, counted from either end."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        a, b = (draw(st.integers(1, len(shape) - 1)) for _ in range(2))
        return Call(target, X, a, few(draw, b, b - len(shape)))

    return make


def make_movedim(target: Any) -> Maker:
    """One axis moved, or two."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        several = getattr(target, "_overloadname", few(draw, "int", "intlist"))
        froms, tos = (draw(st.permutations(range(1, len(shape)))) for _ in range(2))
        if several == "int":
            return Call(target, X, froms[0], few(draw, tos[0], tos[0] - len(shape)))
        return Call(target, X, froms[:2], tos[:2])

    return make


def make_permute(target: Any) -> Maker:
    """Any order of the axes after the batch."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        rest = draw(st.permutations(range(1, len(shape))))
        if target == "permute" and draw(st.booleans()):
            return Call(target, X, 0, *rest)
        return Call(target, X, [0, *rest])

    return make


def make_reshape(target: Any) -> Maker:
    """Axes after the batch joined, from some axis on."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        start = draw(st.integers(1, len(shape) - 1))
        return Call(target, X, [-1, *shape[1:start], prod(shape[start:])])

    return make


def make_flatten(target: Any) -> Maker:
    """flatten in each spelling of where it starts and ends."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        start = draw(st.integers(1, len(shape) - 1))
        return Call(target, X, start, few(draw, -1, len(shape) - 1))

    return make


def make_unflatten(target: Any) -> Maker:
    """One axis split in two."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        axis = draw(st.integers(1, len(shape) - 1))
        sizes = [shape[axis], 1] if draw(st.booleans()) else [1, shape[axis]]
        if shape[axis] % 2 == 0 and draw(st.booleans()):
            sizes = [2, shape[axis] // 2]
        if target is nn.Unflatten:
            return nn.Unflatten(axis, tuple(sizes))
        return Call(target, X, axis, sizes)

    return make


def make_unsqueeze(target: Any) -> Maker:
    """An axis of size one put in."""
    return lambda draw, shape: Call(target, X, draw(st.integers(1, len(shape))))


def make_squeeze(target: Any) -> Maker:
    """An axis taken out where its size is one."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        single = [axis for axis, size in enumerate(shape) if axis and size == 1]
        axis = draw(st.sampled_from(single or range(1, len(shape))))
        return Call(target, X, [axis] if target is aten.squeeze.dims else axis)

    return make


def make_mean(target: Any) -> Maker:
    """The mean over positions, or over channels, with and without the axis kept."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        spatial = list(range(2, len(shape)))
        dims = few(draw, spatial, [-1], [len(shape) - 1], [1])
        return Call(target, X, dims, few(draw, False, True))

    return make
