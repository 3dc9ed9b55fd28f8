"""Maps on blocks of channels: what concat, split and slice make of the algebra.

A term may make only the channels [start, stop) of its value (`Term.rows`); the terms of
a concat do. Picking channels takes rows of a kernel, reading a block takes columns:

    concat(A x, B x) = [A; B] x        K · concat(x, y) = K[:, :m] x + K[:, m:] y
    (A x)[start:stop] = A[start:stop] x

Grouped kernels are cut between their groups only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from repcompiler import algebra, kernels
from repcompiler.affine import (
    Block,
    Diagonal,
    Map,
    Meaning,
    Refusal,
    Term,
    Transposed,
    Vector,
    Window,
)
from repcompiler.reasons import Reason


def pick_vector(vector: Vector | None, block: Block) -> Vector | None:
    """The numbers of the block's channels."""
    if vector is None or vector.size is None:
        return vector
    return Vector(block.size, lambda: vector.value()[block.start : block.stop])


def join_vectors(
    vectors: Sequence[Vector | None], sizes: Sequence[int]
) -> Vector | None:
    """The vectors one after the other; None is zero."""
    if all(vector is None for vector in vectors):
        return None

    def joined() -> torch.Tensor:
        zero = torch.zeros((), dtype=torch.float64)
        values = [zero if vector is None else vector.value() for vector in vectors]
        return torch.cat([v.expand(size) for v, size in zip(values, sizes)])

    return Vector(sum(sizes), joined)


def _groups_of(block: Block, groups: int) -> tuple[int, int] | None:
    """(first group, number of groups) that the block consists of, if it does."""
    width = block.total // groups
    if block.start % width or block.size % width:
        return None
    return block.start // width, block.size // width


def columns(map: Map, block: Block) -> tuple[Map, Block | None] | Refusal:
    """`map` of a value that is zero but for the block, and which channels that makes.

    1. With one group, all outputs read the block.
    2. Otherwise the block consists of whole groups, and makes these groups' outputs.
    """
    if isinstance(map, Diagonal):
        return _scale_of(map, block), block
    if map.groups == 1:  # 1
        return _read(map, block), None
    found = _groups_of(block, map.groups)
    if found is None or isinstance(map, Transposed):  # 2
        return Refusal(Reason.CHANNEL_MISMATCH)
    return _groups(map, *found)


def _scale_of(map: Diagonal, block: Block) -> Diagonal:
    channels = None if map.channels is None else block.size
    return replace(map, channels=channels, scale=pick_vector(map.scale, block))


def _read(map: Window | Transposed, block: Block) -> Map:
    kernel = map.kernel
    if isinstance(map, Transposed):
        return replace(
            map,
            in_channels=block.size,
            kernel=lambda: kernel()[block.start : block.stop],
        )
    return replace(
        map,
        in_channels=block.size,
        kernel=lambda: kernel()[:, block.start : block.stop],
    )


def _groups(map: Window, first: int, count: int) -> tuple[Window, Block]:
    outputs, inputs = map.out_channels // map.groups, map.in_channels // map.groups
    rows = Block(first * outputs, count * outputs, map.out_channels)
    kernel = map.kernel
    part = replace(
        map,
        groups=count,
        in_channels=count * inputs,
        out_channels=rows.size,
        kernel=lambda: kernel()[rows.start : rows.stop],
    )
    return part, rows


def rows(map: Map, block: Block) -> tuple[Map, Block | None] | Refusal:
    """The block of the outputs of `map`, and which input channels that reads.

    1. With one group, all inputs are read still.
    2. Otherwise the block consists of whole groups, and reads these groups' inputs.
    """
    if isinstance(map, Diagonal):
        return _scale_of(map, block), block
    kernel, axis = map.kernel, int(isinstance(map, Transposed))
    if map.groups == 1:  # 1
        return (
            replace(
                map,
                out_channels=block.size,
                kernel=lambda: kernel().narrow(axis, block.start, block.size),
            ),
            None,
        )
    found = _groups_of(block, map.groups)
    if found is None or isinstance(map, Transposed):  # 2
        return Refusal(Reason.CHANNEL_MISMATCH)
    part, _ = _groups(map, *found)
    inputs = map.in_channels // map.groups
    return part, Block(found[0] * inputs, part.in_channels, map.in_channels)


def stack(parts: Sequence[tuple[Map, Block]]) -> Window | Refusal:
    """Maps of one source, one after the other, as one window of one group.

    Their sizes agree as in a sum (`algebra.add`).
    """
    like = next((map for map, _ in parts if isinstance(map, Window)), None)
    if like is None:
        return Refusal(Reason.LAYOUT)
    total: Window | None = None
    for map, block in parts:
        window = algebra.as_window(map, like) if isinstance(map, Diagonal) else map
        if not isinstance(window, Window):
            return window if isinstance(window, Refusal) else Refusal(Reason.TRANSPOSED)
        wide = _embed(window, block)
        added = wide if total is None else algebra.add(total, wide)
        if not isinstance(added, Window):
            assert isinstance(added, Refusal)
            return added
        total = added
    assert total is not None
    return total


def _embed(window: Window, block: Block) -> Window:
    """The window with outputs that are zero outside of the block."""

    def kernel() -> torch.Tensor:
        own = kernels.regroup(window.kernel(), window.groups, 1)
        wide = own.new_zeros(block.total, *own.shape[1:])
        wide[block.start : block.stop] = own
        return wide

    return replace(window, groups=1, out_channels=block.total, kernel=kernel)


def are_distinct(terms: Sequence[Term]) -> bool:
    """Whether every term makes channels of its own."""
    return all(t.rows for t in terms) and len({t.rows for t in terms}) == len(terms)


def fit_together(terms: Sequence[Term]) -> bool:
    """Whether any two blocks are the same or have no channel in common."""
    blocks = sorted({t.rows for t in terms if t.rows}, key=lambda b: b.start)
    return all(a.stop <= b.start for a, b in pairwise(blocks))


def partition(meaning: Meaning) -> tuple[tuple[Meaning, ...], tuple[Term, ...]]:
    """(what each block of channels is, terms over all channels); the bias is theirs.

    Without blocks the first is empty.
    """
    blocks = sorted({t.rows for t in meaning.terms if t.rows}, key=lambda b: b.start)
    parts = tuple(
        Meaning(
            tuple(replace(t, rows=None) for t in meaning.terms if t.rows == block),
            pick_vector(meaning.bias, block),
            meaning.axis,
            block.size,
        )
        for block in blocks
    )
    return parts, tuple(term for term in meaning.terms if term.rows is None)
