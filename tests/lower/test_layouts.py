"""A model laid out as channels last stays so."""

from __future__ import annotations

import pytest
import torch
from equality import Branches, assert_same, conv, draw, randomise

import repcompiler as rc

LAST = torch.channels_last


@pytest.mark.parametrize("last", [True, False])
def test_fused_kernels_are_laid_out_as_the_models(last):
    net = randomise(Branches(conv(kernel=3), conv(kernel=1)))
    layout = LAST if last else torch.contiguous_format
    net = net.to(memory_format=layout)
    x = draw((2, 4, 7, 6))
    fused = rc.fuse(net, (x,)).model
    assert_same(net, fused, [(x,)])
    (kernel,) = [p for p in fused.parameters() if p.dim() == 4]
    assert kernel.is_contiguous(memory_format=layout)
    assert kernel.is_contiguous() is not last
    x = x.contiguous(memory_format=layout)
    assert fused(x).stride() == net(x).stride()
