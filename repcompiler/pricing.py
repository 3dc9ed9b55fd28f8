"""What values hold and what their ops cost, for the choice in `select`.

Sizes come from the example inputs, else from a nominal image; a price is one that was
measured, else the nominal machine's (`cost`). Every op has a key, so that plans which
share it count it once, and beside its price its multiplications are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isclose, nan, prod

from torch.fx import Graph, Node

from repcompiler import blocks, cost
from repcompiler.affine import Diagonal, Map, Meaning, Step, Term, Window
from repcompiler.cost import Prices, Work
from repcompiler.facts import Facts
from repcompiler.lift import Affine, Bundle, Carry, Lifted, Opaque, Stack
from repcompiler.partial import Shape

# The nominal image, where no example input gives sizes.
NOMINAL_NUMBERS = 224.0 * 224.0 * 3

Ops = dict[object, float]


@dataclass
class Pricing:
    """The ops of a graph and of meanings over its values, by key, with their prices.

    Attributes:
        numbers: how many numbers one sample of a value holds.
        macs: multiplications of every op that was priced, by its key.
        padded: keys of the convs that were priced with a pad op of their own.
    """

    lifted: Mapping[Node, Lifted]
    facts: Facts
    prices: Prices
    numbers: dict[Node, float] = field(default_factory=dict[Node, float])
    macs: dict[object, float] = field(default_factory=dict[object, float])
    padded: set[object] = field(default_factory=set[object])

    @classmethod
    def of(
        cls, graph: Graph, lifted: Mapping[Node, Lifted], facts: Facts, prices: Prices
    ) -> Pricing:
        """With the sizes of every value of `graph`."""
        pricing = cls(lifted, facts, prices)
        for node in graph.nodes:
            pricing.numbers[node] = pricing._count(node)
        return pricing

    def own(self, node: Node) -> float:
        """What the op costs as it was."""
        own = self.lifted[node]
        numbers, shape = self.numbers[node], self.facts.shape(node)
        if isinstance(own, Carry):
            source = own.step.node.all_input_nodes[0]
            return self._step(own.step, self.numbers.get(source, numbers))
        if isinstance(own, Bundle):
            return 0.0
        if isinstance(own, Stack):
            return self.prices.elementwise(numbers, shape)
        if not isinstance(own, Affine):
            return cost.LAUNCH
        if len(own.parts) != 1:
            return self.prices.add(numbers, shape) * (len(own.parts) - 1)
        source, map = own.parts[0]
        if isinstance(map, Diagonal):
            return self.prices.elementwise(numbers, shape)
        read = self.numbers[source]
        if own.weightless:
            return cost.elementwise_cost((numbers + read) / 2)
        work = Work(numbers / map.out_channels, read / map.in_channels)
        self._note(node, map, work)
        shape = self.facts.shape(source)
        return self.prices.map(map, work, map.out_channels, shape)

    def ops(self, node: Node, index: int, meaning: Meaning) -> Ops:
        """The ops that make a value from the sources of its meaning of that index."""
        numbers, shape = self.numbers[node], self.facts.shape(node)
        parts, whole = blocks.partition(meaning)
        if not parts:
            return self._sum((node, index), meaning, (numbers, shape))
        joining = self.prices.elementwise(numbers, shape)
        ops: Ops = {(node, index, "cat"): joining}
        channels = meaning.channels or sum(part.channels or 0 for part in parts)
        for place, part in enumerate(parts):
            share = numbers * (part.channels or 0) / channels
            ops.update(self._sum((node, index, place), part, (share, None)))
        if whole:
            rest = Meaning(whole, None, meaning.axis, meaning.channels)
            ops.update(self._sum((node, index, "rest"), rest, (numbers, shape)))
            ops[node, index, "join"] = self.prices.add(numbers, shape)
        return ops

    def size(self, plan: Mapping[object, float]) -> tuple[int, float]:
        """How many ops a plan runs, and their multiplications."""
        ops = [op for op, price in plan.items() if price > 0.0]
        count = len(ops) + len(self.padded.intersection(ops))
        return count, sum(self.macs.get(op, 0.0) for op in ops)

    def _note(self, key: object, map: Map, work: Work) -> None:
        """Keep what counts of an op beside its price."""
        self.macs[key] = cost.map_macs(map, work)
        if isinstance(map, Window) and cost.needs_pad(map):
            self.padded.add(key)

    def _count(self, node: Node) -> float:
        """Numbers in one sample of the value: every size but the batch."""
        shape = self.facts.shape(node)
        if shape is not None and len(shape) > 1 and None not in shape:
            return float(prod(size or 1 for size in shape[1:]))
        own = self.lifted.get(node, Opaque())
        if isinstance(own, Affine) and own.parts:
            source, map = own.parts[0]
            stride = map.stride if isinstance(map, Window) else 1
            size = self.numbers.get(source, NOMINAL_NUMBERS) / stride
            if isinstance(map, Window):
                return size * map.out_channels / map.in_channels
            return size
        inputs = [self.numbers[i] for i in node.all_input_nodes if i in self.numbers]
        return max(inputs, default=NOMINAL_NUMBERS)

    def _share(self, step: Step) -> float:
        """How many numbers a step gives for each one that it is given.

        Its node says so, and may do the step to a value of another number of channels.
        """
        given = self.numbers.get(step.node.all_input_nodes[0], NOMINAL_NUMBERS)
        return self.numbers.get(step.node, given) / given

    def _step(self, step: Step, given: float) -> float:
        """What it costs to do the step to a value of so many numbers."""
        if not step.computes:
            return 0.0
        return cost.elementwise_cost(given * (1 + self._share(step)) / 2)

    def _sum(
        self,
        label: tuple[object, ...],
        meaning: Meaning,
        result: tuple[float, Shape | None],
    ) -> Ops:
        """The ops of a sum, of which `result` is (numbers, shape where it is known)."""
        ops: Ops = {}
        carried = meaning.bias is None
        for place, term in enumerate(meaning.terms):
            ops.update(self._before(term))
            given = result[0]
            for step in reversed(term.after):
                given /= self._share(step)
                if step.computes:
                    ops[label, place, step] = self._step(step, given)
            if isinstance(term.map, Diagonal) and term.map.is_identity:
                continue
            carried = True
            work = self._work(term, result[0])
            ops[label, place] = self._term(term, meaning, (work, *result))
            self._note((label, place), term.map, work)
        for extra in range(len(meaning.terms) - 1 + (not carried)):
            ops[label, "add", extra] = self.prices.add(*result)
        return ops

    def _before(self, term: Term) -> Ops:
        """What is done to a source first: the same op for every value that needs it."""
        ops: Ops = {}
        given = self.numbers.get(term.source, NOMINAL_NUMBERS)
        for place, step in enumerate(term.before, start=1):
            if step.computes:
                ops[term.source, term.before[:place]] = self._step(step, given)
            given *= self._share(step)
        return ops

    def _work(self, term: Term, numbers: float) -> Work:
        """Where a term's map runs: before a mean or a resize, at its input's size."""
        map = term.map
        outputs = numbers / prod(self._share(step) for step in term.after)
        inputs = self._read(term)[0]
        if isinstance(map, Diagonal):
            return Work(outputs, inputs)
        return Work(outputs / map.out_channels, inputs / map.in_channels)

    def _read(self, term: Term) -> tuple[float, Shape | None]:
        """The value that a term's map reads: its numbers, its shape where known."""
        own = self.numbers.get(term.source, NOMINAL_NUMBERS)
        if not term.before:
            return own, self.facts.shape(term.source)
        numbers = own * prod(self._share(step) for step in term.before)
        last = term.before[-1].node
        alike = isclose(numbers, self.numbers.get(last, nan))
        return numbers, self.facts.shape(last) if alike else None

    def _term(
        self, term: Term, meaning: Meaning, size: tuple[Work, float, Shape | None]
    ) -> float:
        """What a term's map costs: `size` is its work, its result's numbers, shape."""
        map = term.map
        if isinstance(map, Diagonal):
            return self.prices.elementwise(*size[1:])
        if isinstance(map, Window) and not map.fixed:
            return inf  # nothing proves the number of channels: a conv would fix it
        channels = meaning.channels or map.channels
        return self.prices.map(map, size[0], channels, self._read(term)[1])
