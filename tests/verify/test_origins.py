"""A fused candidate beside its twin: small faults found in real nets, by region."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from fastvit_cli import sources
from fastvit_cli.builders import ModelOptions
from helpers import randomise
from torch import nn

import repcompiler as rc
from repcompiler.differences import align
from repcompiler.provenance import twins
from repcompiler.segments import confirmed
from repcompiler.steps import as_program, program_steps

# model → (a fused conv whose input is padded, the classifier)
MODELS = {
    "fastvit_sa12": ("stages.1.blocks.0.token_mixer", "head.fc"),
    "torchvision:resnet18": ("layer2.0.conv1", "fc"),
}


class Half(nn.Module):
    """The op in another dtype, between casts."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x.bfloat16()).float()


def swap_channels(layer: nn.Module) -> None:
    layer.weight[[0, 1]] = layer.weight[[1, 0]]


def border_only(layer: nn.Module) -> None:
    layer.padding_mode = "replicate"
    layer._reversed_padding_repeated_twice = [p for p in layer.padding for _ in "ab"]


FAULTS: dict[str, Callable[[nn.Module], object]] = {
    "one weight": lambda layer: layer.weight.view(-1)[7].mul_(1 + 1e-3),
    "dropped bias": lambda layer: layer.bias.zero_(),
    "swapped channels": swap_channels,
    "another eps": lambda layer: layer.weight.mul_(1 + 5e-6),
    "shifted padding": lambda layer: layer.weight.copy_(layer.weight.roll(1, -1)),
    "border only": border_only,
}


@pytest.fixture(scope="module", params=list(MODELS))
def case(request):
    """Name, example inputs, twin, its program, and an honest fusion."""
    loaded = sources.load(request.param, ModelOptions(input_size=(3, 64, 64)))
    model = randomise(loaded.model)
    twin = next(twins(model, loaded.inputs))
    program = as_program(twin.model, loaded.inputs)
    honest = rc.fuse(model, loaded.inputs, verify=False).model
    return request.param, loaded.inputs, twin, program, honest


def differences(case, candidate):
    """What is not as it should be in a candidate."""
    _, inputs, twin, program, _ = case
    other = as_program(candidate, inputs)
    found = align(program_steps(program), program_steps(other), twin.exact)
    assert found.related
    return confirmed(found, program, other, inputs)


def test_an_honest_fusion_has_no_difference(case):
    assert differences(case, case[-1]) == ()


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_found_and_its_region_named(case, fault):
    name, _, twin, _, honest = case
    broken = copy.deepcopy(honest)
    place = MODELS[name][0]
    with torch.no_grad():
        FAULTS[fault](broken.get_submodule(place))
    first, *rest = differences(case, broken)
    assert rest == []
    region = twin.region_of(first.place)
    assert region is not None
    assert region.name == place
    if fault == "one weight":
        assert first.channel == 0
        assert first.error == pytest.approx(1e-3, rel=1)


def test_a_swapped_row_of_the_classifier_is_found(case):
    broken = copy.deepcopy(case[-1])
    place = MODELS[case[0]][1]
    with torch.no_grad():
        swap_channels(broken.get_submodule(place))
    (first, *_) = differences(case, broken)
    assert first.place == f"{place}.weight"
    assert first.channel in (0, 1)


def test_an_op_in_another_dtype_is_found(case):
    broken = copy.deepcopy(case[-1])
    place = MODELS[case[0]][0]
    parent, _, field = place.rpartition(".")
    setattr(broken.get_submodule(parent), field, Half(broken.get_submodule(place)))
    (first, *_) = differences(case, broken)
    region = case[2].region_of(first.place)
    assert region is not None
    assert region.name == place
    assert "bfloat16" in first.detail
