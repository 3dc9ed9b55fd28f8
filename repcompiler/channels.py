"""The rules for concat, split and slice: whole blocks of an axis put together or taken.

A block counts as one of channels only where its place and size are the same for inputs
of every size (`Facts.lasting_size`). A slice along another axis is a layout op that
keeps the channels apart.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeGuard

from torch import Tensor
from torch.fx import Node

from repcompiler.affine import Block, Step
from repcompiler.facts import Facts, op_name
from repcompiler.lift import Alias, Bundle, Carry, Lifted, Op, Opaque, Stack
from repcompiler.reasons import Reason
from repcompiler.rules import same_float, static

# What `torch.export` writes for a slice without an end.
NO_END = sys.maxsize

# Ops that give a tuple of blocks, which `getitem` reads.
SPLITS = frozenset("chunk split split_with_sizes tensor_split".split())


def concat(op: Op) -> Lifted:
    """concat(parts, dim): one block for each part.

    1. The axis is not the batch, and every part has one size on it for all inputs.
    2. All parts have the same rank; an empty one of another rank is legal but ignored.
    3. Every part has channels: no map reads none.
    """
    parts, dim = op.args.get("tensors"), op.get("dim", 0)
    if not isinstance(parts, (list, tuple)) or not static(dim):
        return Opaque()
    nodes = tuple(part for part in parts if isinstance(part, Node))
    if len(nodes) < len(parts) or len(nodes) < 2:
        return Opaque()
    if not same_float(op, *nodes):
        return Opaque(Reason.DTYPE)
    ranks = {op.facts.rank(node) for node in nodes}
    rank = ranks.pop()
    if ranks or rank is None:  # 2
        return Opaque(Reason.UNKNOWN_SHAPE)
    axis = int(dim) % rank - rank
    sizes = [op.facts.lasting_size(node, axis) for node in nodes]
    if axis == -rank or None in sizes or 0 in sizes:  # 1, 3
        return Opaque()
    return Stack(nodes, axis, tuple(size or 0 for size in sizes))


def split(op: Op) -> Lifted:
    """chunk, split and their like: a tuple of blocks of the input."""
    return Bundle(op.input) if isinstance(op.input, Node) else Opaque()


def getitem(op: Op) -> Lifted:
    """One block of a split, or a slice of a value.

    Where a slice cuts several axes, what is left of them counts as positions.
    """
    source, index = op.input, op.args.get("index")
    if not isinstance(source, Node):
        return Opaque()
    if op_name(source) in SPLITS and isinstance(index, int):
        return _block_of_split(op, source, index)
    rank = op.facts.rank(source)
    if rank is None:
        return Opaque()
    given: Any = index if isinstance(index, (tuple, list)) else (index,)
    items: list[Any] = list(given)
    if not all(item is Ellipsis or _is_plain_slice(item) for item in items):
        return Opaque()
    if Ellipsis in items:
        place = items.index(Ellipsis)
        items[place : place + 1] = [slice(None)] * (rank - len(items) + 1)
    cut = [axis for axis, item in enumerate(items) if item != slice(None)]
    if not cut:
        return Alias(source)
    if len(cut) == 1:
        part = items[cut[0]]
        return _slice(op, cut[0], part.start, part.stop, part.step)
    return _cut(op, source, [axis - rank for axis in cut])


def _is_plain_slice(item: Any) -> bool:
    """Whether its ends are numbers that stand in the graph."""
    return isinstance(item, slice) and static(item.start, item.stop, item.step)


def slice_tensor(op: Op) -> Lifted:
    """ATen's slice: input[start:end:step] along `dim`."""
    names = ("dim", "start", "end", "step")
    return _slice(op, *(op.args.get(name) for name in names))


def narrow(op: Op) -> Lifted:
    """The elements [start, start + length) along `dim`."""
    dim, start, length = (op.args.get(name) for name in ("dim", "start", "length"))
    if not isinstance(start, int) or not isinstance(length, int) or start < 0:
        return Opaque()
    return _slice(op, dim, start, start + length, 1)


def _slice(op: Op, dim: Any, start: Any, stop: Any, step: Any) -> Lifted:
    source, rank = op.input, op.facts.rank(op.input)
    if not isinstance(source, Node) or rank is None:
        return Opaque()
    if not static(dim, start, stop, step):
        return Opaque()
    axis = int(dim or 0) % rank - rank
    if step not in (None, 1):
        return _cut(op, source, [axis])
    if not start and (stop is None or stop >= NO_END):
        return Alias(source)
    size = op.facts.lasting_size(source, axis)
    pick = None
    if size is not None and axis != -rank:
        begin, end, _ = slice(start, stop).indices(size)
        if begin >= end:
            return Opaque()
        pick = (axis, Block(begin, end - begin, size))
    return _cut(op, source, [axis], pick)


def _cut(
    op: Op,
    source: Node,
    cut: Sequence[int],
    pick: tuple[int, Block] | None = None,
) -> Lifted:
    """The axes that are cut, counted from the end; the others are kept whole."""
    rank = op.facts.rank(op.node)
    if rank is None or rank != op.facts.rank(source):
        return Opaque()
    axes = {other: other for other in range(-rank, 0) if other not in cut}
    return Carry(source, Step(op.node, axes, cuts=True, pick=pick))


def _block_of_split(op: Op, bundle: Node, index: int) -> Lifted:
    """A block whose place is the same for every input, as evaluation shows."""
    source = bundle.args[0] if bundle.args else bundle.kwargs.get("input")
    if not isinstance(source, Node):
        return Opaque()
    places = {_place(facts, source, bundle, index) for facts in _known(op, bundle)}
    if len(places) != 1 or None in places:
        return Opaque(Reason.UNKNOWN_SHAPE)
    axis, start, size, total = places.pop() or (0, 0, 0, 0)
    if axis == -(op.facts.rank(source) or 0):
        return Opaque()
    return _cut(op, source, [axis], (axis, Block(start, size, total)))


def _known(op: Op, bundle: Node) -> list[Facts]:
    """The facts in which the split could be evaluated, the example's first."""
    others = [f for f in op.facts.elsewhere if _is_several(f.values.get(bundle))]
    return [op.facts, *others]


def _is_several(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it is what a split returns: a tuple, or an ATen operator's list."""
    return isinstance(value, (tuple, list))


def _place(
    facts: Facts, source: Node, bundle: Node, index: int
) -> tuple[int, int, int, int] | None:
    """(axis, start, size, total) of one block of a split."""
    blocks, whole = facts.values.get(bundle), facts.values.get(source)
    if not isinstance(whole, Tensor) or not _is_several(blocks):
        return None
    shapes = [tuple(b.shape) for b in blocks if isinstance(b, Tensor)]
    axes = [
        axis
        for axis in range(-whole.dim(), 0)
        if sum(shape[axis] for shape in shapes) == whole.shape[axis]
    ]
    if len(shapes) < 2 or len(axes) != 1:
        return None
    axis, index = axes[0], index % len(shapes)
    sizes = [int(shape[axis]) for shape in shapes]
    return axis, sum(sizes[:index]), sizes[index], int(whole.shape[axis])
