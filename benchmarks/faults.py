"""Faults, one at a time, as they happen to fused models; used by `false_alarms.py`.

Each is planted in a conv in the middle of the fused model whose input is padded, or in
the classifier. Another `eps` is planted before fusing: one norm of the original has
twice its own, so that every number of one region moves a little.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import repcompiler

CONVS = (nn.Conv2d,)
NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)


@dataclass(frozen=True)
class Planted:
    """A model with one fault, and the region that it is in."""

    model: nn.Module
    place: str


class Half(nn.Module):
    """A layer in bfloat16, between casts."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x.bfloat16()).to(x.dtype)


def one_weight(layer: Any) -> None:
    """One weight, of middle size, by a thousandth."""
    flat = layer.weight.view(-1)
    place = int(flat.abs().argsort()[len(flat) // 2])
    flat[place] *= 1 + 1e-3


def dropped_bias(layer: Any) -> None:
    """The bias is zero."""
    layer.bias.zero_()


def swapped_channels(layer: Any) -> None:
    """Two output channels have each other's weights."""
    layer.weight[[0, 1]] = layer.weight[[1, 0]]


def shifted_padding(layer: Any) -> None:
    """One row more before the image, one fewer behind: the kernel one tap on."""
    layer.weight.copy_(layer.weight.roll(1, -1))


def border_only(layer: Any) -> None:
    """The border repeats instead of being zero."""
    layer.padding_mode = "replicate"
    pads = [p for p in reversed(layer.padding) for _ in "ab"]
    layer._reversed_padding_repeated_twice = pads


IN_PLACE: dict[str, Callable[[Any], None]] = {
    "one weight by 1e-3": one_weight,
    "dropped bias": dropped_bias,
    "two channels swapped": swapped_channels,
    "padding shifted": shifted_padding,
    "border only": border_only,
}
KINDS = (*IN_PLACE, "another eps", "two class rows swapped", "an op in bfloat16")


def plant(kind: str, original: nn.Module, inputs: tuple[Tensor, ...]) -> Planted | None:
    """The fused form of a model with one fault; None where it has no such place."""
    if kind == "another eps":
        return _other_eps(original, inputs)
    result = repcompiler.fuse(original, inputs, verify=False)
    model, regions = result.model, result.report.regions
    layers = dict(model.named_modules())
    with torch.no_grad():
        if kind == "two class rows swapped":
            place = [n for n, m in layers.items() if isinstance(m, nn.Linear)][-1]
            swapped_channels(layers[place])
            return Planted(model, _region(place, regions))
        places = [name for name, layer in layers.items() if _padded(layer)]
        place = places[len(places) // 2]
        if kind == "an op in bfloat16":
            parent, _, field = place.rpartition(".")
            half = Half(copy.deepcopy(layers[place]))
            setattr(model.get_submodule(parent), field, half)
        else:
            IN_PLACE[kind](layers[place])
    return Planted(model, _region(place, regions))


def _padded(layer: nn.Module) -> bool:
    """A conv whose kernel hangs over a border of zeros, with a bias."""
    return (
        isinstance(layer, CONVS)
        and layer.bias is not None
        and layer.out_channels > 1
        and layer.padding_mode == "zeros"
        and max(layer.padding) > 0
        and layer.kernel_size[-1] > 1
    )


def _other_eps(original: nn.Module, inputs: tuple[Tensor, ...]) -> Planted | None:
    report = repcompiler.fuse(original, inputs, verify=False).report
    norms = {n for n, m in original.named_modules() if isinstance(m, NORMS)}
    places = [
        (region.name, name)
        for region in report.regions
        for name in (row.partition(":")[0] for row in region.removed)
        if name in norms
    ]
    if not places:
        return None
    region, name = places[len(places) // 2]
    other: Any = copy.deepcopy(original)
    other.get_submodule(name).eps *= 2
    return Planted(repcompiler.fuse(other, inputs, verify=False).model, region)


def _region(place: str, regions: Any) -> str:
    """The region that a layer of the fused model is, or belongs to."""
    for region in regions:
        if any(place == p or place.startswith(f"{p}.") for p in region.added):
            return region.name
    return place
