"""Apply a map, a layout op or a concat to whole meanings, term by term.

`algebra` chains and adds single maps; here is what becomes of a sum of them, of the
layout ops around a map, and of blocks of channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import Node

from repcompiler import algebra, blocks
from repcompiler.affine import (
    Block,
    Diagonal,
    Map,
    Meaning,
    Refusal,
    Step,
    Term,
    Transposed,
    Window,
)
from repcompiler.facts import Facts, op_name
from repcompiler.lift import Stack
from repcompiler.reasons import Reason
from repcompiler.vectors import vanishes


def merge(old: Term, new: Term) -> Term | Refusal:
    """The sum of two terms of one key."""
    added = algebra.add(old.map, new.map)
    return added if isinstance(added, Refusal) else replace(old, map=added)


def distribute(part: Map, meaning: Meaning, facts: Facts) -> Meaning | Refusal:
    """part(meaning), term by term.

    A window passes over a sum only if it is pointwise: an operand of the sum might
    broadcast over positions, and then it has no neighbours to read. The parts of a
    concat never broadcast.
    """
    if isinstance(part, Diagonal) and part.is_identity:
        return meaning
    spatial = not (isinstance(part, Diagonal) or _pointwise(part))
    if spatial and len(meaning.terms) > 1 and not blocks.are_distinct(meaning.terms):
        return Refusal(Reason.SPATIAL_SUM)
    if part.axis is not None and meaning.axis not in (None, part.axis):
        return Refusal(Reason.AXIS_MISMATCH)
    biased = _is_biased(part, meaning)
    terms: list[Term] = []
    for term in meaning.terms:
        if len(meaning.terms) > 1 and not _channels_fit(part, term, facts):
            return Refusal(Reason.CHANNEL_MISMATCH)
        mapped = _apply_to_rows(part, term, biased=biased)
        if isinstance(mapped, Refusal):
            return mapped
        terms.append(mapped)
    bias = algebra.push_bias(part, meaning.bias)
    axis = meaning.axis if part.axis is None else part.axis
    return Meaning(tuple(terms), bias, axis, part.channels or meaning.channels)


def _is_biased(part: Map, meaning: Meaning) -> bool:
    """Whether a constant stands before `part`; one that cancels does not count.

    A border of what a norm makes of zero is written as pad(norm(x) - v) + v.
    """
    if not (isinstance(part, Window) and part.pads):
        return meaning.bias is not None
    return not vanishes(meaning.bias)


def _pointwise(map: Map) -> bool:
    if isinstance(map, Window):
        return map.pointwise
    return isinstance(map, Transposed) and map.local


def _channels_fit(part: Map, term: Term, facts: Facts) -> bool:
    """Whether a term has all the channels of its sum, and so does not broadcast."""
    wanted = part.channels if isinstance(part, Diagonal) else part.in_channels
    if wanted is None or part.axis is None or term.rows is not None:
        return True
    return channels_of(term, part.axis, facts) == wanted


def channels_of(term: Term, axis: int, facts: Facts) -> int | None:
    """How many channels the term has on `axis`."""
    if not isinstance(term.map, Diagonal):
        return term.map.channels
    if term.before and term.before[-1].pick:
        return term.before[-1].pick[1].size
    value = term.before[-1].node if term.before else term.source
    return facts.size(value, axis)


def _apply_to_rows(part: Map, term: Term, *, biased: bool) -> Term | Refusal:
    """part(term), where the term may make a block of the channels only."""
    if term.rows is None:
        return _apply(part, term, biased=biased)
    found = blocks.columns(part, term.rows)
    if isinstance(found, Refusal):
        return found
    narrow, rows = found
    mapped = _apply(narrow, replace(term, rows=None), biased=biased)
    return mapped if isinstance(mapped, Refusal) else replace(mapped, rows=rows)


def _apply(part: Map, term: Term, *, biased: bool) -> Term | Refusal:
    """part(after(map(before(source)))) as one term.

    A per-channel scale commutes with the layout ops behind the term's own map. A
    pointwise map does too, so a map behind them is met by moving the term's own map
    there; a real window cannot be moved.
    """
    if isinstance(part, Diagonal) or not term.after:
        mapped = algebra.compose(_facing(part, term), term.map, biased=biased)
        return mapped if isinstance(mapped, Refusal) else replace(term, map=mapped)
    assert not isinstance(term.map, Diagonal)
    if not _pointwise(term.map) or not isinstance(term.map, Window):
        return Refusal(Reason.LAYOUT)
    if not isinstance(part, Window):
        return Refusal(Reason.LAYOUT)
    same = term.map.in_channels == term.map.out_channels
    if not same and _name_channels(term.after, term.map.axis):
        return Refusal(Reason.LAYOUT)
    moved = _with_axes(term.map, part)
    mapped = algebra.compose(part, moved, biased=biased)
    if isinstance(mapped, Refusal):
        return mapped
    return replace(term, map=mapped, before=term.before + term.after, after=())


_SIZED = frozenset(
    "reshape view _unsafe_view _reshape_alias view_copy unflatten expand broadcast_to "
    "as_strided reshape_as view_as expand_as resize".split()
)


def _name_channels(steps: tuple[Step, ...], axis: int | None) -> bool:
    """Whether a view says how many channels there are: it fits no value of others."""
    for step in steps:
        axis = None if axis is None else step.axes.get(axis)
        if axis is None or _names_size(step.node, axis):
            return True
    return False


def _names_size(node: Node, axis: int) -> bool:
    """Whether a view says what size this axis of its result has."""
    if node.op == "call_module":
        owner = node.graph.owning_module
        assert owner is not None
        return isinstance(owner.get_submodule(str(node.target)), nn.Unflatten)
    if op_name(node) not in _SIZED:
        return False
    sizes: Any = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
        sizes = sizes[0]
    left = op_name(node) in ("reshape", "view", "_unsafe_view") and not node.kwargs
    return not (left and -len(sizes) <= axis and sizes[axis] == -1)


def _facing(part: Map, term: Term) -> Map:
    """`part` as the term's own map meets it, on the far side of the layout ops."""
    if isinstance(part, Diagonal) and part.axis is not None and term.after:
        return replace(part, axis=term.map.axis)
    return part


def _with_axes(map: Window, like: Window) -> Window:
    """A pointwise map on the layout of `like`."""
    kernel, taps = map.kernel, (1,) * len(like.axes)
    return replace(
        map,
        axis=like.axis,
        axes=tuple(algebra.POINT for _ in like.axes),
        kernel=lambda: (k := kernel()).reshape(*k.shape[:2], *taps),
    )


def carry(step: Step, meaning: Meaning, facts: Facts) -> Meaning | Refusal:
    """step(meaning): the step goes behind windows and in front of diagonal maps.

    An operand of a sum that broadcasts where the step averages, cuts or merges axes is
    not the same afterwards. What a step does to one block of the channels is not known.
    """
    if step.pick is not None and meaning.axis in (None, step.pick[0]):
        return _picked(step, *step.pick, meaning, facts)
    if len(meaning.terms) > 1 and not _passes_sum(step, meaning.terms, facts):
        return Refusal(Reason.SPATIAL_SUM)
    if any(term.rows for term in meaning.terms):
        return Refusal(Reason.LAYOUT)
    axis = None if meaning.axis is None else step.axes.get(meaning.axis)
    if meaning.axis is not None and axis is None:
        return Refusal(Reason.VIEW_MIXES_CHANNELS)
    terms: list[Term] = []
    for term in meaning.terms:
        if isinstance(term.map, Diagonal):
            moved = term.map if term.map.axis is None else replace(term.map, axis=axis)
            terms.append(replace(term, map=moved, before=(*term.before, step)))
        else:
            terms.append(replace(term, after=(*term.after, step)))
    return Meaning(tuple(terms), meaning.bias, axis, meaning.channels)


def _passes_sum(step: Step, terms: Sequence[Term], facts: Facts) -> bool:
    """Whether a step can be done to each term: it renames axes, or all are alike."""
    if step.computes or step.cuts:
        return False
    renames = len(step.axes) == facts.rank(step.node.all_input_nodes[0])
    return renames or _alike(terms, facts)


def _alike(terms: Sequence[Term], facts: Facts) -> bool:
    """Whether the terms of a sum have one shape for inputs of every size."""
    first, *rest = terms
    known = (facts, *facts.elsewhere)
    return all(
        (term.before, term.after) == (first.before, first.after)
        and algebra.same_size(term.map, first.map)
        and all(k.shape(term.source) == k.shape(first.source) for k in known)
        for term in rest
    )


def _picked(
    step: Step, axis: int, block: Block, meaning: Meaning, facts: Facts
) -> Meaning | Refusal:
    """The block of the channels of a value."""
    terms: list[Term] = []
    for term in meaning.terms:
        whole = Block(0, block.total, block.total)
        if term.rows is None and channels_of(term, axis, facts) != block.total:
            return Refusal(Reason.CHANNEL_MISMATCH)
        if term.after:
            return Refusal(Reason.LAYOUT)
        left = (term.rows or whole).cut(block)
        if left is not None:
            mine = block if term.rows is None else block.cut(term.rows)
            assert mine is not None
            picked = _pick_of_term(step, axis, mine, term)
            if isinstance(picked, Refusal):
                return picked
            alone = left.size == block.size
            terms.append(replace(picked, rows=None if alone else left))
    bias = blocks.pick_vector(meaning.bias, block)
    known = axis if bias is not None else meaning.axis
    return Meaning(tuple(terms), bias, known, block.size)


def _pick_of_term(step: Step, axis: int, block: Block, term: Term) -> Term | Refusal:
    """Rows of a term's map; what they do not read is not computed."""
    if block.size == block.total:
        return term
    found = blocks.rows(term.map, block)
    if isinstance(found, Refusal):
        return found
    map, reads = found
    if reads is None:
        return replace(term, map=map)
    inner = axis if isinstance(term.map, Diagonal) else term.map.axis
    cut = replace(step, pick=(inner, reads))
    return replace(term, map=map, before=(*term.before, cut))


def stacked(
    own: Stack, choice: tuple[Meaning, ...], facts: Facts
) -> list[Meaning] | Refusal:
    """The concat of the choice, and the same as one map if there is one source."""
    total, start = sum(own.sizes), 0
    terms: list[Term] = []
    for meaning, size in zip(choice, own.sizes):
        term = meaning.terms[0]
        if channels_of(term, own.axis, facts) != size:
            return Refusal(Reason.CHANNEL_MISMATCH)
        terms.append(replace(term, rows=Block(start, size, total)))
        start += size
    bias = blocks.join_vectors([m.bias for m in choice], own.sizes)
    apart = Meaning(tuple(terms), bias, own.axis, total)
    if len({replace(term, rows=None).key for term in terms}) > 1:
        return [apart]
    whole = blocks.stack([(t.map, t.rows) for t in terms if t.rows])
    if isinstance(whole, Refusal):
        return [apart]
    return [apart.over((replace(terms[0], map=whole, rows=None),)), apart]
