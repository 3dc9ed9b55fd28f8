"""Teach the compiler an operator of your own: one entry in the table."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import repcompiler as rc


@fx.wrap
def halve(input: Tensor) -> Tensor:
    """Somebody's custom op, which tracing keeps as one node."""
    return input * 0.5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.act: Callable[..., Any] = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(halve(self.conv(x)))


# The rule of `mul`, with its second operand fixed.
rules = {**rc.RULES, halve: rc.Rule(rc.RULES[torch.mul].meaning, given={"other": 0.5})}
x = torch.randn(1, 3, 16, 16)
known, unknown = rc.fuse(Net().eval(), x, rules=rules), rc.fuse(Net().eval(), x)
print(unknown.report.ops.after, "ops without the rule,", known.report.ops.after, "with")
assert known.report.equivalence.ok
assert known.report.ops.after == unknown.report.ops.after - 1
