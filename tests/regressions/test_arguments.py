"""Arguments in every form: by keyword, computed from sizes, complex, of odd roots."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equality import Net, assert_same, conv, draw, norms, randomise
from torch import Tensor, nn

import repcompiler as rc


def summed(s, x):
    return s.norm(torch.add(s.conv(x), s.head(x), alpha=x.shape[2]))


def subtracted(s, x):
    return s.norm(torch.sub(s.conv(x), s.head(x), alpha=x.shape[2]))


def pooled(s, x):
    return s.norm(F.avg_pool2d(s.conv(x), 2, divisor_override=x.shape[2]))


def normed(s, x):
    mean, var = s.norm.running_mean, s.norm.running_var
    return F.batch_norm(s.conv(x), mean, var, eps=1.0 / x.shape[2])


def imaginary(s, x):
    y = s.conv(x)
    return torch.add(torch.complex(y, y), torch.complex(x, y), alpha=2j).abs()


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize("body", [summed, subtracted, pooled, normed, imaginary])
def test_numbers_that_are_none(body, door):
    net = Net(body, conv=conv(), head=conv(), norm=nn.BatchNorm2d(4))
    net = randomise(net)
    batches = [(draw(shape),) for shape in ((2, 4, 8, 8), (1, 4, 8, 7))]
    result = rc.fuse(net, batches[0], capture=door)
    assert result.report.equivalence.ok
    assert_same(net, result.model, batches)
    other = (draw((1, 4, 6, 7)),)
    if door == "export" and body in (pooled, normed):  # which make a number of it
        with pytest.raises(AssertionError, match="captured for inputs where"):
            result.model(*other)
    else:
        assert_same(net, result.model, [other])


def test_operands_by_keyword():
    def body(s, x):
        y = s.norm(input=torch.flatten(input=s.conv(input=x), start_dim=2))
        return s.linear(input=s.layer(input=y.transpose(1, 2)))

    parts = {"layer": nn.LayerNorm(4), "linear": nn.Linear(4, 3)}
    net = randomise(Net(body, conv=conv(), norm=nn.BatchNorm1d(4), **parts))
    batches = [(draw(shape),) for shape in ((2, 4, 8, 8), (1, 4, 6, 7))]
    result = rc.fuse(net, batches[0])
    assert_same(net, result.model, batches)
    assert norms(result.model) == 0


@pytest.mark.parametrize(
    "name", ["fused", "graph", "code", "forward_count", "training_"]
)
def test_attributes_of_the_root(name):
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = conv(), conv()
            setattr(self, name, [1, 2])

        def forward(self, x):
            return self.conv(x) + self.head(x)

    net = randomise(Root())
    fused = rc.fuse(net, (draw((2, 4, 6, 5)),)).model
    assert_same(net, fused, [(draw((1, 4, 7, 6)),)])
    if name in ("forward_count", "training_"):
        assert getattr(fused, name) == [1, 2]


class PassedOn(nn.Module):
    """Takes whatever comes and passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(*inputs)

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + y


def test_sizes_stay_open_where_forward_passes_its_arguments_on() -> None:
    model = randomise(PassedOn())
    result = rc.fuse(model, (draw((2, 4, 8, 8)), draw((2, 4, 8, 8))))
    assert result.report.capture == "export"
    assert result.report.ops.after_by_type.get("batch_norm", 0) == 0
    shapes = [(1, 4, 8, 8), (3, 4, 5, 9)]
    batches = [(draw(shape), draw(shape, seed=2)) for shape in shapes]
    assert_same(model, result.model, batches)
