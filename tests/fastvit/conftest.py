"""Models whose every norm and scale does something, in pairs with timm's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from fastvit import FastViT, create_model


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random statistics and scales: with fresh ones a norm is nearly the identity, and
    a layer scale of 1e-5 hides what its branch computes."""
    rng = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=rng) * std + mean)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                normal(module.running_mean, 0, 1)
                module.running_var.copy_(
                    0.5 + 1.5 * torch.rand(module.running_var.shape, generator=rng)
                )
                normal(module.weight, 1, 0.3)
                normal(module.bias, 0, 0.3)
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                normal(parameter, 0, 1)


def image(batch: int = 2, size: int = 64, chans: int = 3, seed: int = 7) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, chans, size, size, generator=rng)


@pytest.fixture
def make_image() -> Callable[..., Tensor]:
    return image


@pytest.fixture
def make_random() -> Callable[..., FastViT]:
    """create_model with random norms and scales, in eval mode."""

    def make(name: str, *, seed: int = 0, **options: object):
        torch.manual_seed(seed)
        model = create_model(name, **options)
        randomise(model, seed)
        return model.eval()

    return make


@pytest.fixture
def make_twins() -> Callable[..., tuple[FastViT, nn.Module]]:
    """(ours, timm's) with the same random weights, no drop path, in eval mode."""

    def make(name: str, **options: object):
        theirs = timm.create_model(name, pretrained=False, **options)
        randomise(theirs)
        ours = create_model(name, drop_path_rate=0.0, **options)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        return ours.eval(), theirs.eval()

    return make
