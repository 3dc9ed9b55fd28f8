"""A block that no fuser has heard of: three branches, a skip, a scale, all one conv."""

import torch
from torch import Tensor, nn

import repcompiler as rc


class Block(nn.Module):
    """y = x + gamma * (BN(dilated 3x3) + BN(1x5 then 5x1) - BN(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dilated = nn.Conv2d(channels, channels, 3, padding=2, dilation=2)
        self.wide = nn.Conv2d(channels, channels, (1, 5), padding=(0, 2), bias=False)
        self.tall = nn.Conv2d(channels, channels, (5, 1), padding=(2, 0))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
        self.gamma = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.norms
        branches = first(self.dilated(x)) + second(self.tall(self.wide(x))) - third(x)
        return x + self.gamma * branches


result = rc.fuse(Block(16).eval(), torch.randn(1, 16, 32, 32))
print(result.model.graph)
print([(region.kind, region.exactness) for region in result.report.regions])
assert result.report.ops.after == 1
