"""Makers of concats, splits and slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from pieces import Call, Draw, Maker, Shape, X, aten, few
from torch import nn


def make_concat(target: Any) -> Maker:
    """The value after itself, once or twice, on any axis but the batch."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        axis = draw(st.integers(1, len(shape) - 1))
        return Call(target, [X] * few(draw, 2, 3), few(draw, axis, axis - len(shape)))

    return make


def make_chunk(target: Any) -> Maker:
    """As many blocks as asked for, or fewer."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        return Call(target, X, few(draw, 2, 3), draw(st.integers(1, len(shape) - 1)))

    return make


def make_split(target: Any) -> Maker:
    """Blocks of one size, the last one smaller perhaps."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        axis = few(draw, 1, draw(st.integers(1, len(shape) - 1)))
        return Call(target, X, max(1, shape[axis] // 2), axis)

    return make


def make_split_with_sizes(target: Any) -> Maker:
    """Two blocks of given sizes."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        first = draw(st.integers(1, max(1, shape[1] - 1)))
        return Call(target, X, [first, max(0, shape[1] - first)], 1)

    return make


def part_of(draw: Draw, shape: Shape) -> tuple[int, int, int]:
    """(axis, start, stop) of a part that is not empty."""
    axis = draw(st.integers(1, len(shape) - 1))
    start = draw(st.integers(0, shape[axis] - 1))
    return axis, start, draw(st.integers(start + 1, shape[axis]))


def make_narrow(target: Any) -> Maker:
    """narrow in every spelling."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        axis, start, stop = part_of(draw, shape)
        return Call(target, X, axis, start, stop - start)

    return make


def make_slice(draw: Draw, shape: Shape) -> nn.Module:
    """ATen's slice, with an end that may lie beyond."""
    axis, start, stop = part_of(draw, shape)
    return Call(aten.slice.Tensor, X, axis, start, few(draw, stop, 2**63 - 1))


def make_getitem(target: Callable[..., Any]) -> Maker:
    """x[:, a:b], x[..., a:b] with ends counted from either side, x[:, :, 1:, ::2]."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        if len(shape) > 3 and draw(st.booleans()):
            parts = [slice(None, None, 2), slice(-1, None)]
            dots = few(draw, [...], [slice(None)] * (len(shape) - 2))
            return Call(target, X, (*dots, *draw(st.permutations(parts))[:2]))
        axis, start, stop = part_of(draw, shape)
        part = few(draw, slice(start, stop), slice(start - shape[axis], None))
        if axis == len(shape) - 1 and draw(st.booleans()):
            return Call(target, X, (..., part))
        return Call(target, X, (*[slice(None)] * axis, part))

    return make


CONCATS = (torch.cat, torch.concat, torch.concatenate, aten.cat.default)
CHUNKS = (torch.chunk, "chunk", aten.chunk.default)
SPLITS = (torch.split, "split", aten.split.Tensor)
SIZED = (torch.split_with_sizes, "split_with_sizes", aten.split_with_sizes.default)
NARROWS = (torch.narrow, "narrow", aten.narrow.default)
