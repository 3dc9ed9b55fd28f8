"""Every operator of the table in every spelling, as Hypothesis draws it for a shape.

A new operator joins here: `PIECES` has the very keys of `RULES`. From then on the lift
tests hold its rule to what it computes, and random graphs are built out of it. Makers
are in `pieces`, `vectors` and `layouts`, modules of many pieces in `programs`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from layouts import (
    make_constant_pad,
    make_flatten,
    make_interpolate,
    make_mean,
    make_movedim,
    make_pad,
    make_pad_module,
    make_permute,
    make_pool,
    make_pool_call,
    make_reshape,
    make_squeeze,
    make_transpose,
    make_unflatten,
    make_unsqueeze,
    make_upsample,
)
from pieces import (
    Call,
    Draw,
    Maker,
    Piece,
    Shape,
    X,
    aten,
    few,
    make_addmm,
    make_conv,
    make_conv_call,
    make_conv_padding,
    make_convolution,
    make_linear,
    make_linear_call,
    make_matmul,
    make_transposed,
    make_transposed_call,
)
from splits import (
    CHUNKS,
    CONCATS,
    NARROWS,
    SIZED,
    SPLITS,
    make_chunk,
    make_concat,
    make_getitem,
    make_narrow,
    make_slice,
    make_split,
    make_split_with_sizes,
)
from torch import nn
from torchvision.ops.stochastic_depth import stochastic_depth
from vectors import (
    make_addcmul,
    make_aten_norm,
    make_binary,
    make_functional_norm,
    make_norm,
)

ANY = (2, 3, 4, 5)
IMAGES = (3, 4, 5)


def call(target: Any, *rest: Any, **named: Any) -> Maker:
    """A maker of one call with these arguments."""
    return lambda draw, shape: Call(target, X, *rest, **named)


def _flatten(draw: Draw, shape: Shape) -> nn.Module:
    return nn.Flatten(few(draw, 1, len(shape) - 1))


# ---- the table ----------------------------------------------------------------------

_CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}

STORED = {"track_running_stats": True}

PIECES: dict[Any, Piece] = {
    **{kind: Piece((rank,), make_conv) for rank, kind in _CONVS.items()},
    **{kind: Piece((rank,), make_transposed) for rank, kind in _TRANSPOSED.items()},
    nn.Linear: Piece(ANY, make_linear),
    nn.BatchNorm1d: Piece((2, 3), make_norm(nn.BatchNorm1d)),
    nn.BatchNorm2d: Piece((4,), make_norm(nn.BatchNorm2d)),
    nn.BatchNorm3d: Piece((5,), make_norm(nn.BatchNorm3d)),
    nn.SyncBatchNorm: Piece(ANY, make_norm(nn.SyncBatchNorm)),
    nn.InstanceNorm1d: Piece((3,), make_norm(nn.InstanceNorm1d, **STORED)),
    nn.InstanceNorm2d: Piece((4,), make_norm(nn.InstanceNorm2d, **STORED)),
    nn.InstanceNorm3d: Piece((5,), make_norm(nn.InstanceNorm3d, **STORED)),
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
    **{
        kind: Piece((spatial + 2,), make_pad_module(kind))
        for name in ("Zero", "Constant", "Circular", "Reflection", "Replication")
        for spatial in (1, 2, 3)
        for kind in (getattr(nn, f"{name}Pad{spatial}d"),)
    },
    nn.Flatten: Piece(
        ANY, lambda draw, shape: nn.Flatten(few(draw, 1, len(shape) - 1))
    ),
    nn.Unflatten: Piece(IMAGES, make_unflatten(nn.Unflatten)),
    nn.Upsample: Piece((3, 4), make_upsample),
    nn.UpsamplingNearest2d: Piece(
        (4,), lambda draw, shape: nn.UpsamplingNearest2d(scale_factor=2)
    ),
    nn.UpsamplingBilinear2d: Piece(
        (4,), lambda draw, shape: nn.UpsamplingBilinear2d(size=(3, 5))
    ),
    # arithmetic
    **{
        target: Piece(ANY, make_binary(target))
        for target in (
            *(operator.add, operator.sub, operator.mul, operator.truediv),
            *(aten.add.Tensor, aten.sub.Tensor, aten.subtract.Tensor),
            *(torch.mul, torch.multiply, "mul", "multiply"),
            *(aten.mul.Tensor, aten.multiply.Tensor),
            *(torch.div, torch.divide, torch.true_divide),
            *("div", "divide", "true_divide"),
            *(aten.div.Tensor, aten.divide.Tensor, aten.true_divide.Tensor),
        )
    },
    **{
        target: Piece(ANY, make_binary(target, "alpha"))
        for target in (
            *(torch.add, torch.sub, torch.subtract, torch.rsub),
            *("add", "sub", "subtract"),
        )
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
        for target in (
            *(operator.neg, torch.neg, torch.negative, "neg", "negative"),
            *(aten.neg.default, aten.negative.default),
            *(operator.pos, torch.positive, aten.positive.default),
        )
    },
    **{
        target: Piece(ANY, make_addcmul(target))
        for target in (torch.addcmul, aten.addcmul.default, "addcmul")
    },
    **{
        target: Piece(ANY, make_matmul(target))
        for target in (*(operator.matmul, torch.matmul, "matmul", aten.matmul.default),)
    },
    **{
        target: Piece((2,), make_matmul(target))
        for target in (torch.mm, "mm", aten.mm.default)
    },
    torch.addmm: Piece((2,), make_addmm(torch.addmm)),
    aten.addmm.default: Piece((2,), make_addmm(aten.addmm.default)),
    torch.convolution: Piece(IMAGES, make_convolution(torch.convolution)),
    aten.convolution.default: Piece(IMAGES, make_convolution(aten.convolution.default)),
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
    F.batch_norm: Piece(ANY, make_functional_norm(F.batch_norm, "training")),
    torch.batch_norm: Piece(ANY, make_aten_norm(torch.batch_norm)),
    aten.batch_norm.default: Piece(ANY, make_aten_norm(aten.batch_norm.default)),
    F.instance_norm: Piece(
        IMAGES, make_functional_norm(F.instance_norm, "use_input_stats")
    ),
    torch.instance_norm: Piece(IMAGES, make_aten_norm(torch.instance_norm)),
    aten.instance_norm.default: Piece(
        IMAGES, make_aten_norm(aten.instance_norm.default)
    ),
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
    F.dropout: Piece(ANY, call(F.dropout, p=0.5, training=False)),
    F.dropout2d: Piece((4,), call(F.dropout2d, p=0.5, training=False)),
    F.dropout3d: Piece((5,), call(F.dropout3d, 0.5, False)),
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
        for target in (
            *(torch.transpose, torch.swapaxes, torch.swapdims),
            *("transpose", "swapaxes", "swapdims"),
            *(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default),
        )
    },
    getattr: Piece(IMAGES, call(getattr, "mT")),
    aten.mT.default: Piece(IMAGES, call(aten.mT.default)),
    **{
        target: Piece(IMAGES, make_movedim(target))
        for target in (
            *(torch.movedim, torch.moveaxis, "movedim", "moveaxis"),
            *(aten.movedim.int, aten.movedim.intlist),
            *(aten.moveaxis.int, aten.moveaxis.intlist),
        )
    },
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
    # blocks of an axis
    **{target: Piece(ANY, make_concat(target)) for target in CONCATS},
    **{target: Piece(ANY, make_chunk(target), splits=True) for target in CHUNKS},
    **{target: Piece(ANY, make_split(target), splits=True) for target in SPLITS},
    **{
        target: Piece(ANY, make_split_with_sizes(target), splits=True)
        for target in SIZED
    },
    **{target: Piece(ANY, make_narrow(target)) for target in NARROWS},
    aten.slice.Tensor: Piece(ANY, make_slice),
    operator.getitem: Piece(ANY, make_getitem(operator.getitem)),
}
