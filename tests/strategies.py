"""Every operator of the table in every spelling, as Hypothesis draws it for a shape.

A new operator joins here: `PIECES` has the very keys of `RULES`. From then on the lift
tests hold its rule to what it computes, and random graphs are built out of it. Makers of
operators with weights are in `pieces`, modules of many pieces in `programs`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from pieces import (
    Call,
    Draw,
    Piece,
    Shape,
    X,
    few,
    make_aten_norm,
    make_binary,
    make_conv,
    make_conv_call,
    make_conv_padding,
    make_functional_norm,
    make_linear,
    make_linear_call,
    make_norm,
    make_transposed,
    make_transposed_call,
)
from torch import nn
from torchvision.ops.stochastic_depth import stochastic_depth

aten: Any = torch.ops.aten
ANY = (2, 3, 4, 5)
IMAGES = (3, 4, 5)
Maker = Callable[[Draw, Shape], nn.Module]


def call(target: Any, *rest: Any, **named: Any) -> Maker:
    """A maker of one call with these arguments."""
    return lambda draw, shape: Call(target, X, *rest, **named)


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


def _pad_widths(draw: Draw, shape: Shape, mode: str) -> list[int]:
    low = -1 if mode == "constant" and min(shape[2:]) > 2 else 0
    spatial = len(shape) - 2
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


def make_zero_pad(draw: Draw, shape: Shape) -> nn.Module:
    """nn.ZeroPad2d."""
    return nn.ZeroPad2d(few(draw, 1, (1, 0, 2, 1), (0, -1, 1, 0)))


def _resize_mode(shape: Shape) -> str:
    return {3: "linear", 4: "bilinear", 5: "trilinear"}[len(shape)]


def make_interpolate(draw: Draw, shape: Shape) -> nn.Module:
    """F.interpolate to a size or by a factor, in linear and other modes."""
    mode = few(draw, "nearest", "nearest", "area", _resize_mode(shape), "nearest-exact")
    if draw(st.booleans()):
        return Call(F.interpolate, X, scale_factor=few(draw, 2, 0.5, 1.5), mode=mode)
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
        axis = draw(st.integers(1, len(shape) - 1))
        return Call(target, X, [axis] if target is aten.squeeze.dims else axis)

    return make


def make_mean(target: Any) -> Maker:
    """The mean over positions, or over channels, with and without the axis kept."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        spatial = list(range(2, len(shape)))
        dims = few(draw, spatial, [-1], [len(shape) - 1], [1])
        return Call(target, X, dims, few(draw, False, True))

    return make


# ---- the table ----------------------------------------------------------------------

_CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
_EVAL = partial(call, p=0.5, training=False)

PIECES: dict[Any, Piece] = {
    **{kind: Piece((rank,), make_conv) for rank, kind in _CONVS.items()},
    **{kind: Piece((rank,), make_transposed) for rank, kind in _TRANSPOSED.items()},
    nn.Linear: Piece(ANY, make_linear),
    nn.BatchNorm1d: Piece((2, 3), make_norm(nn.BatchNorm1d)),
    nn.BatchNorm2d: Piece((4,), make_norm(nn.BatchNorm2d)),
    nn.BatchNorm3d: Piece((5,), make_norm(nn.BatchNorm3d)),
    nn.SyncBatchNorm: Piece(ANY, make_norm(nn.SyncBatchNorm)),
    nn.Identity: Piece(ANY, lambda draw, shape: nn.Identity()),
    nn.Dropout: Piece(ANY, lambda draw, shape: nn.Dropout(0.5)),
    nn.Dropout1d: Piece((3,), lambda draw, shape: nn.Dropout1d(0.5)),
    nn.Dropout2d: Piece((4,), lambda draw, shape: nn.Dropout2d(0.5)),
    nn.Dropout3d: Piece((5,), lambda draw, shape: nn.Dropout3d(0.5)),
    nn.AvgPool1d: Piece((3,), make_pool(nn.AvgPool1d)),
    nn.AvgPool2d: Piece((4,), make_pool(nn.AvgPool2d)),
    nn.AvgPool3d: Piece((5,), make_pool(nn.AvgPool3d)),
    nn.AdaptiveAvgPool1d: Piece(
        (3,), lambda draw, shape: nn.AdaptiveAvgPool1d(few(draw, 1, 2))
    ),
    nn.AdaptiveAvgPool2d: Piece(
        (4,), lambda draw, shape: nn.AdaptiveAvgPool2d(few(draw, 1, (2, 3)))
    ),
    nn.ZeroPad2d: Piece((4,), make_zero_pad),
    nn.Flatten: Piece(
        ANY, lambda draw, shape: nn.Flatten(few(draw, 1, len(shape) - 1))
    ),
    nn.Unflatten: Piece(IMAGES, make_unflatten(nn.Unflatten)),
    nn.Upsample: Piece((3, 4), make_upsample),
    # arithmetic
    **{
        target: Piece(ANY, make_binary(target))
        for target in (
            *(operator.add, aten.add.Tensor, operator.sub, aten.sub.Tensor),
            *(operator.mul, torch.mul, torch.multiply, "mul", aten.mul.Tensor),
            *(operator.truediv, torch.div, torch.true_divide, "div", aten.div.Tensor),
        )
    },
    **{
        target: Piece(ANY, make_binary(target, "alpha"))
        for target in (torch.add, "add", torch.sub, torch.subtract, "sub", torch.rsub)
    },
    aten.rsub.Tensor: Piece(ANY, make_binary(aten.rsub.Tensor, "alpha")),
    **{
        target: Piece(ANY, make_binary(target), writes=True)
        for target in (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    },
    aten.add.Scalar: Piece(ANY, call(aten.add.Scalar, 1.5, 3)),
    aten.sub.Scalar: Piece(ANY, call(aten.sub.Scalar, 1.5, 3)),
    aten.rsub.Scalar: Piece(ANY, call(aten.rsub.Scalar, 1.5, 3)),
    aten.mul.Scalar: Piece(ANY, call(aten.mul.Scalar, -2.5)),
    aten.div.Scalar: Piece(ANY, call(aten.div.Scalar, -2.5)),
    **{
        target: Piece(ANY, call(target))
        for target in (operator.neg, torch.neg, "neg", aten.neg.default)
    },
    # functions
    F.conv1d: Piece((3,), make_conv_call(F.conv1d)),
    F.conv2d: Piece((4,), make_conv_call(F.conv2d)),
    F.conv3d: Piece((5,), make_conv_call(F.conv3d)),
    aten.conv1d.default: Piece((3,), make_conv_call(aten.conv1d.default)),
    aten.conv2d.default: Piece((4,), make_conv_call(aten.conv2d.default)),
    aten.conv3d.default: Piece((5,), make_conv_call(aten.conv3d.default)),
    aten.conv1d.padding: Piece((3,), make_conv_padding(aten.conv1d.padding)),
    aten.conv2d.padding: Piece((4,), make_conv_padding(aten.conv2d.padding)),
    aten.conv3d.padding: Piece((5,), make_conv_padding(aten.conv3d.padding)),
    **{
        target: Piece((rank,), make_transposed_call(target))
        for target, rank in {
            F.conv_transpose1d: 3,
            F.conv_transpose2d: 4,
            F.conv_transpose3d: 5,
            aten.conv_transpose1d.default: 3,
            aten.conv_transpose2d.input: 4,
            aten.conv_transpose3d.input: 5,
        }.items()
    },
    F.linear: Piece(ANY, make_linear_call(F.linear)),
    aten.linear.default: Piece(ANY, make_linear_call(aten.linear.default)),
    F.batch_norm: Piece(ANY, make_functional_norm),
    torch.batch_norm: Piece(ANY, make_aten_norm(torch.batch_norm)),
    aten.batch_norm.default: Piece(ANY, make_aten_norm(aten.batch_norm.default)),
    **{
        target: Piece((rank,), make_pool_call(target))
        for target, rank in {
            F.avg_pool1d: 3,
            F.avg_pool2d: 4,
            F.avg_pool3d: 5,
            aten.avg_pool1d.default: 3,
            aten.avg_pool2d.default: 4,
            aten.avg_pool3d.default: 5,
        }.items()
    },
    F.pad: Piece(IMAGES, make_pad(F.pad)),
    aten.pad.default: Piece(IMAGES, make_pad(aten.pad.default)),
    aten.constant_pad_nd.default: Piece(IMAGES, make_constant_pad),
    **{target: Piece(ANY, _EVAL(target)) for target in (F.dropout, F.dropout2d)},
    F.dropout3d: Piece((5,), _EVAL(F.dropout3d)),
    torch.dropout: Piece(ANY, call(torch.dropout, 0.5, False)),
    aten.dropout.default: Piece(ANY, call(aten.dropout.default, 0.5, False)),
    aten.feature_dropout.default: Piece(
        IMAGES, call(aten.feature_dropout.default, 0.5, False)
    ),
    "torchvision.ops.stochastic_depth.stochastic_depth": Piece(
        ANY, call(stochastic_depth, 0.5, "row", False)
    ),
    **{
        target: Piece(ANY, call(target))
        for target in (
            *("detach", "clone", torch.clone, torch.detach, "contiguous"),
            *(aten.detach.default, aten.clone.default, aten.alias.default),
            aten.contiguous.default,
        )
    },
    # layout
    **{
        target: Piece(IMAGES, make_transpose(target))
        for target in (torch.transpose, torch.swapaxes, "transpose", "swapaxes")
    },
    aten.transpose.int: Piece(IMAGES, make_transpose(aten.transpose.int)),
    torch.permute: Piece(IMAGES, make_permute(torch.permute)),
    "permute": Piece(IMAGES, make_permute("permute")),
    aten.permute.default: Piece(IMAGES, make_permute(aten.permute.default)),
    **{
        target: Piece(IMAGES, make_flatten(target))
        for target in (torch.flatten, "flatten", aten.flatten.using_ints)
    },
    **{
        target: Piece(IMAGES, make_reshape(target))
        for target in (torch.reshape, "reshape", "view")
    },
    aten.reshape.default: Piece(IMAGES, make_reshape(aten.reshape.default)),
    aten.view.default: Piece(IMAGES, make_reshape(aten.view.default)),
    **{
        target: Piece(IMAGES, make_unflatten(target))
        for target in (torch.unflatten, "unflatten", aten.unflatten.int)
    },
    **{
        target: Piece((2, 3, 4), make_unsqueeze(target))
        for target in (torch.unsqueeze, "unsqueeze", aten.unsqueeze.default)
    },
    **{
        target: Piece(IMAGES, make_squeeze(target))
        for target in (
            *(torch.squeeze, "squeeze", aten.squeeze.dim, aten.squeeze.dims),
        )
    },
    torch.mean: Piece(IMAGES, make_mean(torch.mean)),
    "mean": Piece(IMAGES, make_mean("mean")),
    aten.mean.dim: Piece(IMAGES, make_mean(aten.mean.dim)),
    F.adaptive_avg_pool1d: Piece((3,), call(F.adaptive_avg_pool1d, 2)),
    F.adaptive_avg_pool2d: Piece((4,), call(F.adaptive_avg_pool2d, (1, 2))),
    aten.adaptive_avg_pool1d.default: Piece(
        (3,), call(aten.adaptive_avg_pool1d.default, [1])
    ),
    aten.adaptive_avg_pool2d.default: Piece(
        (4,), call(aten.adaptive_avg_pool2d.default, [2, 1])
    ),
    F.interpolate: Piece(IMAGES, make_interpolate),
    aten.upsample_nearest2d.vec: Piece(
        (4,), call(aten.upsample_nearest2d.vec, None, [2.0, 1.5])
    ),
    aten.upsample_bilinear2d.vec: Piece(
        (4,), call(aten.upsample_bilinear2d.vec, [7, 5], False, None)
    ),
}
