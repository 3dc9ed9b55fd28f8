"""What a model returns is the caller's own, in whatever it is wrapped."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch
from equality import Net, conv, draw, ops, randomise, tensors
from torch import nn

import repcompiler as rc
from repcompiler.verify import compare

Pair = namedtuple("Pair", "a b")


def net(run) -> nn.Module:
    """A conv and a norm, a table and an index, and a forward of one's own."""
    parts = {"conv": conv(), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU(inplace=True)}
    model = Net(run, **parts, table=nn.Parameter(torch.randn(4, 1, 1)))
    model.register_buffer("index", torch.tensor([1, 0, 3, 2]))
    return randomise(model).float()


def with_sizes(s, x):
    y = s.norm(s.conv(x)).clone()
    height, width = y.shape[2:]
    return y, height, width


WRAPPED = {
    "sizes": with_sizes,
    "blocks": lambda s, x: (s.norm(s.conv(x)), x.clone().chunk(2, 1)),
    "named tuple": lambda s, x: Pair(s.norm(s.conv(x)), s.table * 2),
    "ordered": lambda s, x: OrderedDict(a=s.norm(s.conv(x)), b=s.table * 2),
    "nested": lambda s, x: {"a": (x.clone(), [s.table * 2]), "b": s.conv(x)},
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("blind", [False, True])
def test_a_caller_may_write_to_every_tensor_that_it_is_given(name, blind):
    model, image = net(WRAPPED[name]), draw((2, 4, 6, 5)).float()
    result = rc.fuse(model, None if blind else (image,))
    assert result.report.equivalence.ok
    kept = image.clone()
    with torch.no_grad():
        found, expected = result.model(image), model(image)
        assert type(found) is type(expected)
        for tensor in tensors(found):
            tensor.add_(100)
        assert torch.equal(image, kept)
        torch.testing.assert_close(tensors(result.model(image)), tensors(expected))


GATHERED = [1, 0, 3, 2]


@pytest.mark.parametrize(
    "run",
    [
        lambda s, x: s.norm(s.conv(s.relu(x[:, torch.tensor(GATHERED)]))),
        lambda s, x: s.norm(s.conv(s.relu(torch.einsum("oc,bchw->bohw", s.eye, x)))),
    ],
    ids=["index", "einsum"],
)
def test_writes_to_what_a_table_chose_are_no_writes_to_the_table(run):
    model = net(run)
    model.eye = torch.eye(4)
    result = rc.fuse(model)
    assert result.report.equivalence.verdict == "regions equal"
    image = draw((2, 4, 6, 5)).float()
    torch.testing.assert_close(result.model(image), model(image))


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize(
    "run",
    [
        lambda s, x: s.norm(s.conv(x))[:, torch.tensor(GATHERED)],
        lambda s, x: s.norm(s.conv(x))[:, s.index.flip(0)],
        lambda s, x: s.norm(s.conv(x)) * s.table.sigmoid(),
    ],
    ids=["constant", "buffer", "scale"],
)
def test_what_an_op_makes_anew_is_not_copied(run, blind):
    image = draw((2, 4, 6, 5)).float()
    fused = rc.fuse(net(run), None if blind else (image,)).model
    assert not any("clone" in name for name in ops(fused))


def test_a_result_that_is_not_finite_where_the_original_is_counts_as_different():
    class Lost(nn.Module):
        def forward(self, x):
            return x / 0

    model, image = nn.Sequential(nn.Conv2d(4, 4, 1)).eval(), (draw((1, 4, 3, 3)),)
    verdict = rc.verify(model.double(), nn.Sequential(model, Lost()), image)
    assert verdict.verdict == "different" and "not finite" in verdict.note


def test_an_empty_batch_of_rows_is_compared():
    model = randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    assert rc.fuse(model, (torch.empty(0, 4, dtype=torch.float64),)).report.regions


def test_what_cannot_be_compared_stays_so_whatever_comes_after_it():
    """The second of three batches overflows; the first was exact."""
    model = randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    image = draw((2, 4))
    batches = [(image,), (image * float("inf"),), (image,)]
    verdict = compare(model, model, model, batches)
    assert verdict.verdict == "not comparable"
