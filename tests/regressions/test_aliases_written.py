"""A write reaches every name of the memory, that of an argument returned as it came.

Ops that return their very argument in eval mode were taken for copies.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from equality import Net, conv, draw, randomise
from torch import nn
from torchvision.ops import StochasticDepth

import repcompiler as rc

SAME = {
    "plus": lambda y: +y,
    "positive": torch.positive,
    "dropout2d": lambda y: F.dropout2d(y, 0.5, False),
    "dropout3d": lambda y: F.dropout3d(y, 0.5, False),
    "feature_alpha_dropout": lambda y: F.feature_alpha_dropout(y, 0.5, False),
    "stochastic_depth": StochasticDepth(0.5, "row").eval(),
    "nn.Dropout2d": nn.Dropout2d(0.5).eval(),
    "nn.AlphaDropout": nn.AlphaDropout(0.5).eval(),
    "ravel": lambda y: y.contiguous().ravel(),
    "moveaxis": lambda y: torch.moveaxis(y, 1, 2),
    "diagonal": lambda y: torch.diagonal(y, 0, 2, 3),
}


def both(net: nn.Module, door: str) -> None:
    """The outputs are the original's, fused or not."""
    expected = copy.deepcopy(net)(draw((2, 4, 6, 6)))
    fused = rc.fuse(net, (draw((2, 4, 6, 6)),), capture=door, verify=False).model
    found = fused(draw((2, 4, 6, 6)))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@torch.no_grad()
def test_write_after_an_op_that_returns_its_argument(name: str, door: str) -> None:
    def forward(s, x):
        y = s.conv(x)
        alias = s.same(y) if isinstance(SAME[name], nn.Module) else SAME[name](y)
        y += 1.5
        return alias * 2

    parts = {"same": SAME[name]} if isinstance(SAME[name], nn.Module) else {}
    both(randomise(Net(forward, conv=conv(), **parts)), door)
