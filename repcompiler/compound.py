"""The rules for operators that do what several others in the table do.

Matrix products with a constant are linear layers, `addcmul` is a scale and a shift, and
ATen's `convolution` is a conv or a transposed one. Each hands over to the rule that
states the condition.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from repcompiler import algebra, rules
from repcompiler.affine import Diagonal, Window
from repcompiler.lift import Affine, Lifted, Op, Opaque
from repcompiler.reasons import Reason


def matmul(op: Op) -> Lifted:
    """input · M for a constant M of two axes: a linear layer with the weight Mᵀ."""
    return _product(op, op.args.get("other"))


def addmm(op: Op) -> Lifted:
    """beta · input + alpha · mat1 · M: a linear layer, where both factors are one."""
    if op.get("beta", 1) != 1 or op.get("alpha", 1) != 1:
        return Opaque()
    bias = op.facts.constant(op.input)
    if bias is None:
        return Opaque(Reason.NOT_CONSTANT)
    args = {"input": op.args.get("mat1")}
    found = _product(Op(op.node, op.facts, args), op.args.get("mat2"))
    if not isinstance(found, Affine) or bias.shape != (found.channels,):
        return Opaque()
    return Affine(found.parts, rules.vector(bias), found.axis, found.channels)


def _product(op: Op, other: Any) -> Lifted:
    matrix = op.facts.constant(other)
    if matrix is None or matrix.dim() != 2 or not isinstance(op.input, Node):
        return Opaque()
    if op.facts.constant(op.input) is not None or not rules.same_float(op, op.input):
        return Opaque()
    inputs, outputs = matrix.shape
    window = Window(
        axis=-1,
        in_channels=inputs,
        out_channels=outputs,
        groups=1,
        axes=(),
        mode="zeros",
        kernel=lambda: rules.double(matrix).t(),
    )
    return Affine(((op.input, window),), None, -1, outputs)


def addcmul(op: Op) -> Lifted:
    """input + value · tensor1 · tensor2, two of them with one number per channel."""
    shift, value = op.facts.constant(op.input), op.number("value", 1)
    pair = op.args.get("tensor1"), op.args.get("tensor2")
    factors = [op.facts.constant(arg) for arg in pair]
    known = [index for index, factor in enumerate(factors) if factor is not None]
    if shift is None or len(known) != 1 or value is None:
        return Opaque()
    node = pair[1 - known[0]]
    if not isinstance(node, Node):
        return Opaque()
    scale = rules.channel_vector(op, node, factors[known[0]])
    bias = rules.channel_vector(op, node, shift)
    if isinstance(scale, Opaque):
        return scale
    if isinstance(bias, Opaque):
        return bias
    axes = {axis for axis in (scale[0], bias[0]) if axis is not None}
    if len(axes) > 1:
        return Opaque(Reason.AXIS_MISMATCH)
    axis = axes.pop() if axes else None
    numbers = algebra.scale_vectors(algebra.constant(value), scale[1])
    assert numbers is not None
    map = Diagonal(axis, numbers.size, numbers)
    return Affine(((node, map),), bias[1], axis, numbers.size or bias[1].size)


def convolution(op: Op) -> Lifted:
    """ATen's one op for every conv."""
    flag = op.args.get("transposed")
    if not isinstance(flag, bool):
        return Opaque()
    if flag:
        return rules.transposed(op)
    return rules.conv(op)
