"""A size question costs no op, and keeps no norm from its neighbour."""

from __future__ import annotations

import pytest
import torch
from equality import assert_same, conv, draw, randomise
from torch import Tensor, nn

import repcompiler as rc


class Tokens(nn.Module):
    """A norm over flattened tokens, whose sizes are asked again and again (LeViT)."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.linear(x)
        y = self.norm(tokens.flatten(0, 1)).reshape_as(tokens)
        z = y.relu().reshape(y.size(0), y.size(1), 2, -1)
        w = y.sigmoid().reshape(y.size(0), y.size(1), 2, -1)
        return (z + w, tokens) if self.kept else z + w


def fused(kept: bool, door: str) -> rc.FuseResult:
    torch.manual_seed(0)
    model = randomise(Tokens(kept))
    return rc.fuse(model, (torch.randn(2, 5, 6).double(),), capture=door)


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_a_norm_joins_its_linear_where_its_own_sizes_are_asked(door: str) -> None:
    report = fused(False, door).report
    assert report.equivalence.verdict == "equal"
    assert report.ops.before_by_type["batch_norm"] == 1
    assert report.ops.after_by_type.get("batch_norm", 0) == 0
    assert report.ops.after == report.ops.before - 1


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_many_questions_ask_one_view(door: str) -> None:
    result = fused(True, door)
    assert result.report.equivalence.verdict == "equal"
    views = [n for n in result.model.graph.nodes if "reshape" in n.name]
    assert len(views) <= 4  # of y, its twin, and the two that the model makes of it


class Broadcast(nn.Module):
    """A norm of a sum whose first operand may be smaller, and questions about it."""

    def __init__(self, other, first) -> None:
        super().__init__()
        self.one, self.two, self.norm = conv(), conv(), nn.BatchNorm2d(4)
        self.other, self.first = other, first

    def forward(self, x, y=None):
        parts = [self.two(self.other(x, y)), self.one(x)]
        found = self.norm(sum(parts if self.first else parts[::-1]))
        area = found.shape[2] * found.shape[3]
        return found.sum((2, 3)) / area, found.reshape(found.shape[0], 4, -1)


def given(x, y):
    return y


def column(x, _):
    return x.mean(2, keepdim=True)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("other", "example", "more"),
    [
        (given, [(2, 4, 8, 8)] * 2, [[(2, 4, 8, 8), (2, 4, 1, 1)]]),
        (given, [(2, 4, 8, 8)] * 2, [[(3, 4, 5, 6), (1, 4, 5, 1)]]),
        (given, [(2, 4, 8, 8)] * 2, [[(1, 4, 5, 1), (3, 4, 5, 6)]]),
        (column, [(2, 4, 1, 16)], [[(2, 4, 5, 16)], [(1, 4, 3, 1)]]),
    ],
)
def test_size_of_a_sum_is_not_that_of_an_operand_that_is_broadcast(
    other, example, more, first
):
    net = randomise(Broadcast(other, first))
    batches = [tuple(draw(shape) for shape in shapes) for shapes in (example, *more)]
    result = rc.fuse(net, batches[0], capture="symbolic_trace")
    assert result.report.equivalence.ok
    assert_same(net, result.model, batches)


class Parts(nn.Module):
    """A concat that is taken apart again, and asked for its batch (CoaT)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.cat([self.one(x), self.two(x).relu()], 1)
        first, second = whole[:, :4], whole[:, 4:]
        size = whole.size(0), 4, whole.size(2) * whole.size(3)
        return first.sigmoid().reshape(size) + second.tanh().reshape(size)


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_a_concat_that_is_asked_for_its_batch_is_taken_apart(door: str) -> None:
    model = randomise(Parts())
    result = rc.fuse(model, (draw((2, 4, 8, 8)),), capture=door)
    assert "cat" not in result.report.ops.after_by_type
    shapes = [(2, 4, 8, 8), (1, 4, 5, 7), (3, 4, 2, 9)]
    assert_same(model, result.model, [(draw(shape),) for shape in shapes])


class Swapped(nn.Module):
    """A constant that fixes one axis of the input, while another may be any."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.rand(5, 1, 1) + 0.5)
        self.register_buffer("scale", torch.rand(5, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addcmul(self.shift, x.swapaxes(1, 3), self.scale, value=-1.5)
        return (y * self.scale)[:, :, -4:]


def test_an_axis_may_change_where_another_may_not() -> None:
    model = randomise(Swapped())
    result = rc.fuse(model, (draw((2, 6, 6, 5)),))
    shapes = [(2, 6, 6, 5), (1, 6, 3, 5), (1, 6, 1, 5), (1, 6, 1, 1), (2, 6, 9, 1)]
    assert_same(model, result.model, [(draw(shape),) for shape in shapes])


class Gate(nn.Module):
    """Pooled branches that are asked for their batch, beside other readers (CBAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(512, 2048, 1, bias=False), nn.BatchNorm2d(2048)
        self.mean, self.top = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)
        self.down, self.up = nn.Linear(2048, 128), nn.Linear(128, 2048)

    def squeeze(self, pooled: Tensor) -> Tensor:
        return self.up(self.down(pooled.view(pooled.size(0), -1)).relu())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x.relu()))
        weight = (self.squeeze(self.mean(y)) + self.squeeze(self.top(y))).sigmoid()
        return y * weight[:, :, None, None]


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_a_pool_that_is_asked_for_its_batch_is_not_kept_for_that(door: str) -> None:
    model = randomise(Gate())
    result = rc.fuse(model, (draw((2, 512, 7, 7)),), capture=door)
    assert result.report.ops.after == result.report.ops.before - 1
    shapes = [(2, 512, 7, 7), (1, 512, 5, 3), (3, 512, 1, 1)]
    assert_same(model, result.model, [(draw(shape),) for shape in shapes])
