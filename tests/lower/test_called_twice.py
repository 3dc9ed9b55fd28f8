"""A layer that a model calls twice stays one layer, if it fuses alike both times."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise
from torch import Tensor, nn

import repcompiler


def trunk() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
    )


class Siamese(nn.Module):
    """One trunk on two images."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.relu(self.trunk(left)) * torch.sigmoid(self.trunk(right))


class OneNormEach(nn.Module):
    """One conv, a norm of its own for each image (EfficientDet's heads)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8, affine=False) for _ in range(2))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.norms[0](self.conv(left)), self.norms[1](self.conv(right))


class Copies(nn.Module):
    """Two layers with equal numbers, which training would part."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = trunk(), trunk()
        self.right.load_state_dict(self.left.state_dict())

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.relu(self.left(left)) * torch.sigmoid(self.right(right))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize(
    ("kind", "convs", "numbers"),
    [
        (Siamese, 2, 3 * 8 * 9 + 8 + 8 * 8 * 9 + 8),
        (OneNormEach, 2, 2 * (3 * 8 * 9 + 8)),
        (Copies, 4, 2 * (3 * 8 * 9 + 8 + 8 * 8 * 9 + 8)),
    ],
)
def test_layers(kind: type[nn.Module], convs: int, numbers: int, door: str) -> None:
    torch.manual_seed(0)
    images = (torch.randn(2, 3, 9, 7), torch.randn(2, 3, 9, 7))
    model = randomise(kind())
    if isinstance(model, Copies):
        model.right.load_state_dict(model.left.state_dict())
    result = repcompiler.fuse(model, images, capture=door)
    assert result.report.equivalence.verdict == "equal"
    found = [m for m in result.model.modules() if isinstance(m, nn.Conv2d)]
    assert len(found) == convs
    assert parameters(result.model) == numbers
    assert result.report.params.after == numbers


def test_a_shared_layer_trains_as_one() -> None:
    """Its gradient is the sum of what both calls send back."""
    torch.manual_seed(0)
    images = (torch.randn(2, 3, 9, 7), torch.randn(2, 3, 9, 7))
    fused = repcompiler.fuse(randomise(Siamese()), images).model
    fused(*images).sum().backward()
    weight = fused.get_parameter("trunk.0.weight")
    assert weight.requires_grad and weight.grad is not None
    step = torch.zeros_like(weight)
    step[0, 0, 0, 0] = 1e-3
    with torch.no_grad():
        weight += step
        above = fused(*images).double().sum()
        weight -= 2 * step
        below = fused(*images).double().sum()
    slope = float(above - below) / 2e-3
    assert float(weight.grad[0, 0, 0, 0]) == pytest.approx(slope, rel=0.05)
