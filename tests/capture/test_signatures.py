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
