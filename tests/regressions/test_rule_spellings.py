"""One operator, however it is spelled, means the same: one conv comes out."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from equality import Net, check, conv, images, ops
from torch import nn

aten = torch.ops.aten

# Each is a function of y, the conv's value, and of p and q, numbers per channel.
ARITHMETIC = {
    "y * p": lambda y, p, q: y * p,
    "p * y": lambda y, p, q: p * y,
    "torch.mul": lambda y, p, q: torch.mul(y, p),
    "torch.mul, named": lambda y, p, q: torch.mul(input=y, other=p),
    "torch.mul, swapped": lambda y, p, q: torch.mul(p, y),
    "torch.multiply": lambda y, p, q: torch.multiply(y, p),
    "y.mul": lambda y, p, q: y.mul(other=p),
    "y.multiply": lambda y, p, q: y.multiply(p),
    "p.mul": lambda y, p, q: p.mul(y),
    "y.mul_": lambda y, p, q: y.mul_(p),
    "imul": lambda y, p, q: operator.imul(y, p),
    "aten.mul": lambda y, p, q: aten.mul.Tensor(y, p),
    "aten.mul_": lambda y, p, q: aten.mul_.Tensor(y, p),
    "aten.mul, packet": lambda y, p, q: aten.mul(y, p),
    "one number": lambda y, p, q: 2.5 * y,
    "aten.mul.Scalar": lambda y, p, q: aten.mul.Scalar(y, 2),
    "y + p": lambda y, p, q: y + p,
    "p + y": lambda y, p, q: p + y,
    "torch.add, alpha": lambda y, p, q: torch.add(y, p, alpha=2),
    "torch.add, swapped, alpha": lambda y, p, q: torch.add(p, y, alpha=-0.5),
    "torch.add, named": lambda y, p, q: torch.add(input=y, other=p, alpha=3),
    "y.add": lambda y, p, q: y.add(p, alpha=2),
    "y.add_": lambda y, p, q: y.add_(p, alpha=2),
    "aten.add": lambda y, p, q: aten.add.Tensor(y, p, alpha=2),
    "aten.add.Scalar, third": lambda y, p, q: aten.add.Scalar(y, 1, 2),
    "y - p": lambda y, p, q: y - p,
    "p - y": lambda y, p, q: p - y,
    "torch.sub, alpha": lambda y, p, q: torch.sub(y, p, alpha=2),
    "torch.subtract": lambda y, p, q: torch.subtract(y, p),
    "y.subtract": lambda y, p, q: y.subtract(p),
    "torch.rsub": lambda y, p, q: torch.rsub(y, p, alpha=2),
    "aten.sub.Scalar, third": lambda y, p, q: aten.sub.Scalar(y, 1, 2),
    "aten.rsub.Scalar, third": lambda y, p, q: aten.rsub.Scalar(y, 1, 2),
    "1 - y": lambda y, p, q: 1 - y,
    "y / p": lambda y, p, q: y / p,
    "torch.div, named": lambda y, p, q: torch.div(input=y, other=p),
    "y.div": lambda y, p, q: y.div(p),
    "y.true_divide": lambda y, p, q: y.true_divide(p),
    "torch.divide": lambda y, p, q: torch.divide(y, p),
    "y.div_": lambda y, p, q: y.div_(p),
    "y / 3": lambda y, p, q: y / 3,
    "-y": lambda y, p, q: -y,
    "torch.neg": lambda y, p, q: torch.neg(y),
    "y.negative": lambda y, p, q: y.negative(),
    "+y": lambda y, p, q: +y,
    "addcmul": lambda y, p, q: torch.addcmul(q, y, p, value=2),
    "addcmul, swapped": lambda y, p, q: torch.addcmul(q, p, y),
    "view(1, -1, 1, 1)": lambda y, p, q: y * p.view(1, -1, 1, 1),
    "index with None": lambda y, p, q: y * p.flatten()[None, :, None, None],
    "expand": lambda y, p, q: y * p.expand(1, 4, 1, 1),
}


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name, door):
    net = Net(
        lambda s, x: ARITHMETIC[name](s.conv(x), s.p, s.q),
        conv=conv(),
        p=nn.Parameter(torch.rand(4, 1, 1) + 1),
        q=nn.Parameter(torch.randn(4, 1, 1)),
    )
    sizes = images(4, (6, 6), (5, 7), (1, 2))
    found = ops(check(net, sizes, door=door, blind=door != "export").model)
    assert sum(found.values()) == 1, found


def _norm(n: nn.BatchNorm2d) -> tuple[torch.Tensor, ...]:
    return n.running_mean, n.running_var, n.weight, n.bias


def _aten_norm(n: nn.BatchNorm2d) -> tuple[torch.Tensor, ...]:
    return n.weight, n.bias, n.running_mean, n.running_var


LAYERS = {
    "modules": lambda s, x: s.norm(s.conv(x)),
    "modules, named": lambda s, x: s.norm(input=s.conv(input=x)),
    "F.conv2d": lambda s, x: s.norm(F.conv2d(x, s.conv.weight, s.conv.bias, 1, 1)),
    "F.conv2d, named": lambda s, x: s.norm(
        F.conv2d(padding=(1, 1), input=x, weight=s.conv.weight, groups=1)
    ),
    "F.conv2d, same": lambda s, x: s.norm(
        F.conv2d(x, s.conv.weight, s.conv.bias, padding="same")
    ),
    "torch.conv2d": lambda s, x: s.norm(torch.conv2d(x, s.conv.weight, padding=1)),
    "aten.conv2d": lambda s, x: s.norm(
        aten.conv2d.default(x, s.conv.weight, None, [1], [1])
    ),
    "aten.convolution": lambda s, x: s.norm(
        aten.convolution.default(
            x, s.conv.weight, s.conv.bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        )
    ),
    "F.batch_norm": lambda s, x: F.batch_norm(s.conv(x), *_norm(s.norm), False, 0.1),
    "F.batch_norm, named": lambda s, x: F.batch_norm(
        bias=s.norm.bias,
        running_mean=s.norm.running_mean,
        running_var=s.norm.running_var,
        weight=s.norm.weight,
        input=s.conv(x),
        eps=1e-3,
    ),
    "F.batch_norm, training=self.training": lambda s, x: F.batch_norm(
        s.conv(x), *_norm(s.norm), s.training
    ),
    "torch.batch_norm": lambda s, x: torch.batch_norm(
        s.conv(x), *_aten_norm(s.norm), False, 0.1, 1e-3, False
    ),
    "aten.batch_norm": lambda s, x: aten.batch_norm.default(
        s.conv(x), *_aten_norm(s.norm), False, 0.1, 1e-3, False
    ),
    "core ATen's norm": lambda s, x: aten._native_batch_norm_legit_no_training.default(
        s.conv(x), *_aten_norm(s.norm), 0.1, 1e-3
    )[0],
    "by hand": lambda s, x: (
        (s.conv(x) - s.norm.running_mean.view(1, -1, 1, 1))
        / torch.sqrt(s.norm.running_var.view(1, -1, 1, 1) + 1e-5)
        * s.norm.weight.view(1, -1, 1, 1)
        + s.norm.bias.view(1, -1, 1, 1)
    ),
}


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", LAYERS)
def test_conv_and_norm(name, door):
    net = Net(LAYERS[name], conv=conv(), norm=nn.BatchNorm2d(4))
    sizes = images(4, (6, 6), (5, 7), (1, 2))
    found = ops(check(net, sizes, door=door, blind=door != "export").model)
    assert sum(found.values()) == 1, found


PRODUCTS = {
    "F.linear": lambda s, x: F.linear(x, s.linear.weight, s.linear.bias),
    "x @ W.T": lambda s, x: x @ s.linear.weight.T + s.linear.bias,
    "matmul": lambda s, x: torch.matmul(x, s.linear.weight.t()),
    "x.matmul": lambda s, x: x.matmul(s.linear.weight.t()),
    "mm": lambda s, x: torch.mm(x, s.linear.weight.t()),
    "addmm": lambda s, x: torch.addmm(s.linear.bias, x, s.linear.weight.t()),
}


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_linear_and_norm(name, door):
    net = Net(
        lambda s, x: s.norm(PRODUCTS[name](s, x)),
        linear=nn.Linear(5, 4),
        norm=nn.BatchNorm1d(4),
    )
    shapes = [(2, 5), (3, 5), (1, 5)]
    found = ops(check(net, shapes, door=door, blind=door != "export").model)
    assert sum(found.values()) == 1, found


def test_argument_that_no_rule_names_is_never_dropped():
    net = Net(
        lambda s, x: s.norm(s.up(x, output_size=(12, 12))),
        up=nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1),
        norm=nn.BatchNorm2d(4),
    )
    check(net, [(1, 4, 6, 6), (3, 4, 6, 6)], blind=False)
    net = Net(
        lambda s, x: s.norm(s.up(x, [12, 12])),
        up=nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1),
        norm=nn.BatchNorm2d(4),
    )
    check(net, [(1, 4, 6, 6), (3, 4, 6, 6)], blind=False)
