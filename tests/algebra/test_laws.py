"""The algebra is exact: whatever it accepts computes the same, for every input size.

Execution is the oracle: two maps run one after the other, or side by side, by
torch in float64, against the one map that the algebra made of them.
"""

from __future__ import annotations

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
from maps import (
    SEEDS,
    any_window,
    border_chains,
    chains,
    pointwise,
    sums,
    transposed,
    windows,
)
from oracle import BATCH, assert_same, chain_is_exact, inputs_of, sum_is_exact

from repcompiler import algebra, kernels
from repcompiler.affine import Axis, Diagonal, Refusal, Transposed, Window
from repcompiler.reasons import Reason


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
