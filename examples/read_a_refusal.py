"""Two ops that must stay two: the report says which, and why."""

import torch
from torch import nn

import repcompiler as rc

# The 3x3 pads with zeros, where the 1x1 with its bias would have given the bias: one op
# for both would be off along the border, and right everywhere else.
model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, bias=False))
report = rc.fuse(model.eval(), torch.randn(1, 8, 16, 16)).report
for kept in report.kept:
    print(f"{kept.name}: {kept.op} stays: {kept.detail} ({kept.reason})")
assert [kept.reason for kept in report.kept] == ["padded_border"]
