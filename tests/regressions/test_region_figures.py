"""What a region says of itself adds up to what the report says of the whole."""

from __future__ import annotations

import pytest
import torch
from equality import Net, conv, draw, randomise
from torch import nn

import repcompiler as rc


def chomped(s, x):
    return s.norm(s.conv(x)[:, :, :-2].contiguous()).relu()


def scaled(s, x):
    return torch.relu(s.scale * torch.relu(x) + s.shift)


def up(s, x):
    return s.norm(s.conv(x.relu())).relu()


def pooled(s, x):
    return s.conv(s.norm(nn.functional.avg_pool2d(x, 2))).relu()


def averaged(s, x):
    return s.head(s.conv(x.relu()).mean((2, 3))).relu()


def joined(s, x):
    return s.norm(torch.cat([s.one(x), s.two(x)], 1)).relu()


def vector(*shape):
    return nn.Parameter(torch.rand(shape) + 0.5)


CASES = {
    "chomp": (
        chomped,
        {"conv": nn.Conv1d(4, 4, 3, padding=2), "norm": nn.BatchNorm1d(4)},
        (2, 4, 20),
    ),
    "scale": (scaled, {"scale": vector(4, 1, 1), "shift": vector(4, 1, 1)}, None),
    "transposed": (
        up,
        {"conv": nn.ConvTranspose2d(4, 6, 3, 2, groups=2), "norm": nn.BatchNorm2d(6)},
        None,
    ),
    "plain": (up, {"conv": conv(4, 8), "norm": nn.BatchNorm2d(8)}, None),
    "mean": (averaged, {"conv": conv(4, 6, 1), "head": nn.Linear(6, 3)}, None),
    "concat": (
        joined,
        {"one": conv(4, 6), "two": conv(4, 2), "norm": nn.BatchNorm2d(8)},
        None,
    ),
    "pool": (pooled, {"conv": conv(4, 8, 1), "norm": nn.BatchNorm2d(4)}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_regions_add_up_to_the_whole(case):
    forward, parts, shape = CASES[case]
    model = randomise(Net(forward, **parts))
    report = rc.fuse(model, (draw(shape or (2, 4, 8, 8)),)).report
    assert report.regions
    for side in ("before", "after"):
        regions = sum(getattr(region.macs, side) for region in report.regions)
        assert regions == getattr(report.macs, side)
    saved = sum(region.ops.before - region.ops.after for region in report.regions)
    assert saved == report.ops.before - report.ops.after > 0
