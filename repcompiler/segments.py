"""Whether steps that a twin lacks compute something else, or the same in another way.

The candidate runs step by step, but each step is fed with the twin's values where it
has a counterpart. Errors do not add up along the way then, and what is off is off where
it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from repcompiler.differences import Alignment, Difference
from repcompiler.steps import constants_of, program_steps, step_nodes, user_inputs
from repcompiler.verify import MAX_ERROR_RATIO, error_ratio

Values = dict[int, Any]


def confirmed(
    alignment: Alignment,
    twin: ExportedProgram,
    candidate: ExportedProgram,
    inputs: Sequence[Tensor],
    limit: float = MAX_ERROR_RATIO,
) -> tuple[Difference, ...]:
    """The differences without those whose steps compute what the twin computes."""
    suspects = [d for d in alignment.differences if d.kind != "numbers"]
    if not suspects:
        return alignment.differences
    try:
        off = _off(alignment, twin, candidate, inputs, limit)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return alignment.differences  # one of the two does not run: that is no proof
    starts = sorted({d.step for d in suspects})
    guilty = {max((s for s in starts if s <= a), default=starts[0]) for a in off}
    return tuple(
        d for d in alignment.differences if d.kind == "numbers" or d.step in guilty
    )


def _off(
    alignment: Alignment,
    twin: ExportedProgram,
    candidate: ExportedProgram,
    inputs: Sequence[Tensor],
    limit: float,
) -> list[int]:
    """The twin's steps whose counterpart gives another value from the same inputs."""
    with torch.no_grad():
        own = values(twin, inputs)
        wide = values(twin, inputs, dtype=torch.float64)
        forced = {b: own[a] for a, b in alignment.pairs.items()}
        found = values(candidate, inputs, forced=forced)
    steps = program_steps(candidate)
    changed = {d.step for d in alignment.differences}
    off: list[int] = []
    for a, b in alignment.pairs.items():
        strange = any(i >= 0 and i not in forced for i in steps[b].feeds)
        if not strange and a not in changed:
            continue
        if _differs(own[a], found[b], wide[a], limit):
            off.append(a)
    return off


def _differs(own: Any, found: Any, wide: Any, limit: float) -> bool:
    leaves = [
        [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        for value in (own, found, wide)
    ]
    if [t.shape for t in leaves[0]] != [t.shape for t in leaves[1]]:
        return True
    orders = (2.0, float("inf"))
    return any(
        error_ratio(a, b, t, order) > limit
        for a, b, t in zip(*leaves)
        for order in orders
    )


def values(
    program: ExportedProgram,
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    forced: Mapping[int, Any] | None = None,
) -> Values:
    """What each step computes.

    Args:
        dtype: of all constants and inputs in floating point; None for their own.
        forced: what readers of a step are given in place of its own value.
    """
    held = constants_of(program)
    env: dict[Node, Any] = dict(
        zip(user_inputs(program), (_as(x, dtype) for x in inputs))
    )
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in held:
            env[node] = _as(held[node.name][1], dtype)
    results: Values = {}
    for index, node in enumerate(step_nodes(program)):
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), env.__getitem__)
        run: Any = node.target
        results[index] = args if node.op == "output" else run(*args, **kwargs)
        given = (forced or {}).get(index)
        env[node] = results[index] if given is None else given
    return results


def _as(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None:
        return value.detach().to(dtype)
    return value.detach() if isinstance(value, Tensor) else value
