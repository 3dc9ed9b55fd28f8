"""What must hold after each stage, as a table; checked in tests and with `debug`.

A violation is a fault of the compiler, never of its caller: `check` raises
`AssertionError` with the stage, the invariant and the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor, nn
from torch.fx import Node

from repcompiler.affine import Diagonal, Refusal, Term
from repcompiler.compose import MOST_STACKED, MOST_TERMS
from repcompiler.facts import op_name
from repcompiler.lift import Affine, Bundle, Carry, Lifted, Stack
from repcompiler.limits import LIMIT
from repcompiler.meanings import merge
from repcompiler.mutation import is_write, written
from repcompiler.normalise import GUARDS
from repcompiler.state import State

Violations = Iterable[object]


@dataclass(frozen=True)
class Invariant:
    """One property of the result of a stage; `violations` yields what breaks it."""

    stage: str
    name: str
    violations: Callable[[State], Violations]


def check(state: State, stage: str) -> None:
    """Assert every invariant of `stage`."""
    for invariant in INVARIANTS:
        if invariant.stage == stage:
            found = list(invariant.violations(state))
            assert not found, f"after {stage}: {invariant.name}: {found[:3]}"


def _nodes(state: State) -> list[Node]:
    return list(state.graph_module.graph.nodes)


def _guards(state: State) -> Violations:
    guards = [n for n in _nodes(state) if n.op == "call_function"]
    return [n for n in guards if op_name(n) in GUARDS and LIMIT not in n.meta]


def _unmarked_writes(state: State) -> Violations:
    assert state.captured is not None
    marked = state.captured.mutated
    writes = [n for n in _nodes(state) if written(n, state.graph_module)]
    return [n for n in writes if n not in marked]


def _dead(state: State) -> Violations:
    idle = [n for n in _nodes(state) if not n.users and not is_write(n)]
    return [n for n in idle if n.op not in ("placeholder", "output")]


def _operands(state: State) -> Violations:
    """Parts of a lifted value that it does not read."""
    assert state.lifted is not None
    for node, own in state.lifted.items():
        inputs = set(node.all_input_nodes)
        for read in node.all_input_nodes:  # a block of a split is one of its input
            if isinstance(state.lifted.get(read), Bundle):
                inputs.update(read.all_input_nodes)
        yield from (node for source in _sources(own) if source not in inputs)


def _sources(own: Lifted) -> tuple[Node, ...]:
    if isinstance(own, Affine):
        return tuple(source for source, _ in own.parts)
    if isinstance(own, Stack):
        return own.parts
    return (own.source,) if isinstance(own, (Bundle, Carry)) else ()


def _axes(state: State) -> Violations:
    assert state.lifted is not None
    for node, own in state.lifted.items():
        if isinstance(own, Affine):
            axes = [map.axis for _, map in own.parts] + [own.axis]
            yield from (node for axis in axes if axis is not None and axis >= 0)


def _late_sources(state: State) -> Violations:
    """Candidates over a value that is computed after them."""
    assert state.composed is not None
    order = {node: index for index, node in enumerate(_nodes(state))}
    for node, meanings in state.composed.candidates.items():
        sources = [source for meaning in meanings for source in meaning.sources]
        yield from (node for source in sources if order[source] >= order[node])


def _malformed(state: State) -> Violations:
    """Meanings with too many terms, two that are one, or views behind diagonal maps."""
    assert state.composed is not None
    for node, meanings in state.composed.candidates.items():
        for meaning in meanings:
            most = MOST_STACKED if any(t.rows for t in meaning.terms) else MOST_TERMS
            bad = len(meaning.terms) > most or any(
                a.key == b.key and not isinstance(merge(a, b), Refusal)
                for a, b in combinations(meaning.terms, 2)
            )
            if bad or any(_view_behind_diagonal(term) for term in meaning.terms):
                yield node


def _view_behind_diagonal(term: Term) -> bool:
    return isinstance(term.map, Diagonal) and bool(term.after)


def _unrealised(state: State) -> Violations:
    """Sources of chosen meanings that nobody computes."""
    assert state.selected is not None
    live = state.selected.live
    for node, meaning in state.selected.chosen.items():
        yield from (node for source in meaning.sources if source not in live)


def _dearer(state: State) -> Violations:
    assert state.selected is not None
    if state.selected.cost_after > state.selected.cost_before * (1 + 1e-9):
        yield state.selected.cost_after


def _shared_with_model(state: State) -> Violations:
    """Tensors that the fused model shares with the model it came from."""
    assert state.rewritten is not None
    if not isinstance(state.model, nn.Module):
        return []
    own = {id(tensor) for tensor in _tensors(state.model)}
    return [t.shape for t in _tensors(state.rewritten.module) if id(t) in own]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _lint(state: State) -> Violations:
    assert state.rewritten is not None
    state.rewritten.module.graph.lint()
    return []


def _lost_inputs(state: State) -> Violations:
    assert state.rewritten is not None
    fused = state.rewritten.module.graph.nodes
    before = [n.name for n in _nodes(state) if n.op == "placeholder"]
    after = [n.name for n in fused if n.op == "placeholder"]
    return [] if before == after else [before, after]


INVARIANTS: tuple[Invariant, ...] = (
    Invariant("capture", "no guards", _guards),
    Invariant("capture", "writes are functional or marked", _unmarked_writes),
    Invariant("capture", "no dead nodes", _dead),
    Invariant("lift", "a value is lifted over its own inputs", _operands),
    Invariant("lift", "axes count from the end", _axes),
    Invariant("compose", "sources come first", _late_sources),
    Invariant("compose", "meanings are in normal form", _malformed),
    Invariant("select", "sources of what is chosen are computed", _unrealised),
    Invariant("select", "the plan costs no more than the graph did", _dearer),
    Invariant("lower", "the graph is well formed", _lint),
    Invariant("lower", "nothing is shared with the model", _shared_with_model),
    Invariant("lower", "inputs are as they were", _lost_inputs),
)
