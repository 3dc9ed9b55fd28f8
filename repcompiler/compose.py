"""For each value, the few ways it is affine in earlier values, or the reason why not.

The graph is walked once. An operator's own meaning is applied to every meaning of its
operands (and to the operands as they are), term by term; terms of one source are added.
What comes out are **candidates**, kept few: the search stays local and linear in the
number of nodes. Nothing is costed here: refusing a dear composition early would move
that branch to another source, and later sums would no longer share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from torch.fx import Graph, Node

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
    atom,
)
from repcompiler.facts import Facts
from repcompiler.lift import Affine, Alias, Carry, Lifted, Opaque, Stack
from repcompiler.reasons import Reason

MOST_TERMS = 4
# A concat has a term for each of its parts at least.
MOST_STACKED = 8
# How many candidates a value keeps, by their number of terms.
BEAM: Mapping[int, int] = {0: 1, 1: 6, 2: 4, 3: 2, **dict.fromkeys(range(4, 9), 1)}


@dataclass(frozen=True)
class Composed:
    """Every value's own meaning, its candidates, and the refusals met on the way."""

    lifted: Mapping[Node, Lifted]
    candidates: Mapping[Node, tuple[Meaning, ...]]
    refusals: Mapping[Node, tuple[Refusal, ...]]


@dataclass
class _Search:
    facts: Facts
    candidates: dict[Node, tuple[Meaning, ...]] = field(
        default_factory=dict[Node, tuple[Meaning, ...]]
    )
    refusals: dict[Node, list[Refusal]] = field(
        default_factory=dict[Node, list[Refusal]]
    )

    def options(self, node: Node) -> tuple[Meaning, ...]:
        """The value as it is, then its other meanings."""
        return (atom(node), *self.candidates.get(node, ()))

    def refuse(self, node: Node, refusal: Refusal) -> None:
        """Remember why one way of composing at `node` is closed."""
        self.refusals.setdefault(node, []).append(refusal)


def compose(graph: Graph, lifted: Mapping[Node, Lifted], facts: Facts) -> Composed:
    """Candidates of every value of the graph, in one walk."""
    search = _Search(facts)
    for node in graph.nodes:
        own = lifted.get(node, Opaque())
        if isinstance(own, Affine):
            found = _affine_candidates(node, own, search)
        elif isinstance(own, Carry):
            found = _carried_candidates(node, own, search)
        elif isinstance(own, Stack):
            found = _stacked_candidates(node, own, search)
        elif isinstance(own, Alias):
            options = search.options(own.source)
            found = [_past([(own.source, meaning)], meaning) for meaning in options]
        else:
            continue
        search.candidates[node] = _keep_few([m for m in found if _closed(m)])
    frozen = {node: tuple(refusals) for node, refusals in search.refusals.items()}
    return Composed(lifted, search.candidates, frozen)


def _past(choice: Iterable[tuple[Node, Meaning]], meaning: Meaning) -> Meaning:
    """`meaning` with the values that the choice of its operands' meanings left out."""
    left: set[Node] = set()
    for operand, chosen in choice:
        if chosen.terms != (Term(operand),) or chosen.bias is not None:
            left |= {operand, *chosen.through}
    return replace(meaning, through=frozenset(left))


def _closed(meaning: Meaning) -> bool:
    return meaning.through.isdisjoint(term.source for term in meaning.terms)


def _keep_few(found: list[Meaning]) -> tuple[Meaning, ...]:
    """One meaning per set of sources, and of each length only the nearest few."""
    unique: dict[object, Meaning] = {}
    for meaning in found:
        unique.setdefault(tuple(term.key for term in meaning.terms), meaning)
    kept: list[Meaning] = []
    left = dict(BEAM)
    for meaning in unique.values():
        length = len(meaning.terms)
        if left.get(length, 0) > 0:
            left[length] -= 1
            kept.append(meaning)
    return tuple(kept)


def _affine_candidates(node: Node, own: Affine, search: _Search) -> list[Meaning]:
    found: list[Meaning] = []
    options = [search.options(source) for source, _ in own.parts]
    for choice in product(*options):
        meaning = _combine(node, own, choice, search)
        if isinstance(meaning, Refusal):
            search.refuse(node, meaning)
        elif len(meaning.terms) <= _most_terms(meaning):
            operands = (source for source, _ in own.parts)
            found.append(_past(zip(operands, choice), meaning))
    return found


def _most_terms(meaning: Meaning) -> int:
    return MOST_STACKED if any(term.rows for term in meaning.terms) else MOST_TERMS


def _combine(
    node: Node, own: Affine, choice: tuple[Meaning, ...], search: _Search
) -> Meaning | Refusal:
    """bias + Σ part(choice), with terms of one source added."""
    terms: dict[object, Term] = {}
    bias = own.bias
    axes = {own.axis}
    for (source, part), meaning in zip(own.parts, choice):
        mapped = _distribute(part, meaning, search.facts)
        if isinstance(mapped, Refusal):
            return replace(mapped, nodes=(node, source))
        axes.add(mapped.axis)
        bias = algebra.add_vectors(bias, mapped.bias)
        for term in mapped.terms:
            merged = _merge(terms.get(term.key), term)
            if isinstance(merged, Refusal):
                return replace(merged, nodes=(node, source))
            terms[term.key] = merged
    axes.discard(None)
    if len(axes) > 1:
        return Refusal(Reason.AXIS_MISMATCH, (node,))
    if not blocks.fit_together(tuple(terms.values())):
        return Refusal(Reason.CHANNEL_MISMATCH, (node,))
    if len(own.parts) > 1 and len(terms) > 1 and not search.facts.exampled:
        return Refusal(Reason.UNKNOWN_SHAPE, (node,))
    channels = own.channels or next((m.channels for m in choice if m.channels), None)
    return Meaning(tuple(terms.values()), bias, axes.pop() if axes else None, channels)


def _merge(old: Term | None, new: Term) -> Term | Refusal:
    if old is None:
        return new
    added = algebra.add(old.map, new.map)
    return added if isinstance(added, Refusal) else replace(old, map=added)


def _distribute(part: Map, meaning: Meaning, facts: Facts) -> Meaning | Refusal:
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
    terms: list[Term] = []
    for term in meaning.terms:
        if len(meaning.terms) > 1 and not _channels_fit(part, term, facts):
            return Refusal(Reason.CHANNEL_MISMATCH)
        mapped = _apply_to_rows(part, term, biased=meaning.bias is not None)
        if isinstance(mapped, Refusal):
            return mapped
        terms.append(mapped)
    bias = algebra.push_bias(part, meaning.bias)
    axis = meaning.axis if part.axis is None else part.axis
    return Meaning(tuple(terms), bias, axis, part.channels or meaning.channels)


def _pointwise(map: Map) -> bool:
    if isinstance(map, Window):
        return map.pointwise
    return isinstance(map, Transposed) and map.local


def _channels_fit(part: Map, term: Term, facts: Facts) -> bool:
    """Whether a term has all the channels of its sum, and so does not broadcast."""
    wanted = part.channels if isinstance(part, Diagonal) else part.in_channels
    if wanted is None or part.axis is None or term.rows is not None:
        return True
    return _channels_of(term, part.axis, facts) == wanted


def _channels_of(term: Term, axis: int, facts: Facts) -> int | None:
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
    moved = _with_axes(term.map, part)
    mapped = algebra.compose(part, moved, biased=biased)
    if isinstance(mapped, Refusal):
        return mapped
    return replace(term, map=mapped, before=term.before + term.after, after=())


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


def _carried_candidates(node: Node, own: Carry, search: _Search) -> list[Meaning]:
    found = [Meaning((Term(own.source, before=(own.step,)),))]
    for meaning in search.candidates.get(own.source, ()):
        carried = _carry(own.step, meaning, search.facts)
        if isinstance(carried, Refusal):
            search.refuse(node, replace(carried, nodes=(node, own.source)))
        else:
            found.append(_past([(own.source, meaning)], carried))
    return found


def _carry(step: Step, meaning: Meaning, facts: Facts) -> Meaning | Refusal:
    """step(meaning): the step goes behind windows and in front of diagonal maps.

    An operand of a sum that broadcasts where the step averages or cuts is not the same
    afterwards. What a step does to one block of the channels is not known.
    """
    if step.pick is not None and meaning.axis in (None, step.pick[0]):
        return _picked(step, *step.pick, meaning, facts)
    if (step.computes or step.cuts) and len(meaning.terms) > 1:
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


# ---- blocks of channels ------------------------------------------------------------


def _picked(
    step: Step, axis: int, block: Block, meaning: Meaning, facts: Facts
) -> Meaning | Refusal:
    """The block of the channels of a value."""
    terms: list[Term] = []
    for term in meaning.terms:
        whole = Block(0, block.total, block.total)
        if term.rows is None and _channels_of(term, axis, facts) != block.total:
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


def _stacked_candidates(node: Node, own: Stack, search: _Search) -> list[Meaning]:
    """The parts as they are, as their nearest meanings, or all over one source."""
    if len(own.parts) > MOST_STACKED:
        return []
    options = [_single_terms(part, own.axis, search) for part in own.parts]
    choices = [tuple(found[min(1, len(found) - 1)] for found in options)]
    shared = set.intersection(*({m.terms[0].key for m in found} for found in options))
    for key in (m.terms[0].key for m in options[0]):
        if key in shared:
            same = (next(m for m in f if m.terms[0].key == key) for f in options)
            choices.append(tuple(same))
    choices.append(tuple(found[0] for found in options))
    stacked: list[Meaning] = []
    for choice in choices:
        found = _stacked(own, choice, search.facts)
        if isinstance(found, Refusal):
            search.refuse(node, replace(found, nodes=(node,)))
        else:
            stacked += (_past(zip(own.parts, choice), meaning) for meaning in found)
    return stacked


def _single_terms(part: Node, axis: int, search: _Search) -> list[Meaning]:
    """The meanings of a part that are one term, on the axis of the concat."""
    return [
        meaning
        for meaning in search.options(part)
        if len(meaning.terms) == 1
        and meaning.axis in (None, axis)
        and meaning.terms[0].rows is None
        and not meaning.terms[0].after
    ]


def _stacked(
    own: Stack, choice: tuple[Meaning, ...], facts: Facts
) -> list[Meaning] | Refusal:
    """The concat of the choice, and the same as one map if there is one source."""
    total, start = sum(own.sizes), 0
    terms: list[Term] = []
    for meaning, size in zip(choice, own.sizes):
        term = meaning.terms[0]
        if _channels_of(term, own.axis, facts) != size:
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
