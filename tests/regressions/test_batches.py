"""A constant may be as long as the batch of the example, and is not the batch."""

from __future__ import annotations

import pytest
from equality import Net, assert_same, draw, randomise
from torch import Tensor, nn

import repcompiler as rc

DOORS = ("symbolic_trace", "export")


def fixed_batch(n: nn.Module, x: Tensor) -> Tensor:
    return n.norm(n.conv(x).reshape(2, 4, -1))


def folded(n: nn.Module, x: Tensor) -> Tensor:
    return n.conv(x).view(4, -1, x.shape[2], x.shape[3]) * n.scale


def asked(n: nn.Module, x: Tensor) -> Tensor:
    y = n.conv(x) * n.scale
    return y.reshape(y.shape[0], -1)


def asked_twice(n: nn.Module, x: Tensor) -> Tensor:
    y = n.norm(n.conv(x)) + n.scale
    return y.flatten(2).reshape(y.shape[0], 4, -1) * y.shape[0]


def net(forward, scale: tuple[int, ...], norm: nn.Module) -> nn.Module:
    parts = {"conv": nn.Conv2d(4, 4, 3, padding=1), "norm": norm}
    model = Net(forward, **parts)
    model.scale = nn.Parameter(draw(scale))
    return randomise(model)


CASES = [
    (fixed_batch, (1,), nn.BatchNorm1d(4), 2, [4, 6]),
    (folded, (4, 1, 1), nn.Identity(), 4, [1]),
    (asked, (2, 1, 1, 1), nn.Identity(), 1, [2]),
    (asked, (2, 1, 1, 1), nn.Identity(), 2, [1]),
    (asked_twice, (2, 1, 1, 1), nn.BatchNorm2d(4), 1, [2]),
    (asked_twice, (2, 1, 1, 1), nn.BatchNorm2d(4), 2, [1]),
]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("forward", "scale", "norm", "batch", "others"), CASES)
def test_other_batches(forward, scale, norm, batch, others, door) -> None:
    model = net(forward, scale, norm)
    x = draw((batch, 4, 5, 5))
    result = rc.fuse(model, (x,), capture=door)
    assert result.report.equivalence.verdict == "equal"
    if door == "export" and batch == 1:  # the program says so, and takes no other
        others = []
    more = [(draw((n, 4, 5, 5)),) for n in others]
    assert_same(model, result.model, [(x,), *more])


def test_a_batch_that_moves_on_is_fused() -> None:
    """The batch is the first axis of what a view makes, at any size."""
    model = net(
        lambda n, x: n.norm(n.conv(x).reshape(x.shape[0], 4, -1)),
        (1,),
        nn.BatchNorm1d(4),
    )
    for batch in (1, 2, 4):
        x = draw((batch, 4, 5, 5))
        result = rc.fuse(model, (x,))
        assert result.report.ops.after_by_type["batch_norm"] == 0
        assert_same(model, result.model, [(x,), (draw((3, 4, 7, 5)),)])


def test_one_channel_through_a_view() -> None:
    """Where several axes hold one element, any of them may be the channel."""
    model = randomise(
        Net(
            lambda n, x: n.norm(n.conv(x).reshape(x.shape[0], 1, -1)),
            conv=nn.Conv2d(4, 1, 3),
            norm=nn.BatchNorm1d(1),
        )
    )
    result = rc.fuse(model, (draw((1, 4, 5, 5)),))
    assert result.report.ops.after_by_type["batch_norm"] == 0
    assert_same(model, result.model, [(draw((3, 4, 7, 5)),), (draw((1, 4, 3, 3)),)])


def test_an_empty_example_compares_nothing() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)))
    report = rc.fuse(model, (draw((0, 4, 5, 5)),)).report
    assert report.equivalence.verdict == "not comparable"
    assert not report.equivalence.ok


@pytest.mark.parametrize(
    ("model", "width"),
    [
        (nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 3)), 4),
        (nn.Sequential(nn.Linear(0, 4), nn.BatchNorm1d(4)), 0),
        (nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3), nn.BatchNorm1d(3)), 4),
    ],
)
def test_layers_of_no_channels_stay(model: nn.Module, width: int) -> None:
    model, x = randomise(model), (draw((2, width)),)
    assert_same(model, rc.fuse(model, x).model, [x])
