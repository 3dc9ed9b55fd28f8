"""The algebra is exact: whatever it accepts computes the same, for every input size.

Execution is the oracle: two maps run one after the other (or side by side) by torch in
float64, against the one map that the algebra made of them. A size that the originals do
not take says nothing; one that they take and the result does not is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import (
    EXACT,
    absolute,
    channel_error,
    conv,
    diagonal,
    execute,
    noise,
    shift,
    tried,
    vector,
    window,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    SEEDS,
    any_window,
    border_chains,
    chains,
    pointwise,
    sums,
    transposed,
    windows,
)
from torch import Tensor

from repcompiler import algebra, kernels
from repcompiler.affine import Axis, Diagonal, Map, Refusal, Transposed, Vector, Window
from repcompiler.reasons import Reason

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


# ---- laws ---------------------------------------------------------------------------


@given(chains(), st.booleans(), SEEDS)
def test_composing_windows_is_exact(pair, biased, seed):
    second, first = pair
    bias = vector(noise(first.out_channels, seed=seed)) if biased else None
    chain_is_exact(second, first, bias, len(first.axes))


@given(border_chains())
def test_composing_where_the_second_just_finds_zeros_is_exact(pair):
    second, first = pair
    chain_is_exact(second, first, None, 1)


@given(sums())
def test_adding_windows_is_exact(pair):
    a, b = pair
    sum_is_exact(a, b, len(a.axes))


@given(sums())
def test_adding_commutes(pair):
    a, b = pair
    one, other = algebra.add(a, b), algebra.add(b, a)
    assert one == other
    if isinstance(one, Window):
        assert torch.equal(one.kernel(), other.kernel())


@given(sums())
def test_windows_that_always_agree_in_size_are_not_called_a_size_mismatch(pair):
    a, b = pair
    refused = algebra.add(a, b)
    agree = all(
        x.size(length) == y.size(length)
        for x, y in zip(a.axes, b.axes)
        for length in range(40, 60)
    )
    mismatch = isinstance(refused, Refusal) and refused.reason is Reason.SIZE_MISMATCH
    # Twenty lengths hold every residue of the strides drawn here.
    assert mismatch == (not agree)


@given(st.data())
def test_a_third_map_may_join_in_either_order(data):
    spatial = data.draw(st.integers(1, 2))
    third, second, first = (data.draw(any_window(spatial, 2, 2)) for _ in range(3))
    tail = algebra.compose(third, second, biased=False)
    head = algebra.compose(second, first, biased=False)
    for accepted, maps in ((head, (third, head)), (tail, (tail, first))):
        if isinstance(accepted, Refusal):
            continue
        whole = algebra.compose(*maps, biased=False)
        if isinstance(whole, Refusal):
            continue
        assert_same(
            lambda x, whole=whole: execute(whole, x),
            lambda x: execute(third, execute(second, execute(first, x))),
            lambda x: execute(
                absolute(third),
                execute(absolute(second), execute(absolute(first), x)),
            ),
            inputs_of(first, spatial),
            -(spatial + 1),
        )


@given(st.data())
def test_scaling_on_either_side_is_exact_and_never_refused(data):
    spatial = data.draw(st.integers(1, 3))
    map = data.draw(windows(spatial, 4, 6))
    axis = -(spatial + 1)
    after, before = diagonal(6, axis, seed=1), diagonal(4, axis, seed=2)
    bias = vector(noise(6, seed=3))
    assert chain_is_exact(after, map, bias, spatial)
    assert chain_is_exact(map, before, None, spatial)
    assert chain_is_exact(after, map, None, spatial)


@given(st.data())
def test_one_number_scales_every_kind_of_map(data):
    spatial = data.draw(st.integers(1, 3))
    number = Diagonal(scale=algebra.constant(-2.5))
    kinds = (windows(spatial, 2, 4), transposed(spatial, 2, 4))
    map = data.draw(st.one_of(*kinds))
    assert chain_is_exact(number, map, None, spatial)
    merged = algebra.compose(map, number, biased=False)
    assert not isinstance(merged, Refusal)
    assert_same(
        lambda x: execute(merged, x),
        lambda x: execute(map, -2.5 * x),
        lambda x: execute(absolute(map), 2.5 * x),
        inputs_of(map, spatial),
        -(spatial + 1),
    )


@given(st.data())
def test_composing_around_a_transposed_conv_is_exact(data):
    spatial = data.draw(st.integers(1, 3))
    axis = -(spatial + 1)
    map = data.draw(transposed(spatial, 4, 6))
    bias = data.draw(st.sampled_from((None, vector(noise(4, seed=5)))))
    after, before = diagonal(6, axis, seed=1), diagonal(4, axis, seed=2)
    assert chain_is_exact(after, map, vector(noise(6, seed=4)), spatial)
    assert chain_is_exact(map, before, bias, spatial) or bias is not None
    chain_is_exact(map, data.draw(any_window(spatial, 2, 4)), bias, spatial)
    chain_is_exact(data.draw(any_window(spatial, 6, 3)), map, None, spatial)


@given(st.data())
def test_adding_transposed_convs_is_exact(data):
    spatial = data.draw(st.integers(1, 2))
    a, b = (data.draw(transposed(spatial, 4, 4)) for _ in range(2))
    sum_is_exact(a, b, spatial)
    twin = Transposed(
        a.axis, 4, 4, a.groups, a.geometry, lambda: noise(*a.kernel().shape, seed=9)
    )
    assert sum_is_exact(a, twin, spatial)


@given(st.data())
def test_adding_a_scale_or_the_identity_to_a_window_is_exact(data):
    spatial = data.draw(st.integers(1, 3))
    map = data.draw(windows(spatial, 4, 4, strides=[1] * spatial))
    axis = -(spatial + 1)
    for other in (Diagonal(), Diagonal(axis, 4), diagonal(4, axis)):
        keeps_size = all(a.tail == 0 for a in map.axes)
        assert sum_is_exact(map, other, spatial) == keeps_size
        assert sum_is_exact(other, map, spatial) == keeps_size


@given(SEEDS)
def test_scales_add_and_compose_among_themselves(seed):
    a, b = diagonal(5, -3, seed=seed), diagonal(5, -3, seed=seed + 1)
    assert chain_is_exact(a, b, vector(noise(5, seed=seed + 2)), 2)
    for other in (b, Diagonal(), Diagonal(scale=algebra.constant(3.0))):
        assert sum_is_exact(a, other, 2)


@given(st.data())
def test_regrouping_keeps_the_function(data):
    groups = data.draw(st.sampled_from((2, 3, 4, 6, 12)))
    target = data.draw(
        st.sampled_from([g for g in range(1, groups + 1) if groups % g == 0])
    )
    map = conv(12, 24, 3, 2, groups=groups, pads=1)
    wide = kernels.regroup(map.kernel(), groups, target)
    assert_same(
        lambda x: execute(window(wide, pads=1, groups=target), x),
        lambda x: execute(map, x),
        lambda x: execute(absolute(map), x),
        inputs_of(map, 2),
        -3,
    )


@given(st.data())
def test_placing_on_a_finer_and_wider_grid_keeps_the_function(data):
    map = data.draw(windows(1, 2, 2, padding=False))
    old = map.axes[0]
    before, after = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    first, last = old.first - before, old.last + after
    new = Axis(old.stride, first, 1, last - first + 1, old.tail + last)
    kernel = kernels.place(map.kernel(), map.axes, (new,))
    wide = Window(-2, 2, 2, map.groups, (new,), "zeros", lambda: kernel)
    assert_same(
        lambda x: execute(wide, x),
        lambda x: execute(map, x),
        lambda x: execute(absolute(map), x),
        inputs_of(map, 1),
        -2,
    )


@given(st.data())
def test_pushing_a_constant_through_is_what_the_map_makes_of_it(data):
    spatial = data.draw(st.integers(0, 3))
    number = data.draw(st.booleans())
    if spatial:
        map = data.draw(windows(spatial, 4, 6, padding=False))
    else:
        kernel = noise(6, 4, seed=data.draw(SEEDS))
        map = Window(-1, 4, 6, 1, (), "zeros", lambda: kernel)
    bias = algebra.constant(1.5) if number else vector(noise(4, seed=8))
    assert bias is not None
    axis = -(spatial + 1)
    moved = algebra.push_bias(map, bias)
    zero = torch.zeros(BATCH, 4, *[12] * spatial, dtype=torch.float64)
    expected = execute(map, shift(zero, bias, axis))
    magnitude = execute(absolute(map), shift(zero, bias, axis).abs())
    found = shift(torch.zeros_like(expected), moved, axis)
    assert channel_error(found, expected, magnitude, axis) <= EXACT


@given(st.data())
def test_an_axis_tells_the_output_size(data):
    map = data.draw(windows(1, 1, 1))
    for x in inputs_of(map, 1):
        result = tried(lambda x: execute(map, x), x)
        if result is not None:
            assert result.shape[-1] == map.axes[0].size(x.shape[-1])
        elif map.mode == "zeros":
            assert map.axes[0].size(x.shape[-1]) < 1


# ---- what must be accepted ----------------------------------------------------------

POINT = conv(4, 4, 1, 1)
PAD_ONE = window(torch.ones(4, 1, 1, 1, dtype=torch.float64), groups=4, pads=1)
REFLECT = window(
    torch.ones(4, 1, 1, 1, dtype=torch.float64), groups=4, pads=1, mode="reflect"
)

# name: (second, first, whether a bias stands between them)
CHAINS = {
    "1x1 bias-free, 3x3 pad 1": (conv(4, 4, 3, 3, pads=1), POINT, False),
    "1x1 biased, 3x3 pad 0": (conv(4, 4, 3, 3), POINT, True),
    "1x1 bias-free, 3x3 stride 2 dilation 2": (
        conv(4, 4, 3, 3, pads=2, stride=2, dilation=2),
        POINT,
        False,
    ),
    "1x1 biased, 3x3 reflect": (conv(4, 4, 3, 3, pads=1, mode="reflect"), POINT, True),
    "1x1 biased, 3x3 circular": (
        conv(4, 4, 3, 3, pads=1, mode="circular"),
        POINT,
        True,
    ),
    "3x3 pad 1 biased, 1x1": (POINT, conv(4, 4, 3, 3, pads=1), True),
    "3x3 stride 2 biased, 1x1 stride 2": (
        conv(4, 4, 1, 1, stride=2),
        conv(4, 4, 3, 3, pads=1, stride=2),
        True,
    ),
    "7x7 reflect biased, 1x1": (POINT, conv(4, 4, 7, 7, pads=3, mode="reflect"), True),
    "3x3 pad 2 biased, 3x3 pad 0": (conv(4, 4, 3, 3), conv(4, 4, 3, 3, pads=2), True),
    "1x3 pad (0,1) bias-free, 3x1 pad (1,0)": (
        conv(4, 4, 3, 1, pads=((1, 1), (0, 0))),
        conv(4, 4, 1, 3, pads=((0, 0), (1, 1))),
        False,
    ),
    "causal, causal": (
        conv(4, 4, 3, pads=((2, 0),)),
        conv(4, 4, 3, pads=((2, 0),)),
        False,
    ),
    "causal dilated, causal dilated": (
        conv(4, 4, 3, pads=((4, 0),), dilation=2),
        conv(4, 4, 2, pads=((3, 0),), dilation=3),
        False,
    ),
    "3x3 pads (2, 2), 3x3 pad 1": (
        conv(4, 4, 3, pads=1),
        conv(4, 4, 3, pads=2),
        False,
    ),
    "pad, 3x3 pad 0": (conv(4, 4, 3, 3), PAD_ONE, False),
    "pad, pad": (PAD_ONE, PAD_ONE, False),
    "reflect pad, 3x3 pad 0": (conv(4, 4, 3, 3), REFLECT, False),
    "3x3 pad 0, 3x3 pad 0 biased": (conv(4, 4, 3, 3), conv(4, 4, 3, 3), True),
    "patchify 4x4 stride 4, pad 1 bias-free": (
        conv(4, 4, 3, 3, pads=((1, 0), (1, 0))),
        conv(4, 4, 4, 4, stride=4),
        False,
    ),
    "groups 4, groups 6": (
        conv(12, 12, 1, 1, groups=6),
        conv(12, 12, 3, 3, groups=4),
        True,
    ),
    "depthwise, dense": (conv(4, 8, 1, 1), conv(4, 4, 3, 3, groups=4, pads=1), True),
    "3d pointwise, 3d conv": (
        conv(2, 2, 3, 1, 2, pads=((1, 1), (0, 0), (1, 0))),
        conv(2, 2, 1, 1, 1),
        False,
    ),
}

# name: (a, b)
SUMS = {
    "3x3 pad 1 and 1x1": (conv(4, 4, 3, 3, pads=1), POINT),
    "RepVGG at stride 2": (
        conv(4, 8, 3, 3, pads=1, stride=2),
        conv(4, 8, 1, 1, stride=2),
    ),
    "dilated and dense": (
        conv(4, 4, 3, 3, pads=2, dilation=2),
        conv(4, 4, 3, 3, pads=1),
    ),
    "5x5 depthwise and 3x3 dense": (
        conv(4, 4, 5, 5, groups=4, pads=2),
        conv(4, 4, 3, 3, pads=1),
    ),
    "1x3 and 3x1": (
        conv(4, 4, 1, 3, pads=((0, 0), (1, 1))),
        conv(4, 4, 3, 1, pads=((1, 1), (0, 0))),
    ),
    "identity and odd same conv": (Diagonal(), conv(4, 4, 7, 7, pads=3, groups=4)),
    "identity and even same conv": (Diagonal(), conv(4, 4, 4, pads=((1, 2),))),
    "scale and 1x1": (diagonal(4, -3), POINT),
    "groups 4 and groups 6": (
        conv(12, 12, 3, 3, groups=4, pads=1),
        conv(12, 12, 3, 3, groups=6, pads=1),
    ),
    "reflect 3x3 and 1x1": (conv(4, 4, 3, 3, pads=1, mode="reflect"), POINT),
    "reflect 3x3 and reflect 5x5": (
        conv(4, 4, 3, 3, pads=1, mode="reflect"),
        conv(4, 4, 5, 5, pads=2, mode="reflect"),
    ),
    "circular 3x3 and identity": (
        conv(4, 4, 3, 3, pads=1, mode="circular"),
        Diagonal(),
    ),
    "shifted by one": (
        conv(4, 4, 1, pads=((1, -1),)),
        conv(4, 4, 1, pads=((-1, 1),)),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chain_is_accepted_and_exact(name):
    second, first, biased = CHAINS[name]
    bias = vector(noise(first.out_channels, seed=6)) if biased else None
    assert chain_is_exact(second, first, bias, len(first.axes)), "refused"


@pytest.mark.parametrize("name", SUMS)
def test_sum_is_accepted_and_exact(name):
    a, b = SUMS[name]
    wide = b if isinstance(a, Diagonal) else a
    assert sum_is_exact(a, b, len(wide.axes)), "refused"


@given(st.data())
def test_a_pointwise_map_after_anything_is_never_refused(data):
    spatial = data.draw(st.integers(1, 3))
    first = data.draw(windows(spatial, 4, 6))
    second = data.draw(pointwise(spatial, 6, 4))
    bias = vector(noise(6, seed=1))
    assert chain_is_exact(second, first, bias, spatial)


@given(st.data())
def test_a_bias_free_pointwise_map_before_anything_is_never_refused(data):
    spatial = data.draw(st.integers(1, 3))
    first = data.draw(pointwise(spatial, 4, 6))
    second = data.draw(windows(spatial, 6, 4))
    assert chain_is_exact(second, first, None, spatial)


# ---- what must be refused, and why --------------------------------------------------

# name: (second, first, biased, reason)
BROKEN_CHAINS = {
    "1x1 biased, 3x3 pad 1": (
        conv(4, 4, 3, 3, pads=1),
        POINT,
        True,
        Reason.PADDED_BORDER,
    ),
    "3x3 pad 1, 3x3 pad 1": (
        conv(4, 4, 3, 3, pads=1),
        conv(4, 4, 3, 3, pads=1),
        False,
        Reason.PADDED_BORDER,
    ),
    "1x3 pad (0,1) biased, 3x1 pad (1,0)": (
        conv(4, 4, 3, 1, pads=((1, 1), (0, 0))),
        conv(4, 4, 1, 3, pads=((0, 0), (1, 1))),
        True,
        Reason.PADDED_BORDER,
    ),
    "crop, 3x3 pad 1": (
        conv(4, 4, 3, 3, pads=1),
        conv(4, 4, 1, 1, pads=-1),
        False,
        Reason.PADDED_BORDER,
    ),
    "3x3 reflect, 3x3 pad 1": (
        conv(4, 4, 3, 3, pads=1),
        conv(4, 4, 3, 3, pads=1, mode="reflect"),
        False,
        Reason.PADDED_BORDER,
    ),
    "3x3 pad 1, 3x3 replicate": (
        conv(4, 4, 3, 3, pads=1, mode="replicate"),
        conv(4, 4, 3, 3, pads=1),
        False,
        Reason.PADDED_BORDER,
    ),
    "causal, anti-causal": (
        conv(4, 4, 3, pads=((0, 2),)),
        conv(4, 4, 3, pads=((2, 0),)),
        False,
        Reason.PADDED_BORDER,
    ),
    "3x3 pads (1, 2), 3x3 padded at the start": (
        conv(4, 4, 3, pads=((1, 0),)),
        conv(4, 4, 3, pads=((1, 2),)),
        False,
        Reason.PADDED_BORDER,
    ),
    "3x3 pads (2, 1), 3x3 padded at the end": (
        conv(4, 4, 3, pads=((0, 1),)),
        conv(4, 4, 3, pads=((2, 1),)),
        False,
        Reason.PADDED_BORDER,
    ),
    "conv, linear on another axis": (
        Window(-1, 4, 4, 1, (), "zeros", lambda: noise(4, 4)),
        POINT,
        False,
        Reason.AXIS_MISMATCH,
    ),
    "scale on the last axis after a conv": (
        diagonal(4, -1),
        POINT,
        False,
        Reason.AXIS_MISMATCH,
    ),
    "transposed, 3x3": (
        conv(4, 4, 3, 3),
        Transposed(-3, 4, 4, 1, ((2, 0, 0, 1, 2),) * 2, lambda: noise(4, 4, 2, 2)),
        False,
        Reason.TRANSPOSED,
    ),
    "bias, transposed": (
        Transposed(-3, 4, 4, 1, ((2, 0, 0, 1, 2),) * 2, lambda: noise(4, 4, 2, 2)),
        POINT,
        True,
        Reason.TRANSPOSED,
    ),
    "channels that do not fit": (
        conv(4, 4, 1, 1),
        conv(4, 6, 1, 1),
        False,
        Reason.CHANNEL_MISMATCH,
    ),
}

# name: (a, b, reason)
BROKEN_SUMS = {
    "3x3 pad 1 and 3x3 pad 0": (
        conv(4, 4, 3, 3, pads=1),
        conv(4, 4, 3, 3),
        Reason.SIZE_MISMATCH,
    ),
    "3x3 pad 0 and identity": (conv(4, 4, 3, 3), Diagonal(), Reason.SIZE_MISMATCH),
    "depthwise stride 2, equal on odd sizes only": (
        conv(4, 4, 3, 3, pads=1, stride=2, groups=4),
        conv(4, 4, 2, 2, stride=2, groups=4),
        Reason.SIZE_MISMATCH,
    ),
    "stride 1 and stride 2": (
        conv(4, 4, 3, 3, pads=1),
        conv(4, 4, 3, 3, pads=1, stride=2),
        Reason.STRIDE_MISMATCH,
    ),
    "identity and stride 2": (
        Diagonal(),
        conv(4, 4, 3, 3, pads=1, stride=2),
        Reason.STRIDE_MISMATCH,
    ),
    "zero and reflect padding": (
        conv(4, 4, 3, 3, pads=1),
        conv(4, 4, 3, 3, pads=1, mode="reflect"),
        Reason.PADDING_MODE,
    ),
    "identity and a conv to other channels": (
        Diagonal(),
        conv(4, 8, 3, 3, pads=1),
        Reason.CHANNEL_MISMATCH,
    ),
    "one output channel and four": (
        conv(4, 4, 1, 1),
        conv(4, 1, 1, 1),
        Reason.CHANNEL_MISMATCH,
    ),
    "scale on the last axis and a conv": (
        diagonal(4, -1),
        POINT,
        Reason.AXIS_MISMATCH,
    ),
    "scales on two axes": (diagonal(4, -1), diagonal(4, -3), Reason.AXIS_MISMATCH),
    "transposed and conv": (
        Transposed(-3, 4, 4, 1, ((1, 0, 0, 1, 1),) * 2, lambda: noise(4, 4, 1, 1)),
        POINT,
        Reason.TRANSPOSED,
    ),
}


@pytest.mark.parametrize("name", BROKEN_CHAINS)
def test_chain_is_refused_for_its_reason(name):
    second, first, biased, reason = BROKEN_CHAINS[name]
    refused = algebra.compose(second, first, biased=biased)
    assert isinstance(refused, Refusal)
    assert refused.reason is reason


@pytest.mark.parametrize("name", BROKEN_SUMS)
def test_sum_is_refused_for_its_reason(name):
    a, b, reason = BROKEN_SUMS[name]
    for left, right in ((a, b), (b, a)):
        refused = algebra.add(left, right)
        assert isinstance(refused, Refusal)
        assert refused.reason is reason
