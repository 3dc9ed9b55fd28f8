"""Deliberate faults, one at a time: each must be seen, and a lying rule undone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import randomise
from torch import Tensor, nn

import repcompiler as rc
from repcompiler.affine import Diagonal, Vector, Window
from repcompiler.compile import run_stages
from repcompiler.probes import probe_shapes
from repcompiler.region_error import region_error
from repcompiler.regions import fused_form, original_form
from repcompiler.verify import EXACT, compare


class Branches(nn.Module):
    """A grouped conv with its norm, a second branch and a skip: one conv when fused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1, groups=4)
        self.head = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x)) + self.point(x) + x))


def fused_conv(model: nn.Module) -> nn.Conv2d:
    """The conv that replaced the branches."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return next(conv for conv in convs if conv.out_channels == 8)


def wrong_eps(conv: nn.Conv2d) -> None:
    """As a norm with eps 1e-3 in place of 1e-5 would scale."""
    conv.weight.mul_((1 + 1e-5) ** 0.5 / (1 + 1e-3) ** 0.5)


def shifted_padding(conv: nn.Conv2d) -> None:
    conv.weight.copy_(conv.weight.roll(1, dims=-1))


def border_only(conv: nn.Conv2d) -> None:
    conv.padding_mode = "replicate"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def swapped_groups(conv: nn.Conv2d) -> None:
    conv.weight.copy_(conv.weight.roll(4, dims=0))


def swapped_channels(conv: nn.Conv2d) -> None:
    conv.weight[[0, 1]] = conv.weight[[1, 0]]


def dropped_bias(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    conv.bias.zero_()


def wrong_axis(conv: nn.Conv2d) -> None:
    conv.weight.copy_(conv.weight.transpose(-1, -2).clone())


def one_weight(conv: nn.Conv2d) -> None:
    conv.weight[0, 0, 0, 0] *= 1 + 1e-3


FAULTS = (
    wrong_eps,
    shifted_padding,
    border_only,
    swapped_groups,
    swapped_channels,
    dropped_bias,
    wrong_axis,
    one_weight,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_a_region_is_seen(fault: Callable[[nn.Conv2d], None]) -> None:
    """Errors of a region are judged by channel, in float64: 1e-9 is enough to see."""
    model, inputs = randomise(Branches()), torch.randn(2, 8, 9, 9)
    state = run_stages(model, inputs, stop_after="select")
    assert state.facts is not None
    (region,) = state.regions
    original = original_form(region, state.graph_module, state.facts)
    shapes = probe_shapes(region.meaning, region.value, state.facts)
    errors: dict[str, float] = {}
    for name in ("sound", "faulty"):
        fused = fused_form(region, state.graph_module, state.facts)
        if name == "faulty":
            with torch.no_grad():
                fault(fused_conv(fused))
        error = region_error(original, fused, shapes, region.meaning.axis)
        assert error is not None
        errors[name] = error
    assert errors["sound"] <= 1e-12
    assert errors["faulty"] > 1e3 * EXACT


@pytest.mark.parametrize("fault", FAULTS[:-1], ids=lambda fault: fault.__name__)
def test_a_fault_in_a_whole_model_is_seen(fault: Callable[[nn.Conv2d], None]) -> None:
    model, inputs = randomise(Branches()), torch.randn(2, 8, 9, 9)
    fused = rc.fuse(model, inputs).model
    assert rc.verify(model, fused, (inputs,)).ok
    with torch.no_grad():
        fault(fused_conv(fused))
    report = rc.verify(model, fused, (inputs,))
    assert not report.ok
    assert report.verdict == "different"


def lying(change: Callable[[Any], Any]) -> dict[Any, rc.Rule]:
    """The table with a norm that says something else than it does."""
    honest = rc.RULES[nn.BatchNorm2d]

    def meaning(op: rc.Op) -> Any:
        own = honest.meaning(op)
        return change(own) if isinstance(own, rc.Affine) else own

    return {**rc.RULES, nn.BatchNorm2d: replace(honest, meaning=meaning)}


def forgets_bias(own: rc.Affine) -> rc.Affine:
    return replace(own, bias=None)


def scales_a_little(own: rc.Affine) -> rc.Affine:
    ((source, map),) = own.parts
    assert isinstance(map, Diagonal)
    assert map.scale is not None
    scale = map.scale
    wrong = Vector(scale.size, lambda: scale.value() * (1 + 1e-6))
    return replace(own, parts=((source, replace(map, scale=wrong)),))


@pytest.mark.parametrize("change", [forgets_bias, scales_a_little])
def test_a_rule_that_lies_is_undone_and_said(change: Callable[[Any], Any]) -> None:
    model, inputs = randomise(Branches()), torch.randn(2, 8, 9, 9)
    result = rc.fuse(model, inputs, rules=lying(change))
    assert "not_equal" in {kept.reason for kept in result.report.kept}
    assert result.report.equivalence.ok
    with torch.no_grad():
        expected, found = model(inputs), result.model(inputs)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_kernel_that_is_not_finite_is_undone() -> None:
    def breaks(own: rc.Affine) -> rc.Affine:
        ((source, map),) = own.parts
        assert isinstance(map, Diagonal)
        nan = Vector(8, lambda: torch.full((8,), float("nan"), dtype=torch.float64))
        return replace(own, parts=((source, replace(map, scale=nan)),))

    model, inputs = randomise(Branches()), torch.randn(2, 8, 9, 9)
    report = rc.fuse(model, inputs, rules=lying(breaks)).report
    assert report.equivalence.ok
    assert "not_equal" in {kept.reason for kept in report.kept}


def test_a_model_in_another_dtype_is_judged_by_that_dtype() -> None:
    """bfloat16 rounds 65,000 times as coarsely; that alone is no difference."""
    model, inputs = randomise(Branches()).bfloat16(), torch.randn(2, 8, 9, 9).bfloat16()
    report = rc.fuse(model, inputs).report
    assert report.equivalence.ok
    wide = copy.deepcopy(model).float()
    assert not rc.verify(wide, _Widened(model), (inputs.float(),)).ok


class _Widened(nn.Module):
    """A bfloat16 model behind float32 inputs and outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.bfloat16()).float()


class Spectrum(nn.Module):
    """A fusible conv in front of an output of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.turn = Branches(), 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(self.inner(x))
        return torch.complex(y.real, self.turn * y.imag)


def test_complex_outputs_are_judged_by_both_parts() -> None:
    model, inputs = randomise(Spectrum()).float(), torch.randn(2, 8, 9, 9)
    result = rc.fuse(model, (inputs,))
    assert result.report.equivalence.verdict == "equal"
    assert result.report.regions
    other = copy.deepcopy(model)
    other.turn = -1.0
    assert rc.verify(model, result.model, (inputs,)).ok
    assert rc.verify(model, other, (inputs,)).verdict == "different"


def test_windows_compare_by_geometry() -> None:
    """Kernels are no part of equality, so that geometry can be a key."""
    window = Window(-3, 4, 4, 1, (), "zeros", lambda: torch.zeros(4, 4))
    assert window == replace(window, kernel=lambda: torch.ones(4, 4))


def test_an_output_of_another_dtype_is_no_equal_one():
    conv = torch.nn.Conv2d(4, 4, 1)
    wide = copy.deepcopy(conv).double()
    candidate = torch.nn.Sequential(conv, Widened())
    verdict = compare(conv, candidate, wide, [(torch.ones(1, 4, 3, 3),)])
    assert (verdict.ok, verdict.note) == (False, "output dtypes differ")


class Widened(torch.nn.Module):
    """The same numbers in float64."""

    def forward(self, x):
        """As they are."""
        return x.double()
