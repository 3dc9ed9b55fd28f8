"""The rules for arithmetic: convs, linear layers, norms, sums and products.

Each function states when its operator is affine; anything else is `Opaque`. Layout ops
have their own file (`layout`). `RULES` at the end joins both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from repcompiler import algebra
from repcompiler.affine import Axis, Diagonal, Map, Transposed, Vector, Window
from repcompiler.lift import Affine, Alias, Lifted, Op, Opaque
from repcompiler.reasons import Reason
from repcompiler.results import OWN


def double(tensor: Tensor) -> Tensor:
    """The tensor in float64, detached and on the CPU."""
    return tensor.detach().to(device="cpu", dtype=torch.float64)


def vector(tensor: Tensor | None) -> Vector | None:
    """A per-channel tensor, or a single number, as a float64 vector."""
    if tensor is None:
        return None
    if tensor.numel() == 1 and tensor.dim() == 0:
        return Vector(None, lambda: double(tensor))
    return Vector(tensor.numel(), lambda: double(tensor).reshape(-1))


def same_float(op: Op, *inputs: Node) -> bool:
    """Whether the value and these inputs share one floating dtype (as far as known)."""
    kinds = {op.facts.dtype(node) for node in (op.node, *inputs)}
    kinds.discard(None)
    if op.facts.exampled:
        complete = all(op.facts.dtype(node) is not None for node in (op.node, *inputs))
        return complete and len(kinds) == 1 and kinds.pop().is_floating_point  # type: ignore[union-attr]
    return len(kinds) == 1 and all(
        kind is not None and kind.is_floating_point for kind in kinds
    )


def per_axis(value: Any, spatial: int) -> tuple[int, ...]:
    """One number per spatial axis from an int or a sequence."""
    if isinstance(value, int):
        return (value,) * spatial
    numbers = tuple(value)
    return numbers * spatial if len(numbers) == 1 else numbers


def static(*values: Any) -> bool:
    """Whether no argument is computed in the graph."""
    return not any(
        isinstance(item, Node)
        for value in values
        for item in (value if isinstance(value, (tuple, list)) else (value,))
    )


def conv(op: Op) -> Lifted:
    """A conv of any rank with constant weights, in every padding mode."""
    weight = op.facts.constant(op.args.get("weight"))
    bias = op.args.get("bias")
    if weight is None or (bias is not None and op.facts.constant(bias) is None):
        return Opaque(Reason.NOT_CONSTANT)
    spatial, groups = weight.dim() - 2, op.get("groups", 1)
    settings = [op.get(name, 1) for name in ("stride", "dilation")]
    padding = op.get("padding", 0)
    if not static(groups, *settings, padding) or not same_float(op):
        return Opaque(Reason.NOT_CONSTANT)
    strides, dilations = (per_axis(value, spatial) for value in settings)
    pads = _conv_padding(padding, tuple(weight.shape[2:]), dilations)
    axes = tuple(
        Axis(stride, -low, dilation if taps > 1 else 1, taps, high)
        for stride, dilation, taps, (low, high) in zip(
            strides, dilations, weight.shape[2:], pads
        )
    )
    mode = op.get("padding_mode", "zeros") if any(a.pads for a in axes) else "zeros"
    window = Window(
        axis=-(spatial + 1),
        in_channels=weight.shape[1] * groups,
        out_channels=weight.shape[0],
        groups=groups,
        axes=axes,
        mode=mode,
        kernel=lambda: double(weight),
    )
    return _weighted(op, window, bias)


def _conv_padding(
    padding: Any, taps: tuple[int, ...], dilations: tuple[int, ...]
) -> list[tuple[int, int]]:
    if padding == "valid":
        return [(0, 0)] * len(taps)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, taps)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(pad, pad) for pad in per_axis(padding, len(taps))]


def _weighted(op: Op, map: Window | Transposed, bias: Any) -> Lifted:
    tensor = None if bias is None else op.facts.constant(bias)
    if not isinstance(op.input, Node) or 0 in (map.in_channels, map.out_channels):
        return Opaque()
    return Affine(((op.input, map),), vector(tensor), map.axis, map.out_channels)


def transposed(op: Op) -> Lifted:
    """A transposed conv: (I, O / groups, *taps), output channels on weight axis 1."""
    weight = op.facts.constant(op.args.get("weight"))
    bias = op.args.get("bias")
    if weight is None or (bias is not None and op.facts.constant(bias) is None):
        return Opaque(Reason.NOT_CONSTANT)
    spatial, groups = weight.dim() - 2, op.get("groups", 1)
    named = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
    values = [op.get(name, default) for name, default in named.items()]
    if not static(groups, *values) or not same_float(op):
        return Opaque(Reason.NOT_CONSTANT)
    if op.args.get("output_size") is not None:  # it overrides output_padding
        return Opaque()
    columns = [per_axis(value, spatial) for value in values]
    geometry = tuple(
        (s, p, o, d, k) for s, p, o, d, k in zip(*columns, weight.shape[2:])
    )
    map = Transposed(
        axis=-(spatial + 1),
        in_channels=weight.shape[0],
        out_channels=weight.shape[1] * groups,
        groups=groups,
        geometry=geometry,
        kernel=lambda: double(weight),
    )
    return _weighted(op, map, bias)


def linear(op: Op) -> Lifted:
    """x Wᵀ + b on the last axis."""
    weight = op.facts.constant(op.args.get("weight"))
    bias = op.args.get("bias")
    if weight is None or (bias is not None and op.facts.constant(bias) is None):
        return Opaque(Reason.NOT_CONSTANT)
    if weight.dim() != 2 or not same_float(op):
        return Opaque()
    window = Window(
        axis=-1,
        in_channels=weight.shape[1],
        out_channels=weight.shape[0],
        groups=1,
        axes=(),
        mode="zeros",
        kernel=lambda: double(weight),
    )
    return _weighted(op, window, bias)


def batch_norm(op: Op) -> Lifted:
    """γ (x - μ) / sqrt(σ² + ε) + β on axis 1, with stored statistics only."""
    facts, node = op.facts, op.input
    if op.get("training", False) is not False or op.args.get("running_mean") is None:
        return Opaque(Reason.TRAIN_MODE)
    names = ("running_mean", "running_var", "weight", "bias")
    given = {name: op.args.get(name) for name in names if op.args.get(name) is not None}
    tensors = {name: facts.constant(value) for name, value in given.items()}
    if (
        any(tensor is None for tensor in tensors.values())
        or "running_var" not in tensors
    ):
        return Opaque(Reason.NOT_CONSTANT)
    rank = facts.rank(op.node)
    if not isinstance(node, Node) or rank is None:
        return Opaque(Reason.UNKNOWN_SHAPE)
    if not same_float(op):
        return Opaque(Reason.DTYPE)
    axis, eps = 1 - rank, op.number("eps", 1e-5)
    if eps is None:
        return Opaque(Reason.NOT_CONSTANT)
    mean, var, gamma, beta = (tensors.get(name) for name in names)
    assert mean is not None and var is not None

    def scale() -> Tensor:
        factor = torch.rsqrt(double(var) + eps)
        return factor if gamma is None else factor * double(gamma)

    def shift() -> Tensor:
        moved = -double(mean) * scale()
        return moved if beta is None else moved + double(beta)

    def parts() -> Tensor:
        moved = (double(mean) * scale()).abs()
        return moved if beta is None else moved + double(beta).abs()

    channels = mean.numel()
    if not bool(scale().isfinite().all()):
        return Opaque(Reason.NOT_FINITE)
    return Affine(
        ((node, Diagonal(axis, channels, Vector(channels, scale))),),
        Vector(channels, shift, parts),
        axis,
        channels,
    )


def instance_norm(op: Op) -> Lifted:
    """With stored statistics it is a batch norm, with each image's own not affine.

    `rank` is that of a batched input: without a batch, the channels are on axis 0.
    """
    if op.get("use_input_stats", True) is not False:
        return Opaque()
    rank = op.args.get("rank")
    if rank is not None and rank != op.facts.rank(op.node):
        return Opaque(Reason.UNKNOWN_SHAPE)
    return batch_norm(op)


def add(op: Op) -> Lifted:
    """input + alpha · other."""
    return _sum(op, op.input, op.args.get("other"), 1.0)


def sub(op: Op) -> Lifted:
    """input - alpha · other."""
    return _sum(op, op.input, op.args.get("other"), -1.0)


def rsub(op: Op) -> Lifted:
    """other - alpha · input."""
    return _sum(op, op.args.get("other"), op.input, -1.0)


def _sum(op: Op, a: object, b: object, sign: float) -> Lifted:
    """a + sign · alpha · b."""
    alpha = op.number("alpha", 1)
    if alpha is None:
        return Opaque(Reason.NOT_CONSTANT)
    if not math.isfinite(alpha):
        return Opaque(Reason.NOT_FINITE)
    factor = sign * alpha
    constants = op.facts.constant(a), op.facts.constant(b)
    if constants[0] is None and constants[1] is None:
        return _sum_of_values(op, a, b, factor)
    if isinstance(b, Node) and constants[1] is None:
        return _shifted(op, b, factor, constants[0], 1.0)
    if isinstance(a, Node) and constants[0] is None:
        return _shifted(op, a, 1.0, constants[1], factor)
    return Opaque()


def _sum_of_values(op: Op, a: object, b: object, factor: float) -> Lifted:
    if not (isinstance(a, Node) and isinstance(b, Node)):
        return Opaque()
    if not same_float(op, a, b):
        return Opaque()
    shapes = op.facts.shape(a), op.facts.shape(b)
    if op.facts.exampled and (shapes[0] is None or shapes[0] != shapes[1]):
        return Opaque()
    return Affine(((a, Diagonal()), (b, _times(factor))))


def _times(factor: float) -> Diagonal:
    return Diagonal() if factor == 1 else Diagonal(scale=algebra.constant(factor))


def _shifted(
    op: Op, node: Node, factor: float, shift: Tensor | None, times: float
) -> Lifted:
    """factor·node + times·shift, where `shift` must be one number per channel."""
    found = channel_vector(op, node, shift)
    if isinstance(found, Opaque):
        return found
    axis, numbers = found
    bias = algebra.scale_vectors(algebra.constant(times), numbers)
    return Affine(((node, _times(factor)),), bias, axis, numbers.size)


def mul(op: Op) -> Lifted:
    """input · other, where one of them is one number per channel."""
    a, b = op.input, op.args.get("other")
    if op.facts.constant(b) is not None and isinstance(a, Node):
        return _scaled(op, a, op.facts.constant(b))
    if op.facts.constant(a) is not None and isinstance(b, Node):
        return _scaled(op, b, op.facts.constant(a))
    return Opaque()


def div(op: Op) -> Lifted:
    """input / other, where the divisor is one number per channel."""
    divisor = op.facts.constant(op.args.get("other"))
    if divisor is None or not isinstance(op.input, Node) or op.get("rounding_mode"):
        return Opaque()
    return _scaled(op, op.input, double(divisor).reciprocal())


def neg(op: Op) -> Lifted:
    """-input."""
    if not isinstance(op.input, Node) or not same_float(op, op.input):
        return Opaque()
    return Affine(((op.input, _times(-1.0)),))


def _scaled(op: Op, node: Node, factor: Tensor | None) -> Lifted:
    if op.facts.constant(node) is not None:
        return Opaque()
    found = channel_vector(op, node, factor)
    if isinstance(found, Opaque):
        return found
    axis, numbers = found
    if not bool(numbers.value().isfinite().all()):
        return Opaque(Reason.NOT_FINITE)
    map: Map = Diagonal(axis, numbers.size, numbers)
    return Affine(((node, map),), None, axis, numbers.size)


def channel_vector(
    op: Op, node: Node, tensor: Tensor | None
) -> tuple[int | None, Vector] | Opaque:
    """(axis, numbers) of a constant operand that holds one number per channel.

    1. It has at most one axis that is not of size 1; that one is the channel axis.
    2. There its size equals the value's, for inputs of other sizes as well, so that the
       value is not the one to broadcast.
    3. It has no more axes than the value.
    """
    assert tensor is not None
    if not same_float(op, node):
        return Opaque(Reason.DTYPE)
    if tensor.dim() == 0:
        return None, Vector(None, lambda: double(tensor))
    rank = op.facts.rank(node)
    if rank is None:
        return Opaque(Reason.UNKNOWN_SHAPE)
    wide = [axis for axis in range(-tensor.dim(), 0) if tensor.shape[axis] != 1]
    if len(wide) > 1 or tensor.dim() > rank:
        return Opaque(Reason.BROADCAST)
    if not wide:
        return None, Vector(None, lambda: double(tensor).reshape(()))
    if op.facts.lasting_size(node, wide[0]) != tensor.shape[wide[0]]:
        return Opaque(Reason.BROADCAST)
    return wide[0], Vector(tensor.numel(), lambda: double(tensor).reshape(-1))


def unchanged(op: Op) -> Lifted:
    """The same value: identity, detach, clone, dropout and stochastic depth in eval."""
    if not isinstance(op.input, Node) or op.get("training", False) is not False:
        return Opaque(Reason.TRAIN_MODE)
    return Opaque() if op.node.meta.get(OWN) else Alias(op.input)
