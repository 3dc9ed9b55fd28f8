"""Choose, for the whole graph, which values become ops and over which sources.

The **plan** of a value is the set of ops that make it. Walking in topological order,
each value takes the cheapest of "as it was" and its candidates, each added to the union
of its sources' plans, shared ops counted once. An op that is needed for certain
(something opaque reads its value) is *settled*: it costs nothing from then on, and
leaves the plans, which therefore stay short and keep the whole linear in the number of
nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from repcompiler.affine import Meaning
from repcompiler.compose import Composed
from repcompiler.cost import Known, Prices
from repcompiler.facts import Facts
from repcompiler.lift import Affine, Bundle, Carry, Lifted, Opaque, Stack
from repcompiler.pricing import Ops as Plan
from repcompiler.pricing import Pricing

# Of a plan's cost: what a plan with more ops may cost at most.
CLEARLY = 0.9


@dataclass(frozen=True)
class Selected:
    """The chosen meaning of every rewritten value; all others stay as they were.

    Attributes:
        chosen: value → meaning, for the values that will really be computed.
        live: all values that will be computed, rewritten or not.
        dearer: values for which some candidate was exact but cost more.
        cost_before, cost_after: nominal microseconds of the affine part.
        size: (ops, multiplications) of the affine part.
        grown: chosen values whose ops, but for what they share, cost more than the
            value's own op did, so that they do the work of values between as well.
    """

    chosen: Mapping[Node, Meaning]
    live: frozenset[Node]
    dearer: frozenset[Node]
    cost_before: float
    cost_after: float
    size: tuple[int, float]
    grown: frozenset[Node] = frozenset()


@dataclass
class _Selection:
    composed: Composed
    pricing: Pricing
    plans: dict[Node, Plan] = field(default_factory=dict[Node, Plan])
    choice: dict[Node, Meaning | None] = field(
        default_factory=dict[Node, Meaning | None]
    )
    dearer: set[Node] = field(default_factory=set[Node])
    settled: set[object] = field(default_factory=set[object])

    def plan_of(self, node: Node) -> Plan:
        """The ops of a value that are not settled yet."""
        plan = self.plans.get(node, {})
        if any(op in self.settled for op in plan):
            plan = {op: c for op, c in plan.items() if op not in self.settled}
            self.plans[node] = plan
        return plan

    def union(self, sources: Iterable[Node]) -> Plan:
        """All ops that the sources need, each once."""
        merged: Plan = {}
        for source in sources:
            merged.update(self.plan_of(source))
        return merged


def select(
    graph: Graph, composed: Composed, facts: Facts, known: Known | None = None
) -> Selected:
    """The cheapest plan that greedy choice in topological order finds.

    With `known`, measured costs decide wherever there are any. Its cost is never above
    that of the graph as it was: where the greedy plan duplicates work, the values in
    between are kept instead.
    """
    prices = Prices(known, facts.samples)
    pricing = Pricing.of(graph, composed.lifted, facts, prices)
    forced = {node for node in graph.nodes if _is_forced(node, composed)}
    best = _choose(graph, composed, pricing, forced)
    for _ in range(4):
        shared = _recomputed(best, composed) - forced
        if not shared:
            break
        forced |= shared
        other = _choose(graph, composed, pricing, forced)
        if not _is_better(other, best, measured=known is not None):
            break
        best = other
    if best.cost_after > best.cost_before:
        return _choose(graph, composed, pricing, set(graph.nodes))
    return best


def _is_better(other: Selected, best: Selected, *, measured: bool) -> bool:
    """Whether it costs less, or what costs less is not clearly worth its more ops.

    Pieces of a split linear layer are cheaper one by one, and more layers together.
    """
    if measured or other.size[0] >= best.size[0]:
        return other.cost_after < best.cost_after
    return not _is_clear(best.size, best.cost_after, other.size, other.cost_after)


def _is_clear(
    size: tuple[int, float], cost: float, other: tuple[int, float], others: float
) -> bool:
    """Whether more ops save multiplications, and a share of the cost that counts."""
    return size[1] < other[1] and cost < CLEARLY * others


def _choose(
    graph: Graph, composed: Composed, pricing: Pricing, forced: set[Node]
) -> Selected:
    state = _Selection(composed, pricing)
    before = 0.0
    for node in graph.nodes:
        if not _is_affine(node, composed):
            state.plans[node] = state.union(node.all_input_nodes)
            _settle(state, node)
            continue
        own = state.pricing.own(node)
        before += own
        _take_cheapest(node, own, state)
        if node in forced:
            _settle(state, node)
    live = _live(graph, state)
    chosen = {n: m for n in graph.nodes if n in live and (m := state.choice.get(n))}
    done = {n: _realised_ops(n, state) for n in graph.nodes if n in live}
    every = {op: price for ops in done.values() for op, price in ops.items()}
    times = Counter(op for ops in done.values() for op in ops)
    alone = {
        n: sum(price for op, price in done[n].items() if times[op] == 1) for n in chosen
    }
    grown = frozenset(n for n in chosen if alone[n] > state.pricing.own(n) * (1 + 1e-9))
    dearer = frozenset(state.dearer)
    after = sum(every.values())
    size = pricing.size(every)
    return Selected(chosen, frozenset(live), dearer, before, after, size, grown)


def _is_affine(node: Node, composed: Composed) -> bool:
    return not isinstance(composed.lifted.get(node, Opaque()), Opaque)


def _is_forced(node: Node, composed: Composed) -> bool:
    """Whether something that is not affine reads the value."""
    return any(not _is_affine(user, composed) for user in node.users)


def _settle(state: _Selection, node: Node) -> None:
    state.settled.update(state.plan_of(node))
    state.plans[node] = {}


def _take_cheapest(node: Node, own: float, state: _Selection) -> None:
    best = state.union(node.all_input_nodes)
    best[node] = own
    choice = None
    most = state.pricing.size(best)[0]
    measured = state.pricing.prices.known is not None
    for plan, meaning in _plans(node, state):
        better = sum(plan.values()) < sum(best.values()) * (1 - 1e-9)
        if better and (measured or _is_worth(plan, best, most, state.pricing)):
            best, choice = plan, meaning
        elif not better and _really_merges(node, meaning):
            state.dearer.add(node)
    state.plans[node], state.choice[node] = best, choice


def _plans(node: Node, state: _Selection) -> list[tuple[Plan, Meaning]]:
    """A plan for each candidate, those with the fewest ops first."""
    found: list[tuple[Plan, Meaning]] = []
    for index, meaning in enumerate(state.composed.candidates.get(node, ())):
        ops = state.pricing.ops(node, index, meaning)
        plan = state.union(meaning.sources)
        plan.update((op, c) for op, c in ops.items() if op not in state.settled)
        found.append((plan, meaning))
    return sorted(found, key=lambda pair: state.pricing.size(pair[0])[0])


def _is_worth(plan: Plan, other: Plan, most: int, pricing: Pricing) -> bool:
    """Whether a cheaper plan may be taken in place of one that may have fewer ops.

    Not with more than `most`, what the value takes as it was: where a pool is kept for
    another reader, a pool of fewer channels for a head of its own is one op more. As
    many ops with as many multiplications are what was there, made anew. More ops than
    the other's have to save multiplications, and a share of the cost that is beyond
    what nominal costs can tell. Two convs and a sum nominally cost less than a conv
    over a concat, because they move fewer bytes; runtimes differ too much for that.
    """
    size, others = pricing.size(plan), pricing.size(other)
    if size[0] > most or (size == others and pricing.padded.intersection(plan)):
        return False
    costs = sum(plan.values()), sum(other.values())
    return size[0] <= others[0] or _is_clear(size, costs[0], others, costs[1])


def _really_merges(node: Node, meaning: Meaning) -> bool:
    return any(source not in node.all_input_nodes for source in meaning.sources)


def _realised_ops(node: Node, state: _Selection) -> Plan:
    """The ops that a value takes in the end, beyond its sources."""
    if not _is_affine(node, state.composed):
        return {}
    meaning = state.choice.get(node)
    if meaning is None:
        return {node: state.pricing.own(node)}
    return state.pricing.ops(node, 0, meaning)


def _live(graph: Graph, state: _Selection) -> set[Node]:
    """Values that the chosen plan computes."""
    live = {n for n in graph.nodes if n.op in ("output", "placeholder")}
    live |= {n for n in graph.nodes if not n.users}
    for node in reversed(list(graph.nodes)):
        if node in live:
            meaning = state.choice.get(node)
            needed = node.all_input_nodes if meaning is None else meaning.sources
            live.update(needed)
            if meaning is not None:
                steps = [s for t in meaning.terms for s in (*t.before, *t.after)]
                live.update(i for s in steps for i in s.node.all_input_nodes[1:])
    return live


def _recomputed(selected: Selected, composed: Composed) -> set[Node]:
    """Values with several readers whose work the plan does more than once.

    A norm that every reader takes in for nothing is not worked out at all.
    """
    times: Counter[Node] = Counter(selected.live)
    for value in selected.grown:
        meaning = selected.chosen[value]
        times.update(between(value, meaning, composed.lifted) - {value})
    return {n for n, count in times.items() if count > 1 and len(n.users) > 1}


def between(value: Node, meaning: Meaning, lifted: Mapping[Node, Lifted]) -> set[Node]:
    """Nodes after the sources, up to the value; size arguments are not among them.

    Where a block of a concat is all that counts, what its other parts come from is
    among them too, back to the first node that is not affine.
    """
    stop = set(meaning.sources)
    seen, stack = {value}, [value]
    while stack:
        operands = _operands(lifted[stack.pop()], lifted)
        fresh = [i for i in operands if i not in seen | stop and _known(i, lifted)]
        seen.update(fresh)
        stack.extend(fresh)
    return seen


def _known(node: Node, lifted: Mapping[Node, Lifted]) -> bool:
    return not isinstance(lifted.get(node, Opaque()), Opaque)


def unread(
    nodes: Iterable[Node], meaning: Meaning, lifted: Mapping[Node, Lifted]
) -> tuple[Node, ...]:
    """What the nodes between read, and the meaning has no use for."""
    operands = [i for node in nodes for i in _operands(lifted[node], lifted)]
    outside = [i for i in operands if not _known(i, lifted)]
    return tuple(i for i in dict.fromkeys(outside) if i not in meaning.sources)


def _operands(own: Lifted, lifted: Mapping[Node, Lifted]) -> tuple[Node, ...]:
    if isinstance(own, Affine):
        return tuple(source for source, _ in own.parts)
    if isinstance(own, Stack):
        return own.parts
    if isinstance(own, Carry):
        read = own.step.node.all_input_nodes[0]
        return (read if isinstance(lifted.get(read), Bundle) else own.source,)
    return () if isinstance(own, Opaque) else (own.source,)
