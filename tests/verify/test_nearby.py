"""A model that decides by its own rounding is judged by how far that takes it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from equality import randomise
from torch import nn

import repcompiler as rc
from repcompiler.nearby import against_nearby, against_nearby64, is_as_near
from repcompiler.verify import MAX_ERROR_RATIO, compare


class Ranked(nn.Module):
    """The positions of a map, best first: a near tie falls either way."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 8, 1),
        )  # fmt: skip

    def forward(self, x):
        y = self.net(x).flatten(2)
        order = y[:, 0].argsort(dim=1)
        return y.gather(2, order[:, None].expand_as(y))


def near_tie() -> tuple[nn.Module, nn.Module, tuple[torch.Tensor]]:
    """A model, its fused form, and an input on which a tie falls the other way."""
    torch.manual_seed(0)
    model = randomise(Ranked()).float()
    fused = rc.fuse(model, (torch.randn(1, 3, 24, 24),), verify=False).model
    for _ in range(1000):  # which input it is differs from one CPU to another
        inputs = (torch.randn(1, 3, 24, 24),)
        if (rc.verify(model, fused, inputs).error_ratio or 0.0) > MAX_ERROR_RATIO:
            return model, fused, inputs
    raise AssertionError("no near tie was found")


def test_near_ties_that_fall_the_other_way_are_no_difference() -> None:
    model, _, inputs = near_tie()
    equal = rc.fuse(model, inputs, samples=1).report.equivalence
    assert equal.exactness is not None and equal.exactness < 1e-12
    assert equal.error_ratio is not None and equal.error_ratio > MAX_ERROR_RATIO
    assert equal.ok and "its own rounding" in equal.note


@pytest.mark.parametrize("fault", [1e-2, 1e-3, 1e-4])
def test_a_small_fault_is_not_hidden_behind_the_ties(fault: float) -> None:
    model, fused, inputs = near_tie()
    wide = copy.deepcopy(fused).double()
    with torch.no_grad():
        next(fused.parameters()).mul_(1 + fault)
    verdict = compare(model, fused, wide, [inputs])
    verdict = replace(verdict, exactness=0.0)  # as if only the rounding were at fault
    assert not against_nearby(model, fused, [inputs], verdict).ok


def test_what_is_not_exact_gets_no_second_look() -> None:
    model, _, inputs = near_tie()
    verdict = replace(rc.verify(model, model, inputs), verdict="different", ok=False)
    for exactness in (None, 1e-6):
        again = replace(verdict, exactness=exactness)
        assert against_nearby(model, model, [inputs], again) == again


class Tied(nn.Module):
    """Scores that are alike up to their last bit, and control flow on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4),
        )  # fmt: skip

    def forward(self, x):
        y = self.body(x).flatten(1)
        if float(y.mean()) > 1e30:
            return y, y[:, 0]
        best = (y * 3.7 / y).argmax(dim=1)
        return y, (best % 2).to(y)


def test_parts_are_fused_though_exact_ties_fall_the_other_way_in_float64() -> None:
    torch.manual_seed(0)
    model, inputs = randomise(Tied()).float(), (torch.randn(16, 3, 12, 12),)
    report = rc.fuse(model, inputs).report
    assert report.capture == "submodules"
    assert [region.name for region in report.regions] == ["body.0", "body.3"]
    assert report.equivalence.ok
    assert "in float64 as well" in report.equivalence.note
    assert report.equivalence.exactness is None


def test_what_does_not_jump_has_to_agree_beside_what_does() -> None:
    torch.manual_seed(0)
    model, inputs = randomise(Tied()).float(), (torch.randn(16, 3, 12, 12),)
    wide = copy.deepcopy(model).double()
    assert is_as_near(model, wide, [inputs])
    with torch.no_grad():
        wide.body[3].weight.view(-1)[0] *= 1 + 1e-9
    assert not is_as_near(model, wide, [inputs])


class Chaotic(nn.Module):
    """A logistic map, each step of which doubles what was rounded before it."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sigmoid())

    def forward(self, x):
        y = self.net(x)
        for _ in range(self.steps):
            y = 3.99 * y * (1 - y)
        return y


def test_a_model_that_magnifies_its_rounding_is_judged_by_its_own() -> None:
    torch.manual_seed(0)
    model = randomise(Chaotic(35)).float()
    report = rc.fuse(model, (torch.randn(2, 3, 8, 8),)).report
    equal = report.equivalence
    assert report.regions and equal.exactness is not None and equal.exactness > 1e-9
    assert equal.ok and "magnifies its own rounding" in equal.note


def test_where_no_digits_are_left_nothing_is_called_equal() -> None:
    torch.manual_seed(0)
    model = randomise(Chaotic(90)).float()
    equal = rc.fuse(model, (torch.randn(2, 3, 8, 8),)).report.equivalence
    assert equal.verdict == "not comparable" and not equal.ok
    assert "no digits are left" in equal.note


@pytest.mark.parametrize("fault", [1e-6, 1e-9])
def test_a_fault_is_not_hidden_where_little_is_magnified(fault: float) -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    batch = (torch.randn(2, 3, 8, 8),)
    wide = copy.deepcopy(model).double()
    assert is_as_near(model, wide, [batch])
    with torch.no_grad():
        next(wide.parameters()).mul_(1 + fault)
    assert not is_as_near(model, wide, [batch])


@pytest.mark.parametrize(("fault", "equal"), [(0.0, True), (1e-3, False)])
def test_its_own_dtype_is_looked_at_too_where_float64_has_digits(fault, equal) -> None:
    """SE-ResNet-152: by chance the original's own error was small for its kind."""
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    batch = (torch.randn(2, 3, 8, 8),)
    model = model.float()
    fused = rc.fuse(model, batch, verify=False).model
    with torch.no_grad():
        next(fused.parameters()).mul_(1 + fault)
    far = rc.verify(model, model, batch)
    far = replace(far, ok=False, verdict="different", exactness=1e-8, error_ratio=99.0)
    wide = copy.deepcopy(model).double()
    assert against_nearby64(model, fused, wide, [batch], far).ok is equal
