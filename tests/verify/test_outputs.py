"""What is compared: whatever holds the tensors, and what a run writes to."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from equality import draw, randomise
from torch import Tensor, nn

import repcompiler as rc


@dataclasses.dataclass
class Record:
    y: Any


class Own:
    def __init__(self, y: Any) -> None:
        self.inner = [Record(y), "text"]
        self.again = self  # a cycle


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": Record,
    "namespace": lambda y: types.SimpleNamespace(a=1, y=y),
    "object": Own,
    "inside": lambda y: {"zero": y * 0, "more": [Record(y)]},
    "number": lambda y: float(y.mean()),
    "whole": lambda y: int(y.mean() * 1000),
    "array": lambda y: np.asarray(y),
    "padded": lambda y: torch.nested.nested_tensor([y[0], y[1, :, :2]]),
}


class Holding(nn.Module):
    """A conv whose result is given in a form of the model's own."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.form = nn.Conv2d(4, 4, 3, padding=1), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.conv(x))


@pytest.mark.parametrize("holder", HOLDERS)
def test_whatever_holds_a_tensor_is_opened(holder: str) -> None:
    torch.manual_seed(0)
    model, other = (randomise(Holding(HOLDERS[holder])) for _ in range(2))
    nn.init.normal_(other.conv.weight)
    nn.init.constant_(other.conv.bias, 9.0)
    x = draw((2, 4, 5, 6))
    assert rc.verify(model, model, (x,)).verdict == "equal"
    assert rc.verify(model, other, (x,)).verdict == "different"


@pytest.mark.parametrize("form", [lambda y: {y}, lambda y: iter([y]), lambda y: None])
def test_what_cannot_be_opened_is_not_called_equal(form) -> None:
    model = randomise(Holding(form))
    report = rc.verify(model, model, (draw((2, 4, 5, 6)),))
    assert (report.verdict, report.ok) == ("not comparable", False)
    assert "nothing that can be compared" in report.note


class Average(nn.Module):
    """Keeps a running mean of what it sees, and may add it."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any], read: bool) -> None:
        super().__init__()
        self.conv, self.write, self.read = nn.Conv2d(4, 4, 3, padding=1), write, read
        self.register_buffer("mean", torch.zeros(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = y + self.mean if self.read else y
        self.write(self.mean, y.mean((0, 2, 3))[:, None, None])
        return z


def _apart(mean: Tensor, seen: Tensor) -> None:
    mean.mul_(0.9)
    mean.add_(seen, alpha=0.1)


CHAINS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mul add": lambda mean, seen: mean.mul_(0.9).add_(seen, alpha=0.1),
    "apart": _apart,
    "lerp add": lambda mean, seen: mean.lerp_(seen, 0.1).add_(1.0),
    "copy add": lambda mean, seen: mean.copy_(seen).add_(1.0),
    "add relu": lambda mean, seen: mean.add_(seen).relu_(),
    "through a view": lambda mean, seen: mean.view(4, 1, 1).mul_(0.9).add_(seen),
    "once": lambda mean, seen: mean.add_(seen),
}


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("chain", CHAINS)
def test_every_write_of_a_chain_reaches_the_buffer(chain, read, door) -> None:
    model = randomise(Average(CHAINS[chain], read))
    x = draw((2, 4, 5, 6))
    result = rc.fuse(model, (x,), capture=door)
    assert result.report.equivalence.verdict == "equal"
    fused = result.model
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)
    own, found = model.get_buffer("mean"), fused.get_buffer("mean")
    assert own.abs().max() > 0.01
    torch.testing.assert_close(found, own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("read", [False, True])
def test_a_write_that_is_left_out_is_seen(read) -> None:
    model = randomise(Average(CHAINS["mul add"], read))
    other = Average(lambda mean, seen: mean.mul_(0.9), read).double().eval()
    other.load_state_dict(model.state_dict())
    report = rc.verify(model, other, (draw((2, 4, 5, 6)),))
    assert (report.verdict, report.ok) == ("different", False)
    assert report.note == "mean, which the reference writes to, holds something else"
