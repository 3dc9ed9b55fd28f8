"""What a model returns keeps its dtype, complex numbers too."""

from __future__ import annotations

import pytest
import torch
from equality import Net, conv, draw, randomise
from torch import nn

import repcompiler as rc


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_folded_complex_constant_keeps_its_precision(dtype):
    """Folded in float64, it was left in complex128, and made the result float64."""

    def run(s, x):
        wide = torch.fft.fft2(s.norm(s.conv(x)).to(s.turn.dtype))
        return (wide * torch.complex(s.turn, -s.turn)).real

    turn = nn.Parameter(torch.randn(4, 1, 1))
    net = randomise(Net(run, conv=conv(), norm=nn.BatchNorm2d(4), turn=turn)).to(dtype)
    if dtype is torch.bfloat16:  # torch has no complex numbers of that
        net.turn.data = net.turn.data.float()
    image = draw((2, 4, 6, 5)).to(dtype)
    result = rc.fuse(net, (image,))
    assert result.report.equivalence.ok
    assert result.model(image).dtype == net(image).dtype == net.turn.dtype
