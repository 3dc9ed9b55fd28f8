"""Whatever graph is drawn, the fused one is the same function, on other sizes too.

Branches, chains, skips, shared modules, several readers and outputs, out of every
operator of the table, with non-linear ops in between. The oracle is the original, in
float64; equality is relative to the largest value inside it, since sums may cancel.
"""

from __future__ import annotations

import math
import os

import torch
from helpers import in_float64, outputs, tried
from hypothesis import given, settings
from programs import Program, programs
from torch import Tensor, nn

import repcompiler

# Kernels are rounded in float64 once; depth multiplies that by a few hundred at most.
LIMIT = 1e-9
# As in conftest: dev by default, ci where CI is set, nightly by hand.
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev")
GRAPHS = settings(max_examples={"dev": 60, "ci": 150}.get(PROFILE, 100_000))


def other_inputs(x: Tensor) -> list[Tensor]:
    """The example's shape, other batches, odd and even sizes, and very small ones."""
    channels, sizes = x.shape[1], tuple(x.shape[2:])
    shapes = [tuple(x.shape), (3, channels, *sizes), (1, channels, *sizes)]
    for change in (1, -1, 4):
        shapes.append((2, channels, *(max(1, size + change) for size in sizes)))
    shapes += [(1, channels, *[small] * len(sizes)) for small in (1, 2)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def largest_inside(model: Program, x: Tensor) -> float:
    """The largest magnitude among all values of a program."""
    every = tuple(range(len(model.steps) + 1))
    kept, model.outputs = model.outputs, every
    found = outputs(model, x.clone())
    model.outputs = kept
    return max(float(value.abs().amax()) for value in found if value.numel())


def assert_same_function(model: Program, fused: nn.Module, x: Tensor) -> int:
    """Compare two float64 models on every input that the original takes."""
    taken = 0
    for other in other_inputs(x):
        if tried(lambda other=other: outputs(model, other.clone())[0]) is None:
            continue
        expected = outputs(model, other.clone())
        scale = largest_inside(model, other)
        taken += 1
        if not math.isfinite(scale):
            continue  # a division by zero in the original
        found = outputs(fused, other.clone())
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            assert a.shape == b.shape, f"{tuple(other.shape)}: {a.shape} for {b.shape}"
            error = float((a - b).abs().amax()) if a.numel() else 0.0
            assert error <= LIMIT * scale, f"{tuple(other.shape)}: {error} of {scale}"
    return taken


@GRAPHS
@given(programs())
def test_a_fused_graph_is_the_same_function(drawn):
    model, x = drawn
    wide = in_float64(model)
    result = repcompiler.fuse(wide, (x.double(),))
    assert assert_same_function(wide, result.model, x) > 0
    assert not [k for k in result.report.kept if k.reason == "not_equal"]


@GRAPHS
@given(programs())
def test_a_fused_float32_graph_is_verified_equal(drawn):
    model, x = drawn
    report = repcompiler.fuse(model, (x,)).report
    assert report.equivalence.ok, report.equivalence


@GRAPHS
@given(programs())
def test_without_example_inputs_the_fused_graph_is_the_same_function(drawn):
    model, x = drawn
    wide = in_float64(model)
    fused = repcompiler.fuse(wide).model
    assert assert_same_function(wide, fused, x) > 0


@GRAPHS
@given(programs())
def test_unchecked_rewrites_are_right_as_well(drawn):
    """`verify=False`: what the region check would undo must not have been chosen."""
    model, x = drawn
    wide = in_float64(model)
    fused = repcompiler.fuse(
        wide, (x.double(),), verify=False, capture="symbolic_trace"
    ).model
    assert assert_same_function(wide, fused, x) > 0
