"""The nouns: affine maps between channel vectors, and what a value means.

A value's **meaning** is ``bias + Σ after(map(before(source)))``: a number per channel
plus a sum of maps of sources, where `before` and `after` are layout ops (views) and the
map is one of

* `Diagonal`   y[c] = s[c] · x[c], at every position (identity: no scale at all);
* `Window`     y[o, p] = Σ_{i, t} K[o, i, t] · x[i, stride·p + first + step·t], a conv
of
  any rank, or a linear layer, which is a window without spatial axes;
* `Transposed` a transposed conv, which scatters where a window gathers.

Axes are counted from the end (the channels of an image are axis -3), so that batched
and unbatched values are one case. Geometry is data. Numbers are thunks that make
float64 tensors, so that a plan can be costed without a kernel being built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from torch import Tensor
from torch.fx import Node

from repcompiler.reasons import Reason

Thunk = Callable[[], Tensor]


@dataclass(frozen=True)
class Refusal:
    """Why two maps stay two ops, and the nodes at fault."""

    reason: Reason
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis of a window.

    Output index p reads the input at ``stride·p + first + step·t`` for t in
    [0, taps). `pad_high` is the padding after the last element; the padding before the
    first is ``-first``. Negative padding crops.
    """

    stride: int = 1
    first: int = 0
    step: int = 1
    taps: int = 1
    pad_high: int = 0

    @property
    def last(self) -> int:
        """Offset of the last tap."""
        return self.first + self.step * (self.taps - 1)

    @property
    def span(self) -> int:
        """Elements from the first tap to the last, both counted."""
        return self.last - self.first + 1

    @property
    def pad_low(self) -> int:
        """Padding before the first element."""
        return -self.first

    @property
    def tail(self) -> int:
        """What fixes the output size: size = (L - 1 + tail) // stride + 1."""
        return self.pad_high - self.last

    @property
    def spacing(self) -> int:
        """The step between taps; 0 for one tap, which the gcd of steps ignores."""
        return self.step if self.taps > 1 else 0

    @property
    def pads(self) -> bool:
        """Whether the window leaves the input."""
        return self.pad_low > 0 or self.pad_high > 0

    def size(self, length: int) -> int:
        """Number of outputs for `length` inputs."""
        return (length - 1 + self.tail) // self.stride + 1


POINT = Axis()


@dataclass(frozen=True)
class Vector:
    """One float64 number per channel (`size`), or one for all of them (size None).

    `parts` is the sum of the magnitudes that were added up in it, from which one can
    tell whether they cancelled; None where it is one number, or dear to compute.
    """

    size: int | None
    value: Thunk = field(repr=False, compare=False)
    parts: Thunk | None = field(default=None, repr=False, compare=False)
    dear: bool = False


@dataclass(frozen=True)
class Diagonal:
    """y[c] = scale[c]·x[c]; without a scale the identity.

    `axis` is None for the identity and for a single number, which fit any axis.
    `channels` is None where they cannot be known.
    """

    axis: int | None = None
    channels: int | None = None
    scale: Vector | None = None

    @property
    def is_identity(self) -> bool:
        """Whether this map changes nothing."""
        return self.scale is None


@dataclass(frozen=True)
class Window:
    """A conv, or a linear layer if `axes` is empty. `kernel`: (O, I/groups, *taps).

    `mode` is what lies outside of the input: zeros, reflect, replicate or circular; it
    is `zeros` wherever no axis pads. `fixed`: whether weights prove the number of
    channels. A pool or a pad alone takes any number; only with a map that is fixed can
    it become a conv.
    """

    axis: int
    in_channels: int
    out_channels: int
    groups: int
    axes: tuple[Axis, ...]
    mode: str
    kernel: Thunk = field(repr=False, compare=False)
    fixed: bool = True

    @property
    def channels(self) -> int:
        """Channels of the output."""
        return self.out_channels

    @property
    def pads(self) -> bool:
        """Whether any axis leaves the input."""
        return any(axis.pads for axis in self.axes)

    @property
    def pointwise(self) -> bool:
        """Whether every output position reads just the same input position."""
        return all(axis == POINT for axis in self.axes)

    @property
    def taps(self) -> int:
        """Taps of one filter and one input channel."""
        return prod(axis.taps for axis in self.axes)

    @property
    def weights(self) -> int:
        """Numbers in the kernel, which is MACs per output position as well."""
        return self.out_channels * (self.in_channels // self.groups) * self.taps

    @property
    def stride(self) -> int:
        """Product of the strides."""
        return prod(axis.stride for axis in self.axes)


@dataclass(frozen=True)
class Transposed:
    """A transposed conv. `kernel`: (I, O / groups, *taps), torch's own layout.

    `geometry` holds one (stride, padding, output_padding, dilation, taps) per axis.
    """

    axis: int
    in_channels: int
    out_channels: int
    groups: int
    geometry: tuple[tuple[int, int, int, int, int], ...]
    kernel: Thunk = field(repr=False, compare=False)

    @property
    def channels(self) -> int:
        """Channels of the output."""
        return self.out_channels

    @property
    def local(self) -> bool:
        """Whether it is pointwise after all: k = 1, stride 1, no padding."""
        return all(row == (1, 0, 0, row[3], 1) for row in self.geometry)

    @property
    def weights(self) -> int:
        """Numbers in the kernel, which is MACs per input position as well."""
        taps = prod(row[4] for row in self.geometry)
        return self.in_channels * (self.out_channels // self.groups) * taps


Map = Diagonal | Window | Transposed


@dataclass(frozen=True)
class Block:
    """The channels [start, start + size) of `total`."""

    start: int
    size: int
    total: int

    @property
    def stop(self) -> int:
        """The channel after the last."""
        return self.start + self.size

    def cut(self, outer: Block) -> Block | None:
        """What `outer` leaves of this block, counted from there; None if nothing."""
        start, stop = max(self.start, outer.start), min(self.stop, outer.stop)
        if start >= stop:
            return None
        return Block(start - outer.start, stop - start, outer.size)


@dataclass(frozen=True)
class Step:
    """A layout op (or a mean over positions, or a resize) that keeps channels apart.

    `axes` tells, for each axis of the input that it keeps whole, which axis of the
    output that becomes. A constant passes unchanged: the weights of a mean and of a
    resize sum to one. `computes`: whether it is an op of its own and not just a view.
    `cuts`: whether it takes a part of an axis; `pick` says which axis and part, where
    that is the same for every input.
    """

    node: Node
    axes: Mapping[int, int] = field(compare=False)
    computes: bool = False
    cuts: bool = False
    pick: tuple[int, Block] | None = None


@dataclass(frozen=True)
class Term:
    """after(map(before(source))); `rows`: the channels that it makes, None for all."""

    source: Node
    map: Map = Diagonal()
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
    rows: Block | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Two terms with one key can be added into one, if their maps can."""
        return (self.source, self.before, self.after, self.rows)

    @property
    def is_source(self) -> bool:
        """Whether this is the source itself, with nothing to compute."""
        identity = isinstance(self.map, Diagonal) and self.map.is_identity
        return identity and not (self.before or self.after or self.rows)


@dataclass(frozen=True)
class Meaning:
    """bias + Σ terms; `axis` is the value's channel axis, None where any will do.

    `through`: the values between, which it does without. No source is one of them, so
    that a meaning is a function of its sources, whatever these are.
    """

    terms: tuple[Term, ...]
    bias: Vector | None = None
    axis: int | None = None
    channels: int | None = None
    through: frozenset[Node] = field(default=frozenset(), compare=False, repr=False)

    @property
    def sources(self) -> tuple[Node, ...]:
        """The sources, each once, in order."""
        return tuple(dict.fromkeys(term.source for term in self.terms))

    def over(self, terms: tuple[Term, ...]) -> Meaning:
        """The same with other terms."""
        return replace(self, terms=terms)


def atom(node: Node) -> Meaning:
    """The value itself, taken as given."""
    return Meaning((Term(node),))
