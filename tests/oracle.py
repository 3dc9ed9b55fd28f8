"""Execution as the oracle of the algebra: maps run by torch against the merged map.

A size that the originals do not take says nothing; one that they take and the result
does not is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from helpers import EXACT, absolute, channel_error, execute, noise, shift, tried, vector
from torch import Tensor

from repcompiler import algebra
from repcompiler.affine import Diagonal, Map, Refusal, Vector

BATCH = 2


def lengths(spatial: int, most: int = 9) -> Iterator[tuple[int, ...]]:
    """Input sizes from 1 up, with axes that differ, odd and even."""
    for size in range(1, most):
        yield tuple(1 + (size - 1 + 2 * axis) % most for axis in range(spatial))
    # Room for the widest window that is drawn.
    yield (most + 11,) * spatial


def inputs_of(map: Map, spatial: int) -> Iterator[Tensor]:
    """Inputs of every size for a map."""
    channels = map.channels if isinstance(map, Diagonal) else map.in_channels
    assert channels is not None
    for seed, sizes in enumerate(lengths(spatial, 9 if spatial < 3 else 6)):
        yield noise(BATCH, channels, *sizes, seed=seed)


def assert_same(
    found: Callable[[Tensor], Tensor],
    expected: Callable[[Tensor], Tensor],
    bound: Callable[[Tensor], Tensor],
    inputs: Iterator[Tensor],
    axis: int,
) -> int:
    """Compare on all inputs that `expected` takes; returns how many those were."""
    taken = 0
    for x in inputs:
        truth = tried(expected, x)
        if truth is None:
            continue
        taken += 1
        limit = bound(x.abs())
        error = channel_error(found(x), truth, limit, axis)
        assert error <= EXACT, f"{error} at size {tuple(x.shape)}"
    return taken


def chain_is_exact(second: Map, first: Map, bias: Vector | None, spatial: int) -> bool:
    """Whether `compose` accepts the chain; if so it must be exact, its bias included.

    False as well if torch took none of the inputs, so that nothing was compared.
    """
    merged = algebra.compose(second, first, biased=bias is not None)
    if isinstance(merged, Refusal):
        return False
    moved = algebra.push_bias(second, bias)
    axis = -(spatial + 1)
    magnitude = None if bias is None else vector(bias.value().abs())
    taken = assert_same(
        lambda x: shift(execute(merged, x), moved, axis),
        lambda x: execute(second, shift(execute(first, x), bias, axis)),
        lambda x: execute(
            absolute(second), shift(execute(absolute(first), x), magnitude, axis)
        ),
        inputs_of(first, spatial),
        axis,
    )
    return taken > 0


def same_shape_sum(a: Tensor, b: Tensor) -> Tensor:
    """a + b; a sum that broadcasts must have been refused."""
    assert a.shape == b.shape
    return a + b


def sum_is_exact(a: Map, b: Map, spatial: int) -> bool:
    """Whether `add` accepts the sum and inputs were compared; then it must be exact."""
    merged = algebra.add(a, b)
    if isinstance(merged, Refusal):
        return False
    taken = assert_same(
        lambda x: execute(merged, x),
        lambda x: same_shape_sum(execute(a, x), execute(b, x)),
        lambda x: execute(absolute(a), x) + execute(absolute(b), x),
        inputs_of(a if isinstance(b, Diagonal) and b.channels is None else b, spatial),
        -(spatial + 1),
    )
    return taken > 0
