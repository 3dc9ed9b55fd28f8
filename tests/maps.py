"""Maps of the algebra, as Hypothesis draws them: any geometry, and pairs that fit."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from helpers import noise, window
from hypothesis import strategies as st

from repcompiler.affine import Transposed, Window

MODES = ("zeros", "reflect", "replicate", "circular")
SEEDS = st.integers(0, 2**31 - 1)


# ---- maps of the algebra ------------------------------------------------------------


@st.composite
def widths(draw, mode: str) -> tuple[int, int]:
    """Padding on both sides; crops only where zeros are outside, as torch has it."""
    low = 0 if mode != "zeros" else -1
    return draw(st.integers(low, 3)), draw(st.integers(low, 3))


@st.composite
def groupings(draw, inputs: int, outputs: int) -> int:
    """A number of groups that divides both channel counts."""
    common = gcd(inputs, outputs)
    return draw(st.sampled_from([g for g in range(1, common + 1) if common % g == 0]))


@st.composite
def windows(
    draw,
    spatial: int,
    inputs: int,
    outputs: int,
    *,
    strides: Sequence[int] | None = None,
    padding: bool = True,
) -> Window:
    """Any conv: rectangular, even, strided, dilated, grouped, in every padding mode."""
    mode = draw(st.sampled_from(MODES)) if padding else "zeros"
    small = st.integers(1, 4 if spatial < 3 else 2)
    taps = [draw(small) for _ in range(spatial)]
    if strides is None:
        strides = [draw(st.integers(1, 3)) for _ in range(spatial)]
    dilation = [draw(st.integers(1, 3)) for _ in range(spatial)]
    pads = [draw(widths(mode)) if padding else (0, 0) for _ in range(spatial)]
    groups = draw(groupings(inputs, outputs))
    kernel = noise(outputs, inputs // groups, *taps, seed=draw(SEEDS))
    return window(
        kernel, stride=strides, pads=pads, dilation=dilation, groups=groups, mode=mode
    )


@st.composite
def pointwise(draw, spatial: int, inputs: int, outputs: int) -> Window:
    """A conv of one tap that reads the position it writes."""
    groups = draw(groupings(inputs, outputs))
    kernel = noise(outputs, inputs // groups, *[1] * spatial, seed=draw(SEEDS))
    return window(kernel, groups=groups)


@st.composite
def causal(draw, spatial: int, inputs: int, outputs: int) -> Window:
    """A conv that reads the present and the past alone."""
    taps = [draw(st.integers(1, 3)) for _ in range(spatial)]
    steps = [draw(st.integers(1, 2)) for _ in range(spatial)]
    groups = draw(groupings(inputs, outputs))
    kernel = noise(outputs, inputs // groups, *taps, seed=draw(SEEDS))
    pads = [(d * (k - 1), 0) for d, k in zip(steps, taps)]
    return window(kernel, pads=pads, dilation=steps, groups=groups)


@st.composite
def bordering(draw, spatial: int, inputs: int, outputs: int) -> Window:
    """A conv within one element of what a zero-padded conv after it asks for."""
    taps, steps, strides = (
        [draw(st.integers(1, most)) for _ in range(spatial)] for most in (3, 2, 3)
    )
    pads = []
    for k, d, s in zip(taps, steps, strides):
        span = d * (k - 1) + 1
        last = s - 1 + draw(st.sampled_from((0, 0, 0, 1)))
        high = span - 1 - draw(st.sampled_from((0, 0, 0, 1)))
        pads.append((span - 1 - last, high))
    groups = draw(groupings(inputs, outputs))
    kernel = noise(outputs, inputs // groups, *taps, seed=draw(SEEDS))
    return window(kernel, stride=strides, pads=pads, dilation=steps, groups=groups)


@st.composite
def any_window(draw, spatial: int, inputs: int, outputs: int) -> Window:
    """Windows of the kinds that often compose, and any others."""
    kinds = (
        windows(spatial, inputs, outputs),
        windows(spatial, inputs, outputs, padding=False),
        pointwise(spatial, inputs, outputs),
        causal(spatial, inputs, outputs),
        bordering(spatial, inputs, outputs),
    )
    return draw(st.one_of(*kinds))


@st.composite
def chains(draw) -> tuple[Window, Window]:
    """(second, first): two windows whose channels fit."""
    spatial = draw(st.sampled_from((1, 1, 2, 3)))
    sizes = st.sampled_from((1, 2, 4, 6))
    inputs, middle, outputs = draw(sizes), draw(sizes), draw(sizes)
    first = draw(any_window(spatial, inputs, middle))
    return draw(any_window(spatial, middle, outputs)), first


@st.composite
def border_chains(draw) -> tuple[Window, Window]:
    """(second, first) on one axis; the second pads with zeros where the first ends."""
    first = draw(bordering(1, 2, 2))
    taps = draw(st.integers(1, 3))
    low, high = draw(st.sampled_from(((1, 0), (0, 1), (2, 1))))
    stride = draw(st.integers(1, 2))
    kernel = noise(2, 2, taps, seed=draw(SEEDS))
    return window(kernel, stride=stride, pads=((low, high),)), first


@st.composite
def sums(draw) -> tuple[Window, Window]:
    """Two windows of the same channels and strides; often of equal output size."""
    spatial = draw(st.sampled_from((1, 1, 2, 3)))
    sizes = st.sampled_from((1, 2, 4, 6, 12))
    inputs, outputs = draw(sizes), draw(sizes)
    strides = [draw(st.integers(1, 3)) for _ in range(spatial)]
    a = draw(windows(spatial, inputs, outputs, strides=strides))
    b = draw(windows(spatial, inputs, outputs, strides=strides))
    return a, draw(st.sampled_from((b, with_tails_of(b, a))))


def with_tails_of(b: Window, a: Window) -> Window:
    """`b` padded at the end so that its sizes are those of `a`, if its mode can."""
    pads = [(-y.first, x.tail + y.last) for x, y in zip(a.axes, b.axes)]
    mode = a.mode if all(low >= 0 and high >= 0 for low, high in pads) else "zeros"
    return window(
        b.kernel(),
        stride=[axis.stride for axis in b.axes],
        pads=pads,
        dilation=[axis.step for axis in b.axes],
        groups=b.groups,
        mode=mode,
    )


@st.composite
def transposed(draw, spatial: int, inputs: int, outputs: int) -> Transposed:
    """A transposed conv of any geometry that torch takes."""
    rows = []
    for _ in range(spatial):
        taps, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        dilation = draw(st.integers(1, 2))
        extra = draw(st.integers(0, max(stride, dilation) - 1))
        rows.append((stride, draw(st.integers(0, 1)), extra, dilation, taps))
    groups = draw(groupings(inputs, outputs))
    taps = [row[4] for row in rows]
    kernel = noise(inputs, outputs // groups, *taps, seed=draw(SEEDS))
    return Transposed(
        -(spatial + 1), inputs, outputs, groups, tuple(rows), lambda: kernel
    )
