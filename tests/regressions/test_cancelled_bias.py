"""A bias that cancels is no bias: pad(norm(x) - v) + v has zeros where it pads.

A constant before a zero-padded window closed the way even where it was taken off again.
"""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from equality import Net, check, conv, images, norms, ops, reasons
from torch import Tensor, nn


def outside(norm: nn.BatchNorm2d, spelling: str) -> Tensor:
    """What the norm makes of zero, in spellings that round differently."""
    root = (norm.running_var + norm.eps).sqrt()
    if spelling == "divided":
        value = norm.bias - norm.running_mean * norm.weight / root
    else:
        value = norm.bias - norm.weight * (norm.running_mean / root)
    return value.reshape(-1, 1, 1)


def padded(s: nn.Module, x: Tensor, off: Tensor, on: Tensor) -> Tensor:
    """conv(pad(norm(first(x)) - off) + on)."""
    return s.second(F.pad(s.norm(s.first(x)) - off, [1, 1, 1, 1]) + on)


def net(body) -> Net:
    """A 1x1 conv, a norm, and a 3x3 conv without padding of its own."""
    first = nn.Conv2d(4, 4, 1, bias=False)
    return Net(body, first=first, norm=nn.BatchNorm2d(4), second=nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize("spelling", ["divided", "grouped"])
@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_border_of_what_the_norm_makes_of_zero(spelling: str, door: str) -> None:
    def body(s: nn.Module, x: Tensor) -> Tensor:
        value = outside(s.norm, spelling)
        return padded(s, x, value, value)

    result = check(net(body), images(4, (8, 8), (7, 9)), blind=False, door=door)
    assert ops(result.model) == {"Conv2d": 1}


def test_a_bias_that_nearly_cancels_is_one() -> None:
    def body(s: nn.Module, x: Tensor) -> Tensor:
        value = outside(s.norm, "divided")
        return padded(s, x, value * (1 + 1e-9), value)

    result = check(net(body), images(4), blind=False)
    assert "padded_border" in reasons(result)


def test_a_plain_norm_before_a_padded_conv_is_kept_apart() -> None:
    parts = {"norm": nn.BatchNorm2d(4), "conv": conv()}
    result = check(Net(lambda s, x: s.conv(s.norm(x)), **parts), images(4))
    assert norms(result.model) == 1
