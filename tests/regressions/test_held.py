"""Fusing leaves a model as it was, whatever its forward writes to."""

from __future__ import annotations

import copy

import pytest
import torch
from equality import conv, draw, randomise
from torch import nn

import repcompiler as rc


class Writes(nn.Module):
    """Writes to a parameter, and to a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)
        self.gain = nn.Parameter(torch.rand(1, 4, 1, 1) + 0.5)
        self.table = nn.Parameter(torch.rand(3, 4))

    def forward(self, x):
        self.gain.mul_(0.5)
        self.table[1].add_(1.0)
        return self.norm(self.conv(x)) * self.gain


@pytest.mark.parametrize("door", ["auto", "symbolic_trace", "export"])
def test_parameters_that_forward_writes_to_are_put_back(door):
    net = randomise(Writes())
    before = copy.deepcopy(net.state_dict())
    x = draw((2, 4, 6, 6))
    with torch.no_grad():
        fused = rc.fuse(net, (x,), capture=door).model
        for name, value in net.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        torch.testing.assert_close(fused(x), net(x), rtol=1e-9, atol=1e-9)


class Swaps(nn.Module):
    """Puts other numbers under a parameter, which no op of torch's shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shift = conv(), nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x):
        self.shift.data = self.shift.data + 1
        return self.conv(x) + self.shift


@pytest.mark.parametrize("door", ["auto", "symbolic_trace", "export", "submodules"])
def test_what_is_put_under_a_parameter_is_taken_out_again(door):
    net = randomise(Swaps())
    with pytest.raises(rc.CaptureError):
        rc.fuse(net, (draw((2, 4, 6, 6)),), capture=door)
    assert float(net.shift.abs().max()) == 0.0
    rc.verify(net, net, (draw((2, 4, 6, 6)),))
    assert float(net.shift.abs().max()) == 0.0


def test_a_compiled_candidate_runs_compiled():
    runs: list[int] = []

    def backend(graph, _inputs):
        def run(*args):
            runs.append(1)
            return graph.forward(*args)

        return run

    net = randomise(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    compiled = torch.compile(net, backend=backend)
    assert rc.verify(net, compiled, (draw((2, 4, 6, 6)),)).ok
    assert runs


def by_data(held):
    held.data.add_(1)


def by_item(held):
    held.data[0] += 1


def by_foreach(held):
    torch._foreach_add_([held], 1.0)


class Uncounted(nn.Module):
    """Writes to a buffer in a way that counts no version of it."""

    def __init__(self, write) -> None:
        super().__init__()
        self.conv, self.norm, self.write = conv(), nn.BatchNorm2d(4), write
        self.register_buffer("held", torch.zeros(4))

    def forward(self, x):
        self.write(self.held)
        return self.norm(self.conv(x)) + self.held[:, None, None]


@pytest.mark.parametrize("write", [by_data, by_item, by_foreach])
def test_writes_that_count_no_version_are_put_back(write):
    model = randomise(Uncounted(write))
    twin, x = copy.deepcopy(model), draw((2, 4, 6, 6))
    result = rc.fuse(model, (x,))
    assert not model.held.any()
    assert result.report.equivalence.verdict == "equal"
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(result.model(x), twin(x), rtol=1e-12, atol=1e-12)


class TwoNames(nn.Module):
    """One buffer under two names, written by one and read by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.register_buffer("one", torch.zeros(4, 1, 1))
        self.register_buffer("two", self.one)

    def forward(self, x):
        self.two.add_(1)
        return self.conv(x) * self.one


def test_a_buffer_of_two_names_is_one_in_float64_too():
    model = randomise(TwoNames()).float()
    model.two = model.one
    report = rc.fuse(model, (draw((2, 4, 6, 6)).float(),)).report
    assert report.equivalence.verdict == "equal"
    assert report.equivalence.exactness < 1e-12


BUFFERS = {
    "sparse": torch.eye(3).to_sparse(),
    "8 bits": torch.eye(3).to(torch.float8_e4m3fn),
    "unsigned": torch.ones(3, dtype=torch.uint16),
    "complex": torch.ones(3, dtype=torch.complex64),
}


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize("kind", BUFFERS)
def test_a_buffer_of_any_kind_may_lie_beside(kind, door):
    model = randomise(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    model.register_buffer("beside", BUFFERS[kind])
    report = rc.fuse(model, (draw((2, 4, 6, 6)),), capture=door).report
    assert (report.equivalence.verdict, report.ops.after) == ("equal", 1)


@pytest.mark.parametrize("door", ["auto", "export"])
def test_a_model_that_cannot_be_copied_is_refused_with_a_remedy(door):
    model = randomise(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    model.register_buffer("beside", torch.eye(3).to_sparse_csr())
    with pytest.raises(rc.UnsupportedInput, match="cannot be copied"):
        rc.fuse(model, (draw((2, 4, 6, 6)),), capture=door)
