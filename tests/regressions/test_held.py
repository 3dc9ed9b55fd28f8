"""Fusing leaves a model as it was, whatever its forward writes to."""

from __future__ import annotations

import copy

import pytest
import torch
from equality import conv, draw, randomise
from torch import nn

import repcompiler as rc


class Writes(nn.Module):
    """Writes to a parameter, and to a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)
        self.gain = nn.Parameter(torch.rand(1, 4, 1, 1) + 0.5)
        self.table = nn.Parameter(torch.rand(3, 4))

    def forward(self, x):
        self.gain.mul_(0.5)
        self.table[1].add_(1.0)
        return self.norm(self.conv(x)) * self.gain


@pytest.mark.parametrize("door", ["auto", "symbolic_trace", "export"])
def test_parameters_that_forward_writes_to_are_put_back(door):
    net = randomise(Writes())
    before = copy.deepcopy(net.state_dict())
    x = draw((2, 4, 6, 6))
    with torch.no_grad():
        fused = rc.fuse(net, (x,), capture=door).model
        for name, value in net.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        torch.testing.assert_close(fused(x), net(x), rtol=1e-9, atol=1e-9)


def test_a_compiled_candidate_runs_compiled():
    runs: list[int] = []

    def backend(graph, _inputs):
        def run(*args):
            runs.append(1)
            return graph.forward(*args)

        return run

    net = randomise(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    compiled = torch.compile(net, backend=backend)
    assert rc.verify(net, compiled, (draw((2, 4, 6, 6)),)).ok
    assert runs
