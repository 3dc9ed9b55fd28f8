"""What is known of values before anything runs: each call by its own settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import repcompiler as rc
from repcompiler.compile import run_stages


class Alike(nn.Module):
    """Convs of one class and one input whose results differ in size all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.padded = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.strided = nn.Conv2d(4, 4, 3, stride=2)
        self.widened = nn.Conv2d(4, 4, 3)
        self.widened.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.widened.bias = None
        self.cropped = nn.Conv2d(4, 4, 3)
        self.cropped.forward = lambda x: x[..., :2, :2]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        convs = (self.plain, self.padded, self.strided, self.widened, self.cropped)
        return tuple(conv(x) for conv in convs)


def test_the_size_of_a_result_is_that_of_its_own_module():
    state = run_stages(Alike().eval(), torch.randn(2, 4, 8, 8), stop_after="lift")
    assert state.facts is not None
    shapes = {
        str(node.target): state.facts.shape(node)
        for node in state.graph_module.graph.nodes
        if node.op == "call_module"
    }
    assert shapes["plain"] == (2, 4, 6, 6)
    assert shapes["padded"] == (2, 4, 8, 8)
    assert shapes["strided"] == (2, 4, 3, 3)
    assert shapes["widened"] == (2, 6, 6, 6)
    assert shapes["cropped"] in ((2, 4, 2, 2), None)


class Numbers(nn.Module):
    """The same op with numbers that compare equal and mean other things."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.transpose(1, 2)
        total = x.sum(1, True), x.sum(1, False), torch.add(x.int(), 1)
        return *total, torch.add(x.int(), 1.0), y.reshape(-1), x.reshape(-1)


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_equal_numbers_of_another_type_are_told_apart(door):
    x = torch.randn(2, 3, 5)
    net = Numbers().eval()
    state = run_stages(net, x, stop_after="lift", door=door)
    assert state.facts is not None
    returned = next(n for n in state.graph_module.graph.nodes if n.op == "output")
    found = [(state.facts.shape(n), state.facts.dtype(n)) for n in returned.args[0]]
    assert found == [(tuple(y.shape), y.dtype) for y in net(x)]


def test_models_of_repeated_blocks_are_fused_alike_twice():
    """Nothing is kept from one model for the next."""
    for width in (4, 6):
        block = [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)]
        net = nn.Sequential(*block, nn.ReLU(), *block).eval()
        result = rc.fuse(net, torch.randn(1, width, 9, 9))
        assert result.report.equivalence.verdict == "equal"
