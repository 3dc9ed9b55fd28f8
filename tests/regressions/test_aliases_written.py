"""A write reaches every name of the memory, that of an argument returned as it came.

Ops that return their very argument in eval mode were taken for copies.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from equality import Net, conv, draw, randomise
from torch import nn
from torchvision.ops import StochasticDepth

import repcompiler as rc

SAME = {
    "plus": lambda y: +y,
    "positive": torch.positive,
    "dropout2d": lambda y: F.dropout2d(y, 0.5, False),
    "dropout3d": lambda y: F.dropout3d(y, 0.5, False),
    "feature_alpha_dropout": lambda y: F.feature_alpha_dropout(y, 0.5, False),
    "stochastic_depth": StochasticDepth(0.5, "row").eval(),
    "nn.Dropout2d": nn.Dropout2d(0.5).eval(),
    "nn.AlphaDropout": nn.AlphaDropout(0.5).eval(),
    "ravel": lambda y: y.contiguous().ravel(),
    "moveaxis": lambda y: torch.moveaxis(y, 1, 2),
    "diagonal": lambda y: torch.diagonal(y, 0, 2, 3),
    "reshape_as": lambda y: y.reshape_as(y.new_zeros(y.shape[0], 4, 36)),
    "sum_to_size": lambda y: y.sum_to_size(y.shape),
    "to_dense": lambda y: y.to_dense(),
    "broadcast_tensors": lambda y: torch.broadcast_tensors(y, y[:1])[0],
    "T": lambda y: y[0, 0].T,
    "mT": lambda y: y.mT,
    "mH": lambda y: y.mH,
    "H": lambda y: y[0, 0].H,
    "imag": lambda y: torch.complex(y, y).imag,
    "atleast_3d": torch.atleast_3d,
}


def both(net: nn.Module, door: str) -> None:
    """The outputs are the original's, fused or not."""
    expected = copy.deepcopy(net)(draw((2, 4, 6, 6)))
    fused = rc.fuse(net, (draw((2, 4, 6, 6)),), capture=door, verify=False).model
    found = fused(draw((2, 4, 6, 6)))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@torch.no_grad()
def test_write_after_an_op_that_returns_its_argument(name: str, door: str) -> None:
    def forward(s, x):
        y = s.conv(x)
        alias = s.same(y) if isinstance(SAME[name], nn.Module) else SAME[name](y)
        y += 1.5
        return alias * 2

    parts = {"same": SAME[name]} if isinstance(SAME[name], nn.Module) else {}
    both(randomise(Net(forward, conv=conv(), **parts)), door)


@pytest.mark.parametrize("hooked", ["pre", "post", "container"])
@torch.no_grad()
def test_write_after_a_module_with_hooks(hooked: str) -> None:
    def forward(s, x):
        y = s.conv(x)
        alias = s.same(y)
        y += 1.5
        return s.norm(alias * 2)

    same = nn.Sequential(nn.Identity()) if hooked == "container" else nn.ReLU()
    if hooked == "pre":
        same = nn.Identity()
        same.register_forward_pre_hook(lambda module, inputs: None)
    elif hooked == "post":
        same.register_forward_hook(lambda module, inputs, output: inputs[0])
    else:
        same.register_forward_hook(lambda *_: None)
    net = Net(forward, conv=conv(), norm=nn.BatchNorm2d(4), same=same)
    both(randomise(net), "symbolic_trace")


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@torch.no_grad()
def test_write_into_a_list(door: str) -> None:
    def forward(s, x):
        y, z = s.conv(x), x * 2
        torch._foreach_add_([y, z], 1.5)
        torch._foreach_mul_([z], 0.5)
        return s.norm(y) + z

    both(randomise(Net(forward, conv=conv(), norm=nn.BatchNorm2d(4))), door)


def test_a_cast_that_changes_nothing_is_the_value_itself():
    """`x.long()` of an int64 tensor is x."""

    def run(s, ids):
        moved = ids + 1
        same = moved.long()
        same -= 3
        return s.rows(moved.clamp(0, 9))

    net = Net(run, rows=nn.Embedding(20, 4)).eval()
    fused = rc.fuse(net, (torch.full((1, 3), 15),)).model
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(fused(ids), net(ids))


@pytest.mark.parametrize("example", [True, False])
def test_a_write_to_an_attribute_reaches_its_other_names(example):
    """`x.mT` is no method call, and yet a view; another name of it is read later."""

    def run(s, x):
        turned = s.conv(x).mT
        other = turned
        turned *= 2
        return other

    net, image = randomise(Net(run, conv=conv())), draw((1, 4, 6, 5))
    given = (image,) if example else None
    fused = rc.fuse(net, given, capture="symbolic_trace").model
    torch.testing.assert_close(fused(image), net(image))
