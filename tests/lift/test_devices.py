"""Ops that name a device leave the shapes behind them known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import repcompiler


class Positioned(nn.Module):
    """Adds positions made on the input's device, then scales what a linear makes.

    The positions have the rank of the value and hang on its size, so that the shape of
    the sum is known only if theirs is.
    """

    def __init__(self, move) -> None:
        super().__init__()
        self.move = move
        self.linear = nn.Linear(6, 6)
        self.gamma = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        mask = self.move(x.new_zeros(x.shape[0], x.shape[1], 6), x)
        return self.gamma * self.linear(x + mask.cumsum(1))


MOVES = {
    "dtype and device": lambda mask, x: mask.to(x.device, torch.bool),
    "device by name": lambda mask, x: mask.to("cpu"),
    "device by keyword": lambda mask, x: mask.to(device="cpu", dtype=torch.bool),
    "method": lambda mask, x: mask.cpu(),
    "nothing": lambda mask, x: mask,
}


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize("move", MOVES)
def test_a_scale_is_merged_behind_what_was_moved(move: str, door: str) -> None:
    torch.manual_seed(0)
    model = Positioned(MOVES[move]).eval()
    inputs = (torch.randn(2, 5, 6),)
    report = repcompiler.fuse(model, inputs, capture=door).report
    assert report.equivalence.verdict == "equal"
    assert report.ops.before_by_type["mul"] == 1
    assert "mul" not in report.ops.after_by_type
