"""Casts in a model's own code: constants keep their dtype, and equal stays equal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equality import Net, conv, randomise
from torch import nn

import repcompiler as rc


def scaled(s, x):
    return s.conv(x) * s.gain.float()


def widely(s, x):
    return s.conv(x) * s.gain.double()


def narrowly(s, x):
    return s.conv(x) * s.gain.half()


def normed(s, x):
    weight, bias = s.layer.weight.float(), s.layer.bias.float()
    last = x.permute(0, 2, 3, 1).float()
    return F.layer_norm(last, (4,), weight, bias).type_as(x)


def convolved(s, x):
    return F.conv2d(x.float(), s.conv.weight.float(), padding=1)


def batch_normed(s, x):
    tensors = (s.norm.running_mean, s.norm.running_var, s.norm.weight, s.norm.bias)
    return F.batch_norm(x.float(), *(t.float() for t in tensors)).type_as(x)


def shifted(s, x):
    return (x.float() - 2.0) * -2.5


WAYS = (scaled, widely, narrowly, normed, convolved, batch_normed, shifted)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_output_keeps_its_dtype_and_is_equal(way, dtype, door):
    net = Net(way, conv=conv(), norm=nn.BatchNorm2d(4), layer=nn.LayerNorm(4))
    net.gain = nn.Parameter(torch.randn(1, 4, 1, 1))
    net = randomise(net).to(dtype)
    x = torch.randn(2, 4, 5, 6).to(dtype)
    result = rc.fuse(net, (x,), capture=door)
    assert result.report.equivalence.ok, result.report.equivalence
    with torch.no_grad():
        expected, found = net(x), result.model(x)
    assert found.dtype == expected.dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < 4 * eps


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_wider_layer_norm_does_not_widen_what_follows(door):
    net = randomise(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6))).bfloat16()
    net[0].float()
    x = torch.randn(3, 8).bfloat16()
    result = rc.fuse(net, (x,), capture=door)
    assert result.report.equivalence.ok
    assert result.model(x).dtype == net(x).dtype == torch.bfloat16
