"""Measured costs decide which regions are merged; every plan is the same function."""

from __future__ import annotations

import pytest
from equality import Net, assert_same, draw, randomise
from torch import nn

import repcompiler as rc
from repcompiler.cost import Sized

X = (draw((2, 8, 9, 7)),)


def crossed(channels: int) -> nn.Module:
    """A row conv plus a column conv of the same input: together one square conv."""
    row = nn.Conv2d(channels, channels, (1, 7), padding=(0, 3))
    column = nn.Conv2d(channels, channels, (7, 1), padding=(3, 0))
    return randomise(Net(lambda n, x: n.row(x) + n.column(x), row=row, column=column))


def square_costs(microseconds: float):
    """The square conv costs that much, every other op one microsecond."""
    return lambda sized: microseconds if _taps(sized) == [7, 7] else 1.0


def _taps(sized: Sized) -> list[int]:
    axes = getattr(sized.op, "axes", None) or ()
    return [axis.taps for axis in axes]


@pytest.mark.parametrize(("price", "convs"), [(1000.0, 2), (0.5, 1)])
def test_a_region_is_merged_where_that_was_measured_to_be_cheaper(price, convs):
    net = crossed(8)
    tuning = rc.Tuning(costs=square_costs(price))
    result = rc.fuse(net, X, tuning=tuning)
    assert result.report.equivalence.ok
    assert result.report.ops.after_by_type["convolution"] == convs
    assert_same(net, result.model, [X, (draw((1, 8, 12, 12)),)])


def test_where_nothing_was_measured_the_nominal_machine_decides():
    net = crossed(8)
    plain = rc.fuse(net, X).report
    silent = rc.fuse(net, X, tuning=rc.Tuning(costs=lambda _: None)).report
    assert plain.ops.after_by_type == silent.ops.after_by_type


def test_an_op_is_asked_for_by_its_geometry_and_one_sample():
    asked: set[str] = set()

    def note(sized: Sized) -> None:
        asked.add(sized.key)

    rc.fuse(crossed(8), X, tuning=rc.Tuning(costs=note))
    assert all(key.endswith("on 1x8x9x7") for key in asked)
    assert any(key.startswith("window 8->8/1 7,1,1,-3,3 7,1,1,-3,3") for key in asked)
    assert "add on 1x8x9x7" in asked
