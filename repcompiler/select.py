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
from math import inf, prod

from torch.fx import Graph, Node

from repcompiler import blocks, cost
from repcompiler.affine import Diagonal, Meaning, Step, Term, Window
from repcompiler.compose import Composed
from repcompiler.cost import Known, Prices, Work
from repcompiler.facts import Facts
from repcompiler.lift import Affine, Bundle, Carry, Lifted, Opaque, Stack
from repcompiler.partial import Shape

# The nominal image, where no example input gives sizes.
NOMINAL_NUMBERS = 224.0 * 224.0 * 3

Plan = dict[object, float]


@dataclass(frozen=True)
class Selected:
    """The chosen meaning of every rewritten value; all others stay as they were.

    Attributes:
        chosen: value → meaning, for the values that will really be computed.
        live: all values that will be computed, rewritten or not.
        dearer: values for which some candidate was exact but cost more.
        cost_before, cost_after: nominal microseconds of the affine part.
        grown: chosen values whose ops cost more than the value's own op did, so that
            they do the work of values between as well.
    """

    chosen: Mapping[Node, Meaning]
    live: frozenset[Node]
    dearer: frozenset[Node]
    cost_before: float
    cost_after: float
    grown: frozenset[Node] = frozenset()


@dataclass
class _Selection:
    graph: Graph
    composed: Composed
    facts: Facts
    prices: Prices
    numbers: dict[Node, float] = field(default_factory=dict[Node, float])
    plans: dict[Node, Plan] = field(default_factory=dict[Node, Plan])
    choice: dict[Node, Meaning | None] = field(
        default_factory=dict[Node, Meaning | None]
    )
    dearer: set[Node] = field(default_factory=set[Node])
    settled: set[object] = field(default_factory=set[object])
    macs: dict[object, float] = field(default_factory=dict[object, float])

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
    forced = {node for node in graph.nodes if _is_forced(node, composed)}
    best = _choose(graph, composed, facts, forced, prices)
    for _ in range(4):
        shared = _recomputed(best, composed) - forced
        if not shared:
            break
        forced |= shared
        other = _choose(graph, composed, facts, forced, prices)
        if other.cost_after >= best.cost_after:
            break
        best = other
    if best.cost_after > best.cost_before:
        return _choose(graph, composed, facts, set(graph.nodes), prices)
    return best


def _choose(
    graph: Graph, composed: Composed, facts: Facts, forced: set[Node], prices: Prices
) -> Selected:
    state = _Selection(graph, composed, facts, prices)
    before = 0.0
    for node in graph.nodes:
        state.numbers[node] = _numbers(node, state)
        if not _is_affine(node, composed):
            state.plans[node] = state.union(node.all_input_nodes)
            _settle(state, node)
            continue
        own = _own_cost(node, state)
        before += own
        _take_cheapest(node, own, state)
        if node in forced:
            _settle(state, node)
    live = _live(graph, state)
    chosen = {n: m for n in graph.nodes if n in live and (m := state.choice.get(n))}
    after = sum(_realised_cost(node, state) for node in graph.nodes if node in live)
    grown = frozenset(
        n for n in chosen if _realised_cost(n, state) > _own_cost(n, state) * (1 + 1e-9)
    )
    dearer = frozenset(state.dearer)
    return Selected(chosen, frozenset(live), dearer, before, after, grown)


def _is_affine(node: Node, composed: Composed) -> bool:
    return not isinstance(composed.lifted.get(node, Opaque()), Opaque)


def _is_forced(node: Node, composed: Composed) -> bool:
    """Whether something that is not affine reads the value."""
    return any(not _is_affine(user, composed) for user in node.users)


def _settle(state: _Selection, node: Node) -> None:
    state.settled.update(state.plan_of(node))
    state.plans[node] = {}


def _take_cheapest(node: Node, own: float, state: _Selection) -> None:
    best_plan = state.union(node.all_input_nodes)
    best_plan[node] = own
    best_cost, best = sum(best_plan.values()), None
    best_size = _size(best_plan, state)
    for index, meaning in enumerate(state.composed.candidates.get(node, ())):
        plan = state.union(meaning.sources)
        plan.update(_meaning_ops(node, index, meaning, state))
        total = sum(plan.values())
        size = _size(plan, state)
        worth = state.prices.known is not None or _is_worth(size, best_size)
        if total < best_cost * (1 - 1e-9) and worth:
            best_plan, best_cost, best, best_size = plan, total, meaning, size
        elif total > best_cost and _really_merges(node, meaning):
            state.dearer.add(node)
    state.plans[node], state.choice[node] = best_plan, best


def _size(plan: Plan, state: _Selection) -> tuple[int, float]:
    """How many ops a plan runs, and their multiplications."""
    ops = [op for op, price in plan.items() if price > 0.0]
    return len(ops), sum(state.macs.get(op, 0.0) for op in ops)


def _is_worth(size: tuple[int, float], other: tuple[int, float]) -> bool:
    """Whether a cheaper plan may be taken: more ops have to save multiplications.

    A conv over a concat costs nominally more than two convs and a sum, which move fewer
    bytes; what an op costs differs too much between runtimes to rely on that. Measured
    costs are relied on.
    """
    return size[0] <= other[0] or size[1] < other[1] * (1 - 1e-9)


def _really_merges(node: Node, meaning: Meaning) -> bool:
    return any(source not in node.all_input_nodes for source in meaning.sources)


def _realised_cost(node: Node, state: _Selection) -> float:
    if not _is_affine(node, state.composed):
        return 0.0
    meaning = state.choice.get(node)
    if meaning is None:
        return _own_cost(node, state)
    return sum(_meaning_ops(node, 0, meaning, state).values())


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


# ---- sizes and costs of ops --------------------------------------------------------


def _numbers(node: Node, state: _Selection) -> float:
    """Numbers in one sample of the value: every size but the batch."""
    shape = state.facts.shape(node)
    if shape is not None and len(shape) > 1 and None not in shape:
        return float(prod(size or 1 for size in shape[1:]))
    own = state.composed.lifted.get(node)
    if isinstance(own, Affine) and own.parts:
        source, map = own.parts[0]
        stride = map.stride if isinstance(map, Window) else 1
        size = state.numbers.get(source, NOMINAL_NUMBERS) / stride
        if isinstance(map, Window):
            return size * map.out_channels / map.in_channels
        return size
    inputs = [state.numbers[i] for i in node.all_input_nodes if i in state.numbers]
    return max(inputs, default=NOMINAL_NUMBERS)


def _own_cost(node: Node, state: _Selection) -> float:
    """What the op costs as it was."""
    own = state.composed.lifted[node]
    numbers, shape = state.numbers[node], state.facts.shape(node)
    if isinstance(own, Carry):
        return _step_cost(own.step, state)
    if isinstance(own, Bundle):
        return 0.0
    if isinstance(own, Stack):
        return state.prices.elementwise(numbers, shape)
    if not isinstance(own, Affine):
        return cost.LAUNCH
    if len(own.parts) != 1:
        return state.prices.add(numbers, shape) * (len(own.parts) - 1)
    source, map = own.parts[0]
    if isinstance(map, Diagonal):
        return state.prices.elementwise(numbers, shape)
    if own.weightless:
        return cost.elementwise_cost((numbers + state.numbers[source]) / 2)
    work = Work(numbers / map.out_channels, state.numbers[source] / map.in_channels)
    read = state.facts.shape(source)
    state.macs[node] = cost.map_macs(map, work)
    return state.prices.map(map, work, map.out_channels, read)


def _step_cost(step: Step, state: _Selection) -> float:
    if not step.computes:
        return 0.0
    numbers = state.numbers.get(step.node, NOMINAL_NUMBERS)
    source = step.node.all_input_nodes[0]
    return cost.elementwise_cost((numbers + state.numbers.get(source, numbers)) / 2)


def _meaning_ops(
    node: Node, index: int, meaning: Meaning, state: _Selection
) -> dict[object, float]:
    """The ops that make a value from the sources of one of its meanings."""
    numbers, shape = state.numbers[node], state.facts.shape(node)
    parts, whole = blocks.partition(meaning)
    if not parts:
        return _sum_ops((node, index), meaning, (numbers, shape), state)
    joining = state.prices.elementwise(numbers, shape)
    ops: dict[object, float] = {(node, index, "cat"): joining}
    channels = meaning.channels or sum(part.channels or 0 for part in parts)
    for place, part in enumerate(parts):
        share = numbers * (part.channels or 0) / channels
        ops.update(_sum_ops((node, index, place), part, (share, None), state))
    if whole:
        rest = Meaning(whole, None, meaning.axis, meaning.channels)
        ops.update(_sum_ops((node, index, "rest"), rest, (numbers, shape), state))
        ops[node, index, "join"] = state.prices.add(numbers, shape)
    return ops


def _sum_ops(
    label: tuple[object, ...],
    meaning: Meaning,
    result: tuple[float, Shape | None],
    state: _Selection,
) -> dict[object, float]:
    """The ops of a sum, of which `result` is (numbers, shape where it is known)."""
    ops: dict[object, float] = {}
    carried = meaning.bias is None
    for place, term in enumerate(meaning.terms):
        for step in (*term.before, *term.after):
            if step.computes:
                ops[label, place, step] = _step_cost(step, state)
        if isinstance(term.map, Diagonal) and term.map.is_identity:
            continue
        carried = True
        work = _work(term, result[0], state)
        ops[label, place] = _term_cost(term, meaning, (work, *result), state)
        state.macs[label, place] = cost.map_macs(term.map, work)
    for extra in range(len(meaning.terms) - 1 + (not carried)):
        ops[label, "add", extra] = state.prices.add(*result)
    return ops


def _source(term: Term) -> Node:
    """What a term's map reads."""
    return term.before[-1].node if term.before else term.source


def _work(term: Term, numbers: float, state: _Selection) -> Work:
    """Where a term's map runs: before a mean or a resize, at its input's size."""
    map = term.map
    inner = next((s.node.all_input_nodes[0] for s in term.after if s.computes), None)
    outputs = numbers if inner is None else state.numbers.get(inner, numbers)
    inputs = state.numbers.get(_source(term), NOMINAL_NUMBERS)
    if isinstance(map, Diagonal):
        return Work(outputs, inputs)
    return Work(outputs / map.out_channels, inputs / map.in_channels)


def _term_cost(
    term: Term,
    meaning: Meaning,
    size: tuple[Work, float, Shape | None],
    state: _Selection,
) -> float:
    """What a term's map costs; `size` is its work and its result's numbers, shape."""
    map = term.map
    if isinstance(map, Diagonal):
        return state.prices.elementwise(*size[1:])
    if isinstance(map, Window) and not map.fixed:
        return inf  # nothing proves the number of channels: a conv would fix it
    read = state.facts.shape(_source(term))
    return state.prices.map(map, size[0], meaning.channels or map.channels, read)
