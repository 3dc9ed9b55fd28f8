"""A rule cannot lie: what the table says of an operator is what the operator computes.

Every target is drawn in its spellings and settings. Where its rule calls it affine, it
must be so on wide inputs, and the map that the rule gives, run by torch, must be the
operator, bias included. Where the rule says that channels pass through, they must.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import EXACT, execute, shift, tried
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pieces import Call, Name, X
from strategies import PIECES
from torch import Tensor, fx, nn

from repcompiler import RULES
from repcompiler.affine import Diagonal
from repcompiler.facts import Facts, gather
from repcompiler.lift import (
    Affine,
    Alias,
    Bundle,
    Carry,
    Opaque,
    Stack,
    find_rule,
    lift,
)
from repcompiler.reasons import Reason

WIDE = (1.0, 1e3, 1e-3)
# Sums of a few hundred float64 numbers that differ in size by 1e6.
WIDE_EXACT = 1e-9
# A handful of settings each; a failing one is small enough as it is.
DRAWS = settings(max_examples=12, phases=(Phase.generate,))


def name_of(target: Any) -> str:
    """A test id."""
    if isinstance(target, type):
        return f"nn.{target.__name__}"
    kind = "method " if isinstance(target, str) else ""
    home = str(getattr(target, "__module__", None) or "torch")
    return f"{kind}{home}.{getattr(target, '__name__', target)}"


def graph_of(piece: nn.Module) -> tuple[fx.GraphModule, fx.Node]:
    """The call as a graph of one node, with its weights as attributes."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    if not isinstance(piece, Call):
        node = graph.call_module("piece", (x,))
        graph.output(node)
        return fx.GraphModule({"piece": piece}, graph), node
    held: dict[str, Tensor] = {**dict(piece.named_parameters())}
    held.update(piece.named_buffers())

    def value(arg: Any) -> Any:
        if isinstance(arg, list):
            return [value(item) for item in arg]
        if not isinstance(arg, Name):
            return arg
        return x if arg == X else graph.get_attr(arg)

    args = tuple(value(arg) for arg in piece.arguments)
    named = {key: value(arg) for key, arg in piece.named.items()}
    kind = "call_method" if isinstance(piece.target, str) else "call_function"
    node = graph.create_node(kind, piece.target, args, named)
    graph.output(node)
    return fx.GraphModule(held, graph), node


@st.composite
def cases(draw, target: Any):
    """(the operator in float64, an input that it takes)."""
    piece = PIECES[target]
    rank = draw(st.sampled_from(piece.ranks))
    sizes = st.sampled_from((1, 1, 2, 3, 6 if rank < 5 else 4))
    torch.manual_seed(draw(st.integers(0, 1000)))
    rest = [draw(sizes) for _ in range(rank - 2)]
    channels = draw(st.sampled_from((2, 4, 6)))
    shape = (draw(st.sampled_from((1, 3))), channels, *rest)
    module = piece.make(draw, shape).double().eval()
    if hasattr(module, "running_var"):
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2.0)
    return module, torch.randn(shape, dtype=torch.float64)


def lifted_of(module: nn.Module, x: Tensor) -> tuple[Any, Facts, fx.Node]:
    """What the table says of the operator on this input."""
    graph, node = graph_of(module)
    facts = gather(graph, (x,), {}, frozenset(), frozenset())
    return lift(node, facts, RULES), facts, node


def run(module: nn.Module, x: Tensor) -> Tensor:
    """The operator, on a copy that it may write into."""
    with torch.no_grad():
        return module(x.clone())


def test_every_target_of_the_table_is_drawn():
    assert set(PIECES) == set(RULES)


@pytest.mark.parametrize("target", PIECES, ids=name_of)
def test_the_rule_says_what_the_operator_computes(target):
    seen: list[str] = []

    @DRAWS
    @given(cases(target))
    def check(case):
        module, x = case
        own, facts, node = lifted_of(module, x)
        assert find_rule(node, facts, RULES) is RULES[target]
        seen.append(type(own).__name__)
        if isinstance(own, Opaque):
            return
        if isinstance(own, Bundle):
            assert_splits(run(module, x), x)
            return
        assert_affine(lambda v: run(module, v), x)
        if isinstance(own, Affine):
            for other in (x, *other_sizes(x)):
                assert_is_map(own, module, other)
        elif isinstance(own, Alias):
            assert torch.equal(run(module, x), x)
        elif isinstance(own, Stack):
            whole = torch.cat([x] * len(own.parts), own.axis)
            assert torch.equal(run(module, x), whole)
            assert own.sizes == (x.shape[own.axis],) * len(own.parts)
        elif isinstance(own, Carry):
            assert_carries(own.step.axes, module, x)
            assert_picks(own.step.pick, module, x)

    check()
    assert set(seen) - {"Opaque"}, "the rule never applies"


def assert_affine(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """f(x + y) - f(x) - f(y) + f(0) = 0 and f(a x) - f(0) = a (f(x) - f(0))."""
    zero = function(torch.zeros_like(x))
    for scale in WIDE:
        y = torch.randn_like(x) * scale
        parts = (function(x + y), function(x), function(y), zero)
        size = sum(float(part.abs().amax()) for part in parts)
        rest = parts[0] - parts[1] - parts[2] + zero
        assert float(rest.abs().amax()) <= WIDE_EXACT * size
        stretched = function(-scale * x) - zero + scale * (parts[1] - zero)
        assert float(stretched.abs().amax()) <= WIDE_EXACT * size * (1 + scale)


def other_sizes(x: Tensor) -> list[Tensor]:
    """Inputs of other batches and positions, same channels."""
    sizes = [(1, 1), (2, 3), (3, 7)]
    return [
        torch.randn(batch, x.shape[1], *[n] * (x.dim() - 2), dtype=torch.float64)
        for batch, n in sizes
    ]


def assert_is_map(own: Affine, module: nn.Module, x: Tensor) -> None:
    """Σ map(x) + bias is the operator, on every size that the operator takes."""
    expected = tried(lambda: run(module, x))
    if expected is None or expected.numel() == 0:  # a conv does not take an empty one
        return
    parts = [execute(map, x) for _, map in own.parts]
    found = shift(sum(parts), own.bias, own.axis)
    assert found.shape == expected.shape
    size = float(expected.abs().amax()) + sum(float(p.abs().amax()) for p in parts)
    assert float((found - expected).abs().amax()) <= EXACT * size * 100
    if own.channels is not None and own.axis is not None:
        assert expected.shape[own.axis] == own.channels


def assert_carries(axes: Any, module: nn.Module, x: Tensor) -> None:
    """Scales and shifts along each axis that is kept come out along its image."""
    plain = run(module, x)
    for before, after in axes.items():
        numbers = torch.randn(x.shape[before], dtype=torch.float64)
        inner = numbers.reshape(-1, *[1] * (-before - 1))
        outer = numbers.reshape(-1, *[1] * (-after - 1))
        assert plain.shape[after] == x.shape[before]
        assert torch.allclose(run(module, x * inner), plain * outer, rtol=0, atol=1e-12)
        assert torch.allclose(run(module, x + inner), plain + outer, rtol=0, atol=1e-12)


def assert_picks(pick: Any, module: nn.Module, x: Tensor) -> None:
    """The block of channels that a step says it takes."""
    if pick is not None:
        axis, block = pick
        assert x.shape[axis] == block.total
        assert torch.equal(run(module, x), x.narrow(axis, block.start, block.size))


def assert_splits(blocks: Any, x: Tensor) -> None:
    """The blocks make up the value again, on one axis."""
    fits = [
        axis
        for axis in range(x.dim())
        if sum(block.shape[axis] for block in blocks) == x.shape[axis]
    ]
    assert any(torch.equal(torch.cat(list(blocks), axis), x) for axis in fits)


# ---- what a rule has to leave alone --------------------------------------------------

LAST = torch.arange(1.0, 6.0, dtype=torch.float64)
PLANE = torch.ones(5, 5, dtype=torch.float64) * 2
WIDER = torch.ones(1, 4, 5, 5, dtype=torch.float64)

NOT_LIFTED = {
    "mul by a plane": Call(operator.mul, X, Name("c"), tensors={"c": PLANE}),
    "add of a whole image": Call(torch.add, X, Name("c"), tensors={"c": WIDER}),
    "constant over value": Call(operator.truediv, 2.0, X),
    "div rounded": Call(torch.div, X, 2.0, rounding_mode="floor"),
    "pool with a ceiling": Call(nn.functional.avg_pool2d, X, 3, 2, 1, True, True),
    "pool with a divisor": Call(nn.functional.avg_pool2d, X, 2, 2, 0, True, True, 3),
    "pad with a value": Call(nn.functional.pad, X, [1, 1], "constant", 1.0),
    "pad of the channels": Call(nn.functional.pad, X, [0, 0, 0, 0, 1, 1]),
    "dropout in training": Call(nn.functional.dropout, X),
    "bicubic": Call(nn.functional.interpolate, X, scale_factor=2, mode="bicubic"),
    "norm in training": Call(nn.functional.batch_norm, X, None, None, None, None, True),
    "norm of each image": Call(nn.functional.instance_norm, X),
    "value squared": Call(operator.mul, X, X),
    "broadcast of the value": Call(
        operator.mul,
        X,
        Name("c"),
        tensors={"c": torch.ones(3, 1, 1, 1, 1, dtype=torch.float64)},
    ),
}


@pytest.mark.parametrize("name", NOT_LIFTED)
def test_what_is_not_one_number_per_channel_is_left_alone(name):
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    own, _, _ = lifted_of(copy.deepcopy(NOT_LIFTED[name]), x)
    assert isinstance(own, Opaque)


def test_a_vector_on_the_last_axis_is_a_scale_of_that_axis():
    module = Call(operator.mul, X, Name("c"), tensors={"c": LAST})
    own, _, _ = lifted_of(module, torch.randn(2, 5, dtype=torch.float64))
    assert isinstance(own, Affine)
    assert [map.axis for _, map in own.parts if isinstance(map, Diagonal)] == [-1]


def test_a_vector_on_the_width_is_none_for_an_image_may_be_one_pixel_wide():
    module = Call(operator.mul, X, Name("c"), tensors={"c": LAST})
    own, _, _ = lifted_of(module, torch.randn(2, 5, 5, 5, dtype=torch.float64))
    assert own == Opaque(Reason.BROADCAST)
