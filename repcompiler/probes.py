"""The smallest input shapes of a region that hold every case of a border.

Per spatial axis: one output, two, and enough for an interior; and, under a stride, both
the least input that gives so many outputs and the most. Odd and even sizes are among
them. Where the layout is free, the rows of a batch are the probes (`PROBE_SCALES`).
"""

from __future__ import annotations

from torch.fx import Node

from repcompiler.affine import (
    Axis,
    Diagonal,
    Meaning,
    Step,
    Term,
    Transposed,
    Window,
)
from repcompiler.facts import Facts

# Zero finds the bias, noise the map; the large and the small show what those two hide.
PROBE_SCALES = (0.0, 1.0, 1e4, 1e-4)
FREE = (3, 4, 5, 3, 4)


def probe_shapes(
    meaning: Meaning, value: Node, facts: Facts, unread: tuple[Node, ...] = ()
) -> list[tuple[tuple[int, ...], ...]]:
    """Shapes of the sources and of what is `unread`; empty where none can be told."""
    has_steps = any(term.before or term.after for term in meaning.terms)
    scatters = any(isinstance(term.map, Transposed) for term in meaning.terms)
    if has_steps or unread or (scatters and len(meaning.terms) > 1):
        shapes = _example_shapes((*meaning.sources, *unread), facts)
        permuted = not unread and all(_is_permuted(t, facts) for t in meaning.terms)
        if shapes or not permuted:
            return shapes
    spatial = max((len(_axes(term)) for term in meaning.terms), default=0)
    inside = [_inside(meaning, index) for index in range(spatial)]
    strided = any(axis.stride > 1 for term in meaning.terms for axis in _axes(term))
    # Padding wider than the window gives outputs even for one input.
    grown = max(
        (-(-a.tail // a.stride) for t in meaning.terms for a in _axes(t)), default=0
    )
    # Sizes grow by axis, so that no axis can be mistaken for another.
    sets = [([n + i for i in range(spatial)], 0) for n in (1, 2)]
    sets += [([n + i for i, n in enumerate(inside)], 0)]
    if strided:
        sets += [([2 + i for i in range(spatial)], 1)]
        sets += [([n + 1 + i for i, n in enumerate(inside)], 1)]
    sets = [([n + max(grown, 0) for n in outputs], rest) for outputs, rest in sets]
    shapes = [
        shape
        for outputs, rest in (sets if spatial else sets[:1])
        if (shape := _shapes(meaning, value, facts, outputs, rest)) is not None
    ]
    return list(dict.fromkeys(shapes))


def _is_permuted(term: Term, facts: Facts) -> bool:
    """Whether nothing is done to the source but that its axes change places."""
    every = set(range(-(facts.rank(term.source) or 0), 0))
    moves = [(set(step.axes), set(step.axes.values())) for step in term.before]
    cut = any(step.cuts or step.computes for step in term.before)
    return all(a == b == every for a, b in moves) and not (cut or term.after)


def _unpermuted(shape: tuple[int, ...], steps: tuple[Step, ...]) -> tuple[int, ...]:
    """The shape of the source that permutations give this one of."""
    for step in reversed(steps):
        places = range(-len(shape), 0)
        shape = tuple(shape[step.axes.get(place, place)] for place in places)
    return shape


def _inside(meaning: Meaning, index: int) -> int:
    """Outputs along an axis that hold both borders and two in between.

    Only outputs whose window leaves the input differ from those in between.
    """
    found = [axes[index] for t in meaning.terms if len(axes := _axes(t)) > index]
    low = max((-(-axis.pad_low // axis.stride) for axis in found), default=0)
    high = max((-(-axis.pad_high // axis.stride) for axis in found), default=0)
    return max(low, 0) + max(high, 0) + 2


def _example_shapes(
    sources: tuple[Node, ...], facts: Facts
) -> list[tuple[tuple[int, ...], ...]]:
    shapes: list[tuple[int, ...]] = []
    for source in sources:
        shape = facts.shape(source)
        if shape is None or None in shape:
            return []
        shapes.append(tuple(size for size in shape if size is not None))
    return [tuple(shapes)]


def _axes(term: Term) -> tuple[Axis, ...]:
    return term.map.axes if isinstance(term.map, Window) else ()


def _shapes(
    meaning: Meaning, value: Node, facts: Facts, outputs: list[int], rest: int
) -> tuple[tuple[int, ...], ...] | None:
    """Source shapes that give about so many outputs along each axis."""
    found: dict[Node, tuple[int, ...]] = {}
    for term in meaning.terms:
        shape = _source_shape(term, meaning, value, facts, outputs, rest)
        shape = shape and _unpermuted(shape, term.before)
        if shape is None or found.setdefault(term.source, shape) != shape:
            return None
    return tuple(found.values())


def _source_shape(
    term: Term,
    meaning: Meaning,
    value: Node,
    facts: Facts,
    outputs: list[int],
    rest: int,
) -> tuple[int, ...] | None:
    axis = term.map.axis if term.map.axis is not None else meaning.axis
    rank = facts.rank(term.source) or facts.rank(value)
    if axis is None:  # one number for all channels: any shape that fits shows the same
        first, *others = (len(PROBE_SCALES), *FREE)[: rank or 2]
        given = [facts.lasting_size(value, i) for i in range(-len(others), 0)]
        return (first, *(size or free for size, free in zip(given, others)))
    spatial = -axis - 1
    rank = max(rank or spatial + 2, spatial + 1)
    channels = _channels(term, meaning, facts, axis)
    if channels is None:
        return None
    axes = _axes(term) or (Axis(),) * spatial
    sizes: list[int] = []
    free = range(1 + len(outputs), 1 + len(axes))  # of a map without a window
    for wanted, window in zip((*outputs, *free), axes):
        least = (wanted - 1) * window.stride + 1 - window.tail
        sizes.append(least + rest * (window.stride - 1))
    leading = (len(PROBE_SCALES), *FREE)[: rank - spatial - 1]
    if any(size < 1 for size in sizes):
        return None
    return (*leading, channels, *sizes)


def _channels(term: Term, meaning: Meaning, facts: Facts, axis: int) -> int | None:
    if not isinstance(term.map, Diagonal):
        return term.map.in_channels
    if term.rows is not None:
        return term.rows.size
    return term.map.channels or meaning.channels or facts.size(term.source, axis)
