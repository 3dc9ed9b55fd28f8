"""An average whose weights sum to one is a layout op too, done once for all readers.

Next-ViT's attention reads a norm directly (q) and through a pool and a second norm (k,
v); timm's own method merges all of it, and ours left the first norm standing.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equality import Net, check, conv, draw, images, norms, ops, reasons
from torch import nn

import repcompiler as rc

SIZES = images(4, (8, 8), (7, 9), (5, 6))
AVERAGES = {
    "plain": nn.AvgPool2d(2),
    "overlapping": nn.AvgPool2d(3, 1),
    "border left out": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "ceiling": nn.AvgPool2d(3, 2, ceil_mode=True),
    "ceiling, border left out": nn.AvgPool2d(3, 2, 1, True, False),
}
BORDERED = {
    "border counted": nn.AvgPool2d(3, 1, 1),
    "ceiling, border counted": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "divisor": nn.AvgPool2d(2, divisor_override=3),
}


def tokens(y: torch.Tensor) -> torch.Tensor:
    return y.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", AVERAGES)
def test_a_norm_goes_through_a_pool_into_what_follows(name: str) -> None:
    """Two norms and the pool between them: at most the pool and one conv are left."""

    def forward(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return s.after(s.second(s.pool(s.first(x.relu()))))

    norms_of = {"first": nn.BatchNorm2d(4), "second": nn.BatchNorm2d(4)}
    net = Net(forward, pool=AVERAGES[name], after=nn.Conv2d(4, 4, 1), **norms_of)
    fused = check(net, SIZES).model
    assert norms(fused) == 0 and ops(fused).total() <= 3


@pytest.mark.parametrize("name", BORDERED)
def test_a_norm_stays_before_a_pool_whose_weights_sum_to_another_number(name) -> None:
    """Its shift would arrive smaller at the border: merged or kept, it is right."""

    def forward(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return s.after(s.pool(s.norm(x.relu())).tanh())

    net = Net(forward, pool=BORDERED[name], after=conv(), norm=nn.BatchNorm2d(4))
    check(net, SIZES)


class Attention(nn.Module):
    """q from all positions, k and v from fewer, as in Next-ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pool = nn.BatchNorm2d(4), nn.AvgPool1d(2, 2)
        self.inner = nn.BatchNorm1d(4)
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = tokens(self.norm(x))
        n, length, c = t.shape
        few = self.inner(self.pool(t.transpose(1, 2))).transpose(1, 2)
        q, k, v = self.q(t), self.k(few), self.v(few)
        y = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return x + y.reshape(n, length, c).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_what_is_done_to_a_source_first_is_done_once(door: str) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), Attention())
    fused = check(net, images(4, (8, 8), (6, 10)), door=door).model
    left = ops(fused)
    assert norms(fused) == 0
    assert sum(n for op, n in left.items() if "pool" in op.lower()) == 1, left


def test_a_size_is_asked_of_the_same_view_of_what_stays() -> None:
    """`t.shape` behind a norm and a flatten kept the norm alive."""

    def forward(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = x.relu()
        t = tokens(s.norm(y))
        n, length, c = t.shape
        both = s.one(t).tanh() * s.two(t).sigmoid()
        return both.reshape(n, length, c).mean(1) + y.sum((2, 3))

    layers = {"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)}
    net = Net(forward, norm=nn.BatchNorm2d(4), **layers)
    assert norms(check(net, SIZES).model) == 0
    assert draw(SIZES[0]).shape == SIZES[0]


def test_a_region_that_nothing_could_be_run_through_is_of_unknown_shape() -> None:
    """Without inputs no size of what is pooled is known; it was called not equal."""

    def forward(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
        pooled = F.adaptive_avg_pool1d(s.norm(s.first(x).relu()), 2)
        return s.end(s.last(pooled))

    layers = {"first": nn.Conv1d(6, 6, 3, padding=1), "last": nn.Conv1d(6, 6, 1)}
    net = Net(forward, norm=nn.BatchNorm1d(6), end=nn.BatchNorm1d(6), **layers)
    assert norms(check(net, [(2, 6, 7), (1, 6, 4)]).model) == 0
    assert reasons(rc.fuse(net)) == {"unknown_shape"}
