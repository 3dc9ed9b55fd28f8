"""Honest fusions that once were false alarms: other rounding, and other sizes."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from equality import randomise
from fastvit_cli import checking, origins, runners
from fastvit_cli.card import Card
from fastvit_cli.sources import Loaded
from torch import nn
from torch.fx.experimental.optimization import fuse as torch_fuse

import repcompiler as rc

INPUT = (1, 3, 32, 32)


class Mixed(nn.Module):
    """Layers that fusing makes anew, and as many that stay."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(4):
            setattr(self, f"conv{i}", nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1))
            setattr(self, f"norm{i}", nn.BatchNorm2d(8))
            setattr(self, f"stay{i}", nn.Conv2d(8, 8, 1))
            setattr(self, f"last{i}", nn.Conv2d(8, 8, 1))

    def forward(self, x):
        for i in range(4):
            x = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x)).relu()
            x = getattr(self, f"stay{i}")(x).sigmoid()
            x = getattr(self, f"last{i}")(x).sigmoid()
        return x.mean((2, 3))


class Windows(nn.Module):
    """Resized to whole windows where the size asks for it, so that export is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm(self.conv(x))
        if x.shape[-1] % 8 or x.shape[-2] % 8:
            x = F.interpolate(x, size=(32, 32), mode="bilinear")
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 8, 8, w // 8, 8).amax((3, 5)).flatten(1).sum(1)


def loaded(model: nn.Module) -> Loaded:
    inputs = (torch.randn(INPUT),)
    card = Card("net", {"input_size": INPUT[1:]}, weights={"origin": "factory"})
    return Loaded("net", model, inputs, card, "float32", "cpu")


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(kind()).float().eval()


def ask(model: nn.Module, other: nn.Module) -> checking.Outcome:
    pair = [runners.of(loaded(m)) for m in (model, other)]
    return checking.ask(*pair, samples=2, seed=0)


def test_a_fuser_that_rounds_otherwise_is_judged_by_the_outputs():
    model = made(Mixed)
    outcome = ask(model, torch_fuse(copy.deepcopy(model)).eval())
    assert outcome.verdict == "equal"
    # Our own fused form is still compared number by number.
    fused = rc.fuse(model, (torch.randn(INPUT),)).model
    own = ask(model, fused)
    assert own.verdict == "equal" and own.decided


def test_one_layer_of_a_fused_model_cannot_pass_for_another_fuser():
    model = made(Mixed)
    fused = rc.fuse(model, (torch.randn(INPUT),)).model
    name = next(n for n, p in fused.named_parameters() if p.dim() == 4)
    with torch.no_grad():
        layer = fused.get_submodule(name.rpartition(".")[0])
        layer.weight.mul_(1 + 3e-6)
        layer.bias.mul_(1 + 3e-6)
    outcome = ask(model, fused)
    assert outcome.verdict == "different" and outcome.first is not None
    assert outcome.first["place"].startswith(name.rpartition(".")[0])


def test_a_graph_captured_at_one_size_may_refuse_another():
    model = made(Windows)
    result = rc.fuse(model, (torch.randn(INPUT),))
    assert result.report.capture == "export"
    outcome = ask(model, result.model)
    assert outcome.verdict == "equal"
    refused = [f for f in outcome.findings if "captured at another size" in f.note]
    assert refused and all(f.verdict == "skipped" for f in refused)


class Refusing(nn.Module):
    """Says nothing about sizes, and refuses some."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        if x.shape[-1] != INPUT[-1]:
            raise ValueError("another size")
        return self.model(x)


def test_a_module_that_says_no_sizes_may_not_refuse_one():
    model = made(Mixed)
    outcome = ask(model, Refusing(model))
    assert outcome.verdict == "different"
    assert any("does not run" in f.note for f in outcome.findings)


def test_the_origin_of_another_fusers_model_is_not_claimed():
    model = made(Mixed)
    other = torch_fuse(copy.deepcopy(model)).eval()
    found = origins.trace(*(runners.of(loaded(m)) for m in (model, other)))
    assert found is not None and not found.related


class Silent(nn.Module):
    """Returns no tensor at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return "text"


def test_models_that_return_no_tensor_are_not_called_equal():
    model = made(Silent)
    assert ask(model, copy.deepcopy(model)).verdict == "not comparable"
