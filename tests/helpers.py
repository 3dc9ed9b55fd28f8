"""What tests of the compiler share: wide weights, an executor of maps, and comparers.

The executor runs a map with torch's own functions in float64 (an explicit pad, then a
conv), so that it depends on the meaning of a map and not on the code that lowers one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repcompiler.affine import Axis, Diagonal, Map, Transposed, Vector, Window
from repcompiler.lower import pads_of

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED_CONVS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
PAD_MODES = {"zeros": "constant"}
# Float64 has 2e-16; sums of a few thousand terms keep well below this.
EXACT = 1e-12

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm statistics far from 0 and 1, and every other vector wide values.

    Fresh norms are nearly identities, and would hide an axis or a sign that is wrong.
    """
    # Far from the small seeds that inputs are drawn with: x - mean must not cancel.
    generator = torch.Generator().manual_seed(seed + 7919)

    def normal(tensor: Tensor | None, mean: float, spread: float) -> None:
        if tensor is not None:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(mean + spread * noise)

    normed: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, NORMS):
                continue
            normal(module.running_mean, 0.0, 1.0)
            normal(module.weight, 1.0, 0.3)
            normal(module.bias, 0.0, 0.3)
            if module.running_var is not None:
                noise = torch.rand(module.running_var.shape, generator=generator)
                module.running_var.copy_(0.5 + 1.5 * noise)
            normed |= {id(p) for p in module.parameters()}
        for parameter in model.parameters():
            vector = parameter.numel() == max(parameter.shape, default=1)
            if id(parameter) not in normed and vector:
                normal(parameter, 0.0, 1.0)
    return model.eval()


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal float64 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


# ---- maps: made from the settings of a conv, and executed ---------------------------


def vector(numbers: Tensor | None) -> Vector | None:
    """A tensor as a vector of the algebra."""
    return None if numbers is None else Vector(numbers.numel(), lambda: numbers)


def window(
    kernel: Tensor,
    *,
    stride: Sequence[int] | int = 1,
    pads: Sequence[tuple[int, int]] | int = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
    mode: str = "zeros",
) -> Window:
    """A conv, from its kernel (O, I / groups, *taps) and its settings per axis."""
    taps = kernel.shape[2:]
    spatial = len(taps)
    strides = (stride,) * spatial if isinstance(stride, int) else stride
    steps = (dilation,) * spatial if isinstance(dilation, int) else dilation
    widths = ((pads, pads),) * spatial if isinstance(pads, int) else pads
    axes = tuple(
        Axis(s, -low, d if k > 1 else 1, k, high)
        for s, d, k, (low, high) in zip(strides, steps, taps, widths)
    )
    return Window(
        axis=-(spatial + 1),
        in_channels=kernel.shape[1] * groups,
        out_channels=kernel.shape[0],
        groups=groups,
        axes=axes,
        mode=mode if any(axis.pads for axis in axes) else "zeros",
        kernel=lambda: kernel,
    )


def conv(inputs: int, outputs: int, *taps: int, groups: int = 1, **settings) -> Window:
    """A conv with a random kernel; `seed=` draws another one."""
    seed = settings.pop("seed", inputs * 31 + outputs * 7 + sum(taps))
    kernel = noise(outputs, inputs // groups, *taps, seed=seed)
    return window(kernel, groups=groups, **settings)


def diagonal(channels: int, axis: int, seed: int = 0) -> Diagonal:
    """One random number per channel."""
    return Diagonal(axis, channels, vector(noise(channels, seed=seed)))


def execute(map: Map, x: Tensor) -> Tensor:
    """The map applied by torch's functions; raises where they do."""
    if isinstance(map, Diagonal):
        return x if map.scale is None else x * _along(map.scale.value(), map.axis)
    if isinstance(map, Transposed):
        stride, padding, output_padding, dilation, _ = zip(*map.geometry)
        return TRANSPOSED_CONVS[len(map.geometry)](
            x,
            map.kernel(),
            None,
            stride,
            padding,
            output_padding,
            map.groups,
            dilation,
        )
    if not map.axes:
        return F.linear(x, map.kernel())
    return CONVS[len(map.axes)](
        padded(x, map.axes, map.mode),
        map.kernel(),
        stride=[axis.stride for axis in map.axes],
        dilation=[axis.step for axis in map.axes],
        groups=map.groups,
    )


def padded(x: Tensor, axes: Sequence[Axis], mode: str) -> Tensor:
    """The input with what a window finds outside of it."""
    for widths in pads_of(axes):
        x = F.pad(x, widths, PAD_MODES.get(mode, mode))
    return x


def shift(x: Tensor, bias: Vector | None, axis: int | None) -> Tensor:
    """The bias added along the channel axis."""
    return x if bias is None else x + _along(bias.value(), axis)


def _along(numbers: Tensor, axis: int | None) -> Tensor:
    if axis is None or numbers.dim() == 0:
        return numbers
    return numbers.reshape(-1, *([1] * (-axis - 1)))


def absolute(map: Map) -> Map:
    """|A|: the same map with the magnitudes of its numbers."""
    if isinstance(map, Diagonal):
        if map.scale is None:
            return map
        scale = map.scale
        return replace(map, scale=Vector(scale.size, lambda: scale.value().abs()))
    return replace(map, kernel=lambda: map.kernel().abs())


# ---- comparing ----------------------------------------------------------------------


def tried(function: Callable[..., Tensor], *args: object) -> Tensor | None:
    """The result, or None where torch refuses the input (too small for its kernel)."""
    try:
        return function(*args)
    except (RuntimeError, ValueError, IndexError):
        return None


def channel_error(found: Tensor, expected: Tensor, bound: Tensor, axis: int) -> float:
    """Largest error relative to `bound` (|A||x| + |b|) of the same channel."""
    assert found.shape == expected.shape, f"{found.shape} instead of {expected.shape}"
    if expected.numel() == 0:
        return 0.0
    errors = (found - expected).abs().movedim(axis, 0).flatten(1).amax(1)
    limits = bound.abs().movedim(axis, 0).flatten(1).amax(1)
    ratio = torch.where(errors == 0, torch.zeros_like(errors), errors / limits)
    return float(ratio.nan_to_num(nan=float("inf")).amax())


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64."""
    return copy.deepcopy(model).double()


def outputs(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The tensors that the model returns."""
    with torch.no_grad():
        result = model(*inputs)
    return (result,) if isinstance(result, Tensor) else tuple(result)
