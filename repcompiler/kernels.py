"""The numbers behind the algebra: float64 kernels and vectors, built after select.

Kernels of windows are (O, I / groups, *taps), with taps on the regular grid that their
`Axis` describes. Every function here is exact up to the rounding of float64.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from repcompiler.affine import Axis, Window


def regroup(kernel: Tensor, groups: int, target: int) -> Tensor:
    """The same kernel with fewer groups: (O, I/groups, …) → (O, I/target, …)."""
    if groups == target:
        return kernel
    ratio = groups // target
    outputs, inputs, *taps = kernel.shape
    blocks = kernel.reshape(target, ratio, outputs // groups, inputs, *taps)
    wide = kernel.new_zeros(target, ratio, outputs // groups, ratio, inputs, *taps)
    for index in range(ratio):
        wide[:, index, :, index] = blocks[:, index]
    return wide.reshape(outputs, ratio * inputs, *taps)


def place(kernel: Tensor, old: tuple[Axis, ...], new: tuple[Axis, ...]) -> Tensor:
    """The same kernel on a wider or finer grid of taps, zero in between."""
    if all(a.first == b.first and a.taps == b.taps for a, b in zip(old, new)):
        return kernel
    wide = kernel.new_zeros(*kernel.shape[:2], *(axis.taps for axis in new))
    slices: list[slice] = [slice(None), slice(None)]
    for a, b in zip(old, new):
        start = (a.first - b.first) // b.step
        pace = max(1, a.spacing // b.step)
        slices.append(slice(start, start + pace * (a.taps - 1) + 1, pace))
    wide[tuple(slices)] = kernel
    return wide


def diagonal_kernel(scale: Tensor | None, channels: int, spatial: int) -> Tensor:
    """A per-channel scale as a depthwise kernel of one tap."""
    ones = torch.ones(channels, dtype=torch.float64)
    vector = ones if scale is None else ones * scale
    return vector.reshape(channels, 1, *([1] * spatial))


def scale_outputs(kernel: Tensor, scale: Tensor) -> Tensor:
    """scale[o]·K[o, …]; one number scales them all."""
    return kernel * scale.reshape(-1, *([1] * (kernel.dim() - 1)))


def scale_inputs(kernel: Tensor, scale: Tensor, groups: int) -> Tensor:
    """K[o, i, …]·scale[i], where i counts within the group of o."""
    if scale.numel() == 1:
        return kernel * scale
    outputs, inputs, *taps = kernel.shape
    blocks = kernel.reshape(groups, outputs // groups, inputs, *taps)
    factors = scale.reshape(groups, 1, inputs, *([1] * len(taps)))
    return (blocks * factors).reshape(kernel.shape)


def compose(
    second: Window, first: Window, axes: tuple[Axis, ...], groups: int
) -> Tensor:
    """K[o, i, s·u + v] = Σ_m K2[o, m, u]·K1[m, i, v], in `groups` common groups."""
    k2 = regroup(second.kernel(), second.groups, groups)
    k1 = regroup(first.kernel(), first.groups, groups)
    middle = first.out_channels // groups
    k2 = k2.reshape(groups, k2.shape[0] // groups, middle, *k2.shape[2:])
    k1 = k1.reshape(groups, middle, k1.shape[1], *k1.shape[2:])
    out = k1.new_zeros(groups, k2.shape[1], k1.shape[2], *(axis.taps for axis in axes))
    for taps in product(*(range(axis.taps) for axis in second.axes)):
        part = torch.einsum("gom,gmi...->goi...", k2[(..., *taps)], k1)
        slices: list[slice] = [slice(None)] * 3
        for t, a2, a1, new in zip(taps, second.axes, first.axes, axes):
            start = a1.stride * (a2.first + a2.step * t) + a1.first - new.first
            pace = max(1, a1.spacing // new.step)
            begin = start // new.step
            slices.append(slice(begin, begin + pace * (a1.taps - 1) + 1, pace))
        out[tuple(slices)] += part
    return out.reshape(-1, *out.shape[2:])


def apply_to_constant(window: Window, bias: Tensor) -> Tensor:
    """What the window makes of a value that is bias[c] at every position: (O,)."""
    kernel = window.kernel()
    summed = kernel.flatten(2).sum(2) if kernel.dim() > 2 else kernel
    vector = torch.ones(window.in_channels, dtype=torch.float64) * bias
    blocks = summed.reshape(window.groups, -1, summed.shape[1])
    inputs = vector.reshape(window.groups, -1, 1)
    return torch.bmm(blocks, inputs).reshape(-1)
