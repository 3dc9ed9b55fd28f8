"""What is known of values before anything runs: each call by its own settings."""

from __future__ import annotations

import pytest
import torch
from equality import Net, check, norms
from torch import nn

import repcompiler as rc
from repcompiler.compile import run_stages


class Alike(nn.Module):
    """Convs of one class and one input whose results differ in size all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.padded = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.strided = nn.Conv2d(4, 4, 3, stride=2)
        self.widened = nn.Conv2d(4, 4, 3)
        self.widened.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.widened.bias = None
        self.cropped = nn.Conv2d(4, 4, 3)
        self.cropped.forward = lambda x: x[..., :2, :2]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        convs = (self.plain, self.padded, self.strided, self.widened, self.cropped)
        return tuple(conv(x) for conv in convs)


def test_the_size_of_a_result_is_that_of_its_own_module():
    state = run_stages(Alike().eval(), torch.randn(2, 4, 8, 8), stop_after="lift")
    assert state.facts is not None
    shapes = {
        str(node.target): state.facts.shape(node)
        for node in state.graph_module.graph.nodes
        if node.op == "call_module"
    }
    assert shapes["plain"] == (2, 4, 6, 6)
    assert shapes["padded"] == (2, 4, 8, 8)
    assert shapes["strided"] == (2, 4, 3, 3)
    assert shapes["widened"] == (2, 6, 6, 6)
    assert shapes["cropped"] in ((2, 4, 2, 2), None)


class Numbers(nn.Module):
    """The same op with numbers that compare equal and mean other things."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.transpose(1, 2)
        total = x.sum(1, True), x.sum(1, False), torch.add(x.int(), 1)
        return *total, torch.add(x.int(), 1.0), y.reshape(-1), x.reshape(-1)


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_equal_numbers_of_another_type_are_told_apart(door):
    x = torch.randn(2, 3, 5)
    net = Numbers().eval()
    state = run_stages(net, x, stop_after="lift", door=door)
    assert state.facts is not None
    returned = next(n for n in state.graph_module.graph.nodes if n.op == "output")
    found = [(state.facts.shape(n), state.facts.dtype(n)) for n in returned.args[0]]
    assert found == [(tuple(y.shape), y.dtype) for y in net(x)]


@pytest.mark.parametrize("turned", [False, True])
def test_a_list_and_a_tuple_as_an_index_are_told_apart(turned):
    def run(s, x):
        total = x[1, 0].sum() if turned else x[[1, 0]].sum()
        taken = x[[1, 0]] if turned else x[1, 0]
        return s.norm(s.conv(taken)) if turned else s.conv(taken * s.scale) + total

    net = Net(run, conv=nn.Conv2d(2, 3, 1), norm=nn.BatchNorm2d(3))
    net.scale = nn.Parameter(torch.rand(2, 1, 1))
    result = check(net, [(2, 2, 4, 4), (3, 2, 5, 6)], door="symbolic_trace")
    assert not turned or norms(result.model) == 0


WRITES = {
    "unsqueeze_": lambda a: a.unsqueeze_(1),
    "transpose_": lambda a: a.transpose_(1, 3),
    "squeeze_": lambda a: a.unsqueeze(1).squeeze_(1),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_one_result_changes_no_other_of_the_same_op(write):
    def run(s, x):
        a = x * 2
        seen = a[0]  # keeps the write from being undone
        WRITES[write](a)
        return s.norm(s.conv(x * 2)) + seen.sum() + a.sum()

    net = Net(run, conv=nn.Conv2d(2, 4, 1), norm=nn.BatchNorm2d(4))
    result = check(net, [(4, 2, 6, 6)], door="symbolic_trace")
    assert norms(result.model) == 0


def test_values_that_strides_do_not_describe_are_worked_out_each_time():
    def run(s, x):
        flat = s.norm(s.conv(x)).sum((0, 1))
        sparse = [flat.to_sparse(), flat.to_sparse(), flat.to_sparse_csr()]
        return sum(part.to_dense() for part in sparse)

    net = Net(run, conv=nn.Conv2d(2, 4, 1), norm=nn.BatchNorm2d(4))
    result = check(net, [(4, 2, 6, 6)], door="symbolic_trace")
    assert norms(result.model) == 0


def test_weights_that_are_buffers_are_looked_at_too():
    def run(s, x):
        return s.first_norm(s.first(x)).relu().sum() + s.norm(s.conv(x))

    net = Net(run, first_norm=nn.BatchNorm2d(3), norm=nn.BatchNorm2d(4))
    for name, outputs in (("first", 3), ("conv", 4)):
        conv = nn.Conv2d(2, 4, 1, bias=False)
        weight = conv.weight.detach()[:outputs].clone()
        del conv.weight
        conv.register_buffer("weight", weight)
        setattr(net, name, conv)
    assert norms(check(net, [(4, 2, 6, 6)], blind=False).model) == 0


def test_models_of_repeated_blocks_are_fused_alike_twice():
    """Nothing is kept from one model for the next."""
    for width in (4, 6):
        block = [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)]
        net = nn.Sequential(*block, nn.ReLU(), *block).eval()
        result = rc.fuse(net, torch.randn(1, width, 9, 9))
        assert result.report.equivalence.verdict == "equal"
