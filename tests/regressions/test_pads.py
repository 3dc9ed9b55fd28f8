"""Pads of some axes only: read as conv1d on images, or with the batch as channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repcompiler
from repcompiler.affine import Axis
from repcompiler.lower import pads_of

TWICE = {
    "last axis": ((1, 1), (2, 2)),
    "one side of two axes": ((0, 0, 1, 0), (0, 3)),
    "channels": ((0, 0, 0, 0, 1, 1), (0, 0, 0, 0, 2, 2)),
}


class PadTwice(nn.Module):
    """Two pads with a non-linear op behind."""

    def __init__(self, widths):
        super().__init__()
        self.widths = widths

    def forward(self, x):
        """Pad, pad."""
        return torch.sigmoid(F.pad(F.pad(x, self.widths[0]), self.widths[1]))


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("name", TWICE)
def test_pads_of_some_axes_stay_what_they_were(name, checked):
    model = PadTwice(TWICE[name]).eval()
    fused = repcompiler.fuse(model, (torch.randn(2, 4, 5, 5),), verify=checked)
    for batch in (1, 2, 3):
        x = torch.randn(batch, 4, 6, 3)
        assert torch.equal(fused.model(x), model(x))


class PadTwiceThenConv(PadTwice):
    """The same in front of a conv, whose weights prove the number of channels."""

    def __init__(self, widths):
        super().__init__(widths)
        self.conv = nn.Conv2d(4, 4, 3, groups=4)

    def forward(self, x):
        """Pad, pad, conv."""
        return self.conv(F.pad(F.pad(x, self.widths[0]), self.widths[1]))


def test_pads_wider_than_any_window_are_probed_and_so_can_merge():
    model = PadTwiceThenConv(((1, 1, 2, 2), (1, 1, 0, 0))).eval()
    report = repcompiler.fuse(model, (torch.randn(2, 4, 5, 5),)).report
    assert [region.exactness for region in report.regions] == [0.0]
    assert report.kept == ()


def test_pads_alone_are_no_conv_of_some_number_of_channels():
    model = PadTwice(((1, 1, 2, 2), (2, 2, 0, 3))).eval()
    report = repcompiler.fuse(model, (torch.randn(2, 4, 5, 5),)).report
    assert report.regions == ()


@pytest.mark.parametrize(("low", "high"), [(2, -2), (-1, 2), (1, 1), (-1, 0), (0, 0)])
def test_what_is_cut_at_one_end_is_cut_after_what_is_added_at_the_other(low, high):
    """`F.pad` cuts first: of one column it cannot take two, even if it adds two."""
    x = torch.ones(1, 1, 1)
    for widths in pads_of([Axis(first=-low, pad_high=high)]):
        x = F.pad(x, widths)
    assert x.shape[-1] == 1 + low + high
