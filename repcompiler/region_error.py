"""Equality of one region, before it replaces anything.

A region is affine, so a few probes decide: zero finds the bias, noise finds the map.
Its error is judged per output channel against |A||x| + |b|, not against the output
(which may cancel) nor the largest channel (which hides the others).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from repcompiler.partial import op_name
from repcompiler.probes import PROBE_SCALES
from repcompiler.verify import EXACT

Shapes = tuple[tuple[int, ...], ...]


def region_error(
    original: GraphModule,
    fused: GraphModule,
    shapes: Sequence[Shapes],
    channel_axis: int | None,
) -> float | None:
    """Largest error of `fused` relative to |A||x| + |b|, over shapes and probes.

    Both are float64 functions of the same sources. Shapes that the original itself does
    not take are skipped; None if it took none of them. The fused graph is used up.

    Where kernels cancel as they are added up, |A| is not what was added: a second look
    takes what the original comes to without signs, where that is more.
    """
    generator = torch.Generator().manual_seed(0)
    errors: list[tuple[list[Tensor], Tensor]] = []
    with torch.no_grad():
        for inputs in _probes(shapes, generator):
            try:
                expected: Tensor = original(*inputs)
            except (RuntimeError, ValueError, IndexError):
                continue
            try:
                found: Tensor = fused(*inputs)
            except (RuntimeError, ValueError, IndexError):
                return float("inf")
            if expected.shape != found.shape:
                return float("inf")
            errors.append((inputs, expected - found))
        _drop_signs(fused)  # |A| and |b|, from here on
        limits = [fused(*(v.abs() for v in inputs)) for inputs, _ in errors]
        ratios = [_relative(e, n, channel_axis) for (_, e), n in zip(errors, limits)]
        if max(ratios, default=0.0) > EXACT:
            apart = _Unsigned(copy.deepcopy(original))
            added = [apart.run(*(v.abs() for v in inputs)) for inputs, _ in errors]
            pairs = zip(errors, map(torch.maximum, limits, added))
            again = [_relative(error, n, channel_axis) for (_, error), n in pairs]
            ratios = again if max(again) <= EXACT else ratios
    return max(ratios, default=None)


class _Unsigned(Interpreter):
    """What a graph comes to where no number has a sign and differences are sums."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        _drop_signs(module)

    def run_node(self, n: Node) -> Any:
        """The magnitude of what the op returns; of two operands, of both together."""
        value = super().run_node(n)
        if op_name(n).strip("_") in _SUMS:
            args, named = self.fetch_args_kwargs_from_env(n)
            operands = (
                *args[:2],
                *(named[k] for k in ("input", "other") if k in named),
            )
            alpha = named.get("alpha", (*args[2:], 1)[0])
            value = abs(operands[0]) + abs(alpha) * abs(operands[1])
        return value.abs() if isinstance(value, Tensor) else value


_SUMS = ("add", "iadd", "sub", "isub", "rsub", "subtract")


def _drop_signs(graph: nn.Module) -> None:
    """The magnitude of every number, so that nothing cancels; a norm adds its mean."""
    for tensor in (*graph.parameters(), *graph.buffers()):
        if tensor.is_floating_point():
            tensor.abs_()
    for module in graph.modules():
        mean = getattr(module, "running_mean", None)
        if isinstance(mean, Tensor):
            mean.neg_()


def _probes(
    shapes: Sequence[Shapes], generator: torch.Generator
) -> Iterator[list[Tensor]]:
    """Noise of every scale: in the rows of one batch, or else one after the other."""
    scales = torch.tensor(PROBE_SCALES, dtype=torch.float64)
    for sizes in shapes:
        noise = [
            torch.randn(size, generator=generator, dtype=torch.float64)
            for size in sizes
        ]
        if all(size[0] == len(scales) for size in sizes):
            yield [n * scales.reshape(-1, *([1] * (n.dim() - 1))) for n in noise]
        else:
            yield from ([n * scale for n in noise] for scale in scales)


def _relative(difference: Tensor, limit: Tensor, axis: int | None) -> float:
    """max over rows and channels of max|difference| / max limit, over positions."""
    if difference.numel() == 0:
        return 0.0
    errors, limits = (_by_channel(value, axis) for value in (difference, limit))
    ratio = torch.where(errors == 0, torch.zeros_like(errors), errors / limits)
    return float(ratio.nan_to_num(nan=float("inf")).amax())


def _by_channel(value: Tensor, axis: int | None) -> Tensor:
    """The largest magnitude for each row (probe) and each channel."""
    magnitude = value.abs()
    if axis is None or magnitude.dim() < 2:
        return magnitude.flatten(1).amax(1) if magnitude.dim() > 1 else magnitude
    if magnitude.dim() == -axis:  # the channels come first: there are no rows
        return magnitude.flatten(1).amax(1)
    return (
        magnitude.movedim(axis, 1).flatten(2).amax(2)
        if magnitude.dim() > 2
        else magnitude
    )
