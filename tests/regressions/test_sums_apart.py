"""Sums of maps of one value that are no one map: each is fused by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equality import assert_same, draw, randomise
from torch import Tensor, nn

import repcompiler as rc

Branch = Callable[[], nn.Module]


def up(kernel: int, padding: int = 0) -> Branch:
    return lambda: nn.ConvTranspose2d(4, 4, kernel, 2, padding)


def conv(kernel: int = 3, **settings) -> Branch:
    return lambda: nn.Conv2d(4, 4, kernel, padding=kernel // 2, **settings)


class Sum(nn.Module):
    """norm(one(x) + two(x) + …), or the sum without a norm."""

    def __init__(self, *branches: Branch, norm: bool = True) -> None:
        super().__init__()
        self.branches = nn.ModuleList([make() for make in branches])
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return self.norm(total)


PAIRS: dict[str, tuple[Branch, Branch]] = {
    "transposed": (up(4, 1), up(2)),
    "modes": (conv(padding_mode="reflect"), conv()),
    "circular": (conv(padding_mode="circular"), conv(5)),
    "pool": (lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False), conv()),
}


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_norm_goes_into_both_of_two_maps_that_stay_two(pair, door) -> None:
    torch.manual_seed(0)
    model = randomise(Sum(*PAIRS[pair]))
    result = rc.fuse(model, (draw((2, 4, 8, 8)),), capture=door)
    after = result.report.ops.after_by_type
    if pair != "pool":  # whose border has weights of its own: the norm stays for it
        assert after.get("batch_norm", 0) == 0
        assert result.report.ops.before - result.report.ops.after == 1
    shapes = [(2, 4, 8, 8), (1, 4, 7, 5), (3, 4, 3, 3)]
    assert_same(model, result.model, [(draw(shape),) for shape in shapes])


class Cancelling(nn.Module):
    """A middle tap that is W + |W|, which is nothing where W is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, padding=2, dilation=2, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight.abs()
        return self.conv(x) + F.conv1d(x, weight, None, 1, 1, groups=2)


def test_kernels_that_cancel_are_judged_by_what_was_added() -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        model = Cancelling().double().eval()
        with torch.no_grad():
            model.conv.weight[seed % 6] = -model.conv.weight[seed % 6].abs()
        result = rc.fuse(model, (draw((1, 6, 7)),))
        assert (result.report.ops.after, result.report.kept) == (1, ())
        assert_same(model, result.model, [(draw((2, 6, n)),) for n in (1, 3, 9)])


PLACES = [(0, 1, 2), (0, 2, 1), (2, 0, 1)]


@pytest.mark.parametrize("places", PLACES)
def test_a_sum_is_the_same_in_any_order(places) -> None:
    torch.manual_seed(0)
    same = [
        lambda: nn.ConvTranspose2d(4, 4, 3, 1, 1),
        lambda: nn.ConvTranspose2d(4, 4, 3, 1, 1),
        nn.Identity,
    ]
    model = randomise(Sum(*(same[place] for place in places), norm=False))
    result = rc.fuse(model, (draw((2, 4, 8, 8)),))
    assert result.report.ops.after == 2  # one transposed conv, and the sum
    shapes = [(2, 4, 8, 8), (1, 4, 7, 5), (3, 4, 1, 1)]
    assert_same(model, result.model, [(draw(shape),) for shape in shapes])


class Uneven(nn.Module):
    """Two strided windows that have one size for even inputs, and a norm."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 4, (3, 2), 2, (1, 0))
        self.two = nn.Conv2d(4, 4, (2, 3), 2, (0, 1))
        self.norm = nn.BatchNorm1d(4) if flat else nn.BatchNorm2d(4)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x) + self.two(x)
        return self.norm(y.flatten(2) if self.flat else y)


@pytest.mark.parametrize("flat", [True, False])
def test_windows_of_two_sizes_stay_a_sum(flat) -> None:
    torch.manual_seed(0)
    model = randomise(Uneven(flat))
    result = rc.fuse(model, (draw((1, 4, 8, 8)),))
    reasons = {kept.reason for kept in result.report.kept}
    assert "size_mismatch" in reasons and "not_equal" not in reasons
    # At 3 by 3 each is broadcast over what the other has more of.
    shapes = [(2, 4, 8, 8), (2, 4, 3, 3), (1, 4, 3, 8), (1, 4, 6, 10)]
    assert_same(model, result.model, [(draw(shape),) for shape in shapes])


class Nested(nn.Module):
    """A small fusion beside one that cannot be, in one sum: the small one is made."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 2, 2, 0)
        self.inner, self.outer = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(self.one(x)) + self.two(x))


def test_a_smaller_fusion_is_made_where_a_larger_cannot_be() -> None:
    torch.manual_seed(0)
    model = randomise(Nested())
    result = rc.fuse(model, (draw((1, 4, 8, 8)),))
    assert (result.report.ops.before, result.report.ops.after) == (5, 4)
    assert_same(model, result.model, [(draw((2, 4, 6, 4)),)])


class Three(nn.Module):
    """A norm behind a sum of three values, each with a conv of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = self.convs
        return self.norm(one(x) + two(x.relu()) + three(x.sigmoid()))


def test_a_norm_goes_into_three_convs_at_once() -> None:
    torch.manual_seed(0)
    model = randomise(Three())
    result = rc.fuse(model, (draw((2, 4, 8, 8)),))
    assert result.report.ops.after_by_type.get("batch_norm", 0) == 0
    assert result.report.ops.before - result.report.ops.after == 1
    assert_same(model, result.model, [(draw((1, 4, 5, 7)),)])
