"""What an op costs, in microseconds of a nominal machine; no choice is made here.

    cost = launch + MACs / rate + bytes / bandwidth

Sizes are those of the example inputs with batch one, or, without any, relative to a
nominal image of 224 x 224. Only ratios matter. The numbers are those of two CPU cores:
a launch costs what 100,000 MACs cost, and convs with few channels per group, whose work
is moving bytes, run at a quarter of the rate. Where somebody has measured an op,
`Prices` takes that instead; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from repcompiler.affine import Diagonal, Map, Window

LAUNCH = 5.0
DENSE_RATE = 2.0e4
GROUPED_RATE = 5.0e3
BANDWIDTH = 1.0e4
NUMBER = 4.0


@dataclass(frozen=True)
class Work:
    """Output positions of a map, and how many of them there are per input position."""

    positions: float
    input_positions: float


def map_cost(map: Map, work: Work, channels: int) -> float:
    """Cost of one op that computes `map`; `channels` stands in where a map has none."""
    if isinstance(map, Diagonal):
        return elementwise_cost(work.positions * (map.channels or channels))
    moved = work.positions * map.out_channels + work.input_positions * map.in_channels
    return (
        LAUNCH
        + map_macs(map, work) / _rate(map)
        + (moved + map.weights) * NUMBER / BANDWIDTH
        + padding_cost(map, work)
    )


def map_macs(map: Map, work: Work) -> float:
    """Multiply-accumulates of a map; a per-channel scale counts as none."""
    if isinstance(map, Diagonal):
        return 0.0
    return map.weights * (
        work.positions if isinstance(map, Window) else work.input_positions
    )


def _rate(map: Map) -> float:
    assert not isinstance(map, Diagonal)
    return DENSE_RATE if map.in_channels // map.groups >= 8 else GROUPED_RATE


def padding_cost(map: Map, work: Work) -> float:
    """An explicit pad, where the two sides differ or padding is not with zeros."""
    if not isinstance(map, Window) or not needs_pad(map):
        return 0.0
    return LAUNCH + 2 * work.input_positions * map.in_channels * NUMBER / BANDWIDTH


def needs_pad(map: Window) -> bool:
    """Whether the conv needs a pad op of its own."""
    if map.mode != "zeros":
        return map.pads
    return any(axis.pad_low != axis.pad_high or axis.pad_low < 0 for axis in map.axes)


def elementwise_cost(numbers: float) -> float:
    """One read, one write and a launch."""
    return LAUNCH + 2 * numbers * NUMBER / BANDWIDTH


def add_cost(numbers: float) -> float:
    """Two reads, one write and a launch."""
    return LAUNCH + 3 * numbers * NUMBER / BANDWIDTH


# ---- measured costs ----------------------------------------------------------------


@dataclass(frozen=True)
class Sized:
    """An op and the shape that it reads, one sample of it: what a measurement is of.

    `op` is a map (of which the geometry counts, not the numbers), `mul` for a scale
    and shift per channel, or `add` for the sum of two values of that shape.
    """

    op: Map | str
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """The same for all ops of one geometry and shape."""
        sizes = "x".join(map(str, self.shape))
        return f"{_geometry(self.op)} on {sizes}"


def _geometry(op: Map | str) -> str:
    if isinstance(op, str):
        return op
    if isinstance(op, Diagonal):
        return "mul"
    head = f"{op.in_channels}->{op.out_channels}/{op.groups}"
    if not isinstance(op, Window):
        rows = " ".join(",".join(map(str, row)) for row in op.geometry)
        return f"transposed {head} {rows}"
    axes = (f"{a.taps},{a.step},{a.stride},{a.first},{a.pad_high}" for a in op.axes)
    return " ".join(("window", head, *axes, op.mode))


Known = Callable[[Sized], "float | None"]


@dataclass(frozen=True)
class Prices:
    """What ops cost: as `known` says in microseconds, else on the nominal machine.

    `batch`: how many samples the shapes hold.
    """

    known: Known | None = None
    batch: int = 1

    def map(
        self, map: Map, work: Work, channels: int, shape: tuple[int | None, ...] | None
    ) -> float:
        """One op that computes `map` on a value of this shape."""
        found = self._measured(map, shape)
        return map_cost(map, work, channels) if found is None else found

    def elementwise(
        self, numbers: float, shape: tuple[int | None, ...] | None
    ) -> float:
        """A scale and shift per channel."""
        found = self._measured("mul", shape)
        return elementwise_cost(numbers) if found is None else found

    def add(self, numbers: float, shape: tuple[int | None, ...] | None) -> float:
        """The sum of two values."""
        found = self._measured("add", shape)
        return add_cost(numbers) if found is None else found

    def _measured(
        self, op: Map | str, shape: tuple[int | None, ...] | None
    ) -> float | None:
        if self.known is None or not shape:
            return None
        sizes = [size for size in shape if size is not None]
        if len(sizes) < len(shape):
            return None
        if sizes[0] % self.batch == 0:
            sizes[0] //= self.batch
        return self.known(Sized(op, tuple(sizes)))
