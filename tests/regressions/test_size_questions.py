"""A size question costs no op, and keeps no norm from its neighbour."""

from __future__ import annotations

import pytest
import torch
from equality import randomise
from torch import Tensor, nn

import repcompiler as rc


class Tokens(nn.Module):
    """A norm over flattened tokens, whose sizes are asked again and again (LeViT)."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.linear(x)
        y = self.norm(tokens.flatten(0, 1)).reshape_as(tokens)
        z = y.relu().reshape(y.size(0), y.size(1), 2, -1)
        w = y.sigmoid().reshape(y.size(0), y.size(1), 2, -1)
        return (z + w, tokens) if self.kept else z + w


def fused(kept: bool, door: str) -> rc.FuseResult:
    torch.manual_seed(0)
    model = randomise(Tokens(kept))
    return rc.fuse(model, (torch.randn(2, 5, 6).double(),), capture=door)


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_a_norm_joins_its_linear_where_its_own_sizes_are_asked(door: str) -> None:
    report = fused(False, door).report
    assert report.equivalence.verdict == "equal"
    assert report.ops.before_by_type["batch_norm"] == 1
    assert report.ops.after_by_type.get("batch_norm", 0) == 0
    assert report.ops.after == report.ops.before - 1


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_many_questions_ask_one_view(door: str) -> None:
    result = fused(True, door)
    assert result.report.equivalence.verdict == "equal"
    views = [n for n in result.model.graph.nodes if "reshape" in n.name]
    assert len(views) <= 4  # of y, its twin, and the two that the model makes of it
