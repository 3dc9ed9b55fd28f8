"""For each value, the few ways it is affine in earlier values, or the reason why not.

The graph is walked once. An operator's own meaning is applied to every meaning of its
operands (and to the operands as they are), term by term; terms of one source are added.
What comes out are **candidates**, kept few: the search stays local and linear in the
number of nodes. Nothing is costed here: refusing a dear composition early would move
that branch to another source, and later sums would no longer share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from torch.fx import Graph, Node

from repcompiler import algebra, blocks, meanings
from repcompiler.affine import (
    Diagonal,
    Meaning,
    Refusal,
    Step,
    Term,
    atom,
)
from repcompiler.facts import Facts
from repcompiler.lift import Affine, Alias, Carry, Lifted, Opaque, Stack
from repcompiler.reasons import Reason

MOST_TERMS = 4
# A concat has a term for each of its parts at least.
MOST_STACKED = 8
# How many candidates a value keeps, by their number of terms.
BEAM: Mapping[int, int] = {0: 1, 1: 6, 2: 6, 3: 2, **dict.fromkeys(range(4, 9), 1)}


@dataclass(frozen=True)
class Composed:
    """Every value's own meaning, its candidates, and the refusals met on the way."""

    lifted: Mapping[Node, Lifted]
    candidates: Mapping[Node, tuple[Meaning, ...]]
    refusals: Mapping[Node, tuple[Refusal, ...]]


@dataclass
class _Search:
    facts: Facts
    lifted: Mapping[Node, Lifted]
    candidates: dict[Node, tuple[Meaning, ...]] = field(
        default_factory=dict[Node, tuple[Meaning, ...]]
    )
    refusals: dict[Node, list[Refusal]] = field(
        default_factory=dict[Node, list[Refusal]]
    )

    def options(self, node: Node) -> tuple[Meaning, ...]:
        """The value as it is, then its other meanings.

        A view costs nothing: as a source it says no more than what it is a view of.
        """
        others = self.candidates.get(node, ())
        return others if others and self._is_view(node) else (atom(node), *others)

    def _is_view(self, node: Node) -> bool:
        own = self.lifted.get(node)
        return isinstance(own, Carry) and own.is_view

    def refuse(self, node: Node, refusal: Refusal) -> None:
        """Remember why one way of composing at `node` is closed."""
        self.refusals.setdefault(node, []).append(refusal)


def compose(graph: Graph, lifted: Mapping[Node, Lifted], facts: Facts) -> Composed:
    """Candidates of every value of the graph, in one walk."""
    search = _Search(facts, lifted)
    for node in graph.nodes:
        own = lifted.get(node, Opaque())
        if isinstance(own, Affine):
            found = _affine_candidates(node, own, search)
        elif isinstance(own, Carry):
            found = _carried_candidates(node, own.source, own.step, search)
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
    """One meaning per set of sources; of each length the nearest few.

    Of three terms and more the farthest too: a norm behind a sum of three convs goes
    into them only where all three are taken.
    """
    unique: dict[object, Meaning] = {}
    for meaning in found:
        unique.setdefault(tuple(term.key for term in meaning.terms), meaning)
    by_length: dict[int, list[object]] = {}
    for key, meaning in unique.items():
        by_length.setdefault(len(meaning.terms), []).append(key)
    kept: set[object] = set()
    for length, keys in by_length.items():
        few = BEAM.get(length, 0)
        kept.update(keys[:few] + (keys[-1:] if few and length > 2 else []))
    return tuple(meaning for key, meaning in unique.items() if key in kept)


def _affine_candidates(node: Node, own: Affine, search: _Search) -> list[Meaning]:
    found: list[Meaning] = []
    options = [search.options(source) for source, _ in own.parts]
    for choice in _nearest_first(options):
        meaning = _combine(node, own, choice, search)
        if isinstance(meaning, Refusal):
            search.refuse(node, meaning)
        elif len(meaning.terms) <= _most_terms(meaning):
            operands = (source for source, _ in own.parts)
            found.append(_past(zip(operands, choice), meaning))
    if own.step is not None:
        # A conv before a pool is one window with it; a norm is no window.
        carried = _carried_candidates(node, own.parts[0][0], own.step, search)
        found += (m for m in carried if isinstance(m.terms[0].map, Diagonal))
    return found


def _nearest_first(
    options: Sequence[Sequence[Meaning]],
) -> Iterator[tuple[Meaning, ...]]:
    """One meaning for each operand, those that go back least over all operands first.

    In the order of `product` the few that are kept would all have the first operand as
    it is.
    """
    numbered = [tuple(enumerate(meanings)) for meanings in options]
    choices = sorted(product(*numbered), key=lambda choice: sum(i for i, _ in choice))
    return (tuple(meaning for _, meaning in choice) for choice in choices)


def _most_terms(meaning: Meaning) -> int:
    return MOST_STACKED if any(term.rows for term in meaning.terms) else MOST_TERMS


def _combine(
    node: Node, own: Affine, choice: tuple[Meaning, ...], search: _Search
) -> Meaning | Refusal:
    """bias + Σ part(choice), with terms of one source added where they can be."""
    terms: list[Term] = []
    bias = own.bias
    axes = {own.axis}
    for (source, part), meaning in zip(own.parts, choice):
        mapped = meanings.distribute(part, meaning, search.facts)
        if isinstance(mapped, Refusal):
            return replace(mapped, nodes=(node, source))
        axes.add(mapped.axis)
        bias = algebra.add_vectors(bias, mapped.bias)
        for term in mapped.terms:
            refused = _add(terms, term)
            if refused is None:
                continue
            refused = replace(refused, nodes=(node, source))
            if not _even(terms, term):
                return refused
            search.refuse(node, refused)
            terms.append(term)
    axes.discard(None)
    if len(axes) > 1:
        return Refusal(Reason.AXIS_MISMATCH, (node,))
    if not blocks.fit_together(terms):
        return Refusal(Reason.CHANNEL_MISMATCH, (node,))
    if len(own.parts) > 1 and len(terms) > 1 and not search.facts.exampled:
        return Refusal(Reason.UNKNOWN_SHAPE, (node,))
    channels = own.channels or next((m.channels for m in choice if m.channels), None)
    return Meaning(tuple(terms), bias, axes.pop() if axes else None, channels)


def _add(terms: list[Term], new: Term) -> Refusal | None:
    """Add to a term of the same key, or as one of its own; why it cannot be."""
    refused = None
    for place, old in enumerate(terms):
        if old.key != new.key:
            continue
        merged = meanings.merge(old, new)
        if not isinstance(merged, Refusal):
            terms[place] = merged
            return None
        refused = merged
    if refused is None:
        terms.append(new)
    return refused


def _even(terms: Sequence[Term], new: Term) -> bool:
    """Whether it has the size of every term of its key, for inputs of any size."""
    return all(algebra.same_size(t.map, new.map) for t in terms if t.key == new.key)


def _carried_candidates(
    node: Node, source: Node, step: Step, search: _Search
) -> list[Meaning]:
    found: list[Meaning] = []
    for meaning in search.options(source):
        carried = meanings.carry(step, meaning, search.facts)
        if isinstance(carried, Refusal):
            search.refuse(node, replace(carried, nodes=(node, source)))
        else:
            found.append(_past([(source, meaning)], carried))
    return found


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
        found = meanings.stacked(own, choice, search.facts)
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
