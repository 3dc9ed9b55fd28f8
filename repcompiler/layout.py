"""The rules for layout ops: which axis becomes which, with every channel kept whole.

A layout op is a `Carry`: maps that act on one channel at a time pass through it,
whatever it does to positions. So do a mean over positions and a resize, whose weights
sum to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.fx import Node

from repcompiler.affine import Step
from repcompiler.facts import Shape
from repcompiler.lift import Carry, Lifted, Op, Opaque
from repcompiler.reasons import Reason
from repcompiler.rules import static


def _carry(op: Op, axes: dict[int, int], *, computes: bool = False) -> Lifted:
    if not isinstance(op.input, Node):
        return Opaque()
    return Carry(op.input, Step(op.node, axes, computes))


def kept_axes(before: Shape, after: Shape) -> dict[int, set[int]]:
    """For each axis of `before`, from the end, where a reshape to `after` may keep it.

    Row-major order is kept, so an axis survives where its size and the product of the
    sizes before it both do: in one place, or in any of several that hold one element.
    Sizes must be known.
    """
    places: dict[tuple[int, int], set[int]] = {}
    for index, key in enumerate(_positions(after)):
        places.setdefault(key, set()).add(index - len(after))
    return {
        index - len(before): places[key]
        for index, key in enumerate(_positions(before))
        if key in places
    }


def _positions(shape: Shape) -> Iterator[tuple[int, int]]:
    """(product of the sizes before it, its size) of each axis."""
    product = 1
    for size in shape:
        assert size is not None
        yield product, size
        product *= size


def reshape(op: Op) -> Lifted:
    """reshape, view, flatten, unflatten, squeeze, unsqueeze: row-major order kept.

    An axis may be kept by coincidence, as in (N, 4, 4) to (N, -1, 4): it has to be kept
    for inputs of other sizes as well.
    """
    if not isinstance(op.input, Node):
        return Opaque()
    before, after = op.facts.shape(op.input), op.facts.shape(op.node)
    if before is None or after is None or None in before or None in after:
        return Opaque()
    if 0 in before or op.facts.dtype(op.input) != op.facts.dtype(op.node):
        return Opaque()  # view(dtype) reads the same bits as other numbers
    axes = kept_axes(before, after)
    for facts in op.facts.elsewhere:
        first, second = facts.shape(op.input), facts.shape(op.node)
        if first is not None and second is not None:
            still = kept_axes(first, second)
            axes = {axis: at & still.get(axis, set()) for axis, at in axes.items()}
    return _carry(op, {axis: min(at) for axis, at in axes.items() if at})


def permute(op: Op) -> Lifted:
    """Output axis i is input axis dims[i]."""
    rank = op.facts.rank(op.input) if isinstance(op.input, Node) else None
    dims: Any = op.get("dims")
    if isinstance(dims, int):  # spelled x.permute(0, 2, 1)
        dims = op.node.args[1:]
    if rank is None or not static(dims) or len(dims) != rank:
        return Opaque()
    return _carry(op, {d % rank - rank: i - rank for i, d in enumerate(dims)})


def transpose(op: Op) -> Lifted:
    """Two axes swapped."""
    rank = op.facts.rank(op.input) if isinstance(op.input, Node) else None
    pair = op.args.get("dim0"), op.args.get("dim1")
    if rank is None or not all(isinstance(dim, int) for dim in pair):
        return Opaque()
    a, b = (int(dim) % rank - rank for dim in pair if isinstance(dim, int))
    axes = {axis: axis for axis in range(-rank, 0)}
    axes[a], axes[b] = b, a
    return _carry(op, axes)


def attribute(op: Op) -> Lifted:
    """x.mT is x with its last two axes swapped; no other attribute is a layout op."""
    if op.args.get("name") != "mT":
        return Opaque()
    return transpose(replace(op, args={**op.args, "dim0": -2, "dim1": -1}))


def movedim(op: Op) -> Lifted:
    """Some axes moved to new places; the others fill what is left, in their order."""
    rank = op.facts.rank(op.input) if isinstance(op.input, Node) else None
    given: Any = (op.args.get("source"), op.args.get("destination"))
    froms, tos = ((dims,) if isinstance(dims, int) else dims for dims in given)
    if rank is None or not froms or not tos or not static(froms, tos):
        return Opaque()
    to = {source % rank: place % rank for source, place in zip(froms, tos)}
    free = iter(sorted(set(range(rank)) - set(to.values())))
    places = [to[axis] if axis in to else next(free) for axis in range(rank)]
    return _carry(op, {axis - rank: place - rank for axis, place in enumerate(places)})


def same_layout(op: Op) -> Lifted:
    """contiguous: every axis stays where it is."""
    rank = op.facts.rank(op.input) if isinstance(op.input, Node) else None
    return Opaque() if rank is None else _carry(op, {a: a for a in range(-rank, 0)})


def mean(op: Op) -> Lifted:
    """The mean over some axes; the others keep their channels apart."""
    dims: Any = op.get("dim")
    rank = op.facts.rank(op.input) if isinstance(op.input, Node) else None
    if rank is None or dims is None or not static(dims) or op.args.get("dtype"):
        return Opaque()
    gone = {d % rank for d in ((dims,) if isinstance(dims, int) else dims)}
    left = [axis for axis in range(rank) if axis not in gone]
    if op.get("keepdim", False):
        return _carry(op, {a - rank: a - rank for a in left}, computes=True)
    axes = {a - rank: i - len(left) for i, a in enumerate(left)}
    return _carry(op, axes, computes=True)


def adaptive_pool(op: Op) -> Lifted:
    """Adaptive average pooling: the weights of each window sum to one."""
    return _channel_kept(op)


def resize(op: Op) -> Lifted:
    """Interpolation: the weights of all modes but bicubic are taken to sum to one."""
    modes = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")
    if op.get("mode", "nearest") not in modes:
        return Opaque()
    return _channel_kept(op)


def _channel_kept(op: Op) -> Lifted:
    rank = op.facts.rank(op.input) if isinstance(op.input, Node) else None
    spatial = op.get("spatial") or (None if rank is None else rank - 2)
    if spatial is None:
        return Opaque(Reason.UNKNOWN_SHAPE)
    axis = -(int(spatial) + 1)
    kept = (axis, axis - 1) if rank == spatial + 2 else (axis,)  # the batch, if any
    return _carry(op, {whole: whole for whole in kept}, computes=True)
