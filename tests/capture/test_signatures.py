"""What goes in and comes out of a fused model is of the kind that it was."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from equality import assert_same, conv, convs, draw, images, norms, randomise
from torch import nn

import repcompiler as rc


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_an_ordered_dict_stays_one(door):
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = conv(), nn.BatchNorm2d(4), conv()

        def forward(self, x):
            found = OrderedDict(low={"x": self.norm(self.conv(x))})
            return OrderedDict(out=self.head(found["low"]["x"]), found=found)

    net = randomise(Ordered())
    batches = [(draw(shape),) for shape in images(4)]
    result = rc.fuse(net, batches[0], capture=door)
    assert (convs(result.model), norms(result.model)) == (2, 0)
    assert_same(net, result.model, batches)
    found = result.model(*batches[0])
    assert type(found) is type(found["found"]) is OrderedDict
    assert list(found) == ["out", "found"]


def test_maps_that_are_returned_together_are_written_to_one_by_one():
    """As a detector's backbone returns them: each is written to before, in its turn."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList(
                nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU6(inplace=True))
                for _ in range(3)
            )

        def forward(self, x):
            maps = []
            for step in self.steps:
                maps.append(x := step(x))
            return OrderedDict((str(i), m) for i, m in enumerate(maps))

    net = randomise(Pyramid())
    batches = [(draw(shape),) for shape in images(4)]
    result = rc.fuse(net, batches[0])
    assert (convs(result.model), norms(result.model)) == (3, 0)
    assert_same(net, result.model, batches)


def test_a_map_written_to_after_it_was_put_in_is_returned_as_written():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(self.conv(x))
            found = OrderedDict(y=y, view=y[:, :2], inner=OrderedDict(y=y))
            y.mul_(2.0).add_(1.0)
            return found

    net = randomise(Late())
    batches = [(draw(shape),) for shape in images(4)]
    assert_same(net, rc.fuse(net, batches[0]).model, batches)


@pytest.mark.parametrize("blind", [False, True])
def test_an_argument_left_at_none_is_none(blind):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(), nn.BatchNorm2d(4)

        def forward(self, x, mask=None, double=True):
            y = self.norm(self.conv(x))
            y = y if mask is None else y * mask
            return y * 2 if double else y

    net = randomise(Masked())
    x = draw((2, 4, 6, 5))
    result = rc.fuse(net) if blind else rc.fuse(net, (x,))
    assert result.report.capture == "symbolic_trace"
    assert_same(net, result.model, [(x,), (x, None), (x, None, True)])
    for other in ((x, x), (x, None, False)):
        with pytest.raises(AssertionError, match="specialized"):
            result.model(*other)
    torch.testing.assert_close(result.model(x=x, mask=None, double=True), net(x))
