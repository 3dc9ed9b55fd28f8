"""What cancels: a bias that is none, as in pad(norm(x) - v) + v, and taps of kernels.

A constant before a zero-padded window closed the way even where it was taken off again.
"""

from __future__ import annotations

import pytest
import torch
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


DIFFERENCES = {
    "add, alpha": lambda a, b: torch.add(a, b, alpha=-0.5),
    "add, named": lambda a, b: torch.add(input=a, other=b, alpha=-0.5),
    "sub, alpha": lambda a, b: torch.sub(a, b, alpha=0.5),
    "a - b / 2": lambda a, b: a - b / 2,
    "a + -b / 2": lambda a, b: a + -b / 2,
}


@pytest.mark.parametrize("spelling", DIFFERENCES)
@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_taps_that_cancel_wholly(spelling: str, door: str) -> None:
    """Where one tap alone meets the image nothing is left but what was rounded."""

    def body(s: nn.Module, x: Tensor) -> Tensor:
        near = F.conv1d(x, s.far.weight * 2, None, 1, [1], 1, 2)
        return DIFFERENCES[spelling](s.far(x), near)

    far = nn.Conv1d(6, 4, 3, padding="same", dilation=2, groups=2, bias=False)
    result = check(Net(body, far=far), [(1, 6, 7), (2, 6, 5), (2, 6, 2)], door=door)
    assert ops(result.model) == {"Conv1d": 1}
