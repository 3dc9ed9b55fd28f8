"""Fusing a fused model finds nothing to do: explicit pads, sizes that are unknown."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equality import Net, check, conv, draw, images
from torch import nn

import repcompiler as rc


def _same_even() -> nn.Module:
    one = nn.Conv2d(4, 4, 4, padding="same")
    two = nn.Conv2d(4, 4, (2, 3), padding="same", dilation=2)
    norm = nn.BatchNorm2d(4)
    return Net(lambda s, x: s.norm(s.one(x)) + s.two(x), one=one, two=two, norm=norm)


def _padded() -> nn.Module:
    one, two = nn.Conv2d(4, 4, 4), nn.Conv2d(4, 4, 2)
    return Net(
        lambda s, x: s.one(F.pad(x, (2, 1, 0, 3))) + s.two(F.pad(x, (1, 0, -1, 2))),
        one=one,
        two=two,
    )


def _circular() -> nn.Module:
    one = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    return Net(lambda s, x: s.norm(s.one(x)), one=one, norm=nn.BatchNorm2d(4))


@pytest.mark.parametrize("make", [_same_even, _padded, _circular])
def test_a_conv_with_a_pad_of_its_own_is_not_made_again(make):
    result = check(make(), images(4))
    assert len(result.report.regions) == 1
    again = rc.fuse(result.model, (draw((1, 4, 8, 8)),))
    assert again.report.regions == ()


def _conv_beside_a_pad() -> nn.Module:
    return Net(lambda s, x: s.conv(F.pad(x, (2, 0))), conv=nn.Conv1d(4, 4, 3))


def test_a_lone_conv_behind_its_pad_stays():
    result = check(_conv_beside_a_pad(), [(1, 4, 9), (2, 4, 2), (3, 4, 1)])
    assert result.report.regions == ()


def test_a_scale_and_shift_without_any_sizes():
    """Of a product the constant's shape, of rank 4 too, was taken for the value's."""
    scale, shift = (nn.Parameter(torch.randn(*s)) for s in ((1, 4, 1, 1), (4, 1, 1)))
    net = Net(lambda s, x: s.conv(x) * s.a + s.b, conv=conv(), a=scale, b=shift)
    check(net, images(4))
    found = rc.fuse(net)
    assert [region.removed[-2:] for region in found.report.regions] == [("mul", "add")]
    assert rc.fuse(found.model).report.regions == ()
