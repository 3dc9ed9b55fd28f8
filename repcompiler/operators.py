"""`RULES`, the table of operators: every spelling of each, as data.

Module classes must match exactly: a subclass may compute anything. Functions that other
libraries wrap for tracing are named by path, so that none of them is imported here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from repcompiler import channels, compound, layout, pools, rules
from repcompiler.lift import Rule

aten: Any = torch.ops.aten

_CONV = "input weight bias stride padding dilation groups"
_TRANSPOSED = "input weight bias stride padding output_padding groups dilation"
_NORM = "input running_mean running_var weight bias training momentum eps"
_ATEN_NORM = "input weight bias running_mean running_var training momentum eps cudnn"
_INSTANCE_NORM = _NORM.replace("training", "use_input_stats")
_ATEN_INSTANCE = _ATEN_NORM.replace("training", "use_input_stats")
_POOL = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
_POOL_1D = "input kernel_size stride padding ceil_mode count_include_pad"


def _conv_attributes(module: nn.Module) -> dict[str, Any]:
    names = "weight bias stride padding dilation groups padding_mode".split()
    return {name: getattr(module, name) for name in names}


def _transposed_attributes(module: nn.Module) -> dict[str, Any]:
    names = "weight bias stride padding output_padding groups dilation".split()
    return {name: getattr(module, name) for name in names}


def _norm_attributes(module: nn.Module) -> dict[str, Any]:
    names = "running_mean running_var weight bias eps".split()
    found = {name: getattr(module, name) for name in names}
    uses_batch = module.training or found["running_mean"] is None
    return {**found, "training": uses_batch}


def _instance_attributes(module: nn.Module) -> dict[str, Any]:
    stored = getattr(module, "track_running_stats") and not module.training
    return {**_norm_attributes(module), "training": None, "use_input_stats": not stored}


def _attributes(*names: str) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda module: {name: getattr(module, name) for name in names}


def _pad_attributes(mode: str) -> Callable[[nn.Module], dict[str, Any]]:
    """What a pad module does; only one that pads with a constant says with which."""

    def attributes(module: nn.Module) -> dict[str, Any]:
        widths, value = getattr(module, "padding"), getattr(module, "value", 0)
        return {"pad": widths, "mode": mode, "value": value}

    return attributes


def _module_pool(spatial: int) -> Rule:
    names = _POOL_1D if spatial == 1 else _POOL
    attributes = _attributes(*names.split()[1:])
    return Rule(pools.avg_pool, attributes=attributes, given={"spatial": spatial})


_CONV_MODULE = Rule(rules.conv, attributes=_conv_attributes)
_TRANSPOSED_MODULE = Rule(rules.transposed, attributes=_transposed_attributes)
_NORM_MODULE = Rule(rules.batch_norm, attributes=_norm_attributes)
_DROPOUT_MODULE = Rule(rules.unchanged, attributes=_attributes("training"))
_DROPOUT = Rule(rules.unchanged, "input p training inplace", given={"training": True})
_RESIZE_MODULE = Rule(layout.resize, attributes=_attributes("mode"))
_ADD = Rule(rules.add, "input other")
_SUB = Rule(rules.sub, "input other")
_MUL = Rule(rules.mul, "input other")
_DIV = Rule(rules.div, "input other")
_NEG = Rule(rules.neg)
_ADDCMUL = Rule(compound.addcmul, "input tensor1 tensor2")
_MATMUL = Rule(compound.matmul, "input other")
_ADDMM = Rule(compound.addmm, "input mat1 mat2")
_CONVOLUTION = Rule(
    compound.convolution,
    "input weight bias stride padding dilation transposed output_padding groups",
)
_SAME = Rule(rules.unchanged, "input")
_NO_ARGUMENTS = Rule(rules.unchanged, "input", attributes=_attributes())

# What each pad module pads with: as `F.pad` takes it.
PADS: dict[Any, Callable[[nn.Module], dict[str, Any]]] = {
    kind: _pad_attributes(mode)
    for mode, kinds in {
        "constant": (
            *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
            *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
        ),
        "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
        "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
        "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    }.items()
    for kind in kinds
}
_MODULES: dict[Any, Rule] = {
    nn.Conv1d: _CONV_MODULE,
    nn.Conv2d: _CONV_MODULE,
    nn.Conv3d: _CONV_MODULE,
    nn.ConvTranspose1d: _TRANSPOSED_MODULE,
    nn.ConvTranspose2d: _TRANSPOSED_MODULE,
    nn.ConvTranspose3d: _TRANSPOSED_MODULE,
    nn.Linear: Rule(rules.linear, attributes=_attributes("weight", "bias")),
    nn.BatchNorm1d: _NORM_MODULE,
    nn.BatchNorm2d: _NORM_MODULE,
    nn.BatchNorm3d: _NORM_MODULE,
    nn.SyncBatchNorm: _NORM_MODULE,
    nn.InstanceNorm1d: Rule(
        rules.instance_norm, attributes=_instance_attributes, given={"rank": 3}
    ),
    nn.InstanceNorm2d: Rule(
        rules.instance_norm, attributes=_instance_attributes, given={"rank": 4}
    ),
    nn.InstanceNorm3d: Rule(
        rules.instance_norm, attributes=_instance_attributes, given={"rank": 5}
    ),
    nn.Identity: _NO_ARGUMENTS,
    nn.Dropout: _DROPOUT_MODULE,
    nn.Dropout1d: _DROPOUT_MODULE,
    nn.Dropout2d: _DROPOUT_MODULE,
    nn.Dropout3d: _DROPOUT_MODULE,
    nn.AvgPool1d: _module_pool(1),
    nn.AvgPool2d: _module_pool(2),
    nn.AvgPool3d: _module_pool(3),
    nn.AdaptiveAvgPool1d: Rule(
        layout.adaptive_pool, attributes=_attributes(), given={"spatial": 1}
    ),
    nn.AdaptiveAvgPool2d: Rule(
        layout.adaptive_pool, attributes=_attributes(), given={"spatial": 2}
    ),
    **{kind: Rule(pools.pad, attributes=reads) for kind, reads in PADS.items()},
    nn.Flatten: Rule(layout.reshape, attributes=_attributes()),
    nn.Unflatten: Rule(layout.reshape, attributes=_attributes()),
    nn.Upsample: _RESIZE_MODULE,
    nn.UpsamplingNearest2d: _RESIZE_MODULE,
    nn.UpsamplingBilinear2d: _RESIZE_MODULE,
}

_ARITHMETIC: dict[Any, Rule] = {
    operator.add: _ADD,
    operator.iadd: _ADD,
    torch.add: _ADD,
    "add": _ADD,
    aten.add.Tensor: _ADD,
    aten.add.Scalar: Rule(rules.add, "input other alpha"),
    operator.sub: _SUB,
    operator.isub: _SUB,
    torch.sub: _SUB,
    torch.subtract: _SUB,
    "sub": _SUB,
    "subtract": _SUB,
    aten.sub.Tensor: _SUB,
    aten.subtract.Tensor: _SUB,
    aten.sub.Scalar: Rule(rules.sub, "input other alpha"),
    torch.rsub: Rule(rules.rsub, "input other"),
    aten.rsub.Tensor: Rule(rules.rsub, "input other"),
    aten.rsub.Scalar: Rule(rules.rsub, "input other alpha"),
    operator.mul: _MUL,
    operator.imul: _MUL,
    torch.mul: _MUL,
    torch.multiply: _MUL,
    "mul": _MUL,
    "multiply": _MUL,
    aten.mul.Tensor: _MUL,
    aten.multiply.Tensor: _MUL,
    aten.mul.Scalar: _MUL,
    operator.truediv: _DIV,
    operator.itruediv: _DIV,
    torch.div: _DIV,
    torch.divide: _DIV,
    torch.true_divide: _DIV,
    "div": _DIV,
    "divide": _DIV,
    "true_divide": _DIV,
    aten.div.Tensor: _DIV,
    aten.divide.Tensor: _DIV,
    aten.true_divide.Tensor: _DIV,
    aten.div.Scalar: _DIV,
    operator.neg: _NEG,
    torch.neg: _NEG,
    torch.negative: _NEG,
    "neg": _NEG,
    "negative": _NEG,
    aten.neg.default: _NEG,
    aten.negative.default: _NEG,
    operator.pos: _SAME,
    torch.positive: _SAME,
    aten.positive.default: _SAME,
    torch.addcmul: _ADDCMUL,
    "addcmul": _ADDCMUL,
    aten.addcmul.default: _ADDCMUL,
}

_FUNCTIONS: dict[Any, Rule] = {
    F.conv1d: Rule(rules.conv, _CONV),
    F.conv2d: Rule(rules.conv, _CONV),
    F.conv3d: Rule(rules.conv, _CONV),
    aten.conv1d.default: Rule(rules.conv, _CONV),
    aten.conv2d.default: Rule(rules.conv, _CONV),
    aten.conv3d.default: Rule(rules.conv, _CONV),
    aten.conv1d.padding: Rule(rules.conv, _CONV),
    aten.conv2d.padding: Rule(rules.conv, _CONV),
    aten.conv3d.padding: Rule(rules.conv, _CONV),
    F.conv_transpose1d: Rule(rules.transposed, _TRANSPOSED),
    F.conv_transpose2d: Rule(rules.transposed, _TRANSPOSED),
    F.conv_transpose3d: Rule(rules.transposed, _TRANSPOSED),
    aten.conv_transpose1d.default: Rule(rules.transposed, _TRANSPOSED),
    aten.conv_transpose2d.input: Rule(rules.transposed, _TRANSPOSED),
    aten.conv_transpose3d.input: Rule(rules.transposed, _TRANSPOSED),
    torch.convolution: _CONVOLUTION,
    aten.convolution.default: _CONVOLUTION,
    operator.matmul: _MATMUL,
    torch.matmul: _MATMUL,
    torch.mm: _MATMUL,
    "matmul": _MATMUL,
    "mm": _MATMUL,
    aten.matmul.default: _MATMUL,
    aten.mm.default: _MATMUL,
    torch.addmm: _ADDMM,
    aten.addmm.default: _ADDMM,
    F.linear: Rule(rules.linear, "input weight bias"),
    aten.linear.default: Rule(rules.linear, "input weight bias"),
    F.batch_norm: Rule(rules.batch_norm, _NORM),
    torch.batch_norm: Rule(rules.batch_norm, _ATEN_NORM),
    aten.batch_norm.default: Rule(rules.batch_norm, _ATEN_NORM),
    F.instance_norm: Rule(rules.instance_norm, _INSTANCE_NORM),
    torch.instance_norm: Rule(rules.instance_norm, _ATEN_INSTANCE),
    aten.instance_norm.default: Rule(rules.instance_norm, _ATEN_INSTANCE),
    F.avg_pool1d: Rule(pools.avg_pool, _POOL_1D, given={"spatial": 1}),
    F.avg_pool2d: Rule(pools.avg_pool, _POOL, given={"spatial": 2}),
    F.avg_pool3d: Rule(pools.avg_pool, _POOL, given={"spatial": 3}),
    aten.avg_pool1d.default: Rule(pools.avg_pool, _POOL_1D, given={"spatial": 1}),
    aten.avg_pool2d.default: Rule(pools.avg_pool, _POOL, given={"spatial": 2}),
    aten.avg_pool3d.default: Rule(pools.avg_pool, _POOL, given={"spatial": 3}),
    F.pad: Rule(pools.pad, "input pad mode value"),
    aten.pad.default: Rule(pools.pad, "input pad mode value"),
    aten.constant_pad_nd.default: Rule(pools.pad, "input pad value"),
    F.dropout: _DROPOUT,
    F.dropout2d: _DROPOUT,
    F.dropout3d: _DROPOUT,
    torch.dropout: Rule(rules.unchanged, "input p training"),
    aten.dropout.default: Rule(rules.unchanged, "input p training"),
    aten.feature_dropout.default: Rule(rules.unchanged, "input p training"),
    "torchvision.ops.stochastic_depth.stochastic_depth": Rule(
        rules.unchanged, "input p mode training", given={"training": True}
    ),
    "detach": _SAME,
    "clone": _SAME,
    torch.clone: _SAME,
    torch.detach: _SAME,
    aten.detach.default: _SAME,
    aten.clone.default: _SAME,
    aten.alias.default: _SAME,
}

_TRANSPOSE = Rule(layout.transpose, "input dim0 dim1")
_MOVE = Rule(layout.movedim, "input source destination")
_PERMUTE = Rule(layout.permute, "input dims ...")
_RESHAPE = Rule(layout.reshape, "input ...")
_MEAN = Rule(layout.mean, "input dim keepdim")
_ADAPTIVE_1D = Rule(layout.adaptive_pool, "input output_size", given={"spatial": 1})
_ADAPTIVE_2D = Rule(layout.adaptive_pool, "input output_size", given={"spatial": 2})
_RESIZE = Rule(
    layout.resize, "input size scale_factor mode ...", given={"mode": "nearest"}
)

_LAYOUT: dict[Any, Rule] = {
    torch.transpose: _TRANSPOSE,
    torch.swapaxes: _TRANSPOSE,
    torch.swapdims: _TRANSPOSE,
    "transpose": _TRANSPOSE,
    "swapaxes": _TRANSPOSE,
    "swapdims": _TRANSPOSE,
    aten.transpose.int: _TRANSPOSE,
    aten.swapaxes.default: _TRANSPOSE,
    aten.swapdims.default: _TRANSPOSE,
    getattr: Rule(layout.attribute, "input name"),
    aten.mT.default: Rule(layout.transpose, given={"dim0": -2, "dim1": -1}),
    torch.permute: _PERMUTE,
    torch.movedim: _MOVE,
    torch.moveaxis: _MOVE,
    "permute": _PERMUTE,
    "movedim": _MOVE,
    "moveaxis": _MOVE,
    aten.movedim.int: _MOVE,
    aten.movedim.intlist: _MOVE,
    aten.moveaxis.int: _MOVE,
    aten.moveaxis.intlist: _MOVE,
    aten.permute.default: _PERMUTE,
    torch.flatten: _RESHAPE,
    torch.reshape: _RESHAPE,
    torch.squeeze: _RESHAPE,
    torch.unsqueeze: _RESHAPE,
    torch.unflatten: _RESHAPE,
    "flatten": _RESHAPE,
    "reshape": _RESHAPE,
    "view": _RESHAPE,
    "squeeze": _RESHAPE,
    "unsqueeze": _RESHAPE,
    "unflatten": _RESHAPE,
    aten.flatten.using_ints: _RESHAPE,
    aten.reshape.default: _RESHAPE,
    aten.view.default: _RESHAPE,
    aten.squeeze.dim: _RESHAPE,
    aten.squeeze.dims: _RESHAPE,
    aten.unsqueeze.default: _RESHAPE,
    aten.unflatten.int: _RESHAPE,
    "contiguous": Rule(layout.same_layout),
    aten.contiguous.default: Rule(layout.same_layout),
    torch.mean: _MEAN,
    "mean": _MEAN,
    aten.mean.dim: _MEAN,
    F.adaptive_avg_pool1d: _ADAPTIVE_1D,
    F.adaptive_avg_pool2d: _ADAPTIVE_2D,
    aten.adaptive_avg_pool1d.default: _ADAPTIVE_1D,
    aten.adaptive_avg_pool2d.default: _ADAPTIVE_2D,
    F.interpolate: _RESIZE,
    aten.upsample_nearest2d.vec: Rule(layout.resize, "input ..."),
    aten.upsample_bilinear2d.vec: Rule(layout.resize, "input ..."),
}

_CONCAT = Rule(channels.concat, "tensors dim")
_SPLIT = Rule(channels.split, "input ...")
_NARROW = Rule(channels.narrow, "input dim start length")

_CHANNELS: dict[Any, Rule] = {
    torch.cat: _CONCAT,
    torch.concat: _CONCAT,
    torch.concatenate: _CONCAT,
    aten.cat.default: _CONCAT,
    torch.chunk: _SPLIT,
    torch.split: _SPLIT,
    torch.split_with_sizes: _SPLIT,
    "chunk": _SPLIT,
    "split": _SPLIT,
    "split_with_sizes": _SPLIT,
    aten.chunk.default: _SPLIT,
    aten.split.Tensor: _SPLIT,
    aten.split_with_sizes.default: _SPLIT,
    operator.getitem: Rule(channels.getitem, "input index"),
    torch.narrow: _NARROW,
    "narrow": _NARROW,
    aten.narrow.default: _NARROW,
    aten.slice.Tensor: Rule(channels.slice_tensor, "input dim start end step"),
}

RULES: dict[Any, Rule] = {
    **_MODULES,
    **_ARITHMETIC,
    **_FUNCTIONS,
    **_LAYOUT,
    **_CHANNELS,
}
